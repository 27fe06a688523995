//! `flopaudit count`: the analytic side alone.

use clap::{Args, Subcommand};

use super::{
    args::{
        CountingArgs, EvaluationArgs, ForwardArgs, GenerationArgs, OutputArgs, StructureArg,
        TrainingArgs,
    },
    workload::WorkloadArgs,
};
use crate::{analytic, error::Result, report::Report, workload::Task};

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
    output: OutputArgs,
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
    let output = args.output.open()?;
    let prices = args.counting.prices()?;
    let (workload, origin) = args.workload.of(task)?;
    let structure = args.structure.structure;
    let tally = analytic::count(structure, &workload)?;
    let report = Report::new("count", &origin, vec![workload], structure, &prices, &tally)?;
    output.write(&report, false)
}
