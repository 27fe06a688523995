//! JSON, to stdout or to a file that appears whole or not at all.

use std::{
    fs::File,
    io::Write,
    path::{Path, PathBuf},
};

use anyhow::Context;
use tempfile::NamedTempFile;

use super::Report;
use crate::error::{Error, Result};

/// Where the JSON goes; opened before the work starts, so that a bad path fails at once.
#[derive(Debug)]
pub enum JsonOutput {
    /// Standard output, and nothing else there.
    Stdout,
    /// A temporary file beside its final name.
    File(NamedTempFile, PathBuf),
    /// A device or pipe, which has no content to protect.
    Special(File),
}

impl JsonOutput {
    /// Opens the target of `--json`; `-` is standard output.
    ///
    /// # Errors
    /// A path that cannot be written.
    pub fn open(target: &Path) -> Result<Self> {
        if target == Path::new("-") {
            return Ok(Self::Stdout);
        }
        let bad = |why: String| Error::File { file: target.into(), why };
        let unwritable = |e: std::io::Error| bad(format!("cannot be written: {e}"));
        if target.is_dir() {
            return Err(bad("is a directory, not a file to write".into()).into());
        }
        if target.exists() && !target.is_file() {
            let file = File::options().write(true).open(target).map_err(unwritable)?;
            return Ok(Self::Special(file));
        }
        // A link stays a link: what it points to is replaced.
        let target = target.canonicalize().unwrap_or(target.into());
        let dir = target.parent().filter(|d| !d.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut builder = tempfile::Builder::new();
        // A temporary file is private to its owner; a report is as any file, under the umask.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let file = builder.tempfile_in(dir).map_err(unwritable)?;
        Ok(Self::File(file, target))
    }

    /// Writes the report.
    ///
    /// # Errors
    /// A full disk, or a closed pipe.
    pub fn write(self, report: &Report) -> Result<()> {
        match self {
            Self::Stdout => write(std::io::stdout().lock(), report),
            Self::Special(file) => write(file, report),
            Self::File(mut file, target) => {
                let name = || target.display().to_string();
                write(&mut file, report).with_context(name)?;
                file.as_file().sync_all().with_context(name)?;
                file.persist(&target).map(drop).with_context(name)
            }
        }
    }
}

fn write(mut out: impl Write, report: &Report) -> Result<()> {
    // Whole in memory first: a failing pipe then fails as a pipe.
    let text = serde_json::to_string_pretty(report)?;
    out.write_all(text.as_bytes())?;
    out.write_all(b"\n")?;
    Ok(out.flush()?)
}
