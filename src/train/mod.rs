//! Training: text into batches, steps within a budget, checkpoints.

pub mod data;

mod optimizer;
mod step;

pub use optimizer::{Hyper, Optimizer};
pub use step::{Step, Trainer};
