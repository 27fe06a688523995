//! Attention of whole sequences in one kernel: scores are never held.

use candle_core::{DType, Result, Tensor};

use super::{
    Causal, Kernels,
    args::Attention,
    call::File,
    tiles::{ATTENTION_SHAPES, ATTENTION_WARPS},
};
use crate::ops::launch::Nodes;

/// Query rows of a block for heads of width `d`, where a kernel takes such.
fn query_rows(d: usize) -> Option<u32> {
    let [_, tiles, _] = ATTENTION_SHAPES.into_iter().find(|&[width, ..]| width as usize == d)?;
    Some(ATTENTION_WARPS * 16 * tiles)
}

/// Whether keys or values (B, K, S, d) may be the held part of a cache: dense but for what follows
/// each head.
fn by_head(t: &Tensor) -> bool {
    match (t.dims(), t.stride()) {
        (&[_, heads, held, d], &[batch, head, token, one]) => {
            one == 1 && token == d && batch == heads * head && head >= held * d
        }
        _ => false,
    }
}

impl Kernels {
    /// Whether [`Self::attention`] takes q (B, H, T, d), k and v (B, K, S, d).
    pub(in crate::ops) fn attention_serves(q: &Tensor, k: &Tensor, v: &Tensor) -> bool {
        let Some(kernels) = Self::of(&[q]) else { return false };
        let (&[batch, heads, _, d], &[k_batch, kv_heads, _, width]) = (q.dims(), k.dims()) else {
            return false;
        };
        let start = |t: &Tensor| t.layout().start_offset() * t.dtype().size_in_bytes();
        let laid_out = |t| kernels.serves(t) && by_head(t) && start(t).is_multiple_of(16);
        kernels.dtype == DType::BF16
            && query_rows(d).is_some()
            && (batch, d) == (k_batch, width)
            && k.dims() == v.dims()
            && kv_heads > 0
            && heads.is_multiple_of(kv_heads)
            // A grid's second and third dimension.
            && batch.max(heads) <= 65_535
            && laid_out(k)
            && laid_out(v)
            && k.stride() == v.stride()
    }

    /// softmax(q · kᵀ + mask) · v for q (B, H, T, d), scaled already, and k and v (B, K, S, d),
    /// which may be the held part of a cache: (B, T, H·d). All scores are computed, also those that
    /// the mask hides.
    ///
    /// # Errors
    /// Tensors that [`Self::attention_serves`] refuses, not as many keys as the queries see; the
    /// device's.
    pub(in crate::ops) fn attention(
        &self,
        nodes: &Nodes,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        causal: Causal,
    ) -> Result<Tensor> {
        let name = if causal.window.is_some() { "attention_windowed" } else { "attention" };
        let call = self.call(nodes, File::Attention, name);
        let ([batch, heads, seq, d], [_, kv_heads, held, _]) = (call.dims(q)?, call.dims(k)?);
        let fits = causal.seq == seq && causal.own(held).is_some();
        call.check(fits && Self::attention_serves(q, k, v), &[q, k, v])?;
        let rows = query_rows(d).unwrap_or(1);
        let out = self.empty((batch, seq, heads * d), self.dtype)?;
        let args = Attention {
            out: call.writes(&out)?,
            q: call.reads(q)?,
            keys: call.reads_from(k)?,
            values: call.reads_from(v)?,
            stride: k.stride()[1] as u64,
            seq: call.size(seq)?,
            held: call.size(held)?,
            heads: call.size(heads)?,
            kv_heads: call.size(kv_heads)?,
            window: causal.window(),
        };
        let grid = [seq.div_ceil(rows as usize), heads, batch];
        // SAFETY: the tensors have these dimensions; heads of k and v are `stride` apart.
        unsafe { call.start(&[d as u32], grid, ATTENTION_WARPS * 32, &args)? };
        Ok(out)
    }
}
