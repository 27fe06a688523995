//! What CUDA and NVIDIA's management library (NVML) tell of a GPU. NVML comes with the driver and
//! is loaded when it is asked; without it, names and rates stay, energy is not known.

#[cfg(feature = "cuda")]
mod gpu {
    use candle_core::{Device, cuda_backend::cudarc::driver::sys};
    use nvml_wrapper::{Nvml, enum_wrappers::device::Clock};

    use crate::bench::{Clocks, DeviceInfo};

    /// The driver's library, by the name that it is installed under.
    const LIBRARY: &str = if cfg!(windows) { "nvml.dll" } else { "libnvidia-ml.so.1" };

    fn nvml() -> Option<Nvml> {
        Nvml::builder().lib_path(LIBRARY.as_ref()).init().ok()
    }

    /// Name, driver and caches of an opened GPU.
    pub fn info(device: &Device, kind: &str, build: String) -> DeviceInfo {
        let cuda = device.as_cuda_device().ok().map(|cuda| cuda.cuda_stream().context().clone());
        let l2 = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE;
        let name = cuda.as_ref().and_then(|context| context.name().ok());
        DeviceInfo {
            name: name.unwrap_or_else(|| "CUDA".into()),
            kind: kind.into(),
            driver: nvml().and_then(|nvml| nvml.sys_driver_version().ok()),
            threads: None,
            cache_bytes: cuda.and_then(|context| u64::try_from(context.attribute(l2).ok()?).ok()),
            build,
        }
    }

    /// The GPU's counter of the energy that it drew.
    #[derive(Debug)]
    pub struct EnergyCounter {
        nvml: Nvml,
        uuid: String,
    }

    impl EnergyCounter {
        /// Of an opened GPU; none on another device, without NVML, or before Volta.
        pub fn of(device: &Device) -> Option<Self> {
            let cuda = device.as_cuda_device().ok()?;
            let bytes = cuda.cuda_stream().context().uuid().ok()?.bytes;
            // The order that NVML numbers GPUs in is not CUDA's: the UUID is the same.
            let hex: String = bytes.iter().map(|byte| format!("{:02x}", *byte as u8)).collect();
            let [a, b, c, d, e] = [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]];
            let counter = Self { nvml: nvml()?, uuid: format!("GPU-{a}-{b}-{c}-{d}-{e}") };
            counter.joules().is_some().then_some(counter)
        }

        /// Joules since the driver was loaded, to the millijoule.
        pub fn joules(&self) -> Option<f64> {
            let device = self.nvml.device_by_uuid(self.uuid.as_str()).ok()?;
            Some(device.total_energy_consumption().ok()? as f64 / 1e3)
        }

        /// The clocks as they are now.
        pub fn clocks(&self) -> Option<Clocks> {
            let device = self.nvml.device_by_uuid(self.uuid.as_str()).ok()?;
            let [sm_mhz, memory_mhz] = [Clock::SM, Clock::Memory].map(|c| device.clock_info(c));
            Some(Clocks { sm_mhz: sm_mhz.ok()?, memory_mhz: memory_mhz.ok()? })
        }
    }
}

#[cfg(not(feature = "cuda"))]
mod gpu {
    use candle_core::Device;

    use crate::bench::{Clocks, DeviceInfo};

    pub fn info(_: &Device, kind: &str, build: String) -> DeviceInfo {
        let name = "CUDA".into();
        DeviceInfo {
            name,
            kind: kind.into(),
            driver: None,
            threads: None,
            cache_bytes: None,
            build,
        }
    }

    #[derive(Debug)]
    pub struct EnergyCounter;

    impl EnergyCounter {
        pub fn of(_: &Device) -> Option<Self> {
            None
        }

        pub fn joules(&self) -> Option<f64> {
            None
        }

        pub fn clocks(&self) -> Option<Clocks> {
            None
        }
    }
}

pub use gpu::{EnergyCounter, info};
