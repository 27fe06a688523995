//! Runs a real LLM and audits its FLOP count.
//!
//! ```text
//! config + weights ─> model over metered ops ─> ledger ─┐
//!                                                        ├─> audit ─> report
//! config + workload ─> analytic: closed form, predicted ┘
//! ```

pub mod config;
pub mod error;
pub mod workload;

pub mod ledger;
pub mod meter;
pub mod model;
pub mod ops;

pub mod analytic;
pub mod prices;
pub mod tally;

pub mod audit;
pub mod generate;
pub mod traffic;
