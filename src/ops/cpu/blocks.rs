//! Rows of scores whose maximum, sum and dot product with their gradient are numbers of their own: of
//! blocked attention.

use std::sync::{Mutex, PoisonError};

use candle_core::{CpuStorage, InplaceOp1, InplaceOp2, InplaceOp3, Layout, Result, Tensor, bail};
use rayon::prelude::*;

use super::{by_row::FEW, exp::exp, gemv::dot, softmax::exponentials};

/// exp(x − max) / sum over the last dimension of dense f32 (…, w), in place; gives (…, 2), each row's
/// maximum and sum.
pub(in crate::ops) fn softmax_kept(x: &Tensor) -> Result<Tensor> {
    let kept = Kept::default();
    x.inplace_op1(&kept)?;
    let kept = kept.0.into_inner().unwrap_or_else(PoisonError::into_inner);
    Tensor::from_vec(kept, with_columns(x, 2), x.device())
}

/// The same from what [`softmax_kept`] gave.
pub(in crate::ops) fn softmax_again(x: &Tensor, kept: &Tensor) -> Result<()> {
    x.inplace_op2(kept, &Again)
}

/// The dot product of each two rows of dense f32 (…, w): (…, 1).
pub(in crate::ops) fn row_dots(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let dots = Tensor::zeros(with_columns(a, 1), a.dtype(), a.device())?;
    dots.inplace_op3(a, b, &Dots)?;
    Ok(dots)
}

/// p · (dp − dots) in the place of dense f32 dp (…, w), dots being (…, 1).
pub(in crate::ops) fn scores_grad(dp: &Tensor, p: &Tensor, dots: &Tensor) -> Result<()> {
    dp.inplace_op3(p, dots, &Slopes)
}

/// The shape of `x` with so many columns.
fn with_columns(x: &Tensor, columns: usize) -> Vec<usize> {
    let mut shape = x.dims().to_vec();
    if let Some(last) = shape.last_mut() {
        *last = columns;
    }
    shape
}

fn width(layout: &Layout) -> usize {
    layout.dims().last().copied().unwrap_or(1).max(1)
}

/// The values of a dense tensor.
fn dense<'a>(x: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match (x, layout.contiguous_offsets()) {
        (CpuStorage::F32(x), Some((start, end))) => Ok(&x[start..end]),
        _ => bail!("takes dense f32"),
    }
}

fn dense_mut<'a>(x: &'a mut CpuStorage, layout: &Layout) -> Result<&'a mut [f32]> {
    match (x, layout.contiguous_offsets()) {
        (CpuStorage::F32(x), Some((start, end))) => Ok(&mut x[start..end]),
        _ => bail!("takes dense f32"),
    }
}

/// `f` of each row, so many rows a task that it is worth a thread.
fn each_row(x: &mut [f32], width: usize, f: impl Fn(usize, &mut [f32]) + Send + Sync) {
    match x.len() < FEW {
        true => x.chunks_mut(width).enumerate().for_each(|(row, x)| f(row, x)),
        false => {
            let rows = x.par_chunks_mut(width).enumerate();
            rows.with_min_len(FEW.div_ceil(width)).for_each(|(row, x)| f(row, x));
        }
    }
}

/// Softmax that leaves each row's maximum and sum.
#[derive(Default)]
struct Kept(Mutex<Vec<f32>>);

impl InplaceOp1 for Kept {
    fn name(&self) -> &'static str {
        "softmax_kept"
    }

    fn cpu_fwd(&self, x: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let (x, width) = (dense_mut(x, layout)?, width(layout));
        let mut kept = vec![0f32; 2 * (x.len() / width)];
        let row = |(row, kept): (&mut [f32], &mut [f32])| {
            let (max, sum) = exponentials(row);
            row.iter_mut().for_each(|x| *x /= sum);
            kept.copy_from_slice(&[max, sum]);
        };
        match x.len() < FEW {
            true => x.chunks_mut(width).zip(kept.chunks_mut(2)).for_each(row),
            false => {
                let rows = x.par_chunks_mut(width).zip(kept.par_chunks_mut(2));
                rows.with_min_len(FEW.div_ceil(width)).for_each(row);
            }
        }
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = kept;
        Ok(())
    }
}

struct Again;

impl InplaceOp2 for Again {
    fn name(&self) -> &'static str {
        "softmax_again"
    }

    fn cpu_fwd(
        &self,
        x: &mut CpuStorage,
        layout: &Layout,
        kept: &CpuStorage,
        of_kept: &Layout,
    ) -> Result<()> {
        let (x, kept, width) = (dense_mut(x, layout)?, dense(kept, of_kept)?, width(layout));
        if kept.len() != 2 * (x.len() / width) {
            bail!("{} figures for rows of {:?}", kept.len(), layout.shape());
        }
        each_row(x, width, |row, x| {
            let (max, sum) = (kept[2 * row], kept[2 * row + 1]);
            x.iter_mut().for_each(|x| *x = exp(*x - max) / sum);
        });
        Ok(())
    }
}

struct Dots;

impl InplaceOp3 for Dots {
    fn name(&self) -> &'static str {
        "row_dots"
    }

    fn cpu_fwd(
        &self,
        out: &mut CpuStorage,
        of_out: &Layout,
        a: &CpuStorage,
        of_a: &Layout,
        b: &CpuStorage,
        of_b: &Layout,
    ) -> Result<()> {
        let (out, width) = (dense_mut(out, of_out)?, width(of_a));
        let (a, b) = (dense(a, of_a)?, dense(b, of_b)?);
        if a.len() != b.len() || a.len() != out.len() * width {
            bail!("rows of {:?} and {:?}", of_a.shape(), of_b.shape());
        }
        let dot = |row: usize| dot(&a[row * width..][..width], &b[row * width..][..width], |v| v);
        let rows = out.par_iter_mut().enumerate().with_min_len(FEW.div_ceil(width));
        rows.for_each(|(row, out)| *out = dot(row));
        Ok(())
    }
}

struct Slopes;

impl InplaceOp3 for Slopes {
    fn name(&self) -> &'static str {
        "scores_grad"
    }

    fn cpu_fwd(
        &self,
        dp: &mut CpuStorage,
        of_dp: &Layout,
        p: &CpuStorage,
        of_p: &Layout,
        dots: &CpuStorage,
        of_dots: &Layout,
    ) -> Result<()> {
        let (dp, width) = (dense_mut(dp, of_dp)?, width(of_dp));
        let (p, dots) = (dense(p, of_p)?, dense(dots, of_dots)?);
        if p.len() != dp.len() || dp.len() != dots.len() * width {
            bail!("weights {:?} with gradients {:?}", of_p.shape(), of_dp.shape());
        }
        each_row(dp, width, |row, dp| {
            let p = &p[row * width..][..width];
            dp.iter_mut().zip(p).for_each(|(dp, p)| *dp = p * (*dp - dots[row]));
        });
        Ok(())
    }
}
