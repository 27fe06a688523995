//! `flopaudit count`: the analytic side alone.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::{
    args::{
        CountingArgs, DEFAULT_PRESET, Described, EvaluationArgs, ForwardArgs, GenerationArgs,
        Listing, OutputArgs, StructureArg, TrainingArgs, note,
    },
    workload::WorkloadArgs,
};
use crate::{
    analytic,
    error::{Error, Result},
    report::{self, Report},
    sweep::{Axis, Base, Sweep},
    target::Target,
    weights,
    workload::{Task, Workload},
};

/// What to count.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// One forward pass.
    Forward(Box<Count<ForwardArgs>>),
    /// A generation, in time independent of its length.
    Generate(Box<Count<GenerationArgs>>),
    /// A training: forward and backward passes.
    Train(Box<Count<TrainingArgs>>),
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
    sweep: SweepArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// A grid of workloads in place of one.
#[derive(Debug, Args)]
#[command(next_help_heading = "Sweep")]
struct SweepArgs {
    /// Count every point of a grid: KEY=a,b,c or KEY=a..b:*k or KEY=a..b:+k, KEY being preset,
    /// batch, seq, past, prompt-tokens, new-tokens, steps, accumulate or lora-rank; repeat it for
    /// the product
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
        Command::Forward(args) => count(&args, args.workload.task.task()),
        Command::Generate(args) => count(&args, args.workload.task.task()?),
        Command::Train(args) => count(&args, args.workload.task.task()),
        Command::Evaluate(args) => count(&args, args.workload.task.task()),
    }
}

fn count<T: Args>(args: &Count<T>, task: Task) -> Result<()> {
    if !args.sweep.axes.is_empty() {
        return sweep(args, task);
    }
    let output = args.output.open()?;
    let prices = args.counting.prices()?;
    let (workload, Described { origin, ignored, .. }) = args.workload.of(task)?;
    let structure = args.structure.structure;
    let tally = analytic::count(structure, &workload)?;
    let notes = notes(args, &workload);
    notes.iter().for_each(|told| note(told));
    let report = Report::new("count", &origin, vec![workload], structure, &prices, &tally)?
        .with_ignored(ignored.as_deref())
        .with_notes(notes);
    output.write(&report.sized_for(args.workload.device()), false)
}

/// What a reader of the count may not expect.
fn notes<T: Args>(args: &Count<T>, workload: &Workload) -> Vec<String> {
    let mut notes = vec![];
    if args.workload.model.names_no_model() && weights::default_is_local() {
        notes.push(format!(
            "counted is the preset {DEFAULT_PRESET}, not the weights that a run without --model takes; \
             --model counts those"
        ));
    }
    let (context, most) = (workload.context(), workload.model.max_position_embeddings as u64);
    if context > most {
        notes.push(format!(
            "a context of {context} tokens is longer than the model was made for, {most}"
        ));
    }
    notes
}

/// Counts every point of the grid.
fn sweep<T: Args>(args: &Count<T>, task: Task) -> Result<()> {
    let output = args.output.open()?;
    let csv = args.sweep.csv.as_deref().map(Target::open).transpose()?;
    let axes: Vec<Axis> =
        args.sweep.axes.iter().map(|axis| axis.parse()).collect::<Result<_, Error>>()?;
    let prices = args.counting.prices()?;
    let Described { config: model, origin, ignored } = args.workload.model.config_only()?;
    let base = Base { model, lora: args.workload.lora.unchecked()?, task };
    let sweep = Sweep::new(&base, &origin, &axes, args.structure.structure, &prices)?;
    let style = args.output.style();
    let human = !matches!(csv, Some(Target::Stdout));
    let listing = Listing { document: &sweep, ignored };
    output
        .write_with(&listing, || if human { report::print_sweep(&sweep, style) } else { Ok(()) })?;
    csv.map_or(Ok(()), |csv| csv.write_with(|out| report::csv(out, &sweep)))
}
