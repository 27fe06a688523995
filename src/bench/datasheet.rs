//! What makers state of their devices: `peaks.toml`.

use serde::{Deserialize, Serialize};

use crate::{error::Result, ledger::Dtype};

/// A device's stated peaks, dense: without structured sparsity.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Datasheet {
    /// The product.
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

#[derive(Deserialize)]
struct File {
    gpu: Vec<Entry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    names: Vec<String>,
    source: String,
    f32: f64,
    f16: f64,
    bf16: Option<f64>,
    bytes_per_s: f64,
}

impl Datasheet {
    /// What is stated of the device that its driver calls `name`; none where it is not listed.
    ///
    /// # Errors
    /// A list that does not parse.
    pub fn of(name: &str) -> Result<Option<Self>> {
        let list: File = toml::from_str(include_str!("peaks.toml"))?;
        let found = list.gpu.into_iter().find(|gpu| gpu.names.iter().any(|known| known == name));
        Ok(found.map(|gpu| {
            let rates =
                [(Dtype::F32, Some(gpu.f32)), (Dtype::F16, Some(gpu.f16)), (Dtype::BF16, gpu.bf16)];
            let peak = |(dtype, rate): (_, Option<f64>)| {
                rate.map(|flops_per_s| Peak { dtype, flops_per_s })
            };
            Self {
                name: name.into(),
                source: gpu.source,
                peaks: rates.into_iter().filter_map(peak).collect(),
                bytes_per_s: gpu.bytes_per_s,
            }
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
    }

    #[test]
    fn every_entry_is_plausible_and_named_once() {
        let list: File = toml::from_str(include_str!("peaks.toml")).unwrap();
        let mut names: Vec<_> = list.gpu.iter().flat_map(|gpu| &gpu.names).collect();
        let all = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), all);
        for gpu in &list.gpu {
            // Half precision has units of its own: 1 to 40 times f32. A byte buys 7 to 700 FLOPs.
            assert!((1.0..40.0).contains(&(gpu.f16 / gpu.f32)), "{:?}", gpu.names);
            assert!((7.0..700.0).contains(&(gpu.f16 / gpu.bytes_per_s)), "{:?}", gpu.names);
        }
    }
}
