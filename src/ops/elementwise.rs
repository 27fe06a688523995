//! One operation an element.

use super::{Tensor, exp};
use crate::{error::Result, ledger::Op, meter::At};

/// a + b, equal shapes.
///
/// # Errors
/// Shapes or types that differ.
pub fn add(at: At, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let op = Op::Add { n: a.elements() as u64 };
    at.run(op, a.dtype()?, a.device(), || Ok(Tensor(a.0.add(&b.0)?)))
}

/// a · b element by element, equal shapes.
///
/// # Errors
/// Shapes or types that differ.
pub fn mul(at: At, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let op = Op::Mul { n: a.elements() as u64 };
    at.run(op, a.dtype()?, a.device(), || Ok(Tensor(a.0.mul(&b.0)?)))
}

/// x times one factor, a tensor of one element (candle's `affine` would also add a zero).
///
/// # Errors
/// A factor of another type or of more elements.
pub fn scale(at: At, x: &Tensor, factor: &Tensor) -> Result<Tensor> {
    anyhow::ensure!(factor.elements() == 1, "a factor has one element, not {:?}", factor.dims());
    let op = Op::Scale { n: x.elements() as u64 };
    at.run(op, x.dtype()?, x.device(), || Ok(Tensor(x.0.broadcast_mul(&factor.0)?)))
}

/// x / (1 + exp(−x)).
///
/// # Errors
/// The device's.
pub fn silu(at: At, x: &Tensor) -> Result<Tensor> {
    let op = Op::Silu { n: x.elements() as u64 };
    at.run(op, x.dtype()?, x.device(), || {
        Ok(Tensor(match x.is_dense_f32_on_cpu() {
            true => x.0.apply_op1_no_bwd(&exp::Silu)?,
            false => x.0.silu()?,
        }))
    })
}
