//! RMSNorm.

use candle_core::{D, Device};

use super::{
    Kernel, Nodes, Ops, Tensor, backend::Backend, cpu, cuda::Kernels, elementwise::shift, portable,
};
use crate::{error::Result, ledger::Op, meter::At};

/// x / sqrt(mean(x²) + eps) · gain over the last dimension.
///
/// # Errors
/// A gain of another width.
pub fn rms_norm(at: At, x: &Tensor, gain: &Tensor, eps: f64) -> Result<Tensor> {
    normed(at, x, gain, gain, eps)
}

/// x / sqrt(mean(x²) + eps) · (1 + gain), `one` being a tensor of 1. The gradient towards the gain
/// is that towards 1 + gain.
///
/// # Errors
/// A gain of another width.
pub fn shifted_rms_norm(
    at: At,
    x: &Tensor,
    gain: &Tensor,
    one: &Tensor,
    eps: f64,
) -> Result<Tensor> {
    normed(at, x, gain, &shift(at, &gain.detach(), one)?, eps)
}

/// Normed x times `factor`, made from `gain`.
fn normed(at: At, x: &Tensor, gain: &Tensor, factor: &Tensor, eps: f64) -> Result<Tensor> {
    let y = at.launch(&RmsNorm { x, gain: factor, eps })?;
    let (to_x, to_gain) = ((x.detach(), factor.detach()), x.detach());
    let y = y.made_from(at, x, move |at, dy| {
        at.launch(&RmsNormGrad { x: &to_x.0, gain: &to_x.1, eps, dy })
    });
    Ok(y.made_from(at, gain, move |at, dy| at.launch(&GainGrad { x: &to_gain, eps, dy })))
}

struct RmsNorm<'a> {
    x: &'a Tensor,    // (…, w)
    gain: &'a Tensor, // (w)
    eps: f64,
}

impl Kernel for RmsNorm<'_> {
    type Output = Tensor;

    fn device(&self) -> &Device {
        self.x.device()
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        let (rows, width) = self.x.rows_width()?;
        ops.add(Op::RmsNorm { rows, width }, self.x.dtype()?);
        Ok(())
    }

    fn run(&self, nodes: &Nodes) -> candle_core::Result<Tensor> {
        let (x, gain) = (&self.x.data, &self.gain.data);
        Ok(Tensor::of(match Backend::by_row(&[x, gain]) {
            Backend::Cuda(kernels) => kernels.rms_norm(nodes, x, gain, self.eps)?,
            Backend::Cpu | Backend::Portable => portable::rms_norm(x, gain, self.eps)?,
        }))
    }
}

/// With i = 1 / sqrt(mean(x²) + eps), h = gain · dy and w columns: i · (h − x · i² · Σ(h·x) / w),
/// the derivative of x · i by each element of x. i is computed anew: the forward kernel keeps
/// none.
struct RmsNormGrad<'a> {
    x: &'a Tensor,
    gain: &'a Tensor,
    eps: f64,
    dy: &'a Tensor,
}

impl Kernel for RmsNormGrad<'_> {
    type Output = Tensor;

    fn device(&self) -> &Device {
        self.x.device()
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        let (rows, width) = self.x.rows_width()?;
        ops.add(Op::RmsNormGrad { rows, width }, self.x.dtype()?);
        Ok(())
    }

    fn run(&self, nodes: &Nodes) -> candle_core::Result<Tensor> {
        let [x, gain, dy] = [self.x, self.gain, self.dy].map(|t| &t.data);
        Ok(Tensor::of(match Backend::by_row(&[x, gain, dy]) {
            Backend::Cpu => cpu::rms_norm_grad(x, gain, self.eps, dy)?,
            Backend::Cuda(kernels) => kernels.rms_norm_grad(nodes, x, gain, self.eps, dy)?,
            Backend::Portable => portable::rms_norm_grad(x, gain, self.eps, dy)?,
        }))
    }
}

/// Σ over rows of dy · x · i, i as above.
struct GainGrad<'a> {
    x: &'a Tensor,
    eps: f64,
    dy: &'a Tensor,
}

impl Kernel for GainGrad<'_> {
    type Output = Tensor;

    fn device(&self) -> &Device {
        self.x.device()
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        let (rows, width) = self.x.rows_width()?;
        ops.add(Op::GainGrad { rows, width }, self.x.dtype()?);
        Ok(())
    }

    fn run(&self, nodes: &Nodes) -> candle_core::Result<Tensor> {
        let (x, dy) = (&self.x.data, &self.dy.data);
        Ok(Tensor::of(match Kernels::for_sums(&[x, dy], x.dim(D::Minus1)?) {
            Some(kernels) => kernels.gain_grad(nodes, x, self.eps, dy)?,
            None => portable::gain_grad(x, self.eps, dy)?,
        }))
    }
}
