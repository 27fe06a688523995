//! Runs a real LLM and audits its FLOP count.
//!
//! ```text
//! config + weights ─> model over metered ops ─> ledger ─┐
//!                                                        ├─> audit ─> report
//! config + workload ─> analytic: closed form, predicted ┘
//! ```

pub mod error;

pub mod config;
pub mod weights;
pub mod text;

pub mod ops;
pub mod meter;
pub mod model;
pub mod generate;

pub mod ledger;
pub mod prices;
pub mod tally;
pub mod traffic;

pub mod workload;
pub mod analytic;
pub mod audit;
pub mod reconcile;

pub mod report;
pub mod cli;
