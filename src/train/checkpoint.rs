//! A run in a file: trained tensors with their moments, and all else that going on needs.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::session::{Progress, Session, Settings};
use crate::{
    error::{Error, Result},
    ledger::Ledger,
    weights::{Named, read, save},
};

/// Version of the format.
const VERSION: u32 = 1;
/// Where in the file's metadata the rest lies.
const KEY: &str = "flopaudit";

/// A checkpoint that was read.
#[derive(Debug)]
pub struct Saved {
    file: PathBuf,
    /// What the run does.
    pub settings: Settings,
    /// What it did.
    pub progress: Progress,
    ledger: Ledger,
    tensors: HashMap<String, Vec<f32>>,
}

#[derive(Serialize, Deserialize)]
struct Rest {
    version: u32,
    settings: Settings,
    progress: Progress,
    ledger: Ledger,
}

impl Session<'_> {
    /// Writes a checkpoint to `file`, whole or not at all.
    ///
    /// # Errors
    /// A full disk; the checkpoint before stays.
    pub fn save(&self, file: &Path) -> Result<()> {
        let mut progress = self.progress.clone();
        // To a later process, the steps of this one are work that ran.
        progress.finished = self.workloads();
        let (settings, ledger) = (self.settings.clone(), self.ledger());
        let rest = serde_json::to_string(&Rest { version: VERSION, settings, progress, ledger })?;
        let tensors: Vec<Named> = self
            .state()?
            .into_iter()
            .map(|(name, values)| Named {
                name: name.into(),
                shape: vec![3, values.len() / 3],
                values,
            })
            .collect();
        save(file, &tensors, HashMap::from([(KEY.to_string(), rest)]))
    }
}

impl Saved {
    /// Reads the checkpoint in `file`.
    ///
    /// # Errors
    /// A file that is none, or of another version.
    pub fn read(file: &Path) -> Result<Self> {
        let bad = |why: String| Error::File { file: file.into(), why };
        let (tensors, metadata) = read(file)?;
        let rest = metadata.get(KEY).ok_or_else(|| bad("is no checkpoint of a run".into()))?;
        let rest: Rest =
            serde_json::from_str(rest).map_err(|e| bad(format!("is no checkpoint: {e}")))?;
        if rest.version != VERSION {
            let found = rest.version;
            return Err(bad(format!("has version {found}; this reads {VERSION}")).into());
        }
        let Rest { settings, progress, ledger, .. } = rest;
        let tensors = tensors.into_iter().map(|t| (t.name, t.values)).collect();
        Ok(Self { file: file.into(), settings, progress, ledger, tensors })
    }

    /// Refuses settings other than the run's own, which would make it another run.
    ///
    /// # Errors
    /// The first setting that differs, with both values.
    pub fn check(&self, settings: &Settings) -> Result<()> {
        let (saved, asked) =
            (serde_json::to_value(&self.settings)?, serde_json::to_value(settings)?);
        let mut differences = vec![];
        differing(&saved, &asked, "", &mut differences);
        match differences.first() {
            None => Ok(()),
            Some((key, saved, asked)) => {
                let why = format!(
                    "its run has {key} {saved}, this command asks for {asked}: resume with the \
                     same flags and files"
                );
                Err(Error::File { file: self.file.clone(), why }.into())
            }
        }
    }

    /// Puts the run back into `session`, which was made with its settings.
    ///
    /// # Errors
    /// A tensor that the file does not hold, or holds in another size.
    pub fn restore(self, session: &mut Session) -> Result<()> {
        let Self { file, progress, ledger, tensors, .. } = self;
        session.resume(progress, ledger, |name| {
            let why = || format!("holds no tensor `{name}`");
            let values = tensors.get(name).cloned();
            values.ok_or_else(|| Error::File { file: file.clone(), why: why() }.into())
        })
    }
}

/// Leaves in which two values differ, by their path.
fn differing(
    a: &serde_json::Value,
    b: &serde_json::Value,
    path: &str,
    found: &mut Vec<(String, String, String)>,
) {
    match (a.as_object(), b.as_object()) {
        (Some(a), Some(b)) => {
            for (key, value) in a {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                differing(value, b.get(key).unwrap_or(&serde_json::Value::Null), &path, found);
            }
        }
        _ if a != b => found.push((path.into(), a.to_string(), b.to_string())),
        _ => {}
    }
}
