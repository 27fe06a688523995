//! The account of a plan: what each experiment costs, what is left after it, what breaks it.

use std::path::PathBuf;

use serde::Serialize;

use super::{Experiment, Plan, Spent, solve};
use crate::{
    SCHEMA_VERSION,
    analytic::{self, Structure},
    error::{Error, Result},
    prices::Prices,
    workload::Workload,
};

/// A plan, priced. All counts are FLOPs, exact.
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
    /// What there was to spend at first.
    pub budget_flops: u128,
    /// Finished runs.
    pub spent: Vec<Spent>,
    /// What they spent together.
    pub spent_flops: u128,
    /// Experiments to be run, one row for each point of their grids.
    pub experiments: Vec<Row>,
    /// What they cost together.
    pub total_flops: u128,
    /// Budget that remains after all.
    pub left_flops: u128,
    /// What is missing, if the budget does not suffice.
    pub over_flops: u128,
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
    /// What each run of it does.
    pub workload: Workload,
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
    /// Part of the budget, 1 being all of it.
    pub share: f64,
    /// What is spent after this row, finished runs included.
    pub running_flops: u128,
    /// What remains after it.
    pub left_flops: u128,
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
    pub next_over_flops: Option<u128>,
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
    /// What it needs.
    pub needed_flops: u128,
    /// What was left for it.
    pub left_flops: u128,
}

impl Account {
    /// Prices `plan` after `spent`, and beside it under the structure of what this program runs.
    ///
    /// # Errors
    /// A workload that cannot be counted, or sums past 128 bits.
    pub fn new(plan: &Plan, spent: Vec<Spent>) -> Result<Self> {
        let spent_flops = sum(spent.iter().map(|run| run.flops))?;
        let available = plan.budget.saturating_sub(spent_flops);
        let view = View { plan, structure: plan.structure };
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
            budget_flops: plan.budget,
            spent,
            spent_flops,
            experiments: vec![],
            total_flops: 0,
            left_flops: 0,
            over_flops: 0,
            solved: None,
            beside: None,
            over_budget: None,
        };
        let mut running = spent_flops;
        for experiment in &plan.experiments {
            for workload in &experiment.workloads {
                let row = view.row(experiment, workload, n, running)?;
                running = row.running_flops;
                account.experiments.push(row);
            }
        }
        account.total_flops = running - spent_flops;
        account.left_flops = plan.budget.saturating_sub(running);
        account.over_flops = running.saturating_sub(plan.budget);
        account.solved = solution.map(|(experiment, value)| Solved {
            experiment: experiment.name.clone(),
            key: experiment.unknown.map_or("", |unknown| unknown.key()),
            value,
            next_over_flops: view.next_over(available, experiment, value),
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
            solved.beside_value = view.solve(available)?.map(|(_, n)| n);
        }
        let total_flops = all.map(|all| sum(all.into_iter())).transpose()?;
        self.beside = Some(Beside { structure: view.structure, total_flops, uncounted });
        Ok(())
    }

    fn broken(&self) -> Option<Broken> {
        let runs = self.spent.iter().map(|run| (run.file.display().to_string(), run.flops));
        let rows = self.experiments.iter().map(|row| (row.name.clone(), row.flops));
        let mut left_flops = self.budget_flops;
        for (name, needed_flops) in runs.chain(rows) {
            match left_flops.checked_sub(needed_flops) {
                Some(left) => left_flops = left,
                None => return Some(Broken { name, needed_flops, left_flops }),
            }
        }
        // Nothing passes the budget where the unknown is 0, but then its experiment does not run.
        let solved = self.solved.as_ref().filter(|solved| solved.value == 0)?;
        let needed_flops = left_flops.checked_add(solved.next_over_flops?)?;
        Some(Broken { name: solved.experiment.clone(), needed_flops, left_flops })
    }

    /// Nothing where the budget covers the plan.
    ///
    /// # Errors
    /// [`Error::OverBudget`], naming the first item that it does not cover.
    pub fn verdict(&self) -> Result<()> {
        match &self.over_budget {
            None => Ok(()),
            Some(Broken { name, needed_flops, left_flops }) => Err(Error::OverBudget {
                item: name.clone(),
                needed: *needed_flops,
                left: *left_flops,
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
    /// All runs of one point, with `n` steps or new tokens where these are unknown.
    fn flops(&self, experiment: &Experiment, workload: &Workload, n: u64) -> Result<u128> {
        // None of it costs nothing, but only where one of it can be counted.
        let none = experiment.unknown.is_some() && n == 0;
        let workload = experiment.at(workload, n.max(1));
        let cost = analytic::count(self.structure, &workload)?.sum(|_, _| true)?;
        let runs = if none { 0 } else { experiment.runs() };
        let flops = self.plan.prices.flops(&cost)?.checked_mul(runs);
        flops.ok_or_else(|| Error::Overflow(format!("all runs of `{}`", experiment.name)).into())
    }

    /// All points and runs of an experiment.
    fn all(&self, experiment: &Experiment, n: u64) -> Result<u128> {
        let points =
            experiment.workloads.iter().map(|workload| self.flops(experiment, workload, n));
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
        let running_flops = sum([before, flops].into_iter())?;
        let Experiment { name, learning_rates, seeds, .. } = experiment.clone();
        Ok(Row {
            name,
            workload: experiment.at(workload, n),
            learning_rates,
            seeds,
            runs: experiment.runs(),
            flops_per_run: flops / experiment.runs(),
            flops,
            share: flops as f64 / self.plan.budget as f64,
            running_flops,
            left_flops: self.plan.budget.saturating_sub(running_flops),
            beside_flops: None,
        })
    }
}

fn sum(mut parts: impl Iterator<Item = u128>) -> Result<u128> {
    let total = parts.try_fold(0u128, |sum, part| sum.checked_add(part));
    total.ok_or_else(|| Error::Overflow("the plan".into()).into())
}
