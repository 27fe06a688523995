//! The products of a step, of normed inputs or with what is done to their results.

use super::Decoding;
use crate::{
    error::Result,
    ledger::{Dtype, Op},
    meter::At,
    ops::{
        Tensor,
        cuda::{self, Arg, File},
    },
};

/// A weight (n, k) with its bias (n), and where its product is accounted for.
#[derive(Clone, Copy)]
pub struct Product<'a> {
    /// The projection.
    pub at: At<'a>,
    /// (n, k)
    pub weight: &'a Tensor,
    /// (n)
    pub bias: Option<&'a Tensor>,
    /// What is added to it.
    pub adapter: Option<LowRank<'a>>,
}

/// An adapter of a product: scaling · B(A x), and where its parts are accounted for.
#[derive(Clone, Copy)]
pub struct LowRank<'a> {
    /// A, of shape (r, k).
    pub a: (At<'a>, &'a Tensor),
    /// B, of shape (n, r).
    pub b: (At<'a>, &'a Tensor),
    /// One element.
    pub scaling: (At<'a>, &'a Tensor),
    /// The sum with the product.
    pub sum: At<'a>,
}

/// A norm's gain (D), its epsilon, and where it is accounted for.
#[derive(Clone, Copy)]
pub struct Norm<'a> {
    /// The norm.
    pub at: At<'a>,
    /// (D)
    pub gain: &'a Tensor,
    /// Added to the mean square.
    pub eps: f64,
}

impl<'a> LowRank<'a> {
    /// A x
    fn down(self) -> Product<'a> {
        let (at, weight) = self.a;
        Product { at, weight, bias: None, adapter: None }
    }
}

fn adapted(products: &[Product]) -> bool {
    products.iter().any(|product| product.adapter.is_some())
}

/// Rows of the first of up to three weights, of the first two, of all.
fn ends<'a>(weights: impl Iterator<Item = &'a Tensor> + Clone) -> [usize; 3] {
    [1, 2, 3].map(|count| weights.clone().take(count).map(|w| w.dims()[0]).sum())
}

/// The last arguments of a kernel: weights to fetch ahead, two at most, with their bytes.
fn fetched<'a>(weights: &[&'a Tensor]) -> [Arg<'a>; 4] {
    let mut args = [Arg::Null, Arg::U64(0), Arg::Null, Arg::U64(0)];
    for (pair, weight) in args.chunks_exact_mut(2).zip(weights) {
        let bytes = weight.elements() * weight.data.dtype().size_in_bytes();
        pair.copy_from_slice(&[Arg::Of(&weight.data), Arg::U64(bytes as u64)]);
    }
    args
}

/// Most rows that our own kernels of products take; more go through cuBLAS.
fn few(dtype: Dtype) -> usize {
    match dtype {
        Dtype::BF16 => 32,
        Dtype::F32 | Dtype::F16 => 8,
    }
}

/// Rows up to which the kernels of products normalize their input themselves: each of their blocks
/// does.
const NORMED_BY_EACH: usize = 8;

impl Decoding {
    /// q, k and v of normed x, beside one another. Attention after it leaves memory idle: meanwhile
    /// the weights `ahead` come nearer, which a later kernel reads.
    ///
    /// # Errors
    /// The device's.
    pub fn queries_keys_values(
        &self,
        norm: Norm,
        products: [Product; 3],
        ahead: [&Tensor; 2],
    ) -> Result<()> {
        self.normed_products(norm, &products, &self.qkv, &ahead)
    }

    /// Logits of normed x.
    ///
    /// # Errors
    /// The device's.
    pub fn head(&self, norm: Norm, product: Product) -> Result<()> {
        self.normed_products(norm, &[product], &self.logits, &[])
    }

    /// Adds `product` of the heads' mixed values to x; the sum is accounted for at `residual`.
    ///
    /// # Errors
    /// The device's.
    pub fn add_mixed(&self, product: Product, residual: At, ahead: &Tensor) -> Result<()> {
        self.add_product(product, residual, &self.mixed, Some(ahead))
    }

    /// Adds `product` of the MLP's inner activations to x, likewise.
    ///
    /// # Errors
    /// The device's.
    pub fn add_inner(&self, product: Product, residual: At) -> Result<()> {
        self.add_product(product, residual, &self.inner, None)
    }

    /// silu(gate) · up of normed x.
    ///
    /// # Errors
    /// The device's.
    pub fn gated(&self, norm: Norm, gate: Product, up: Product, at: At) -> Result<()> {
        let products = [gate, up];
        let (x, left) = self.input(norm, &products)?;
        if self.sizes.batch <= few(self.dtype) && !adapted(&products) {
            self.few("project_gated", &self.inner, x, left, &products, &[])?;
        } else {
            self.side_by_side(&self.gate, x, left, &[gate], &[])?;
            self.side_by_side(&self.up, x, left, &[up], &[])?;
            self.adapt(x, &[(gate, &self.gate, 0), (up, &self.up, 0)])?;
            if !self.replaying {
                self.kernels.gated_into(None, &self.inner, &self.gate, &self.up)?;
            }
        }
        self.report_norm(norm);
        self.report_products(&products)?;
        let n = self.inner.elem_count() as u64;
        at.ran(Op::Silu { n }, self.dtype);
        at.ran(Op::Mul { n }, self.dtype);
        Ok(())
    }

    /// `products` of normed x, beside one another in `out`.
    fn normed_products(
        &self,
        norm: Norm,
        products: &[Product],
        out: &candle_core::Tensor,
        ahead: &[&Tensor],
    ) -> Result<()> {
        let (x, left) = self.input(norm, products)?;
        self.side_by_side(out, x, left, products, ahead)?;
        let mut after = 0;
        let mut places = vec![];
        for &product in products {
            places.push((product, out, after));
            after += product.weight.dims()[0];
        }
        self.adapt(x, &places)?;
        self.report_norm(norm);
        self.report_products(products)
    }

    fn add_product(
        &self,
        product: Product,
        residual: At,
        input: &candle_core::Tensor,
        ahead: Option<&Tensor>,
    ) -> Result<()> {
        match self.sizes.batch <= few(self.dtype) {
            true => self.few("project_add", &self.x, input, None, &[product], ahead.as_slice())?,
            false => self.product(&self.x, 0, input, product.weight, true)?,
        }
        self.adapt(input, &[(product, &self.x, 0)])?;
        self.report_products(&[product])?;
        residual.ran(Op::Add { n: self.x.elem_count() as u64 }, self.dtype);
        Ok(())
    }

    /// `products` of x, normed first where a norm is left to do, as columns of `out`.
    fn side_by_side(
        &self,
        out: &candle_core::Tensor,
        x: &candle_core::Tensor,
        left: Option<Norm>,
        products: &[Product],
        ahead: &[&Tensor],
    ) -> Result<()> {
        if self.sizes.batch <= few(self.dtype) {
            return self.few("project", out, x, left, products, ahead);
        }
        let mut after = 0;
        for Product { weight, bias, .. } in products {
            self.product(out, after, x, weight, false)?;
            if let (Some(bias), false) = (bias, self.replaying) {
                self.kernels.add_bias(out, after, &bias.data)?;
            }
            after += weight.dims()[0];
        }
        Ok(())
    }

    /// Adds what their adapters make of x to up to three products, each in columns of a tensor from
    /// an index on; the tensors are equally wide.
    fn adapt(
        &self,
        x: &candle_core::Tensor,
        places: &[(Product, &candle_core::Tensor, usize)],
    ) -> Result<()> {
        if self.replaying {
            return Ok(());
        }
        let adapted: Vec<_> = places
            .iter()
            .filter_map(|&(product, out, after)| Some((product.adapter?, out, after)))
            .collect();
        // Rank and alpha are a run's, and so is their quotient.
        let Some(&(LowRank { scaling, .. }, out, _)) = adapted.first() else { return Ok(()) };
        let down: Vec<_> = adapted.iter().map(|(adapter, ..)| adapter.down()).collect();
        let low = &self.low[adapted.len() - 1];
        self.side_by_side(low, x, None, &down, &[])?;
        let ends = ends(adapted.iter().map(|(adapter, ..)| adapter.b.1));
        let to = |i: usize| adapted.get(i).map_or(Arg::Null, |&(_, t, after)| Arg::After(t, after));
        let b = |i: usize| Arg::from(adapted.get(i).map(|(adapter, ..)| &adapter.b.1.data));
        let [first, two, all] = ends.map(|end| Arg::U32(end as u32));
        let sizes = [out.dim(1)?, low.dim(1)?, self.sizes.rank].map(|n| Arg::U32(n as u32));
        let args = [to(0), to(1), to(2), Arg::Of(low), b(0), b(1), b(2), first, two, all];
        let args = [&args[..], &[Arg::Of(&scaling.1.data)], &sizes].concat();
        let grid = [ends[2].div_ceil(128) as u64, self.rows(), 1];
        let name = format!("adapt_{}", self.kernels.suffix());
        Ok(self.kernels.launch(File::Products, &name, grid, 128, &args)?)
    }

    /// Up to three products of few rows, by our own kernel.
    fn few(
        &self,
        name: &str,
        out: &candle_core::Tensor,
        x: &candle_core::Tensor,
        norm: Option<Norm>,
        products: &[Product],
        ahead: &[&Tensor],
    ) -> Result<()> {
        if self.replaying {
            return Ok(());
        }
        let k = x.dim(1)?;
        let gated = name == "project_gated";
        let ends = ends(products.iter().map(|p| p.weight));
        // Gate and up give one column together.
        let n = if gated { ends[0] } else { ends[2] };
        let weight = |i: usize| Arg::from(products.get(i).map(|p| &p.weight.data));
        let bias = |i: usize| Arg::from(products.get(i).and_then(|p| Some(&p.bias?.data)));
        let args = [
            Arg::Of(out),
            Arg::Of(x),
            Arg::from(norm.map(|norm| &norm.gain.data)),
            weight(0),
            weight(1),
            weight(2),
            bias(0),
            bias(1),
            bias(2),
            Arg::U32(ends[0] as u32),
            Arg::U32(ends[1] as u32),
            Arg::U32(n as u32),
            Arg::U32(self.sizes.batch as u32),
            Arg::U32(k as u32),
            Arg::F32(norm.map_or(0.0, |norm| norm.eps as f32)),
        ];
        let args = [&args[..], &fetched(ahead)].concat();
        let (batch, t) = (self.sizes.batch, self.kernels.suffix());
        // Rows of the weight that a block takes, as PROJECTS and TILES in products.cu say.
        let (name, rows, block) = match self.dtype {
            Dtype::BF16 if batch > 2 => {
                let tiles = batch.div_ceil(8).next_power_of_two();
                (format!("{name}_tiles_{t}_{tiles}"), 16, 256)
            }
            _ => {
                let batch = batch.next_power_of_two();
                let rows = match name {
                    "project_add" => 2,
                    "project_gated" if batch > 4 => 2,
                    _ => 4,
                };
                (format!("{name}_{t}_{batch}"), rows, 128)
            }
        };
        let grid = [n.div_ceil(rows) as u64, 1, 1];
        Ok(self.kernels.launch(File::Products, &name, grid, block, &args)?)
    }

    /// What products of normed x read, and the norm where it is left to them; an adapter has it done.
    fn input<'a>(
        &self,
        norm: Norm<'a>,
        products: &[Product],
    ) -> Result<(&candle_core::Tensor, Option<Norm<'a>>)> {
        if self.sizes.batch <= NORMED_BY_EACH && !adapted(products) {
            return Ok((&self.x, Some(norm)));
        }
        self.norm(norm)?;
        Ok((&self.normed, None))
    }

    /// normed = norm of x
    fn norm(&self, norm: Norm) -> Result<()> {
        if self.replaying {
            return Ok(());
        }
        let tensors = [Arg::Of(&self.normed), Arg::Of(&self.x), Arg::Of(&norm.gain.data)];
        Ok(self.kernels.rows("rms_norm", &self.x, &tensors, &[Arg::F32(norm.eps as f32)])?)
    }

    /// Columns of `out` from `after` on: `x` · weightᵀ, by cuBLAS.
    fn product(
        &self,
        out: &candle_core::Tensor,
        after: usize,
        x: &candle_core::Tensor,
        weight: &Tensor,
        add: bool,
    ) -> Result<()> {
        if self.replaying {
            return Ok(());
        }
        let place = (out, after, out.dim(1)?);
        Ok(cuda::product(self.kernels.device(), place, x, &weight.data, add)?)
    }

    fn report_norm(&self, norm: Norm) {
        let op = Op::RmsNorm { rows: self.rows(), width: self.sizes.hidden as u64 };
        norm.at.ran(op, self.dtype);
    }

    fn report_products(&self, products: &[Product]) -> Result<()> {
        let m = self.rows();
        let matmul = |at: At, weight: &Tensor| -> Result<u64> {
            let (n, k) = weight.data.dims2()?;
            at.ran(Op::Matmul { b: 1, m, k: k as u64, n: n as u64 }, self.dtype);
            Ok(n as u64)
        };
        for Product { at, weight, bias, adapter } in products {
            let width = matmul(*at, weight)?;
            if bias.is_some() {
                at.ran(Op::Bias { rows: m, width }, self.dtype);
            }
            if let Some(LowRank { a, b, scaling, sum }) = adapter {
                matmul(a.0, a.1)?;
                let n = m * matmul(b.0, b.1)?;
                scaling.0.ran(Op::Scale { n }, self.dtype);
                sum.ran(Op::Add { n }, self.dtype);
            }
        }
        Ok(())
    }
}
