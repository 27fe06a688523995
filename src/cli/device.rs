//! The device that a command runs on: which, how it is opened, what it has free, and what is
//! missing where it fails.

use candle_core::Device;

use crate::{
    error::{Error, Result},
    ledger::Dtype,
};

/// The element type where none is asked for: the one that the device's matrix units are made for.
pub fn default_dtype(device: &str) -> Dtype {
    match split(device) {
        ("cuda", _) => Dtype::BF16,
        _ => Dtype::F32,
    }
}

/// Opens `cpu`, `cuda[:N]` or `metal`.
///
/// # Errors
/// Another name, a device that this build or this machine does not have.
pub fn open(device: &str) -> Result<Device> {
    let fail = |why: String| Err(Error::flag("--device", why).into());
    let (kind, index) = split(device);
    if index.is_some() && matches!(kind, "cpu" | "metal") {
        return fail(format!("`{device}`: only cuda takes a number"));
    }
    let index = index.unwrap_or("0");
    let Ok(ordinal) = index.parse() else {
        return fail(format!("`{device}`: `{index}` is no number"));
    };
    let opened = match kind {
        "cpu" => Ok(Device::Cpu),
        "cuda" if cfg!(feature = "cuda") => cuda::open(ordinal),
        "metal" if cfg!(feature = "metal") => Device::new_metal(0),
        "cuda" | "metal" => {
            return fail(format!("this build has no {kind}; build with `--features {kind}`"));
        }
        other => return fail(format!("no device `{other}`; cpu, cuda[:N] or metal")),
    };
    opened.or_else(|e| match missing(&e.to_string()) {
        Some(what) => fail(format!("cannot open {device}: {what}{}", cuda::visible())),
        None => fail(format!("cannot open {device}: {e}")),
    })
}

/// Bytes that a device with memory of its own has free.
pub fn free_memory(device: &Device) -> Option<u128> {
    cuda::free_memory(device)
}

/// A GPU that this build can use.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Gpu {
    /// As `--device` spells it.
    pub device: String,
    /// The product's name.
    pub name: String,
    /// Its memory.
    pub memory_bytes: u64,
    /// Of which free.
    pub free_bytes: u64,
}

/// All of them; none in a build without CUDA.
///
/// # Errors
/// Why the driver does not tell.
pub fn gpus() -> Result<Vec<Gpu>, String> {
    cuda::gpus()
}

/// A failure of the device while it ran, as what is missing; any other error as it is.
pub fn explained(error: anyhow::Error) -> anyhow::Error {
    let ours = error.downcast_ref::<Error>().is_some();
    let text = format!("{error:#}");
    match missing(&text) {
        Some(OUT_OF_MEMORY) if !ours => Error::Memory("the GPU has no more".into()).into(),
        Some(what) if !ours => error.context(what),
        _ => error,
    }
}

fn split(device: &str) -> (&str, Option<&str>) {
    match device.split_once(':') {
        Some((kind, index)) => (kind, Some(index)),
        None => (device, None),
    }
}

const OUT_OF_MEMORY: &str = "its memory is taken";

/// What CUDA's error says to those who do not know its names. They come in the text alone: the
/// driver, cuBLAS and candle wrap one another's errors.
fn missing(error: &str) -> Option<&'static str> {
    // Each name with what follows it, so that none is found in a longer one.
    const MEANINGS: [(&str, &str); 12] = [
        ("CUDA_ERROR_NO_DEVICE,", "no GPU (see nvidia-smi and CUDA_VISIBLE_DEVICES)"),
        ("CUDA_ERROR_INVALID_DEVICE,", "no such GPU"),
        (
            "CUDA_ERROR_STUB_LIBRARY,",
            "no NVIDIA driver: the libcuda.so.1 found is one that programs are linked against",
        ),
        (
            "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH,",
            "libcuda.so.1 is not of the NVIDIA driver that the kernel runs",
        ),
        (
            "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE,",
            "libcuda.so.1 of a compat package does not serve this GPU",
        ),
        (
            "CUDA_ERROR_UNSUPPORTED_PTX_VERSION,",
            "the NVIDIA driver is older than the CUDA that this was built with",
        ),
        ("CUDA_ERROR_NO_BINARY_FOR_GPU,", ANOTHER_GPU),
        ("CUDA_ERROR_INVALID_PTX,", ANOTHER_GPU),
        ("CUDA_ERROR_DEVICE_UNAVAILABLE,", "another process holds the GPU for itself"),
        ("CUDA_ERROR_OUT_OF_MEMORY,", OUT_OF_MEMORY),
        ("CUBLAS_STATUS_ALLOC_FAILED", OUT_OF_MEMORY),
        ("CURAND_STATUS_ALLOCATION_FAILED", OUT_OF_MEMORY),
    ];
    MEANINGS.into_iter().find_map(|(name, meaning)| error.contains(name).then_some(meaning))
}

const ANOTHER_GPU: &str = "this was built for GPUs of another compute capability; build with \
                           CUDA_COMPUTE_CAP set to this GPU's";

#[cfg(feature = "cuda")]
mod cuda {
    use candle_core::{
        Device, Result,
        cuda_backend::{
            WrapErr,
            cudarc::driver::{CudaContext, DriverError, result, sys},
        },
    };

    /// A device with one stream of its own, which keeps the memory that it once took.
    pub fn open(ordinal: usize) -> Result<Device> {
        let device = Device::new_cuda_with_stream(ordinal)?;
        let cuda = device.as_cuda_device()?;
        // SAFETY: everything runs on the device's one stream, so no use of a tensor can overtake
        // another: there is nothing for events to order.
        unsafe { cuda.disable_event_tracking() };
        let context = cuda.cuda_stream().context().clone();
        if context.has_async_alloc() {
            keep_memory(&context).w()?;
        }
        Ok(device)
    }

    /// Else the pool gives its memory back at each synchronization, and takes it anew.
    fn keep_memory(context: &CudaContext) -> std::result::Result<(), DriverError> {
        let mut threshold = u64::MAX;
        let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        // SAFETY: the context holds the device, whose default pool lives as long as it does; the
        // attribute is a 64-bit number, read during the call.
        unsafe {
            let pool = result::device::get_default_mem_pool(context.cu_device())?;
            result::mem_pool::set_attribute(pool, attribute, (&raw mut threshold).cast())
        }
    }

    pub fn free_memory(device: &Device) -> Option<u128> {
        let cuda = device.as_cuda_device().ok()?;
        let (free, _) = cuda.cuda_stream().context().mem_get_info().ok()?;
        Some(free as u128)
    }

    pub fn gpus() -> std::result::Result<Vec<super::Gpu>, String> {
        let explained = |e: DriverError| {
            super::missing(&format!("{e:?}")).map_or_else(|| format!("{e:?}"), String::from)
        };
        let gpu = |ordinal: usize| {
            let context = CudaContext::new(ordinal)?;
            let (free, all) = context.mem_get_info()?;
            Ok(super::Gpu {
                device: format!("cuda:{ordinal}"),
                name: context.name()?,
                memory_bytes: all as u64,
                free_bytes: free as u64,
            })
        };
        let count = CudaContext::device_count().map_err(explained)?;
        (0..count as usize).map(gpu).collect::<std::result::Result<_, _>>().map_err(explained)
    }

    /// How many GPUs there are, as the end of a sentence.
    pub fn visible() -> String {
        match CudaContext::device_count() {
            Ok(0) | Err(_) => String::new(),
            Ok(1) => "; 1 is visible, cuda:0".into(),
            Ok(n) => format!("; {n} are visible, cuda:0 to cuda:{}", n - 1),
        }
    }
}

#[cfg(not(feature = "cuda"))]
mod cuda {
    use candle_core::{Device, Result};

    pub fn open(ordinal: usize) -> Result<Device> {
        Device::new_cuda(ordinal)
    }

    pub fn free_memory(_: &Device) -> Option<u128> {
        None
    }

    pub fn gpus() -> std::result::Result<Vec<super::Gpu>, String> {
        Ok(vec![])
    }

    pub fn visible() -> String {
        String::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_precision_is_cudas_alone() {
        for (device, dtype) in [
            ("cuda", Dtype::BF16),
            ("cuda:1", Dtype::BF16),
            ("cpu", Dtype::F32),
            ("metal", Dtype::F32),
        ] {
            assert_eq!(default_dtype(device), dtype, "{device}");
        }
    }

    #[test]
    fn errors_of_the_device_say_what_is_missing() {
        let driver = |name| anyhow::anyhow!("DriverError({name}, \"…\")").context("layer 3");
        let text = |e| format!("{:#}", explained(e));
        let memory = explained(driver("CUDA_ERROR_OUT_OF_MEMORY"));
        assert!(matches!(memory.downcast_ref(), Some(Error::Memory(_))));
        let ptx = text(driver("CUDA_ERROR_UNSUPPORTED_PTX_VERSION"));
        assert!(ptx.starts_with("the NVIDIA driver is older") && ptx.contains("layer 3"), "{ptx}");
        // What is not CUDA's stays as it is.
        assert_eq!(text(anyhow::anyhow!("no such file")), "no such file");
        let ours = Error::Prompt("CUDA_ERROR_OUT_OF_MEMORY, he said".into());
        assert!(matches!(explained(ours.into()).downcast_ref(), Some(Error::Prompt(_))));
    }
}
