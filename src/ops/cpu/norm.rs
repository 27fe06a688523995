//! The gradient of RMSNorm.

use candle_core::{DType, Result, Tensor};

use super::{by_row::by_row, gemv::dot};

/// Towards x, as `RmsNormGrad` of [`crate::ops`] states it, in any type.
pub(in crate::ops) fn rms_norm_grad(
    x: &Tensor,
    gain: &Tensor,
    eps: f64,
    dy: &Tensor,
) -> Result<Tensor> {
    let gains: Vec<f32> = gain.to_dtype(DType::F32)?.to_vec1()?;
    by_row(x, dy, |x, dy, out| {
        for ((out, dy), gain) in out.iter_mut().zip(dy).zip(&gains) {
            *out = dy * gain;
        }
        let width = x.len() as f32;
        let inverse = 1.0 / (dot(x, x, |v| v) / width + eps as f32).sqrt();
        let c = inverse * inverse * dot(out, x, |v| v) / width;
        for (out, x) in out.iter_mut().zip(x) {
            *out = inverse * (*out - c * x);
        }
    })
}
