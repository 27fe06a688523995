//! Row-wise and element-wise ops: one pass over two tensors, on the CPU's threads in f32.

use std::mem::MaybeUninit;

use candle_core::{CpuStorage, CustomOp2, DType, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::cuda::Kernels;

/// `on_cpu(a's row, b's row, out's row)` over the rows, along the last dimension, of two tensors
/// of one shape, in f32; elsewhere `composed` of the device's own kernels. In `a`'s type.
pub(super) fn by_row(
    a: &Tensor,
    b: &Tensor,
    on_cpu: impl Fn(&[f32], &[f32], &mut [f32]) + Send + Sync,
    composed: impl FnOnce(&Tensor, &Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let f32 = |t: &Tensor| t.to_dtype(DType::F32)?.contiguous();
    let (wide_a, wide_b) = (f32(a)?, f32(b)?);
    let out = match a.device().is_cpu() {
        true => wide_a.apply_op2_no_bwd(&wide_b, &ByRow(on_cpu))?,
        false => composed(&wide_a, &wide_b)?,
    };
    out.to_dtype(a.dtype())
}

/// `ours(a's element, b's element)` where both are dense f32 on the CPU and `b`, again and again,
/// has the shape of `a`; by the kernel `name` on a GPU; else `theirs`.
pub(super) fn by_element(
    name: &str,
    a: &Tensor,
    b: &Tensor,
    ours: impl Fn(f32, f32) -> f32 + Send + Sync,
    theirs: impl FnOnce() -> Result<Tensor>,
) -> Result<Tensor> {
    let repeats = b.rank() > 0 && a.dims().ends_with(b.dims());
    let on_cpu = |a: &[f32], b: &[f32], out: &mut [f32]| {
        for ((out, &a), &b) in out.iter_mut().zip(a).zip(b) {
            *out = ours(a, b);
        }
    };
    if is_dense_f32_on_cpu(a) && is_dense_f32_on_cpu(b) && repeats {
        return a.apply_op2_no_bwd(b, &ByRow(on_cpu));
    }
    match Kernels::of(&[a, b]).filter(|_| repeats) {
        Some(kernels) => kernels.map(name, a, b),
        None => theirs(),
    }
}

/// Whether the CPU's own f32 kernels can take it.
pub(super) fn is_dense_f32_on_cpu(t: &Tensor) -> bool {
    t.device().is_cpu() && t.dtype() == DType::F32 && t.is_contiguous()
}

struct ByRow<F>(F);

impl<F: Fn(&[f32], &[f32], &mut [f32]) + Send + Sync> CustomOp2 for ByRow<F> {
    fn name(&self) -> &'static str {
        "by_row"
    }

    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        a_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let shape = a_layout.shape();
        let ranges = (a_layout.contiguous_offsets(), b_layout.contiguous_offsets());
        let (CpuStorage::F32(a), CpuStorage::F32(b), (Some(in_a), Some(in_b))) = (a, b, ranges)
        else {
            bail!("takes dense f32");
        };
        if !shape.dims().ends_with(b_layout.dims()) {
            bail!("{shape:?} beside {:?}", b_layout.shape());
        }
        let (a, b) = (&a[in_a.0..in_a.1], &b[in_b.0..in_b.1]);
        let width = shape.dims().last().copied().unwrap_or(1).max(1);
        let out = rows(a.len(), width, |start, out| {
            (self.0)(&a[start..][..width], &b[start % b.len()..][..width], out);
        });
        Ok((CpuStorage::F32(out), shape.clone()))
    }
}

/// `n` new values, filled row by row: `fill(index of the first, row)`, rows being zeros until then.
fn rows(n: usize, width: usize, fill: impl Fn(usize, &mut [f32]) + Send + Sync) -> Vec<f32> {
    let mut out = Vec::with_capacity(n);
    let fill = |(row, out): (usize, &mut [MaybeUninit<f32>])| {
        // By the thread that fills it, while it is in the cache: zeros of the whole vector at once
        // would go to memory and back.
        out.fill(MaybeUninit::new(0.0));
        // SAFETY: just written.
        fill(row * width, unsafe { out.assume_init_mut() });
    };
    let free = &mut out.spare_capacity_mut()[..n];
    match n < FEW {
        true => free.chunks_mut(width).enumerate().for_each(fill),
        false => {
            let rows = free.par_chunks_mut(width).enumerate();
            rows.with_min_len(FEW.div_ceil(width)).for_each(fill);
        }
    }
    // SAFETY: every chunk was written.
    unsafe { out.set_len(n) };
    out
}

/// Fewer elements than this are not worth another thread.
pub(super) const FEW: usize = 1 << 14;
