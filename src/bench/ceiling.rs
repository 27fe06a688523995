//! What a device can do at most, as measured on it; kept between runs.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Datasheet, DeviceInfo, Seconds};
use crate::{
    error::{Error, Result},
    ledger::Dtype,
    target::Target,
};

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
    /// Seconds of a product of this size, in each repetition.
    pub samples: Vec<f64>,
}

/// Reading memory, as a matrix-vector product does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Stream {
    /// Of the fastest element type, at its best.
    pub bytes_per_s: f64,
    /// Bytes of the matrix: more than the caches hold.
    pub buffer_bytes: u64,
    /// Each element type's, as last read.
    pub rates: Vec<StreamRate>,
}

/// Reading a matrix of one element type.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StreamRate {
    /// Element type of the matrix.
    pub dtype: Dtype,
    /// Bytes of the matrix over the fastest repetition's seconds.
    pub bytes_per_s: f64,
    /// Columns of the matrix: elements summed into one.
    pub k: u64,
    /// Seconds of one reading, in each repetition.
    pub samples: Vec<f64>,
}

impl Ceiling {
    /// The matmul rate of `dtype`, in FLOP/s, where it was measured.
    pub fn flops_per_s(&self, dtype: Dtype) -> Option<f64> {
        self.matmul.iter().find(|rate| rate.dtype == dtype).map(|rate| rate.flops_per_s)
    }

    /// Bytes a second of a stream of `dtype`; of the fastest type where that one was not measured.
    pub fn bytes_per_s(&self, dtype: Dtype) -> f64 {
        let found = self.stream.rates.iter().find(|rate| rate.dtype == dtype);
        found.map_or(self.stream.bytes_per_s, |rate| rate.bytes_per_s)
    }

    /// Whether every one of `dtypes` was measured.
    pub fn covers(&self, dtypes: &[Dtype]) -> bool {
        dtypes.iter().all(|&dtype| self.flops_per_s(dtype).is_some())
    }

    /// By how much the median repetition took longer than the fastest, as a share, where that is
    /// most: a machine with nothing else to do stays below a tenth.
    pub fn spread(&self) -> f64 {
        let matmul = self.matmul.iter().map(|rate| &rate.samples);
        let all = matmul.chain(self.stream.rates.iter().map(|rate| &rate.samples));
        let spreads = all.filter_map(|samples| Seconds::of(samples.clone()).ok());
        spreads.map(|seconds| seconds.median / seconds.min - 1.0).fold(0.0, f64::max)
    }

    /// Reads what `ceiling --json FILE` wrote.
    ///
    /// # Errors
    /// A file that is none, of another schema, or with rates that no device has.
    pub fn read(file: &Path) -> Result<Self> {
        super::read(file, "ceiling", |ceiling: &Self| ceiling.schema_version, Self::check)
    }

    /// Refuses rates that no device has.
    ///
    /// # Errors
    /// The key at fault, as the rest of a sentence.
    pub fn check(&self) -> Result<(), String> {
        let rates = self.matmul.iter().map(|rate| ("matmul.flops_per_s", rate.flops_per_s));
        let others =
            [("stream.bytes_per_s", self.stream.bytes_per_s), ("dispatch_s", self.dispatch_s)];
        let streams =
            self.stream.rates.iter().map(|rate| ("stream.rates.bytes_per_s", rate.bytes_per_s));
        for (key, rate) in rates.chain(others).chain(streams) {
            if !(rate > 0.0 && rate.is_finite()) {
                return Err(format!("`{key}` is {rate}, which no device does"));
            }
        }
        let repetitions = self.matmul.iter().flat_map(|rate| &rate.samples);
        let mut repetitions =
            repetitions.chain(self.stream.rates.iter().flat_map(|rate| &rate.samples));
        match repetitions.find(|time| !(**time > 0.0 && time.is_finite())) {
            Some(time) => Err(format!("`samples` hold {time}, which is no time")),
            None => Ok(()),
        }
    }

    /// Where they are kept, in the user's cache directory; none on a system without one.
    pub fn cache() -> Option<PathBuf> {
        Some(dirs::cache_dir()?.join("flopaudit"))
    }

    /// The one kept of `device`; none where nothing usable is kept.
    pub fn kept(device: &DeviceInfo) -> Option<Self> {
        let found = Self::read(&place(device)?).ok()?;
        (found.device == *device).then_some(found)
    }

    /// Keeps it for later runs, in the user's cache directory; the file, where there is one.
    ///
    /// # Errors
    /// A directory that cannot be written.
    pub fn keep(&self) -> Result<Option<PathBuf>> {
        let Some(file) = place(&self.device) else { return Ok(None) };
        if let Some(dir) = file.parent() {
            let bad = |e: std::io::Error| Error::File { file: dir.into(), why: e.to_string() };
            std::fs::create_dir_all(dir).map_err(bad)?;
        }
        Target::open(&file)?.write(self)?;
        Ok(Some(file))
    }
}

/// `~/.cache/flopaudit/ceiling-….json`, or as the system has it; one a device and build.
fn place(device: &DeviceInfo) -> Option<PathBuf> {
    let DeviceInfo { name, kind, threads, build, .. } = device;
    let threads = threads.map_or(String::new(), |n| format!(" {n} threads"));
    let plain = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
    let slug: String = format!("{kind} {name}{threads} {build}").chars().map(plain).collect();
    Some(Ceiling::cache()?.join(format!("ceiling-{slug}.json")))
}
