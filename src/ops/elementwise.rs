//! One operation an element.

use std::sync::{Arc, Mutex, PoisonError};

use super::{
    Tensor,
    by_row::{by_element, by_row},
    cuda::Kernels,
    exp,
};
use crate::{error::Result, ledger::Op, meter::At};

/// a + b, equal shapes. Towards either side, the gradient as it is.
///
/// # Errors
/// Shapes or types that differ.
pub fn add(at: At, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let op = Op::Add { n: a.elements() as u64 };
    same_shape(a, b)?;
    let sum = at.run(op, a.dtype()?, a.device(), || {
        by_element("add", &a.data, &b.data, |a, b| a + b, || a.data.add(&b.data))
    })?;
    let same = |_: At, dy: &Tensor| Ok(dy.clone());
    Ok(Tensor::from(sum).made_from(at, a, same).made_from(at, b, same))
}

/// a · b element by element, equal shapes. Towards one side, the gradient times the other.
///
/// # Errors
/// Shapes or types that differ.
pub fn mul(at: At, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let op = Op::Mul { n: a.elements() as u64 };
    same_shape(a, b)?;
    let product = at.run(op, a.dtype()?, a.device(), || {
        by_element("mul", &a.data, &b.data, |a, b| a * b, || a.data.mul(&b.data))
    })?;
    let (to_a, to_b) = (b.detach(), a.detach());
    Ok(Tensor::from(product).made_from(at, a, move |at, dy| mul(at, dy, &to_a)).made_from(
        at,
        b,
        move |at, dy| mul(at, dy, &to_b),
    ))
}

fn same_shape(a: &Tensor, b: &Tensor) -> Result<()> {
    anyhow::ensure!(a.dims() == b.dims(), "{:?} beside {:?}", a.dims(), b.dims());
    Ok(())
}

/// x times one factor, a tensor of one element (candle's `affine` would also add a zero). The
/// gradient likewise.
///
/// # Errors
/// A factor of another type or of more elements.
pub fn scale(at: At, x: &Tensor, factor: &Tensor) -> Result<Tensor> {
    anyhow::ensure!(factor.elements() == 1, "a factor has one element, not {:?}", factor.dims());
    let op = Op::Scale { n: x.elements() as u64 };
    // Read by the host only where that waits for nothing.
    let known = if x.device().is_cpu() { factor.to_vec()?[0] } else { f32::NAN };
    let scaled = at.run(op, x.dtype()?, x.device(), || {
        let theirs = || match Kernels::of(&[&x.data, &factor.data]) {
            Some(kernels) => kernels.map("mul", &x.data, &factor.data),
            None => x.data.broadcast_mul(&factor.data),
        };
        match x.device().is_cpu() {
            true => by_element("mul", &x.data, &x.data, |x, _| x * known, theirs),
            false => theirs(),
        }
    })?;
    let factor = factor.detach();
    Ok(Tensor::from(scaled).made_from(at, x, move |at, dy| scale(at, dy, &factor)))
}

/// x / (1 + exp(−x)).
///
/// # Errors
/// The device's.
pub fn silu(at: At, x: &Tensor) -> Result<Tensor> {
    let op = Op::Silu { n: x.elements() as u64 };
    let y = at.run(op, x.dtype()?, x.device(), || {
        by_element("silu", &x.data, &x.data, |x, _| exp::silu(x), || x.data.silu())
    })?;
    let saved = x.detach();
    Ok(Tensor::from(y).made_from(at, x, move |at, dy| silu_grad(at, &saved, dy)))
}

/// silu(gate) · up, equal shapes; on a GPU in one pass.
///
/// # Errors
/// Shapes or types that differ.
pub fn gated(at: At, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let Some(kernels) = Kernels::of(&[&gate.data, &up.data]) else {
        return mul(at, &silu(at, gate)?, up);
    };
    same_shape(gate, up)?;
    let (n, dtype) = (gate.elements() as u64, gate.dtype()?);
    let keep = at.is_taped() && (gate.needs_gradient() || up.needs_gradient());
    at.ran(Op::Silu { n }, dtype);
    let (act, product) =
        at.run(Op::Mul { n }, dtype, gate.device(), || kernels.gated(&gate.data, &up.data, keep))?;
    let product = Tensor::from(product);
    let Some(act) = act.map(Tensor::from) else { return Ok(product) };
    if !(gate.needs_gradient() && up.needs_gradient()) {
        let (saved, to_gate) = (gate.detach(), up.detach());
        let to_gate = move |at: At, dy: &Tensor| silu_grad(at, &saved, &mul(at, dy, &to_gate)?);
        let product = product.made_from(at, gate, to_gate);
        return Ok(product.made_from(at, up, move |at, dy| mul(at, dy, &act)));
    }
    // Both in one pass, when the first is asked for; the other waits here.
    let waiting = Arc::new(Mutex::new(None));
    let (of_up, inputs) = (waiting.clone(), [gate.detach(), up.detach(), act]);
    let product = product.made_from(at, gate, move |at, dy| {
        at.ran(Op::Mul { n }, dtype);
        let [gate, up, act] = inputs.map(|input| input.data);
        let (to_gate, to_up) = at.run(Op::SiluGrad { n }, dtype, dy.device(), || {
            kernels.gated_grad(&dy.data.contiguous()?, &gate, &up, &act)
        })?;
        *waiting.lock().unwrap_or_else(PoisonError::into_inner) = Some(to_up);
        Ok(to_gate.into())
    });
    Ok(product.made_from(at, up, move |at, _| {
        at.ran(Op::Mul { n }, dtype);
        let to_up = of_up.lock().unwrap_or_else(PoisonError::into_inner).take();
        Ok(to_up.ok_or_else(|| anyhow::anyhow!("the gate's gradient comes first"))?.into())
    }))
}

/// dy · s · (1 + x · (1 − s)), s = 1 / (1 + exp(−x)).
fn silu_grad(at: At, x: &Tensor, dy: &Tensor) -> Result<Tensor> {
    let op = Op::SiluGrad { n: x.elements() as u64 };
    let dx = at.run(op, x.dtype()?, x.device(), || {
        if let Some(kernels) = Kernels::of(&[&x.data, &dy.data]) {
            return kernels.map("silu_grad", &x.data, &dy.data);
        }
        by_row(&x.data, &dy.data, exp::silu_grad, |x, dy| {
            let s = (x.neg()?.exp()? + 1.0)?.recip()?;
            let inner = (x.mul(&(1.0 - &s)?)? + 1.0)?;
            dy.mul(&s)?.mul(&inner)
        })
    })?;
    Ok(dx.into())
}
