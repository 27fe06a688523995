//! Refuses what cannot fit, before the operating system ends it; keeps what it has.

use candle_core::Device;

use super::device;
use crate::{
    error::{Error, Result},
    report::{Memory, bytes},
    workload::Workload,
};

/// Has memory that ops free serve the next ones, in place of going back to the system: clearing
/// fresh pages took a tenth of a training step. The peak stays as it is.
pub fn keep_freed() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: sets two documented parameters of glibc's allocator, and is called before any thread
    // is started. Where it refuses them, all is as before.
    unsafe {
        libc::mallopt(libc::M_MMAP_MAX, 0);
        libc::mallopt(libc::M_TRIM_THRESHOLD, -1);
    }
}

/// Compares what `workload` needs with the memory that `device`, or this machine, has free.
///
/// # Errors
/// A workload that needs more. Where the system does not tell, nothing is refused.
pub fn check(workload: &Workload, device: &Device) -> Result<()> {
    let memory = Memory::of(std::slice::from_ref(workload), device.is_cuda());
    let parts = memory.parts().into_iter().chain([("a step's tokens", workload.tokens_bytes())]);
    let needed: u128 = parts.clone().map(|(_, n)| n).sum();
    let (free, whose) = match device::free_memory(device) {
        Some(free) => (Some(free), " on the GPU"),
        None => (available(), ""),
    };
    match free {
        Some(free) if needed > free => {
            let parts: Vec<String> = parts
                .filter(|(_, n)| *n > 0)
                .map(|(name, n)| format!("{} of {name}", bytes(n as f64)))
                .collect();
            let parts = parts.join(", ");
            let (needed, free) = (bytes(needed as f64), bytes(free as f64));
            Err(Error::Memory(format!("{needed} needed ({parts}), {free} free{whose}")).into())
        }
        _ => Ok(()),
    }
}

/// Bytes that `device`, or this machine, has free, where that is known.
pub fn free(device: &Device) -> Option<u128> {
    device::free_memory(device).or_else(available)
}

/// Bytes that programs can still take, as Linux estimates them.
pub fn available() -> Option<u128> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u128 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}
