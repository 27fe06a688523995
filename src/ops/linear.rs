//! Matrix products.

use super::{Tensor, by_row::by_element, gemv::Gemv, product::Product};
use crate::{
    error::Result,
    ledger::{Dtype, Op},
    meter::At,
};

/// a · b over the last two dimensions, (…, m, k) · (…, k, n), leading dimensions equal. Towards a
/// the gradient is dy · bᵀ, towards b it is aᵀ · dy.
///
/// # Errors
/// Shapes that do not multiply.
pub fn matmul(at: At, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let (&[.., m, k], &[.., n]) = (a.dims(), b.dims()) else {
        anyhow::bail!("matmul of {:?} and {:?}", a.dims(), b.dims());
    };
    let b_count = a.elements() / (m * k).max(1);
    let op = Op::Matmul { b: b_count as u64, m: m as u64, k: k as u64, n: n as u64 };
    let ours = Product::SERVES && a.device().is_cpu() && a.dtype()? == Dtype::F32;
    let product = at.run(op, a.dtype()?, a.device(), || match ours {
        true => a.data.apply_op2_no_bwd(&b.data, &Product),
        false => a.data.matmul(&b.data),
    })?;
    let (to_a, to_b) = (b.detach(), a.detach());
    Ok(Tensor::from(product).made_from(at, a, move |at, dy| matmul(at, dy, &to_a.t()?)).made_from(
        at,
        b,
        move |at, dy| matmul(at, &to_b.t()?, dy),
    ))
}

/// x · wᵀ for a weight (n, k): (…, k) → (…, n), all rows in one product. Towards x the gradient is
/// dy · w, towards w it is dyᵀ · x.
///
/// # Errors
/// A last dimension other than k.
pub fn linear(at: At, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (n, k) = weight.data.dims2()?;
    let rows = x.elements() / k;
    let mut shape = x.dims().to_vec();
    if let Some(last) = shape.last_mut() {
        *last = n;
    }
    let flat = x.detach().reshape((rows, k))?;
    let frozen = weight.detach();
    let few = rows <= Gemv::MOST_ROWS && matches!(x.dtype()?, Dtype::F32 | Dtype::BF16);
    let y = if few && x.device().is_cpu() {
        let op = Op::Matmul { b: 1, m: rows as u64, k: k as u64, n: n as u64 };
        let dense = flat.contiguous()?;
        let run = || dense.data.apply_op2_no_bwd(&frozen.data, &Gemv);
        Tensor::from(at.run(op, x.dtype()?, x.device(), run)?)
    } else {
        matmul(at, &flat, &frozen.t()?)?
    };
    let (x_shape, to_weight) = (x.data.shape().clone(), flat);
    Ok(y.reshape(shape)?
        .made_from(at, x, move |at, dy| {
            matmul(at, &dy.reshape((rows, n))?, &frozen)?.reshape(x_shape)
        })
        .made_from(at, weight, move |at, dy| matmul(at, &dy.reshape((rows, n))?.t()?, &to_weight)))
}

/// x + b, one vector (n) added to every row of (…, n). Towards b the gradient is the sum of rows.
///
/// # Errors
/// A last dimension other than n.
pub fn bias(at: At, x: &Tensor, bias: &Tensor) -> Result<Tensor> {
    let (rows, width) = x.rows_width()?;
    let op = Op::Bias { rows, width };
    let y = at.run(op, x.dtype()?, x.device(), || {
        by_element("add", &x.data, &bias.data, |x, b| x + b, || x.data.broadcast_add(&bias.data))
    })?;
    Ok(Tensor::from(y).made_from(at, x, |_, dy| Ok(dy.clone())).made_from(at, bias, sum_rows))
}

/// The sum of all rows of (…, n): (n).
fn sum_rows(at: At, x: &Tensor) -> Result<Tensor> {
    let (rows, width) = x.rows_width()?;
    let op = Op::SumRows { rows, width };
    let flat = x.reshape((rows as usize, width as usize))?;
    Ok(at.run(op, x.dtype()?, x.device(), || flat.data.sum(0))?.into())
}
