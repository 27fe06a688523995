//! Megatron-LM's log of a training with `--log-throughput`.
//!
//! Source: `training_log` in megatron/training/training.py of NVIDIA/Megatron-LM, commit d98e8a6
//! (August 2026). A line gives `elapsed time per iteration (ms)` and `throughput per GPU
//! (TFLOP/s/GPU)`, one decimal each; their product by the GPUs is `num_floating_point_operations` of
//! an iteration. Its count has the vocabulary as padded (`--make-vocab-size-divisible-by`).

use super::{Fact, Stated, Told, only};
use crate::{
    analytic::Structure,
    prices::Prices,
    workload::{Task, Workload},
};

const TIME: &str = "elapsed time per iteration (ms):";
const RATE: &str = "throughput per GPU (TFLOP/s/GPU):";
const BATCH: &str = "global batch size:";
const WORLD: &str = "using world size:";

/// Iterations of one size.
#[derive(Debug)]
pub(super) struct Log {
    /// Bounds of each logged iteration's FLOPs on one GPU, in quarters of 10⁷.
    lines: Vec<[u128; 2]>,
    /// The same as printed, of the line that leaves least room.
    printed: u128,
    batch: Option<u64>,
    gpus: Option<u64>,
}

pub(super) fn is_one(text: &str) -> bool {
    text.contains(TIME)
}

impl Log {
    pub(super) fn read(text: &str) -> Result<Self, String> {
        let (mut lines, mut batches, mut worlds, mut tightest) = (vec![], vec![], vec![], None);
        for (index, line) in text.lines().enumerate() {
            if let Some(world) = after(line, WORLD) {
                worlds.push(whole(world, index)?);
            }
            let (Some(time), Some(rate)) = (after(line, TIME), after(line, RATE)) else { continue };
            let [time, rate] = [tenths(time, index)?, tenths(rate, index)?];
            let bound = |time: u128, rate: u128| time.checked_mul(rate).filter(|n| *n < 1 << 90);
            let most = bound(2 * time + 1, 2 * rate + 1);
            let most = most.ok_or_else(|| format!("line {}: absurd figures", index + 1))?;
            let least = (2 * time).saturating_sub(1) * (2 * rate).saturating_sub(1);
            if tightest.is_none_or(|(room, _)| most - least < room) {
                tightest = Some((most - least, 4 * time * rate));
            }
            lines.push([least, most]);
            if let Some(batch) = after(line, BATCH) {
                batches.push(whole(batch, index)?);
            }
        }
        let same = |values: &[u64], what: &str| match values.iter().find(|v| **v != values[0]) {
            Some(other) => {
                Err(format!("has {what} of {} and {other}; keep lines of one", values[0]))
            }
            None => Ok(values.first().copied()),
        };
        let (batch, gpus) = (same(&batches, "global batches")?, same(&worlds, "world sizes")?);
        let (_, printed) = tightest.ok_or("lacks throughputs: run with --log-throughput")?;
        if gpus == Some(0) {
            return Err("has a world size of 0".into());
        }
        Ok(Self { lines, printed, batch, gpus })
    }

    pub(super) fn told(&self, workload: &Workload, gpus: Option<u64>) -> Result<Told, String> {
        let Task::Train { batch, accumulate, steps, .. } = workload.task else {
            return Err(only("train"));
        };
        let gpus = match (self.gpus, gpus) {
            (Some(own), Some(given)) if own != given => {
                return Err(format!("ran on {own} GPUs, and --gpus says {given}"));
            }
            (own, given) => own.or(given).ok_or(super::PER_GPU)?,
        };
        let least = self.lines.iter().map(|[least, _]| *least).max().unwrap_or(0);
        let most = self.lines.iter().map(|[_, most]| *most).min().unwrap_or(0);
        if least > most {
            return Err("has iterations of different FLOPs; keep lines of one kind".into());
        }
        // Quarters of 0.1 ms × 0.1 TFLOP/s, which is 10⁷ FLOPs.
        let printed = self.printed.clamp(least, most);
        let iteration = Stated { flops: printed, least, most }.times(2_500_000 * u128::from(gpus));
        let stated = iteration.and_then(|one| one.times(steps.into()));
        let of = self.lines.len();
        Ok(Told {
            structures: &[Structure::MegatronCausal, Structure::Megatron],
            prices: Prices::matmul(),
            stated: Some(stated.ok_or("does not fit 126 bits, so often run")?),
            seconds: None,
            facts: self
                .batch
                .map(|size| {
                    let sequences = u128::from(batch) * u128::from(accumulate);
                    Fact::new("sequences a step", size, sequences)
                })
                .into_iter()
                .collect(),
            notes: vec![format!(
                "time × throughput × {gpus} GPUs of an iteration, which {of} lines bound, × {steps} steps"
            )],
        })
    }
}

/// What follows `label` up to the next bar, comma or end of line.
fn after<'a>(line: &'a str, label: &str) -> Option<&'a str> {
    let (_, rest) = line.split_once(label)?;
    Some(rest.split(['|', ',']).next().unwrap_or(rest).trim())
}

fn whole(text: &str, index: usize) -> Result<u64, String> {
    text.parse().map_err(|_| format!("line {}: `{text}` is no whole number", index + 1))
}

/// A number of one decimal, in tenths.
fn tenths(text: &str, index: usize) -> Result<u128, String> {
    let found = text.split_once('.').filter(|(_, fraction)| fraction.len() == 1);
    let digits = found.map(|(whole, fraction)| format!("{whole}{fraction}"));
    let value = digits.filter(|d| d.len() < 18 && d.bytes().all(|b| b.is_ascii_digit()));
    let value = value.and_then(|digits| digits.parse().ok());
    value.ok_or_else(|| format!("line {}: `{text}` is no number of one decimal", index + 1))
}
