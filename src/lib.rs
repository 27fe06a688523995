//! Runs a real LLM and audits its FLOP count.
pub mod config;
pub mod error;
pub mod text;
pub mod weights;
