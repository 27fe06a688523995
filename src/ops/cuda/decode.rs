//! One token of each sequence: its embedding, and its attention over what is held. Both write to
//! tensors that are there already, and the number of tokens held is read on the device, so that
//! one recording serves every step.

use candle_core::{DType, Result, Tensor};

use super::{
    Kernels, Norm,
    args::{self, Embed},
    call::{Element, File, blocks},
    rows::window,
    tiles::{
        ATTEND_SHAPES, ATTEND_TILE_BYTES, ATTEND_TILE_WIDTHS, ELEMENT_THREADS, LOOKERS,
        MOST_SPLITS, TILE_LOOKERS,
    },
};
use crate::ops::launch::Nodes;

/// RoPE of q and k, each head normed before where a norm is given, q times `scale`, k and v into
/// the cache, and the softmax-weighted mix of all values there that the token sees, its own
/// included.
#[derive(Debug, Clone, Copy)]
pub(in crate::ops) struct Attend<'a> {
    /// (B, H·d)
    pub out: &'a Tensor,
    /// (B, H·d), or such columns of a wider matrix.
    pub q: &'a Tensor,
    /// (B, K·d), likewise.
    pub k: &'a Tensor,
    /// (B, K·d), likewise.
    pub v: &'a Tensor,
    /// (B, K, capacity, d)
    pub keys: &'a Tensor,
    /// (B, K, capacity, d)
    pub values: &'a Tensor,
    /// (positions, d/2)
    pub cos: &'a Tensor,
    /// (positions, d/2)
    pub sin: &'a Tensor,
    /// One element.
    pub scale: &'a Tensor,
    /// Gain of d; where q has a norm, k has one too.
    pub q_norm: Option<Norm<'a>>,
    /// Gain of d.
    pub k_norm: Option<Norm<'a>>,
    /// One u32: tokens that the longest sequence holds before this one.
    pub held: &'a Tensor,
    /// (1, B) in u32: how many fewer each sequence holds; none where all hold as many.
    pub behind: Option<&'a Tensor>,
    /// The most tokens that are seen, this one among them.
    pub window: Option<usize>,
    /// (B·H, splits·(d + 2)) in f32: what each share of the keys comes to.
    pub shares: &'a Tensor,
    /// (1, B·lookers) in u32, zeros between launches.
    pub done: &'a Tensor,
}

/// Query heads that one block takes at most, of width `d`; none where no kernel takes such.
fn most_heads(d: usize) -> Option<usize> {
    let shapes = ATTEND_SHAPES.into_iter().filter(|&[width, _]| width as usize == d);
    shapes.map(|[_, most]| most as usize).max()
}

/// Whether the tensor cores attend for several query heads of width `d` at once.
fn by_tiles(dtype: DType, d: usize) -> bool {
    dtype == DType::BF16 && ATTEND_TILE_WIDTHS.iter().any(|&[width]| width as usize == d)
}

/// Most blocks of a grid's second and third dimension.
const MOST_BLOCKS: usize = 65_535;

/// How [`Kernels::attend`] is cut, as (lookers, splits): blocks that the query heads of a sequence
/// are split over, and shares of the keys. None where no kernel serves. The bounds are those that
/// were fastest on an H100.
pub(in crate::ops) fn attend_space(
    dtype: DType,
    batch: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    capacity: usize,
) -> Option<(usize, usize)> {
    // Enough for every multiprocessor to have four, or eight, at work; by the tensor cores, one.
    const MANY: usize = 528;
    const MANY_TILES: usize = 128;
    let most = most_heads(head_dim)?;
    let grouped = heads > 0 && kv_heads > 0 && heads.is_multiple_of(kv_heads);
    if !grouped || batch == 0 || batch.max(heads) > MOST_BLOCKS {
        return None;
    }
    // A block a query head has less to add up than one for several of a key head, and what it
    // reads again is near; until keys are so many that reading them is what takes the time.
    let tiles = by_tiles(dtype, head_dim);
    let few = match tiles {
        true => batch < 8 && batch * capacity <= 1 << 14,
        false => batch * capacity <= 1 << 18,
    };
    if few {
        let room = (2 * MANY / (batch * heads)).max(1);
        let shares = if capacity <= 256 { 1 } else { capacity.div_ceil(128).clamp(8, 24) };
        return Some((heads, shares.min(room)));
    }
    // Of one key head, as many as go into a block in equal parts.
    let group = heads / kv_heads;
    let together = (1..=most).rev().find(|&n| group.is_multiple_of(n)).unwrap_or(1);
    let lookers = heads / together;
    if tiles {
        // Shares cost more than they save while keys are few; powers of two are the fastest.
        let room = (MANY_TILES / (batch * lookers)).clamp(1, MOST_SPLITS as usize);
        return Some((lookers, if capacity <= 512 { 1 } else { 1 << room.ilog2() }));
    }
    let room = MANY.div_ceil(batch * lookers).min(MOST_SPLITS as usize);
    Some((lookers, capacity.div_ceil(64).clamp(1, room)))
}

impl Kernels {
    /// out (B, D) = rows `ids` (1, B) of `table` (V, D), each times `scale`, a tensor of one
    /// element, where it is given. Ids are below V.
    ///
    /// # Errors
    /// Shapes that do not fit one another; the device's.
    pub(in crate::ops) fn embed(
        &self,
        nodes: &Nodes,
        out: &Tensor,
        table: &Tensor,
        ids: &Tensor,
        scale: Option<&Tensor>,
    ) -> Result<()> {
        let call = self.call(nodes, File::Decode, "embed");
        let ([batch, width], [_, columns]) = (call.dims(out)?, call.dims(table)?);
        let fits = columns == width && ids.elem_count() == batch;
        call.check(fits && scale.is_none_or(|s| s.elem_count() == 1), &[out, table, ids])?;
        let args = Embed {
            out: call.writes(out)?,
            table: call.reads(table)?,
            ids: call.reads(ids)?,
            scale: call.reads_any(scale)?,
            width: call.size(width)?,
        };
        let [columns, ..] = blocks(width, ELEMENT_THREADS);
        // SAFETY: out has `batch` rows of this width, and so has the table by its ids.
        unsafe { call.start(&[], [columns, batch, 1], ELEMENT_THREADS, &args) }
    }

    /// Attention of one token of each sequence.
    ///
    /// # Errors
    /// Shapes that do not fit one another; the device's.
    pub(in crate::ops) fn attend(&self, nodes: &Nodes, a: Attend) -> Result<()> {
        let normed = a.q_norm.is_some();
        let lookers = a.done.elem_count() / a.out.dim(0)?.max(1);
        let tiles = a.keys.dims().last().is_some_and(|&d| {
            by_tiles(self.dtype, d) && a.out.elem_count() > a.done.elem_count() * d
        });
        let name = match (tiles, normed) {
            (false, false) => "attend",
            (false, true) => "attend_normed",
            (true, false) => "attend_tiles",
            (true, true) => "attend_tiles_normed",
        };
        let call = self.call(nodes, File::Decode, name);
        call.check(a.k_norm.is_some() == normed, &[a.q, a.k])?;
        let [batch, kv_heads, capacity, d] = call.dims(a.keys)?;
        let [rows, width, q_stride] = call.columns(a.q)?;
        let [k_rows, k_width, kv_stride] = call.columns(a.k)?;
        let [positions, half] = call.dims(a.cos)?;
        let [share_rows, share] = call.dims(a.shares)?;
        let alike = |one: &Tensor, other: &Tensor| {
            one.dims() == other.dims() && one.stride() == other.stride()
        };

        let heads = width / d.max(1);
        let fits = [rows, k_rows] == [batch, batch] && batch > 0 && heads > 0;
        let fits = fits && heads * d == width && kv_heads * d == k_width;
        call.check(fits && alike(a.k, a.v) && alike(a.keys, a.values), &[a.q, a.k, a.v, a.keys])?;
        call.check(a.out.dims() == [batch, width], &[a.out, a.q])?;
        let turned = half * 2 == d && positions >= capacity && a.sin.dims() == a.cos.dims();
        call.check(turned, &[a.cos, a.sin, a.keys])?;
        call.check([a.scale, a.held].iter().all(|t| t.elem_count() == 1), &[a.scale, a.held])?;
        call.check(a.behind.is_none_or(|behind| behind.elem_count() == batch), &[a.q, a.held])?;
        // Rows begin where 16 bytes do.
        let packed = |stride: usize| (stride * self.dtype.size_in_bytes()).is_multiple_of(16);
        call.check(packed(q_stride) && packed(kv_stride), &[a.q, a.k])?;

        // Heads of one block, all of one key head, and shares of the keys.
        let together = heads.checked_div(lookers).unwrap_or(0);
        let splits = share / (d + 2);
        let most = most_heads(d).unwrap_or(0);
        let cut = lookers * batch == a.done.elem_count()
            && (1..=most).contains(&together)
            && lookers * together == heads
            && heads.is_multiple_of(kv_heads)
            && (heads / kv_heads).is_multiple_of(together)
            && (1..=MOST_SPLITS as usize).contains(&splits)
            && [share_rows, share] == [batch * heads, splits * (d + 2)];
        call.check(cut && a.window != Some(0), &[a.q, a.keys, a.shares, a.done])?;

        let args = args::Attend {
            out: call.writes(a.out)?,
            q: call.reads_from(a.q)?,
            k: call.reads_from(a.k)?,
            v: call.reads_from(a.v)?,
            keys: call.writes(a.keys)?,
            values: call.writes(a.values)?,
            cos: call.reads(a.cos)?,
            sin: call.reads(a.sin)?,
            scale: call.reads::<Element>(a.scale)?,
            q_norm: call.norm(a.q_norm, d)?,
            k_norm: call.norm(a.k_norm, d)?,
            held: call.reads(a.held)?,
            behind: call.reads_any(a.behind)?,
            shares: call.writes(a.shares)?,
            done: call.writes(a.done)?,
            heads: call.size(heads)?,
            kv_heads: call.size(kv_heads)?,
            capacity: call.size(capacity)?,
            q_stride: call.size(q_stride)?,
            kv_stride: call.size(kv_stride)?,
            window: window(a.window),
        };
        // The kernel multiplies the two.
        call.size(capacity * splits)?;
        let (grid, width) = ([splits, lookers, batch], d as u32);
        // SAFETY: the tensors have these dimensions, and the caches room for one more token than
        // are held: whoever counts them stops at their capacity, and none holds fewer than it is
        // behind.
        unsafe {
            match tiles {
                true => call.start_sharing(&[width], grid, TILE_LOOKERS, ATTEND_TILE_BYTES, &args),
                false => {
                    let most = if together == 1 { 1 } else { most as u32 };
                    call.start(&[width, most], grid, LOOKERS, &args)
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attention_is_cut_in_equal_parts() {
        for (batch, heads, kv_heads, d, capacity, cut) in [
            (1, 14, 2, 64, 200, Some((14, 1))),
            (1, 14, 2, 64, 8192, Some((14, 24))),
            (64, 14, 2, 64, 128, Some((14, 1))),
            (64, 14, 2, 64, 8192, Some((2, 5))),
            // Shared memory has room for four query heads of 256, and no more.
            (64, 8, 1, 256, 8192, Some((2, 5))),
            (64, 4, 1, 256, 8192, Some((1, 9))),
            // Nine go into a block three at a time.
            (64, 9, 1, 64, 8192, Some((3, 3))),
            (1, 14, 2, 80, 200, None),
            (1, 14, 4, 64, 200, None),
            (70_000, 14, 2, 64, 200, None),
        ] {
            let found = attend_space(DType::F32, batch, heads, kv_heads, d, capacity);
            assert_eq!(found, cut, "{heads} of {d}");
        }
        // The tensor cores are worth it for fewer keys.
        let by_tiles = |batch, d| attend_space(DType::BF16, batch, 14, 2, d, 2081);
        assert_eq!(by_tiles(1, 64), Some((14, 17)));
        assert_eq!(by_tiles(8, 64), Some((2, 8)));
        assert_eq!(by_tiles(24, 64), Some((2, 2)));
        assert_eq!(by_tiles(64, 64), Some((2, 1)));
        assert_eq!(by_tiles(8, 32), Some((14, 9)));
    }
}
