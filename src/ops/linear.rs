//! Matrix products.

use super::{Tensor, gemv::Gemv};
use crate::{
    error::Result,
    ledger::{Dtype, Op},
    meter::At,
};

/// a · b over the last two dimensions, (…, m, k) · (…, k, n), leading dimensions equal.
///
/// # Errors
/// Shapes that do not multiply.
pub fn matmul(at: At, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let (&[.., m, k], &[.., n]) = (a.dims(), b.dims()) else {
        anyhow::bail!("matmul of {:?} and {:?}", a.dims(), b.dims());
    };
    let b_count = a.elements() / (m * k).max(1);
    let op = Op::Matmul { b: b_count as u64, m: m as u64, k: k as u64, n: n as u64 };
    at.run(op, a.dtype()?, a.device(), || Ok(Tensor(a.0.matmul(&b.0)?)))
}

/// x · wᵀ for a weight (n, k): (…, k) → (…, n), all rows in one product.
///
/// # Errors
/// A last dimension other than k.
pub fn linear(at: At, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (n, k) = weight.0.dims2()?;
    let rows = x.elements() / k;
    let mut shape = x.dims().to_vec();
    if let Some(last) = shape.last_mut() {
        *last = n;
    }
    let x = x.reshape((rows, k))?;
    let few = rows <= Gemv::MOST_ROWS && matches!(x.dtype()?, Dtype::F32 | Dtype::BF16);
    if !(few && x.device().is_cpu()) {
        return matmul(at, &x, &weight.t()?)?.reshape(shape);
    }
    let op = Op::Matmul { b: 1, m: rows as u64, k: k as u64, n: n as u64 };
    let x = x.contiguous()?;
    let run = || Ok(Tensor(x.0.apply_op2_no_bwd(&weight.0, &Gemv)?));
    at.run(op, x.dtype()?, x.device(), run)?.reshape(shape)
}

/// x + b, one vector (n) added to every row of (…, n).
///
/// # Errors
/// A last dimension other than n.
pub fn bias(at: At, x: &Tensor, bias: &Tensor) -> Result<Tensor> {
    let (rows, width) = x.rows_width()?;
    let op = Op::Bias { rows, width };
    at.run(op, x.dtype()?, x.device(), || Ok(Tensor(x.0.broadcast_add(&bias.0)?)))
}
