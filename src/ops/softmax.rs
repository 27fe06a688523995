//! Softmax and the causal mask before it.

use candle_core::{D, Device};

use super::{
    Tensor,
    by_row::{by_element, by_row, is_dense_f32_on_cpu},
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
    let y = at.run(op, dtype, &device, || match is_dense_f32_on_cpu(&x.data) {
        true => x.data.inplace_op1(&exp::Softmax).map(|()| x.data.clone()),
        false => candle_nn::ops::softmax_last_dim(&x.data),
    })?;
    let y = Tensor::from(y);
    let saved = y.clone();
    Ok(y.made_from(at, &x, move |at, dy| softmax_grad(at, &saved, dy)))
}

/// y · (dy − Σ y·dy), row by row.
fn softmax_grad(at: At, y: &Tensor, dy: &Tensor) -> Result<Tensor> {
    let (rows, width) = y.rows_width()?;
    let op = Op::SoftmaxGrad { rows, width };
    let dx = at.run(op, y.dtype()?, y.device(), || {
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

/// The additive causal mask (seq, past + seq): 0 where a query may look, −∞ after it. Filled by
/// index, without arithmetic.
///
/// # Errors
/// The device's.
pub fn causal_mask(seq: usize, past: usize, dtype: Dtype, device: &Device) -> Result<Tensor> {
    let width = past + seq;
    let mut values = vec![0f32; seq * width];
    for (i, row) in values.chunks_exact_mut(width).enumerate() {
        row[past + i + 1..].fill(f32::NEG_INFINITY);
    }
    Tensor::from_vec(values, (seq, width), dtype, device)
}

/// scores (…, seq, width) + mask (seq, width). The gradient as it is: softmax's is 0 where −∞ was.
///
/// # Errors
/// A mask of another shape.
pub fn mask(at: At, scores: &Tensor, mask: &Tensor) -> Result<Tensor> {
    let (rows, width) = scores.rows_width()?;
    let op = Op::Mask { rows, width };
    let masked = at.run(op, scores.dtype()?, scores.device(), || {
        let theirs = || scores.data.broadcast_add(&mask.data);
        by_element(&scores.data, &mask.data, |score, mask| score + mask, theirs)
    })?;
    Ok(Tensor::from(masked).made_from(at, scores, |_, dy| Ok(dy.clone())))
}
