//! `flopaudit report`: the JSON of other commands as one page to look at.

use std::path::{Path, PathBuf};

use crate::{
    error::{Error, Result},
    report::html::{self, Input},
    target::Target,
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
    if args.files.iter().any(|file| same(file, &args.out)) {
        return Err(Error::flag("--out", "is one of the files to read").into());
    }
    let target = Target::open(&args.out)?;
    let inputs: Vec<Input> = args.files.iter().map(|f| Input::read(f)).collect::<Result<_>>()?;
    target.write_with(|out| html::write(out, &inputs))
}

/// Whether two paths lead to one file, however they are spelled. Devices are not replaced, so one
/// may be read and written.
fn same(a: &Path, b: &Path) -> bool {
    let place = |path: &Path| path.canonicalize().ok().filter(|place| place.is_file());
    a == b || place(a).is_some_and(|place_of_a| Some(place_of_a) == place(b))
}
