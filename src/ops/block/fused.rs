//! The same in decoding on a GPU: few launches, into buffers of a workspace.

use std::iter;

use super::{
    super::{
        Attention, KvCache, Tensor, Unshared, Workspace,
        cuda::{Kernels, attend_space},
    },
    LowRank, Norm, Product,
    launches::{
        Adapted, AddedInto, AttendOne, BiasInto, EmbedInto, GateInto, Library, NormInto, Projected,
        To,
    },
    narrow::are_narrow,
};
use crate::{config::Activation, error::Result, meter::At};

/// Rows up to which the kernels of products normalize their input themselves: each of their blocks
/// does.
const NORMED_BY_EACH: usize = 8;

/// One token of each of B sequences, (B, k), and where what is computed of it goes.
pub(super) struct Fused<'a> {
    pub(super) kernels: Kernels,
    pub(super) workspace: &'a Workspace,
    x: candle_core::Tensor,
    at: At<'a>,
}

/// Where launches at `at` have a workspace and x (B, 1, k) and the weights suit their kernels.
pub(super) fn of<'a>(at: At<'a>, x: &Tensor, products: &[Product]) -> Option<Fused<'a>> {
    let workspace = at.workspace()?;
    let &[rows, 1, k] = x.dims() else { return None };
    let wide = products.iter().filter(|product| product.eight_bit.is_none());
    let weights = wide.map(|product| &product.weight.data);
    let kernels = Kernels::of(&weights.chain([&x.data]).collect::<Vec<_>>())?;
    let x = x.data.reshape((rows, k)).ok().filter(|_| k.is_multiple_of(8))?;
    Some(Fused { kernels, workspace, x, at })
}

/// Rows of `table` (V, D) of tokens that are on the device, times a factor where there is one:
/// (B, 1, D). None without a workspace.
pub(in crate::ops) fn embed_chosen(
    at: At,
    table: &Tensor,
    ids: &candle_core::Tensor,
    factor: Option<&Tensor>,
) -> Result<Option<Unshared>> {
    let (Some(workspace), Some(kernels)) = (at.workspace(), Kernels::of(&[&table.data])) else {
        return Ok(None);
    };
    let (rows, width) = (ids.elem_count(), table.data.dim(1)?);
    let out = workspace.take(&kernels, (rows, width))?;
    at.launch(&EmbedInto { kernels: &kernels, out: &out.0.data, table, ids, factor })?;
    out.reshape((rows, 1, width)).map(Some)
}

/// Whether a GPU decodes a model with `heads` query heads over `cache`, whose activations are of
/// `widths`.
///
/// # Errors
/// A cache without layers.
pub fn decodes(cache: &KvCache, heads: usize, widths: &[usize]) -> Result<bool> {
    let (keys, _) = cache.layer(0)?;
    let (batch, kv_heads, capacity, d) = keys.data.dims4()?;
    let attends = || attend_space(keys.data.dtype(), batch, heads, kv_heads, d, capacity).is_some();
    let rows = widths.first().is_some_and(|hidden| Kernels::takes_rows_of(*hidden));
    let packs = widths.iter().all(|width| width.is_multiple_of(8));
    Ok(Kernels::of(&[&keys.data]).is_some() && rows && packs && attends())
}

/// Attention of one token of each sequence over `cache`, whose device counts what it holds.
pub(in crate::ops) fn attend_one(
    a: Attention,
    [q, k, v]: [&Tensor; 3],
    cache: &KvCache,
    layer: usize,
) -> Result<Tensor> {
    let (keys, values) = cache.layer(layer)?;
    let (&[batch, 1, width], &[_, kv_heads, capacity, d]) = (q.dims(), keys.dims()) else {
        anyhow::bail!("queries {:?} for keys {:?}", q.dims(), keys.dims());
    };
    let (Some(workspace), Some(kernels), Some(counted)) =
        (a.at.workspace(), Kernels::of(&[&keys.data, &values.data]), cache.on_device())
    else {
        anyhow::bail!("attention over what a device counts needs its kernels");
    };
    let space = attend_space(keys.data.dtype(), batch, width / d, kv_heads, d, capacity);
    let Some((lookers, splits)) = space else { anyhow::bail!("no kernel for heads of {d}") };
    let out = workspace.take(&kernels, (batch, width))?;
    let shares = workspace.take_f32(&kernels, (batch * width / d, splits * (d + 2)))?;
    let done = workspace.zeros(&kernels, (1, batch * lookers))?;
    a.at.launch(&AttendOne {
        kernels: &kernels,
        a: &a,
        out: &out.0.data,
        q: &q.data.squeeze(1)?,
        k: &k.data.squeeze(1)?,
        v: &v.data.squeeze(1)?,
        keys,
        values,
        counted,
        held_now: cache.held() as u64 + 1,
        behind: cache.behind(),
        shares: &shares.0.data,
        done: &done,
    })?;
    Ok(out.reshape((batch, 1, width))?.share())
}

impl<'a> Fused<'a> {
    pub(super) fn rows(&self) -> usize {
        self.x.dims()[0]
    }

    /// Whether our own kernels take so few rows; more go through cuBLAS.
    fn few(&self) -> bool {
        self.few_for(1)
    }

    /// The same of so many products beside one another.
    fn few_for(&self, products: usize) -> bool {
        Kernels::project_serves(self.x.dtype(), self.rows(), products)
    }

    pub(super) fn take(&self, width: usize) -> Result<Unshared> {
        self.workspace.take(&self.kernels, (self.rows(), width))
    }

    /// As [`super::normed_products`]: columns of one matrix.
    pub fn normed_products(
        &self,
        norm: Norm,
        products: &[Product; 3],
        ahead: &[&Tensor],
    ) -> Result<[Tensor; 3]> {
        let (x, left) = self.input(norm, products)?;
        let x = x.as_ref().map_or(&self.x, |normed| &normed.0.data);
        let ends = ends(products);
        let out = self.take(ends[2])?;
        self.side_by_side(&out, x, left, products, ahead)?;
        let all = out.reshape((self.rows(), 1, ends[2]))?.share();
        let columns = |from: usize, to: usize| all.narrow(2, from, to - from);
        let views = [columns(0, ends[0])?, columns(ends[0], ends[1])?, columns(ends[1], ends[2])?];
        self.adapt(x, products, &views)?;
        Ok(views)
    }

    /// As [`super::normed_product`].
    pub fn normed_product(&self, norm: Norm, product: Product) -> Result<Unshared> {
        let (x, left) = self.input(norm, &[product])?;
        let x = x.as_ref().map_or(&self.x, |normed| &normed.0.data);
        let width = product.weight.dims()[0];
        let out = self.take(width)?;
        self.side_by_side(&out, x, left, &[product], &[])?;
        out.reshape((self.rows(), 1, width))
    }

    /// As [`super::gated_products`].
    pub fn gated_products(
        &self,
        norm: Norm,
        products: [Product; 2],
        at: At,
        activation: Activation,
    ) -> Result<Tensor> {
        let [gate, up] = products;
        let (x, left) = self.input(norm, &products)?;
        let x = x.as_ref().map_or(&self.x, |normed| &normed.0.data);
        let width = gate.weight.dims()[0];
        let inner = self.take(width)?;
        if self.few() && !adapted(&products) && !are_narrow(&products) {
            let out = To::Gated(activation, &inner.0.data);
            self.project(at, out, x, left, &products, &[])?;
        } else {
            let [gate, up] = match are_narrow(&products) {
                true => self.two_narrow(x, products)?,
                false => [self.alone(x, gate, &[])?, self.alone(x, up, &[])?],
            };
            let kernels = &self.kernels;
            let (gate, up, out) = (&gate.data, &up.data, &inner.0.data);
            at.launch(&GateInto { kernels, activation, out, gate, up })?;
        }
        Ok(inner.reshape((self.rows(), 1, width))?.share())
    }

    /// As [`super::add_product`], in the place of x (B, 1, D); `self` is of what the product takes.
    pub fn add_product(
        &self,
        residual: At,
        x: &Unshared,
        product: Product,
        norm: Option<Norm>,
        ahead: &[&Tensor],
    ) -> Result<()> {
        let stream = x.0.data.reshape((self.rows(), ()))?;
        if norm.is_some() || product.eight_bit.is_some() {
            let alone = self.alone(&self.x, product, ahead)?;
            let y = alone.data.squeeze(1)?;
            let normed = norm.map(|norm| self.norm(&y, norm)).transpose()?;
            let y = normed.as_ref().map_or(&y, |normed| &normed.0.data);
            return residual.launch(&AddedInto { kernels: &self.kernels, x: &stream, y });
        }
        if self.few() {
            let out = To::Added(residual, &stream);
            self.project(product.at, out, &self.x, None, &[product], ahead)?;
        } else {
            let out = To::Added(residual, &stream);
            self.library(product, out, &self.x)?;
        }
        self.adapt(&self.x, &[product], std::slice::from_ref(&x.0.detach()))
    }

    /// One product of x as it is, with its adapter: (B, 1, n).
    fn alone(
        &self,
        x: &candle_core::Tensor,
        product: Product,
        ahead: &[&Tensor],
    ) -> Result<Tensor> {
        let width = product.weight.dims()[0];
        let out = self.take(width)?;
        self.side_by_side(&out, x, None, &[product], ahead)?;
        let out = out.reshape((self.rows(), 1, width))?.share();
        self.adapt(x, &[product], std::slice::from_ref(&out))?;
        Ok(out)
    }

    /// What products of normed x read: x itself, and the norm that is left to them; or normed x,
    /// where rows are many, where a library computes them, or where an adapter reads it too.
    fn input<'n>(
        &self,
        norm: Norm<'n>,
        products: &[Product],
    ) -> Result<(Option<Unshared>, Option<Norm<'n>>)> {
        let left = self.few() && !adapted(products) && !are_narrow(products);
        match self.rows() <= NORMED_BY_EACH && left {
            true => Ok((None, Some(norm))),
            false => Ok((Some(self.norm(&self.x, norm)?), None)),
        }
    }

    fn norm(&self, x: &candle_core::Tensor, norm: Norm) -> Result<Unshared> {
        let out = self.take(x.dim(1)?)?;
        norm.at.launch(&NormInto { kernels: &self.kernels, out: &out.0.data, x, norm })?;
        Ok(out)
    }

    /// `products` of x, normed first where a norm is left to do, as columns of `out`.
    fn side_by_side(
        &self,
        out: &Unshared,
        x: &candle_core::Tensor,
        left: Option<Norm>,
        products: &[Product],
        ahead: &[&Tensor],
    ) -> Result<()> {
        let narrow = are_narrow(products);
        if !narrow && self.few_for(products.len()) {
            return self.project(self.at, To::Plain(&out.0.data), x, left, products, ahead);
        }
        let mut after = 0;
        let columns = products.iter().map(|product| {
            let (from, width) = (after, product.weight.dims()[0]);
            after += width;
            Ok(out.0.data.narrow(1, from, width)?)
        });
        let columns = columns.collect::<Result<Vec<_>>>()?;
        if narrow {
            return self.narrow_products(&columns, x, products);
        }
        iter::zip(products, &columns)
            .try_for_each(|(product, columns)| self.library(*product, To::Plain(columns), x))
    }

    /// Up to three products of few rows, in one launch.
    fn project(
        &self,
        at: At,
        out: To,
        x: &candle_core::Tensor,
        norm: Option<Norm>,
        products: &[Product],
        ahead: &[&Tensor],
    ) -> Result<()> {
        at.launch(&Projected { kernels: &self.kernels, out, x, norm, products, ahead })
    }

    /// One product of many rows by cuBLAS, then its bias.
    fn library(&self, product: Product, out: To, x: &candle_core::Tensor) -> Result<()> {
        let kernels = &self.kernels;
        let to = out.tensor();
        product.at.launch(&Library { kernels, out, x, weight: product.weight })?;
        match product.bias {
            Some(bias) => product.at.launch(&BiasInto { kernels, out: to, bias }),
            None => Ok(()),
        }
    }

    /// Adds what their adapters make of x to products (B, 1, n): as many at once as have one rank
    /// and one scale, which are a launch's.
    pub(super) fn adapt(
        &self,
        x: &candle_core::Tensor,
        products: &[Product],
        outs: &[Tensor],
    ) -> Result<()> {
        let mut adapters: Vec<(LowRank, candle_core::Tensor)> = products
            .iter()
            .zip(outs)
            .filter_map(|(product, out)| Some((product.adapter?, out.data.squeeze(1))))
            .map(|(adapter, out)| Ok((adapter, out?)))
            .collect::<Result<_>>()?;
        let kind =
            |(adapter, _): &(LowRank, _)| (adapter.a.1.dims()[0], adapter.scaling.value.to_bits());
        adapters.sort_by_key(kind);
        adapters
            .chunk_by(|a, b| kind(a) == kind(b))
            .try_for_each(|alike| self.adapt_alike(x, alike))
    }

    /// The same of adapters of one rank and one scale.
    fn adapt_alike(
        &self,
        x: &candle_core::Tensor,
        adapters: &[(LowRank, candle_core::Tensor)],
    ) -> Result<()> {
        let down: Vec<_> = adapters
            .iter()
            .map(|(LowRank { a: (at, weight), .. }, _)| Product {
                at: *at,
                weight,
                eight_bit: None,
                bias: None,
                adapter: None,
            })
            .collect();
        let low = self.take(down.iter().map(|product| product.weight.dims()[0]).sum())?;
        self.side_by_side(&low, x, None, &down, &[])?;
        let kernels = &self.kernels;
        self.at.launch(&Adapted { kernels, low: &low.0.data, adapters })
    }
}

/// Columns of the first product, of the first two, of all.
fn ends(products: &[Product; 3]) -> [usize; 3] {
    let [a, b, c] = products.each_ref().map(|product| product.weight.dims()[0]);
    [a, a + b, a + b + c]
}

fn adapted(products: &[Product]) -> bool {
    products.iter().any(|product| product.adapter.is_some())
}
