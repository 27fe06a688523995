//! The plan as its TOML file states it, and the line and key of whatever is wrong with it.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{
    budget::Stated,
    values::{Count, Dimension, Grid, Natural, Rate, dimension},
};
use crate::{
    config::{Layers, Modules, TargetModules},
    error::{Error, Result},
    hardware::Precision,
    rate::{Amount, Share},
    workload::{AttentionMode, Key, Kind, Layout, Value},
};

/// The whole file. Absent keys have the command line's defaults; the budget's is 1e17 FLOPs.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanFile {
    /// What there is to spend.
    #[serde(default = "default_budget")]
    pub budget: Stated,
    /// Which ops are counted.
    pub structure: Option<String>,
    /// What they cost: a preset, or a TOML file beside the plan.
    pub prices: Option<String>,
    /// The model, as a published size …
    pub preset: Option<String>,
    /// … or as a `config.json` beside the plan.
    pub config: Option<PathBuf>,
    /// Element type of weights and activations: f32, or bf16 with a `gpu`.
    pub dtype: Option<String>,
    /// The GPU, by its name in the list.
    pub gpu: Option<String>,
    /// How many of them.
    pub gpus: Option<Count>,
    /// Share of the peak that the model's FLOPs reach.
    pub mfu: Option<Share>,
    /// Share of the peak that all FLOPs reach, recomputed ones among them.
    pub hfu: Option<Share>,
    /// Element type of the peak; that of `dtype` otherwise.
    pub peak: Option<Precision>,
    /// A report of `bench` beside the plan, in place of a GPU.
    pub from_bench: Option<PathBuf>,
    /// Dollars for an hour of one GPU.
    pub price_per_gpu_hour: Option<Amount>,
    /// Watts that one GPU draws.
    pub watts: Option<Amount>,
    /// What is to be run, in order.
    #[serde(default, rename = "experiment")]
    pub experiments: Vec<ExperimentTable>,
}

fn default_budget() -> Stated {
    Stated::Flops(10u128.pow(17))
}

/// Keys of an experiment beside the dimensions of its workload.
const KEYS_OF_ALL: [&str; 9] = [
    "name",
    "kind",
    "lora_rank",
    "lora_targets",
    "lora_layers",
    "lora_rank_pattern",
    "attention",
    "learning_rate",
    "seed",
];

/// Keys of an experiment that trains.
const KEYS_OF_TRAINING: [&str; 4] = ["eval_rows", "eval_lengths", "eval_every", "check_gradients"];

/// Keys of an experiment whose sequences may differ in length: all but verification.
const KEYS_OF_LENGTHS: [&str; 3] = ["lengths", "layout", "packing"];

/// One `[[experiment]]`.
#[derive(Debug, Clone, Deserialize)]
pub struct ExperimentTable {
    /// How tables call it; its kind and place otherwise.
    pub name: Option<String>,
    /// What it does.
    pub kind: Kind,
    /// Rank of the adapters; 0 is none.
    pub lora_rank: Option<Grid<Natural>>,
    /// Adapted projections.
    pub lora_targets: Option<Vec<TargetModules>>,
    /// Layers that carry adapters; without it, every layer.
    pub lora_layers: Option<Layers>,
    /// Ranks that differ from `lora_rank`, by projection or by that of one layer.
    pub lora_rank_pattern: Option<BTreeMap<Modules, usize>>,
    /// Which scores attention computes.
    pub attention: Option<Grid<AttentionMode>>,
    /// One run each; they cost the same.
    pub learning_rate: Option<Grid<Rate>>,
    /// One run each; they cost the same.
    pub seed: Option<Grid<Natural>>,
    /// Of a training, held-out rows that are scored before, between and after its steps.
    pub eval_rows: Option<Count>,
    /// Lengths of the held-out rows in place of their number: a file beside the plan.
    pub eval_lengths: Option<PathBuf>,
    /// Lengths of sequences in place of one for all: a file beside the plan.
    pub lengths: Option<PathBuf>,
    /// How these lie in a pass.
    pub layout: Option<Layout>,
    /// Short for a layout of `packed`.
    pub packing: Option<bool>,
    /// After how many steps each time.
    pub eval_every: Option<Count>,
    /// Trained tensors whose gradients are compared with differences of the loss.
    pub check_gradients: Option<Count>,
    /// Dimensions of its workload, as [`Key`] names them.
    #[serde(flatten)]
    pub dimensions: toml::Table,
}

/// A parsed plan file that still knows where each key stands.
#[derive(Debug)]
pub struct Source<'a> {
    file: &'a Path,
    text: &'a str,
    table: Spanned<DeTable<'a>>,
}

impl<'a> Source<'a> {
    /// Reads the text of a plan file.
    ///
    /// # Errors
    /// Invalid TOML, an unknown key, or a value that its key cannot have: file, line and key.
    pub fn parse(file: &'a Path, text: &'a str) -> Result<(Self, PlanFile)> {
        let start = |e: &toml::de::Error| e.span().map_or(0, |span| span.start);
        let bad = |e: &toml::de::Error, key: Option<&str>| {
            let why = e.message().replace('\n', ", ");
            // serde names an unknown key again.
            let why = match key.and_then(|k| why.strip_prefix(&format!("unknown field `{k}`"))) {
                Some(expected) => format!("is unknown{expected}"),
                None => why,
            };
            fail(file, line(text, start(e)), key, &why)
        };
        let table = DeTable::parse(text).map_err(|e| bad(&e, written_key(text, start(&e))))?;
        let plan: PlanFile =
            toml::from_str(text).map_err(|e| bad(&e, key_at(table.get_ref(), start(&e))))?;
        let source = Self { file, text, table };
        if plan.experiments.is_empty() {
            return Err(source.fail(
                None,
                "experiment",
                "is missing: a plan needs an [[experiment]]",
            ));
        }
        for (index, experiment) in plan.experiments.iter().enumerate() {
            source.check_keys(index, experiment)?;
        }
        Ok((source, plan))
    }

    /// Refuses keys that mean nothing for an experiment's kind.
    fn check_keys(&self, index: usize, experiment: &ExperimentTable) -> Result<()> {
        let kind = experiment.kind;
        let keys = self.experiment(index).into_iter().flat_map(DeTable::keys);
        // Flags are spelled with `-`, keys of a plan are not.
        let named = |key: &str| Key::named(key).filter(|_| !key.contains('-'));
        let own: &[&[&str]] = match kind {
            Kind::Train => &[&KEYS_OF_ALL, &KEYS_OF_LENGTHS, &KEYS_OF_TRAINING],
            Kind::Forward | Kind::Generate | Kind::Evaluate => &[&KEYS_OF_ALL, &KEYS_OF_LENGTHS],
            Kind::Verify => &[&KEYS_OF_ALL],
        };
        let own = own.concat();
        let known = |key: &str| {
            let of_task = named(key).is_some_and(|key| key.is_of(&kind.task()));
            of_task || own.contains(&key)
        };
        let Some(key) = keys.map(|key| key.get_ref().as_ref()).find(|key| !known(key)) else {
            return self.check_values(index, experiment);
        };
        let of_another = named(key).is_some()
            || KEYS_OF_TRAINING.contains(&key)
            || KEYS_OF_LENGTHS.contains(&key);
        let why = match of_another {
            true => format!("means nothing where kind = \"{}\"", kind.name()),
            false => {
                let of_task = kind.keys().map(|key| key.name().replace('-', "_"));
                let known: Vec<String> = own.into_iter().map(String::from).chain(of_task).collect();
                format!("is unknown; known: {}", known.join(", "))
            }
        };
        Err(self.fail(Some(index), key, &why))
    }

    /// Refuses values that a dimension cannot have.
    fn check_values(&self, index: usize, experiment: &ExperimentTable) -> Result<()> {
        for (name, value) in &experiment.dimensions {
            let Some(key) = Key::named(name) else { continue };
            let values = match dimension(key, value) {
                Ok(Dimension::Each(values) | Dimension::Together(values)) => Ok(values),
                Ok(Dimension::Max) => Ok(vec![]),
                Err(why) => Err(why),
            };
            let mut task = experiment.kind.task();
            let set = |value: &Value| key.set(&mut task, value);
            let checked = values.and_then(|values| values.iter().try_for_each(set));
            checked.map_err(|why| self.fail(Some(index), name, &why))?;
        }
        Ok(())
    }

    /// A file that the plan names, which is sought beside it.
    pub fn beside(&self, file: &Path) -> PathBuf {
        self.file.parent().unwrap_or(Path::new("")).join(file)
    }

    /// The error that `key`, of an experiment or of the plan itself, is wrong in its value.
    pub fn fail(&self, experiment: Option<usize>, key: &str, why: &str) -> anyhow::Error {
        fail(self.file, self.line(experiment, key), Some(key), why)
    }

    /// Whether the plan itself has `key`.
    pub fn has(&self, key: &str) -> bool {
        self.table.get_ref().contains_key(key)
    }

    /// The line of a key, of the experiment if it lacks the key, or the first line.
    pub fn line(&self, experiment: Option<usize>, key: &str) -> usize {
        let table = match experiment {
            Some(index) => self.experiment(index),
            None => Some(self.table.get_ref()),
        };
        let found = table.and_then(|table| table.get_key_value(key)).map(|(key, _)| key.span());
        let header = || self.list().and_then(|list| Some(list.get(experiment?)?.span()));
        line(self.text, found.or_else(header).map_or(0, |span| span.start))
    }

    fn list(&self) -> Option<&[Spanned<DeValue<'a>>]> {
        self.table.get_ref().get("experiment")?.get_ref().as_array().map(|list| &list[..])
    }

    fn experiment(&self, index: usize) -> Option<&DeTable<'a>> {
        self.list()?.get(index)?.get_ref().as_table()
    }
}

fn fail(file: &Path, line: usize, key: Option<&str>, why: &str) -> anyhow::Error {
    let key = key.map_or(String::new(), |key| format!("`{key}` "));
    Error::File { file: file.into(), why: format!("line {line}: {key}{why}") }.into()
}

/// The line, from 1, of a byte.
fn line(text: &str, at: usize) -> usize {
    1 + text.bytes().take(at).filter(|byte| *byte == b'\n').count()
}

/// What stands before the `=` in the line of a byte, where the text is no TOML.
fn written_key(text: &str, at: usize) -> Option<&str> {
    let (key, _) = text.lines().nth(line(text, at) - 1)?.split_once('=')?;
    Some(key.trim()).filter(|key| !key.is_empty())
}

/// The innermost key that holds the byte, itself or in its value.
fn key_at<'a>(table: &'a DeTable<'_>, at: usize) -> Option<&'a str> {
    table.iter().find_map(|(key, value)| {
        let inner = match value.get_ref() {
            DeValue::Table(table) => key_at(table, at),
            DeValue::Array(list) => {
                list.iter().filter_map(|v| v.get_ref().as_table()).find_map(|t| key_at(t, at))
            }
            _ => None,
        };
        let holds = key.span().contains(&at) || value.span().contains(&at);
        inner.or_else(|| holds.then(|| key.get_ref().as_ref()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(text: &str) -> String {
        let error = Source::parse(Path::new("b.toml"), text).unwrap_err().to_string();
        assert_eq!(error.lines().count(), 1, "{error}");
        error
    }

    #[test]
    fn whatever_is_wrong_has_its_line_and_key() {
        let head = "budget = \"1e17 FLOP\"\n[[experiment]]\nkind = \"train\"\n";
        for (text, parts) in [
            ("", &["b.toml: line 1: `experiment`", "missing"][..]),
            ("budget = 1e17\n", &["line 1: `budget`", "no unit", "\"100 PFLOP\""]),
            ("\nbudget = 5\n", &["line 2: `budget`", "no unit"]),
            ("budget = \"-5 PFLOP\"", &["line 1: `budget`", "negative"]),
            ("budget = [1]", &["line 1: `budget`", "array"]),
            ("# x\nbudgte = \"1e17 FLOP\"\n", &["line 2", "`budgte`", "`budget`"]),
            ("a = = 3", &["line 1"]),
            ("budget = \"1 PFLOP\"\nbudget = \"1 PFLOP\"", &["line 2", "budget"]),
            ("[[experiment]]\nkind = \"dream\"", &["line 2: `kind`", "`dream`", "`train`"]),
            ("\n[[experiment]]\nname = \"x\"\n", &["line 2: `experiment`", "`kind`"]),
            ("[experiment]\nkind = \"train\"\n", &["line 1", "experiment"]),
            (&format!("{head}stesp = 3"), &["line 4", "`stesp`"]),
            (&format!("{head}steps = -3"), &["line 4: `steps`", "negative"]),
            (&format!("{head}steps = 0"), &["line 4: `steps`", "at least 1"]),
            (
                &format!("{head}steps = \"most\""),
                &["line 4: `steps`", "\"most\", not a whole number"],
            ),
            (&format!("{head}steps = 1.5"), &["line 4: `steps`", "1.5"]),
            (&format!("{head}batch = \"x\""), &["line 4: `batch`", "whole number"]),
            (&format!("{head}seq = []"), &["line 4: `seq`", "empty"]),
            (&format!("{head}seq = [512, -1]"), &["line 4: `seq`", "negative"]),
            (&format!("{head}learning_rate = 0"), &["line 4: `learning_rate`", "above 0"]),
            (&format!("{head}learning_rate = [1e-4, nan]"), &["`learning_rate`", "nan"]),
            (&format!("{head}lora_targets = [\"q\"]"), &["line 4: `lora_targets`", "`q`"]),
            (&format!("{head}kv_cache = true"), &["line 4: `kv_cache`", "kind = \"train\""]),
            (&format!("{head}name = 3"), &["line 4: `name`", "string"]),
            (
                &format!("{head}\n[[experiment]]\nkind = \"evaluate\"\n\nsteps = 2"),
                &["line 8: `steps`", "eval"],
            ),
        ] {
            let error = refused(text);
            for part in parts {
                assert!(error.contains(part), "{text}\n{error}\nlacks {part}");
            }
        }
    }
}
