//! Softmax.

use candle_core::{CpuStorage, InplaceOp1, Layout, Result, Tensor, bail};
use rayon::prelude::*;

use super::{
    by_row::{FEW, by_row},
    exp::exp,
    gemv::dot,
};

/// exp(x − max) / sum over the last dimension of dense f32, in place.
pub(in crate::ops) fn softmax(x: &Tensor) -> Result<()> {
    x.inplace_op1(&Softmax)
}

/// y · (dy − Σ y·dy), row by row, in any type.
pub(in crate::ops) fn softmax_grad(y: &Tensor, dy: &Tensor) -> Result<Tensor> {
    by_row(y, dy, |y, dy, out| {
        let sum = dot(y, dy, |v| v);
        for ((out, y), dy) in out.iter_mut().zip(y).zip(dy) {
            *out = y * (dy - sum);
        }
    })
}

/// In place, for scores are as large as a layer's other activations together.
struct Softmax;

impl InplaceOp1 for Softmax {
    fn name(&self) -> &'static str {
        "softmax"
    }

    fn cpu_fwd(&self, x: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let width = layout.dims().last().copied().unwrap_or(1).max(1);
        let (CpuStorage::F32(x), Some((start, end))) = (x, layout.contiguous_offsets()) else {
            bail!("takes dense f32");
        };
        let x = &mut x[start..end];
        match x.len() < FEW {
            true => x.chunks_mut(width).for_each(softmax_row),
            false => x.par_chunks_mut(width).for_each(softmax_row),
        }
        Ok(())
    }
}

/// exp(x − max) in the place of each x of a row; (max, sum of those).
pub(super) fn exponentials(row: &mut [f32]) -> (f32, f32) {
    let max = reduce(row, f32::NEG_INFINITY, f32::max);
    row.iter_mut().for_each(|x| *x = exp(*x - max));
    (max, reduce(row, 0.0, |a, b| a + b))
}

fn softmax_row(row: &mut [f32]) {
    let (_, sum) = exponentials(row);
    row.iter_mut().for_each(|x| *x /= sum);
}

/// A fold in independent lanes, which the compiler turns into vector registers.
fn reduce(x: &[f32], start: f32, f: impl Fn(f32, f32) -> f32) -> f32 {
    const LANES: usize = 16;
    let (chunks, rest) = x.as_chunks::<LANES>();
    let mut lanes = [start; LANES];
    for chunk in chunks {
        for lane in 0..LANES {
            lanes[lane] = f(lanes[lane], chunk[lane]);
        }
    }
    lanes.iter().chain(rest).fold(start, |a, &b| f(a, b))
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn it_equals_candles() {
        for (rows, width) in [(1, 1), (3, 7), (5, 100), (200, 333)] {
            let x = Tensor::randn(0f32, 4., (rows, width), &Device::Cpu).unwrap();
            let theirs = candle_nn::ops::softmax_last_dim(&x).unwrap();
            softmax(&x).unwrap();
            let worst = (x - theirs).unwrap().abs().unwrap().max_all().unwrap();
            assert!(worst.to_scalar::<f32>().unwrap() < 1e-6, "{rows} × {width}");
        }
    }
}
