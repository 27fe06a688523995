//! A low-rank adapter beside a projection: y += scaling · B(A x).

use super::{Tensor, add, linear, scale};
use crate::{error::Result, meter::At};

/// An adapter's tensors, and where each of its parts is accounted for.
#[derive(Clone, Copy)]
pub struct LowRank<'a> {
    /// A, of shape (r, k).
    pub a: (At<'a>, &'a Tensor),
    /// B, of shape (n, r).
    pub b: (At<'a>, &'a Tensor),
    /// alpha / r, one element.
    pub scaling: (At<'a>, &'a Tensor),
    /// The same where the host can see it: adapters that share it can share a launch.
    pub factor: f64,
    /// The sum with the projection.
    pub sum: At<'a>,
}

impl LowRank<'_> {
    /// `base` (…, n) + scaling · B(A `x`), x (…, k).
    ///
    /// # Errors
    /// The device's.
    pub fn of(self, x: &Tensor, base: &Tensor) -> Result<Tensor> {
        let low = linear(self.a.0, x, self.a.1)?.share(); // (…, r)
        let delta = linear(self.b.0, &low, self.b.1)?.share(); // (…, n)
        add(self.sum, base, &scale(self.scaling.0, &delta, self.scaling.1)?)
    }
}
