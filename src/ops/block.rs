//! What a layer does between the norms and the residual stream, in the model's own words: norms
//! with the projections that read them, the gated MLP, what is added to the stream.
//!
//! Each of them is a composition of ops; in decoding on a GPU, where a workspace is there and one
//! token of each sequence is fed, it is a launch or two that compute the same ops
//! ([`fused`]).

mod fused;
mod launches;
mod narrow;
mod whole;

use super::{
    EightBit, LowRank, Tensor, Unshared, add,
    eight_bit::{Narrow, eight_bit_linear, quantized},
    elementwise::gated,
    linear,
    linear::{MatMul, biased, rows},
    low_rank::lows,
    norm::{rms_norm, shifted_rms_norm},
    product_into::ProductInto,
};
use crate::{config::Activation, error::Result, meter::At};

pub use fused::decodes;
pub(super) use fused::{attend_one, embed_chosen};
pub use whole::{WholeLayer, WholeModel, WholeStep};

/// A norm's gain (w), and where it is accounted for.
#[derive(Clone, Copy)]
pub struct Norm<'a> {
    /// The norm.
    pub at: At<'a>,
    /// (w)
    pub gain: &'a Tensor,
    /// Added to the mean square.
    pub eps: f64,
    /// A tensor of 1, where the norm multiplies by 1 + gain.
    pub one: Option<&'a Tensor>,
}

impl Norm<'_> {
    /// x / sqrt(mean(x²) + eps) · gain, or · (1 + gain).
    ///
    /// # Errors
    /// A gain of another width.
    pub fn of(self, x: &Tensor) -> Result<Tensor> {
        match self.one {
            Some(one) => shifted_rms_norm(self.at, x, self.gain, one, self.eps),
            None => rms_norm(self.at, x, self.gain, self.eps),
        }
    }
}

/// A weight (n, k) with its bias (n) and its adapter, and where it is accounted for.
#[derive(Clone, Copy)]
pub struct Product<'a> {
    /// The projection.
    pub at: At<'a>,
    /// (n, k), maybe in 8 bits.
    pub weight: &'a Tensor,
    /// What belongs to it where it is.
    pub eight_bit: Option<EightBit<'a>>,
    /// (n)
    pub bias: Option<&'a Tensor>,
    /// What is added to it.
    pub adapter: Option<LowRank<'a>>,
}

impl Product<'_> {
    /// x (…, k) → (…, n), without what the adapter adds; of a weight in 8 bits, from x in 8 bits.
    fn alone(self, x: &Tensor, narrow: Option<&Narrow>) -> Result<Unshared> {
        let y = match (self.eight_bit, narrow) {
            (None, _) => linear(self.at, x, self.weight)?,
            (Some(of), Some(narrow)) => eight_bit_linear(self.at, (x, narrow), self.weight, of)?,
            (Some(_), None) => anyhow::bail!("a weight in 8 bits, and x is not"),
        };
        match self.bias {
            Some(bias) => biased(self.at, &y.0, bias),
            None => Ok(y),
        }
    }
}

/// The first of `products` whose weight is in 8 bits: what they read is put into 8 bits once, on account
/// of it.
fn first_in_8_bits<'p, 'a>(products: &'p [Product<'a>]) -> Option<&'p Product<'a>> {
    products.iter().find(|product| product.eight_bit.is_some())
}

/// `products` of one x (…, k), each (…, n).
fn each<const N: usize>(products: &[Product; N], x: &Tensor) -> Result<[Tensor; N]> {
    let adapters: Vec<LowRank> = products.iter().filter_map(|product| product.adapter).collect();
    let narrow = first_in_8_bits(products).map(|first| quantized(first.at, x)).transpose()?;
    let mut lows = lows(x, &adapters)?.into_iter();
    let of = |product: &Product| {
        let y = product.alone(x, narrow.as_ref())?;
        let Some(adapter) = product.adapter else { return Ok(y.share()) };
        let low = lows.next().ok_or_else(|| anyhow::anyhow!("an adapter without A x"))?;
        Ok(adapter.add_to(y, low)?.share())
    };
    let all: Vec<Tensor> = products.iter().map(of).collect::<Result<_>>()?;
    all.try_into().map_err(|all: Vec<_>| anyhow::anyhow!("{} products of {N}", all.len()))
}

/// `products` of normed x (B, T, D), each (B, T, n). While a GPU then attends, the weights `ahead`
/// come nearer, which a later launch reads.
///
/// # Errors
/// Shapes that do not fit, or the device's.
pub fn normed_products(
    norm: Norm,
    x: &Unshared,
    products: &[Product; 3],
    ahead: &[&Tensor],
) -> Result<[Tensor; 3]> {
    if let Some(fused) = fused::of(norm.at, &x.0, products) {
        return fused.normed_products(norm, products, ahead);
    }
    let h = norm.of(&x.0)?;
    each(products, &h)
}

/// One product of normed x (B, T, D), without bias or adapter: (B, T, n).
///
/// # Errors
/// Shapes that do not fit, or the device's.
pub fn normed_product(norm: Norm, x: &Unshared, product: Product) -> Result<Unshared> {
    if let Some(fused) = fused::of(norm.at, &x.0, &[product]) {
        return fused.normed_product(norm, product);
    }
    linear(product.at, &norm.of(&x.0)?, product.weight)
}

/// activation(gate) · up of normed x (B, T, D): (B, T, F).
///
/// # Errors
/// Shapes that do not fit, or the device's.
pub fn gated_products(
    norm: Norm,
    x: &Unshared,
    [gate, up]: [Product; 2],
    at: At,
    activation: Activation,
) -> Result<Tensor> {
    if let Some(fused) = fused::of(at, &x.0, &[gate, up]) {
        return fused.gated_products(norm, [gate, up], at, activation);
    }
    let [gate, up] = each(&[gate, up], &norm.of(&x.0)?)?;
    gated(at, activation, &gate, &up)
}

/// x (B, T, D) + `product` of `input` (B, T, k), normed before it is added where there is a norm;
/// the sum is accounted for at `residual`. In the place of x in decoding, and for a product by itself
/// where no gradient is wanted.
///
/// # Errors
/// Shapes that do not fit, or the device's.
pub fn add_product(
    residual: At,
    x: Unshared,
    input: &Tensor,
    product: Product,
    norm: Option<Norm>,
    ahead: &[&Tensor],
) -> Result<Unshared> {
    if let Some(fused) = fused::of(residual, input, &[product]) {
        fused.add_product(residual, &x, product, norm, ahead)?;
        return Ok(x);
    }
    if let Product { at, weight, eight_bit: None, bias: None, adapter: None } = product
        && norm.is_none()
        && !residual.is_taped()
    {
        let shape = x.dims().to_vec();
        let sum = Unshared(Tensor { data: rows(&x.0)?, ..x.0 });
        let product = MatMul { a: &rows(input)?, b: &weight.data.t()? };
        ProductInto { sum: &sum, product, scaled: None, added: residual }.run_at(at)?;
        return sum.reshape(shape);
    }
    let [y] = each(&[product], input)?;
    let y = norm.map_or(Ok(y.clone()), |norm| norm.of(&y))?;
    Ok(Unshared(add(residual, &x.0, &y)?))
}
