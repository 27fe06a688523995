//! `--trace`: every op of a run as a slice in a file.

use std::path::PathBuf;

use clap::Args;

use super::args::ExecutionArgs;
use crate::{
    error::Result,
    prices::Prices,
    report::{Report, Trace},
};

/// Whether and where a trace goes.
#[derive(Debug, Args)]
#[command(next_help_heading = "Output")]
pub struct TraceArgs {
    /// Write a slice an op to FILE (Chrome's trace format: open it in ui.perfetto.dev); times each
    /// op, as --op-times does
    #[arg(long, value_name = "FILE.json")]
    trace: Option<PathBuf>,
}

impl TraceArgs {
    /// Opens the file before the work starts; FLOPs are those of `prices`.
    pub fn open(&self, prices: &Prices) -> Result<Option<Trace>> {
        self.trace.as_ref().map(|file| Trace::open(file, prices)).transpose()
    }

    /// Whether ops are timed: a trace needs it, and `execution` may ask for it.
    pub fn timed(&self, execution: &ExecutionArgs) -> bool {
        execution.op_times || self.trace.is_some()
    }
}

/// Ends `trace`. What went wrong is to be told after the report, which a failed trace must not cost.
pub fn finish(trace: Option<Trace>, report: &Report) -> Result<()> {
    trace.map_or(Ok(()), |trace| trace.finish(report))
}
