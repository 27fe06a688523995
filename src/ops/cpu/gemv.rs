//! A few rows times a weight.
//!
//! Decoding reads every weight once for each token, so it is bound by memory: candle's general
//! product reaches half of what two streams of dot products do, and for bf16 it first writes the
//! whole weight out as f32. Same multiplications, same sums, another order.

use candle_core::{CpuStorage, CustomOp2, DType, Layout, Result, Shape, Tensor, WithDType, bail};
use rayon::prelude::*;

/// Above this many rows the arithmetic, not the memory, is the bound, and the general product wins.
pub(super) const MOST_ROWS: usize = 8;

/// Whether x · b is few rows x (m, k) times a dense weight (n, k), of which b is the transpose.
pub(in crate::ops) fn takes_few_rows(x: &Tensor, b: &Tensor) -> bool {
    let is_transposed = |layout: &Layout| match (layout.dims(), layout.stride()) {
        (&[k, _], &[1, step]) => step == k,
        _ => false,
    };
    let known = x.dtype() == b.dtype() && matches!(x.dtype(), DType::F32 | DType::BF16);
    let few = x.rank() == 2 && x.dims()[0] <= MOST_ROWS;
    few && known && [x, b].iter().all(|t| t.device().is_cpu()) && is_transposed(b.layout())
}

/// x (m, k) · wᵀ for a dense w (n, k), both f32 or bf16, accumulated in f32.
pub(in crate::ops) fn gemv(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op2_no_bwd(w, &Gemv)
}

struct Gemv;

impl CustomOp2 for Gemv {
    fn name(&self) -> &'static str {
        "gemv"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        w: &CpuStorage,
        w_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let ((m, k), (n, w_k)) = (x_layout.shape().dims2()?, w_layout.shape().dims2()?);
        if k != w_k {
            bail!("{k} columns times a weight of {w_k}");
        }
        let out = match (x, w) {
            (CpuStorage::F32(x), CpuStorage::F32(w)) => {
                let out = rows(dense(x, x_layout)?, dense(w, w_layout)?, k, |v| v);
                CpuStorage::F32(transpose(out, m, n))
            }
            (CpuStorage::BF16(x), CpuStorage::BF16(w)) => {
                let x: Vec<f32> = dense(x, x_layout)?.iter().map(|v| v.to_f32()).collect();
                let out = rows(&x, dense(w, w_layout)?, k, |v| v.to_f32());
                let out = transpose(out, m, n);
                CpuStorage::BF16(out.into_iter().map(|v| WithDType::from_f64(v.into())).collect())
            }
            _ => bail!("gemv takes f32 or bf16, both sides alike"),
        };
        Ok((out, (m, n).into()))
    }
}

fn dense<'a, T>(values: &'a [T], layout: &Layout) -> Result<&'a [T]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&values[start..end]),
        None => bail!("gemv takes dense tensors"),
    }
}

/// Every row of `x` with every row of `w`: (m, n).
pub(super) fn by_rows<T: Copy + Sync>(
    x: &[f32],
    w: &[T],
    k: usize,
    widen: impl Fn(T) -> f32 + Sync,
) -> Vec<f32> {
    let (m, n) = (x.len() / k, w.len() / k);
    transpose(rows(x, w, k, widen), m, n)
}

/// Every row of `w` with every row of `x`: (n, m).
fn rows<T: Copy + Sync>(x: &[f32], w: &[T], k: usize, widen: impl Fn(T) -> f32 + Sync) -> Vec<f32> {
    let (m, n) = (x.len() / k, w.len() / k);
    // A few streams a thread even out their speed.
    let per_task = n.div_ceil(4 * rayon::current_num_threads());
    let mut out = vec![0f32; m * n];
    out.par_chunks_mut(per_task * m).zip(w.par_chunks(per_task * k)).for_each(|(out, w)| {
        for (out, w) in out.chunks_exact_mut(m).zip(w.chunks_exact(k)) {
            for (out, x) in out.iter_mut().zip(x.chunks_exact(k)) {
                *out = dot(w, x, &widen);
            }
        }
    });
    out
}

/// Σ w·x in independent lanes, which the compiler turns into vector registers.
pub(super) fn dot<T: Copy>(w: &[T], x: &[f32], widen: impl Fn(T) -> f32) -> f32 {
    const LANES: usize = 32;
    let ((w, w_rest), (x, x_rest)) = (w.as_chunks::<LANES>(), x.as_chunks::<LANES>());
    let mut sums = [0f32; LANES];
    for (w, x) in w.iter().zip(x) {
        for lane in 0..LANES {
            sums[lane] = widen(w[lane]).mul_add(x[lane], sums[lane]);
        }
    }
    let rest: f32 = w_rest.iter().zip(x_rest).map(|(w, x)| widen(*w) * x).sum();
    sums.iter().sum::<f32>() + rest
}

/// (n, m) to (m, n).
fn transpose(values: Vec<f32>, m: usize, n: usize) -> Vec<f32> {
    match m {
        1 => values,
        _ => (0..m).flat_map(|row| (0..n).map(move |i| i * m + row)).map(|i| values[i]).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};

    #[test]
    fn it_equals_candles_product() {
        for (m, k, n) in [(1, 1, 1), (1, 7, 5), (1, 64, 33), (3, 100, 9), (8, 33, 130)] {
            let x = Tensor::randn(0f32, 1., (m, k), &Device::Cpu).unwrap();
            let w = Tensor::randn(0f32, 1., (n, k), &Device::Cpu).unwrap();
            for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::BF16, 0.1)] {
                let (x, w) = (x.to_dtype(dtype).unwrap(), w.to_dtype(dtype).unwrap());
                let theirs = x.matmul(&w.t().unwrap()).unwrap();
                let ours = gemv(&x, &w).unwrap();
                let worst = (ours - theirs).unwrap().abs().unwrap().max_all().unwrap();
                let worst = worst.to_dtype(DType::F32).unwrap().to_scalar::<f32>().unwrap();
                assert!(worst <= tolerance * (k as f32).sqrt(), "{m} {k} {n} {dtype:?}: {worst}");
            }
        }
    }
}
