//! A x of several adapters that read one x, and its gradients: all in one product each, where their
//! A lie one after another on a GPU.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicUsize, Ordering},
};

use candle_core::{Device, Shape, Tensor as Raw};

use super::{
    Kernel, Nodes, Ops, Tensor, Unshared,
    cuda::Kernels,
    dtype_of,
    linear::{Factors, MatMul, rows},
    low_rank::{Low, LowRank},
    tape::{Gradient, SoFar},
};
use crate::{
    error::Result,
    ledger::{Op, Scope},
    meter::At,
};

/// A of several adapters, one after another in a GPU's memory.
pub(super) struct Beside {
    kernels: Kernels,
    /// (r, k), and where it is accounted for.
    parts: Vec<(Scope, Tensor)>,
}

/// The columns of A x of one adapter among those of all, (rows, Σ r).
pub(super) struct Columns {
    beside: Arc<Beside>,
    start: usize,
    width: usize,
    /// How many columns of the gradient have been computed.
    there: Arc<AtomicUsize>,
}

impl Beside {
    /// A of `adapters` of x; none where there are not several, or they do not lie so.
    pub fn of(x: &Tensor, adapters: &[LowRank]) -> Option<Self> {
        let parts = adapters.iter().map(|LowRank { a: (at, a), .. }| (at.scope(), (*a).clone()));
        let beside = Self { kernels: Kernels::of(&[&x.data])?, parts: parts.collect() };
        let trained = beside.parts.iter().filter(|(_, a)| a.needs_gradient()).count();
        let alike = trained == 0 || trained == adapters.len();
        (adapters.len() > 1 && alike && beside.kernels.are_stacked(&beside.weights()))
            .then_some(beside)
    }

    fn weights(&self) -> Vec<&Raw> {
        self.parts.iter().map(|(_, a)| &a.data).collect()
    }

    /// Σ r and k.
    fn dims(&self) -> candle_core::Result<(usize, usize)> {
        let weights = self.weights();
        let ranks = weights.iter().map(|a| a.dim(0)).sum::<candle_core::Result<_>>()?;
        Ok((ranks, weights.first().map_or(Ok(0), |a| a.dim(1))?))
    }

    /// A x of each, (rows, r), computed at `at`. Towards x and every A the gradient is that of a
    /// product for each adapter.
    pub fn lows(self, at: At, x: &Tensor) -> Result<Vec<Low>> {
        let (beside, flat) = (Arc::new(self), rows(x)?);
        let mut all = Tensor::of(at.launch(&Lows { beside: &beside, x: &flat })?);
        let there = Arc::new(AtomicUsize::new(0));
        let shape = x.data.shape().clone();
        let [of_x, of_there] = [beside.clone(), beside.clone()];
        let counted = there.clone();
        all = all.made_by_product(at, x, move |at, dlow, so_far| {
            of_there.check(&counted)?;
            of_x.towards_x(at, dlow, shape, so_far)
        });
        // The gradients of all A are one launch, made when the first is asked for.
        let (found, mut start) = (Arc::new(Mutex::new(None)), 0);
        let mut lows = vec![];
        for (_, a) in &beside.parts {
            let (from, width) = (start, a.data.dim(0)?);
            start += width;
            let (beside, found, counted) = (beside.clone(), found.clone(), there.clone());
            let saved = flat.clone();
            all = all.made_from(at, a, move |at, dlow| {
                beside.check(&counted)?;
                let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
                let gradients: &Raw = match &mut *found {
                    Some(gradients) => gradients,
                    none => none.insert(at.launch(&TowardsA {
                        beside: &beside,
                        dlow: &dlow.data,
                        x: &saved,
                    })?),
                };
                Ok(Tensor::of(gradients.narrow(0, from, width)?))
            });
            lows.push((from, width));
        }
        let columns = |(start, width)| {
            let data = all.data.narrow(1, start, width)?;
            let tensor = Tensor { data, node: all.node.clone(), lease: None };
            let (beside, there) = (beside.clone(), there.clone());
            Ok(Low { tensor, columns: Some(Columns { beside, start, width, there }) })
        };
        lows.into_iter().map(columns).collect()
    }

    /// That the gradient of all columns has been computed.
    fn check(&self, there: &AtomicUsize) -> Result<()> {
        let (found, all) = (there.load(Ordering::Relaxed), self.dims()?.0);
        anyhow::ensure!(found == all, "gradients of {found} of {all} columns of adapters");
        Ok(())
    }

    /// dlow (rows, Σ r) · A (Σ r, k), added to what there is so far.
    fn towards_x(&self, at: At, dlow: &Tensor, shape: Shape, so_far: SoFar) -> Result<Gradient> {
        let (rows, added) = (dlow.data.dim(0)?, so_far.at);
        let size = (rows, self.dims()?.1);
        let run = |sum: &Unshared, add| {
            at.launch(&TowardsX { beside: self, dlow: &dlow.data, sum, add, added })
        };
        match so_far.into_place(self.kernels.dtype()) {
            Ok((_, sum)) => {
                let sum = sum.reshape(size)?;
                run(&sum, true)?;
                Ok(Gradient::Own(sum.reshape(shape)?))
            }
            Err(so_far) => {
                let sum = self.kernels.empty(size, self.kernels.dtype())?;
                let sum = Unshared(Tensor::of(sum));
                run(&sum, false)?;
                so_far.plus(Gradient::Own(sum.reshape(shape)?))
            }
        }
    }

    /// One product for each adapter, at its own place.
    fn report<'a>(&self, ops: &mut Ops<'a>, op: impl Fn(u64) -> Op) -> Result<()> {
        for (scope, a) in &self.parts {
            let rank = a.data.dim(0)? as u64;
            ops.add_at(ops.at().elsewhere(*scope), op(rank), dtype_of(&a.data)?);
        }
        Ok(())
    }
}

impl Columns {
    /// a · b, the gradient of these columns, in its place among those of all.
    pub fn product(self, at: At, [a, b]: Factors, so_far: SoFar) -> Result<Gradient> {
        let Self { beside, start, width, there } = self;
        let kernels = &beside.kernels;
        let size = (a.data.dim(0)?, beside.dims()?.0);
        let all = match so_far.into_place(kernels.dtype()) {
            Ok((_, all)) => all,
            Err(so_far) => {
                anyhow::ensure!(so_far.is_empty(), "columns of adapters have another gradient");
                Unshared(Tensor::of(kernels.empty(size, kernels.dtype())?))
            }
        };
        let out = all.0.data.narrow(1, start, width)?;
        let product = MatMul { a: &a.data, b: &b.data };
        at.launch(&IntoColumns { kernels, out: &out, product })?;
        there.fetch_add(width, Ordering::Relaxed);
        Ok(Gradient::Own(all))
    }
}

/// x · Aᵀ of all.
struct Lows<'a> {
    beside: &'a Beside,
    x: &'a Raw, // (rows, k)
}

impl Kernel for Lows<'_> {
    type Output = Raw;

    fn device(&self) -> &Device {
        self.x.device()
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        let (m, k) = self.x.dims2()?;
        self.beside.report(ops, |n| Op::Matmul { b: 1, m: m as u64, k: k as u64, n })
    }

    fn run(&self, nodes: &Nodes) -> candle_core::Result<Raw> {
        let Self { beside, x } = self;
        let kernels = &beside.kernels;
        let out = kernels.empty((x.dim(0)?, beside.dims()?.0), kernels.dtype())?;
        let a = kernels.stacked(&beside.weights())?;
        kernels.product_into(nodes, &out, kernels.matrices(x)?, a.t(), None)?;
        Ok(out)
    }
}

/// dlowᵀ · x: the gradients of all A, one after another.
struct TowardsA<'a> {
    beside: &'a Beside,
    dlow: &'a Raw, // (rows, Σ r)
    x: &'a Raw,    // (rows, k)
}

impl Kernel for TowardsA<'_> {
    type Output = Raw;

    fn device(&self) -> &Device {
        self.x.device()
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        let (k, n) = self.x.dims2()?;
        self.beside.report(ops, |m| Op::Matmul { b: 1, m, k: k as u64, n: n as u64 })
    }

    fn run(&self, nodes: &Nodes) -> candle_core::Result<Raw> {
        self.beside.kernels.product(nodes, &self.dlow.t()?, self.x)
    }
}

/// dlow · A of all, of which the sum is one product; added to what `sum` holds where `add` says so.
struct TowardsX<'a> {
    beside: &'a Beside,
    dlow: &'a Raw,     // (rows, Σ r)
    sum: &'a Unshared, // (rows, k)
    add: bool,
    /// Where sums are accounted for.
    added: At<'a>,
}

impl Kernel for TowardsX<'_> {
    type Output = ();

    fn device(&self) -> &Device {
        self.dlow.device()
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        let (m, n) = self.sum.0.data.dims2()?;
        let (m, n, dtype) = (m as u64, n as u64, dtype_of(self.dlow)?);
        let sums = self.beside.parts.len() - usize::from(!self.add);
        (0..sums).for_each(|_| ops.add_at(self.added, Op::Add { n: m * n }, dtype));
        self.beside.report(ops, |k| Op::Matmul { b: 1, m, k, n })
    }

    fn run(&self, nodes: &Nodes) -> candle_core::Result<()> {
        let kernels = &self.beside.kernels;
        let a = kernels.stacked(&self.beside.weights())?;
        let (dlow, added) = (kernels.matrices(self.dlow)?, self.add.then_some(1.0));
        kernels.product_into(nodes, &self.sum.0.data, dlow, a, added)
    }
}

/// A product whose place is columns of a wider matrix.
struct IntoColumns<'a> {
    kernels: &'a Kernels,
    out: &'a Raw, // (m, n)
    product: MatMul<'a>,
}

impl Kernel for IntoColumns<'_> {
    type Output = ();

    fn device(&self) -> &Device {
        self.out.device()
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        self.product.report(ops)
    }

    fn run(&self, nodes: &Nodes) -> candle_core::Result<()> {
        let Self { kernels, out, product: MatMul { a, b } } = self;
        kernels.product_into(nodes, out, kernels.matrices(a)?, kernels.matrices(b)?, None)
    }
}
