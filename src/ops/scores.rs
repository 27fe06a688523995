//! What blocked attention does with the scores of a block: its part of the mask, softmax with what is
//! kept of it, the same again, and its gradient.

use candle_core::{D, DType, Device};

use super::{
    Kernel, Nodes, Ops, Tensor, Unshared,
    backend::Backend,
    cpu,
    elementwise::{Element, computed},
    portable,
};
use crate::{error::Result, ledger::Op, meter::At};

/// scores (…, t, w) with masks (t, m) added to their columns from the ones beside these on, in
/// place: one op, whatever the number of masks. Without masks, as they are.
pub(super) fn masked_in_part(
    at: At,
    scores: Unshared,
    masks: &[(usize, Tensor)],
) -> Result<Unshared> {
    if !masks.is_empty() {
        at.launch(&Masked { scores: &scores.0.data, masks })?;
    }
    Ok(scores)
}

/// Softmax of scores in their place, and each row's maximum and sum of exponentials: (…, w) and, in
/// f32, (…, 2).
pub(super) fn softmax_kept(at: At, scores: Unshared) -> Result<(Tensor, Tensor)> {
    at.launch(&SoftmaxKept { scores: &scores })
}

/// exp(score − max) / sum once more, in the place of scores (…, w), from what was `kept`, (…, 2).
pub(super) fn softmax_again(at: At, scores: Unshared, kept: &Tensor) -> Result<Tensor> {
    at.launch(&SoftmaxAgain { scores: &scores, kept })
}

/// The sum of a · b over each row of (…, w): (…, 1), in f32.
pub(super) fn row_dots(at: At, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    at.launch(&RowDots { a, b })
}

/// p · (dp − dots) of weights p (…, w), in the place of their gradients dp; dots are (…, 1).
pub(super) fn scores_grad(at: At, p: &Tensor, dp: Unshared, dots: &Tensor) -> Result<Tensor> {
    at.launch(&ScoresGrad { p, dp: &dp, dots })
}

struct Masked<'a> {
    scores: &'a candle_core::Tensor, // (…, G·t, w)
    masks: &'a [(usize, Tensor)],    // first column, (t, m)
}

impl Kernel for Masked<'_> {
    type Output = ();

    fn device(&self) -> &Device {
        self.scores.device()
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        let width = self.scores.dim(D::Minus1)?;
        let rows = (self.scores.elem_count() / width.max(1)) as u64;
        let masked: usize = self.masks.iter().map(|(_, mask)| mask.dims()[1]).sum();
        ops.add(Op::Mask { rows, width: masked as u64 }, super::dtype_of(self.scores)?);
        Ok(())
    }

    fn run(&self, nodes: &Nodes) -> candle_core::Result<()> {
        let width = self.scores.dim(D::Minus1)?;
        for (start, Tensor { data: mask, .. }) in self.masks {
            let (rows, columns) = mask.dims2()?;
            let scores = self.scores.reshape(((), rows, width))?;
            let part = scores.narrow(2, *start, columns)?.contiguous()?;
            let masked = computed(Element::Add, &part, mask, nodes)?;
            scores.slice_set(&masked.data, 2, *start)?;
        }
        Ok(())
    }
}

struct SoftmaxKept<'a> {
    scores: &'a Unshared,
}

impl Kernel for SoftmaxKept<'_> {
    type Output = (Tensor, Tensor);

    fn device(&self) -> &Device {
        self.scores.0.device()
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        let (rows, width) = self.scores.0.rows_width()?;
        ops.add(Op::Softmax { rows, width }, self.scores.0.dtype()?);
        Ok(())
    }

    fn run(&self, _: &Nodes) -> candle_core::Result<(Tensor, Tensor)> {
        let x = &self.scores.0.data;
        match Backend::of(&[x]) {
            Backend::Cpu => Ok((self.scores.0.detach(), Tensor::of(cpu::softmax_kept(x)?))),
            Backend::Cuda(_) | Backend::Portable => {
                let (weights, kept) = portable::softmax_kept(x)?;
                Ok((Tensor::of(weights), Tensor::of(kept)))
            }
        }
    }
}

struct SoftmaxAgain<'a> {
    scores: &'a Unshared,
    kept: &'a Tensor,
}

impl Kernel for SoftmaxAgain<'_> {
    type Output = Tensor;

    fn device(&self) -> &Device {
        self.kept.device()
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        let (rows, width) = self.scores.0.rows_width()?;
        ops.add(Op::SoftmaxAgain { rows, width }, self.scores.0.dtype()?);
        Ok(())
    }

    fn run(&self, _: &Nodes) -> candle_core::Result<Tensor> {
        let (x, kept) = (&self.scores.0.data, &self.kept.data);
        match Backend::of(&[x, kept]) {
            Backend::Cpu => {
                cpu::softmax_again(x, kept)?;
                Ok(self.scores.0.detach())
            }
            Backend::Cuda(_) | Backend::Portable => {
                Ok(Tensor::of(portable::softmax_again(x, kept)?))
            }
        }
    }
}

struct RowDots<'a> {
    a: &'a Tensor,
    b: &'a Tensor,
}

impl Kernel for RowDots<'_> {
    type Output = Tensor;

    fn device(&self) -> &Device {
        self.a.device()
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        let (rows, width) = self.a.rows_width()?;
        ops.add(Op::RowDot { rows, width }, self.a.dtype()?);
        Ok(())
    }

    fn run(&self, _: &Nodes) -> candle_core::Result<Tensor> {
        let (a, b) = (&self.a.data, &self.b.data);
        Ok(Tensor::of(match Backend::of(&[a, b]) {
            Backend::Cpu => cpu::row_dots(a, b)?,
            Backend::Cuda(_) | Backend::Portable => {
                let product = (a.to_dtype(DType::F32)? * b.to_dtype(DType::F32)?)?;
                product.sum_keepdim(D::Minus1)?
            }
        }))
    }
}

struct ScoresGrad<'a> {
    p: &'a Tensor,
    dp: &'a Unshared,
    dots: &'a Tensor,
}

impl Kernel for ScoresGrad<'_> {
    type Output = Tensor;

    fn device(&self) -> &Device {
        self.p.device()
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        let (rows, width) = self.p.rows_width()?;
        ops.add(Op::ScoresGrad { rows, width }, self.p.dtype()?);
        Ok(())
    }

    fn run(&self, _: &Nodes) -> candle_core::Result<Tensor> {
        let (p, dp, dots) = (&self.p.data, &self.dp.0.data, &self.dots.data);
        match Backend::of(&[p, dp, dots]) {
            Backend::Cpu => {
                cpu::scores_grad(dp, p, dots)?;
                Ok(self.dp.0.detach())
            }
            Backend::Cuda(_) | Backend::Portable => {
                let less = |p: &candle_core::Tensor, dp: &candle_core::Tensor| {
                    p.mul(&dp.broadcast_sub(dots)?)
                };
                Ok(Tensor::of(portable::in_f32(p, dp, less)?))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(values: &[f32], shape: (usize, usize)) -> candle_core::Tensor {
        candle_core::Tensor::from_slice(values, shape, &Device::Cpu).unwrap()
    }

    fn values(t: &candle_core::Tensor) -> Vec<f32> {
        t.flatten_all().unwrap().to_dtype(DType::F32).unwrap().to_vec1().unwrap()
    }

    /// Our kernels and candle's, row by row against what a hand computes.
    #[test]
    fn rows_by_hand() {
        let scores = || tensor(&[1., 3., f32::NEG_INFINITY, 2., 2., 2.], (2, 3)).copy().unwrap();
        let sums = [1. + (-2f32).exp(), 3.];
        let weights = [(-2f32).exp() / sums[0], 1. / sums[0], 0., 1. / 3., 1. / 3., 1. / 3.];
        let near = |a: &[f32], b: &[f32]| {
            assert!(a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-6));
        };
        let ours = scores();
        let kept = cpu::softmax_kept(&ours).unwrap();
        near(&values(&ours), &weights);
        near(&values(&kept), &[3., sums[0], 2., sums[1]]);
        let (theirs, their_kept) = portable::softmax_kept(&scores()).unwrap();
        near(&values(&theirs), &weights);
        near(&values(&their_kept), &values(&kept));
        assert_eq!(their_kept.dims(), kept.dims());

        let again = scores();
        cpu::softmax_again(&again, &kept).unwrap();
        near(&values(&again), &weights);
        near(&values(&portable::softmax_again(&scores(), &kept).unwrap()), &weights);

        let dots =
            cpu::row_dots(&tensor(&[1., 2., 3., 4.], (2, 2)), &tensor(&[5., 6., 7., 8.], (2, 2)));
        assert_eq!(values(&dots.unwrap()), [17., 53.]);

        let dp = tensor(&[1., 2., 3., 4., 5., 6.], (2, 3)).copy().unwrap();
        let p = tensor(&[0.5, 0.5, 0., 1., 0., 2.], (2, 3));
        cpu::scores_grad(&dp, &p, &tensor(&[1., 2.], (2, 1))).unwrap();
        assert_eq!(values(&dp), [0., 0.5, 0., 2., 0., 8.]);
    }
}
