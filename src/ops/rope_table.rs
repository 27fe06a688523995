//! Cosines and sines of rotary positions, stretched as the model's config says.

use std::f64::consts::PI;

use candle_core::Device;

use super::{Kernel, Nodes, Ops, Tensor};
use crate::{
    config::{Rope, RopeScaling},
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
        rope: &Rope,
        dtype: Dtype,
        device: &Device,
    ) -> Result<Self> {
        let (cos, sin) = at.launch(&Table { positions, head_dim, rope })?;
        let table = |values| Tensor::from_vec(values, (positions, head_dim / 2), dtype, device);
        Ok(Self { cos: table(cos)?, sin: table(sin)? })
    }

    /// Cosines and sines.
    pub(super) fn parts(&self) -> (&Tensor, &Tensor) {
        (&self.cos, &self.sin)
    }
}

/// The one kernel that makes tensors of nothing: its dimensions are those that it will give them.
struct Table<'a> {
    positions: usize,
    head_dim: usize,
    rope: &'a Rope,
}

impl Kernel for Table<'_> {
    type Output = (Vec<f32>, Vec<f32>);

    fn device(&self) -> &Device {
        &Device::Cpu
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        let (positions, half) = (self.positions as u64, self.head_dim as u64 / 2);
        ops.add(Op::RopeTable { positions, half }, Dtype::F32);
        match self.rope.scaling {
            RopeScaling::Default => {}
            RopeScaling::Linear { .. } => ops.add(Op::RopeLinear { half }, Dtype::F32),
            RopeScaling::Llama3 { .. } => ops.add(Op::RopeLlama3 { half }, Dtype::F32),
            RopeScaling::Yarn { .. } => {
                ops.add(Op::RopeYarn { half }, Dtype::F32);
                ops.add(Op::Scale { n: 2 * positions * half }, Dtype::F32);
            }
        }
        Ok(())
    }

    fn run(&self, _: &Nodes) -> candle_core::Result<Self::Output> {
        let (frequencies, factor) = frequencies(self.rope, self.head_dim);
        let angles = (0..self.positions)
            .flat_map(|t| frequencies.iter().map(move |f| (t as f32 * f).sin_cos()));
        let (mut sin, mut cos): (Vec<f32>, Vec<f32>) = angles.unzip();
        if let Some(factor) = factor {
            cos.iter_mut().chain(&mut sin).for_each(|x| *x *= factor);
        }
        Ok((cos, sin))
    }
}

/// What each pair of a head turns by a position, and the factor on cosines and sines.
fn frequencies(rope: &Rope, head_dim: usize) -> (Vec<f32>, Option<f32>) {
    let exponent = |i: usize| (2 * i) as f64 / head_dim as f64;
    let plain = (0..head_dim / 2).map(|i| 1.0 / rope.theta.powf(exponent(i)) as f32);
    match rope.scaling {
        RopeScaling::Default => (plain.collect(), None),
        RopeScaling::Linear { factor } => (plain.map(|f| f / factor as f32).collect(), None),
        RopeScaling::Llama3 {
            factor,
            low_freq_factor: low,
            high_freq_factor: high,
            original_max_position_embeddings,
        } => {
            let original = original_max_position_embeddings as f64;
            // Every pair takes the same operations, whichever of the three it then keeps.
            let stretched = |f: f32| {
                let f = f64::from(f);
                let wavelength = 2.0 * PI / f;
                let scaled = f / factor;
                let smooth = (original / wavelength - low) / (high - low);
                let between = (1.0 - smooth) * scaled + smooth * f;
                let (long, short) = (wavelength > original / low, wavelength < original / high);
                (if long {
                    scaled
                } else if short {
                    f
                } else {
                    between
                }) as f32
            };
            (plain.map(stretched).collect(), None)
        }
        RopeScaling::Yarn {
            factor,
            beta_fast,
            beta_slow,
            original_max_position_embeddings,
            attention_factor,
            truncate,
        } => {
            // The pair, as a real number, that makes so many turns over the original context.
            let pair_of = |turns: f64| {
                let original = original_max_position_embeddings as f64;
                head_dim as f64 * (original / (turns * 2.0 * PI)).ln() / (2.0 * rope.theta.ln())
            };
            let (low, high) = (pair_of(beta_fast), pair_of(beta_slow));
            let (low, high) = if truncate { (low.floor(), high.ceil()) } else { (low, high) };
            let (low, mut high) = (low.max(0.0), high.min(head_dim as f64 - 1.0));
            if low == high {
                high += 0.001; // as transformers does, against a division by zero
            }
            let stretched = |(i, f): (usize, f32)| {
                let f = f64::from(f);
                let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                (ramp * (f / factor) + (1.0 - ramp) * f) as f32
            };
            (plain.enumerate().map(stretched).collect(), Some(attention_factor as f32))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(scaling: RopeScaling) -> (Vec<f32>, Option<f32>) {
        frequencies(&Rope { theta: 10_000.0, scaling }, 8)
    }

    #[test]
    fn frequencies_by_hand() {
        let close = |a: &[f32], b: &[f64]| {
            assert_eq!(a.len(), b.len());
            for (a, b) in a.iter().zip(b) {
                assert!((f64::from(*a) - b).abs() < 1e-6 * b, "{a} {b}");
            }
        };
        close(&of(RopeScaling::Default).0, &[1.0, 0.1, 0.01, 0.001]);
        close(&of(RopeScaling::Linear { factor: 4.0 }).0, &[0.25, 0.025, 0.0025, 0.00025]);
        // Wavelengths 6.28, 62.8, 628 and 6283 over an original context of 256: below 64 short,
        // above 256 long.
        let llama3 = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 256,
        };
        close(&of(llama3).0, &[1.0, 0.1, 0.01 / 8.0, 0.001 / 8.0]);
        // 32 turns over 1024 tokens: pair 0.70, so 0; one turn: pair 2.21, so 3.
        let yarn = RopeScaling::Yarn {
            factor: 4.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            original_max_position_embeddings: 1024,
            attention_factor: 1.25,
            truncate: true,
        };
        let (found, factor) = of(yarn);
        let mixed = |f: f64, ramp: f64| ramp * f / 4.0 + (1.0 - ramp) * f;
        close(&found, &[1.0, mixed(0.1, 1.0 / 3.0), mixed(0.01, 2.0 / 3.0), 0.001 / 4.0]);
        assert_eq!(factor, Some(1.25));
    }
}
