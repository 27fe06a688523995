//! Matrix products, and biases.

use candle_core::{Device, Shape};

use super::{
    Kernel, Nodes, Ops, Tensor, Unshared, cpu,
    cuda::Kernels,
    dtype_of,
    elementwise::{Element, computed},
    product_into::ProductInto,
    tape::{Gradient, SoFar},
};
use crate::{error::Result, ledger::Op, meter::At};

/// a · b over the last two dimensions, of any layout, leading dimensions equal.
#[derive(Clone, Copy)]
pub(super) struct MatMul<'a> {
    pub a: &'a candle_core::Tensor, // (…, m, k)
    pub b: &'a candle_core::Tensor, // (…, k, n)
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

    fn run(&self, nodes: &Nodes) -> candle_core::Result<Unshared> {
        let Self { a, b } = *self;
        // For few rows on the CPU, reading the weight is all that takes time.
        let product = if cpu::takes_few_rows(a, b) {
            cpu::gemv(a, &b.t()?)?
        } else if cpu::serves(a, b) {
            cpu::product(a, b)?
        } else if let Some(kernels) = Kernels::multiply(a, b) {
            kernels.product(nodes, a, b)?
        } else {
            a.matmul(b)?
        };
        Ok(Unshared(Tensor::of(product)))
    }
}

/// a · b over the last two dimensions, (…, m, k) · (…, k, n), leading dimensions equal. Towards a
/// the gradient is dy · bᵀ, towards b it is aᵀ · dy.
///
/// # Errors
/// Shapes that do not multiply.
pub fn matmul(at: At, a: &Tensor, b: &Tensor) -> Result<Unshared> {
    let Unshared(product) = at.launch(&MatMul { a: &a.data, b: &b.data })?;
    let ((to_a, a_shape), (to_b, b_shape)) = ((b.detach(), shape_of(a)), (a.detach(), shape_of(b)));
    let product = product.made_by_product(at, a, move |at, dy, so_far| {
        product_added(at, [dy, &to_a.t()?], a_shape, so_far)
    });
    Ok(Unshared(product.made_by_product(at, b, move |at, dy, so_far| {
        product_added(at, [&to_b.t()?, dy], b_shape, so_far)
    })))
}

/// x · wᵀ for a weight (n, k): (…, k) → (…, n), all rows in one product. Towards x the gradient is
/// dy · w, towards w it is dyᵀ · x.
///
/// # Errors
/// A last dimension other than k.
pub fn linear(at: At, x: &Tensor, weight: &Tensor) -> Result<Unshared> {
    let ((n, _), flat) = (weight.data.dims2()?, rows(x)?);
    let y = at.launch(&MatMul { a: &flat, b: &weight.data.t()? })?;
    let mut shape = x.dims().to_vec();
    if let Some(last) = shape.last_mut() {
        *last = n;
    }
    let (y, x_shape) = (y.reshape(shape)?.share(), shape_of(x));
    let to_x =
        move |at: At, product: Factors, so_far: SoFar| product_added(at, product, x_shape, so_far);
    Ok(Unshared(from_linear(y, at, (x, flat), weight, to_x)))
}

/// Says that `y` (…, n) is x (…, k) · weightᵀ, computed at `at`; x also as its rows. Towards x, `to_x`
/// adds the product that it is given to what there is so far.
pub(super) fn from_linear(
    y: Tensor,
    at: At,
    (x, flat): (&Tensor, candle_core::Tensor),
    weight: &Tensor,
    to_x: impl FnOnce(At, Factors, SoFar) -> Result<Gradient> + Send + 'static,
) -> Tensor {
    let (frozen, weight_shape) = (weight.detach(), shape_of(weight));
    let saved = Tensor { data: flat, node: None, lease: x.lease.clone() };
    let y = y.made_by_product(at, x, move |at, dy, so_far| {
        to_x(at, [&Tensor::of(rows(dy)?), &frozen], so_far)
    });
    y.made_by_product(at, weight, move |at, dy, so_far| {
        product_added(at, [&Tensor::of(rows(dy)?.t()?), &saved], weight_shape, so_far)
    })
}

/// a (…, m, k) and b (…, k, n), to be multiplied.
pub(super) type Factors<'a> = [&'a Tensor; 2];

/// (…, width) as one matrix.
pub(super) fn rows(x: &Tensor) -> candle_core::Result<candle_core::Tensor> {
    if x.data.rank() == 2 {
        return Ok(x.data.clone()); // as it lies: columns of a wider matrix are not copied
    }
    let width = x.data.dim(candle_core::D::Minus1)?;
    x.data.reshape((x.elements() / width.max(1), width))
}

fn shape_of(x: &Tensor) -> Shape {
    x.data.shape().clone()
}

/// a · b, which is a gradient of `shape`, added to what is there of it so far: in the place of that
/// where nobody else holds it.
pub(super) fn product_added(
    at: At,
    [a, b]: Factors,
    shape: Shape,
    so_far: SoFar,
) -> Result<Gradient> {
    let product = MatMul { a: &a.data, b: &b.data };
    let (added, sum) = match so_far.into_place(a.data.dtype()) {
        Ok(place) => place,
        Err(so_far) => {
            let fresh = at.launch(&product)?;
            return so_far.plus(Gradient::Own(fresh.reshape(shape)?));
        }
    };
    let (&[ref leading @ .., m, _], &[.., n]) = (a.dims(), b.dims()) else {
        anyhow::bail!("matmul of {:?} and {:?}", a.dims(), b.dims());
    };
    let sum = sum.reshape([leading, &[m, n]].concat())?;
    ProductInto { sum: &sum, product, scaled: None, added }.run_at(at)?;
    Ok(Gradient::Own(sum.reshape(shape)?))
}

/// x + b, one vector (n) added to every row of (…, n). Towards b the gradient is the sum of rows.
///
/// # Errors
/// A last dimension other than n.
pub fn bias(at: At, x: &Tensor, bias: &Tensor) -> Result<Tensor> {
    biased(at, x, bias).map(Unshared::share)
}

/// The same, which nobody holds yet.
pub(super) fn biased(at: At, x: &Tensor, bias: &Tensor) -> Result<Unshared> {
    let Unshared(y) = at.launch(&Bias { x, bias })?;
    let y = y.made_from(at, x, |_, dy| Ok(dy.clone()));
    Ok(Unshared(y.made_from(at, bias, |at, dy| at.launch(&SumRows { x: dy }))))
}

/// One vector added to every row.
struct Bias<'a> {
    x: &'a Tensor,    // (…, n)
    bias: &'a Tensor, // (n)
}

impl Kernel for Bias<'_> {
    type Output = Unshared;

    fn device(&self) -> &Device {
        self.x.device()
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        let (rows, width) = self.x.rows_width()?;
        ops.add(Op::Bias { rows, width }, self.x.dtype()?);
        Ok(())
    }

    fn run(&self, nodes: &Nodes) -> candle_core::Result<Unshared> {
        computed(Element::Add, &self.x.data, &self.bias.data, nodes).map(Unshared)
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

    fn run(&self, nodes: &Nodes) -> candle_core::Result<Tensor> {
        let x = &self.x.data;
        let width = x.dim(candle_core::D::Minus1)?;
        Ok(Tensor::of(match Kernels::for_sums(&[x], width) {
            Some(kernels) => kernels.sum_rows(nodes, x)?,
            None => x.reshape(((), width))?.sum(0)?,
        }))
    }
}
