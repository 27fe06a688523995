//! `flopaudit count`: the analytic side alone.

use clap::{Args, Subcommand};

use super::args::{
    CountingArgs, DtypeArg, ForwardArgs, GenerationArgs, LoraArgs, ModelArgs, OutputArgs,
};
use crate::{analytic, error::Result, report::Report, workload::Workload};

/// What to count.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// One forward pass.
    Forward(Box<Count<ForwardArgs>>),
    /// A generation, in time independent of its length.
    Generate(Box<Count<GenerationArgs>>),
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
    counting: CountingArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// Counts and prints.
pub fn run(command: Command) -> Result<()> {
    match command {
        Command::Forward(args) => count(&args, args.task.task()),
        Command::Generate(args) => count(&args, args.task.task()?),
    }
}

fn count<T: Args>(args: &Count<T>, task: crate::workload::Task) -> Result<()> {
    let output = args.output.open()?;
    let prices = args.counting.prices()?;
    let (model, origin) = args.model.config_only()?;
    let lora = args.lora.config(&model)?;
    let workload = Workload { model, lora, dtype: args.dtype.dtype, task };
    let tally = analytic::closed_form(&workload)?;
    output.write(&Report::new("count", &origin, vec![workload], &prices, &tally)?, false)
}
