//! Attention of whole sequences in one kernel: scores are never held.

use candle_core::{DType, Result, Tensor, bail};

use super::{
    Causal, Kernels,
    args::{Attention, AttentionDots, AttentionGrad},
    backend,
    call::{File, blocks},
    tiles::{
        ATTENTION_BLOCK, ATTENTION_BLOCKED_WARPS, ATTENTION_GRAD_SHAPES, ATTENTION_SHAPES,
        ATTENTION_WARPS, ATTENTION_WIDE_SHAPES, ELEMENT_THREADS,
    },
};
use crate::ops::launch::Nodes;

/// Queries and keys of a block, as tensors count.
const BLOCK: usize = crate::workload::ATTENTION_BLOCK;
const _: () = assert!(BLOCK == ATTENTION_BLOCK as usize, "the kernels' blocks are the ledger's");

/// A kernel of attention, and its blocks of threads.
struct Way {
    name: &'static str,
    /// Queries of a block.
    rows: u32,
    warps: u32,
    /// Bytes of shared memory that a block is given.
    shared: u32,
}

impl Way {
    /// That for heads of width `d`: by warpgroups where the GPU has their products.
    fn of(d: usize, blocked: bool, windowed: bool) -> Option<Self> {
        if let (true, Some([width, groups])) = (backend::have_warpgroups(), wide_shape(d)) {
            let name = match (blocked, windowed) {
                (false, false) => "attention_wide",
                (false, true) => "attention_wide_windowed",
                (true, false) => "attention_wide_blocked",
                (true, true) => "attention_wide_blocked_windowed",
            };
            let rows = groups * ATTENTION_BLOCK;
            // Queries, and two tiles of keys and of values, of two blocks each.
            let shared = 2 * width * (rows + 2 * 2 * 2 * ATTENTION_BLOCK);
            return Some(Self { name, rows, warps: 4 * groups, shared });
        }
        let [_, tiles, _] =
            ATTENTION_SHAPES.into_iter().find(|&[width, ..]| width as usize == d)?;
        let (name, tiles, warps) = match (blocked, windowed) {
            (false, false) => ("attention", tiles, ATTENTION_WARPS),
            (false, true) => ("attention_windowed", tiles, ATTENTION_WARPS),
            (true, false) => ("attention_blocked", 1, ATTENTION_BLOCKED_WARPS),
            (true, true) => ("attention_blocked_windowed", 1, ATTENTION_BLOCKED_WARPS),
        };
        Some(Self { name, rows: warps * 16 * tiles, warps, shared: 0 })
    }
}

fn wide_shape(d: usize) -> Option<[u32; 2]> {
    ATTENTION_WIDE_SHAPES.into_iter().find(|&[width, _]| width as usize == d)
}

/// The kernel of the gradients for heads of width `d`, and the bytes of shared memory that a block of
/// it is given: a tile of keys and of values, two of queries and of dy, the gradient of the scores;
/// and three numbers for each query of both tiles, which those by warpgroups declare themselves.
fn gradients_way(d: usize, windowed: bool) -> (&'static str, u32) {
    const BLOCK: u32 = ATTENTION_BLOCK;
    if let (true, Some([width, _])) = (backend::have_warpgroups(), wide_shape(d)) {
        let name = if windowed { "attention_grad_wide_windowed" } else { "attention_grad_wide" };
        return (name, 2 * (6 * BLOCK * width + BLOCK * BLOCK));
    }
    let shape = ATTENTION_GRAD_SHAPES.into_iter().find(|&[width, _]| width as usize == d);
    let [width, rows] = shape.unwrap_or([0; 2]);
    let name = if windowed { "attention_grad_windowed" } else { "attention_grad" };
    (name, 2 * (2 * BLOCK * width + 4 * rows * width + BLOCK * rows) + 4 * 6 * rows)
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
            && Way::of(d, false, false).is_some()
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
        self.attend_all(nodes, [q, k, v], causal, false, None)
    }

    /// The same without the blocks of [`ATTENTION_BLOCK`] queries and keys that are hidden whole,
    /// and with each row's maximum and sum (2, B, H, T) in f32 where they are kept for the
    /// gradients.
    ///
    /// # Errors
    /// As [`Self::attention`].
    pub(in crate::ops) fn attention_blocked(
        &self,
        nodes: &Nodes,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        causal: Causal,
        keep: bool,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let &[batch, heads, seq, _] = q.dims() else { bail!("queries {:?}", q.dims()) };
        let kept = keep.then(|| self.empty((2, batch, heads, seq), DType::F32)).transpose()?;
        Ok((self.attend_all(nodes, [q, k, v], causal, true, kept.as_ref())?, kept))
    }

    fn attend_all(
        &self,
        nodes: &Nodes,
        [q, k, v]: [&Tensor; 3],
        causal: Causal,
        blocked: bool,
        kept: Option<&Tensor>,
    ) -> Result<Tensor> {
        let d = q.dims().last().copied().unwrap_or(0);
        let Some(way) = Way::of(d, blocked, causal.window.is_some()) else {
            bail!("no kernel attends with heads of {d}");
        };
        let call = self.call(nodes, File::Attention, way.name);
        let ([batch, heads, seq, d], [_, kv_heads, held, _]) = (call.dims(q)?, call.dims(k)?);
        let fits = causal.seq == seq && causal.own(held).is_some();
        call.check(fits && Self::attention_serves(q, k, v), &[q, k, v])?;
        let out = self.empty((batch, seq, heads * d), self.dtype)?;
        let part = |index: usize| kept.map(|kept| kept.narrow(0, index, 1)).transpose();
        let (highest, sums) = (part(0)?, part(1)?);
        let args = Attention {
            out: call.writes(&out)?,
            q: call.reads(q)?,
            keys: call.reads_from(k)?,
            values: call.reads_from(v)?,
            highest: call.writes_any(highest.as_ref())?,
            sums: call.writes_any(sums.as_ref())?,
            stride: k.stride()[1] as u64,
            seq: call.size(seq)?,
            held: call.size(held)?,
            heads: call.size(heads)?,
            kv_heads: call.size(kv_heads)?,
            window: causal.window(),
        };
        let grid = [seq.div_ceil(way.rows as usize), heads, batch];
        let block = way.warps * 32;
        // SAFETY: the tensors have these dimensions; heads of k and v are `stride` apart.
        unsafe { call.start_sharing(&[d as u32], grid, block, way.shared, &args)? };
        Ok(out)
    }

    /// Gradients of [`Self::attention_blocked`] towards q, k and v, those that are `wanted`, from
    /// its output and that one's gradient (B, T, H·d) and what it kept. Blocks add to them in any
    /// order: the last bits of a sum may differ from run to run.
    ///
    /// # Errors
    /// As [`Self::attention`]; another shape of `out`, `dy` or `kept`.
    pub(in crate::ops) fn attention_gradients(
        &self,
        nodes: &Nodes,
        [q, k, v]: [&Tensor; 3],
        [out, dy, kept]: [&Tensor; 3],
        causal: Causal,
        wanted: [bool; 3],
    ) -> Result<[Option<Tensor>; 3]> {
        let d = q.dims().last().copied().unwrap_or(0);
        let (name, shared) = gradients_way(d, causal.window.is_some());
        let call = self.call(nodes, File::Attention, name);
        let ([batch, heads, seq, d], [_, kv_heads, held, _]) = (call.dims(q)?, call.dims(k)?);
        let fits = causal.seq == seq
            && causal.own(held).is_some()
            && kept.dims() == [2, batch, heads, seq]
            && [out, dy].iter().all(|t| t.dims() == [batch, seq, heads * d])
            && Self::attention_serves(q, k, v);
        call.check(fits, &[q, k, v, out, dy, kept])?;
        let [of_q, of_k, of_v] = wanted;
        let dots = (of_q || of_k)
            .then(|| self.attention_dots(nodes, [out, dy], [batch, heads, seq, d]))
            .transpose()?;
        let zeros = |wanted: bool, heads: usize, tokens: usize| {
            let shape = (batch, heads, tokens, d);
            wanted.then(|| Tensor::zeros(shape, DType::F32, q.device())).transpose()
        };
        let [dq, dk, dv] =
            [zeros(of_q, heads, seq)?, zeros(of_k, kv_heads, held)?, zeros(of_v, kv_heads, held)?];
        let (highest, sums) = (kept.narrow(0, 0, 1)?, kept.narrow(0, 1, 1)?);
        let args = AttentionGrad {
            dq: call.writes_any(dq.as_ref())?,
            dk: call.writes_any(dk.as_ref())?,
            dv: call.writes_any(dv.as_ref())?,
            dy: call.reads(dy)?,
            q: call.reads(q)?,
            keys: call.reads_from(k)?,
            values: call.reads_from(v)?,
            highest: call.reads(&highest)?,
            sums: call.reads(&sums)?,
            dots: call.reads_any(dots.as_ref())?,
            stride: k.stride()[1] as u64,
            seq: call.size(seq)?,
            held: call.size(held)?,
            heads: call.size(heads)?,
            kv_heads: call.size(kv_heads)?,
            window: causal.window(),
        };
        let (grid, block) = ([held.div_ceil(BLOCK), heads, batch], ATTENTION_WARPS * 32);
        // SAFETY: the tensors have these dimensions; heads of k and v are `stride` apart.
        unsafe { call.start_sharing(&[d as u32], grid, block, shared, &args)? };
        let narrow = |sum: Option<Tensor>| sum.map(|sum| sum.to_dtype(self.dtype)).transpose();
        Ok([narrow(dq)?, narrow(dk)?, narrow(dv)?])
    }

    /// Of each row of `out` and `dy`, (B, T, H·d), the sum of the products of both: (B, H, T).
    fn attention_dots(
        &self,
        nodes: &Nodes,
        [out, dy]: [&Tensor; 2],
        [batch, heads, seq, d]: [usize; 4],
    ) -> Result<Tensor> {
        let call = self.call(nodes, File::Attention, "attention_dots");
        let (dots, rows) = (self.empty((batch, heads, seq), DType::F32)?, out.elem_count() / d);
        let args = AttentionDots {
            dots: call.writes(&dots)?,
            out: call.reads(out)?,
            dy: call.reads(dy)?,
            rows: rows as u64,
            seq: call.size(seq)?,
            heads: call.size(heads)?,
        };
        // SAFETY: both have rows of d, dots one element for each.
        unsafe {
            call.start(&[d as u32], blocks(rows * d / 8, ELEMENT_THREADS), ELEMENT_THREADS, &args)?;
        }
        Ok(dots)
    }
}
