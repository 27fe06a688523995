//! Rotary position embedding, and the layout by heads that it works on.

use candle_core::Device;

use super::{
    Tensor,
    cuda::{Kernels, Turn},
    dtype_of, scale,
};
use crate::{
    error::Result,
    ledger::{Dtype, Op},
    meter::At,
};

/// Cosines and sines, each (positions, d/2).
#[derive(Debug, Clone)]
pub struct RopeTable {
    cos: Tensor,
    sin: Tensor,
}

impl RopeTable {
    /// Tables of positions 0 … `positions` − 1 for heads of width `head_dim`.
    ///
    /// Computed on the host in f32 and then rounded to `dtype`, as transformers does: bf16 angles
    /// would be off by whole turns at long contexts.
    ///
    /// # Errors
    /// The device's.
    pub fn new(
        at: At,
        positions: usize,
        head_dim: usize,
        theta: f64,
        dtype: Dtype,
        device: &Device,
    ) -> Result<Self> {
        let half = head_dim / 2;
        let op = Op::RopeTable { positions: positions as u64, half: half as u64 };
        let (cos, sin) = at.run(op, Dtype::F32, device, || {
            let frequency = |i| 1.0 / theta.powf((2 * i) as f64 / head_dim as f64) as f32;
            let frequencies: Vec<f32> = (0..half).map(frequency).collect();
            let angles = (0..positions)
                .flat_map(|t| frequencies.iter().map(move |f| (t as f32 * f).sin_cos()));
            let (sin, cos): (Vec<f32>, Vec<f32>) = angles.unzip();
            Ok((cos, sin))
        })?;
        let table = |values| Tensor::from_vec(values, (positions, half), dtype, device);
        Ok(Self { cos: table(cos)?, sin: table(sin)? })
    }
}

impl RopeTable {
    /// Cosines and sines.
    pub(super) fn parts(&self) -> (&Tensor, &Tensor) {
        (&self.cos, &self.sin)
    }
}

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

/// The two dimensions in the middle swapped, laid out densely.
fn swap(x: &Tensor) -> Result<Tensor> {
    // Two of no length to speak of lie as they should already.
    let moves = x.dims()[1] > 1 && x.dims()[2] > 1;
    match Kernels::of(&[&x.data]).filter(|_| moves) {
        Some(kernels) => {
            let swapped = kernels.heads(&x.data, None, None)?;
            Ok(x.laid_out(swapped, move |dy| kernels.heads(&dy.contiguous()?, None, None)))
        }
        None => x.transpose(1, 2),
    }
}

/// [`split_heads`], then [`rope`] with the first token at `past`, then, where there is a `factor`,
/// [`scale`]; on a GPU in one pass.
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
    let Some(kernels) = Kernels::of(&[&x.data, &table.cos.data, &table.sin.data]) else {
        let turned = rope(at, &split_heads(x, heads)?, table, past)?;
        return factor.map_or(Ok(turned.clone()), |factor| scale(at, &turned, factor));
    };
    let (batch, seq, width) = x.data.dims3()?;
    let (positions, _) = table.cos.data.dims2()?;
    anyhow::ensure!(past + seq <= positions, "{past} + {seq} tokens of {positions} positions");
    let split = x.data.reshape((batch, seq, heads, width / heads))?;
    let (table, factor) = (table.clone(), factor.map(Tensor::detach));
    // Both ways: what is laid out by token is turned by its position, what is laid out by head back.
    let run = move |at: At, x: &candle_core::Tensor, back: bool| {
        let (n, dtype) = (x.elem_count() as u64, dtype_of(x)?);
        if factor.is_some() {
            at.ran(Op::Scale { n }, dtype);
        }
        let turn = Turn {
            cos: &table.cos.data,
            sin: &table.sin.data,
            past,
            inner: back,
            sign: if back { -1.0 } else { 1.0 },
        };
        at.run(Op::Rope { n }, dtype, x.device(), || {
            kernels.heads(x, Some(turn), factor.as_ref().map(|f| &f.data))
        })
    };
    let y = Tensor::from(run(at, &split, false)?);
    let shape = x.data.shape().clone();
    Ok(y.made_from(at, x, move |at, dy| {
        Ok(run(at, &dy.data.contiguous()?, true)?.reshape(shape)?.into())
    }))
}

/// Rotates x (B, heads, T, d), whose first token is at position `past`: element i of a head is
/// paired with element i + d/2.
///
/// # Errors
/// Positions past the table's end, or another head width.
pub fn rope(at: At, x: &Tensor, table: &RopeTable, past: usize) -> Result<Tensor> {
    let (_, _, seq, _) = x.data.dims4()?;
    let cos = table.cos.narrow(0, past, seq)?;
    let sin = table.sin.narrow(0, past, seq)?;
    let y = rotate(at, x, &cos, &sin)?;
    Ok(y.made_from(at, x, move |at, dy| rope_grad(at, dy, &cos, &sin)))
}

fn rotate(at: At, x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let op = Op::Rope { n: x.elements() as u64 };
    let run = || candle_nn::rotary_emb::rope(&x.data.contiguous()?, &cos.data, &sin.data);
    Ok(at.run(op, x.dtype()?, x.device(), run)?.into())
}

/// The rotation the other way: of a pair, the same with both elements swapped before and after.
fn rope_grad(at: At, dy: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    swap_halves(&rotate(at, &swap_halves(dy)?, cos, sin)?)
}

fn swap_halves(x: &Tensor) -> Result<Tensor> {
    let half = x.dims()[3] / 2;
    let (first, second) = (x.data.narrow(3, 0, half)?, x.data.narrow(3, half, half)?);
    Ok(candle_core::Tensor::cat(&[second, first], 3)?.into())
}
