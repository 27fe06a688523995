//! Hugging Face's `trainer_state.json`.
//!
//! Source: `TrainerState` in transformers' trainer_callback.py and `Trainer.store_flos` in trainer.py,
//! 5.23.0. `total_flos` is a double that each micro-step's `floating_point_ops` was added to, over
//! all processes. Other keys say nothing of FLOPs.

use serde::Deserialize;

use super::{Fact, Stated, Told, only};
use crate::{
    analytic::Structure,
    prices::Prices,
    workload::{Task, Workload},
};

/// The keys that say what was trained.
#[derive(Debug, Deserialize)]
pub(super) struct State {
    total_flos: f64,
    global_step: u64,
    train_batch_size: Option<u64>,
    num_input_tokens_seen: Option<u64>,
}

impl State {
    pub(super) fn read(json: &serde_json::Value) -> Result<Self, String> {
        let state: Self = serde_path_to_error::deserialize(json).map_err(|e| e.to_string())?;
        state.stated(1)?;
        Ok(state)
    }

    fn stated(&self, additions: u128) -> Result<Stated, String> {
        let stated = Stated::float(self.total_flos, additions);
        stated.ok_or_else(|| format!("`total_flos` is {}, which is no count", self.total_flos))
    }

    pub(super) fn told(&self, workload: &Workload) -> Result<Told, String> {
        let Task::Train { batch, accumulate, steps, .. } = workload.task else {
            return Err(only("train"));
        };
        let micro_steps = u128::from(accumulate) * u128::from(steps);
        let tokens = workload.task.tokens().fed;
        let mut facts = vec![Fact::new("steps", self.global_step, steps)];
        facts.extend(self.train_batch_size.map(|size| Fact::new("sequences a batch", size, batch)));
        let seen = self.num_input_tokens_seen.filter(|seen| *seen > 0);
        facts.extend(seen.map(|seen| Fact::new("tokens", seen, tokens)));
        Ok(Told {
            structures: &[Structure::HfTrainer],
            prices: Prices::matmul(),
            // Each micro-step's product and its sum are rounded.
            stated: Some(self.stated(micro_steps.saturating_mul(2))?),
            seconds: None,
            facts,
            notes: vec![],
        })
    }
}
