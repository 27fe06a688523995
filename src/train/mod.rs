//! Training: text into batches, steps within a budget, checkpoints.
//!
//! ```text
//! data ─> batches ─> step: gradients, update ─> session: steps, evaluations ─> checkpoint
//! ```

pub mod data;

mod optimizer;
mod schedule;
mod step;

mod budget;
mod check;
mod checkpoint;
mod evaluate;
mod session;

pub use budget::Budget;
pub use check::{Check, Slope};
pub use checkpoint::Saved;
pub use evaluate::{Evaluation, evaluate, tasks as evaluation_tasks};
pub use optimizer::{Hyper, Optimizer};
pub use schedule::{Schedule, Shape};
pub use session::{Point, Progress, Session, Settings};
pub use step::{Step, Trainer};
