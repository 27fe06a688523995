//! Choosing tokens on a GPU, by the rules of [`super::sample`]: nothing but tokens goes to the host.

use candle_core::DType;

use super::{
    Sampler, Tensor,
    cuda::{Arg, File, Kernels},
    sample::{Rule, finite},
};
use crate::{
    error::Result,
    ledger::{Dtype, Op},
    meter::At,
};

/// Blocks that draw a row's token together (`PEERS` in choose.cu).
const PEERS: usize = 8;

/// The state of a choice for each row, step after step, on its device.
pub(super) struct Choosing {
    kernels: Kernels,
    rule: Rule,
    rows: usize,
    width: usize,
    /// Tokens that are held before the first step.
    first: usize,
    /// (1, rows), the latest tokens.
    pub ids: candle_core::Tensor,
    /// One: tokens held, in front of the latest.
    pub held: candle_core::Tensor,
    chosen: candle_core::Tensor, // (steps, rows), as `ranked` in choose.cu
    done: candle_core::Tensor,   // one, zero between launches
    seen: Option<candle_core::Tensor>, // (rows, width), 1 where seen
    means: Means,
}

/// What one choice takes beside the logits.
enum Means {
    Largest {
        best: candle_core::Tensor, // (1, rows), zeros between launches
    },
    Drawn {
        probabilities: candle_core::Tensor, // (rows, width)
        uniforms: candle_core::Tensor,      // (steps, rows)
    },
}

/// One token for each row of `logits` (…, V), where their device has kernels for it.
///
/// # Errors
/// Logits that are not finite, or the device's.
pub(super) fn once(
    at: At,
    sampler: &mut Sampler,
    logits: &Tensor,
    seen: &[Vec<u32>],
) -> Result<Option<Vec<u32>>> {
    if !logits.device().is_cuda() {
        return Ok(None);
    }
    let logits = match logits.data.dtype() {
        DType::F16 => logits.data.to_dtype(DType::F32)?, // for which there are no kernels
        _ => logits.data.contiguous()?,
    };
    // Rows are a grid's second dimension.
    let kernels = Kernels::of(&[&logits]).filter(|_| seen.len() <= 65_535);
    let Some(kernels) = kernels else { return Ok(None) };
    let width = logits.dim(candle_core::D::Minus1)?;
    let choosing = Choosing::new(kernels, sampler, seen, width, 0, 1)?;
    choosing.choose(at, &logits, false)?;
    Ok(choosing.chosen(0, 1)?.pop())
}

impl Choosing {
    /// For `steps` choices among `width` tokens for each of `contexts`, whose last token comes
    /// after `held` others. Draws as often from each row's generator.
    ///
    /// # Errors
    /// The device's, out of memory among them.
    pub fn new(
        kernels: Kernels,
        sampler: &mut Sampler,
        contexts: &[Vec<u32>],
        width: usize,
        held: usize,
        steps: usize,
    ) -> Result<Self> {
        let (device, rule, rows) = (kernels.device(), sampler.rule(), contexts.len());
        let zeros = |shape: (usize, usize), dtype| candle_core::Tensor::zeros(shape, dtype, device);
        let seen = rule.penalizes().then(|| {
            let mut seen = vec![0u8; rows * width];
            for (row, context) in seen.chunks_exact_mut(width).zip(contexts) {
                context.iter().for_each(|&id| row[id as usize] = 1);
            }
            candle_core::Tensor::from_vec(seen, (rows, width), device)
        });
        let means = match rule.is_greedy() {
            true => Means::Largest { best: zeros((1, rows), DType::I64)? },
            false => {
                let uniforms: Vec<f32> = (0..steps).flat_map(|_| sampler.uniforms()).collect();
                Means::Drawn {
                    probabilities: zeros((rows, width), DType::F32)?,
                    uniforms: candle_core::Tensor::from_vec(uniforms, (steps, rows), device)?,
                }
            }
        };
        let ids = contexts.iter().map(|c| c.last().copied().unwrap_or(0)).collect();
        Ok(Self {
            rule,
            rows,
            width,
            first: held,
            ids: candle_core::Tensor::from_vec(ids, (1, rows), device)?,
            held: candle_core::Tensor::from_vec(vec![held as u32], (1, 1), device)?,
            chosen: zeros((steps.max(1), rows), DType::I64)?,
            done: zeros((1, 1), DType::U32)?,
            seen: seen.transpose()?,
            means,
            kernels,
        })
    }

    /// A token for each row of `logits` (rows, width): the row's next input. Where a recording
    /// stands in for the launch, it is reported alone.
    ///
    /// # Errors
    /// The device's.
    pub fn choose(&self, at: At, logits: &candle_core::Tensor, replaying: bool) -> Result<()> {
        let (rows, width) = (self.rows as u64, self.width as u64);
        if self.rule.penalizes() {
            at.ran(Op::RepeatPenalty { rows, width }, Dtype::F32);
        }
        let last = match self.means {
            Means::Largest { .. } => Op::Argmax { rows, width },
            Means::Drawn { .. } => {
                at.ran(Op::Scale { n: rows * width }, Dtype::F32);
                at.ran(Op::Softmax { rows, width }, Dtype::F32);
                let width = self.rule.fewer_than(self.width).map_or(width, |k| k as u64);
                if self.rule.sampling.top_p.is_some() {
                    at.ran(Op::Nucleus { rows, width }, Dtype::F32);
                }
                Op::Draw { rows, width }
            }
        };
        at.run(last, Dtype::F32, logits.device(), || match replaying {
            true => Ok(()),
            false => self.launch(logits),
        })
    }

    fn launch(&self, logits: &candle_core::Tensor) -> candle_core::Result<()> {
        let (less, more) = self.rule.penalties;
        let all = [
            Arg::Of(&self.ids),
            Arg::Of(&self.held),
            Arg::Of(&self.done),
            Arg::Of(&self.chosen),
            Arg::U32(self.first as u32),
            Arg::U32(self.rows as u32),
            Arg::U32(self.width as u32),
            self.seen.as_ref().into(),
            Arg::F32(less),
            Arg::F32(more),
            Arg::Of(logits),
        ];
        let (name, blocks, block, own) = match &self.means {
            Means::Largest { best } => {
                let blocks = self.width.div_ceil(256 * 8).min(528usize.div_ceil(self.rows));
                ("choose", blocks, 256, vec![Arg::Of(best)])
            }
            Means::Drawn { probabilities, uniforms } => {
                let top_k = self.rule.fewer_than(self.width).unwrap_or(0);
                // A p that f32 has no number for still keeps the likeliest.
                let least = f32::MIN_POSITIVE;
                let top_p = self.rule.sampling.top_p.map_or(0.0, |p| (p as f32).max(least));
                let own = vec![
                    Arg::Of(probabilities),
                    Arg::Of(uniforms),
                    Arg::F32(self.rule.inverse_temperature),
                    Arg::U32(top_k as u32),
                    Arg::F32(top_p),
                ];
                ("draw", PEERS, 1024, own)
            }
        };
        let name = format!("{name}_{}", self.kernels.suffix());
        let grid = [blocks as u64, self.rows as u64, 1];
        self.kernels.launch(File::Choose, &name, grid, block, &[&all[..], &own].concat())
    }

    /// The tokens of `steps` steps after the first `done` ones, step after step.
    ///
    /// # Errors
    /// Logits that are not finite.
    pub fn chosen(&self, done: usize, steps: usize) -> Result<Vec<Vec<u32>>> {
        let chosen = self.chosen.narrow(0, done, steps)?.to_vec2::<i64>()?;
        let token = |choice: i64| {
            let (number, token) = unranked(choice);
            finite(number).map(|()| token)
        };
        chosen.into_iter().map(|row| row.into_iter().map(token).collect()).collect()
    }
}

/// What `ranked` in choose.cu made one number of: a value and its index.
fn unranked(key: i64) -> (f32, u32) {
    let (bits, index) = ((key >> 32) as u32, !(key as u32));
    let bits = if bits >> 31 == 1 { bits & 0x7fff_ffff } else { !bits };
    (f32::from_bits(bits), index)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rank_gives_back_value_and_index() {
        // As `ranked` in choose.cu: the sign's bit flipped, or all bits of a negative value.
        let ranked = |value: f32, index: u32| {
            let bits = value.to_bits();
            let bits = if bits >> 31 == 1 { !bits } else { bits | 0x8000_0000 };
            (u64::from(bits) << 32 | u64::from(!index)) as i64
        };
        for (value, index) in [(0.5, 7), (-3.25, 0), (0.0, 151_935), (f32::MAX, 1)] {
            assert_eq!(unranked(ranked(value, index)), (value, index));
        }
        assert!(unranked(-1).0.is_nan());
    }
}
