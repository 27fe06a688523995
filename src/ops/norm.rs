//! RMSNorm.

use candle_core::{D, DType};

use super::{
    Tensor,
    by_row::by_row,
    cuda::{Arg, Kernels},
    gemv::dot,
};
use crate::{error::Result, ledger::Op, meter::At};

/// x / sqrt(mean(x²) + eps) · gain over the last dimension, by candle's fused kernel.
///
/// # Errors
/// A gain of another width.
pub fn rms_norm(at: At, x: &Tensor, gain: &Tensor, eps: f64) -> Result<Tensor> {
    let (rows, width) = x.rows_width()?;
    let op = Op::RmsNorm { rows, width };
    let y = at.run(op, x.dtype()?, x.device(), || {
        if let Some(kernels) = kernels(&[x, gain]) {
            let out = kernels.output(&x.data)?;
            let tensors = [Arg::Of(&out), Arg::Of(&x.data), Arg::Of(&gain.data)];
            kernels.rows("rms_norm", &x.data, &tensors, &[Arg::F32(eps as f32)])?;
            return Ok(out);
        }
        candle_nn::ops::rms_norm(&x.data.contiguous()?, &gain.data, eps as f32)
    })?;
    let (to_x, to_gain) = ((x.detach(), gain.detach()), x.detach());
    Ok(Tensor::from(y)
        .made_from(at, x, move |at, dy| rms_norm_grad(at, &to_x.0, &to_x.1, eps, dy))
        .made_from(at, gain, move |at, dy| gain_grad(at, &to_gain, eps, dy)))
}

/// The kernels that take these, the first of them row by row.
fn kernels(tensors: &[&Tensor]) -> Option<Kernels> {
    let width = *tensors.first()?.dims().last()?;
    let data: Vec<_> = tensors.iter().map(|t| &t.data).collect();
    Kernels::of(&data).filter(|_| Kernels::takes_rows_of(width))
}

/// With i = 1 / sqrt(mean(x²) + eps), h = gain · dy and w columns: i · (h − x · i² · Σ(h·x) / w),
/// the derivative of x · i by each element of x. i is computed anew: the forward kernel keeps
/// none.
fn rms_norm_grad(at: At, x: &Tensor, gain: &Tensor, eps: f64, dy: &Tensor) -> Result<Tensor> {
    let (rows, width) = x.rows_width()?;
    let op = Op::RmsNormGrad { rows, width };
    let gains = if x.device().is_cpu() { gain.to_vec()? } else { vec![] };
    let dx = at.run(op, x.dtype()?, x.device(), || {
        if let Some(kernels) = kernels(&[x, gain, dy]) {
            let out = kernels.output(&x.data)?;
            let tensors = [Arg::Of(&out), Arg::Of(&x.data), Arg::Of(&gain.data), Arg::Of(&dy.data)];
            kernels.rows("rms_norm_grad", &x.data, &tensors, &[Arg::F32(eps as f32)])?;
            return Ok(out);
        }
        let on_cpu = |x: &[f32], dy: &[f32], out: &mut [f32]| {
            for ((out, dy), gain) in out.iter_mut().zip(dy).zip(&gains) {
                *out = dy * gain;
            }
            let width = x.len() as f32;
            let inverse = 1.0 / (dot(x, x, |v| v) / width + eps as f32).sqrt();
            let c = inverse * inverse * dot(out, x, |v| v) / width;
            for (out, x) in out.iter_mut().zip(x) {
                *out = inverse * (*out - c * x);
            }
        };
        by_row(&x.data, &dy.data, on_cpu, |x, dy| {
            let h = dy.broadcast_mul(&gain.data.to_dtype(DType::F32)?)?;
            let inverse = inverse_rms(x, eps)?;
            let c =
                (h.mul(x)?.sum_keepdim(D::Minus1)?.mul(&inverse.mul(&inverse)?)? / width as f64)?;
            h.sub(&x.broadcast_mul(&c)?)?.broadcast_mul(&inverse)
        })
    })?;
    Ok(dx.into())
}

/// Σ over rows of dy · x · i.
fn gain_grad(at: At, x: &Tensor, eps: f64, dy: &Tensor) -> Result<Tensor> {
    let (rows, width) = x.rows_width()?;
    let op = Op::GainGrad { rows, width };
    let flat = |t: &Tensor| t.data.reshape((rows as usize, width as usize))?.to_dtype(DType::F32);
    let gradient = at.run(op, x.dtype()?, x.device(), || {
        let x = flat(x)?;
        let normed = x.broadcast_mul(&inverse_rms(&x, eps)?)?;
        normed.mul(&flat(dy)?)?.sum(0)?.to_dtype(dy.data.dtype())
    })?;
    Ok(gradient.into())
}

/// 1 / sqrt(mean(x²) + eps) of each row, one column.
fn inverse_rms(x: &candle_core::Tensor, eps: f64) -> candle_core::Result<candle_core::Tensor> {
    (x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?.recip()
}
