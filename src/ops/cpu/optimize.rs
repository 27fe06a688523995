//! Sums of squares, and AdamW.

use candle_core::{CpuStorage, InplaceOp2, Layout, Result, Storage, Tensor, bail};
use rayon::prelude::*;

use super::gemv::dot;
use crate::ops::cuda::AdamWFactors;

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

/// One update of a state (3, n) of parameters and both moments by a gradient of n, dense f32, in
/// place.
pub(in crate::ops) fn adamw(state: &Tensor, gradient: &Tensor, step: &AdamWFactors) -> Result<()> {
    state.inplace_op2(gradient, &Step(step))
}

struct Step<'a>(&'a AdamWFactors);

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
        if state.len() != 3 * g.len() {
            bail!("a gradient of {} elements for a state of {}", g.len(), state.len());
        }
        let (p, moments) = state.split_at_mut(g.len());
        let (m, v) = moments.split_at_mut(g.len());
        let AdamWFactors { decay, rate, correction, eps, b1, b2, rest1, rest2, .. } = *self.0;
        let moments = m.par_chunks_mut(CHUNK).zip(v.par_chunks_mut(CHUNK));
        let chunks = p.par_chunks_mut(CHUNK).zip(moments).zip(g.par_chunks(CHUNK));
        chunks.for_each(|((p, (m, v)), g)| {
            for i in 0..p.len() {
                let g = g[i];
                m[i] = b1 * m[i] + rest1 * g;
                v[i] = b2 * v[i] + rest2 * g * g;
                p[i] = decay * p[i] - rate * m[i] / (v[i].sqrt() / correction + eps);
            }
        });
        Ok(())
    }
}
