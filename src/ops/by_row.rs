//! Gradients of row-wise ops: one pass over two tensors on the CPU.

use candle_core::{CpuStorage, CustomOp2, DType, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

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
        if shape != b_layout.shape() {
            bail!("{shape:?} beside {:?}", b_layout.shape());
        }
        let (a, b) = (&a[in_a.0..in_a.1], &b[in_b.0..in_b.1]);
        let width = shape.dims().last().copied().unwrap_or(1).max(1);
        let mut out = vec![0f32; a.len()];
        let rows = a.par_chunks(width).zip(b.par_chunks(width)).zip(out.par_chunks_mut(width));
        let few = FEW.div_ceil(width);
        rows.with_min_len(few).for_each(|((a, b), out)| (self.0)(a, b, out));
        Ok((CpuStorage::F32(out), shape.clone()))
    }
}

/// Fewer elements than this are not worth another thread.
const FEW: usize = 1 << 14;

/// Σ a·b in independent lanes, which the compiler turns into vector registers.
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    const LANES: usize = 32;
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let mut sums = [0f32; LANES];
    for (a, b) in a.iter().zip(b) {
        for lane in 0..LANES {
            sums[lane] = a[lane].mul_add(b[lane], sums[lane]);
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f32>() + rest
}
