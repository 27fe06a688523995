//! The account of a plan: what each experiment costs, what is left after it, what breaks it.

use std::path::PathBuf;

use serde::Serialize;

use super::{
    Experiment, Plan, Spent, Unit,
    balance::{Balance, Lack, NextOver, RowBalance},
    solve,
};
use crate::{
    SCHEMA_VERSION,
    analytic::{self, Structure},
    error::{Error, Result},
    prices::Prices,
    rate::{Rate, Time},
    run::write_one_or_many,
    workload::Workload,
};

/// A plan, priced: exact FLOPs, and what becomes of the budget in its own unit.
#[derive(Debug, Clone, Serialize)]
pub struct Account {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// `plan`.
    pub command: &'static str,
    /// The plan's file.
    pub file: PathBuf,
    /// Where the model's config came from.
    pub model: String,
    /// Parameters of the base model.
    pub parameters: u128,
    /// Which operations were counted.
    pub structure: Structure,
    /// What each primitive costs.
    pub prices: Prices,
    /// What becomes of the budget.
    #[serde(flatten)]
    pub balance: Balance,
    /// What hours are computed with, where a rate was given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate: Option<Rate>,
    /// What all experiments take, where a rate was given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub time: Option<Time>,
    /// Finished runs.
    pub spent: Vec<Spent>,
    /// Experiments to be run, one row for each point of their grids.
    pub experiments: Vec<Row>,
    /// The unknown, where the plan has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub solved: Option<Solved>,
    /// The same plan under another structure.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub beside: Option<Beside>,
    /// Where the budget ends, if it does not suffice.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub over_budget: Option<Broken>,
}

/// One workload of one experiment.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// The experiment.
    pub name: String,
    /// What each run of it does; of listed lengths, an evaluation may end in a workload of its own.
    #[serde(serialize_with = "write_one_or_many")]
    pub workload: Vec<Workload>,
    /// Each a run of its own.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub learning_rates: Vec<f64>,
    /// Each a run of its own.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub seeds: Vec<u64>,
    /// Learning rates × seeds.
    pub runs: u128,
    /// Cost of one run.
    pub flops_per_run: u128,
    /// Cost of all.
    pub flops: u128,
    /// What all runs take, where a rate was given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub time: Option<Time>,
    /// Part of the budget, 1 being all of it.
    pub share: f64,
    /// What becomes of the budget.
    #[serde(flatten)]
    pub balance: RowBalance,
    /// Cost of all runs under [`Account::beside`]'s structure, where that counts such work.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub beside_flops: Option<u128>,
}

/// The largest number that fits.
#[derive(Debug, Clone, Serialize)]
pub struct Solved {
    /// The experiment that left it open.
    pub experiment: String,
    /// `steps` or `new_tokens`.
    pub key: &'static str,
    /// The largest that fits; 0 if not even 1 does.
    pub value: u64,
    /// What one more would be over by; none where it could not be counted at all.
    #[serde(flatten)]
    pub next_over: NextOver,
    /// The largest that fits under [`Account::beside`]'s structure, where that counts every
    /// experiment.
    pub beside_value: Option<u64>,
}

/// Another structure's view of the plan.
#[derive(Debug, Clone, Serialize)]
pub struct Beside {
    /// The structure.
    pub structure: Structure,
    /// What it counts in all, where it counts every experiment.
    pub total_flops: Option<u128>,
    /// Why it does not count some.
    pub uncounted: Vec<String>,
}

/// The first item that the budget does not cover.
#[derive(Debug, Clone, Serialize)]
pub struct Broken {
    /// The experiment, or the finished run's file.
    pub name: String,
    /// What it needs, and what was left for it.
    #[serde(flatten)]
    pub lack: Lack,
}

impl Account {
    /// Prices `plan` after `spent`, and beside it under the structure of what this program runs.
    ///
    /// # Errors
    /// A workload that cannot be counted, or sums past 128 bits.
    pub fn new(plan: &Plan, spent: Vec<Spent>) -> Result<Self> {
        let view = View { plan, structure: plan.structure };
        let spent = spent.into_iter().map(|run| view.spend(run)).collect::<Result<Vec<_>>>()?;
        let all_spent = sum(spent.iter().map(|run| run.cost))?;
        let available = plan.budget.amount.saturating_sub(all_spent);
        let solution = view.solve(available)?;
        let n = solution.as_ref().map_or(1, |(_, n)| *n);
        let mut account = Self {
            schema_version: SCHEMA_VERSION,
            command: "plan",
            file: plan.file.clone(),
            model: plan.origin.clone(),
            parameters: plan.model.parameters(),
            structure: plan.structure,
            prices: plan.prices.clone(),
            balance: Balance {
                budget: plan.budget,
                spent: all_spent,
                spent_flops: sum(spent.iter().map(|run| run.flops))?,
                total: 0,
                total_flops: 0,
                left: 0,
                over: 0,
            },
            rate: plan.rate.clone(),
            time: None,
            spent,
            experiments: vec![],
            solved: None,
            beside: None,
            over_budget: None,
        };
        let mut running = all_spent;
        for experiment in &plan.experiments {
            for workload in &experiment.workloads {
                let row = view.row(experiment, workload, n, running)?;
                running = row.balance.running;
                account.experiments.push(row);
            }
        }
        let balance = &mut account.balance;
        balance.total = running - all_spent;
        balance.total_flops = sum(account.experiments.iter().map(|row| row.flops))?;
        balance.left = plan.budget.amount.saturating_sub(running);
        balance.over = running.saturating_sub(plan.budget.amount);
        account.time = plan
            .rate
            .as_ref()
            .map(|rate| rate.sum(account.experiments.iter().filter_map(|row| row.time)));
        account.solved = solution.map(|(experiment, value)| Solved {
            experiment: experiment.name.clone(),
            key: experiment.unknown.map_or("", |unknown| unknown.key()),
            value,
            next_over: NextOver(plan.budget, view.next_over(available, experiment, value)),
            beside_value: None,
        });
        if plan.structure != Structure::Exact {
            let beside = View { plan, structure: Structure::Exact };
            account.add_beside(&beside, n, available)?;
        }
        account.over_budget = account.broken();
        Ok(account)
    }

    /// Adds what another structure counts for the same rows; what it does not count is left out
    /// with its reason.
    fn add_beside(&mut self, view: &View, n: u64, available: u128) -> Result<()> {
        let points =
            view.plan.experiments.iter().flat_map(|e| e.workloads.iter().map(move |w| (e, w)));
        let mut uncounted: Vec<String> = vec![];
        for (row, (experiment, workload)) in self.experiments.iter_mut().zip(points) {
            row.beside_flops = match view.flops(experiment, workload, n) {
                Ok(flops) => Some(flops),
                Err(e) => {
                    let Some(Error::Flag { why, .. }) = e.downcast_ref() else { return Err(e) };
                    if !uncounted.contains(why) {
                        uncounted.push(why.clone());
                    }
                    None
                }
            };
        }
        let all: Option<Vec<u128>> = self.experiments.iter().map(|row| row.beside_flops).collect();
        if let (Some(solved), Some(_)) = (&mut self.solved, &all) {
            // Of other budgets, no structure's FLOPs are spent.
            if view.plan.budget.unit == Unit::Flops {
                solved.beside_value = view.solve(available)?.map(|(_, n)| n);
            }
        }
        let total_flops = all.map(|all| sum(all.into_iter())).transpose()?;
        self.beside = Some(Beside { structure: view.structure, total_flops, uncounted });
        Ok(())
    }

    fn broken(&self) -> Option<Broken> {
        let budget = self.balance.budget;
        let runs = self.spent.iter().map(|run| (run.file.display().to_string(), run.cost));
        let rows = self.experiments.iter().map(|row| (row.name.clone(), row.balance.cost));
        let broken = |name, needed, left| Broken { name, lack: Lack { budget, needed, left } };
        let mut left = budget.amount;
        for (name, needed) in runs.chain(rows) {
            match left.checked_sub(needed) {
                Some(rest) => left = rest,
                None => return Some(broken(name, needed, left)),
            }
        }
        // Nothing passes the budget where the unknown is 0, but then its experiment does not run.
        let solved = self.solved.as_ref().filter(|solved| solved.value == 0)?;
        let needed = left.checked_add(solved.next_over.1?)?;
        Some(broken(solved.experiment.clone(), needed, left))
    }

    /// Nothing where the budget covers the plan.
    ///
    /// # Errors
    /// [`Error::OverBudget`], naming the first item that it does not cover.
    pub fn verdict(&self) -> Result<()> {
        match &self.over_budget {
            None => Ok(()),
            Some(Broken { name, lack: Lack { budget, needed, left } }) => Err(Error::OverBudget {
                item: name.clone(),
                needed: budget.say(*needed),
                left: budget.number(*left),
            }
            .into()),
        }
    }
}

/// A plan under one structure.
struct View<'a> {
    plan: &'a Plan,
    structure: Structure,
}

impl<'a> View<'a> {
    /// FLOPs of all runs of one point, with `n` steps or new tokens where these are unknown.
    fn flops(&self, experiment: &Experiment, workload: &Workload, n: u64) -> Result<u128> {
        let each = runs(experiment, workload, n)?.into_iter().map(|(workload, times)| {
            let cost = analytic::count(self.structure, &workload)?.sum(|_, _| true)?;
            let flops = self.plan.prices.flops(&cost)?.checked_mul(times);
            let overflow = || Error::Overflow(format!("all runs of `{}`", experiment.name));
            Ok(flops.ok_or_else(overflow)?)
        });
        sum(each.collect::<Result<Vec<_>>>()?.into_iter())
    }

    /// What of the budget all runs of one point take, likewise; `flops` of them.
    fn cost(
        &self,
        experiment: &Experiment,
        workload: &Workload,
        n: u64,
        flops: u128,
    ) -> Result<u128> {
        let Plan { budget, rate, structure, .. } = self.plan;
        let runs = runs(experiment, workload, n)?;
        budget.cost(flops, &runs, rate.as_ref(), *structure)
    }

    /// A finished run, with what it took of the budget.
    fn spend(&self, run: Spent) -> Result<Spent> {
        let Plan { budget, rate, structure, .. } = self.plan;
        let ran: Vec<_> = run.workload.iter().map(|workload| (workload.clone(), 1)).collect();
        let cost = budget.cost(run.flops, &ran, rate.as_ref(), *structure)?;
        Ok(Spent { cost, ..run })
    }

    /// What of the budget all points and runs of an experiment take.
    fn all(&self, experiment: &Experiment, n: u64) -> Result<u128> {
        let points = experiment.workloads.iter().map(|workload| {
            let flops = self.flops(experiment, workload, n)?;
            self.cost(experiment, workload, n, flops)
        });
        sum(points.collect::<Result<Vec<_>>>()?.into_iter())
    }

    fn others(&self, unknown: &Experiment) -> Result<u128> {
        let others = self.plan.experiments.iter().filter(|e| e.name != unknown.name);
        sum(others.map(|e| self.all(e, 1)).collect::<Result<Vec<_>>>()?.into_iter())
    }

    /// The experiment with an unknown, and the largest that fits in what the others leave.
    fn solve(&self, available: u128) -> Result<Option<(&'a Experiment, u64)>> {
        let Some(experiment) = self.plan.experiments.iter().find(|e| e.unknown.is_some()) else {
            return Ok(None);
        };
        let Some(left) = available.checked_sub(self.others(experiment)?) else {
            return Ok(Some((experiment, 0)));
        };
        // Where 1 can be counted, only size can keep n from being counted: it does not fit.
        self.all(experiment, 1)?;
        let fits = |n| self.all(experiment, n).is_ok_and(|flops| flops <= left);
        Ok(Some((experiment, solve::largest(u64::MAX, fits))))
    }

    fn next_over(&self, available: u128, experiment: &Experiment, n: u64) -> Option<u128> {
        let next = self.all(experiment, n.checked_add(1)?).ok()?;
        let all = next.checked_add(self.others(experiment).ok()?)?;
        Some(all.saturating_sub(available))
    }

    fn row(
        &self,
        experiment: &Experiment,
        workload: &Workload,
        n: u64,
        before: u128,
    ) -> Result<Row> {
        let flops = self.flops(experiment, workload, n)?;
        let cost = self.cost(experiment, workload, n, flops)?;
        let running = sum([before, cost].into_iter())?;
        let Experiment { name, learning_rates, seeds, .. } = experiment.clone();
        let Plan { budget, rate, structure, .. } = self.plan;
        let time = rate.as_ref().map(|rate| -> Result<_> {
            let each = runs(experiment, workload, n)?.into_iter();
            let each = each.map(|(workload, times)| rate.time(*structure, &workload, times));
            Ok(rate.sum(each.collect::<Result<Vec<_>>>()?))
        });
        let time = time.transpose()?;
        Ok(Row {
            name,
            workload: experiment.at(workload, n)?,
            learning_rates,
            seeds,
            runs: experiment.runs(),
            flops_per_run: flops / experiment.runs(),
            flops,
            time,
            share: cost as f64 / budget.amount as f64,
            balance: RowBalance {
                budget: *budget,
                cost,
                running,
                left: budget.amount.saturating_sub(running),
            },
            beside_flops: None,
        })
    }
}

/// Everything that one point runs, and how often: none of it where the unknown is 0, though only what
/// can run once can be counted.
fn runs(experiment: &Experiment, workload: &Workload, n: u64) -> Result<Vec<(Workload, u128)>> {
    let none = experiment.unknown.is_some() && n == 0;
    let runs = if none { 0 } else { experiment.runs() };
    let all = experiment.all_at(workload, n.max(1))?.into_iter();
    Ok(all.map(|(workload, times)| (workload, times.saturating_mul(runs))).collect())
}

fn sum(mut parts: impl Iterator<Item = u128>) -> Result<u128> {
    let total = parts.try_fold(0u128, |sum, part| sum.checked_add(part));
    total.ok_or_else(|| Error::Overflow("the plan".into()).into())
}
