//! What an optimizer step does: the gradients' norm, clipping, AdamW.
//!
//! Factors of a whole step (learning rate, bias corrections) are a few scalars that the host
//! computes once for all elements; like loop counters they are not ops.

use candle_core::{DType, Device};

use super::{
    Kernel, Nodes, Ops, Tensor,
    backend::Backend,
    cpu,
    cuda::{AdamWFactors, Kernels},
    portable,
};
use crate::{
    error::Result,
    ledger::{Dtype, Op},
    meter::At,
};

/// Σ x² of each tensor, on account of the module beside it. What a device sums is copied at once.
///
/// # Errors
/// The device's.
pub fn sums_of_squares(tensors: &[(At, &Tensor)]) -> Result<Vec<f64>> {
    let all: Vec<_> = tensors.iter().map(|(_, x)| &x.data).collect();
    let Some(kernels) = Kernels::of(&all) else {
        return tensors.iter().map(|(at, x)| at.launch(&SumSquares { x })).collect();
    };
    let sums = candle_core::Tensor::zeros(all.len(), DType::F64, all[0].device())?;
    for (index, (at, x)) in tensors.iter().enumerate() {
        at.launch(&SumSquaresInto { kernels: &kernels, x, sums: &sums, index })?;
    }
    Ok(sums.to_vec1()?)
}

struct SumSquares<'a> {
    x: &'a Tensor,
}

impl Kernel for SumSquares<'_> {
    type Output = f64;

    fn device(&self) -> &Device {
        self.x.device()
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        ops.add(Op::SumSquares { n: self.x.elements() as u64 }, Dtype::F32);
        Ok(())
    }

    fn run(&self, _: &Nodes) -> candle_core::Result<f64> {
        let wide = self.x.data.to_dtype(DType::F32)?.contiguous()?;
        match Backend::of(&[&wide]) {
            Backend::Cpu => cpu::sum_squares(&wide),
            _ => Ok(f64::from(wide.sqr()?.sum_all()?.to_scalar::<f32>()?)),
        }
    }
}

/// The same added to one of several sums on a GPU.
struct SumSquaresInto<'a> {
    kernels: &'a Kernels,
    x: &'a Tensor,
    sums: &'a candle_core::Tensor,
    index: usize,
}

impl Kernel for SumSquaresInto<'_> {
    type Output = ();

    fn device(&self) -> &Device {
        self.x.device()
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        ops.add(Op::SumSquares { n: self.x.elements() as u64 }, Dtype::F32);
        Ok(())
    }

    fn run(&self, nodes: &Nodes) -> candle_core::Result<()> {
        self.kernels.sum_squares(nodes, &self.x.data, self.sums, self.index)
    }
}

/// The norm of all gradients from their sums of squares, and the factor that brings it down to
/// `most`: min(1, most / (norm + 1e-6)), as PyTorch's `clip_grad_norm_`.
///
/// # Errors
/// None of its own.
pub fn clip_factor(at: At, sums: &[f64], most: f64) -> Result<(f64, f64)> {
    at.launch(&ClipFactor { sums, most })
}

struct ClipFactor<'a> {
    sums: &'a [f64],
    most: f64,
}

impl Kernel for ClipFactor<'_> {
    type Output = (f64, f64);

    fn device(&self) -> &Device {
        &Device::Cpu
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        ops.add(Op::ClipFactor { tensors: self.sums.len() as u64 }, Dtype::F32);
        Ok(())
    }

    fn run(&self, _: &Nodes) -> candle_core::Result<(f64, f64)> {
        let norm = self.sums.iter().sum::<f64>().sqrt();
        Ok((norm, (self.most / (norm + 1e-6)).min(1.0)))
    }
}

/// A parameter's f32 master and the running moments of its gradient: one tensor (3, n).
#[derive(Debug)]
pub struct Moments(candle_core::Tensor);

impl Moments {
    /// `parameter`, of any shape, with moments of zero.
    ///
    /// # Errors
    /// The device's, out of memory among them.
    pub fn new(parameter: &Tensor) -> Result<Self> {
        let n = parameter.elements();
        let master = parameter.data.reshape((1, n))?.to_dtype(DType::F32)?;
        let zeros = candle_core::Tensor::zeros((2, n), DType::F32, master.device())?;
        Ok(Self(candle_core::Tensor::cat(&[&master, &zeros], 0)?))
    }

    /// Parameter, first and second moment, n each, one after another.
    ///
    /// # Errors
    /// The device's.
    pub fn to_vec(&self) -> Result<Vec<f32>> {
        Ok(self.0.flatten_all()?.to_vec1()?)
    }

    /// Takes back what [`Moments::to_vec`] gave.
    ///
    /// # Errors
    /// Another number of elements.
    pub fn restore(&self, values: &[f32]) -> Result<()> {
        let shape = self.0.shape().clone();
        let tensor = candle_core::Tensor::from_slice(values, shape, self.0.device())?;
        Ok(self.0.slice_set(&tensor, 0, 0)?)
    }

    /// The master: a view that later updates show through, of the shape of `parameter`.
    ///
    /// # Errors
    /// Another number of elements.
    pub fn master(&self, parameter: &Tensor) -> Result<Tensor> {
        Ok(Tensor::of(self.0.narrow(0, 0, 1)?.reshape(parameter.data.shape())?))
    }
}

/// One step of AdamW (Loshchilov and Hutter 2019), as PyTorch computes it.
#[derive(Debug, Clone, Copy)]
pub struct AdamW {
    /// 1 − learning rate · weight decay: a factor on the parameter.
    pub decay: f64,
    /// Learning rate / (1 − β₁ᵗ).
    pub rate: f64,
    /// √(1 − β₂ᵗ).
    pub correction: f64,
    /// Decay of the moments.
    pub betas: (f64, f64),
    /// Added to the root.
    pub eps: f64,
}

impl AdamW {
    /// p ← decay·p − rate · m / (√v / correction + eps), with m ← β₁·m + (1 − β₁)·g and
    /// v ← β₂·v + (1 − β₂)·g², in place.
    ///
    /// # Errors
    /// A gradient of another size.
    pub fn step(&self, at: At, moments: &Moments, gradient: &Tensor) -> Result<()> {
        let n = gradient.elements();
        let gradient = gradient.data.reshape((1, n))?.to_dtype(DType::F32)?.contiguous()?;
        at.launch(&Update { step: self, state: &moments.0, gradient: &gradient })
    }

    fn factors(&self) -> AdamWFactors {
        let Self { decay, rate, correction, betas: (b1, b2), eps } = *self;
        AdamWFactors {
            decay: decay as f32,
            rate: rate as f32,
            correction: correction as f32,
            eps: eps as f32,
            b1: b1 as f32,
            b2: b2 as f32,
            rest1: (1.0 - b1) as f32,
            rest2: (1.0 - b2) as f32,
        }
    }
}

struct Update<'a> {
    step: &'a AdamW,
    state: &'a candle_core::Tensor,    // (3, n)
    gradient: &'a candle_core::Tensor, // (1, n)
}

impl Kernel for Update<'_> {
    type Output = ();

    fn device(&self) -> &Device {
        self.state.device()
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        let (n, state) = (self.gradient.elem_count(), self.state.elem_count());
        let fits = state == 3 * n;
        anyhow::ensure!(fits, "a gradient of {n} elements for a state of {state}");
        ops.add(Op::AdamW { n: n as u64 }, Dtype::F32);
        Ok(())
    }

    fn run(&self, nodes: &Nodes) -> candle_core::Result<()> {
        let Self { step, state, gradient } = *self;
        match Backend::of(&[state, gradient]) {
            Backend::Cpu => cpu::adamw(state, gradient, &step.factors()),
            Backend::Cuda(kernels) => kernels.adamw(nodes, state, gradient, step.factors()),
            Backend::Portable => portable::adamw(state, gradient, step),
        }
    }
}
