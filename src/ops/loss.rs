//! Cross-entropy over the vocabulary.

use candle_core::{DType, Device};

use super::{Kernel, Nodes, Ops, Tensor, Unshared, cpu, cuda::Kernels, portable};
use crate::{
    error::Result,
    ledger::{Dtype, Op},
    meter::At,
};

/// Weighted cross-entropy of rows of logits, and what its gradient is made from: the logits'
/// exponentials, in their place, and each row's sum of them.
#[derive(Debug)]
pub struct CrossEntropy {
    losses: ByRow,          // (rows)
    exponentials: Unshared, // (rows, V)
    sums: ByRow,            // (rows)
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
    /// Of `logits` (rows, V), which are overwritten; computed in f32.
    ///
    /// # Errors
    /// As many targets and weights as rows are needed, and targets below V.
    pub fn new(at: At, logits: Unshared, targets: &[u32], weights: &[f32]) -> Result<Self> {
        let (rows, width) = logits.0.rows_width()?;
        let fits = targets.len() as u64 == rows && weights.len() as u64 == rows;
        anyhow::ensure!(fits, "{} targets for {rows} rows", targets.len());
        let known = targets.iter().all(|&id| u64::from(id) < width);
        anyhow::ensure!(known, "a target is outside the vocabulary of {width}");
        let mut logits = logits.reshape((rows as usize, width as usize))?;
        if Kernels::of(&[&logits.0.data]).is_none() {
            logits = Unshared(Tensor::of(logits.0.data.to_dtype(DType::F32)?));
        }
        let (exponentials, losses, sums) = at.launch(&Forward { logits: &logits, targets })?;
        Ok(Self { losses, exponentials: Unshared(exponentials), sums })
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
        let Self { exponentials, sums, .. } = self;
        at.launch(&Backward { exponentials: &exponentials, targets, weights, sums: &sums })
    }
}

/// Logits → exp(logit − max), row by row; (those, losses, sums).
struct Forward<'a> {
    logits: &'a Unshared, // (rows, V)
    targets: &'a [u32],   // (rows)
}

impl Kernel for Forward<'_> {
    type Output = (Tensor, ByRow, ByRow);

    fn device(&self) -> &Device {
        self.logits.0.device()
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        let (rows, width) = self.logits.0.rows_width()?;
        ops.add(Op::CrossEntropy { rows, width }, Dtype::F32);
        Ok(())
    }

    fn run(&self, nodes: &Nodes) -> candle_core::Result<Self::Output> {
        let (logits, targets) = (&self.logits.0.data, self.targets);
        if let Some(kernels) = Kernels::of(&[logits]) {
            let targets = candle_core::Tensor::new(targets, logits.device())?;
            let (losses, sums) = kernels.cross_entropy(nodes, logits, &targets)?;
            return Ok((self.logits.0.detach(), ByRow::Device(losses), ByRow::Device(sums)));
        }
        let (exponentials, losses, sums) = match logits.device().is_cpu() {
            true => {
                let (losses, sums) = cpu::cross_entropy(logits, targets)?;
                (logits.clone(), losses, sums)
            }
            false => portable::cross_entropy(logits, targets)?,
        };
        Ok((Tensor::of(exponentials), ByRow::Host(losses), ByRow::Host(sums)))
    }
}

/// Exponentials → weight · (exponential / sum − 1 at the target), row by row.
struct Backward<'a> {
    exponentials: &'a Unshared, // (rows, V)
    targets: &'a [u32],         // (rows)
    weights: &'a [f32],         // (rows)
    sums: &'a ByRow,            // (rows)
}

impl Kernel for Backward<'_> {
    type Output = Tensor;

    fn device(&self) -> &Device {
        self.exponentials.0.device()
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        let (rows, width) = self.exponentials.0.rows_width()?;
        ops.add(Op::CrossEntropyGrad { rows, width }, Dtype::F32);
        Ok(())
    }

    fn run(&self, nodes: &Nodes) -> candle_core::Result<Tensor> {
        let (exponentials, device) = (&self.exponentials.0.data, self.device());
        let (targets, weights) = (self.targets, self.weights);
        match (self.sums, Kernels::of(&[exponentials])) {
            (ByRow::Device(sums), Some(kernels)) => {
                let targets = candle_core::Tensor::new(targets, device)?;
                let weights = candle_core::Tensor::new(weights, device)?;
                kernels.cross_entropy_grad(nodes, exponentials, &targets, &weights, sums)?;
            }
            (ByRow::Device(_), None) => candle_core::bail!("sums on a device without kernels"),
            (ByRow::Host(sums), _) if device.is_cpu() => {
                cpu::cross_entropy_grad(exponentials, targets, weights, sums)?;
            }
            (ByRow::Host(sums), _) => {
                let dx = portable::cross_entropy_grad(exponentials, targets, weights, sums)?;
                return Ok(Tensor::of(dx));
            }
        }
        Ok(self.exponentials.0.detach())
    }
}
