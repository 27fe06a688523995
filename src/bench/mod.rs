//! Throughput against the device's own ceilings.
//!
//! ```text
//! probe ─> ceiling ──────────────────────┐
//! grid ─> run ─> seconds + audited ledger ┴─> point ─> report, curve, compare
//! ```

mod ceiling;
mod datasheet;
mod point;

pub use ceiling::{Ceiling, DeviceInfo, MatmulRate, Stream, StreamRate};
pub use datasheet::{Datasheet, Peak};
pub use point::{
    BenchReport, Bound, Curve, CurvePoint, Energy, Kind, Limits, Point, SCHEMA_VERSION, Seconds,
};
