//! `flopaudit gpus`: the devices whose peaks are known, and who states them.

use super::args::OutputArgs;
use crate::{
    error::Result,
    hardware::Gpu,
    report::{self, SCHEMA_VERSION},
};

/// Flags of `gpus`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    output: OutputArgs,
}

/// What `--json` writes.
#[derive(serde::Serialize)]
struct List {
    schema_version: u32,
    command: &'static str,
    gpus: Vec<Gpu>,
}

/// Lists them.
pub fn run(args: Args) -> Result<()> {
    let output = args.output.open()?;
    let list = List { schema_version: SCHEMA_VERSION, command: "gpus", gpus: Gpu::all()? };
    output.write_with(&list, || report::print_gpus(&list.gpus))
}
