//! Cross-entropy over the vocabulary, in the place of the logits.

use std::sync::{Mutex, PoisonError};

use candle_core::{CpuStorage, InplaceOp1, Layout, Result, Tensor, bail};
use rayon::prelude::*;

use super::softmax::exponentials;

/// Logits (rows, V) → exp(logit − max), in place; (losses, sums) of the rows.
pub(in crate::ops) fn cross_entropy(
    logits: &Tensor,
    targets: &[u32],
) -> Result<(Vec<f32>, Vec<f32>)> {
    let kernel = Exponentials { targets, out: Mutex::default() };
    logits.inplace_op1(&kernel)?;
    Ok(kernel.out.into_inner().unwrap_or_else(PoisonError::into_inner))
}

/// Exponentials (rows, V) → weight · (exponential / sum − 1 at the target), in place.
pub(in crate::ops) fn cross_entropy_grad(
    exponentials: &Tensor,
    targets: &[u32],
    weights: &[f32],
    sums: &[f32],
) -> Result<()> {
    exponentials.inplace_op1(&Gradient { targets, weights, sums })
}

struct Exponentials<'a> {
    targets: &'a [u32],
    out: Mutex<(Vec<f32>, Vec<f32>)>,
}

impl InplaceOp1 for Exponentials<'_> {
    fn name(&self) -> &'static str {
        "cross_entropy"
    }

    fn cpu_fwd(&self, x: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let (x, width) = rows(x, layout)?;
        let row = |(x, &target): (&mut [f32], &u32)| {
            let logit = x[target as usize];
            let (max, sum) = exponentials(x);
            (sum.ln() - (logit - max), sum)
        };
        let out = x.par_chunks_mut(width).zip(self.targets).map(row).unzip();
        *self.out.lock().unwrap_or_else(PoisonError::into_inner) = out;
        Ok(())
    }
}

struct Gradient<'a> {
    targets: &'a [u32],
    weights: &'a [f32],
    sums: &'a [f32],
}

impl InplaceOp1 for Gradient<'_> {
    fn name(&self) -> &'static str {
        "cross_entropy_grad"
    }

    fn cpu_fwd(&self, x: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let (x, width) = rows(x, layout)?;
        let of_rows = self.targets.par_iter().zip(self.weights).zip(self.sums);
        x.par_chunks_mut(width).zip(of_rows).for_each(|(x, ((&target, &weight), &sum))| {
            let factor = weight / sum;
            x.iter_mut().for_each(|x| *x *= factor);
            x[target as usize] -= weight;
        });
        Ok(())
    }
}

/// The dense f32 elements of a row-major matrix, and its width.
fn rows<'a>(x: &'a mut CpuStorage, layout: &Layout) -> Result<(&'a mut [f32], usize)> {
    let width = layout.dims().last().copied().unwrap_or(1).max(1);
    match (x, layout.contiguous_offsets()) {
        (CpuStorage::F32(x), Some((start, end))) => Ok((&mut x[start..end], width)),
        _ => bail!("takes dense f32"),
    }
}
