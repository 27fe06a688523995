//! Choosing tokens on a GPU, by the rules of [`super::sample`]: nothing but tokens goes to the host.

use candle_core::{DType, Device};

use super::{
    Ids, Kernel, KvCache, Nodes, Ops, Sampler, Tensor,
    cache::Counted,
    cuda::{Choose, How, Kernels},
    sample::{Rule, finite},
};
use crate::{
    error::Result,
    ledger::{Dtype, Op},
    meter::At,
};

/// The state of a choice for each row, step after step, on its device.
pub struct Choosing {
    kernels: Kernels,
    rule: Rule,
    /// Tokens that were held before the first step.
    first: usize,
    ids: candle_core::Tensor,          // (1, rows), the latest tokens
    chosen: candle_core::Tensor,       // (steps, rows), as `ranked` in choose.cu
    done: candle_core::Tensor,         // one, zero between launches
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

impl std::fmt::Debug for Choosing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Choosing({:?} after {} tokens)", self.rule.sampling, self.first)
    }
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
    let width = logits.dim(candle_core::D::Minus1)?;
    let logits = logits.reshape(((), width))?;
    // Rows are a grid's second dimension.
    let kernels = Kernels::of(&[&logits]).filter(|_| seen.len() <= 65_535);
    let Some(kernels) = kernels else { return Ok(None) };
    let held = candle_core::Tensor::zeros((1, 1), DType::U32, kernels.device())?;
    let choosing = Choosing::new(kernels, sampler, seen, width, 0, 1)?;
    at.launch(&Chosen { choosing: &choosing, logits: &logits, held: &held })?;
    Ok(choosing.chosen(0, 1)?.pop())
}

impl Choosing {
    /// For `steps` choices among `width` tokens for each of `contexts`, whose last token comes
    /// after `held` others. Draws as often from each row's generator.
    ///
    /// # Errors
    /// The device's, out of memory among them.
    fn new(
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
            first: held,
            ids: candle_core::Tensor::from_vec(ids, (1, rows), device)?,
            chosen: zeros((steps.max(1), rows), DType::I64)?,
            done: zeros((1, 1), DType::U32)?,
            seen: seen.transpose()?,
            means,
            kernels,
        })
    }

    /// The same on top of `cache`, which from here on is counted on its device; none where that has
    /// no kernels for tensors of `dtype`.
    ///
    /// # Errors
    /// The device's, out of memory among them.
    pub fn on_top_of(
        cache: &mut KvCache,
        sampler: &mut Sampler,
        contexts: &[Vec<u32>],
        width: usize,
        steps: usize,
    ) -> Result<Option<Self>> {
        let (keys, _) = cache.layer(0)?;
        let kernels = Kernels::on(keys.device(), keys.data.dtype());
        // Rows are a grid's second dimension, and logits are read in packs of eight.
        let serves = contexts.len() <= 65_535 && width.is_multiple_of(8);
        let Some(kernels) = kernels.filter(|_| serves) else { return Ok(None) };
        cache.count_on_device()?;
        Self::new(kernels, sampler, contexts, width, cache.held(), steps).map(Some)
    }

    /// The tokens to feed next.
    pub fn ids(&self) -> Ids<'_> {
        Ids::Device(&self.ids)
    }

    /// A token for each row of `logits` (rows, 1, width): the row's next input. The device counts
    /// the one that was fed as held.
    ///
    /// # Errors
    /// The device's.
    pub fn choose(&self, at: At, logits: &Tensor, cache: &KvCache) -> Result<()> {
        let Some(Counted { held, .. }) = cache.on_device() else {
            anyhow::bail!("the device does not count what the cache holds");
        };
        let width = logits.data.dim(candle_core::D::Minus1)?;
        let logits = logits.data.reshape(((), width))?;
        at.launch(&Chosen { choosing: self, logits: &logits, held })
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

/// A choice for each row, as one launch.
struct Chosen<'a> {
    choosing: &'a Choosing,
    logits: &'a candle_core::Tensor, // (rows, width)
    held: &'a candle_core::Tensor,   // one
}

impl Kernel for Chosen<'_> {
    type Output = ();

    fn device(&self) -> &Device {
        self.logits.device()
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        let (rows, width) = self.logits.dims2()?;
        let (rule, fewer) = (&self.choosing.rule, self.choosing.rule.fewer_than(width));
        let (rows, width) = (rows as u64, width as u64);
        let mut add = |op| ops.add(op, Dtype::F32);
        if rule.penalizes() {
            add(Op::RepeatPenalty { rows, width });
        }
        match self.choosing.means {
            Means::Largest { .. } => add(Op::Argmax { rows, width }),
            Means::Drawn { .. } => {
                add(Op::Scale { n: rows * width });
                add(Op::Softmax { rows, width });
                let width = fewer.map_or(width, |k| k as u64);
                if rule.sampling.top_p.is_some() {
                    add(Op::Nucleus { rows, width });
                }
                add(Op::Draw { rows, width });
            }
        }
        Ok(())
    }

    fn run(&self, nodes: &Nodes) -> candle_core::Result<()> {
        let Choosing { kernels, rule, first, ids, chosen, done, seen, means } = self.choosing;
        let how = match means {
            Means::Largest { best } => How::Largest { best },
            Means::Drawn { probabilities, uniforms } => How::Drawn {
                probabilities,
                uniforms,
                inverse_temperature: rule.inverse_temperature,
                top_k: rule.fewer_than(self.logits.dim(1)?).unwrap_or(0),
                // A p that f32 has no number for still keeps the likeliest.
                top_p: rule.sampling.top_p.map_or(0.0, |p| (p as f32).max(f32::MIN_POSITIVE)),
            },
        };
        let (logits, held, penalties) = (self.logits, self.held, rule.penalties);
        let (seen, first) = (seen.as_ref(), *first);
        kernels
            .choose(nodes, Choose { ids, held, done, chosen, first, seen, penalties, logits, how })
    }
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
