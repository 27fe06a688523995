//! What a device can do at most, as measured on it.

use serde::{Deserialize, Serialize};

use super::datasheet::Datasheet;
use crate::ledger::Dtype;

/// Rates of one device, measured through the ops that the model runs on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ceiling {
    /// [`super::SCHEMA_VERSION`].
    pub schema_version: u32,
    /// `ceiling`.
    pub command: String,
    /// What was measured.
    pub device: DeviceInfo,
    /// When, in UTC: `2026-01-31T12:00:00Z`.
    pub date: String,
    /// FLOP/s of matrix products, the best size of each element type.
    pub matmul: Vec<MatmulRate>,
    /// Bytes a second read from memory.
    pub stream: Stream,
    /// Seconds that the smallest op takes when many are issued one after another.
    pub dispatch_s: f64,
    /// What the maker states, where the device is known.
    pub datasheet: Option<Datasheet>,
}

/// A device, as far as its speed depends on it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DeviceInfo {
    /// The product's name: `AMD EPYC`, `NVIDIA H100 80GB HBM3`.
    pub name: String,
    /// As `--device` spells it: `cpu`, `cuda:0`, `metal`.
    pub kind: String,
    /// Version of the driver, where there is one.
    pub driver: Option<String>,
    /// Threads that compute, on a CPU.
    pub threads: Option<usize>,
    /// Bytes of the last cache before memory, where the system tells.
    pub cache_bytes: Option<u64>,
    /// `release` or `debug`, and the libraries of the vendor's that were built in: `release+mkl`.
    pub build: String,
}

/// The fastest matrix product of one element type.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MatmulRate {
    /// Element type of both sides.
    pub dtype: Dtype,
    /// 2·m·k·n over the fastest repetition's seconds.
    pub flops_per_s: f64,
    /// Rows of the left side.
    pub m: u64,
    /// Summed dimension.
    pub k: u64,
    /// Columns of the right side.
    pub n: u64,
    /// Seconds of each repetition of this size.
    pub samples: Vec<f64>,
}

/// Reading memory, as a matrix-vector product does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Stream {
    /// Of the fastest element type.
    pub bytes_per_s: f64,
    /// Bytes of the matrix: more than the caches hold.
    pub buffer_bytes: u64,
    /// Each element type's.
    pub rates: Vec<StreamRate>,
}

/// Reading a matrix of one element type.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StreamRate {
    /// Element type of the matrix.
    pub dtype: Dtype,
    /// Bytes of the matrix over the fastest repetition's seconds.
    pub bytes_per_s: f64,
    /// Seconds of each repetition.
    pub samples: Vec<f64>,
}
