//! Row-wise and element-wise ops: one pass over two tensors.

use std::mem::MaybeUninit;

use candle_core::{CpuStorage, CustomOp2, InplaceOp2, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::{
    exp::{gelu, gelu_grad, silu, silu_grad},
    widened,
};
use crate::ops::elementwise::Element;

/// One output for each element of `a`, in its type; `b` is one element, or again and again has the
/// shape of `a`. Both are dense f32, but for the gradients, which widen any type to it.
pub(in crate::ops) fn map(what: Element, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let one = match b.elem_count() {
        1 => b.flatten_all()?.to_vec1::<f32>().map(|b| b[0]).unwrap_or(f32::NAN),
        _ => f32::NAN,
    };
    match what {
        Element::Add => each(a, b, |a, b| a + b),
        Element::Mul => each(a, b, |a, b| a * b),
        Element::Scale => each(a, a, |a, _| a * one),
        Element::Shift => each(a, a, |a, _| a + one),
        Element::Silu => each(a, a, |a, _| silu(a)),
        Element::Gelu => each(a, a, |a, _| gelu(a)),
        Element::SiluGrad => by_row(a, b, silu_grad),
        Element::GeluGrad => by_row(a, b, gelu_grad),
    }
}

fn each(a: &Tensor, b: &Tensor, f: impl Fn(f32, f32) -> f32 + Send + Sync) -> Result<Tensor> {
    let row = |a: &[f32], b: &[f32], out: &mut [f32]| {
        for ((out, &a), &b) in out.iter_mut().zip(a).zip(b) {
            *out = f(a, b);
        }
    };
    a.apply_op2_no_bwd(b, &ByRow(row))
}

/// sum += b, both dense f32 of one shape.
pub(in crate::ops) fn add_into(sum: &Tensor, b: &Tensor) -> Result<()> {
    sum.inplace_op2(b, &AddInto)
}

struct AddInto;

impl InplaceOp2 for AddInto {
    fn name(&self) -> &'static str {
        "add_into"
    }

    fn cpu_fwd(
        &self,
        sum: &mut CpuStorage,
        sum_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> Result<()> {
        let ranges = (sum_layout.contiguous_offsets(), b_layout.contiguous_offsets());
        let (CpuStorage::F32(sum), CpuStorage::F32(b), (Some(in_sum), Some(in_b))) =
            (sum, b, ranges)
        else {
            bail!("takes dense f32");
        };
        if sum_layout.dims() != b_layout.dims() {
            bail!("{:?} beside {:?}", sum_layout.shape(), b_layout.shape());
        }
        let (sum, b) = (&mut sum[in_sum.0..in_sum.1], &b[in_b.0..in_b.1]);
        let add = |(sum, b): (&mut [f32], &[f32])| {
            sum.iter_mut().zip(b).for_each(|(sum, b)| *sum += b);
        };
        match sum.len() < FEW {
            true => add((sum, b)),
            false => sum.par_chunks_mut(FEW).zip(b.par_chunks(FEW)).for_each(add),
        }
        Ok(())
    }
}

/// `f(a's row, b's row, out's row)` over the rows, along the last dimension, of two tensors of one
/// shape and any type, widened to f32. In `a`'s type.
pub(super) fn by_row(
    a: &Tensor,
    b: &Tensor,
    f: impl Fn(&[f32], &[f32], &mut [f32]) + Send + Sync,
) -> Result<Tensor> {
    widened(a)?.apply_op2_no_bwd(&widened(b)?, &ByRow(f))?.to_dtype(a.dtype())
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
