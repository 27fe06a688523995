//! `flopaudit count`: the analytic side alone.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::{
    args::{CountingArgs, Described, Listing, OutputArgs, StructureArg, note},
    rate::RateArgs,
    task::{EvaluationArgs, ForwardArgs, GenerationArgs, TrainingArgs, VerificationArgs},
    workload::WorkloadArgs,
};
use crate::{
    analytic,
    error::{Error, Result},
    plan::Flops,
    report::{self, Report, TimeReport},
    sweep::{Axis, Base, Sweep, Swept},
    tally::Tally,
    target::Target,
    threshold::{Regime, Thresholds},
    workload::Task,
};

/// What to count.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// One forward pass.
    Forward(Box<Count<ForwardArgs>>),
    /// A generation, in time independent of its length.
    Generate(Box<Count<GenerationArgs>>),
    /// Rounds of verification in speculative decoding.
    Verify(Box<Count<VerificationArgs>>),
    /// A training: forward and backward passes.
    Train(Box<Train>),
    /// Forward passes over known text.
    #[command(name = "eval", visible_alias = "evaluate")]
    Evaluate(Box<Count<EvaluationArgs>>),
}

/// A workload and how to count it.
#[derive(Debug, Args)]
pub struct Count<T: Args> {
    #[command(flatten)]
    workload: WorkloadArgs<T>,
    #[command(flatten)]
    structure: StructureArg,
    #[command(flatten)]
    counting: CountingArgs,
    #[command(flatten)]
    rate: RateArgs,
    #[command(flatten)]
    sweep: SweepArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// A training, and the amounts that laws name.
#[derive(Debug, Args)]
pub struct Train {
    #[command(flatten)]
    count: Count<TrainingArgs>,
    #[command(flatten)]
    threshold: ThresholdArgs,
}

/// Amounts of training compute that laws name.
#[derive(Debug, Args)]
#[command(next_help_heading = "Thresholds")]
struct ThresholdArgs {
    /// Print the share of each amount of training compute that a law or its guidelines name
    #[arg(long, value_enum, value_name = "REGIME", conflicts_with = "axes")]
    threshold: Option<Regime>,
    /// Training compute of the model that is trained further: "3e24 FLOP"
    #[arg(long, value_name = "AMOUNT", requires = "threshold", conflicts_with = "axes", value_parser = Flops::parse)]
    base_compute: Option<Flops>,
}

/// A grid of workloads in place of one.
#[derive(Debug, Args)]
#[command(next_help_heading = "Sweep")]
struct SweepArgs {
    /// Count every point of a grid: KEY=a,b,c or KEY=a..b:*k or KEY=a..b:+k, KEY being preset,
    /// lora-rank, dtype, attention, layout or a flag of the workload, full=false,true among them; repeat
    /// it for the product
    #[arg(long = "sweep", value_name = "KEY=VALUES")]
    axes: Vec<String>,
    /// Write the grid as CSV to FILE; without FILE, to stdout and nothing else there
    #[arg(
        long, value_name = "FILE", num_args = 0..=1, default_missing_value = "-",
        requires = "axes", conflicts_with = "json"
    )]
    csv: Option<PathBuf>,
}

/// Counts and prints.
pub fn run(command: Command) -> Result<()> {
    match command {
        Command::Forward(args) => count(&args, args.workload.task.task(), None),
        Command::Generate(args) => count(&args, args.workload.task.task(), None),
        Command::Verify(args) => count(&args, args.workload.task.task(), None),
        Command::Train(args) => {
            let Train { count: of, threshold } = *args;
            count(&of, of.workload.task.task(), Some(&threshold))
        }
        Command::Evaluate(args) => count(&args, args.workload.task.task(), None),
    }
}

fn count<T: Args>(args: &Count<T>, task: Task, threshold: Option<&ThresholdArgs>) -> Result<()> {
    if !args.sweep.axes.is_empty() {
        return sweep(args, task);
    }
    let output = args.output.open()?;
    let prices = args.counting.prices()?;
    // A GPU that is named is where it would run.
    let default = if args.rate.names_gpu() { "cuda" } else { "cpu" };
    let (workloads, Described { origin, ignored, .. }) = args.workload.on(default, task)?;
    let structure = args.structure.structure;
    let rate = args.rate.spec().resolve(args.workload.dtype_or(default).into())?;
    let mut tally = Tally::default();
    for workload in &workloads {
        tally.extend(analytic::count(structure, workload)?)?;
    }
    let notes = args.workload.notes(&workloads);
    notes.iter().for_each(|told| note(told));
    let time = rate.map(|rate| -> Result<_> {
        let times = workloads.iter().map(|workload| rate.time(structure, workload, 1));
        let time = rate.sum(times.collect::<Result<Vec<_>>>()?);
        Ok(TimeReport { rate, time })
    });
    let time = time.transpose()?;
    let thresholds = threshold.and_then(|args| Some((args.threshold?, args.base_compute)));
    let thresholds = thresholds
        .map(|(regime, base)| Thresholds::new(regime, &tally, base.map(|Flops(flops)| flops)));
    let thresholds = thresholds.transpose()?;
    let report = Report::new("count", &origin, workloads, structure, &prices, &tally)?
        .with_ignored(ignored.as_deref())
        .with_notes(notes);
    let report = Report { time, thresholds, ..report };
    output.write(&report.sized_for(args.workload.device_or(default)), false)
}

/// Counts every point of the grid.
fn sweep<T: Args>(args: &Count<T>, task: Task) -> Result<()> {
    if !args.rate.spec().is_empty() {
        let why = "a sweep has no times; ask for one workload, or take --csv and divide";
        return Err(Error::flag("--sweep", why).into());
    }
    let output = args.output.open()?;
    let csv = args.sweep.csv.as_deref().map(Target::open).transpose()?;
    let axes: Vec<Axis> =
        args.sweep.axes.iter().map(|axis| axis.parse()).collect::<Result<_, Error>>()?;
    let prices = args.counting.prices()?;
    let Described { config: model, origin, ignored } = args.workload.model.config_only()?;
    let names_model = axes.iter().any(|axis| axis.key == Swept::Preset);
    args.workload.model.stand_in().filter(|_| !names_model).iter().for_each(|told| note(told));
    let dtype = args.workload.dtype_or("cpu");
    let (lengths, layout) = args.workload.lengths.swept(task.kind())?;
    let lora = args.workload.lora.unchecked()?;
    let attention = args.workload.attention.mode();
    let base = Base { model, lora, dtype, attention, task, lengths, layout };
    let sweep = Sweep::new(&base, &origin, &axes, args.structure.structure, &prices)?;
    let style = args.output.style();
    let human = !matches!(csv, Some(Target::Stdout));
    let listing = Listing { document: &sweep, ignored };
    output
        .write_with(&listing, || if human { report::print_sweep(&sweep, style) } else { Ok(()) })?;
    csv.map_or(Ok(()), |csv| csv.write_with(|out| report::csv(out, &sweep)))
}
