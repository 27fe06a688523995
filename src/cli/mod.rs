//! The command line: one file a subcommand, flags shared by all in `args`.

mod args;
mod audit;
mod bench;
mod ceiling;
mod completions;
mod count;
mod device;
mod doctor;
mod eval;
mod folder;
mod generate;
mod gpus;
mod interrupt;
mod lengths;
mod lora;
mod memory;
mod mfu;
mod plan;
mod rate;
mod reconcile;
mod task;
mod report;
mod trace;
mod train;
mod workload;

use clap::{CommandFactory, Parser, Subcommand, error::ErrorKind};

use crate::error::{Error, Result};

/// Runs a real LLM and audits its FLOP count: closed form, predicted ledger and executed ledger
/// must agree to the last FLOP.
#[derive(Debug, Parser)]
#[command(version, about, long_about = None, propagate_version = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Generate text with every op metered, then audit the run.
    Generate(Box<generate::Args>),
    /// Train adapters (or every weight) on text, within a budget, then audit the run.
    Train(Box<train::Args>),
    /// Score text: cross-entropy and perplexity, audited.
    #[command(visible_alias = "evaluate")]
    Eval(Box<eval::Args>),
    /// Execute a workload on random tokens and compare all three countings.
    #[command(subcommand)]
    Audit(audit::Command),
    /// Count a workload from its config alone; no weights needed.
    #[command(subcommand)]
    Count(count::Command),
    /// Price a list of experiments against a budget; no weights needed.
    Plan(plan::Args),
    /// MFU of a speed that somebody measured, by each convention; no weights needed.
    Mfu(Box<mfu::Args>),
    /// List the GPUs whose peaks are known, with who states them.
    Gpus(gpus::Args),
    /// Name every FLOP between one counting's total and another's.
    Reconcile(Box<reconcile::Args>),
    /// Measure what this device can do at most: FLOP/s, bytes/s, ops/s.
    Ceiling(ceiling::Args),
    /// Measure tokens/s and hold them against the device's ceilings, every point audited.
    #[command(subcommand)]
    Bench(bench::Command),
    /// Show the JSON of most of these (not mfu, gpus) as one HTML page.
    Report(report::Args),
    /// Say what device, features, threads, caches and weights a run would find.
    Doctor(doctor::Args),
    /// Print a shell's completions.
    Completions(completions::Args),
    /// Print the manual page, or write one a command.
    Man(completions::ManArgs),
}

/// clap's message in one line: what is wrong, without the usage that `--help` prints.
pub fn usage_error(error: &clap::Error) -> Error {
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        return Error::Usage("a command is missing".into());
    }
    let text = error.to_string();
    let wrong: Vec<&str> = text.lines().map(str::trim).take_while(|l| !l.is_empty()).collect();
    let wrong = wrong.join(" ");
    Error::Usage(wrong.strip_prefix("error: ").unwrap_or(&wrong).to_string())
}

/// Runs one parsed command line.
///
/// # Errors
/// What the user should read in one line; [`crate::error::Error::exit_code`] gives the status.
pub fn run(cli: Cli) -> Result<()> {
    memory::keep_freed();
    let done = match cli.command {
        Command::Generate(args) => generate::run(*args),
        Command::Train(args) => train::run(*args),
        Command::Eval(args) => eval::run(*args),
        Command::Audit(command) => audit::run(command),
        Command::Count(command) => count::run(command),
        Command::Plan(args) => plan::run(args),
        Command::Mfu(args) => mfu::run(*args),
        Command::Gpus(args) => gpus::run(args),
        Command::Reconcile(args) => reconcile::run(*args),
        Command::Ceiling(args) => ceiling::run(args),
        Command::Bench(command) => bench::run(command),
        Command::Report(args) => report::run(args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Completions(args) => completions::completions(&args, Cli::command()),
        Command::Man(args) => completions::man(&args, Cli::command()),
    };
    done.map_err(device::explained)
}
