//! Low-rank adapters beside projections: y += scaling · B(A x).

use super::{
    Tensor, Unshared,
    beside::{Beside, Columns},
    linear::{Factors, MatMul, from_linear, linear, product_added, rows},
    product_into::{Factor, ProductInto},
    scale,
    tape::SoFar,
};
use crate::{error::Result, meter::At};

/// An adapter's tensors, and where each of its parts is accounted for.
#[derive(Clone, Copy)]
pub struct LowRank<'a> {
    /// A, of shape (r, k).
    pub a: (At<'a>, &'a Tensor),
    /// B, of shape (n, r).
    pub b: (At<'a>, &'a Tensor),
    /// alpha / r.
    pub scaling: Factor<'a>,
    /// The sum with the projection.
    pub sum: At<'a>,
}

/// A x of an adapter.
pub(super) struct Low {
    /// (…, r), or (rows, r).
    pub tensor: Tensor,
    /// Where it is columns of a matrix that adapters share.
    pub columns: Option<Columns>,
}

/// A x of each of `adapters`: of all in one product where a GPU finds their A one after another.
///
/// # Errors
/// A width of x that is not theirs; the device's.
pub(super) fn lows(x: &Tensor, adapters: &[LowRank]) -> Result<Vec<Low>> {
    if let ([first, ..], Some(beside)) = (adapters, Beside::of(x, adapters)) {
        return beside.lows(first.a.0, x);
    }
    let alone = |LowRank { a: (at, a), .. }: &LowRank| {
        Ok(Low { tensor: linear(*at, x, a)?.share(), columns: None })
    };
    adapters.iter().map(alone).collect()
}

impl LowRank<'_> {
    /// `base` (…, n) + scaling · B(A x), in the place of `base`, from `low`, A x. Towards base the
    /// gradient as it is; towards A x and B that of the product, of the gradient times the scaling.
    ///
    /// # Errors
    /// Shapes that do not fit one another; the device's.
    pub(super) fn add_to(self, base: Unshared, low: Low) -> Result<Unshared> {
        let Self { b: (at, b), scaling, sum, .. } = self;
        let (Unshared(base), shape) = (&base, base.dims().to_vec());
        let (place, flat) = (Unshared(Tensor::of(rows(base)?)), rows(&low.tensor)?);
        let product = MatMul { a: &flat, b: &b.data.t()? };
        ProductInto { sum: &place, product, scaled: Some(scaling), added: sum }.run_at(at)?;
        let data = place.0.data.reshape(shape)?;
        // The ops that the launch contains, as the graph knows them: one by one.
        let of = || Tensor { data: data.clone(), node: None, lease: base.lease.clone() };
        let Low { tensor, columns } = low;
        let low_shape = tensor.data.shape().clone();
        let to_low = move |at: At, factors: Factors, so_far: SoFar| match columns {
            Some(columns) => columns.product(at, factors, so_far),
            None => product_added(at, factors, low_shape, so_far),
        };
        let delta = from_linear(of(), at, (&tensor, flat), b, to_low);
        let constant = scaling.tensor.detach();
        let scaled = of().made_from(scaling.at, &delta, move |at, dy| scale(at, dy, &constant));
        let y = of().made_from(sum, base, |_, dy| Ok(dy.clone()));
        Ok(Unshared(y.made_from(sum, &scaled, |_, dy| Ok(dy.clone()))))
    }
}
