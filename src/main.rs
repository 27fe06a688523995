//! The command line: parse, run, print an error in one line, exit.

use std::process::ExitCode;

use clap::Parser;
use flopaudit::{
    cli::{self, Cli},
    error::Error,
};

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        // Help and version are no errors; real ones shrink to what is wrong.
        Err(e) if !e.use_stderr() => e.exit(),
        Err(e) => return fail(&cli::usage_error(&e).into()),
    };
    match cli::run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        // A reader that went away (`| head`) is no error of ours.
        Err(e) if is_broken_pipe(&e) => ExitCode::SUCCESS,
        Err(e) => fail(&e),
    }
}

fn fail(error: &anyhow::Error) -> ExitCode {
    let red = anstyle::AnsiColor::Red.on_default().bold();
    anstream::eprintln!("{red}error:{red:#} {error:#}");
    ExitCode::from(Error::exit_code(error))
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause
            .downcast_ref::<std::io::Error>()
            .is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
    })
}
