//! Sums of squares, and AdamW.

use candle_core::{CpuStorage, InplaceOp2, Layout, Result, Storage, Tensor, bail};
use rayon::prelude::*;

use super::gemv::dot;
use crate::ops::{
    cuda::AdamWFactors,
    rounding::{Draws, packed, unpacked},
};

/// Elements that one task takes.
const CHUNK: usize = 1 << 14;

/// Σ x² of dense f32.
pub(in crate::ops) fn sum_squares(x: &Tensor) -> Result<f64> {
    let (storage, layout) = x.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        // In f64 between chunks: a sum of many small squares in f32 would lose them.
        (Storage::Cpu(CpuStorage::F32(x)), Some((start, end))) => {
            let squares = |x: &[f32]| f64::from(dot(x, x, |v| v));
            Ok(x[start..end].par_chunks(CHUNK).map(squares).collect::<Vec<_>>().iter().sum())
        }
        _ => bail!("takes dense f32"),
    }
}

/// One update of a state by a gradient of n, dense f32, in place: (3, n) of parameters and both
/// moments, or (2, n) of parameters and words of two moments, which `draws` rounds.
pub(in crate::ops) fn adamw(
    state: &Tensor,
    gradient: &Tensor,
    step: &AdamWFactors,
    draws: Draws,
) -> Result<()> {
    state.inplace_op2(gradient, &Step { by: step, draws })
}

struct Step<'a> {
    by: &'a AdamWFactors,
    draws: Draws,
}

impl InplaceOp2 for Step<'_> {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn cpu_fwd(
        &self,
        state: &mut CpuStorage,
        state_layout: &Layout,
        gradient: &CpuStorage,
        layout: &Layout,
    ) -> Result<()> {
        let ranges = (state_layout.contiguous_offsets(), layout.contiguous_offsets());
        let (CpuStorage::F32(state), CpuStorage::F32(g), (Some(s), Some(r))) =
            (state, gradient, ranges)
        else {
            bail!("takes dense f32");
        };
        let (state, g) = (&mut state[s.0..s.1], &g[r.0..r.1]);
        let n = g.len();
        let (is_wide, is_narrow) = (state.len() == 3 * n, state.len() == 2 * n);
        if !(is_wide || is_narrow) {
            bail!("a gradient of {n} elements for a state of {}", state.len());
        }
        let (p, moments) = state.split_at_mut(n);
        match is_wide {
            true => self.wide(p, moments.split_at_mut(n), g),
            false => self.narrow(p, moments, g),
        }
        Ok(())
    }
}

impl Step<'_> {
    fn wide(&self, p: &mut [f32], (m, v): (&mut [f32], &mut [f32]), g: &[f32]) {
        let moments = m.par_chunks_mut(CHUNK).zip(v.par_chunks_mut(CHUNK));
        let chunks = p.par_chunks_mut(CHUNK).zip(moments).zip(g.par_chunks(CHUNK));
        chunks.for_each(|((p, (m, v)), g)| {
            for i in 0..p.len() {
                (p[i], [m[i], v[i]]) = self.updated(p[i], [m[i], v[i]], g[i]);
            }
        });
    }

    fn narrow(&self, p: &mut [f32], words: &mut [f32], g: &[f32]) {
        let chunks = p.par_chunks_mut(CHUNK).zip(words.par_chunks_mut(CHUNK));
        chunks.zip(g.par_chunks(CHUNK)).enumerate().for_each(|(chunk, ((p, words), g))| {
            for i in 0..p.len() {
                let (updated, moments) = self.updated(p[i], unpacked(words[i].to_bits()), g[i]);
                let bits = self.draws.bits((chunk * CHUNK + i) as u64);
                (p[i], words[i]) = (updated, f32::from_bits(packed(moments, bits)));
            }
        });
    }

    /// A parameter and its moments after the step.
    #[inline(always)]
    fn updated(&self, p: f32, [m, v]: [f32; 2], g: f32) -> (f32, [f32; 2]) {
        let AdamWFactors { decay, rate, correction, eps, b1, b2, rest1, rest2, .. } = *self.by;
        let m = b1 * m + rest1 * g;
        let v = b2 * v + rest2 * g * g;
        (decay * p - rate * m / (v.sqrt() / correction + eps), [m, v])
    }
}
