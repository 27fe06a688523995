//! Rotary position embedding.

use candle_core::Device;

use super::Tensor;
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
