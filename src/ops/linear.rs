//! Matrix products.

use candle_core::Device;

use super::{
    Kernel, Nodes, Ops, Tensor, Unshared, cpu, dtype_of,
    elementwise::{Element, computed},
};
use crate::{
    error::Result,
    ledger::{Dtype, Op},
    meter::At,
};

/// a · b over the last two dimensions, of any layout, leading dimensions equal.
struct MatMul<'a> {
    a: &'a candle_core::Tensor, // (…, m, k)
    b: &'a candle_core::Tensor, // (…, k, n)
}

impl Kernel for MatMul<'_> {
    type Output = Unshared;

    fn device(&self) -> &Device {
        self.a.device()
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        let (&[.., m, k], &[.., n]) = (self.a.dims(), self.b.dims()) else {
            anyhow::bail!("matmul of {:?} and {:?}", self.a.dims(), self.b.dims());
        };
        let b = self.a.elem_count() / (m * k).max(1);
        let op = Op::Matmul { b: b as u64, m: m as u64, k: k as u64, n: n as u64 };
        ops.add(op, dtype_of(self.a)?);
        Ok(())
    }

    fn run(&self, _: &Nodes) -> candle_core::Result<Unshared> {
        let product = match cpu::serves(self.a, self.b) {
            true => cpu::product(self.a, self.b)?,
            false => self.a.matmul(self.b)?,
        };
        Ok(Unshared(Tensor::of(product)))
    }
}

/// x · wᵀ for few rows of x on the CPU, where reading the weight is all that takes time.
struct FewRows<'a> {
    x: &'a candle_core::Tensor,      // (m, k)
    weight: &'a candle_core::Tensor, // (n, k)
}

impl Kernel for FewRows<'_> {
    type Output = Unshared;

    fn device(&self) -> &Device {
        self.x.device()
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        let ((m, k), n) = (self.x.dims2()?, self.weight.dim(0)?);
        let op = Op::Matmul { b: 1, m: m as u64, k: k as u64, n: n as u64 };
        ops.add(op, dtype_of(self.x)?);
        Ok(())
    }

    fn run(&self, _: &Nodes) -> candle_core::Result<Unshared> {
        Ok(Unshared(Tensor::of(cpu::gemv(self.x, self.weight)?)))
    }
}

/// a · b over the last two dimensions, (…, m, k) · (…, k, n), leading dimensions equal. Towards a
/// the gradient is dy · bᵀ, towards b it is aᵀ · dy.
///
/// # Errors
/// Shapes that do not multiply.
pub fn matmul(at: At, a: &Tensor, b: &Tensor) -> Result<Unshared> {
    let Unshared(product) = at.launch(&MatMul { a: &a.data, b: &b.data })?;
    let (to_a, to_b) = (b.detach(), a.detach());
    let product = product.made_from(at, a, move |at, dy| Ok(matmul(at, dy, &to_a.t()?)?.share()));
    Ok(Unshared(product.made_from(at, b, move |at, dy| Ok(matmul(at, &to_b.t()?, dy)?.share()))))
}

/// x · wᵀ for a weight (n, k): (…, k) → (…, n), all rows in one product. Towards x the gradient is
/// dy · w, towards w it is dyᵀ · x.
///
/// # Errors
/// A last dimension other than k.
pub fn linear(at: At, x: &Tensor, weight: &Tensor) -> Result<Unshared> {
    let (n, k) = weight.data.dims2()?;
    let rows = x.elements() / k;
    let mut shape = x.dims().to_vec();
    if let Some(last) = shape.last_mut() {
        *last = n;
    }
    let flat = x.detach().reshape((rows, k))?;
    let frozen = weight.detach();
    let few = rows <= cpu::MOST_ROWS && matches!(x.dtype()?, Dtype::F32 | Dtype::BF16);
    let y = if few && x.device().is_cpu() {
        let dense = flat.contiguous()?;
        at.launch(&FewRows { x: &dense.data, weight: &frozen.data })?
    } else {
        matmul(at, &flat, &frozen.t()?)?
    };
    let (x_shape, to_weight) = (x.data.shape().clone(), flat);
    let y = y.reshape(shape)?.share().made_from(at, x, move |at, dy| {
        matmul(at, &dy.reshape((rows, n))?, &frozen)?.share().reshape(x_shape)
    });
    Ok(Unshared(y.made_from(at, weight, move |at, dy| {
        Ok(matmul(at, &dy.reshape((rows, n))?.t()?, &to_weight)?.share())
    })))
}

/// x + b, one vector (n) added to every row of (…, n). Towards b the gradient is the sum of rows.
///
/// # Errors
/// A last dimension other than n.
pub fn bias(at: At, x: &Tensor, bias: &Tensor) -> Result<Tensor> {
    let y = at.launch(&Bias { x, bias })?;
    Ok(y.made_from(at, x, |_, dy| Ok(dy.clone()))
        .made_from(at, bias, |at, dy| at.launch(&SumRows { x: dy })))
}

/// One vector added to every row.
struct Bias<'a> {
    x: &'a Tensor,    // (…, n)
    bias: &'a Tensor, // (n)
}

impl Kernel for Bias<'_> {
    type Output = Tensor;

    fn device(&self) -> &Device {
        self.x.device()
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        let (rows, width) = self.x.rows_width()?;
        ops.add(Op::Bias { rows, width }, self.x.dtype()?);
        Ok(())
    }

    fn run(&self, nodes: &Nodes) -> candle_core::Result<Tensor> {
        computed(Element::Add, &self.x.data, &self.bias.data, nodes)
    }
}

/// The sum of all rows of (…, n): (n).
struct SumRows<'a> {
    x: &'a Tensor,
}

impl Kernel for SumRows<'_> {
    type Output = Tensor;

    fn device(&self) -> &Device {
        self.x.device()
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        let (rows, width) = self.x.rows_width()?;
        ops.add(Op::SumRows { rows, width }, self.x.dtype()?);
        Ok(())
    }

    fn run(&self, _: &Nodes) -> candle_core::Result<Tensor> {
        let x = &self.x.data;
        let width = x.dim(candle_core::D::Minus1)?;
        Ok(Tensor::of(x.reshape(((), width))?.sum(0)?))
    }
}
