//! `flopaudit count`: the analytic side alone.

use clap::{Args, Subcommand};

use super::args::{
    CountingArgs, DtypeArg, EvaluationArgs, ForwardArgs, GenerationArgs, LoraArgs, ModelArgs,
    OutputArgs, StructureArg, TrainingArgs,
};
use crate::{
    analytic,
    error::Result,
    report::Report,
    workload::{Task, Workload},
};

/// What to count.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// One forward pass.
    Forward(Count<ForwardArgs>),
    /// A generation, in time independent of its length.
    Generate(Count<GenerationArgs>),
    /// A training: forward and backward passes.
    Train(Count<TrainingArgs>),
    /// Forward passes over known text.
    Evaluate(Count<EvaluationArgs>),
}

/// A workload's dimensions and how to count it.
#[derive(Debug, Args)]
pub struct Count<T: Args> {
    #[command(flatten)]
    task: T,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    lora: LoraArgs,
    #[command(flatten)]
    dtype: DtypeArg,
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
        Command::Forward(args) => count(&args, args.task.task()),
        Command::Generate(args) => count(&args, args.task.task()?),
        Command::Train(args) => count(&args, args.task.task()),
        Command::Evaluate(args) => count(&args, args.task.task()),
    }
}

fn count<T: Args>(args: &Count<T>, task: Task) -> Result<()> {
    let output = args.output.open()?;
    let prices = args.counting.prices()?;
    let (model, origin) = args.model.config_only()?;
    let lora = args.lora.config(&model)?;
    let workload = Workload { model, lora, dtype: args.dtype.dtype, task };
    let structure = args.structure.structure;
    let tally = analytic::count(structure, &workload)?;
    let report = Report::new("count", &origin, vec![workload], structure, &prices, &tally)?;
    output.write(&report, false)
}
