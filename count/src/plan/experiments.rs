//! A plan with its grids unfolded: the workloads to be priced.

use std::path::{Path, PathBuf};

use super::{
    Budget,
    file::{ExperimentTable, PlanFile, Source},
    values::{Count, Dimension, Grid, Natural, Rate as LearningRate, dimension},
};
use crate::{
    analytic::{self, Structure},
    config::{LoraConfig, ModelConfig, Modules, Projection, TargetModules},
    error::{Error, Result},
    ledger::Dtype,
    prices::Prices,
    rate::{Basis, Rate, RateSpec},
    workload::{
        AttentionMode, Checks, EVAL_EVERY, Key, Kind, Layout, Rows, Task, Value, Workload,
        read_lengths, tasks_of,
    },
};

/// Most rows of a plan: more are nobody's reading.
const MOST_ROWS: usize = 10_000;

/// A budget and what it is to be spent on.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The file that states it.
    pub file: PathBuf,
    /// What there is to spend.
    pub budget: Budget,
    /// How fast work is done, where the file or flags say it.
    pub rate: Option<Rate>,
    /// Which operations are counted.
    pub structure: Structure,
    /// What they cost.
    pub prices: Prices,
    /// The model of all experiments.
    pub model: ModelConfig,
    /// Where its config came from.
    pub origin: String,
    /// Whether the file names none, so that a preset stands in.
    pub names_no_model: bool,
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
    /// One for each combination of its dimensions; with one unit of what is unknown.
    pub workloads: Vec<Workload>,
    /// What a training runs beside its steps.
    pub checks: Checks,
    /// Sequences of many lengths.
    pub listed: Listed,
    /// Each a run of its own.
    pub learning_rates: Vec<f64>,
    /// Each a run of its own.
    pub seeds: Vec<u64>,
    /// What is to be solved, the same for all points and runs.
    pub unknown: Option<Unknown>,
}

/// Sequences of many lengths, in place of one length for all.
#[derive(Debug, Clone, Default)]
pub struct Listed {
    /// Those of the workload.
    pub lengths: Option<Vec<u64>>,
    /// Those that a training scores beside its steps.
    pub eval_lengths: Option<Vec<u64>>,
    /// How they lie in a pass.
    pub layout: Option<Layout>,
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
    /// The unknown that `key` can be.
    fn of(key: Key) -> Option<Self> {
        [Self::Steps, Self::NewTokens].into_iter().find(|u| Key::named(u.key()) == Some(key))
    }

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

    /// `workload` with `n` steps or new tokens, where these are unknown, and with its lengths: an
    /// evaluation's last pass may be a workload of its own.
    ///
    /// # Errors
    /// Lengths that the workload cannot have.
    pub fn at(&self, workload: &Workload, n: u64) -> Result<Vec<Workload>> {
        let mut workload = workload.clone();
        match (self.unknown, &mut workload.task) {
            (Some(Unknown::Steps), Task::Train { steps, .. }) => *steps = n,
            (Some(Unknown::NewTokens), Task::Generate { new_tokens, max_new_tokens, .. }) => {
                (*new_tokens, *max_new_tokens) = (n, n);
            }
            _ => {}
        }
        let Some(lengths) = &self.listed.lengths else { return Ok(vec![workload]) };
        let tasks = tasks_of(lengths, self.listed.layout, workload.task.clone())?;
        Ok(tasks.into_iter().map(|task| Workload { task, ..workload.clone() }).collect())
    }

    /// What [`at`](Self::at) runs, and what a training runs beside its steps; how often each runs.
    ///
    /// # Errors
    /// Lengths that the workload cannot have.
    pub fn all_at(&self, workload: &Workload, n: u64) -> Result<Vec<(Workload, u128)>> {
        let main = self.at(workload, n)?;
        let mut all: Vec<(Workload, u128)> = main.iter().map(|w| (w.clone(), 1)).collect();
        for training in &main {
            all.extend(self.beside(training)?);
        }
        Ok(all)
    }

    fn beside(&self, training: &Workload) -> Result<Vec<(Workload, u128)>> {
        let Task::Train { batch, seq, accumulate, steps, .. } = training.task else {
            return Ok(vec![]);
        };
        let Listed { lengths, eval_lengths, layout } = &self.listed;
        let gradients = match lengths {
            Some(_) => 0,
            None => self.checks.gradients,
        };
        let mut all = Checks { gradients, ..self.checks }.of(training);
        let evaluation = |passes, rows| Task::Evaluate { batch, seq, passes, rows };
        let workload = |task| Workload { task, ..training.clone() };
        if let Some(lengths) = eval_lengths {
            let scored = tasks_of(lengths, *layout, evaluation(1, Rows::Whole)).map_err(of_eval)?;
            let times = self.checks.evaluations(steps).into();
            all.extend(scored.into_iter().map(|task| (workload(task), times)));
        }
        if let Some(lengths) = lengths.as_ref().filter(|_| self.checks.gradients > 0) {
            // The loss of the first step's rows, on both sides of each gradient.
            let mut first = training.task.clone();
            if let Task::Train { steps, .. } = &mut first {
                *steps = 1;
            }
            for task in tasks_of(lengths, *layout, first)? {
                let Task::Train { rows, .. } = task else { continue };
                let times = 2 * u128::from(self.checks.gradients);
                all.push((workload(evaluation(accumulate, rows)), times));
            }
        }
        Ok(all)
    }
}

/// An error about lengths, by the key of those that are scored.
fn of_eval(error: anyhow::Error) -> anyhow::Error {
    match error.downcast_ref() {
        Some(Error::Flag { flag, why }) if flag == "--lengths" => {
            Error::flag("--eval-lengths", why.clone()).into()
        }
        _ => error,
    }
}

impl Plan {
    /// Reads a plan file; price lists and configs in it are sought beside it.
    ///
    /// # Errors
    /// What is wrong, in one line with file, line and key.
    pub fn read(path: &Path) -> Result<Self> {
        Self::read_at(path, RateSpec::default())
    }

    /// The same at the rate of `flags`, which go before what the file says of one.
    ///
    /// # Errors
    /// As [`Plan::read`]; what is wrong with the flags.
    pub fn read_at(path: &Path, flags: RateSpec) -> Result<Self> {
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
        let spec = flags.or(file.rate(dir));
        let dtype = dtype(&source, &file, &spec)?;
        let rate = spec.resolve(dtype.into()).map_err(|e| in_file(&source, e))?;
        let budget = Budget::new(file.budget, rate.as_ref())
            .map_err(|why| source.fail(None, "budget", &why))?;
        let experiments = unfold_all(&source, &file, (&model, dtype), structure)?;
        measured(&source, rate.as_ref(), structure, &experiments)?;
        let names_no_model = file.preset.is_none() && file.config.is_none();
        Ok(Self {
            file: path.into(),
            budget,
            rate,
            structure,
            prices,
            model,
            origin,
            names_no_model,
            experiments,
        })
    }
}

/// The element type that the file names; else that of a GPU, where one is named.
fn dtype(source: &Source, file: &PlanFile, spec: &RateSpec) -> Result<Dtype> {
    let known = Dtype::ALL;
    match &file.dtype {
        None if spec.gpu.is_some() => Ok(Dtype::BF16),
        None => Ok(Dtype::F32),
        Some(name) => known.into_iter().find(|dtype| dtype.name() == name).ok_or_else(|| {
            let known = known.map(Dtype::name).join(", ");
            source.fail(None, "dtype", &format!("is `{name}`; known: {known}"))
        }),
    }
}

/// An error about the rate, at the key of the file that it is about, if the file has that.
fn in_file(source: &Source, error: anyhow::Error) -> anyhow::Error {
    match explain(&error) {
        (Some(key), why) if source.has(&key) => source.fail(None, &key, &why),
        _ => error,
    }
}

/// Refuses experiments that a benchmark did not measure, each at its line.
fn measured(
    source: &Source,
    rate: Option<&Rate>,
    structure: Structure,
    experiments: &[Experiment],
) -> Result<()> {
    let Some(rate) = rate.filter(|rate| matches!(rate.basis, Basis::Measured(_))) else {
        return Ok(());
    };
    for (index, experiment) in experiments.iter().enumerate() {
        for workload in &experiment.workloads {
            for (workload, _) in experiment.all_at(workload, 1)? {
                let time = rate.time(structure, &workload, 1);
                time.map_err(|e| source.fail(Some(index), "experiment", &e.to_string()))?;
            }
        }
    }
    Ok(())
}

impl PlanFile {
    /// What it says of a rate; files are sought in `dir`.
    fn rate(&self, dir: &Path) -> RateSpec {
        RateSpec {
            gpu: self.gpu.clone(),
            gpus: self.gpus.map(|Count(n)| n),
            mfu: self.mfu,
            hfu: self.hfu,
            peak: self.peak,
            from_bench: self.from_bench.as_ref().map(|file| dir.join(file)),
            price_per_gpu_hour: self.price_per_gpu_hour,
            watts: self.watts,
        }
    }
}

fn unfold_all(
    source: &Source,
    file: &PlanFile,
    of: (&ModelConfig, Dtype),
    structure: Structure,
) -> Result<Vec<Experiment>> {
    let mut experiments: Vec<Experiment> = vec![];
    for (index, table) in file.experiments.iter().enumerate() {
        let fail = |key: &str, why: &str| Err(source.fail(Some(index), key, why));
        let experiment = unfold(source, index, table, of)?;
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
            if let Task::Train { accumulate, .. } = workload.task {
                experiment.checks.validate(accumulate).map_err(|e| place(source, index, &e))?;
            }
            // What cannot be counted is refused here, where its line and key are known.
            let place = |e: anyhow::Error| place(source, index, &e);
            for (workload, _) in experiment.all_at(workload, 1).map_err(place)? {
                analytic::count(structure, &workload).map_err(place)?;
            }
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
    (model, dtype): (&ModelConfig, Dtype),
) -> Result<Experiment> {
    let kind = table.kind;
    let missing = match kind {
        Kind::Train => Some("steps"),
        Kind::Generate => Some("new_tokens"),
        Kind::Evaluate | Kind::Forward | Kind::Verify => None,
    };
    if let Some(key) = missing.filter(|key| !table.dimensions.contains_key(*key)) {
        return Err(source.fail(Some(index), key, "is missing: a number, or \"max\""));
    }
    let (tasks, unknown) = tasks(source, index, table)?;
    let listed = listed(source, index, table)?;
    let adapters = adapters(table);
    let ranks = table.lora_rank.as_ref().map_or(vec![0], |Grid(list)| naturals(list));
    let modes =
        table.attention.as_ref().map_or(vec![AttentionMode::Dense], |Grid(all)| all.clone());
    let points = tasks.len().saturating_mul(ranks.len()).saturating_mul(modes.len());
    if points > MOST_ROWS {
        let why = format!("unfolds to more than {MOST_ROWS} rows");
        return Err(source.fail(Some(index), "experiment", &why));
    }
    let mut workloads = vec![];
    for task in tasks {
        for &rank in &ranks {
            let rank = usize::try_from(rank).unwrap_or(usize::MAX);
            let lora = LoraConfig { rank, ..adapters.clone() }.checked(model);
            let lora = lora.map_err(|e| place(source, index, &e))?;
            workloads.extend(modes.iter().map(|&attention| {
                let (model, lora, task) = (model.clone(), lora.clone(), task.clone());
                Workload { model, lora, dtype, attention, task }
            }));
        }
    }
    let name = table.name.clone().unwrap_or_else(|| format!("{}-{}", kind.name(), index + 1));
    let rates = table.learning_rate.iter().flat_map(|Grid(list)| list.iter());
    let count = |given: Option<Count>| given.map_or(0, |Count(n)| n);
    Ok(Experiment {
        name,
        line: source.line(Some(index), "experiment"),
        workloads,
        checks: Checks {
            eval_rows: count(table.eval_rows),
            eval_every: table.eval_every.map_or(EVAL_EVERY, |Count(n)| n),
            gradients: count(table.check_gradients),
        },
        listed,
        learning_rates: rates.map(|LearningRate(rate)| *rate).collect(),
        seeds: table.seed.as_ref().map_or(vec![], |Grid(list)| naturals(list)),
        unknown,
    })
}

/// The sequences that an experiment lists, from files beside the plan.
fn listed(source: &Source, index: usize, table: &ExperimentTable) -> Result<Listed> {
    let fail = |key: &str, why: &str| Err(source.fail(Some(index), key, why));
    let read = |key: &str, file: &Option<PathBuf>| {
        let lengths = file.as_ref().map(|file| read_lengths(&source.beside(file)));
        lengths.transpose().map_err(|e| source.fail(Some(index), key, &explain(&e).1))
    };
    let lengths = read("lengths", &table.lengths)?;
    let eval_lengths = read("eval_lengths", &table.eval_lengths)?;
    let layout = match (table.layout, table.packing) {
        (Some(_), Some(_)) => return fail("packing", "is given beside `layout`; choose one"),
        (layout, None | Some(false)) => layout,
        (None, Some(true)) => Some(Layout::Packed),
    };
    if layout.is_some() && lengths.is_none() && eval_lengths.is_none() {
        let key = if table.layout.is_some() { "layout" } else { "packing" };
        return fail(key, "needs `lengths`");
    }
    if eval_lengths.is_some() && table.eval_rows.is_some() {
        return fail("eval_lengths", "is given beside `eval_rows`; choose one");
    }
    for key in table.kind.listed().iter().filter(|_| lengths.is_some()) {
        let key = key.name().replace('-', "_");
        if table.dimensions.contains_key(&key) {
            return fail(&key, "follows from `lengths`; give one");
        }
    }
    Ok(Listed { lengths, eval_lengths, layout })
}

/// The product of all dimensions that are lists, the batch slowest; and what is to be solved, which
/// stands at 1 until then.
fn tasks(
    source: &Source,
    index: usize,
    table: &ExperimentTable,
) -> Result<(Vec<Task>, Option<Unknown>)> {
    let (mut tasks, mut unknown) = (vec![table.kind.task()], None);
    let keys = [Key::Batch].into_iter().chain(Key::ALL.into_iter().filter(|k| *k != Key::Batch));
    for key in keys {
        let name = key.name().replace('-', "_");
        let Some(value) = table.dimensions.get(&name) else { continue };
        let fail = |why: String| source.fail(Some(index), &name, &why);
        let values = match dimension(key, value).map_err(fail)? {
            Dimension::Max => {
                let solved = Unknown::of(key).ok_or_else(|| {
                    fail("is \"max\"; only steps and new_tokens can be solved".into())
                })?;
                unknown = Some(solved);
                vec![vec![Value::Number(1)]]
            }
            Dimension::Each(values) => values.into_iter().map(|value| vec![value]).collect(),
            Dimension::Together(values) => vec![values],
        };
        if tasks.len().saturating_mul(values.len()) > MOST_ROWS {
            let why = format!("unfolds to more than {MOST_ROWS} rows");
            return Err(source.fail(Some(index), "experiment", &why));
        }
        let mut product = vec![];
        for task in &tasks {
            for together in &values {
                let mut task = task.clone();
                for value in together {
                    key.set(&mut task, value).map_err(fail)?;
                }
                product.push(task);
            }
        }
        tasks = product;
    }
    Ok((tasks, unknown))
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

fn naturals(list: &[Natural]) -> Vec<u64> {
    list.iter().map(|Natural(n)| *n).collect()
}

/// An error about a workload, at the key of the file that it comes from.
fn place(source: &Source, index: usize, error: &anyhow::Error) -> anyhow::Error {
    match explain(error) {
        (Some(key), why) if key == "structure" => source.fail(None, &key, &why),
        (Some(key), why) => source.fail(Some(index), &key, &why),
        (None, why) => source.fail(Some(index), "experiment", &format!("cannot be counted: {why}")),
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
        Some(flag) => {
            let name = flag.trim_end_matches([',', ';', ':']);
            format!("`{}`{}", key(name), &flag[name.len()..])
        }
        None => word.into(),
    });
    (Some(key(first)), format!("is refused: {}", words.collect::<Vec<_>>().join(" ")))
}
