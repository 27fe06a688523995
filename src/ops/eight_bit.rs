//! Products in 8 bits (e4m3): the rows of both sides divided by scales of their own, multiplied and
//! summed in f32, then multiplied by both scales.
//!
//! Weights are put into 8 bits as they are loaded, which no op counts; inputs by an op of their own,
//! once for all products that read one. Gradients see neither: towards the input, that of the product
//! with the weight as it was, in the type of everything else.

use candle_core::{Device, Tensor as Raw};

use super::{
    Kernel, Nodes, Ops, Tensor, Unshared, cpu,
    cuda::{Kernels, NEEDS_FOR_8_BITS},
    dtype_of,
    linear::{Factors, from_linear, product_added, rows},
    tape::SoFar,
};
use crate::{
    error::{Error, Result},
    ledger::Op,
    meter::At,
};

/// The largest number in e4m3, which a row's largest magnitude becomes.
pub(super) const LARGEST: f32 = 448.0;

/// The least that a row's largest magnitude is taken for, 2⁻¹⁰⁰: a row of zeros has a scale too.
pub(super) const LEAST: f32 = f32::from_bits((127 - 100) << 23);

/// What multiples of elements a GPU's products in 8 bits take, in both dimensions of a weight.
const MULTIPLE: usize = 16;

/// What belongs to a weight (n, k) in 8 bits.
#[derive(Debug, Clone, Copy)]
pub struct EightBit<'a> {
    /// (n) in f32: what each row was divided by.
    pub scales: &'a Tensor,
    /// The weight (n, k) as it was, for gradients of what it is multiplied with; none where it is not
    /// kept.
    pub wide: Option<&'a Tensor>,
}

/// Rows in 8 bits.
#[derive(Debug, Clone)]
pub(super) struct Narrow {
    pub codes: Raw,  // (rows, width), e4m3
    pub scales: Raw, // (rows), f32
}

impl Narrow {
    fn parts(&self) -> [&Raw; 2] {
        [&self.codes, &self.scales]
    }
}

/// Refuses a device that has no products in 8 bits, or none with weights of `widths`, (k, n) each.
///
/// # Errors
/// `--dtype`, with what is missing.
pub fn check_8_bits(
    device: &Device,
    widths: impl IntoIterator<Item = (usize, usize)>,
) -> Result<()> {
    let refused = |why: String| Err(Error::flag("--dtype", why).into());
    if device.is_cpu() {
        return Ok(());
    }
    if !Kernels::multiply_8_bits(device)? {
        return refused(format!("fp8 {NEEDS_FOR_8_BITS}"));
    }
    let fits = |n: &usize| n.is_multiple_of(MULTIPLE);
    match widths.into_iter().find(|(k, n)| !(fits(k) && fits(n))) {
        None => Ok(()),
        Some((k, n)) => refused(format!(
            "fp8 takes widths that are multiples of {MULTIPLE} on a GPU; this model has a projection \
             from {k} to {n}"
        )),
    }
}

/// A weight (n, k) in 8 bits, and the scales (n) of its rows. Loading, as a GGUF file's
/// dequantization is: no op, and not metered.
///
/// # Errors
/// A device without 8 bits; the device's.
pub fn narrowed(weight: &Tensor) -> Result<(Tensor, Tensor)> {
    let Narrow { codes, scales } =
        Quantize { x: &weight.data, into: None }.run(&Nodes::default())?;
    Ok((Tensor::of(codes), Tensor::of(scales)))
}

/// A product of two tensors that are in 8 bits already, again and again: what a device's rate is.
#[derive(Debug)]
pub struct NarrowProduct {
    x: Narrow,
    weight: Narrow,
    like: Raw,
}

impl NarrowProduct {
    /// That of x (m, k) and a weight (n, k), transposed, which are put into 8 bits.
    ///
    /// # Errors
    /// As [`check_8_bits`]; the device's.
    pub fn new(x: &Tensor, weight: &Tensor) -> Result<Self> {
        let (n, k) = weight.data.dims2()?;
        check_8_bits(x.device(), [(k, n)])?;
        let of = |x: &Tensor| Quantize { x: &x.data, into: None }.run(&Nodes::default());
        let like = x.data.narrow(0, 0, 1)?.copy()?;
        Ok(Self { x: of(x)?, weight: of(weight)?, like })
    }

    /// (m, n), in the type that x had.
    ///
    /// # Errors
    /// The device's.
    pub fn run(&self, at: At) -> Result<Tensor> {
        let Self { x, weight, like } = self;
        Ok(Tensor::of(at.launch(&Multiply { x, weight, like, into: None })?))
    }
}

/// The rows of x (…, k) in 8 bits.
///
/// # Errors
/// A device without 8 bits; the device's.
pub(super) fn quantized(at: At, x: &Tensor) -> Result<Narrow> {
    at.launch(&Quantize { x: &rows(x)?, into: None })
}

/// x (…, k), which is `narrow` in 8 bits, times a weight (n, k) in 8 bits, transposed: (…, n) in the
/// type of x. Towards x the gradient is dy · the weight as it was.
///
/// # Errors
/// Widths that differ; a gradient of the weight, or of x where the weight as it was is not kept; the
/// device's.
pub(super) fn eight_bit_linear(
    at: At,
    (x, narrow): (&Tensor, &Narrow),
    weight: &Tensor,
    EightBit { scales, wide }: EightBit,
) -> Result<Unshared> {
    let weight = Narrow { codes: weight.data.clone(), scales: scales.data.clone() };
    let y = at.launch(&Multiply { x: narrow, weight: &weight, like: &x.data, into: None })?;
    let mut shape = x.dims().to_vec();
    if let Some(last) = shape.last_mut() {
        *last = y.dim(1)?;
    }
    let y = Tensor::of(y.reshape(shape)?);
    if !at.is_taped() {
        return Ok(Unshared(y));
    }
    anyhow::ensure!(
        !wide.is_some_and(Tensor::needs_gradient),
        "weights in 8 bits are frozen, and this one was to be trained"
    );
    let x_shape = x.data.shape().clone();
    match wide {
        Some(wide) => {
            let to_x = move |at: At, product: Factors, so_far: SoFar| {
                product_added(at, product, x_shape, so_far)
            };
            Ok(Unshared(from_linear(y, at, (x, rows(x)?), wide, to_x)))
        }
        None if x.needs_gradient() => anyhow::bail!(
            "a weight in 8 bits was loaded without what gradients of its input are computed from"
        ),
        None => Ok(Unshared(y)),
    }
}

/// Rows put into 8 bits.
pub(super) struct Quantize<'a> {
    pub x: &'a Raw, // (rows, width), dense
    /// Where to; a place of its own where there is none.
    pub into: Option<Narrow>,
}

impl Kernel for Quantize<'_> {
    type Output = Narrow;

    fn device(&self) -> &Device {
        self.x.device()
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        let (rows, width) = self.x.dims2()?;
        ops.add(Op::Quantize { rows: rows as u64, width: width as u64 }, dtype_of(self.x)?);
        Ok(())
    }

    fn run(&self, nodes: &Nodes) -> candle_core::Result<Narrow> {
        let Self { x, into } = self;
        if x.device().is_cpu() {
            let (codes, scales) = cpu::quantized(x)?;
            return Ok(Narrow { codes, scales });
        }
        let x = x.contiguous()?;
        let Some(kernels) = Kernels::of(&[&x]) else {
            candle_core::bail!("fp8 {NEEDS_FOR_8_BITS}");
        };
        let to = match into {
            Some(into) => into.clone(),
            None => kernels.empty_8_bits(x.dims2()?)?,
        };
        kernels.quantize(nodes, &x, to.parts())?;
        Ok(to)
    }
}

/// Their product.
pub(super) struct Multiply<'a> {
    pub x: &'a Narrow,      // (m, k)
    pub weight: &'a Narrow, // (n, k)
    /// Of the type that the product gets.
    pub like: &'a Raw,
    /// (m, n): where to; a place of its own where there is none.
    pub into: Option<&'a Raw>,
}

impl Kernel for Multiply<'_> {
    type Output = Raw;

    fn device(&self) -> &Device {
        self.like.device()
    }

    /// The product comes last: most of the launch's time is its.
    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        let ((m, k), (n, _)) = (self.x.codes.dims2()?, self.weight.codes.dims2()?);
        let (m, k, n) = (m as u64, k as u64, n as u64);
        ops.add(Op::Dequantize { rows: m, width: n }, dtype_of(self.like)?);
        ops.add(Op::Matmul { b: 1, m, k, n }, dtype_of(&self.weight.codes)?);
        Ok(())
    }

    fn run(&self, nodes: &Nodes) -> candle_core::Result<Raw> {
        let Self { x, weight, like, into } = self;
        let ((m, k), (n, of_weight)) = (x.codes.dims2()?, weight.codes.dims2()?);
        if k != of_weight {
            candle_core::bail!("{k} columns in 8 bits times a weight of {of_weight}");
        }
        if like.device().is_cpu() {
            return cpu::eight_bit_product(x.parts(), weight.parts(), like.dtype());
        }
        let Some(kernels) = Kernels::on(like.device(), like.dtype()) else {
            candle_core::bail!("fp8 {NEEDS_FOR_8_BITS}");
        };
        let out = match into {
            Some(into) => (*into).clone(),
            None => kernels.empty((m, n), kernels.dtype())?,
        };
        kernels.eight_bit_product(nodes, &out, x.parts(), weight.parts())?;
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;
    use crate::{
        config::Projection,
        ledger::{Dtype, Key, Ledger, Module, Phase},
        meter::Meter,
    };

    fn random(rows: usize, width: usize, seed: u32) -> Tensor {
        let of = |i: u32| ((i.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 8) % 2001) as f32;
        let values = (0..(rows * width) as u32).map(|i| of(i) / 1000.0 - 1.0).collect();
        Tensor::from_vec(values, (rows, width), Dtype::BF16, &Device::Cpu).unwrap()
    }

    #[test]
    fn a_product_is_near_that_of_bf16_and_reports_what_it_ran() {
        let (x, w) = (random(6, 64, 1), random(10, 64, 7));
        let (codes, scales) = narrowed(&w).unwrap();
        let ledger = RefCell::new(Ledger::default());
        let module = Module::Proj(Projection::QProj);
        let at = Meter::new(&ledger, Phase::Forward).at(module);
        let narrow = quantized(at, &x).unwrap();
        let of = EightBit { scales: &scales, wide: None };
        let y = eight_bit_linear(at, (&x, &narrow), &codes, of).unwrap();
        assert_eq!((y.dims(), y.0.dtype().unwrap()), (&[6, 10][..], Dtype::BF16));

        let nobody = RefCell::new(());
        let wide = crate::ops::linear(Meter::new(&nobody, Phase::Forward).at(module), &x, &w);
        let (found, wide) = (y.share().to_vec().unwrap(), wide.unwrap().share().to_vec().unwrap());
        let square = |values: &mut dyn Iterator<Item = f32>| values.map(|v| v * v).sum::<f32>();
        let apart = square(&mut found.iter().zip(&wide).map(|(a, b)| a - b));
        let apart = (apart / square(&mut wide.iter().copied())).sqrt();
        // Three bits of mantissa on both sides: each rounds by a relative 2⁻⁴ at most.
        assert!(apart > 0.0 && apart < 0.08, "{apart}");

        let key = |op, dtype| {
            let scope = crate::ledger::Scope { layer: None, module };
            Key { phase: Phase::Forward, scope, op, dtype }
        };
        let ledger = ledger.into_inner();
        assert_eq!(ledger.len(), 3);
        for (op, dtype) in [
            (Op::Quantize { rows: 6, width: 64 }, Dtype::BF16),
            (Op::Matmul { b: 1, m: 6, k: 64, n: 10 }, Dtype::Fp8),
            (Op::Dequantize { rows: 6, width: 10 }, Dtype::BF16),
        ] {
            assert_eq!(ledger.calls(&key(op, dtype)), 1, "{op}");
        }
    }

    #[test]
    fn gradients_go_through_the_weight_as_it_was() {
        let (x, w) = (random(3, 32, 1), random(5, 32, 7));
        let (codes, scales) = narrowed(&w).unwrap();
        let nobody = RefCell::new(());
        let meter = Meter::new(&nobody, Phase::Forward);
        let at = meter.taped(true).at(Module::Mlp);
        let leaf = x.leaf(crate::ledger::Scope { layer: None, module: Module::Residual });
        let narrow = quantized(at, &leaf).unwrap();
        let run = |wide| {
            eight_bit_linear(at, (&leaf, &narrow), &codes, EightBit { scales: &scales, wide })
        };
        let dy = random(3, 5, 3);
        let y = run(Some(&w)).unwrap().share();
        let found = crate::ops::backward(meter, &y, dy.clone()).unwrap().take(&leaf).unwrap();
        let expected = crate::ops::matmul(meter.at(Module::Mlp), &dy, &w).unwrap().share();
        assert_eq!(found.to_vec().unwrap(), expected.to_vec().unwrap());
        assert!(run(None).unwrap_err().to_string().contains("without what gradients"));
        let scope = crate::ledger::Scope { layer: None, module: Module::Mlp };
        let trained = w.parameter(scope);
        assert!(run(Some(&trained)).unwrap_err().to_string().contains("are frozen"));
    }
}
