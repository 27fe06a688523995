//! `flopaudit report`: the JSON of other commands as one page to look at.

use std::path::PathBuf;

use crate::{
    error::{Error, Result},
    report::{
        Target,
        html::{self, Input},
    },
};

/// Flags of `report`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// JSON that generate, train, eval, audit, count, plan, reconcile, bench or ceiling wrote
    #[arg(value_name = "FILE.json", required = true)]
    files: Vec<PathBuf>,
    /// The page; - is stdout
    #[arg(short, long, value_name = "FILE.html")]
    out: PathBuf,
}

/// Reads, renders, writes.
pub fn run(args: Args) -> Result<()> {
    if args.files.contains(&args.out) {
        return Err(Error::flag("--out", "is one of the files to read").into());
    }
    let target = Target::open(&args.out)?;
    let inputs: Vec<Input> = args.files.iter().map(|f| Input::read(f)).collect::<Result<_>>()?;
    target.write_with(|out| html::write(out, &inputs))
}
