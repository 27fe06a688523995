//! `flopaudit plan`: what a list of experiments costs, against a budget.

use std::path::PathBuf;

use super::{
    args::{OutputArgs, note, stand_in},
    rate::RateArgs,
};
use crate::{
    error::Result,
    plan::{Account, Plan, Spent},
    report,
};

/// Flags of `plan`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A budget and its experiments, in TOML
    #[arg(value_name = "PLAN.toml")]
    plan: PathBuf,
    /// JSON reports of finished runs: what they spent comes off the budget
    #[arg(long, value_name = "RUN.json", num_args = 1..)]
    check: Vec<PathBuf>,
    #[command(flatten)]
    rate: RateArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// Prices, prints, compares with the budget.
pub fn run(args: Args) -> Result<()> {
    let output = args.output.open()?;
    let plan = Plan::read_at(&args.plan, args.rate.spec())?;
    stand_in(plan.names_no_model).iter().for_each(|told| note(told));
    let spent = Spent::read_all(&args.check, &plan.prices)?;
    let account = Account::new(&plan, spent)?;
    output.write_with(&account, || report::print_plan(&account, args.output.style()))?;
    account.verdict()
}
