//! What is to be run: the question that predictions and executions answer alike.

mod attention;
mod check;
mod checks;
mod fields;
mod filling;
mod lengths;
mod memory;
mod sequences;
mod task;

use serde::{Deserialize, Serialize};

pub use attention::{ATTENTION_BLOCK, AttentionMode};
pub use checks::{Checks, EVAL_EVERY, evaluation};
pub use fields::{Form, Key, Kind, Value};
pub use filling::{Filling, Groups, evaluations};
pub use lengths::{Layout, Lengths, MOST_SEQUENCES, bucketed, packed, read_lengths};
pub use sequences::tasks_of;
pub use task::{Logits, Ragged, Rows, Sampling, Task, Tokens, Turn};

use crate::{
    config::{LoraConfig, ModelConfig},
    ledger::Dtype,
};

/// Rows of logits that the loss is computed over at once: of `rows` rows, as many chunks of this
/// size as fit, and one of the rest.
pub const LOSS_ROWS: usize = 1024;

/// A model, its adapters, and what is run on it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Workload {
    /// The model.
    pub model: ModelConfig,
    /// Its adapters.
    pub lora: LoraConfig,
    /// Element type of weights and activations.
    pub dtype: Dtype,
    /// Which scores its attention computes.
    #[serde(default)]
    pub attention: AttentionMode,
    /// What is run.
    #[serde(flatten)]
    pub task: Task,
}

impl Workload {
    /// The same generation, ended after `steps` tokens; any other task as it is.
    pub fn with_new_tokens(mut self, steps: u64) -> Self {
        if let Task::Generate { new_tokens, .. } = &mut self.task {
            *new_tokens = steps;
        }
        self
    }

    /// The same with every score of attention computed: what all but this program count.
    pub fn dense(&self) -> Self {
        Self { attention: AttentionMode::Dense, ..self.clone() }
    }

    /// Most tokens that attention reaches over.
    pub fn context(&self) -> u64 {
        match &self.task {
            Task::Forward { sequences: Some(Ragged::Packed(lengths)), .. } => {
                lengths.range().map_or(0, |(_, longest)| longest)
            }
            Task::Forward { seq, past, .. } => past + seq,
            Task::Generate { past, prompt_tokens, max_new_tokens, then, .. } => {
                let turns = then.iter().map(|turn| turn.prompt_tokens + turn.new_tokens);
                past + prompt_tokens + max_new_tokens + turns.sum::<u64>()
            }
            Task::Verify { .. } => self.positions(),
            Task::Train { seq, .. } | Task::Evaluate { seq, .. } => *seq,
        }
    }

    /// Positions that rotary tables are made for: the context, but for the token that a generation
    /// chooses and never feeds.
    pub fn positions(&self) -> u64 {
        match self.task {
            Task::Generate { .. } => self.context() - 1,
            Task::Verify { past, drafted, accepted, rounds, .. } => {
                past + (rounds - 1) * (accepted + 1) + drafted + 1
            }
            Task::Forward { .. } | Task::Train { .. } | Task::Evaluate { .. } => self.context(),
        }
    }
}
