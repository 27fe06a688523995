//! Kernels put together from candle's own: for devices, element types and layouts that none of
//! ours take. Gradients are computed in f32.

use candle_core::{D, DType, Result, Tensor};

use super::elementwise::Element;

/// One output for each element of `a`; `b` is broadcast.
pub(super) fn map(what: Element, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    match what {
        Element::Add | Element::Shift => a.broadcast_add(b),
        Element::Mul | Element::Scale => a.broadcast_mul(b),
        Element::Silu => a.silu(),
        Element::Gelu => gelu(a),
        Element::SiluGrad => in_f32(a, b, |x, dy| {
            let s = (x.neg()?.exp()? + 1.0)?.recip()?;
            let inner = (x.mul(&(1.0 - &s)?)? + 1.0)?;
            dy.mul(&s)?.mul(&inner)
        }),
        Element::GeluGrad => in_f32(a, b, |x, dy| {
            let square = x.sqr()?;
            let s = (x.mul(&square.affine(B, A)?)?.exp()? + 1.0)?.recip()?;
            let slope = square.affine(-3.0 * B, -A)?;
            let inner = (x.mul(&(1.0 - &s)?)?.mul(&slope)? + 1.0)?;
            dy.mul(&s)?.mul(&inner)
        }),
    }
}

/// −2 √(2/π), and that times 0.044715: x / (1 + exp(x · (A + B x²))) is GELU's tanh approximation.
const A: f64 = -2.0 * 0.797_884_560_802_865_4;
const B: f64 = 0.044_715 * A;

fn gelu(x: &Tensor) -> Result<Tensor> {
    let wide = x.to_dtype(DType::F32)?;
    let below = (wide.mul(&wide.sqr()?.affine(B, A)?)?.exp()? + 1.0)?;
    wide.div(&below)?.to_dtype(x.dtype())
}

/// `f` of both in f32, in `a`'s type.
pub(super) fn in_f32(
    a: &Tensor,
    b: &Tensor,
    f: impl FnOnce(&Tensor, &Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    f(&a.to_dtype(DType::F32)?.contiguous()?, &b.to_dtype(DType::F32)?.contiguous()?)?
        .to_dtype(a.dtype())
}

/// x / sqrt(mean(x²) + eps) · gain over the last dimension, by candle's fused kernel.
pub(super) fn rms_norm(x: &Tensor, gain: &Tensor, eps: f64) -> Result<Tensor> {
    candle_nn::ops::rms_norm(&x.contiguous()?, gain, eps as f32)
}

/// The gradient of [`rms_norm`] towards x.
pub(super) fn rms_norm_grad(x: &Tensor, gain: &Tensor, eps: f64, dy: &Tensor) -> Result<Tensor> {
    let width = x.dim(D::Minus1)? as f64;
    in_f32(x, dy, |x, dy| {
        let h = dy.broadcast_mul(&gain.to_dtype(DType::F32)?)?;
        let inverse = inverse_rms(x, eps)?;
        let c = (h.mul(x)?.sum_keepdim(D::Minus1)?.mul(&inverse.mul(&inverse)?)? / width)?;
        h.sub(&x.broadcast_mul(&c)?)?.broadcast_mul(&inverse)
    })
}

/// The gradient of [`rms_norm`] towards its gain.
pub(super) fn gain_grad(x: &Tensor, eps: f64, dy: &Tensor) -> Result<Tensor> {
    let width = x.dim(D::Minus1)?;
    let flat = |t: &Tensor| t.reshape(((), width))?.to_dtype(DType::F32);
    let x = flat(x)?;
    let normed = x.broadcast_mul(&inverse_rms(&x, eps)?)?;
    normed.mul(&flat(dy)?)?.sum(0)?.to_dtype(dy.dtype())
}

/// 1 / sqrt(mean(x²) + eps) of each row, one column.
fn inverse_rms(x: &Tensor, eps: f64) -> Result<Tensor> {
    (x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?.recip()
}

/// y · (dy − Σ y·dy), row by row.
pub(super) fn softmax_grad(y: &Tensor, dy: &Tensor) -> Result<Tensor> {
    in_f32(y, dy, |y, dy| y.mul(&dy.broadcast_sub(&y.mul(dy)?.sum_keepdim(D::Minus1)?)?))
}

/// Softmax of (…, w), and each row's maximum and sum of exponentials, (…, 2) in f32.
pub(super) fn softmax_kept(x: &Tensor) -> Result<(Tensor, Tensor)> {
    let wide = x.to_dtype(DType::F32)?;
    let max = wide.max_keepdim(D::Minus1)?;
    let exponentials = wide.broadcast_sub(&max)?.exp()?;
    let sum = exponentials.sum_keepdim(D::Minus1)?;
    let weights = exponentials.broadcast_div(&sum)?.to_dtype(x.dtype())?;
    Ok((weights, Tensor::cat(&[max, sum], D::Minus1)?))
}

/// The same softmax from what was kept.
pub(super) fn softmax_again(x: &Tensor, kept: &Tensor) -> Result<Tensor> {
    let column = |index| kept.narrow(D::Minus1, index, 1);
    let shifted = x.to_dtype(DType::F32)?.broadcast_sub(&column(0)?)?;
    shifted.exp()?.broadcast_div(&column(1)?)?.to_dtype(x.dtype())
}

/// x (…, T, d) with element i of each vector and element i + d/2 turned by its token's angle, whose
/// cosines and sines are (T, d/2).
pub(super) fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    candle_nn::rotary_emb::rope(&x.contiguous()?, cos, sin)
}

/// Logits (rows, V) → their exponentials, less each row's largest; losses and sums of the rows.
pub(super) fn cross_entropy(
    logits: &Tensor,
    targets: &[u32],
) -> Result<(Tensor, Vec<f32>, Vec<f32>)> {
    let shifted = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?)?;
    let at_target = shifted.gather(&column(targets, logits)?, 1)?;
    let exponentials = shifted.exp()?;
    let sums = exponentials.sum_keepdim(D::Minus1)?;
    let losses = sums.log()?.sub(&at_target)?;
    Ok((exponentials, losses.flatten_all()?.to_vec1()?, sums.flatten_all()?.to_vec1()?))
}

/// Exponentials (rows, V) → weight · (exponential / sum − 1 at the target).
pub(super) fn cross_entropy_grad(
    exponentials: &Tensor,
    targets: &[u32],
    weights: &[f32],
    sums: &[f32],
) -> Result<Tensor> {
    let factors: Vec<f32> = weights.iter().zip(sums).map(|(w, s)| w / s).collect();
    let minus: Vec<f32> = weights.iter().map(|w| -w).collect();
    let scaled = exponentials.broadcast_mul(&column(&factors, exponentials)?)?;
    scaled.scatter_add(&column(targets, exponentials)?, &column(&minus, exponentials)?, 1)
}

fn column<D: candle_core::WithDType>(values: &[D], like: &Tensor) -> Result<Tensor> {
    Tensor::from_slice(values, (values.len(), 1), like.device())
}

/// One AdamW update of a state (3, n) of parameters and both moments, from the gradient (n).
pub(super) fn adamw(state: &Tensor, gradient: &Tensor, step: &super::AdamW) -> Result<()> {
    let (b1, b2) = step.betas;
    let row = |i| state.narrow(0, i, 1);
    let g = gradient.reshape((1, ()))?;
    let m = ((row(1)? * b1)? + (&g * (1.0 - b1))?)?;
    let v = ((row(2)? * b2)? + (g.sqr()? * (1.0 - b2))?)?;
    let denominator = ((v.sqrt()? / step.correction)? + step.eps)?;
    let p = ((row(0)? * step.decay)? - ((&m * step.rate)? / denominator)?)?;
    state.slice_set(&Tensor::cat(&[p, m, v], 0)?, 0, 0)
}
