//! What a device is, as far as its speed depends on it.

use candle_core::Device;
use serde::{Deserialize, Serialize};

/// A device, its driver, and how this program uses it.
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
    /// `release` or `debug`, and the vendor's libraries that were built in: `release+mkl`.
    pub build: String,
}

impl DeviceInfo {
    /// Of an opened `device`, which `--device` spelled `kind`.
    pub fn of(device: &Device, kind: &str) -> Self {
        // `cuda` and `cuda:0` are one device, with one ceiling.
        let (kind, build) = (kind.strip_suffix(":0").unwrap_or(kind), build());
        match device {
            Device::Cpu => Self {
                name: cpu_name(),
                kind: kind.into(),
                driver: None,
                threads: Some(rayon::current_num_threads()),
                cache_bytes: cpu_cache(),
                build,
            },
            Device::Cuda(_) => super::cuda::info(device, kind, build),
            Device::Metal(_) => Self {
                name: "Metal".into(),
                kind: kind.into(),
                driver: None,
                threads: None,
                cache_bytes: None,
                build,
            },
        }
    }
}

fn build() -> String {
    let mut name = if cfg!(debug_assertions) { "debug" } else { "release" }.to_string();
    for (built, library) in [
        (cfg!(feature = "mkl"), "+mkl"),
        (cfg!(feature = "accelerate"), "+accelerate"),
        (cfg!(feature = "cudnn"), "+cudnn"),
    ] {
        if built {
            name += library;
        }
    }
    name
}

/// As Linux tells it; elsewhere the architecture.
fn cpu_name() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("model name"));
    let name = line.map(|rest| rest.trim_start_matches([' ', '\t', ':']).trim());
    name.filter(|name| !name.is_empty()).unwrap_or(std::env::consts::ARCH).into()
}

/// The largest cache that Linux lists of the first CPU.
fn cpu_cache() -> Option<u64> {
    let entries = std::fs::read_dir("/sys/devices/system/cpu/cpu0/cache").ok()?;
    let size = |entry: std::io::Result<std::fs::DirEntry>| {
        let text = std::fs::read_to_string(entry.ok()?.path().join("size")).ok()?;
        let kib: u64 = text.trim().strip_suffix('K')?.parse().ok()?;
        Some(kib * 1024)
    };
    entries.filter_map(size).max()
}
