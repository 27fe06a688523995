//! Softmax and SiLU on the CPU in f32, with an exponential that vectorizes: candle's call the C
//! library for each element, which took a fifth of a prefill.

use candle_core::{CpuStorage, InplaceOp1, Layout, Result, bail};
use rayon::prelude::*;

use super::by_row::FEW;

/// exp(x − max) / sum over the last dimension, in place: scores are as large as a layer's other
/// activations together.
pub(super) struct Softmax;

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

/// x / (1 + exp(−x)).
#[inline(always)]
pub(super) fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// dy · s · (1 + x · (1 − s)) into `out`, s = 1 / (1 + exp(−x)).
pub(super) fn silu_grad(x: &[f32], dy: &[f32], out: &mut [f32]) {
    for ((out, &x), dy) in out.iter_mut().zip(x).zip(dy) {
        let s = 1.0 / (1.0 + exp(-x));
        *out = dy * s * (1.0 + x * (1.0 - s));
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

/// eˣ within 2 ulp: x = n ln 2 + r, |r| ≤ ln 2 / 2; eʳ by the Cephes polynomial of degree 6; 2ⁿ
/// into the exponent's bits. No branch, so that loops over it vectorize.
#[inline(always)]
fn exp(x: f32) -> f32 {
    // Beyond these, 2ⁿ is no normal number; below, the result is taken as 0.
    const LOW: f32 = -87.0;
    const HIGH: f32 = 88.0;
    // 1.5 · 2²³: adding it leaves the rounded integer in the low bits of the sum.
    const SHIFT: f32 = 12_582_912.0;
    // ln 2 in two parts, the first exact in few bits.
    const LN2: (f32, f32) = (0.693_359_4, -2.121_944_4e-4);
    let bounded = x.clamp(LOW, HIGH);
    let shifted = bounded.mul_add(std::f32::consts::LOG2_E, SHIFT);
    let n = shifted - SHIFT;
    let r = n.mul_add(-LN2.1, n.mul_add(-LN2.0, bounded));
    let p = 1.987_569_1e-4f32;
    let p = p.mul_add(r, 1.398_199_9e-3);
    let p = p.mul_add(r, 8.333_452e-3);
    let p = p.mul_add(r, 4.166_579_6e-2);
    let p = p.mul_add(r, 0.166_666_65);
    let p = p.mul_add(r, 0.5);
    let p = p.mul_add(r * r, r) + 1.0;
    let value = f32::from_bits(p.to_bits().wrapping_add(shifted.to_bits() << 23));
    if x < LOW {
        0.0
    } else if x <= HIGH {
        value
    } else {
        // Infinite above, and NaN stays NaN.
        x + f32::INFINITY
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Tensor};

    #[test]
    fn exp_is_within_two_ulp() {
        for i in -86_999..88_000 {
            let x = i as f32 * 1e-3;
            let exact = f64::from(x).exp();
            let error = ((f64::from(exp(x)) - exact) / exact).abs();
            assert!(error < 2.0 * f64::from(f32::EPSILON), "{x}: {error}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn they_equal_candles_kernels() {
        for (rows, width) in [(1, 1), (3, 7), (5, 100), (200, 333)] {
            let x = Tensor::randn(0f32, 4., (rows, width), &Device::Cpu).unwrap();
            let close = |a: Tensor, b: Tensor| {
                let worst = (a - b).unwrap().abs().unwrap().max_all().unwrap();
                assert!(worst.to_scalar::<f32>().unwrap() < 1e-6, "{rows} × {width}");
            };
            let theirs = candle_nn::ops::softmax_last_dim(&x).unwrap();
            let ours = x.flatten_all().unwrap().to_vec1().unwrap().into_iter().map(silu);
            let ours: Vec<f32> = ours.collect();
            close(Tensor::from_vec(ours, x.shape(), &Device::Cpu).unwrap(), x.silu().unwrap());
            x.inplace_op1(&Softmax).unwrap();
            close(x, theirs);
        }
    }
}
