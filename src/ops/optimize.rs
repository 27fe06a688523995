//! What an optimizer step does: the gradients' norm, clipping, AdamW.
//!
//! Factors of a whole step (learning rate, bias corrections) are a few scalars that the host
//! computes once for all elements; like loop counters they are not ops.

use std::iter;

use candle_core::{DType, Device};

use super::{
    Kernel, Nodes, Ops, Tensor,
    backend::Backend,
    cpu,
    cuda::{AdamWFactors, Kernels, TENSORS, Updated},
    elementwise::{Element, computed},
    moments::{Moments, rows},
    portable,
    rounding::Draws,
    scale,
};
use crate::{
    error::Result,
    ledger::{Dtype, MomentDtype, Op},
    meter::At,
};

/// Σ x² of each tensor, of any type, on account of the module beside it.
///
/// # Errors
/// The device's.
pub fn sums_of_squares(tensors: &[(At, &Tensor)]) -> Result<Vec<f64>> {
    let all: Vec<_> = tensors.iter().map(|(_, x)| &x.data).collect();
    let Some(kernels) = Kernels::of(&all) else {
        return tensors.iter().map(|(at, x)| at.launch(&SumSquares { x })).collect();
    };
    // All are started before the first is waited for.
    let launches = tensors
        .chunks(TENSORS)
        .map(|several| several[0].0.launch(&SumsOfSquares { kernels: &kernels, tensors: several }));
    let sums = launches.collect::<Result<Vec<_>>>()?;
    let on_host = sums.iter().map(candle_core::Tensor::to_vec1);
    Ok(on_host.collect::<candle_core::Result<Vec<_>>>()?.concat())
}

fn report_squares<'a>(ops: &mut Ops<'a>, at: At<'a>, x: &Tensor) {
    ops.add_at(at, Op::SumSquares { n: x.elements() as u64 }, Dtype::F32);
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
        report_squares(ops, ops.at(), self.x);
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

/// Those of several tensors on a GPU, as f64 in their order.
struct SumsOfSquares<'a> {
    kernels: &'a Kernels,
    tensors: &'a [(At<'a>, &'a Tensor)],
}

impl Kernel for SumsOfSquares<'_> {
    type Output = candle_core::Tensor;

    fn device(&self) -> &Device {
        self.kernels.device()
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        self.tensors.iter().for_each(|(at, x)| report_squares(ops, *at, x));
        Ok(())
    }

    fn run(&self, nodes: &Nodes) -> candle_core::Result<candle_core::Tensor> {
        let all: Vec<_> = self.tensors.iter().map(|(_, x)| &x.data).collect();
        self.kernels.sum_squares(nodes, &all)
    }
}

/// sum + x in f32, whatever the type of x: of gradients, over passes.
///
/// # Errors
/// Shapes that differ.
pub(super) fn add_to_sum(at: At, sum: &Tensor, x: &Tensor) -> Result<Tensor> {
    anyhow::ensure!(sum.dims() == x.dims(), "{:?} beside {:?}", sum.dims(), x.dims());
    at.launch(&AddToSum { sum: &sum.data, x: &x.data })
}

struct AddToSum<'a> {
    sum: &'a candle_core::Tensor,
    x: &'a candle_core::Tensor,
}

impl Kernel for AddToSum<'_> {
    type Output = Tensor;

    fn device(&self) -> &Device {
        self.sum.device()
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        ops.add(Op::Add { n: self.sum.elem_count() as u64 }, Dtype::F32);
        Ok(())
    }

    fn run(&self, nodes: &Nodes) -> candle_core::Result<Tensor> {
        let (sum, x) = (self.sum, self.x);
        match Kernels::of(&[x]) {
            Some(kernels) => Ok(Tensor::of(kernels.add_to_sum(nodes, sum, x)?)),
            None => computed(Element::Add, sum, &x.to_dtype(DType::F32)?, nodes),
        }
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

/// One step of AdamW (Loshchilov and Hutter 2019), as PyTorch computes it.
#[derive(Debug, Clone, Copy)]
pub struct AdamW {
    /// Factor on every gradient, where it is clipped.
    pub clip: Option<f64>,
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

/// What a step does to one parameter.
#[derive(Clone, Copy)]
pub struct Update<'a> {
    /// On whose account its gradient is clipped.
    pub clipping: At<'a>,
    /// On whose account it is updated.
    pub at: At<'a>,
    /// Its master and moments.
    pub moments: &'a Moments,
    /// What decides how moments in bf16 are rounded: other draws for each update and parameter.
    pub draws: Draws,
    /// Its gradient, of any type.
    pub gradient: &'a Tensor,
    /// It as the model reads it: a view of the master, or a narrower copy.
    pub parameter: &'a Tensor,
}

impl AdamW {
    /// p ← decay·p − rate · m / (√v / correction + eps), with m ← β₁·m + (1 − β₁)·g and
    /// v ← β₂·v + (1 − β₂)·g², g being the clipped gradient in f32, of each parameter in place. All is
    /// computed in f32; moments that are kept in bf16 are rounded when p has been computed of them.
    ///
    /// # Errors
    /// A gradient of another size.
    pub fn step(&self, updates: &[Update]) -> Result<()> {
        let gradients: Vec<_> = updates.iter().map(|update| &update.gradient.data).collect();
        // A GPU's kernels widen and clip what they read, and take many parameters at once.
        if Kernels::of(&gradients).is_some() {
            return updates.chunks(TENSORS).try_for_each(|updates| {
                let gradients = updates.iter().map(|u| u.gradient.data.clone()).collect();
                updates[0].at.launch(&Updates { step: self, updates, gradients })
            });
        }
        let step = Self { clip: None, ..*self };
        updates.iter().try_for_each(|update| {
            let mut gradient = update.gradient.to_dtype(Dtype::F32)?;
            if let Some(clip) = self.clip {
                let factor = [clip as f32].to_vec();
                let factor = Tensor::from_vec(factor, 1, Dtype::F32, gradient.device())?;
                gradient = scale(update.clipping, &gradient, &factor)?;
            }
            let (updates, gradients) = ([*update], vec![gradient.data.contiguous()?]);
            update.at.launch(&Updates { step: &step, updates: &updates, gradients })
        })
    }

    fn factors(&self) -> AdamWFactors {
        let Self { clip, decay, rate, correction, betas: (b1, b2), eps } = *self;
        AdamWFactors {
            clip: clip.unwrap_or(1.0) as f32,
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

struct Updates<'a> {
    step: &'a AdamW,
    updates: &'a [Update<'a>],
    /// Of each, dense and of a type that the kernels take.
    gradients: Vec<candle_core::Tensor>,
}

impl Kernel for Updates<'_> {
    type Output = ();

    fn device(&self) -> &Device {
        self.updates[0].gradient.device()
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        for (update, gradient) in iter::zip(self.updates, &self.gradients) {
            let Moments { state, dtype } = update.moments;
            let (n, state) = (gradient.elem_count(), state.elem_count());
            let fits = state == rows(*dtype) * n && update.parameter.elements() == n;
            anyhow::ensure!(fits, "a gradient of {n} elements for a state of {state}");
            let n = n as u64;
            if self.step.clip.is_some() {
                ops.add_at(update.clipping, Op::Scale { n }, Dtype::F32);
            }
            ops.add_at(update.at, Op::AdamW { n, moments: *dtype }, Dtype::F32);
        }
        Ok(())
    }

    fn run(&self, nodes: &Nodes) -> candle_core::Result<()> {
        let (step, factors) = (self.step, self.step.factors());
        let all = iter::zip(self.updates, &self.gradients);
        match Backend::of(&self.gradients.iter().collect::<Vec<_>>()) {
            Backend::Cpu => {
                for (Update { moments, draws, parameter, .. }, gradient) in all {
                    cpu::adamw(&moments.state, gradient, &factors, *draws)?;
                    moments.publish_to(&parameter.data)?;
                }
            }
            Backend::Cuda(kernels) => {
                // What the kernel writes beside the master.
                let is_bf16 = |t: &candle_core::Tensor| t.dtype() == DType::BF16;
                let updated: Vec<_> = all
                    .map(|(Update { moments, draws, parameter, .. }, gradient)| Updated {
                        state: &moments.state,
                        draws: *draws,
                        gradient,
                        narrow: Some(&parameter.data).filter(|t| is_bf16(t)),
                    })
                    .collect();
                kernels.adamw(nodes, &updated, factors)?;
                for Update { moments, parameter, .. } in self.updates {
                    if !is_bf16(&parameter.data) {
                        moments.publish_to(&parameter.data)?;
                    }
                }
            }
            Backend::Portable => {
                for (Update { moments, draws, parameter, .. }, gradient) in all {
                    match moments.dtype {
                        MomentDtype::F32 => portable::adamw(&moments.state, gradient, step)?,
                        MomentDtype::BF16 => {
                            on_host(&moments.state, gradient, &factors, *draws)?;
                        }
                    }
                    moments.publish_to(&parameter.data)?;
                }
            }
        }
        Ok(())
    }
}

/// The CPU's update, where no kernel of the device takes words of two moments.
fn on_host(
    state: &candle_core::Tensor,
    gradient: &candle_core::Tensor,
    factors: &AdamWFactors,
    draws: Draws,
) -> candle_core::Result<()> {
    let [held, gradient] = [state, gradient].map(|t| t.to_device(&Device::Cpu));
    let held = held?.copy()?;
    cpu::adamw(&held, &gradient?, factors, draws)?;
    state.slice_set(&held.to_device(state.device())?, 0, 0)
}
