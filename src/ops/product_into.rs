//! A product added to what is there, in its place: on a GPU in one launch, elsewhere one op after
//! the other.

use candle_core::Device;

use super::{
    Kernel, Nodes, Ops, Tensor, Unshared, backend::Backend, cpu, cuda::Kernels, linear::MatMul,
    scale,
};
use crate::{error::Result, ledger::Op, meter::At};

/// sum + a · b, or sum + factor · a · b, in the place of `sum`.
pub(super) struct ProductInto<'a> {
    pub sum: &'a Unshared, // (…, m, n), dense
    /// At the module that it is launched at.
    pub product: MatMul<'a>,
    pub scaled: Option<Factor<'a>>,
    /// Where the sum is accounted for.
    pub added: At<'a>,
}

impl ProductInto<'_> {
    /// Computes it at `at`.
    ///
    /// # Errors
    /// Shapes that do not fit one another; the device's.
    pub(super) fn run_at(self, at: At) -> Result<()> {
        let Self { sum, product, scaled, added } = self;
        if let Some(kernels) = Kernels::multiply(product.a, product.b) {
            return at.launch(&InOneLaunch { kernels, ops: self });
        }
        let mut more = at.launch(&product)?.share();
        if let Some(Factor { at, tensor, .. }) = scaled {
            more = scale(at, &more, tensor)?;
        }
        added.launch(&AddInto { sum, more: &more })
    }
}

/// sum + more, in the place of `sum`.
struct AddInto<'a> {
    sum: &'a Unshared, // (…), dense
    more: &'a Tensor,  // (…)
}

impl Kernel for AddInto<'_> {
    type Output = ();

    fn device(&self) -> &Device {
        self.more.device()
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        ops.add(Op::Add { n: self.sum.0.elements() as u64 }, self.sum.0.dtype()?);
        Ok(())
    }

    fn run(&self, _: &Nodes) -> candle_core::Result<()> {
        let (sum, more) = (&self.sum.0.data, &self.more.data);
        match Backend::of(&[sum, more]) {
            Backend::Cpu => cpu::add_into(sum, more),
            Backend::Cuda(_) | Backend::Portable => sum.slice_set(&sum.add(more)?, 0, 0),
        }
    }
}

/// What a product is multiplied by.
#[derive(Clone, Copy)]
pub struct Factor<'a> {
    /// Where that is accounted for.
    pub at: At<'a>,
    /// One element.
    pub tensor: &'a Tensor,
    /// The same where the host can see it.
    pub value: f32,
}

/// All of it by one call of cuBLAS.
struct InOneLaunch<'a> {
    kernels: Kernels,
    ops: ProductInto<'a>,
}

impl Kernel for InOneLaunch<'_> {
    type Output = ();

    fn device(&self) -> &Device {
        self.ops.product.device()
    }

    /// The product comes last: most of the launch's time is its.
    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        let ProductInto { sum, product, scaled, added } = &self.ops;
        let (n, dtype) = (sum.0.elements() as u64, sum.0.dtype()?);
        ops.add_at(*added, Op::Add { n }, dtype);
        if let Some(Factor { at, .. }) = scaled {
            ops.add_at(*at, Op::Scale { n }, dtype);
        }
        product.report(ops)
    }

    fn run(&self, nodes: &Nodes) -> candle_core::Result<()> {
        let (Self { kernels, ops }, factor) = (self, self.ops.scaled.map_or(1.0, |f| f.value));
        let [a, b] = [kernels.matrices(ops.product.a)?, kernels.matrices(ops.product.b)?];
        kernels.product_into(nodes, &ops.sum.0.data, a, b, Some(factor))
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use proptest::prelude::*;
    use rand::{Rng, SeedableRng, rngs::StdRng};

    use super::*;
    use crate::{
        ledger::{Dtype, Ledger, Module, Phase},
        meter::Meter,
        ops::{add, matmul},
    };

    /// (…, rows, columns), row after row or column after column.
    fn random(shape: [usize; 3], transposed: bool, dtype: Dtype, rng: &mut StdRng) -> Tensor {
        let [batch, rows, columns] = shape;
        let values = (0..batch * rows * columns).map(|_| rng.random_range(-1.0..1.0)).collect();
        let shape = if transposed { [batch, columns, rows] } else { shape };
        let tensor = Tensor::from_vec(values, shape.as_slice(), dtype, &Device::Cpu).unwrap();
        if transposed { tensor.t().unwrap() } else { tensor }
    }

    proptest! {
        #[test]
        fn a_sum_in_place_is_its_ops_one_by_one(
            (batch, m, k, n) in (1usize..3, 1usize..24, 1usize..17, 1usize..24),
            layouts in any::<[bool; 2]>(),
            scaled in any::<bool>(),
            narrow in any::<bool>(),
            seed in any::<u64>(),
        ) {
            let dtype = if narrow { Dtype::BF16 } else { Dtype::F32 };
            let rng = &mut StdRng::seed_from_u64(seed);
            let a = random([batch, m, k], layouts[0], dtype, rng);
            let b = random([batch, k, n], layouts[1], dtype, rng);
            let sum = random([batch, m, n], false, dtype, rng);
            let factor = Tensor::from_vec(vec![-1.5], 1, dtype, &Device::Cpu).unwrap();
            let run = |together: bool| {
                let ledger = RefCell::new(Ledger::default());
                let meter = Meter::new(&ledger, Phase::Forward);
                let [at, scale_at, added] =
                    [Module::Mlp, Module::LmHead, Module::Residual].map(|module| meter.at(module));
                let copy = sum.copied().unwrap();
                let out = if together {
                    let product = MatMul { a: &a.data, b: &b.data };
                    let of = Factor { at: scale_at, tensor: &factor, value: -1.5 };
                    let scaled = scaled.then_some(of);
                    ProductInto { sum: &copy, product, scaled, added }.run_at(at).unwrap();
                    copy.share()
                } else {
                    let mut more = matmul(at, &a, &b).unwrap().share();
                    if scaled {
                        more = crate::ops::scale(scale_at, &more, &factor).unwrap();
                    }
                    add(added, &copy.share(), &more).unwrap()
                };
                (out.to_vec().unwrap(), ledger.into_inner())
            };
            prop_assert_eq!(run(true), run(false));
        }
    }
}
