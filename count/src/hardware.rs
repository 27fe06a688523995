//! What makers state of their devices: `gpus.toml`, one row a device, each with its document.

use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    ledger::Dtype,
};

/// An element type that makers state a peak for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// The general cores' f32, which does not round to TF32.
    F32,
    /// TensorFloat-32: f32 in memory, products of 10 bits' mantissas.
    Tf32,
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    #[cfg_attr(feature = "clap", value(alias = "fp16"))]
    #[serde(alias = "fp16")]
    F16,
    /// Either 8-bit format.
    Fp8,
}

impl Precision {
    /// All of them, in the order of tables.
    pub const ALL: [Self; 5] = [Self::F32, Self::Tf32, Self::Bf16, Self::F16, Self::Fp8];

    /// The name on the command line and in files.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Tf32 => "tf32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::Fp8 => "fp8",
        }
    }
}

impl From<Dtype> for Precision {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => Self::F32,
            Dtype::F16 => Self::F16,
            Dtype::BF16 => Self::Bf16,
            Dtype::Fp8 => Self::Fp8,
        }
    }
}

/// A device as its maker states it; none where the document does not state the figure.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gpu {
    /// What `--gpu` calls it: `h100-sxm`.
    pub name: String,
    /// The product.
    pub product: String,
    /// What its driver calls it, in full.
    pub drivers: Vec<String>,
    /// The document that states the figures, and what was made of them.
    pub source: String,
    /// The document's year.
    pub year: u16,
    /// FLOP/s of products on the general cores.
    pub f32: Option<f64>,
    /// FLOP/s of dense products in TF32.
    pub tf32: Option<f64>,
    /// FLOP/s of dense products in bfloat16.
    pub bf16: Option<f64>,
    /// FLOP/s of dense products in half precision, summed in f32.
    pub f16: Option<f64>,
    /// FLOP/s of dense products in 8 bits, summed in f32.
    pub fp8: Option<f64>,
    /// Bytes a second between memory and chip.
    pub bytes_per_s: f64,
    /// Bytes of memory, as stated.
    pub memory_bytes: Option<f64>,
    /// The board's design power, in watts.
    pub watts: Option<f64>,
}

#[derive(Deserialize)]
struct File {
    gpu: Vec<Gpu>,
}

impl Gpu {
    /// Every device that is listed.
    ///
    /// # Errors
    /// A list that does not parse.
    pub fn all() -> Result<Vec<Self>> {
        Ok(toml::from_str::<File>(include_str!("gpus.toml"))?.gpu)
    }

    /// The one of this name: `h100-sxm`, in either case.
    ///
    /// # Errors
    /// A name that is not listed, or that several products share.
    pub fn named(name: &str) -> Result<Self> {
        let mut all = Self::all()?;
        let wanted = name.to_ascii_lowercase();
        if let Some(at) = all.iter().position(|gpu| gpu.name == wanted) {
            return Ok(all.swap_remove(at));
        }
        let names = |of: &dyn Fn(&&Self) -> bool| -> Vec<String> {
            all.iter().filter(of).map(|gpu| gpu.name.clone()).collect()
        };
        let alike = names(&|gpu| gpu.name.starts_with(&format!("{wanted}-")));
        let why = match alike.is_empty() {
            false => format!("`{name}` is not one product: {}", alike.join(", ")),
            true => format!("`{name}` is not listed: {}", names(&|_| true).join(", ")),
        };
        Err(Error::flag("--gpu", why).into())
    }

    /// What is stated of the device that its driver calls `name`; none where it is not listed.
    ///
    /// # Errors
    /// A list that does not parse.
    pub fn driven(name: &str) -> Result<Option<Self>> {
        Ok(Self::all()?.into_iter().find(|gpu| gpu.drivers.iter().any(|known| known == name)))
    }

    /// The stated peak of dense products, in FLOP/s.
    pub const fn peak(&self, precision: Precision) -> Option<f64> {
        match precision {
            Precision::F32 => self.f32,
            Precision::Tf32 => self.tf32,
            Precision::Bf16 => self.bf16,
            Precision::F16 => self.f16,
            Precision::Fp8 => self.fp8,
        }
    }
}

/// A device's stated peaks, as a report of a benchmark keeps them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Datasheet {
    /// The product, as its driver calls it.
    pub name: String,
    /// The document that states it.
    pub source: String,
    /// FLOP/s of matrix products, by element type.
    pub peaks: Vec<Peak>,
    /// Bytes a second between memory and chip.
    pub bytes_per_s: f64,
}

/// The peak of one element type.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Peak {
    /// Element type of both sides.
    pub dtype: Dtype,
    /// Multiplications and additions a second.
    pub flops_per_s: f64,
}

impl Datasheet {
    /// What is stated of the device that its driver calls `name`; none where it is not listed.
    ///
    /// # Errors
    /// A list that does not parse.
    pub fn of(name: &str) -> Result<Option<Self>> {
        Ok(Gpu::driven(name)?.map(|gpu| {
            let peak = |dtype: Dtype| {
                gpu.peak(dtype.into()).map(|flops_per_s| Peak { dtype, flops_per_s })
            };
            let peaks = Dtype::ALL.into_iter().filter_map(peak);
            let (peaks, name) = (peaks.collect(), name.into());
            Self { name, peaks, source: gpu.source, bytes_per_s: gpu.bytes_per_s }
        }))
    }

    /// The peak of `dtype`, in FLOP/s, where one is stated.
    pub fn flops_per_s(&self, dtype: Dtype) -> Option<f64> {
        self.peaks.iter().find(|peak| peak.dtype == dtype).map(|peak| peak.flops_per_s)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_found_by_their_whole_name() {
        let h100 = Datasheet::of("NVIDIA H100 80GB HBM3").unwrap().unwrap();
        assert_eq!(h100.flops_per_s(Dtype::BF16), Some(989e12));
        assert_eq!(h100.bytes_per_s, 3.35e12);
        let t4 = Datasheet::of("Tesla T4").unwrap().unwrap();
        assert_eq!(t4.flops_per_s(Dtype::BF16), None);
        assert_eq!(Datasheet::of("NVIDIA H100").unwrap(), None);
        assert_eq!(Gpu::named("A100-SXM-80GB").unwrap().peak(Precision::Tf32), Some(156e12));
        for (name, parts) in [
            ("h100", &["not one product", "h100-sxm, h100-nvl, h100-pcie"][..]),
            ("a100-sxm", &["a100-sxm-80gb, a100-sxm-40gb"]),
            ("h1000", &["not listed", "h100-sxm", "tpu-v5p"]),
        ] {
            let error = Gpu::named(name).unwrap_err().to_string();
            for part in parts {
                assert!(error.starts_with("--gpu: ") && error.contains(part), "{error}");
            }
        }
    }

    #[test]
    fn every_entry_is_plausible_and_named_once() {
        let all = Gpu::all().unwrap();
        let once = |names: Vec<&String>| {
            let mut sorted = names.clone();
            sorted.sort();
            sorted.dedup();
            assert_eq!(sorted.len(), names.len(), "{names:?}");
        };
        once(all.iter().map(|gpu| &gpu.name).collect());
        once(all.iter().flat_map(|gpu| &gpu.drivers).collect());
        for gpu in &all {
            let half = gpu.f16.or(gpu.bf16).unwrap();
            // Half precision has units of its own: 1 to 40 times f32, twice TF32, half of FP8.
            // A byte buys 7 to 700 FLOPs.
            let times = |other: Option<f64>| other.map_or(1.0, |other| half / other);
            assert!((1.0..40.0).contains(&times(gpu.f32)), "{gpu:?}");
            assert!((1.97..2.03).contains(&(times(gpu.tf32.or(Some(half / 2.0))))), "{gpu:?}");
            assert!((0.49..0.505).contains(&times(gpu.fp8.or(Some(half * 2.0)))), "{gpu:?}");
            assert!((7.0..700.0).contains(&(half / gpu.bytes_per_s)), "{gpu:?}");
            assert!(gpu.bf16.is_none_or(|bf16| bf16 == half), "{gpu:?}");
            assert!(gpu.memory_bytes.is_none_or(|n| (1e10..1e12).contains(&n)), "{gpu:?}");
            assert!(gpu.watts.is_none_or(|watts| (50.0..1500.0).contains(&watts)), "{gpu:?}");
            assert!((2015..2030).contains(&gpu.year) && !gpu.source.is_empty(), "{gpu:?}");
        }
    }
}
