//! What a benchmark found: one value for every format.

use std::{fmt, path::Path};

use serde::{Deserialize, Serialize};

use super::{Accuracy, Ceiling, DeviceInfo};
use crate::{config::Ignored, error::Result, ledger::Phase, traffic::Traffic, workload::Workload};

pub use crate::rate::BENCH_SCHEMA_VERSION as SCHEMA_VERSION;

/// What `bench` found out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BenchReport {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// `bench`.
    pub command: String,
    /// What a point measures.
    pub kind: Kind,
    /// Where config and weights came from.
    pub model: String,
    /// What its files hold and was not used; absent where there were no files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ignored: Option<Vec<Ignored>>,
    /// Parameters of the base model.
    pub parameters: u128,
    /// Where it ran.
    pub device: DeviceInfo,
    /// When, in UTC: `2026-01-31T12:00:00Z`.
    pub date: String,
    /// What every figure is held against.
    pub ceiling: Ceiling,
    /// What points in 8 bits cost in accuracy; absent where there are none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<Accuracy>,
    /// The grid.
    pub points: Vec<Point>,
    /// The decoding steps' time by context, one curve for each dtype and rank that has points
    /// enough.
    pub curves: Vec<Curve>,
}

impl BenchReport {
    /// Reads what `bench --json FILE` wrote.
    ///
    /// # Errors
    /// A file that is none, or of another schema.
    pub fn read(file: &Path) -> Result<Self> {
        super::read(file, "benchmark", |report: &Self| report.schema_version, Self::check)
    }

    /// Refuses times and rates that nothing has.
    ///
    /// # Errors
    /// The key at fault, as the rest of a sentence.
    pub fn check(&self) -> Result<(), String> {
        self.ceiling.check().map_err(|why| format!("`ceiling`: {why}"))?;
        if self.accuracy.as_ref().is_some_and(|accuracy| !accuracy.is_sound()) {
            return Err("`accuracy` holds no losses".into());
        }
        for (index, point) in self.points.iter().enumerate() {
            let Seconds { median, min, max, p25, p75, samples } = &point.seconds;
            let mut times = samples.iter().chain([median, min, max, p25, p75]);
            if samples.is_empty() || !times.all(|time| *time > 0.0 && time.is_finite()) {
                return Err(format!("`points[{index}].seconds` holds no times"));
            }
            if let Some((key, x)) = point.figures().into_iter().find(|(_, x)| !sound(*x)) {
                return Err(format!("`points[{index}].{key}` is {x}, which no device does"));
            }
        }
        for (index, curve) in self.curves.iter().enumerate() {
            let terms = [
                ("launch_s", curve.launch_s),
                ("bytes_per_s", curve.bytes_per_s.unwrap_or(0.0)),
                ("flops_per_s", curve.flops_per_s.unwrap_or(0.0)),
                ("residual", curve.residual),
            ];
            let times = curve.points.iter().flat_map(|point| {
                [("points.measured_s", point.measured_s), ("points.fitted_s", point.fitted_s)]
            });
            if let Some((key, x)) = terms.into_iter().chain(times).find(|(_, x)| !sound(*x)) {
                return Err(format!("`curves[{index}].{key}` is {x}, which no fit gives"));
            }
        }
        Ok(())
    }
}

/// Whether `x` can be a time or a rate.
fn sound(x: f64) -> bool {
    x >= 0.0 && x.is_finite()
}

/// What one unit of a benchmark is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A pass over the prompts of a batch, and the choice of their first tokens.
    Prefill,
    /// One further token of each sequence of a batch.
    Decode,
    /// One optimizer step: forward, backward, update.
    Train,
}

impl Kind {
    /// Lower-case name, as commands and JSON spell it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::Train => "train",
        }
    }

    /// Whether what runs in `phase` belongs to a unit.
    pub const fn counts(self, phase: Phase) -> bool {
        match self {
            Self::Prefill => matches!(phase, Phase::Prefill | Phase::Sampling),
            Self::Decode => matches!(phase, Phase::Decode),
            Self::Train => !matches!(phase, Phase::Setup),
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// One workload, measured. A unit is what [`Kind`] says; FLOPs are 2·m·k·n of its executed
/// matrix products, as peaks are stated, and rates are of the median.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// What ran. Of a decoding step after a context of N tokens: the generation of two tokens
    /// after a prompt of N, whose decoding it is.
    pub workload: Workload,
    /// Sequences.
    pub batch: u64,
    /// Tokens of each sequence that a unit is fed: prompt or text, 1 in decoding.
    pub seq: u64,
    /// Tokens in the cache before the unit.
    pub context: u64,
    /// Tokens of a unit over its batch, as `tokens_per_s` counts them.
    pub tokens: u64,
    /// Time of a unit.
    pub seconds: Seconds,
    /// Tokens a second over the batch: fed in prefill and training, new in decoding.
    pub tokens_per_s: f64,
    /// From the start of the prefill to the first token.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub time_to_first_token_s: Option<f64>,
    /// From one token of a sequence to its next.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub time_per_token_s: Option<f64>,
    /// FLOPs of a unit, matrix products alone.
    pub flops: u128,
    /// Those of `flops` that run layers again for their gradients. The device works for them; the
    /// model does not ask for them.
    #[serde(default)]
    pub recomputed_flops: u128,
    /// FLOPs of a unit with every primitive at 1, comparisons and sign changes free.
    pub unit_flops: u128,
    /// `flops` over `tokens`.
    pub flops_per_token: f64,
    /// Matrix products' FLOPs a second.
    pub flops_per_s: f64,
    /// Model FLOPs utilization, in 0..=1: `flops` less `recomputed_flops` a second, over the measured
    /// ceiling of the element type. Source: Chowdhery et al. 2022, *PaLM* (arXiv 2204.02311),
    /// appendix B, with the products that ran in place of 6N + 12·L·H·Q·T.
    pub mfu_measured: f64,
    /// The same over the maker's peak, where it is known.
    pub mfu_datasheet: Option<f64>,
    /// Hardware FLOPs utilization, in 0..=1: all of `flops` a second over the measured ceiling, where
    /// layers are recomputed; elsewhere it is the MFU.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub hfu_measured: Option<f64>,
    /// The same over the maker's peak, where it is known.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub hfu_datasheet: Option<f64>,
    /// Bytes that a unit's ops read and write. Rates below are of weights and cache, which come
    /// from memory; activations may stay in the chip's caches from op to op.
    pub bytes: Traffic,
    /// Executed ops of a unit.
    pub ops: u64,
    /// Bytes of weights and cache a second.
    pub bytes_per_s: f64,
    /// That over the measured stream, in 0..=1; none where the caches hold what is read.
    pub bandwidth_use: Option<f64>,
    /// FLOPs a byte of weights and cache.
    pub intensity: f64,
    /// Seconds predicted from bandwidth alone: bytes of weights and cache over the stream of the
    /// element type, which may be slower than memory. None where the chip's caches hold them.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub predicted_s: Option<f64>,
    /// What a unit takes at least, by each ceiling alone.
    pub limits: Limits,
    /// Which of them is the largest.
    pub bound: Bound,
    /// The largest of them over the median time: the share of the roofline reached, in 0..=1.
    pub roofline_share: f64,
    /// Tokens a second for each 10¹² FLOP/s of the measured matmul ceiling.
    pub tokens_per_s_per_tflop: f64,
    /// What the device drew, where it tells.
    pub energy: Option<Energy>,
    /// Clocks, where the device tells.
    #[serde(default)]
    pub clocks: Option<Clocks>,
    /// Whether closed form, prediction and execution agreed on what ran.
    pub balanced: bool,
}

impl Point {
    /// Every time and rate but `seconds`, under its key; 0 for what is not there.
    fn figures(&self) -> [(&'static str, f64); 21] {
        let or_0 = |figure: Option<f64>| figure.unwrap_or(0.0);
        let energy = |of: fn(&Energy) -> f64| self.energy.as_ref().map_or(0.0, of);
        [
            ("tokens_per_s", self.tokens_per_s),
            ("time_to_first_token_s", or_0(self.time_to_first_token_s)),
            ("time_per_token_s", or_0(self.time_per_token_s)),
            ("flops_per_token", self.flops_per_token),
            ("flops_per_s", self.flops_per_s),
            ("mfu_measured", self.mfu_measured),
            ("mfu_datasheet", or_0(self.mfu_datasheet)),
            ("hfu_measured", or_0(self.hfu_measured)),
            ("hfu_datasheet", or_0(self.hfu_datasheet)),
            ("bytes_per_s", self.bytes_per_s),
            ("bandwidth_use", or_0(self.bandwidth_use)),
            ("intensity", self.intensity),
            ("predicted_s", or_0(self.predicted_s)),
            ("limits.compute_s", self.limits.compute_s),
            ("limits.memory_s", or_0(self.limits.memory_s)),
            ("limits.dispatch_s", self.limits.dispatch_s),
            ("roofline_share", self.roofline_share),
            ("tokens_per_s_per_tflop", self.tokens_per_s_per_tflop),
            ("energy.joules", energy(|e| e.joules)),
            ("energy.tokens_per_joule", energy(|e| e.tokens_per_joule)),
            ("energy.flop_per_joule", energy(|e| e.flop_per_joule)),
        ]
    }
}

/// Seconds of a unit over all repetitions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Seconds {
    /// Half of the samples are below.
    pub median: f64,
    /// The fastest.
    pub min: f64,
    /// The slowest.
    pub max: f64,
    /// A quarter of the samples are below.
    pub p25: f64,
    /// Three quarters are.
    pub p75: f64,
    /// All, in the order they were taken.
    pub samples: Vec<f64>,
}

impl Seconds {
    /// Of at least one sample.
    ///
    /// # Errors
    /// No sample.
    pub fn of(samples: Vec<f64>) -> Result<Self> {
        let mut sorted = samples.clone();
        sorted.sort_by(f64::total_cmp);
        let (Some(&min), Some(&max)) = (sorted.first(), sorted.last()) else {
            anyhow::bail!("nothing was measured");
        };
        let [p25, median, p75] = [0.25, 0.5, 0.75].map(|share| quantile(&sorted, share));
        Ok(Self { median, min, max, p25, p75, samples })
    }
}

/// The value that `share` of `sorted`, which is not empty, lies below; between two samples, in
/// proportion (the default of R and NumPy).
pub(super) fn quantile(sorted: &[f64], share: f64) -> f64 {
    let place = share * (sorted.len() - 1) as f64;
    let (below, above) = (place.floor() as usize, place.ceil() as usize);
    sorted[below] + (sorted[above] - sorted[below]) * (place - below as f64)
}

/// Seconds that a unit takes at least.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Limits {
    /// FLOPs over the measured matmul rate of the element type.
    pub compute_s: f64,
    /// Bytes of weights and cache over the measured stream. None where the chip's caches hold them.
    pub memory_s: Option<f64>,
    /// Ops times the measured dispatch.
    pub dispatch_s: f64,
}

/// What holds a unit back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Bound {
    /// Arithmetic.
    Compute,
    /// Reading and writing memory.
    Memory,
    /// Starting ops.
    Dispatch,
}

impl Bound {
    /// Lower-case name, as tables and JSON spell it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Compute => "compute",
            Self::Memory => "memory",
            Self::Dispatch => "dispatch",
        }
    }
}

/// Energy of a unit, as the device's own counter tells.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Energy {
    /// Joules of a unit, on average over all repetitions.
    pub joules: f64,
    /// Tokens for each of them.
    pub tokens_per_joule: f64,
    /// FLOPs for each of them.
    pub flop_per_joule: f64,
    /// Power over the timed units, in watts.
    pub watts: f64,
}

/// Clocks of a GPU at the end of the timed units, in MHz: below what they were for a ceiling, the
/// same work takes longer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Clocks {
    /// Of the multiprocessors.
    pub sm_mhz: u32,
    /// Of the memory.
    pub memory_mhz: u32,
}

/// Time per decoding step fitted over batches and contexts:
/// launch + bytes / bandwidth + FLOPs / rate, none of the three below zero.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Curve {
    /// What the points share: `f32`, `f32, LoRA rank 8`.
    pub name: String,
    /// Seconds that no byte and no FLOP explains; 0 where they explain all.
    pub launch_s: f64,
    /// Fitted bandwidth; none where bytes explain nothing.
    pub bytes_per_s: Option<f64>,
    /// Fitted rate; none where FLOPs explain nothing.
    pub flops_per_s: Option<f64>,
    /// Root of the mean squared relative error of the fit.
    pub residual: f64,
    /// Measured and fitted, by batch and context.
    pub points: Vec<CurvePoint>,
}

/// One point of a [`Curve`].
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct CurvePoint {
    /// Sequences.
    pub batch: u64,
    /// Tokens in the cache.
    pub context: u64,
    /// Median seconds of a step.
    pub measured_s: f64,
    /// The fit's.
    pub fitted_s: f64,
}
