//! The exact FLOP count of a dense decoder, from its config alone: forward passes, generation,
//! evaluation and training, in closed form and op by op.
//!
//! ```text
//! config + workload ─> analytic: closed form, predicted ledger ─> reconcile, plan, sweep
//! ledger that somebody executed ─> audit
//! ```
//!
//! Nothing here executes a model or depends on what does: an audit compares this crate's countings
//! with those of a run, and the crate boundary keeps them apart.
//!
//! ```
//! use flopaudit_count::{
//!     analytic::{closed_form, predict}, config::{LoraConfig, ModelConfig}, ledger::Dtype,
//!     prices::Prices, workload::{AttentionMode, Logits, Task, Workload},
//! };
//!
//! let workload = Workload {
//!     model: ModelConfig::preset("qwen2.5-7b")?,
//!     lora: LoraConfig::none(),
//!     dtype: Dtype::BF16,
//!     attention: AttentionMode::Dense,
//!     task: Task::Forward { batch: 1, seq: 4096, past: 0, logits: Logits::All, sequences: None },
//! };
//! let matmul = Prices::matmul();
//! let listed = matmul.flops(&predict(&workload)?.cost()?)?;
//! assert_eq!(listed, matmul.flops(&closed_form(&workload)?.sum(|_, _| true)?)?);
//! # anyhow::Ok(())
//! ```

pub mod error;
pub mod input;
pub mod config;

pub mod ledger;
pub mod prices;
pub mod tally;
pub mod traffic;
pub mod hardware;

pub mod workload;
pub mod analytic;
pub mod rate;
pub mod threshold;
pub mod audit;
pub mod foreign;
pub mod reconcile;
pub mod run;
pub mod plan;
pub mod sweep;

/// Version of the JSON that commands write; raised when a field changes its meaning.
pub const SCHEMA_VERSION: u32 = 1;
