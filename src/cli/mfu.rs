//! `flopaudit mfu`: what somebody's speed comes to, by each convention.

use clap::{Args as ClapArgs, Subcommand};

use super::{
    args::{Described, Listing, OutputArgs, note},
    task::{ForwardArgs, GenerationArgs, TrainingArgs},
    workload::WorkloadArgs,
};
use crate::{
    analytic::Structure,
    error::{Error, Result},
    hardware::{Gpu, Precision},
    rate::{Amount, Peak, Published, Speed, stated_peak},
    report::{self, SCHEMA_VERSION},
    workload::{Task, Workload},
};

/// Flags of `mfu`; without a command, of a training.
#[derive(Debug, ClapArgs)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    train: Mfu<TrainingArgs>,
}

/// What ran at that speed.
#[derive(Debug, Subcommand)]
enum Command {
    /// A training (the default): of every weight, unless adapters are given.
    Train(Box<Mfu<TrainingArgs>>),
    /// Forward passes.
    Forward(Box<Mfu<ForwardArgs>>),
    /// A generation; its speed is of new tokens.
    Generate(Box<Mfu<GenerationArgs>>),
}

/// A workload, its speed and where it ran.
#[derive(Debug, ClapArgs)]
struct Mfu<T: ClapArgs> {
    #[command(flatten)]
    workload: WorkloadArgs<T>,
    #[command(flatten)]
    speed: SpeedArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// The measured speed, and the devices.
#[derive(Debug, ClapArgs)]
#[command(next_help_heading = "Speed")]
struct SpeedArgs {
    /// The GPU, by its name in `flopaudit gpus`: h100-sxm, a100-sxm-80gb …
    #[arg(long, value_name = "NAME", required = true)]
    gpu: Option<String>,
    /// How many of them worked at once
    #[arg(long, value_name = "N", default_value_t = 1)]
    gpus: u64,
    /// Element type of the peak [default: --dtype, else bf16]
    #[arg(long, value_enum, value_name = "TYPE")]
    peak: Option<Precision>,
    /// Tokens a second of all GPUs together
    #[arg(long, value_name = "N", group = "stated")]
    tokens_per_second: Option<Amount>,
    /// Tokens a second of one GPU
    #[arg(long, value_name = "N", group = "stated")]
    tokens_per_second_per_gpu: Option<Amount>,
    /// Seconds of one optimizer step of --accumulate × --batch × --seq tokens over all GPUs; of
    /// one pass, or of a whole generation
    #[arg(long, value_name = "SECONDS", group = "stated")]
    step_seconds: Option<Amount>,
    /// TFLOP/s of one GPU, as the structure of --by counts
    #[arg(long, value_name = "N", group = "stated", requires = "by")]
    tflops_per_gpu: Option<Amount>,
    /// Whose formula --tflops-per-gpu is by
    #[arg(long, value_enum, value_name = "STRUCTURE", requires = "tflops_per_gpu", conflicts_with_all = ["tokens_per_second", "tokens_per_second_per_gpu", "step_seconds"])]
    by: Option<Structure>,
}

impl SpeedArgs {
    fn speed(&self) -> Result<Speed> {
        let all = [
            self.tokens_per_second.map(|Amount(n)| Speed::TokensPerSecond(n)),
            self.tokens_per_second_per_gpu.map(|Amount(n)| Speed::TokensPerSecondPerGpu(n)),
            self.step_seconds.map(|Amount(n)| Speed::Seconds(n)),
            self.tflops_per_gpu
                .zip(self.by)
                .map(|(Amount(n), by)| Speed::FlopsPerSecondPerGpu(n * 1e12, by)),
        ];
        all.into_iter().flatten().next().ok_or_else(|| {
            let flag = "--tokens-per-second";
            let why = "is missing: the speed, or --tokens-per-second-per-gpu, --step-seconds, \
                       --tflops-per-gpu";
            Error::flag(flag, why).into()
        })
    }

    fn peak(&self, default: Precision) -> Result<Peak> {
        if self.gpus == 0 {
            return Err(Error::flag("--gpus", "must be at least 1").into());
        }
        let gpu = Gpu::named(self.gpu.as_deref().unwrap_or_default())?;
        let peak = self.peak.unwrap_or(default);
        let peak_flops_per_s = stated_peak(&gpu, peak)?;
        let Gpu { name: gpu, source, year, .. } = gpu;
        Ok(Peak { gpu, source, year, gpus: self.gpus, peak, peak_flops_per_s })
    }
}

/// What `--json` writes.
#[derive(serde::Serialize)]
struct Document<'a> {
    schema_version: u32,
    command: &'static str,
    model: &'a str,
    parameters: u128,
    #[serde(serialize_with = "report::one_or_many")]
    workload: &'a [Workload],
    #[serde(flatten)]
    published: &'a Published,
}

/// Counts, divides and prints.
pub fn run(args: Args) -> Result<()> {
    match args.command {
        None => train(&args.train),
        Some(Command::Train(args)) => train(&args),
        Some(Command::Forward(args)) => mfu(&args, args.workload.task.task()),
        Some(Command::Generate(args)) => mfu(&args, args.workload.task.task()),
    }
}

/// Of every weight where no adapter is asked for. A step of equal rows is like any other; where rows
/// have lengths of their own, all steps are taken together.
fn train(args: &Mfu<TrainingArgs>) -> Result<()> {
    let mut task = args.workload.task.task();
    if let Task::Train { full, steps, .. } = &mut task {
        *full |= args.workload.lora.lora_rank.is_none();
        let why = match (args.workload.lengths.are_given(), args.speed.step_seconds) {
            (false, _) => "changes no speed where all rows are alike; leave it out",
            (true, Some(_)) => "--step-seconds is of one step; leave it out",
            (true, None) => "",
        };
        if *steps != 1 && !why.is_empty() {
            return Err(Error::flag("--steps", why).into());
        }
    }
    mfu(args, task)
}

fn mfu<T: ClapArgs>(args: &Mfu<T>, task: Task) -> Result<()> {
    let output = args.output.open()?;
    let (workloads, Described { origin, config, ignored }) = args.workload.on("cuda", task)?;
    let speed = args.speed.speed()?;
    let peak = args.speed.peak(args.workload.dtype_or("cuda").into())?;
    let published = Published::new(&workloads, speed, peak)?;
    if published.rows.iter().any(|row| row.utilization > 1.0) {
        note("above 100 %: the speed, the number of GPUs, the peak or the convention is another's");
    }
    args.workload.notes(&workloads).iter().for_each(|told| note(told));
    let document = Document {
        schema_version: SCHEMA_VERSION,
        command: "mfu",
        model: &origin,
        parameters: config.parameters(),
        workload: &workloads,
        published: &published,
    };
    let listing = Listing { document: &document, ignored };
    let style = args.output.style();
    output.write_with(&listing, || report::print_mfu(&origin, &workloads, &published, style))
}
