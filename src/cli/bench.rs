//! `flopaudit bench`: a grid of workloads, timed, audited and held against the ceiling.

use std::{io::Write, path::PathBuf, str::FromStr};

use clap::{Args, Subcommand};

use super::{
    args::{ModelArgs, Output, OutputArgs, bar, set_threads},
    ceiling, device,
    interrupt::Interrupt,
    memory,
};
use crate::{
    bench::{
        Accuracy, BenchReport, Comparison, DeviceInfo, EnergyCounter, Kind, Measured, Outcome,
        Point, Runner, SCHEMA_VERSION, Training, curves, now,
    },
    config::{LoraConfig, TargetModules},
    error::{Error, Result},
    ledger::{Dtype, MomentDtype},
    model::{AdapterSource, Decoder},
    report, sweep,
    target::Target,
    weights::Checkpoint,
    workload::{AttentionMode, Logits, Rows, Sampling, Task, Workload},
};

/// What to measure.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Passes over prompts, up to the first token.
    Prefill(Box<Bench<PrefillArgs>>),
    /// Further tokens, one a step, after contexts of given lengths.
    Decode(Box<Bench<DecodeArgs>>),
    /// Optimizer steps: forward, backward, update.
    Train(Box<Bench<TrainArgs>>),
    /// What changed between two results, beyond the noise.
    Compare(CompareArgs),
}

/// A grid and how to run it.
#[derive(Debug, Args)]
pub struct Bench<T: Args> {
    #[command(flatten)]
    task: T,
    #[command(flatten)]
    grid: GridArgs,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    files: FileArgs,
}

/// Lengths of prompts.
#[derive(Debug, Args)]
#[command(next_help_heading = "Grid")]
pub struct PrefillArgs {
    /// Tokens of each prompt: a,b,c or a..b:*k or a..b:+k
    #[arg(long, value_name = "LIST", default_value = "128,512")]
    seq: Grid,
}

/// Lengths of contexts.
#[derive(Debug, Args)]
#[command(next_help_heading = "Grid")]
pub struct DecodeArgs {
    /// Tokens already in the cache: a,b,c or a..b:*k or a..b:+k
    #[arg(long, visible_alias = "seq", value_name = "LIST", default_value = "128,512,2048")]
    context: Grid,
    /// Steps in each repetition, all at the same context
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..))]
    new_tokens: u16,
}

/// Lengths of texts, and what is trained.
#[derive(Debug, Args)]
#[command(next_help_heading = "Grid")]
pub struct TrainArgs {
    /// Tokens of each sequence: a,b,c or a..b:*k or a..b:+k
    #[arg(long, value_name = "LIST", default_value = "128")]
    seq: Grid,
    /// Train every weight, not the adapters alone
    #[arg(long)]
    full: bool,
    /// Keep only each layer's input, and run it forward again for its gradients
    #[arg(long)]
    recompute: bool,
    /// Element type that AdamW's moments are kept in
    #[arg(long, value_enum, value_name = "DTYPE", default_value_t)]
    moments: MomentDtype,
}

/// What all grids vary, and how often each point runs.
#[derive(Debug, Args)]
#[command(next_help_heading = "Grid")]
struct GridArgs {
    /// Sequences: a,b,c or a..b:*k or a..b:+k
    #[arg(long, value_name = "LIST", default_value = "1")]
    batch: Grid,
    /// Element types of weights and activations [default: bf16 on cuda, else f32]
    #[arg(long, value_enum, value_name = "LIST", value_delimiter = ',')]
    dtype: Vec<Dtype>,
    /// Which scores attention computes: dense, blocked, or both
    #[arg(long, value_enum, value_name = "LIST", value_delimiter = ',', default_value = "dense")]
    attention: Vec<AttentionMode>,
    /// Ranks of the adapters; 0 is none [default: 8 where adapters are trained, else 0]
    #[arg(long, value_name = "LIST")]
    lora_rank: Option<Grid>,
    /// The adapters' output is scaled by alpha / rank
    #[arg(long, value_name = "ALPHA", default_value_t = 16.0, allow_negative_numbers = true)]
    lora_alpha: f64,
    /// Adapted projections, all-linear for all seven
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "q_proj,v_proj")]
    lora_targets: Vec<TargetModules>,
    /// Timed repetitions of each point
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    repetitions: u16,
    /// Repetitions before them that are not timed
    #[arg(long, value_name = "N", default_value_t = 1)]
    warmup: u16,
    /// cpu, cuda[:N] or metal
    #[arg(long, default_value = "cpu")]
    device: String,
    /// CPU threads [default: all cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Seed of the tokens, which are random, and of the adapters' initial values
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// A ceiling that `ceiling --json FILE` wrote [default: the one kept of this device, else a
    /// new one]
    #[arg(long, value_name = "FILE")]
    ceiling: Option<PathBuf>,
}

/// Further formats.
#[derive(Debug, Args)]
#[command(next_help_heading = "Output")]
struct FileArgs {
    /// Write the points as CSV to FILE; without FILE, to stdout and nothing else there
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "-")]
    csv: Option<PathBuf>,
    /// Write the table as Markdown to FILE; without FILE, to stdout and nothing else there
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "-")]
    markdown: Option<PathBuf>,
}

/// Two results.
#[derive(Debug, Args)]
pub struct CompareArgs {
    /// What `bench … --json FILE` wrote before
    before: PathBuf,
    /// And after
    after: PathBuf,
    /// Changes below this many percent are noise, whatever the samples say
    #[arg(long, value_name = "PERCENT", default_value_t = 2.0, allow_negative_numbers = true)]
    noise: f64,
    #[command(flatten)]
    output: OutputArgs,
}

/// Most points of a grid.
const MOST_POINTS: usize = 10_000;

/// Values of one dimension.
#[derive(Debug, Clone)]
struct Grid(Vec<u64>);

impl FromStr for Grid {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        sweep::numbers(text).map(Self)
    }
}

/// What one grid measures at each point.
#[derive(Debug, Clone, Copy)]
enum Unit {
    Prefill,
    Decode { new_tokens: u16 },
    Train(Training),
}

/// Measures and prints.
pub fn run(command: Command) -> Result<()> {
    match command {
        Command::Prefill(args) => bench(&args, Unit::Prefill, &args.task.seq),
        Command::Decode(args) => {
            let unit = Unit::Decode { new_tokens: args.task.new_tokens };
            bench(&args, unit, &args.task.context)
        }
        Command::Train(args) => {
            let TrainArgs { full, recompute, moments, .. } = args.task;
            let unit = Unit::Train(Training { full, recompute, moments });
            bench(&args, unit, &args.task.seq)
        }
        Command::Compare(args) => compare(args),
    }
}

fn compare(args: CompareArgs) -> Result<()> {
    if !(args.noise >= 0.0 && args.noise.is_finite()) {
        return Err(Error::flag("--noise", format!("{} is no share", args.noise)).into());
    }
    let output = args.output.open()?;
    let (before, after) = (BenchReport::read(&args.before)?, BenchReport::read(&args.after)?);
    let comparison = Comparison::new(&before, &after, args.noise / 100.0)?;
    output.write_with(&comparison, || report::print_comparison(&before, &after, &comparison))
}

/// The opened outputs.
struct Outputs {
    json: Output,
    csv: Option<Target>,
    markdown: Option<Target>,
    style: report::Figures,
}

impl Outputs {
    fn open<T: Args>(args: &Bench<T>) -> Result<Self> {
        let open = |file: &Option<PathBuf>| file.as_deref().map(Target::open).transpose();
        let (csv, markdown) = (open(&args.files.csv)?, open(&args.files.markdown)?);
        let style = args.output.style();
        let outputs = Self { json: args.output.open()?, csv, markdown, style };
        let [csv, markdown] = [&outputs.csv, &outputs.markdown].map(is_stdout);
        if usize::from(csv) + usize::from(markdown) + usize::from(!outputs.json.is_human()) > 1 {
            let flags = "--json, --csv, --markdown";
            return Err(Error::flag(flags, "only one of them can have stdout").into());
        }
        Ok(outputs)
    }

    fn write(self, report: &BenchReport) -> Result<()> {
        let human = !is_stdout(&self.csv) && !is_stdout(&self.markdown);
        // First the files: a reader of stdout that goes away must not cost them.
        let mut files = [
            self.csv.map(|to| (to, report::bench_csv as Format)),
            self.markdown.map(|to| (to, report::bench_markdown as Format)),
        ];
        files.sort_by_key(|file| matches!(file, Some((Target::Stdout, _))));
        for (to, format) in files.into_iter().flatten() {
            to.write_with(|out| format(out, report))?;
        }
        let table = || if human { report::print_bench(report, self.style) } else { Ok(()) };
        self.json.write_with(report, table)
    }
}

type Format = fn(&mut dyn Write, &BenchReport) -> Result<()>;

fn is_stdout(target: &Option<Target>) -> bool {
    matches!(target, Some(Target::Stdout))
}

fn bench<T: Args>(args: &Bench<T>, unit: Unit, lengths: &Grid) -> Result<()> {
    let grid = &args.grid;
    set_threads(grid.threads);
    let outputs = Outputs::open(args)?;
    let opened = device::open(&grid.device)?;
    let interrupt = Interrupt::listen()?;
    let checkpoint = args.model.open()?;
    let plan = Plan::new(grid, unit, lengths, &checkpoint)?;
    for workload in plan.workloads(&checkpoint) {
        // What 8 bits are held against runs by itself.
        let wide = || Workload { dtype: workload.dtype.base(), ..workload.clone() };
        let against = workload.dtype.is_8_bit().then(wide);
        for workload in [Some(workload), against].into_iter().flatten() {
            memory::check(&unit.runs(workload), &opened)?;
        }
    }
    let given = grid.ceiling.as_deref();
    let mut ceiling = ceiling::obtain(given, (&opened, &grid.device), &plan.dtypes, &interrupt)?;
    if given.is_none() && unit.kind() == Kind::Decode {
        ceiling = ceiling::read_anew(ceiling, &opened, &plan.dtypes, &interrupt)?;
    }

    let energy = EnergyCounter::of(&opened);
    let bar = bar(plan.units(), "{bar:30} {pos}/{len} {msg}");
    let tick = || {
        bar.inc(1);
        interrupt.check()
    };
    let (warmup, samples) = plan.repetitions;
    let runner = Runner { warmup, samples, seed: grid.seed, energy: energy.as_ref(), tick: &tick };
    let (mut points, mut accuracy) = (vec![], None);
    let load = |dtype, lora: &LoraConfig| {
        let adapters = AdapterSource::Fresh { lora: lora.clone(), seed: grid.seed };
        let Checkpoint { config, weights, .. } = &checkpoint;
        bar.set_message("loading weights");
        let progress = |_| interrupt.check();
        match unit.kind() {
            Kind::Train => {
                Decoder::load_to_train(config, weights, &adapters, dtype, &opened, progress)
            }
            Kind::Prefill | Kind::Decode => {
                Decoder::load(config, weights, &adapters, dtype, &opened, progress)
            }
        }
    };
    // A type in 8 bits is held against the one that all else is in.
    let accuracy_of = |narrow: Outcome, lora: &LoraConfig, dtype: Dtype| -> Result<Accuracy> {
        let wide = load(dtype.base(), lora)?;
        narrow.against(&Outcome::of(&wide, grid.seed)?)
    };
    let mut measure = || -> Result<()> {
        for &dtype in &plan.dtypes {
            for lora in &plan.adapters {
                let mut model = load(dtype, lora)?;
                let asked = dtype.is_8_bit() && accuracy.is_none();
                let narrow = asked.then(|| Outcome::of(&model, grid.seed)).transpose()?;
                for &(mode, batch, length) in &plan.shapes {
                    let rank = lora.rank;
                    bar.set_message(format!("{} rank {rank}: {batch} x {length}", dtype.name()));
                    let ready = model.with_attention(mode);
                    let (measured, back) = unit.run(&runner, ready, batch, length)?;
                    model = back;
                    points.push(Point::new(unit.kind(), measured, &ceiling)?);
                }
                drop(model);
                if let Some(narrow) = narrow {
                    accuracy = Some(accuracy_of(narrow, lora, dtype)?);
                }
            }
        }
        Ok(())
    };
    let ended = measure();
    bar.finish_and_clear();
    if points.is_empty() {
        return ended;
    }
    // Points that are done are worth having, however the grid ended.
    outputs.write(&BenchReport {
        schema_version: SCHEMA_VERSION,
        command: "bench".into(),
        kind: unit.kind(),
        model: checkpoint.origin.clone(),
        ignored: checkpoint.listed().map(<[_]>::to_vec),
        parameters: checkpoint.config.parameters(),
        device: DeviceInfo::of(&opened, &grid.device),
        date: now(),
        ceiling,
        accuracy,
        curves: if unit.kind() == Kind::Decode { curves(&points) } else { vec![] },
        points,
    })?;
    ended
}

impl Unit {
    fn kind(self) -> Kind {
        match self {
            Self::Prefill => Kind::Prefill,
            Self::Decode { .. } => Kind::Decode,
            Self::Train(_) => Kind::Train,
        }
    }

    /// The flag that gives the lengths.
    fn flag(self) -> &'static str {
        match self {
            Self::Prefill | Self::Train(_) => "--seq",
            Self::Decode { .. } => "--context",
        }
    }

    /// Tokens that a unit chooses beside those it is given.
    fn new_tokens(self) -> u64 {
        match self {
            Self::Prefill => 1,
            Self::Decode { .. } => 2,
            Self::Train(_) => 0,
        }
    }

    /// What memory is needed for: of decoding, the steps alone, without the prompt before them.
    fn runs(self, workload: Workload) -> Workload {
        let task = match (self, workload.task) {
            (Self::Decode { .. }, Task::Generate { batch, prompt_tokens, .. }) => Task::Forward {
                batch,
                seq: 1,
                past: prompt_tokens,
                logits: Logits::Last,
                sequences: None,
            },
            (_, task) => task,
        };
        Workload { task, ..workload }
    }

    fn task(self, batch: u64, length: u64) -> Task {
        let new_tokens = self.new_tokens();
        match self {
            Self::Train(Training { full, recompute, moments }) => {
                let (accumulate, steps, clip) = (1, 1, true);
                Task::Train {
                    batch,
                    seq: length,
                    accumulate,
                    steps,
                    full,
                    recompute,
                    clip,
                    moments,
                    rows: Rows::Whole,
                }
            }
            Self::Prefill | Self::Decode { .. } => Task::Generate {
                batch,
                prompt_tokens: length,
                new_tokens,
                max_new_tokens: new_tokens,
                kv_cache: true,
                sampling: Sampling::GREEDY,
                past: 0,
                prompts: None,
                then: vec![],
                prefill_chunk: None,
            },
        }
    }

    fn run(
        self,
        runner: &Runner,
        model: Decoder,
        batch: u64,
        length: u64,
    ) -> Result<(Measured, Decoder)> {
        match self {
            Self::Prefill => Ok((runner.prefill(&model, batch, length)?, model)),
            Self::Decode { .. } => Ok((runner.decode(&model, batch, length)?, model)),
            Self::Train(training) => runner.train(model, (batch, length), training),
        }
    }
}

/// The grid, every point of which can run.
struct Plan {
    unit: Unit,
    dtypes: Vec<Dtype>,
    adapters: Vec<LoraConfig>,
    /// (attention, batch, length).
    shapes: Vec<(AttentionMode, u64, u64)>,
    /// (warm-up, timed) units of a point.
    repetitions: (usize, usize),
}

impl Plan {
    fn new(args: &GridArgs, unit: Unit, lengths: &Grid, checkpoint: &Checkpoint) -> Result<Self> {
        let config = &checkpoint.config;
        let dtypes = match args.dtype.as_slice() {
            [] => vec![device::default_dtype(&args.device)],
            dtypes => dtypes.to_vec(),
        };
        let default = u64::from(matches!(unit, Unit::Train(Training { full: false, .. }))) * 8;
        let ranks = args.lora_rank.as_ref().map_or(vec![default], |grid| grid.0.clone());
        let adapters = ranks.iter().map(|&rank| {
            let rank = usize::try_from(rank).unwrap_or(usize::MAX);
            let targets = TargetModules::modules(&args.lora_targets);
            let alpha = args.lora_alpha;
            LoraConfig { rank, alpha, targets, ..LoraConfig::none() }.checked(config)
        });
        let adapters = adapters.take(MOST_POINTS + 1).collect::<Result<_>>()?;
        let most = (config.max_position_embeddings as u64).saturating_sub(unit.new_tokens());
        if let Some(length) = lengths.0.iter().find(|&&length| length > most) {
            let positions = config.max_position_embeddings;
            let why = format!(
                "{length} and the tokens after it are past the model's {positions} positions"
            );
            return Err(Error::flag(unit.flag(), why).into());
        }
        if let Some(zero) = lengths.0.iter().find(|&&length| length == 0) {
            return Err(Error::flag(unit.flag(), format!("{zero} is below 1")).into());
        }
        let modes = &args.attention;
        let size = [args.batch.0.len(), lengths.0.len(), dtypes.len(), ranks.len(), modes.len()]
            .into_iter()
            .try_fold(1usize, |all, n| all.checked_mul(n));
        if size.is_none_or(|size| size > MOST_POINTS) {
            let why = format!("the grid has more than {MOST_POINTS} points");
            return Err(Error::flag(format!("{}, --batch", unit.flag()), why).into());
        }
        let of_batch = |&batch: &u64| lengths.0.iter().map(move |&length| (batch, length));
        let sizes = args.batch.0.iter().flat_map(of_batch);
        let of_size = |(batch, length)| modes.iter().map(move |&mode| (mode, batch, length));
        let shapes = sizes.flat_map(of_size).collect();
        let each = match unit {
            Unit::Decode { new_tokens } => usize::from(new_tokens),
            Unit::Prefill | Unit::Train(_) => 1,
        };
        let repetitions = (usize::from(args.warmup) * each, usize::from(args.repetitions) * each);
        let plan = Self { unit, dtypes, adapters, shapes, repetitions };
        plan.workloads(checkpoint).try_for_each(|workload| workload.validate())?;
        Ok(plan)
    }

    /// Every point, in the order that they run.
    fn workloads(&self, checkpoint: &Checkpoint) -> impl Iterator<Item = Workload> {
        let of_shape = |dtype, lora: &LoraConfig, (attention, batch, length)| Workload {
            model: checkpoint.config.clone(),
            lora: lora.clone(),
            dtype,
            attention,
            task: self.unit.task(batch, length),
        };
        self.dtypes.iter().flat_map(move |&dtype| {
            self.adapters.iter().flat_map(move |lora| {
                self.shapes.iter().map(move |&shape| of_shape(dtype, lora, shape))
            })
        })
    }

    /// Units that run, warm-up among them.
    fn units(&self) -> u64 {
        let points = self.dtypes.len() * self.adapters.len() * self.shapes.len();
        (points * (self.repetitions.0 + self.repetitions.1)) as u64
    }
}
