//! Runs a real LLM and audits its FLOP count: closed form, predicted ledger and executed ledger
//! must agree to the last FLOP.
//!
//! ```text
//! config + weights ─> model over metered ops ─> ledger ─┐
//!                                                        ├─> audit ─> reconcile ─> report
//! config + workload ─> analytic: closed form, predicted ┘   (the crate flopaudit-count)
//! ```
//!
//! A generation and its audit, on a tiny model of random weights:
//!
//! ```
//! use std::cell::RefCell;
//! use flopaudit::{
//!     audit::Audit, config::{LoraConfig, ModelConfig}, generate::{Request, generate},
//!     ledger::{Dtype, Ledger}, model::{AdapterSource, Decoder, How}, prices::Prices, weights,
//!     workload::Sampling,
//! };
//!
//! let checkpoint = weights::synthetic(ModelConfig::preset("tiny")?, 0)?;
//! let adapters = AdapterSource::Fresh { lora: LoraConfig::none(), seed: 0 };
//! let device = candle_core::Device::Cpu;
//! let (config, weights) = (&checkpoint.config, &checkpoint.weights);
//! let model = Decoder::load(config, weights, &adapters, Dtype::F32, &device, |_| Ok(()))?;
//!
//! let request = Request {
//!     prompts: vec![checkpoint.text.encode("Hello")?],
//!     max_new_tokens: 4,
//!     sampling: Sampling::GREEDY,
//!     seeds: vec![0],
//!     kv_cache: true,
//!     eos: vec![],
//!     timed: false,
//!     how: How::RECORDED,
//!     past: 0,
//!     prefill_chunk: None,
//!     then: vec![],
//! };
//! let ledger = RefCell::new(Ledger::default());
//! let generation = generate(&model, &request, &ledger, |_sequence, _token| Ok(()))?;
//!
//! let audit = Audit::new(&[generation.workload], &ledger.into_inner())?;
//! let audit = audit.with_graphs(generation.recordings);
//! let [closed_form, predicted, executed] = audit.totals(&Prices::matmul())?;
//! assert!(audit.balanced() && closed_form == executed && predicted == executed);
//! # anyhow::Ok(())
//! ```
//!
//! Where a new thing goes:
//!
//! | new | where |
//! |---|---|
//! | op | named in [`ledger::Op`]; the compiler then points at its price, and docs/counting.md at the rest |
//! | family | data in [`config::ModelConfig`]: see docs/adding-a-family.md |
//! | kernel | a [`Kernel`](ops) beside its op, its code in `ops/cpu`, `ops/cuda` or `ops/portable.rs` |
//! | price list | a TOML file, or a preset in [`prices`] |
//! | structure | a file in [`analytic`], named in its `structure.rs`; its causes in `terms/` |
//! | format of another tool's file | a file in [`foreign`] |
//! | source of weights | a file in [`weights`] |
//! | figure or format in reports | [`report`]: one value, one file a format; pages and charts in [`report::html`] |
//! | key of a plan file, dimension of a sweep | [`plan`], [`workload::Key`] |
//! | GPU's peaks | a row of `count/src/gpus.toml` |
//! | subcommand | a file in [`cli`] |

// The counting side, a crate of its own: what executes cannot leak into it.
pub use flopaudit_count::{
    analytic, audit, config, error, foreign, hardware, input, ledger, plan, prices, rate,
    reconcile, sweep, tally, threshold, traffic, workload,
};

pub mod target;
pub mod weights;
pub mod text;

pub mod ops;
pub mod meter;
pub mod model;
pub mod generate;
pub mod train;
pub mod bench;

pub mod report;
pub mod cli;
