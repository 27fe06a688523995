//! Throughput against the device's own ceilings.
//!
//! ```text
//! probe ─> ceiling ──────────────────────────────┐
//! workload ─> run ─> seconds + audited ledger ───┴─> figures ─> report, curve, compare
//! ```

mod ceiling;
mod compare;
mod cuda;
mod curve;
mod datasheet;
mod device;
mod figures;
mod point;
mod probe;
mod run;

pub use ceiling::{Ceiling, MatmulRate, Stream, StreamRate};
pub use compare::{Change, Comparison, Verdict};
pub use cuda::EnergyCounter;
pub use curve::curves;
pub use datasheet::{Datasheet, Peak};
pub use device::DeviceInfo;
pub use point::{
    BenchReport, Bound, Clocks, Curve, CurvePoint, Energy, Kind, Limits, Point, SCHEMA_VERSION,
    Seconds,
};
pub use probe::Probe;
pub use run::{Measured, Runner};

/// The time, in UTC: `2026-01-31T12:00:00Z`.
pub fn now() -> String {
    humantime::format_rfc3339_seconds(std::time::SystemTime::now()).to_string()
}
