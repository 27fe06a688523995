//! Machine-readable output, to stdout or to a file that appears whole or not at all.

use std::{
    fs::File,
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

use anyhow::Context;
use tempfile::NamedTempFile;

use crate::error::{Error, Result};

/// Where JSON or CSV goes; opened before the work starts, so that a bad path fails at once.
#[derive(Debug)]
pub enum Target {
    /// Standard output, and nothing else there.
    Stdout,
    /// A temporary file beside its final name.
    File(NamedTempFile, PathBuf),
    /// A device or pipe, which has no content to protect.
    Special(File),
}

/// A temporary file in the folder of `file`, to be renamed to it.
///
/// # Errors
/// A folder that cannot be written.
pub fn temporary_beside(file: &Path) -> std::io::Result<NamedTempFile> {
    let dir = file.parent().filter(|d| !d.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut builder = tempfile::Builder::new();
    // A temporary file is private to its owner; this is as any file, under the umask.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    // The name of a file that never was helps nobody.
    builder.tempfile_in(dir).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => std::io::Error::other("its folder does not exist"),
        kind => kind.into(),
    })
}

impl Target {
    /// Opens what `--json` or `--csv` names; `-` is standard output.
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
        let unwritable = |e: std::io::Error| bad(format!("cannot be written: {e}"));
        if target.exists() && !target.is_file() {
            let file = File::options().write(true).open(target).map_err(unwritable)?;
            return Ok(Self::Special(file));
        }
        // A link stays a link: what it points to is replaced.
        let target = target.canonicalize().unwrap_or(target.into());
        let file = temporary_beside(&target).map_err(unwritable)?;
        Ok(Self::File(file, target))
    }

    /// Writes `value` as JSON.
    ///
    /// # Errors
    /// A full disk, or a closed pipe.
    pub fn write(self, value: &impl serde::Serialize) -> Result<()> {
        self.write_with(|out| {
            // As an io::Error, so that a closed pipe is seen as one.
            serde_json::to_writer_pretty(&mut *out, value).map_err(std::io::Error::from)?;
            Ok(writeln!(out)?)
        })
    }

    /// Writes what `content` writes.
    ///
    /// # Errors
    /// A full disk, or a closed pipe.
    pub fn write_with(self, content: impl FnOnce(&mut dyn Write) -> Result<()>) -> Result<()> {
        let name = match &self {
            Self::Stdout | Self::Special(_) => None,
            Self::File(_, target) => Some(target.display().to_string()),
        };
        let mut out = BufWriter::new(self);
        let written = content(&mut out).and_then(|()| Self::finish(out));
        match name {
            Some(name) => written.context(name),
            None => written,
        }
    }

    /// Ends what was written piece by piece: a file gets its name now.
    ///
    /// # Errors
    /// A full disk, or a closed pipe.
    pub fn finish(out: BufWriter<Self>) -> Result<()> {
        match out.into_inner().map_err(|e| e.into_error())? {
            Self::Stdout => Ok(std::io::stdout().flush()?),
            Self::Special(mut file) => Ok(file.flush()?),
            Self::File(file, target) => {
                file.as_file().sync_all()?;
                file.persist(&target)?;
                Ok(())
            }
        }
    }
}

/// Straight to where it goes: wrap it in a [`BufWriter`].
impl Write for Target {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        match self {
            Self::Stdout => std::io::stdout().write(bytes),
            Self::File(file, _) => file.write(bytes),
            Self::Special(file) => file.write(bytes),
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        match self {
            Self::Stdout => std::io::stdout().flush(),
            Self::File(file, _) => file.flush(),
            Self::Special(file) => file.flush(),
        }
    }
}
