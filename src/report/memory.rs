//! Bytes that a run needs at least.

use serde::{Deserialize, Serialize};

use crate::{
    ops::is_one_kernel,
    workload::{AttentionMode, Task, Workload},
};

/// Bytes at rest.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Memory {
    /// Base and adapter parameters.
    pub weights_bytes: u128,
    /// Preallocated keys and values.
    pub kv_cache_bytes: u128,
    /// What the largest pass needs beside them, about.
    pub activations_bytes: u128,
    /// Gradients and optimizer, in training.
    pub training_bytes: u128,
}

impl Memory {
    /// What the largest of `workloads`, which run in turn on one model, needs of each; on CUDA,
    /// where attention without gradients may be one kernel that never holds its scores.
    pub fn of(workloads: &[Workload], cuda: bool) -> Self {
        let most = |bytes: fn(&Workload) -> u128| workloads.iter().map(bytes).max().unwrap_or(0);
        Self {
            weights_bytes: most(Workload::weights_bytes),
            kv_cache_bytes: most(Workload::kv_cache_bytes),
            activations_bytes: match cuda {
                true => most(|w| w.activations_bytes() - spared(w)),
                false => most(Workload::activations_bytes),
            },
            training_bytes: most(Workload::training_bytes),
        }
    }

    /// Each with its name.
    pub fn parts(&self) -> [(&'static str, u128); 4] {
        [
            ("weights", self.weights_bytes),
            ("KV cache", self.kv_cache_bytes),
            ("activations", self.activations_bytes),
            ("gradients and moments", self.training_bytes),
        ]
    }
}

/// Scores that CUDA's kernel of attention does not hold.
fn spared(workload: &Workload) -> u128 {
    let dense = workload.attention == AttentionMode::Dense;
    let fused = dense && is_one_kernel(workload.dtype.base(), workload.model.head_dim());
    match workload.task {
        Task::Train { .. } => 0,
        Task::Forward { .. }
        | Task::Generate { .. }
        | Task::Verify { .. }
        | Task::Evaluate { .. }
            if fused =>
        {
            workload.scores_bytes()
        }
        Task::Forward { .. }
        | Task::Generate { .. }
        | Task::Verify { .. }
        | Task::Evaluate { .. } => 0,
    }
}
