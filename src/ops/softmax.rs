//! Softmax and the causal mask before it.

use candle_core::Device;

use super::{Tensor, exp};
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
    at.run(op, dtype, &device, || match x.is_dense_f32_on_cpu() {
        true => x.0.inplace_op1(&exp::Softmax).map(|()| x),
        false => Ok(Tensor(candle_nn::ops::softmax_last_dim(&x.0)?)),
    })
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

/// scores (…, seq, width) + mask (seq, width).
///
/// # Errors
/// A mask of another shape.
pub fn mask(at: At, scores: &Tensor, mask: &Tensor) -> Result<Tensor> {
    let (rows, width) = scores.rows_width()?;
    let op = Op::Mask { rows, width };
    at.run(op, scores.dtype()?, scores.device(), || Ok(Tensor(scores.0.broadcast_add(&mask.0)?)))
}
