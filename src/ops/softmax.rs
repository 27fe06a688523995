//! Softmax, with the causal mask before it where there is one.

use candle_core::Device;

use super::{
    CausalMask, Kernel, Nodes, Ops, Tensor, Unshared,
    backend::Backend,
    cpu,
    cuda::{Causal, Kernels},
    portable,
};
use crate::{error::Result, ledger::Op, meter::At};

/// exp(x − max) / sum over the last dimension, in one fused kernel; in the place of `x` where the
/// kernel can.
///
/// # Errors
/// The device's.
pub fn softmax(at: At, x: Unshared) -> Result<Tensor> {
    let y = at.launch(&Softmax { x: &x, causal: None })?;
    Ok(with_gradient(at, &x.0, y))
}

/// Softmax of scores (…, T, S) + mask (T, S), in the place of `scores` where a kernel can.
///
/// # Errors
/// A mask of another shape.
pub fn masked_softmax(at: At, scores: Unshared, mask: &CausalMask) -> Result<Tensor> {
    if mask.is_values() {
        return softmax(at, mask.add(at, scores)?);
    }
    let y = at.launch(&Softmax { x: &scores, causal: Some(mask) })?;
    Ok(with_gradient(at, &scores.0, y))
}

fn with_gradient(at: At, x: &Tensor, y: Tensor) -> Tensor {
    let saved = y.clone();
    y.made_from(at, x, move |at, dy| at.launch(&SoftmaxGrad { y: &saved, dy }))
}

/// In place where ours: `x` is nobody else's.
struct Softmax<'a> {
    x: &'a Unshared, // (…, w)
    /// Added by index, by kernels that do so themselves.
    causal: Option<&'a CausalMask>,
}

impl Kernel for Softmax<'_> {
    type Output = Tensor;

    fn device(&self) -> &Device {
        self.x.0.device()
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        let ((rows, width), dtype) = (self.x.0.rows_width()?, self.x.0.dtype()?);
        if let Some(mask) = self.causal {
            mask.check(&self.x.0)?;
            ops.add(Op::Mask { rows, width }, dtype);
        }
        ops.add(Op::Softmax { rows, width }, dtype);
        Ok(())
    }

    fn run(&self, nodes: &Nodes) -> candle_core::Result<Tensor> {
        let x = &self.x.0.data;
        match (Backend::of(&[x]), self.causal) {
            (Backend::Cpu, None) => cpu::softmax(x)?,
            (Backend::Cuda(kernels), causal) if takes_rows(x) => {
                kernels.softmax(nodes, x, causal.map(CausalMask::causal))?;
            }
            (_, None) => return Ok(Tensor::of(candle_nn::ops::softmax_last_dim(x)?)),
            (_, Some(_)) => candle_core::bail!("a mask for another device"),
        }
        Ok(self.x.0.detach())
    }
}

fn takes_rows(x: &candle_core::Tensor) -> bool {
    x.dims().last().is_some_and(|width| Kernels::takes_rows_of(*width))
}

/// y · (dy − Σ y·dy), row by row.
struct SoftmaxGrad<'a> {
    y: &'a Tensor,
    dy: &'a Tensor,
}

impl Kernel for SoftmaxGrad<'_> {
    type Output = Tensor;

    fn device(&self) -> &Device {
        self.y.device()
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        let (rows, width) = self.y.rows_width()?;
        ops.add(Op::SoftmaxGrad { rows, width }, self.y.dtype()?);
        Ok(())
    }

    fn run(&self, nodes: &Nodes) -> candle_core::Result<Tensor> {
        let (y, dy) = (&self.y.data, &self.dy.data);
        Ok(Tensor::of(match Backend::by_row(&[y, dy]) {
            Backend::Cpu => cpu::softmax_grad(y, dy)?,
            Backend::Cuda(kernels) => kernels.softmax_grad(nodes, y, dy)?,
            Backend::Portable => portable::softmax_grad(y, dy)?,
        }))
    }
}

/// What a kernel is told of a mask in place of its values.
impl CausalMask {
    pub(super) fn causal(&self) -> Causal {
        Causal { seq: self.seq(), past: self.past(), window: self.window() }
    }
}
