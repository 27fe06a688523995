//! What a training runs beside its steps: evaluations of held-out text, and a check of gradients.

use super::{Rows, Task, Workload};
use crate::error::{Error, Result};

/// After how many steps held-out text is scored, where nobody says.
pub const EVAL_EVERY: u64 = 100;

/// What a training runs beside its steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checks {
    /// Held-out rows, as long as those of the training; 0 is none.
    pub eval_rows: u64,
    /// They are scored before the first step, after each so many, and after the last.
    pub eval_every: u64,
    /// Trained tensors whose gradients are compared with differences of the loss; 0 is none.
    pub gradients: u64,
}

impl Checks {
    /// Refuses more passes of either kind than a workload has, beside steps that each accumulate so
    /// many passes.
    ///
    /// # Errors
    /// The flag at fault.
    pub fn validate(self, accumulate: u64) -> Result<()> {
        let most = Workload::MOST_PASSES;
        let of_gradients = 2 * u128::from(self.gradients) * u128::from(accumulate);
        let kinds = [
            ("--eval-rows", "rows", self.eval_rows.into()),
            ("--check-gradients", "passes, two a tensor and micro-step", of_gradients),
        ];
        match kinds.into_iter().find(|(_, _, many)| *many > most.into()) {
            Some((flag, what, _)) => Err(Error::flag(flag, format!("above {most} {what}")).into()),
            None => Ok(()),
        }
    }

    /// How often held-out text is scored in a training of so many steps.
    pub const fn evaluations(self, steps: u64) -> u64 {
        // It saturates only beyond the steps that a workload may have.
        steps.div_ceil(self.eval_every).saturating_add(1)
    }

    /// The workloads beside those steps of `training`, and how often each runs; none beside another
    /// workload.
    pub fn of(self, training: &Workload) -> Vec<(Workload, u128)> {
        let Task::Train { batch, seq, accumulate, steps, .. } = training.task else {
            return vec![];
        };
        let workload = |task| Workload { task, ..training.clone() };
        let evaluations = u128::from(self.evaluations(steps));
        let scored = evaluation(self.eval_rows, seq, batch).into_iter();
        let mut all: Vec<_> = scored.map(|task| (workload(task), evaluations)).collect();
        // The loss on both sides of each gradient.
        let passes = self.gradients.saturating_mul(2).saturating_mul(accumulate);
        if passes > 0 {
            all.push((workload(Task::Evaluate { batch, seq, passes, rows: Rows::Whole }), 1));
        }
        all
    }
}

/// Tasks that score `rows` rows of `seq` tokens: passes of `batch`, then one of what is left.
pub fn evaluation(rows: u64, seq: u64, batch: u64) -> Vec<Task> {
    let batch = batch.clamp(1, rows.max(1));
    let task = |batch, passes| Task::Evaluate { batch, seq, passes, rows: Rows::Whole };
    let whole = (rows >= batch).then(|| task(batch, rows / batch));
    let last = (!rows.is_multiple_of(batch)).then(|| task(rows % batch, 1));
    whole.into_iter().chain(last).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn evaluations_by_hand() {
        let of = |rows, batch| {
            let shape = |task| match task {
                Task::Evaluate { batch, passes, .. } => (batch, passes),
                other => panic!("{other:?}"),
            };
            evaluation(rows, 8, batch).into_iter().map(shape).collect::<Vec<_>>()
        };
        assert_eq!(of(7, 3), [(3, 2), (1, 1)]);
        assert_eq!(of(6, 3), [(3, 2)]);
        assert_eq!(of(2, 3), [(2, 1)]);
        assert_eq!(of(0, 3), []);
        let checks = Checks { eval_rows: 4, eval_every: 50, gradients: 0 };
        assert_eq!([1, 50, 51].map(|steps| checks.evaluations(steps)), [2, 2, 3]);
    }
}
