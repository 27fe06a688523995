//! The utilization that a published speed comes to, under each convention that people count by.

use serde::Serialize;

use super::{Products, Utilization, new_tokens};
use crate::{
    analytic::{self, Structure},
    error::{Error, Result},
    hardware::Precision,
    tally::Tally,
    workload::Workload,
};

/// The conventions of published figures, in the order of tables.
pub const CONVENTIONS: [Structure; 11] = [
    Structure::Exact,
    Structure::SixNd,
    Structure::SixNdNoEmbedding,
    Structure::Palm,
    Structure::Megatron,
    Structure::MegatronCausal,
    Structure::HfTrainer,
    Structure::Torch,
    Structure::TorchSdpa,
    Structure::Torchtitan,
    Structure::MaxText,
];

/// A speed that somebody measured.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Speed {
    /// Tokens a second of all devices together.
    TokensPerSecond(f64),
    /// Tokens a second of one device.
    TokensPerSecondPerGpu(f64),
    /// Seconds of all that the workloads do: one optimizer step, or one pass or generation.
    Seconds(f64),
    /// FLOP/s of one device as this structure counts.
    FlopsPerSecondPerGpu(f64, Structure),
}

/// Devices and the peak that utilizations are of.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Peak {
    /// The device's name in the list.
    pub gpu: String,
    /// The document that states the peak.
    pub source: String,
    /// The document's year.
    pub year: u16,
    /// Devices.
    pub gpus: u64,
    /// Element type of the peak.
    pub peak: Precision,
    /// FLOP/s of one device.
    pub peak_flops_per_s: f64,
}

/// A speed, and what it comes to under each convention.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Published {
    /// Tokens a second of all devices together.
    pub tokens_per_s: f64,
    /// Tokens of `step_s`: fed; of a generation, those that it chooses.
    pub tokens: u128,
    /// Seconds of one optimizer step (of all, where rows differ), pass or generation.
    pub step_s: f64,
    /// The devices.
    #[serde(flatten)]
    pub peak: Peak,
    /// One convention each.
    pub rows: Vec<Row>,
    /// Conventions that do not count this workload, with the reason.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub uncounted: Vec<String>,
}

/// One convention.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// How products are counted.
    pub structure: Structure,
    /// `mfu`, or `hfu` where recomputed products are among them.
    pub of: Utilization,
    /// FLOPs of `tokens`.
    pub flops: u128,
    /// FLOPs a token.
    pub flops_per_token: f64,
    /// FLOP/s of one device.
    pub flops_per_s_per_gpu: f64,
    /// That over the peak, 1 being all of it.
    pub utilization: f64,
    /// FLOPs over those of `exact`.
    pub of_exact: f64,
}

/// Tokens that speeds are stated in: those that are chosen, where any are; else those fed, without
/// padding.
fn stated_tokens(workloads: &[Workload]) -> u128 {
    let of = |workload: &Workload| match new_tokens(&workload.task) {
        0 => workload.task.tokens().real,
        new => new,
    };
    workloads.iter().map(of).sum()
}

impl Published {
    /// What `speed` comes to for `workloads`, which run in turn.
    ///
    /// # Errors
    /// A workload that nothing counts, a convention of the speed that does not count it, or sums
    /// past 128 bits.
    pub fn new(workloads: &[Workload], speed: Speed, peak: Peak) -> Result<Self> {
        let tokens = stated_tokens(workloads);
        let products = |structure| -> Result<_> {
            let mut tally = Tally::default();
            for workload in workloads {
                tally.extend(analytic::count(structure, workload)?)?;
            }
            Products::of(&tally)
        };
        let step_s = match speed {
            Speed::TokensPerSecond(rate) => tokens as f64 / rate,
            Speed::TokensPerSecondPerGpu(rate) => tokens as f64 / (rate * peak.gpus as f64),
            Speed::Seconds(seconds) => seconds,
            // A structure counts layers that run again where its source does.
            Speed::FlopsPerSecondPerGpu(rate, by) => {
                products(by)?.counted(Utilization::Hfu)? as f64 / (rate * peak.gpus as f64)
            }
        };
        let exact = products(Structure::Exact)?;
        let row = |structure, of, flops: u128| {
            let flops_per_s_per_gpu = flops as f64 / step_s / peak.gpus as f64;
            Row {
                structure,
                of,
                flops,
                flops_per_token: flops as f64 / tokens as f64,
                flops_per_s_per_gpu,
                utilization: flops_per_s_per_gpu / peak.peak_flops_per_s,
                of_exact: flops as f64 / exact.model as f64,
            }
        };
        let (mut rows, mut uncounted) = (vec![], vec![]);
        for structure in CONVENTIONS {
            match products(structure) {
                Ok(found) => {
                    rows.push(row(structure, Utilization::Mfu, found.model));
                    if found.recomputed > 0 {
                        let all = found.counted(Utilization::Hfu)?;
                        rows.push(row(structure, Utilization::Hfu, all));
                    }
                }
                Err(e) => match e.downcast_ref() {
                    Some(Error::Flag { why, .. }) => uncounted.push(format!("{structure}: {why}")),
                    _ => return Err(e),
                },
            }
        }
        let tokens_per_s = tokens as f64 / step_s;
        Ok(Self { tokens_per_s, tokens, step_s, peak, rows, uncounted })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        config::{LoraConfig, ModelConfig},
        ledger::Dtype,
        workload::{Rows, Task},
    };

    fn training(preset: &str, batch: u64, seq: u64, recompute: bool) -> Workload {
        let (accumulate, steps, full, clip) = (1, 1, true, true);
        let rows = Rows::Whole;
        let task = Task::Train {
            batch,
            seq,
            accumulate,
            steps,
            full,
            recompute,
            clip,
            moments: Default::default(),
            rows,
        };
        let model = ModelConfig::preset(preset).unwrap();
        Workload {
            model,
            lora: LoraConfig::none(),
            dtype: Dtype::BF16,
            attention: Default::default(),
            task,
        }
    }

    fn peak(gpus: u64) -> Peak {
        let (gpu, source) = ("abacus".into(), "a leaflet".into());
        Peak { gpu, source, year: 1617, gpus, peak: Precision::Bf16, peak_flops_per_s: 1e15 }
    }

    fn row(found: &Published, structure: Structure, of: Utilization) -> Row {
        let row = found.rows.iter().find(|row| row.structure == structure && row.of == of);
        row.unwrap().clone()
    }

    #[test]
    fn conventions_by_hand() {
        let workload = training("qwen2.5-7b", 1, 4096, false);
        let speed = Speed::TokensPerSecond(50_000.0);
        let found = Published::new(&[workload], speed, peak(8)).unwrap();
        assert_eq!((found.tokens, found.step_s), (4096, 4096.0 / 50_000.0));
        // 6 · 7,615,616,512 a token; 28 layers, 28 heads of 128, 4096 of context: 12·L·H·Q·T more.
        let six = row(&found, Structure::SixNd, Utilization::Mfu);
        assert_eq!(six.flops_per_token, 6.0 * 7_615_616_512.0);
        assert!((six.flops_per_s_per_gpu - 6250.0 * six.flops_per_token).abs() < 1e3);
        assert!((six.utilization - six.flops_per_s_per_gpu / 1e15).abs() < 1e-15);
        let palm = row(&found, Structure::Palm, Utilization::Mfu);
        assert_eq!(palm.flops_per_token, six.flops_per_token + 12.0 * 28.0 * 28.0 * 128.0 * 4096.0);
        // Megatron's count of a dense model's training is every product that runs.
        let megatron = row(&found, Structure::Megatron, Utilization::Mfu);
        assert_eq!(megatron.of_exact, 1.0);
        let causal = row(&found, Structure::MegatronCausal, Utilization::Mfu);
        assert_eq!(
            megatron.flops_per_token - causal.flops_per_token,
            6.0 * 28.0 * 28.0 * 128.0 * 4096.0
        );
        // Fused attention's five products backward, not four: a quarter of the backward scores.
        let sdpa = row(&found, Structure::TorchSdpa, Utilization::Mfu);
        assert_eq!(
            sdpa.flops_per_token - row(&found, Structure::Torch, Utilization::Mfu).flops_per_token,
            2.0 * 28.0 * 28.0 * 128.0 * 4096.0
        );
        assert!(found.rows.iter().all(|row| row.of == Utilization::Mfu));
    }

    #[test]
    fn recomputed_products_are_the_hardwares() {
        let speed = Speed::Seconds(0.5);
        let plain = Published::new(&[training("tiny", 2, 8, false)], speed, peak(1)).unwrap();
        let again = Published::new(&[training("tiny", 2, 8, true)], speed, peak(1)).unwrap();
        for structure in [Structure::Exact, Structure::Torch] {
            let mfu = row(&again, structure, Utilization::Mfu);
            assert_eq!(mfu, row(&plain, structure, Utilization::Mfu));
            assert!(row(&again, structure, Utilization::Hfu).flops > mfu.flops);
        }
        assert_eq!((plain.tokens_per_s, plain.step_s), (32.0, 0.5));
        // A figure by a structure that counts them has them in it.
        let torch = row(&again, Structure::Torch, Utilization::Hfu);
        let speed = Speed::FlopsPerSecondPerGpu(torch.flops_per_s_per_gpu, Structure::Torch);
        let found = Published::new(&[training("tiny", 2, 8, true)], speed, peak(1)).unwrap();
        assert!((found.tokens_per_s / 32.0 - 1.0).abs() < 1e-12);
    }

    proptest! {
        /// A speed is the same speed however it is stated.
        #[test]
        fn speeds_are_derived_from_each_other(rate in 1.0f64..1e7, gpus in 1u64..1000, seq in 1u64..300) {
            let workloads = [training("tiny", 3, seq, false)];
            let of = |speed| Published::new(&workloads, speed, peak(gpus)).unwrap();
            let found = of(Speed::TokensPerSecond(rate));
            for row in &found.rows {
                let by = Speed::FlopsPerSecondPerGpu(row.flops_per_s_per_gpu, row.structure);
                prop_assert!((of(by).tokens_per_s / rate - 1.0).abs() < 1e-12);
            }
            let each = of(Speed::TokensPerSecondPerGpu(rate / gpus as f64));
            prop_assert!((each.tokens_per_s / rate - 1.0).abs() < 1e-12);
            prop_assert!((of(Speed::Seconds(found.step_s)).tokens_per_s / rate - 1.0).abs() < 1e-12);
        }
    }
}
