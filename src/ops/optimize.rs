//! What an optimizer step does: the gradients' norm, clipping, AdamW.
//!
//! Factors of a whole step (learning rate, bias corrections) are a few scalars that the host
//! computes once for all elements; like loop counters they are not ops.

use candle_core::{CpuStorage, DType, InplaceOp2, Layout, Storage, bail};
use rayon::prelude::*;

use super::{
    Tensor,
    cuda::{Arg, File, Kernels},
    gemv::dot,
};
use crate::{
    error::Result,
    ledger::{Dtype, Op},
    meter::At,
};

/// Elements that one task takes.
const CHUNK: usize = 1 << 14;

/// Σ x² of each tensor, on account of the module beside it. What a device sums is copied at once.
///
/// # Errors
/// The device's.
pub fn sums_of_squares(tensors: &[(At, &Tensor)]) -> Result<Vec<f64>> {
    let all: Vec<_> = tensors.iter().map(|(_, x)| &x.data).collect();
    let Some(kernels) = Kernels::of(&all) else {
        return tensors.iter().map(|(at, x)| sum_squares(*at, x)).collect();
    };
    let device = all[0].device();
    let sums = candle_core::Tensor::zeros(all.len(), DType::F64, device)?;
    for (i, (at, x)) in tensors.iter().enumerate() {
        let op = Op::SumSquares { n: x.elements() as u64 };
        at.run(op, Dtype::F32, device, || kernels.sum_squares(&x.data, &sums, i))?;
    }
    Ok(sums.to_vec1()?)
}

/// Σ x².
fn sum_squares(at: At, x: &Tensor) -> Result<f64> {
    let op = Op::SumSquares { n: x.elements() as u64 };
    let wide = x.data.to_dtype(DType::F32)?.contiguous()?;
    at.run(op, Dtype::F32, x.device(), || {
        let (storage, layout) = wide.storage_and_layout();
        match (&*storage, layout.contiguous_offsets()) {
            // In f64 between chunks: a sum of many small squares in f32 would lose them.
            (Storage::Cpu(CpuStorage::F32(x)), Some((start, end))) => {
                let squares = |x: &[f32]| f64::from(dot(x, x, |v| v));
                Ok(x[start..end].par_chunks(CHUNK).map(squares).collect::<Vec<_>>().iter().sum())
            }
            _ => {
                drop(storage);
                Ok(f64::from(wide.sqr()?.sum_all()?.to_scalar::<f32>()?))
            }
        }
    })
}

/// The norm of all gradients from their sums of squares, and the factor that brings it down to
/// `most`: min(1, most / (norm + 1e-6)), as PyTorch's `clip_grad_norm_`.
///
/// # Errors
/// None of its own.
pub fn clip_factor(at: At, sums: &[f64], most: f64) -> Result<(f64, f64)> {
    let op = Op::ClipFactor { tensors: sums.len() as u64 };
    at.run(op, Dtype::F32, &candle_core::Device::Cpu, || {
        let norm = sums.iter().sum::<f64>().sqrt();
        Ok((norm, (most / (norm + 1e-6)).min(1.0)))
    })
}

/// A parameter's f32 master and the running moments of its gradient: one tensor (3, n).
#[derive(Debug, Clone)]
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
        Ok(self.0.narrow(0, 0, 1)?.reshape(parameter.data.shape())?.into())
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
        let op = Op::AdamW { n: n as u64 };
        let gradient = gradient.data.reshape((1, n))?.to_dtype(DType::F32)?.contiguous()?;
        let device = gradient.device();
        at.run(op, Dtype::F32, device, || match Kernels::of(&[&moments.0, &gradient]) {
            _ if device.is_cpu() => moments.0.inplace_op2(&gradient, self),
            Some(kernels) => self.on_cuda(&kernels, &moments.0, &gradient),
            None => self.composed(&moments.0, &gradient),
        })
    }

    fn on_cuda(
        &self,
        kernels: &Kernels,
        state: &candle_core::Tensor,
        gradient: &candle_core::Tensor,
    ) -> candle_core::Result<()> {
        let n = gradient.elem_count();
        if state.elem_count() != 3 * n {
            bail!("a gradient of {n} elements for a state of {}", state.elem_count());
        }
        let mut args = vec![Arg::Of(state), Arg::Of(gradient), Arg::U64(n as u64)];
        let factors = [self.decay, self.rate, self.correction, self.eps];
        let (b1, b2) = self.betas;
        args.extend(
            factors.into_iter().chain([b1, b2, 1.0 - b1, 1.0 - b2]).map(|x| Arg::F32(x as f32)),
        );
        let blocks = n.div_ceil(256).max(1) as u64;
        kernels.launch(File::Rows, "adamw", [blocks, 1, 1], 256, &args)
    }

    fn composed(
        &self,
        state: &candle_core::Tensor,
        g: &candle_core::Tensor,
    ) -> candle_core::Result<()> {
        let (b1, b2) = self.betas;
        let row = |i| state.narrow(0, i, 1);
        let m = ((row(1)? * b1)? + (g * (1.0 - b1))?)?;
        let v = ((row(2)? * b2)? + (g.sqr()? * (1.0 - b2))?)?;
        let denominator = ((v.sqrt()? / self.correction)? + self.eps)?;
        let p = ((row(0)? * self.decay)? - ((&m * self.rate)? / denominator)?)?;
        state.slice_set(&candle_core::Tensor::cat(&[p, m, v], 0)?, 0, 0)
    }
}

impl InplaceOp2 for AdamW {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn cpu_fwd(
        &self,
        state: &mut CpuStorage,
        state_layout: &Layout,
        gradient: &CpuStorage,
        layout: &Layout,
    ) -> candle_core::Result<()> {
        let ranges = (state_layout.contiguous_offsets(), layout.contiguous_offsets());
        let (CpuStorage::F32(state), CpuStorage::F32(g), (Some(s), Some(r))) =
            (state, gradient, ranges)
        else {
            bail!("takes dense f32");
        };
        let (state, g) = (&mut state[s.0..s.1], &g[r.0..r.1]);
        if state.len() != 3 * g.len() {
            bail!("a gradient of {} elements for a state of {}", g.len(), state.len());
        }
        let (p, moments) = state.split_at_mut(g.len());
        let (m, v) = moments.split_at_mut(g.len());
        let [decay, rate, correction, eps] =
            [self.decay, self.rate, self.correction, self.eps].map(|x| x as f32);
        let (b1, b2) = (self.betas.0 as f32, self.betas.1 as f32);
        let (rest1, rest2) = ((1.0 - self.betas.0) as f32, (1.0 - self.betas.1) as f32);
        let moments = m.par_chunks_mut(CHUNK).zip(v.par_chunks_mut(CHUNK));
        let chunks = p.par_chunks_mut(CHUNK).zip(moments).zip(g.par_chunks(CHUNK));
        chunks.for_each(|((p, (m, v)), g)| {
            for i in 0..p.len() {
                m[i] = b1 * m[i] + rest1 * g[i];
                v[i] = b2 * v[i] + rest2 * g[i] * g[i];
                p[i] = decay * p[i] - rate * m[i] / (v[i].sqrt() / correction + eps);
            }
        });
        Ok(())
    }
}
