//! A run in a file: trained tensors with their moments, and all else that going on needs.

use std::{
    collections::{BTreeSet, HashMap},
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
const VERSION: u32 = 2;
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
    weights: u64,
    tensors: HashMap<String, Vec<f32>>,
}

#[derive(Serialize, Deserialize)]
struct Rest {
    version: u32,
    settings: Settings,
    progress: Progress,
    ledger: Ledger,
    /// Fingerprint of the weights and adapters that the run began from.
    weights: u64,
}

impl Session<'_> {
    /// Writes a checkpoint to `file`, whole or not at all.
    ///
    /// # Errors
    /// A full disk; the checkpoint before stays.
    pub fn save(&self, file: &Path) -> Result<()> {
        let mut progress = self.progress.clone();
        // To a later process, the steps of this one are work that ran.
        progress.finished = self.ran();
        let (settings, ledger, weights) = (self.settings.clone(), self.ledger(), self.weights);
        let rest = Rest { version: VERSION, settings, progress, ledger, weights };
        let rest = serde_json::to_string(&rest)?;
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
        let broken = |e: serde_json::Error| bad(format!("is no checkpoint: {e}"));
        let rest: serde_json::Value = serde_json::from_str(rest).map_err(broken)?;
        if rest["version"] != VERSION {
            let found = &rest["version"];
            return Err(bad(format!("has version {found}; this reads {VERSION}")).into());
        }
        let Rest { settings, progress, ledger, weights, .. } =
            serde_json::from_value(rest).map_err(broken)?;
        let tensors = tensors.into_iter().map(|t| (t.name, t.values)).collect();
        Ok(Self { file: file.into(), settings, progress, ledger, weights, tensors })
    }

    /// Refuses settings other than the run's own, which would make it another run.
    ///
    /// # Errors
    /// The flag of the first setting that differs, with both values.
    pub fn check(&self, settings: &Settings) -> Result<()> {
        let (saved, asked) =
            (serde_json::to_value(&self.settings)?, serde_json::to_value(settings)?);
        let mut differences = vec![];
        differing(&saved, &asked, "", &mut differences);
        let rank = |key: &str| {
            // Of a pattern, any of its keys.
            let of = |known: &str| {
                key.strip_prefix(known).is_some_and(|k| k.is_empty() || k.starts_with('.'))
            };
            FLAGS.iter().position(|(known, _)| of(known))
        };
        differences.sort_by_key(|(key, ..)| rank(key).unwrap_or(FLAGS.len()));
        let Some((key, saved, asked)) = differences.into_iter().next() else { return Ok(()) };
        let flag = rank(&key).map_or(key.as_str(), |i| FLAGS[i].1);
        let difference = match FILES.contains(&key.as_str()) {
            true => format!("its run has other rows of {flag}"),
            false => format!("its run has {flag} {saved}, this command asks for {asked}"),
        };
        Err(self.another(&difference))
    }

    fn another(&self, difference: &str) -> anyhow::Error {
        let why = format!("{difference}: resume with the same flags and files");
        Error::File { file: self.file.clone(), why }.into()
    }

    /// Puts the run back into `session`, which was made with its settings.
    ///
    /// # Errors
    /// A session that began from other weights or adapters; a tensor that the file does not hold,
    /// or holds in another size.
    pub fn restore(self, session: &mut Session) -> Result<()> {
        if self.weights != session.weights {
            return Err(self.another("its run began from another --model or --adapter"));
        }
        let Self { file, progress, ledger, tensors, .. } = self;
        session.resume(progress, ledger, |name| {
            let why = || format!("holds no tensor `{name}`");
            let values = tensors.get(name).cloned();
            values.ok_or_else(|| Error::File { file: file.clone(), why: why() }.into())
        })
    }
}

/// Settings as flags spell them, in the order in which a difference is told: some follow others.
const FLAGS: [(&str, &str); 26] = [
    ("dtype", "--dtype"),
    ("attention", "--attention"),
    ("full", "--full"),
    ("seq", "--seq"),
    ("data", "--data"),
    ("held_out", "--eval-data"),
    ("lora.rank", "--lora-rank"),
    ("lora.alpha", "--lora-alpha"),
    ("lora.targets", "--lora-targets"),
    ("lora.layers", "--lora-layers"),
    ("lora.rank_pattern", "--lora-rank-pattern"),
    ("lora.alpha_pattern", "--lora-alpha-pattern"),
    ("lora.use_rslora", "--adapter"),
    ("batch", "--batch"),
    ("accumulate", "--accumulate"),
    ("recompute", "--recompute"),
    ("schedule.peak", "--lr"),
    ("schedule.warmup", "--warmup"),
    ("schedule.shape", "--schedule"),
    ("schedule.steps", "--steps (as --steps, --epochs or --budget have it)"),
    ("hyper.weight_decay", "--weight-decay"),
    ("hyper.clip", "--clip"),
    ("hyper.moments", "--moments"),
    ("seed", "--seed"),
    ("eval_every", "--eval-every"),
    ("checks", "--check-gradients"),
];

/// Settings that are fingerprints, which tell people nothing.
const FILES: [&str; 2] = ["data", "held_out"];

/// Leaves in which two values differ, by their path.
fn differing(
    a: &serde_json::Value,
    b: &serde_json::Value,
    path: &str,
    found: &mut Vec<(String, String, String)>,
) {
    match (a.as_object(), b.as_object()) {
        (Some(a), Some(b)) => {
            let keys: BTreeSet<&String> = a.keys().chain(b.keys()).collect();
            for key in keys {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                let [a, b] = [a, b].map(|map| map.get(key).unwrap_or(&serde_json::Value::Null));
                differing(a, b, &path, found);
            }
        }
        _ if a != b => found.push((path.into(), a.to_string(), b.to_string())),
        _ => {}
    }
}
