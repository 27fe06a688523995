//! Rotary position embedding, and the layout by heads that it works on.

use candle_core::Device;

use super::{
    Kernel, Nodes, Ops, RopeTable, Tensor,
    cuda::{Kernels, Turn},
    dtype_of, portable, scale,
};
use crate::{error::Result, ledger::Op, meter::At};

/// x (B, T, heads · d) laid out by heads, (B, heads, T, d).
///
/// # Errors
/// A width that is no multiple of `heads`.
pub fn split_heads(x: &Tensor, heads: usize) -> Result<Tensor> {
    let (batch, seq, width) = x.data.dims3()?;
    let split = x.reshape((batch, seq, heads, width / heads))?;
    swap(&split)
}

/// x (B, heads, T, d) laid out by token, (B, T, heads · d).
///
/// # Errors
/// The device's.
pub fn merge_heads(x: &Tensor) -> Result<Tensor> {
    let (batch, heads, seq, d) = x.data.dims4()?;
    swap(x)?.reshape((batch, seq, heads * d))
}

/// The two dimensions in the middle swapped, laid out densely: a copy, and no op.
fn swap(x: &Tensor) -> Result<Tensor> {
    // Two of no length to speak of lie as they should already.
    let moves = x.dims()[1] > 1 && x.dims()[2] > 1;
    let copy = |kernels: &Kernels, x: &candle_core::Tensor| {
        kernels.heads(&Nodes::default(), x, None, None)
    };
    match Kernels::of(&[&x.data]).filter(|_| moves) {
        Some(kernels) => {
            let swapped = copy(&kernels, &x.data)?;
            Ok(x.laid_out(swapped, move |dy| copy(&kernels, &dy.contiguous()?)))
        }
        None => x.transpose(1, 2),
    }
}

/// [`split_heads`], then [`rope`] with the first token at `past`, then, where there is a `factor`,
/// [`scale`]; on a GPU in one launch.
///
/// # Errors
/// As those.
pub fn rotated_heads(
    at: At,
    x: &Tensor,
    heads: usize,
    table: &RopeTable,
    past: usize,
    factor: Option<&Tensor>,
) -> Result<Tensor> {
    let (cos, sin) = table.parts();
    let Some(kernels) = Kernels::of(&[&x.data, &cos.data, &sin.data]) else {
        let turned = rope(at, &split_heads(x, heads)?, table, past)?;
        return factor.map_or(Ok(turned.clone()), |factor| scale(at, &turned, factor));
    };
    let (batch, seq, width) = x.data.dims3()?;
    let (positions, _) = cos.data.dims2()?;
    anyhow::ensure!(past + seq <= positions, "{past} + {seq} tokens of {positions} positions");
    let split = x.data.reshape((batch, seq, heads, width / heads))?;
    let turned = Turned { kernels, table: table.clone(), past, factor: factor.map(Tensor::detach) };
    let y = at.launch(&TurnedHeads { turned: &turned, x: &split, back: false })?;
    let shape = x.data.shape().clone();
    Ok(y.made_from(at, x, move |at, dy| {
        let dy = dy.data.contiguous()?;
        at.launch(&TurnedHeads { turned: &turned, x: &dy, back: true })?.reshape(shape)
    }))
}

/// How vectors are turned, both ways.
struct Turned {
    kernels: Kernels,
    table: RopeTable,
    past: usize,
    factor: Option<Tensor>,
}

/// (B, T, heads, d) laid out by token is turned by its position and laid out by head; back, the
/// other way.
struct TurnedHeads<'a> {
    turned: &'a Turned,
    x: &'a candle_core::Tensor,
    back: bool,
}

impl Kernel for TurnedHeads<'_> {
    type Output = Tensor;

    fn device(&self) -> &Device {
        self.x.device()
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        let (n, dtype) = (self.x.elem_count() as u64, dtype_of(self.x)?);
        if self.turned.factor.is_some() {
            ops.add(Op::Scale { n }, dtype);
        }
        ops.add(Op::Rope { n }, dtype);
        Ok(())
    }

    fn run(&self, nodes: &Nodes) -> candle_core::Result<Tensor> {
        let Turned { kernels, table, past, factor } = self.turned;
        let (cos, sin) = table.parts();
        let turn = Turn {
            cos: &cos.data,
            sin: &sin.data,
            past: *past,
            inner: self.back,
            sign: if self.back { -1.0 } else { 1.0 },
        };
        let factor = factor.as_ref().map(|factor| &factor.data);
        Ok(Tensor::of(kernels.heads(nodes, self.x, Some(turn), factor)?))
    }
}

/// Rotates x (B, heads, T, d), whose first token is at position `past`: element i of a head is
/// paired with element i + d/2.
///
/// # Errors
/// Positions past the table's end, or another head width.
pub fn rope(at: At, x: &Tensor, table: &RopeTable, past: usize) -> Result<Tensor> {
    let (_, _, seq, _) = x.data.dims4()?;
    let (cos, sin) = table.parts();
    let (cos, sin) = (cos.narrow(0, past, seq)?, sin.narrow(0, past, seq)?);
    let y = at.launch(&Rotated { x, cos: &cos, sin: &sin })?;
    // The rotation the other way: of a pair, the same with both elements swapped before and after.
    Ok(y.made_from(at, x, move |at, dy| {
        swap_halves(&at.launch(&Rotated { x: &swap_halves(dy)?, cos: &cos, sin: &sin })?)
    }))
}

struct Rotated<'a> {
    x: &'a Tensor,   // (B, heads, T, d)
    cos: &'a Tensor, // (T, d/2)
    sin: &'a Tensor, // (T, d/2)
}

impl Kernel for Rotated<'_> {
    type Output = Tensor;

    fn device(&self) -> &Device {
        self.x.device()
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        ops.add(Op::Rope { n: self.x.elements() as u64 }, self.x.dtype()?);
        Ok(())
    }

    fn run(&self, _: &Nodes) -> candle_core::Result<Tensor> {
        Ok(Tensor::of(portable::rope(&self.x.data, &self.cos.data, &self.sin.data)?))
    }
}

fn swap_halves(x: &Tensor) -> Result<Tensor> {
    let half = x.dims()[3] / 2;
    let (first, second) = (x.data.narrow(3, 0, half)?, x.data.narrow(3, half, half)?);
    Ok(Tensor::of(candle_core::Tensor::cat(&[second, first], 3)?))
}
