//! Cross-entropy over the vocabulary.

use candle_core::{DType, Device};

use super::{Kernel, Nodes, Ops, Tensor, Unshared, backend::Backend, cpu, cuda::Kernels, portable};
use crate::{
    error::Result,
    ledger::{Dtype, Op},
    meter::At,
};

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

/// −log softmax(logits) at each row's target, natural log, computed in f32. The logits (rows, V) are
/// used up.
///
/// # Errors
/// As many targets and weights as rows are needed, and targets below V.
pub fn cross_entropy(at: At, logits: Unshared, targets: &[u32], weights: &[f32]) -> Result<Losses> {
    let logits = checked(logits, targets, weights)?;
    let by_row = at.launch(&CrossEntropy { logits: &logits, targets })?;
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
    let (by_row, gradient) =
        at.launch(&CrossEntropyWithGradient { logits: &logits, targets, weights })?;
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

/// Logits, in whose place anything may stand afterwards → losses.
struct CrossEntropy<'a> {
    logits: &'a Unshared, // (rows, V)
    targets: &'a [u32],   // (rows)
}

impl Kernel for CrossEntropy<'_> {
    type Output = ByRow;

    fn device(&self) -> &Device {
        self.logits.0.device()
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        let (rows, width) = self.logits.0.rows_width()?;
        ops.add(Op::CrossEntropy { rows, width }, Dtype::F32);
        Ok(())
    }

    fn run(&self, nodes: &Nodes) -> candle_core::Result<ByRow> {
        let (logits, targets) = (&self.logits.0.data, self.targets);
        match Backend::of(&[logits]) {
            Backend::Cpu => Ok(ByRow::Host(cpu::cross_entropy(logits, targets)?.0)),
            Backend::Cuda(kernels) => {
                let targets = candle_core::Tensor::new(targets, logits.device())?;
                Ok(ByRow::Device(kernels.cross_entropy(nodes, logits, &targets, None)?))
            }
            Backend::Portable => Ok(ByRow::Host(portable::cross_entropy(logits, targets)?.1)),
        }
    }
}

/// Logits → losses, and in the logits' place their gradients. Both in one: on a GPU the logits of a
/// row are still in the cache when its gradient is made from them.
struct CrossEntropyWithGradient<'a> {
    logits: &'a Unshared, // (rows, V)
    targets: &'a [u32],   // (rows)
    weights: &'a [f32],   // (rows)
}

impl Kernel for CrossEntropyWithGradient<'_> {
    type Output = (ByRow, Tensor);

    fn device(&self) -> &Device {
        self.logits.0.device()
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        let (rows, width) = self.logits.0.rows_width()?;
        ops.add(Op::CrossEntropy { rows, width }, Dtype::F32);
        ops.add(Op::CrossEntropyGrad { rows, width }, Dtype::F32);
        Ok(())
    }

    fn run(&self, nodes: &Nodes) -> candle_core::Result<Self::Output> {
        let Self { logits, targets, weights } = *self;
        let logits = &logits.0.data;
        match Backend::of(&[logits]) {
            Backend::Cpu => {
                let (losses, sums) = cpu::cross_entropy(logits, targets)?;
                cpu::cross_entropy_grad(logits, targets, weights, &sums)?;
                Ok((ByRow::Host(losses), self.logits.0.detach()))
            }
            Backend::Cuda(kernels) => {
                let targets = candle_core::Tensor::new(targets, logits.device())?;
                let weights = candle_core::Tensor::new(weights, logits.device())?;
                let losses = kernels.cross_entropy(nodes, logits, &targets, Some(&weights))?;
                Ok((ByRow::Device(losses), self.logits.0.detach()))
            }
            Backend::Portable => {
                let (exponentials, losses, sums) = portable::cross_entropy(logits, targets)?;
                let dx = portable::cross_entropy_grad(&exponentials, targets, weights, &sums)?;
                Ok((ByRow::Host(losses), Tensor::of(dx)))
            }
        }
    }
}
