//! Cross-entropy over the vocabulary.

use std::sync::{Mutex, PoisonError};

use candle_core::{CpuStorage, D, DType, InplaceOp1, Layout, bail};
use rayon::prelude::*;

use super::{Tensor, cuda::Kernels, exp::exponentials};
use crate::{
    error::Result,
    ledger::{Dtype, Op},
    meter::At,
};

/// Weighted cross-entropy of rows of logits, and what its gradient is made from: the logits'
/// exponentials, in their place, and each row's sum of them.
#[derive(Debug)]
pub struct CrossEntropy {
    losses: ByRow,        // (rows)
    exponentials: Tensor, // (rows, V)
    sums: ByRow,          // (rows)
}

/// One f32 a row: where the kernel that wrote them left them.
#[derive(Debug, Clone)]
enum ByRow {
    Host(Vec<f32>),
    Device(candle_core::Tensor),
}

/// Losses of rows of logits, not yet summed.
#[derive(Debug)]
pub struct Losses {
    by_row: ByRow,
    weights: Vec<f32>,
}

impl Losses {
    /// Σ over the rows of all `parts` of weight · loss. What lies on the device is copied at once.
    ///
    /// # Errors
    /// The device's.
    pub fn sum(parts: &[Self]) -> Result<f64> {
        let on_device: Vec<_> = parts
            .iter()
            .filter_map(|part| match &part.by_row {
                ByRow::Device(losses) => Some(losses),
                ByRow::Host(_) => None,
            })
            .collect();
        let copied: Vec<f32> = match on_device.is_empty() {
            true => vec![],
            false => candle_core::Tensor::cat(&on_device, 0)?.to_vec1()?,
        };
        let mut copied = copied.as_slice();
        let mut sum = 0.0;
        for Self { by_row, weights } in parts {
            let losses = match by_row {
                ByRow::Host(losses) => losses,
                ByRow::Device(_) => {
                    let (these, rest) = copied.split_at(weights.len());
                    copied = rest;
                    these
                }
            };
            sum += losses.iter().zip(weights).map(|(l, w)| f64::from(l * w)).sum::<f64>();
        }
        Ok(sum)
    }
}

impl CrossEntropy {
    /// Of `logits` (rows, V), whose storage is overwritten; computed in f32.
    ///
    /// # Errors
    /// As many targets and weights as rows are needed, and targets below V.
    pub fn new(at: At, logits: Tensor, targets: &[u32], weights: &[f32]) -> Result<Self> {
        let (rows, width) = logits.rows_width()?;
        let fits = targets.len() as u64 == rows && weights.len() as u64 == rows;
        anyhow::ensure!(fits, "{} targets for {rows} rows", targets.len());
        let known = targets.iter().all(|&id| u64::from(id) < width);
        anyhow::ensure!(known, "a target is outside the vocabulary of {width}");
        let op = Op::CrossEntropy { rows, width };
        if let Some(kernels) = Kernels::of(&[&logits.data]) {
            let exponentials = logits.data.reshape((rows as usize, width as usize))?;
            let targets = candle_core::Tensor::new(targets, logits.device())?;
            let (losses, sums) = at.run(op, Dtype::F32, logits.device(), || {
                kernels.cross_entropy(&exponentials, &targets)
            })?;
            let (losses, sums) = (ByRow::Device(losses), ByRow::Device(sums));
            return Ok(Self { losses, exponentials: exponentials.into(), sums });
        }
        let logits = logits.data.to_dtype(DType::F32)?;
        at.run(op, Dtype::F32, &logits.device().clone(), || {
            let (exponentials, losses, sums) = match logits.device().is_cpu() {
                true => on_cpu(logits, targets)?,
                false => composed(&logits, targets)?,
            };
            let (losses, sums) = (ByRow::Host(losses), ByRow::Host(sums));
            Ok(Self { losses, exponentials: exponentials.into(), sums })
        })
    }

    /// −log softmax(logits) at each row's target, natural log, with the rows' weights.
    pub fn losses(&self, weights: &[f32]) -> Losses {
        Losses { by_row: self.losses.clone(), weights: weights.to_vec() }
    }

    /// Gradient of the loss towards the logits, (rows, V): weight · (softmax − 1 at the target).
    ///
    /// # Errors
    /// The device's.
    pub fn gradient(self, at: At, targets: &[u32], weights: &[f32]) -> Result<Tensor> {
        let (rows, width) = self.exponentials.rows_width()?;
        let op = Op::CrossEntropyGrad { rows, width };
        let exponentials = self.exponentials.data;
        let device = exponentials.device().clone();
        let sums = match (&self.sums, Kernels::of(&[&exponentials])) {
            (ByRow::Host(sums), _) => sums,
            (ByRow::Device(sums), Some(kernels)) => {
                let targets = candle_core::Tensor::new(targets, &device)?;
                let weights = candle_core::Tensor::new(weights, &device)?;
                at.run(op, Dtype::F32, &device, || {
                    kernels.cross_entropy_grad(&exponentials, &targets, &weights, sums)
                })?;
                return Ok(exponentials.into());
            }
            (ByRow::Device(_), None) => anyhow::bail!("sums on a device without kernels"),
        };
        let gradient = at.run(op, Dtype::F32, &device, || {
            let kernel = Gradient { targets, weights, sums };
            match device.is_cpu() {
                true => exponentials.inplace_op1(&kernel).map(|()| exponentials),
                false => kernel.composed(&exponentials),
            }
        })?;
        Ok(gradient.into())
    }
}

type Forward = (candle_core::Tensor, Vec<f32>, Vec<f32>);

fn on_cpu(logits: candle_core::Tensor, targets: &[u32]) -> candle_core::Result<Forward> {
    let kernel = Exponentials { targets, out: Mutex::default() };
    logits.inplace_op1(&kernel)?;
    let (losses, sums) = kernel.out.into_inner().unwrap_or_else(PoisonError::into_inner);
    Ok((logits, losses, sums))
}

fn composed(logits: &candle_core::Tensor, targets: &[u32]) -> candle_core::Result<Forward> {
    let shifted = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?)?;
    let at_target = shifted.gather(&column(targets, logits)?, 1)?;
    let exponentials = shifted.exp()?;
    let sums = exponentials.sum_keepdim(D::Minus1)?;
    let losses = sums.log()?.sub(&at_target)?;
    Ok((exponentials, losses.flatten_all()?.to_vec1()?, sums.flatten_all()?.to_vec1()?))
}

fn column(ids: &[u32], like: &candle_core::Tensor) -> candle_core::Result<candle_core::Tensor> {
    candle_core::Tensor::from_slice(ids, (ids.len(), 1), like.device())
}

/// Logits → exp(logit − max), row by row; (losses, sums) on the side.
struct Exponentials<'a> {
    targets: &'a [u32],
    out: Mutex<(Vec<f32>, Vec<f32>)>,
}

impl InplaceOp1 for Exponentials<'_> {
    fn name(&self) -> &'static str {
        "cross_entropy"
    }

    fn cpu_fwd(&self, x: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let (x, width) = rows(x, layout)?;
        let row = |(x, &target): (&mut [f32], &u32)| {
            let logit = x[target as usize];
            let (max, sum) = exponentials(x);
            (sum.ln() - (logit - max), sum)
        };
        let out = x.par_chunks_mut(width).zip(self.targets).map(row).unzip();
        *self.out.lock().unwrap_or_else(PoisonError::into_inner) = out;
        Ok(())
    }
}

/// Exponentials → weight · (exponential / sum − 1 at the target), row by row.
struct Gradient<'a> {
    targets: &'a [u32],
    weights: &'a [f32],
    sums: &'a [f32],
}

impl InplaceOp1 for Gradient<'_> {
    fn name(&self) -> &'static str {
        "cross_entropy_grad"
    }

    fn cpu_fwd(&self, x: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let (x, width) = rows(x, layout)?;
        let of_rows = self.targets.par_iter().zip(self.weights).zip(self.sums);
        x.par_chunks_mut(width).zip(of_rows).for_each(|(x, ((&target, &weight), &sum))| {
            let factor = weight / sum;
            x.iter_mut().for_each(|x| *x *= factor);
            x[target as usize] -= weight;
        });
        Ok(())
    }
}

impl Gradient<'_> {
    fn composed(&self, x: &candle_core::Tensor) -> candle_core::Result<candle_core::Tensor> {
        let rows = self.targets.len();
        let column =
            |values: Vec<f32>| candle_core::Tensor::from_vec(values, (rows, 1), x.device());
        let factors = self.weights.iter().zip(self.sums).map(|(w, s)| w / s).collect();
        let minus = column(self.weights.iter().map(|w| -w).collect())?;
        let scaled = x.broadcast_mul(&column(factors)?)?;
        scaled.scatter_add(&self::column(self.targets, x)?, &minus, 1)
    }
}

/// The dense f32 elements of a row-major matrix, and its width.
fn rows<'a>(x: &'a mut CpuStorage, layout: &Layout) -> candle_core::Result<(&'a mut [f32], usize)> {
    let width = layout.dims().last().copied().unwrap_or(1).max(1);
    match (x, layout.contiguous_offsets()) {
        (CpuStorage::F32(x), Some((start, end))) => Ok((&mut x[start..end], width)),
        _ => bail!("takes dense f32"),
    }
}
