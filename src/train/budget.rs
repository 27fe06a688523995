//! How many steps a number of FLOPs pays for.

use crate::{
    analytic::{self, Structure},
    error::{Error, Result},
    ledger::Phase,
    prices::Prices,
    workload::Workload,
};

/// FLOPs to spend, as `structure` counts them under `prices`.
#[derive(Debug, Clone, PartialEq)]
pub struct Budget {
    /// The most that may be spent; none: no bound, but the same counting.
    pub flops: Option<u128>,
    /// Which operations count.
    pub structure: Structure,
    /// And for how much.
    pub prices: Prices,
}

impl Budget {
    /// What `workloads`, each so many times, cost.
    ///
    /// # Errors
    /// A workload that the structure does not cover, or a sum past 128 bits.
    pub fn cost<'a>(
        &self,
        workloads: impl IntoIterator<Item = &'a (Workload, u64)>,
    ) -> Result<u128> {
        self.cost_of(workloads, |_| true)
    }

    /// The same without what is set up once, whatever the number of steps.
    ///
    /// # Errors
    /// As [`Budget::cost`].
    pub fn cost_of_steps<'a>(
        &self,
        workloads: impl IntoIterator<Item = &'a (Workload, u64)>,
    ) -> Result<u128> {
        self.cost_of(workloads, |phase| phase != Phase::Setup)
    }

    fn cost_of<'a>(
        &self,
        workloads: impl IntoIterator<Item = &'a (Workload, u64)>,
        counts: impl Fn(Phase) -> bool,
    ) -> Result<u128> {
        workloads.into_iter().try_fold(0u128, |sum, (workload, times)| {
            let tally = analytic::count(self.structure, workload)?;
            let cost = self.prices.flops(&tally.sum(|phase, _| counts(phase))?)?;
            let all = cost.checked_mul(u128::from(*times)).and_then(|all| sum.checked_add(all));
            all.ok_or_else(|| Error::Overflow("the plan".into()).into())
        })
    }

    /// Whether `workloads` are paid for.
    ///
    /// # Errors
    /// As [`Budget::cost`].
    pub fn covers<'a>(
        &self,
        workloads: impl IntoIterator<Item = &'a (Workload, u64)>,
    ) -> Result<bool> {
        let Some(flops) = self.flops else { return Ok(true) };
        Ok(self.cost(workloads)? <= flops)
    }

    /// The most steps, up to `most`, whose whole run is paid for: `run` lists what so many steps
    /// take. None where not even one is.
    ///
    /// # Errors
    /// As [`Budget::cost`].
    pub fn steps(
        &self,
        most: u64,
        run: impl Fn(u64) -> Vec<(Workload, u64)>,
    ) -> Result<Option<u64>> {
        let paid = |steps| self.covers(&run(steps));
        if !paid(1)? {
            return Ok(None);
        }
        // Paid for `low`, not for `high`, which is near: a run of many steps takes long to list.
        let (mut low, mut high) = (1, most.saturating_add(1).min(2));
        while high <= most && paid(high)? {
            (low, high) = (high, high.saturating_mul(2).min(most.saturating_add(1)));
        }
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            match paid(middle)? {
                true => low = middle,
                false => high = middle,
            }
        }
        Ok(Some(low))
    }
}
