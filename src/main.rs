//! The command line: parse, run, print an error in one line, exit.

use std::process::ExitCode;

use clap::Parser;
use flopaudit::{cli::Cli, error::Error};

fn main() -> ExitCode {
    let cli = Cli::parse();
    match flopaudit::cli::run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        // A reader that went away (`| head`) is no error of ours.
        Err(e) if is_broken_pipe(&e) => ExitCode::SUCCESS,
        Err(e) => {
            let red = anstyle::AnsiColor::Red.on_default().bold();
            anstream::eprintln!("{red}error:{red:#} {e:#}");
            ExitCode::from(Error::exit_code(&e))
        }
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause
            .downcast_ref::<std::io::Error>()
            .is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
    })
}
