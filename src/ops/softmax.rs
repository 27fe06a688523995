//! Softmax and the causal mask before it.

use candle_core::{D, Device};

use super::{
    Tensor,
    by_row::{by_element, by_row, is_dense_f32_on_cpu},
    candle_dtype,
    cuda::{Arg, Kernels},
    exp,
    gemv::dot,
};
use crate::{
    error::Result,
    ledger::{Dtype, Op},
    meter::At,
};

/// exp(x − max) / sum over the last dimension, in one fused kernel; in the place of `x`, which
/// nothing else may hold, where the kernel can.
///
/// # Errors
/// The device's.
pub fn softmax(at: At, x: Tensor) -> Result<Tensor> {
    let (rows, width) = x.rows_width()?;
    let op = Op::Softmax { rows, width };
    let (dtype, device) = (x.dtype()?, x.device().clone());
    let y = at.run(op, dtype, &device, || {
        if is_dense_f32_on_cpu(&x.data) {
            return x.data.inplace_op1(&exp::Softmax).map(|()| x.data.clone());
        }
        match kernels(&x) {
            Some(kernels) => in_place(&kernels, &x, 0, 0),
            None => candle_nn::ops::softmax_last_dim(&x.data),
        }
    })?;
    Ok(with_gradient(at, &x, y))
}

/// The kernels that take `x` row by row.
fn kernels(x: &Tensor) -> Option<Kernels> {
    let width = *x.dims().last()?;
    Kernels::of(&[&x.data]).filter(|_| Kernels::takes_rows_of(width))
}

fn in_place(
    kernels: &Kernels,
    x: &Tensor,
    seq: usize,
    past: usize,
) -> candle_core::Result<candle_core::Tensor> {
    let rest = [Arg::U32(seq as u32), Arg::U32(past as u32)];
    kernels.rows("softmax", &x.data, &[Arg::Of(&x.data)], &rest)?;
    Ok(x.data.clone())
}

fn with_gradient(at: At, x: &Tensor, y: candle_core::Tensor) -> Tensor {
    let y = Tensor::from(y);
    let saved = y.clone();
    y.made_from(at, x, move |at, dy| softmax_grad(at, &saved, dy))
}

/// y · (dy − Σ y·dy), row by row.
fn softmax_grad(at: At, y: &Tensor, dy: &Tensor) -> Result<Tensor> {
    let (rows, width) = y.rows_width()?;
    let op = Op::SoftmaxGrad { rows, width };
    let dx = at.run(op, y.dtype()?, y.device(), || {
        if let Some(kernels) = kernels(y).filter(|_| Kernels::of(&[&y.data, &dy.data]).is_some()) {
            let out = kernels.output(&y.data)?;
            let tensors = [Arg::Of(&out), Arg::Of(&y.data), Arg::Of(&dy.data)];
            kernels.rows("softmax_grad", &y.data, &tensors, &[])?;
            return Ok(out);
        }
        let on_cpu = |y: &[f32], dy: &[f32], out: &mut [f32]| {
            let sum = dot(y, dy, |v| v);
            for ((out, y), dy) in out.iter_mut().zip(y).zip(dy) {
                *out = y * (dy - sum);
            }
        };
        by_row(&y.data, &dy.data, on_cpu, |y, dy| {
            y.mul(&dy.broadcast_sub(&y.mul(dy)?.sum_keepdim(D::Minus1)?)?)
        })
    })?;
    Ok(dx.into())
}

/// The additive causal mask of `seq` queries on top of `past` tokens, (seq, past + seq): 0 where a
/// query may look, −∞ after it.
#[derive(Debug)]
pub struct CausalMask {
    seq: usize,
    past: usize,
    /// Filled by index, without arithmetic; none where a kernel tells by index itself.
    values: Option<Tensor>,
}

impl CausalMask {
    /// The mask for scores of `dtype` on `device`.
    ///
    /// # Errors
    /// The device's.
    pub fn new(seq: usize, past: usize, dtype: Dtype, device: &Device) -> Result<Self> {
        let width = past + seq;
        let by_index = Kernels::on(device, candle_dtype(dtype)).is_some();
        if by_index && Kernels::takes_rows_of(width) {
            return Ok(Self { seq, past, values: None });
        }
        let mut values = vec![0f32; seq * width];
        for (i, row) in values.chunks_exact_mut(width).enumerate() {
            row[past + i + 1..].fill(f32::NEG_INFINITY);
        }
        let values = Tensor::from_vec(values, (seq, width), dtype, device)?;
        Ok(Self { seq, past, values: Some(values) })
    }
}

impl CausalMask {
    /// The earlier tokens, for scores (…, seq, held).
    pub(super) fn past_of(&self, seq: usize, held: usize) -> Result<usize> {
        let fits = seq == self.seq && held == self.past + self.seq;
        anyhow::ensure!(fits, "a mask of {self:?} for scores ({seq}, {held})");
        Ok(self.past)
    }
}

/// Softmax of scores (…, seq, past + seq) + mask, in the place of `scores`, which nothing else may
/// hold, where a kernel can.
///
/// # Errors
/// A mask of another shape.
pub fn masked_softmax(at: At, scores: Tensor, causal: &CausalMask) -> Result<Tensor> {
    let &CausalMask { seq, past, ref values } = causal;
    let (rows, width) = scores.rows_width()?;
    if let Some(values) = values {
        let shape = scores.dims().to_vec();
        let by_query = scores.reshape((rows as usize / seq, seq, width as usize))?;
        drop(scores);
        return softmax(at, mask(at, &by_query, values)?.reshape(shape)?);
    }
    anyhow::ensure!(width as usize == past + seq, "a mask of {} for rows of {width}", past + seq);
    let kernels = kernels(&scores).ok_or_else(|| anyhow::anyhow!("a mask for another device"))?;
    let (dtype, device) = (scores.dtype()?, scores.device().clone());
    at.ran(Op::Mask { rows, width }, dtype);
    let y = at.run(Op::Softmax { rows, width }, dtype, &device, || {
        in_place(&kernels, &scores, seq, past)
    })?;
    Ok(with_gradient(at, &scores, y))
}

/// scores (…, seq, width) + mask (seq, width). The gradient as it is: softmax's is 0 where −∞ was.
///
/// # Errors
/// A mask of another shape.
fn mask(at: At, scores: &Tensor, mask: &Tensor) -> Result<Tensor> {
    let (rows, width) = scores.rows_width()?;
    let op = Op::Mask { rows, width };
    let masked = at.run(op, scores.dtype()?, scores.device(), || {
        let theirs = || scores.data.broadcast_add(&mask.data);
        by_element("add", &scores.data, &mask.data, |score, mask| score + mask, theirs)
    })?;
    Ok(Tensor::from(masked).made_from(at, scores, |_, dy| Ok(dy.clone())))
}
