//! `flopaudit completions` and `flopaudit man`: for shells and for `man`, from the flags themselves.

use std::{io::Write, path::PathBuf};

use anyhow::Context;
use clap::Command;
use clap_complete::{Generator, Shell};
use clap_mangen::Man;

use crate::{
    error::{Error, Result},
    target::Target,
};

/// Flags of `completions`.
#[derive(Debug, clap::Args)]
#[command(after_help = "For example: flopaudit completions bash > \
                        ~/.local/share/bash-completion/completions/flopaudit")]
pub struct Args {
    /// Whose
    shell: Shell,
}

/// Flags of `man`.
#[derive(Debug, clap::Args)]
pub struct ManArgs {
    /// Write a page a command into DIR; without it, the main page goes to stdout
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// Prints the script that completes `command` in a shell.
pub fn completions(args: &Args, mut command: Command) -> Result<()> {
    let name = command.get_name().to_string();
    command.set_bin_name(name);
    command.build();
    print(|out| args.shell.try_generate(&command, out))
}

/// Prints the main page, or writes all of them.
pub fn man(args: &ManArgs, command: Command) -> Result<()> {
    let mut command = command.disable_help_subcommand(true);
    command.build();
    let Some(dir) = &args.out else { return print(|out| Man::new(command).render(out)) };
    let bad = |e: std::io::Error| Error::File { file: dir.clone(), why: e.to_string() };
    std::fs::create_dir_all(dir).map_err(bad)?;
    for page in pages(&command) {
        let file = dir.join(page.get_filename());
        Target::open(&file)?.write_with(|out| Ok(page.render(out)?))?;
    }
    Ok(())
}

/// A page of `command` and of each command below it.
fn pages(command: &Command) -> Vec<Man> {
    let below = command.get_subcommands().filter(|c| !c.is_hide_set()).flat_map(pages);
    std::iter::once(Man::new(command.clone())).chain(below).collect()
}

fn print(content: impl FnOnce(&mut dyn Write) -> std::io::Result<()>) -> Result<()> {
    Target::Stdout.write_with(|out| Ok(content(out)?)).context("stdout")
}
