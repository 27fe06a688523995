//! A plan with its grids unfolded: the workloads to be priced.

use std::path::{Path, PathBuf};

use super::{
    file::{ExperimentTable, Kind, PlanFile, Source},
    values::{Count, CountOrMax, Grid, Natural, Rate},
};
use crate::{
    analytic::{self, Structure},
    config::{LoraConfig, ModelConfig, Modules, Projection, TargetModules},
    error::{Error, Result},
    ledger::Dtype,
    prices::Prices,
    workload::{Logits, Sampling, Task, Workload},
};

/// Most rows of a plan: more are nobody's reading.
const MOST_ROWS: usize = 10_000;

/// A budget and what it is to be spent on.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The file that states it.
    pub file: PathBuf,
    /// What there is to spend, in FLOPs.
    pub budget: u128,
    /// Which operations are counted.
    pub structure: Structure,
    /// What they cost.
    pub prices: Prices,
    /// The model of all experiments.
    pub model: ModelConfig,
    /// Where its config came from.
    pub origin: String,
    /// In the order of the file.
    pub experiments: Vec<Experiment>,
}

/// One `[[experiment]]`: all points of its grid.
#[derive(Debug, Clone)]
pub struct Experiment {
    /// What tables call it.
    pub name: String,
    /// Its first line in the file.
    pub line: usize,
    /// One for each batch, length and rank; with one unit of what is unknown.
    pub workloads: Vec<Workload>,
    /// Each a run of its own.
    pub learning_rates: Vec<f64>,
    /// Each a run of its own.
    pub seeds: Vec<u64>,
    /// What is to be solved, the same for all points and runs.
    pub unknown: Option<Unknown>,
}

/// A length that takes what the budget leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unknown {
    /// Optimizer steps of a training.
    Steps,
    /// Tokens of a generation.
    NewTokens,
}

impl Unknown {
    /// The key in the file.
    pub const fn key(self) -> &'static str {
        match self {
            Self::Steps => "steps",
            Self::NewTokens => "new_tokens",
        }
    }
}

impl Experiment {
    /// Runs of each workload: learning rates × seeds.
    pub fn runs(&self) -> u128 {
        self.learning_rates.len().max(1) as u128 * self.seeds.len().max(1) as u128
    }

    /// `workload` with `n` steps or new tokens, where these are unknown.
    pub fn at(&self, workload: &Workload, n: u64) -> Workload {
        let mut workload = workload.clone();
        match (self.unknown, &mut workload.task) {
            (Some(Unknown::Steps), Task::Train { steps, .. }) => *steps = n,
            (Some(Unknown::NewTokens), Task::Generate { new_tokens, max_new_tokens, .. }) => {
                (*new_tokens, *max_new_tokens) = (n, n);
            }
            _ => {}
        }
        workload
    }
}

impl Plan {
    /// Reads a plan file; price lists and configs in it are sought beside it.
    ///
    /// # Errors
    /// What is wrong, in one line with file, line and key.
    pub fn read(path: &Path) -> Result<Self> {
        let text = crate::input::read_text(path)
            .map_err(|e| Error::File { file: path.into(), why: e.to_string() })?;
        let (source, file) = Source::parse(path, &text)?;
        let dir = path.parent().unwrap_or(Path::new(""));
        let in_plan = |key: &'static str| {
            let source = &source;
            move |e: anyhow::Error| source.fail(None, key, &explain(&e).1)
        };
        let structure = match &file.structure {
            Some(name) => Structure::named(name).ok_or_else(|| {
                let known = Structure::ALL.map(Structure::name).join(", ");
                source.fail(None, "structure", &format!("is `{name}`; known: {known}"))
            })?,
            None => Structure::Exact,
        };
        let prices = match file.prices.as_deref() {
            Some(list) if list.ends_with(".toml") => {
                Prices::named(&dir.join(list).to_string_lossy())
            }
            named => Prices::named(named.unwrap_or("unit")),
        };
        let prices = prices.map_err(in_plan("prices"))?;
        let (model, origin) = match (&file.preset, &file.config) {
            (Some(_), Some(_)) => {
                return Err(source.fail(None, "config", "is given beside `preset`; choose one"));
            }
            (None, Some(config)) => {
                let config = dir.join(config);
                let model = ModelConfig::from_file(&config).map_err(in_plan("config"))?;
                (model, config.display().to_string())
            }
            (preset, None) => {
                let preset = preset.as_deref().unwrap_or("qwen2.5-0.5b");
                (
                    ModelConfig::preset(preset).map_err(in_plan("preset"))?,
                    format!("preset {preset}"),
                )
            }
        };
        let budget = file.budget.0;
        let experiments = unfold_all(&source, &file, &model, structure)?;
        Ok(Self { file: path.into(), budget, structure, prices, model, origin, experiments })
    }
}

fn unfold_all(
    source: &Source,
    file: &PlanFile,
    model: &ModelConfig,
    structure: Structure,
) -> Result<Vec<Experiment>> {
    let mut experiments: Vec<Experiment> = vec![];
    for (index, table) in file.experiments.iter().enumerate() {
        let fail = |key: &str, why: &str| Err(source.fail(Some(index), key, why));
        let experiment = unfold(source, index, table, model)?;
        if experiments.iter().any(|e| e.name == experiment.name) {
            return fail("name", &format!("`{}` is taken by an experiment above", experiment.name));
        }
        let earlier = experiments.iter().find_map(|e| Some((e, e.unknown?)));
        if let (Some(unknown), Some((other, _))) = (experiment.unknown, earlier) {
            let why =
                format!("is a second \"max\" after that of `{}`; one plan solves one", other.name);
            return fail(unknown.key(), &why);
        }
        let rows: usize = experiments.iter().map(|e| e.workloads.len()).sum();
        if rows + experiment.workloads.len() > MOST_ROWS {
            return fail("experiment", &format!("brings the plan to more than {MOST_ROWS} rows"));
        }
        for workload in &experiment.workloads {
            // What cannot be counted is refused here, where its line and key are known.
            analytic::count(structure, workload).map_err(|e| place(source, index, &e))?;
        }
        experiments.push(experiment);
    }
    Ok(experiments)
}

/// All points of one experiment.
fn unfold(
    source: &Source,
    index: usize,
    table: &ExperimentTable,
    model: &ModelConfig,
) -> Result<Experiment> {
    let (kind, unknown) = (table.kind, unknown(table));
    let missing = match kind {
        Kind::Train => table.steps.is_none().then_some("steps"),
        Kind::Generate => table.new_tokens.is_none().then_some("new_tokens"),
        Kind::Evaluate | Kind::Forward => None,
    };
    if let Some(key) = missing {
        return Err(source.fail(Some(index), key, "is missing: a number, or \"max\""));
    }
    let lengths = match kind {
        Kind::Train | Kind::Evaluate | Kind::Forward => &table.seq,
        Kind::Generate => &table.prompt_tokens,
    };
    let adapters = adapters(table);
    let (batches, lengths) = (counts(&table.batch, 1), counts(lengths, 512));
    let ranks = table.lora_rank.as_ref().map_or(vec![0], |Grid(list)| naturals(list));
    if batches.len().saturating_mul(lengths.len()).saturating_mul(ranks.len()) > MOST_ROWS {
        let why = format!("unfolds to more than {MOST_ROWS} rows");
        return Err(source.fail(Some(index), "experiment", &why));
    }
    let mut workloads = vec![];
    for &batch in &batches {
        for &length in &lengths {
            for &rank in &ranks {
                let rank = usize::try_from(rank).unwrap_or(usize::MAX);
                let lora = LoraConfig { rank, ..adapters.clone() }.checked(model);
                let lora = lora.map_err(|e| place(source, index, &e))?;
                let task = task(table, batch, length);
                workloads.push(Workload { model: model.clone(), lora, dtype: Dtype::F32, task });
            }
        }
    }
    let name = table.name.clone().unwrap_or_else(|| format!("{}-{}", kind.name(), index + 1));
    let rates = table.learning_rate.iter().flat_map(|Grid(list)| list.iter());
    Ok(Experiment {
        name,
        line: source.line(Some(index), "experiment"),
        workloads,
        learning_rates: rates.map(|Rate(rate)| *rate).collect(),
        seeds: table.seed.as_ref().map_or(vec![], |Grid(list)| naturals(list)),
        unknown,
    })
}

/// An experiment's adapters, all but their rank.
fn adapters(table: &ExperimentTable) -> LoraConfig {
    let default = || [Projection::QProj, Projection::VProj].map(Modules::from).to_vec();
    LoraConfig {
        alpha: ALPHA,
        targets: table.lora_targets.as_deref().map_or_else(default, TargetModules::modules),
        layers: table.lora_layers.clone(),
        rank_pattern: table.lora_rank_pattern.clone().unwrap_or_default(),
        ..LoraConfig::none()
    }
}

/// The scale alpha / rank is one multiplication whatever alpha is.
const ALPHA: f64 = 16.0;

fn unknown(table: &ExperimentTable) -> Option<Unknown> {
    match (table.steps, table.new_tokens) {
        (Some(CountOrMax::Max), _) => Some(Unknown::Steps),
        (_, Some(CountOrMax::Max)) => Some(Unknown::NewTokens),
        _ => None,
    }
}

fn task(table: &ExperimentTable, batch: u64, length: u64) -> Task {
    // An unknown stands at 1 until it is solved.
    let number = |given: Option<CountOrMax>| match given {
        Some(CountOrMax::Count(n)) => n,
        Some(CountOrMax::Max) | None => 1,
    };
    match table.kind {
        Kind::Train => Task::Train {
            batch,
            seq: length,
            accumulate: table.accumulate.map_or(1, |Count(n)| n),
            steps: number(table.steps),
            full: table.full.unwrap_or(false),
            recompute: table.recompute.unwrap_or(false),
            clip: true,
        },
        Kind::Evaluate => {
            let passes = table.passes.map_or(1, |Count(n)| n);
            Task::Evaluate { batch, seq: length, passes }
        }
        Kind::Forward => Task::Forward {
            batch,
            seq: length,
            past: table.past.map_or(0, |Natural(n)| n),
            logits: table.logits.unwrap_or(Logits::All),
        },
        Kind::Generate => {
            let new_tokens = number(table.new_tokens);
            let greedy = Sampling::GREEDY;
            Task::Generate {
                batch,
                prompt_tokens: length,
                new_tokens,
                max_new_tokens: new_tokens,
                kv_cache: table.kv_cache.unwrap_or(true),
                sampling: Sampling {
                    temperature: table.temperature.unwrap_or(greedy.temperature),
                    top_k: table.top_k.map(|Count(k)| usize::try_from(k).unwrap_or(usize::MAX)),
                    top_p: table.top_p,
                    repeat_penalty: table.repeat_penalty.unwrap_or(greedy.repeat_penalty),
                },
            }
        }
    }
}

fn counts(given: &Option<Grid<Count>>, default: u64) -> Vec<u64> {
    given.as_ref().map_or(vec![default], |Grid(list)| list.iter().map(|Count(n)| *n).collect())
}

fn naturals(list: &[Natural]) -> Vec<u64> {
    list.iter().map(|Natural(n)| *n).collect()
}

/// An error about a workload, at the key of the file that it comes from.
fn place(source: &Source, index: usize, error: &anyhow::Error) -> anyhow::Error {
    match explain(error) {
        (Some(key), why) if key == "structure" => source.fail(None, &key, &why),
        (Some(key), why) => source.fail(Some(index), &key, &why),
        (None, why) => source.fail(Some(index), "experiment", &why),
    }
}

/// The key that an error of the command line's flags is about, and what is wrong, in the file's
/// words: `--new-tokens` is `new_tokens` here.
fn explain(error: &anyhow::Error) -> (Option<String>, String) {
    let Some(Error::Flag { flag, why }) = error.downcast_ref() else {
        return (None, format!("{error:#}"));
    };
    let key = |flag: &str| flag.trim_start_matches("--").replace('-', "_");
    let first = flag.split(',').next().unwrap_or_default();
    let words = why.split(' ').map(|word| match word.strip_prefix("--") {
        Some(flag) => format!("`{}`", key(flag)),
        None => word.into(),
    });
    (Some(key(first)), format!("is refused: {}", words.collect::<Vec<_>>().join(" ")))
}
