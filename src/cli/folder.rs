//! The folder of a training: what it may hold before, and the metrics that grow in it.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
};

use anyhow::Context;

use crate::{
    error::{Error, Result},
    target::Target,
    train::{Progress, Saved},
};

/// All that a run needs to go on.
pub const CHECKPOINT: &str = "checkpoint.safetensors";
const METRICS: &str = "metrics.jsonl";

/// Files that a run would replace, and that nobody may lose. (Metrics without a checkpoint are of a
/// run that ended before it saved anything.)
const LEFT: [&str; 6] = [
    "run.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
];

/// The output folder, made where it is missing, and the checkpoint to go on from.
pub fn open(out: &Path, resume: bool) -> Result<Option<Saved>> {
    let bad = |why: String| Error::File { file: out.into(), why };
    if out.is_file() {
        return Err(bad("is a file, not a folder".into()).into());
    }
    fs::create_dir_all(out).map_err(|e| bad(format!("cannot be made: {e}")))?;
    // Fails now rather than after hours.
    drop(Target::open(&out.join("run.json"))?);
    let file = out.join(CHECKPOINT);
    match (resume, file.exists()) {
        (true, true) => {
            sweep(out);
            Saved::read(&file).map(Some)
        }
        (true, false) => Err(bad(format!("holds no {CHECKPOINT} to resume")).into()),
        (false, true) => {
            Err(bad("holds a run: --resume goes on with it, another --out keeps it".into()).into())
        }
        (false, false) => match LEFT.into_iter().find(|name| out.join(name).exists()) {
            Some(name) => {
                let why = "is there already, and no run's; give a folder without it";
                Err(Error::File { file: out.join(name), why: why.into() }.into())
            }
            None => Ok(None),
        },
    }
}

/// Takes away temporary files that a killed process left.
fn sweep(out: &Path) {
    for file in fs::read_dir(out).into_iter().flatten().flatten() {
        let name = file.file_name();
        let name = name.to_string_lossy();
        if name.strip_prefix(".tmp").is_some_and(|rest| rest.len() == 6) {
            let _ = fs::remove_file(file.path());
        }
    }
}

/// metrics.jsonl: a line a step and a line an evaluation.
pub struct Metrics(fs::File, PathBuf);

impl Metrics {
    /// Opens that of the run in `out`, with the lines kept of what `progress` holds.
    pub fn open(out: &Path, progress: &Progress) -> Result<Self> {
        let file = &out.join(METRICS);
        let name = || file.display().to_string();
        let text = fs::read_to_string(file).unwrap_or_default();
        let known = |line: &&str| {
            let line: serde_json::Value = serde_json::from_str(line).unwrap_or_default();
            let points = match line.get("eval_loss") {
                Some(_) => &progress.evaluations,
                None => &progress.losses,
            };
            line["step"].as_u64().is_some_and(|step| points.iter().any(|p| p.step == step))
        };
        let kept: String = text.lines().filter(known).flat_map(|line| [line, "\n"]).collect();
        Target::open(file)?.write_with(|out| Ok(out.write_all(kept.as_bytes())?))?;
        let opened = fs::OpenOptions::new().append(true).open(file).with_context(name)?;
        Ok(Self(opened, file.into()))
    }

    /// Adds a line.
    pub fn write(&mut self, line: &serde_json::Value) -> Result<()> {
        // At once, so that no reader meets half a line.
        let line = format!("{line}\n");
        self.0.write_all(line.as_bytes()).with_context(|| self.1.display().to_string())
    }
}
