//! Cross-entropy over the vocabulary.

use candle_core::{DType, Device};

use super::{Kernel, Nodes, Ops, Tensor, Unshared, cpu, cuda::Kernels, portable};
use crate::{
    error::Result,
    ledger::{Dtype, Op},
    meter::At,
};

/// One f32 a row: where the kernel that wrote them left them.
#[derive(Debug)]
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

/// −log softmax(logits) at each row's target, natural log, computed in f32. The logits (rows, V) are
/// used up.
///
/// # Errors
/// As many targets and weights as rows are needed, and targets below V.
pub fn cross_entropy(at: At, logits: Unshared, targets: &[u32], weights: &[f32]) -> Result<Losses> {
    let logits = checked(logits, targets, weights)?;
    let by_row = match Kernels::of(&[&logits.0.data]) {
        Some(kernels) => {
            let together = Together { kernels: &kernels, logits: &logits, targets, weights: None };
            ByRow::Device(at.launch(&together)?)
        }
        None => ByRow::Host(at.launch(&Exponentials { logits: &logits, targets })?.losses),
    };
    Ok(Losses { by_row, weights: weights.to_vec() })
}

/// As [`cross_entropy`], with the gradient of Σ weight · loss towards the logits, (rows, V):
/// weight · (softmax − 1 at the target).
///
/// # Errors
/// As [`cross_entropy`].
pub fn cross_entropy_with_gradient(
    at: At,
    logits: Unshared,
    targets: &[u32],
    weights: &[f32],
) -> Result<(Losses, Tensor)> {
    let logits = checked(logits, targets, weights)?;
    let (by_row, gradient) = match Kernels::of(&[&logits.0.data]) {
        Some(kernels) => {
            let kernels = &kernels;
            let weights = Some(weights);
            let losses = at.launch(&Together { kernels, logits: &logits, targets, weights })?;
            (ByRow::Device(losses), logits.0.detach())
        }
        None => {
            let scored = at.launch(&Exponentials { logits: &logits, targets })?;
            let gradient = at.launch(&Gradient { scored: &scored, targets, weights })?;
            (ByRow::Host(scored.losses), gradient)
        }
    };
    Ok((Losses { by_row, weights: weights.to_vec() }, gradient))
}

/// Logits that fit what they are scored by, as (rows, V) of a type that the kernels take.
fn checked(logits: Unshared, targets: &[u32], weights: &[f32]) -> Result<Unshared> {
    let (rows, width) = logits.0.rows_width()?;
    let fits = targets.len() as u64 == rows && weights.len() as u64 == rows;
    anyhow::ensure!(fits, "{} targets for {rows} rows", targets.len());
    let known = targets.iter().all(|&id| u64::from(id) < width);
    anyhow::ensure!(known, "a target is outside the vocabulary of {width}");
    let logits = logits.reshape((rows as usize, width as usize))?;
    match Kernels::of(&[&logits.0.data]) {
        Some(_) => Ok(logits),
        None => Ok(Unshared(Tensor::of(logits.0.data.to_dtype(DType::F32)?))),
    }
}

/// Logits → losses (rows) by a kernel of a GPU's; with weights, the logits' gradient in their place,
/// for which those of a row are still in the cache.
struct Together<'a> {
    kernels: &'a Kernels,
    logits: &'a Unshared,       // (rows, V)
    targets: &'a [u32],         // (rows)
    weights: Option<&'a [f32]>, // (rows)
}

impl Kernel for Together<'_> {
    type Output = candle_core::Tensor;

    fn device(&self) -> &Device {
        self.logits.0.device()
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        let (rows, width) = self.logits.0.rows_width()?;
        ops.add(Op::CrossEntropy { rows, width }, Dtype::F32);
        if self.weights.is_some() {
            ops.add(Op::CrossEntropyGrad { rows, width }, Dtype::F32);
        }
        Ok(())
    }

    fn run(&self, nodes: &Nodes) -> candle_core::Result<candle_core::Tensor> {
        let device = self.device();
        let targets = candle_core::Tensor::new(self.targets, device)?;
        let weights = self.weights.map(|w| candle_core::Tensor::new(w, device)).transpose()?;
        self.kernels.cross_entropy(nodes, &self.logits.0.data, &targets, weights.as_ref())
    }
}

/// What is known of rows of logits without such a kernel.
struct Scored {
    losses: Vec<f32>,
    exponentials: Tensor, // (rows, V), exp(logit − max)
    sums: Vec<f32>,       // of each row of them
}

/// Logits, in whose place anything may stand afterwards → losses, and what the gradient is made from.
struct Exponentials<'a> {
    logits: &'a Unshared, // (rows, V)
    targets: &'a [u32],   // (rows)
}

impl Kernel for Exponentials<'_> {
    type Output = Scored;

    fn device(&self) -> &Device {
        self.logits.0.device()
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        let (rows, width) = self.logits.0.rows_width()?;
        ops.add(Op::CrossEntropy { rows, width }, Dtype::F32);
        Ok(())
    }

    fn run(&self, _: &Nodes) -> candle_core::Result<Scored> {
        let (logits, targets) = (&self.logits.0.data, self.targets);
        if logits.device().is_cpu() {
            let (losses, sums) = cpu::cross_entropy(logits, targets)?;
            return Ok(Scored { losses, exponentials: self.logits.0.detach(), sums });
        }
        let (exponentials, losses, sums) = portable::cross_entropy(logits, targets)?;
        Ok(Scored { losses, exponentials: Tensor::of(exponentials), sums })
    }
}

/// Exponentials → weight · (exponential / sum − 1 at the target), row by row.
struct Gradient<'a> {
    scored: &'a Scored,
    targets: &'a [u32], // (rows)
    weights: &'a [f32], // (rows)
}

impl Kernel for Gradient<'_> {
    type Output = Tensor;

    fn device(&self) -> &Device {
        self.scored.exponentials.device()
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        let (rows, width) = self.scored.exponentials.rows_width()?;
        ops.add(Op::CrossEntropyGrad { rows, width }, Dtype::F32);
        Ok(())
    }

    fn run(&self, _: &Nodes) -> candle_core::Result<Tensor> {
        let Self { scored: Scored { exponentials, sums, .. }, targets, weights } = *self;
        let all = &exponentials.data;
        if self.device().is_cpu() {
            cpu::cross_entropy_grad(all, targets, weights, sums)?;
            return Ok(exponentials.detach());
        }
        portable::cross_entropy_grad(all, targets, weights, sums).map(Tensor::of)
    }
}
