//! RMSNorm.

use super::Tensor;
use crate::{error::Result, ledger::Op, meter::At};

/// x / sqrt(mean(x²) + eps) · gain over the last dimension, by candle's fused kernel.
///
/// # Errors
/// A gain of another width.
pub fn rms_norm(at: At, x: &Tensor, gain: &Tensor, eps: f64) -> Result<Tensor> {
    let (rows, width) = x.rows_width()?;
    let op = Op::RmsNorm { rows, width };
    at.run(op, x.dtype()?, x.device(), || {
        Ok(Tensor(candle_nn::ops::rms_norm(&x.0.contiguous()?, &gain.0, eps as f32)?))
    })
}
