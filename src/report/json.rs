//! JSON, to stdout or to a file that appears whole or not at all.

use std::{
    io::Write,
    path::{Path, PathBuf},
};

use anyhow::Context;
use tempfile::NamedTempFile;

use crate::error::{Error, Result};

/// Where the JSON goes; opened before the work starts, so that a bad path fails at once.
#[derive(Debug)]
pub enum JsonOutput {
    /// Standard output, and nothing else there.
    Stdout,
    /// A temporary file beside its final name.
    File(NamedTempFile, PathBuf),
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
        if target.is_dir() {
            return Err(bad("is a directory, not a file to write".into()).into());
        }
        let dir = target.parent().filter(|d| !d.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let file =
            NamedTempFile::new_in(dir).map_err(|e| bad(format!("cannot be written: {e}")))?;
        Ok(Self::File(file, target.into()))
    }

    /// Writes `report`, or any other value.
    ///
    /// # Errors
    /// A full disk, or a closed pipe.
    pub fn write(self, report: &impl serde::Serialize) -> Result<()> {
        match self {
            Self::Stdout => {
                let mut out = std::io::stdout().lock();
                serde_json::to_writer_pretty(&mut out, report)?;
                Ok(writeln!(out)?)
            }
            Self::File(mut file, target) => {
                let name = target.display().to_string();
                serde_json::to_writer_pretty(&mut file, report).with_context(|| name.clone())?;
                writeln!(file)
                    .and_then(|()| file.as_file().sync_all())
                    .with_context(|| name.clone())?;
                // NamedTempFile is private to its owner; a report need not be.
                #[cfg(unix)]
                {
                    use std::os::unix::fs::PermissionsExt;
                    file.as_file().set_permissions(std::fs::Permissions::from_mode(0o644))?;
                }
                file.persist(&target).map(drop).with_context(|| name)
            }
        }
    }
}
