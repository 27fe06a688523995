//! Throughput against the device's own ceilings.
//!
//! ```text
//! probe ─> ceiling ──────────────────────────────┐
//! workload ─> run ─> seconds + audited ledger ───┴─> figures ─> report, curve, compare
//! ```

use std::path::Path;

use serde::de::DeserializeOwned;

use crate::error::{Error, Result};

mod accuracy;
mod ceiling;
mod compare;
mod cuda;
mod curve;
mod device;
mod figures;
mod point;
mod probe;
mod run;

pub use crate::hardware::{Datasheet, Peak};
pub use accuracy::{Accuracy, Outcome};
pub use ceiling::{Ceiling, MatmulRate, Stream, StreamRate};
pub use compare::{Change, Comparison, Verdict};
pub use cuda::EnergyCounter;
pub use curve::curves;
pub use device::DeviceInfo;
pub use point::{
    BenchReport, Bound, Clocks, Curve, CurvePoint, Energy, Kind, Limits, Point, SCHEMA_VERSION,
    Seconds,
};
pub use probe::Probe;
pub use run::{Measured, Runner, Training};

/// The time, in UTC: `2026-01-31T12:00:00Z`.
pub fn now() -> String {
    humantime::format_rfc3339_seconds(std::time::SystemTime::now()).to_string()
}

/// Reads what `--json FILE` of a command of this module wrote: `what` it is, its schema, and what
/// is wrong with its figures.
fn read<T: DeserializeOwned>(
    file: &Path,
    what: &str,
    schema: fn(&T) -> u32,
    check: fn(&T) -> Result<(), String>,
) -> Result<T> {
    let bad = |why: String| Error::File { file: file.into(), why };
    let text = crate::input::read_text(file).map_err(|e| bad(e.to_string()))?;
    let value: T = serde_json::from_str(&text).map_err(|e| bad(format!("is no {what}: {e}")))?;
    let found = schema(&value);
    if found != SCHEMA_VERSION {
        return Err(bad(format!("has schema {found}; this reads {SCHEMA_VERSION}")).into());
    }
    check(&value).map_err(bad)?;
    Ok(value)
}
