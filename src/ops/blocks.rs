//! Attention block by block: of queries and keys in blocks of [`ATTENTION_BLOCK`], no score is
//! computed that the mask hides with all others of its block.
//!
//! A block of queries reads the blocks of keys that any of its rows sees, all in one product, and the
//! mask is added to those that one of its rows does not see wholly. Where a gradient is wanted, the
//! forward pass keeps the output and of each row of scores its maximum and sum; the backward pass
//! computes the scores again, block by block, and then goes over the blocks of keys.
//!
//! [`Blocks`] tells which blocks there are and, for the kernel that computes all of them in one launch
//! on a GPU, which ops that is.

mod at_once;

use std::ops::Range;

use super::{
    CausalMask, Tensor, Unshared, matmul, merge_heads,
    scores::{masked_in_part, row_dots, scores_grad, softmax_again, softmax_kept},
    softmax,
};
use crate::{error::Result, ledger::Op, meter::At, workload::ATTENTION_BLOCK};

/// The blocks of one span of attention: q (B, H, T, d) over k and v (B, K, U, d), of which the
/// queries are the last T tokens.
#[derive(Debug, Clone)]
pub struct Blocks {
    batch: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    queries: Vec<QueryBlock>,
    keys: Vec<KeyBlock>,
}

/// Queries that are computed together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueryBlock {
    /// Which of the T queries.
    pub rows: Range<usize>,
    /// The keys that it reads, of all U: whole blocks, but for the end of the last.
    pub keys: Range<usize>,
    /// Those of them that are masked, before and after the ones that every row sees; either may be
    /// empty.
    pub masked: [Range<usize>; 2],
}

/// Keys whose gradients are computed together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyBlock {
    /// Which of the U keys.
    pub keys: Range<usize>,
    /// The query blocks that read it.
    pub readers: Range<usize>,
    /// The queries in those.
    pub rows: Range<usize>,
}

impl QueryBlock {
    /// Columns that are masked.
    pub fn masked_keys(&self) -> usize {
        self.masked.iter().map(Range::len).sum()
    }
}

impl Blocks {
    /// The blocks of q (B, H, T, d) over k (B, K, U, d) under `mask`.
    ///
    /// # Errors
    /// Shapes that do not fit one another, or a mask of another shape.
    pub fn new(q: &Tensor, k: &Tensor, mask: &CausalMask) -> Result<Self> {
        let (batch, heads, seq, head_dim) = q.data.dims4()?;
        let (_, kv_heads, held, _) = k.data.dims4()?;
        let fits = [batch, head_dim] == [k.dims()[0], k.dims()[3]]
            && heads.is_multiple_of(kv_heads.max(1))
            && seq == mask.seq()
            && held == mask.past() + seq;
        anyhow::ensure!(fits, "a mask of {mask:?} for {:?} over {:?}", q.dims(), k.dims());
        let queries: Vec<_> =
            cut(seq).map(|rows| QueryBlock::new(rows, mask.past(), held, mask.window())).collect();
        let keys = cut(held).map(|keys| KeyBlock::new(keys, &queries)).collect();
        Ok(Self { batch, heads, kv_heads, head_dim, queries, keys })
    }

    /// The blocks of queries, in order.
    pub fn queries(&self) -> &[QueryBlock] {
        &self.queries
    }

    /// The blocks of keys, in order.
    pub fn keys(&self) -> &[KeyBlock] {
        &self.keys
    }

    /// The ops of the forward pass.
    pub fn forward(&self) -> impl Iterator<Item = Op> {
        self.queries.iter().flat_map(|block| {
            let Dims { b, m, k, n, rows, masked } = self.dims(block);
            let (mask, width) = (masked_op(rows, masked), n);
            let ops = [Op::Matmul { b, m, k, n }].into_iter().chain(mask);
            ops.chain([Op::Softmax { rows, width }, Op::Matmul { b, m, k: n, n: k }])
        })
    }

    /// The ops of the backward pass, where gradients towards `[q, k, v]` are wanted.
    pub fn backward(&self, [q, k, v]: [bool; 3]) -> Vec<Op> {
        let mut ops = vec![];
        let weighted = q || k;
        if weighted {
            let rows = (self.batch * self.heads * self.rows()) as u64;
            ops.push(Op::RowDot { rows, width: self.head_dim as u64 });
        }
        for block in self.queries.iter().filter(|_| weighted || v) {
            let Dims { b, m, k: d, n, rows, masked } = self.dims(block);
            let (scores, width) = (Op::Matmul { b, m, k: d, n }, n);
            ops.push(scores);
            ops.extend(masked_op(rows, masked));
            ops.push(Op::SoftmaxAgain { rows, width });
            if weighted {
                ops.extend([scores, Op::ScoresGrad { rows, width }]);
            }
            if q {
                ops.push(Op::Matmul { b, m, k: n, n: d });
            }
        }
        for block in &self.keys {
            let [b, m, n] = [self.batch * self.kv_heads, block.keys.len(), self.head_dim];
            let k_rows = self.group() * block.rows.len();
            let [b, m, k_rows, n] = [b, m, k_rows, n].map(|n| n as u64);
            let product = Op::Matmul { b, m, k: k_rows, n };
            ops.extend([k, v].into_iter().filter(|wanted| *wanted).map(|_| product));
        }
        ops
    }

    /// G
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// T
    fn rows(&self) -> usize {
        self.queries.last().map_or(0, |block| block.rows.end)
    }

    fn dims(&self, block: &QueryBlock) -> Dims {
        let (count, wide) = (block.rows.len(), |n: usize| n as u64);
        Dims {
            b: wide(self.batch * self.kv_heads),
            m: wide(self.group() * count),
            k: wide(self.head_dim),
            n: wide(block.keys.len()),
            rows: wide(self.batch * self.heads * count),
            masked: wide(block.masked_keys()),
        }
    }

    /// Rows of x (B, H, T, ·), all heads of one key head together: (B, K, G·t, ·).
    fn grouped(&self, x: &Tensor, rows: &Range<usize>) -> Result<Tensor> {
        let width = x.dims()[3];
        let shape = (self.batch, self.kv_heads, self.group() * rows.len(), width);
        x.narrow(2, rows.start, rows.len())?.reshape(shape)
    }

    /// The other way: (B, K, G·t, ·) as (B, H, t, ·).
    fn by_head(&self, x: &Tensor) -> Result<Tensor> {
        let &[_, _, rows, width] = x.dims() else { anyhow::bail!("rows {:?}", x.dims()) };
        x.reshape((self.batch, self.heads, rows / self.group(), width))
    }

    /// The columns of one block of keys out of what each block of queries has of its scores, over all
    /// rows that read it: (B, K, G·rows, w).
    fn columns(&self, of_queries: &[Tensor], block: &KeyBlock) -> Result<Tensor> {
        let (batch, kv_heads, group, width) =
            (self.batch, self.kv_heads, self.group(), block.keys.len());
        let parts = block.readers.clone().map(|reader| {
            let QueryBlock { rows, keys, .. } = &self.queries[reader];
            let shape = (batch * kv_heads, group, rows.len(), keys.len());
            let scores = of_queries[reader].reshape(shape)?;
            scores.narrow(3, block.keys.start - keys.start, width)?.contiguous()
        });
        let all = Tensor::joined(&parts.collect::<Result<Vec<_>>>()?, 2)?;
        all.reshape((batch, kv_heads, group * block.rows.len(), width))
    }
}

/// Dimensions of a block's ops.
struct Dims {
    b: u64,
    m: u64,
    k: u64,
    n: u64,
    rows: u64,
    masked: u64,
}

fn masked_op(rows: u64, width: u64) -> Option<Op> {
    (width > 0).then_some(Op::Mask { rows, width })
}

/// `n` in blocks.
fn cut(n: usize) -> impl Iterator<Item = Range<usize>> {
    (0..n).step_by(ATTENTION_BLOCK).map(move |start| start..n.min(start + ATTENTION_BLOCK))
}

impl QueryBlock {
    /// Queries `rows`, the first of all queries being token `past` of `held`.
    fn new(rows: Range<usize>, past: usize, held: usize, window: Option<usize>) -> Self {
        let down = |n: usize| n / ATTENTION_BLOCK * ATTENTION_BLOCK;
        // Tokens up to the first row's and the last row's own.
        let (first, last) = (past + rows.start + 1, past + rows.end);
        let hidden = |seen: usize| window.map_or(0, |window| seen.saturating_sub(window));
        let begin = down(hidden(first));
        let end = last.next_multiple_of(ATTENTION_BLOCK).min(held);
        let closed = if first == held { held } else { down(first) };
        let open = hidden(last).next_multiple_of(ATTENTION_BLOCK).min(closed);
        Self { rows, keys: begin..end, masked: [begin..open, closed..end] }
    }
}

impl KeyBlock {
    fn new(keys: Range<usize>, queries: &[QueryBlock]) -> Self {
        // Blocks of queries begin and end the later, the later they are.
        let from = queries.partition_point(|block| block.keys.end <= keys.start);
        let to = queries.partition_point(|block| block.keys.start <= keys.start);
        let readers = from..to.max(from);
        let rows = match &queries[readers.clone()] {
            [first, .., last] => first.rows.start..last.rows.end,
            [one] => one.rows.clone(),
            [] => 0..0,
        };
        Self { keys, readers, rows }
    }
}

/// What the backward pass reads.
struct Saved {
    blocks: Blocks,
    mask: Vec<Vec<(usize, Tensor)>>,
    q: Tensor,    // (B, H, T, d)
    k: Tensor,    // (B, K, U, d)
    v: Tensor,    // (B, K, U, d)
    out: Tensor,  // (B, H, T, d)
    kept: Tensor, // (B, H, T, 2): each row's maximum and sum
}

/// softmax(q · kᵀ + mask) · v as [`super::attention`] computes it, block by block: (B, T, H·d). On a
/// GPU in bf16 one launch computes all blocks, and another their gradients.
///
/// # Errors
/// Shapes that do not fit one another, or the device's.
pub fn blocked_attention(
    at: At,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    mask: &CausalMask,
) -> Result<Tensor> {
    let inputs = [q, k, v];
    if let Some(out) = at_once::blocked_attention(at, inputs, mask)? {
        return Ok(out);
    }
    let wanted = inputs.map(|t| at.is_taped() && t.needs_gradient());
    let blocks = Blocks::new(q, k, mask)?;
    let part = |block: &QueryBlock| mask.parts(block, q.dtype()?, q.device());
    let mask = blocks.queries.iter().map(part).collect::<Result<Vec<_>>>()?;
    let [q, k, v] = inputs.map(Tensor::detach);
    let (mut out, mut kept) = (vec![], vec![]);
    for (block, mask) in blocks.queries.iter().zip(&mask) {
        let scores = scores(at, &blocks, (block, mask), [&q, &k])?;
        let weights = match wanted.contains(&true) {
            true => {
                let (weights, of_rows) = softmax_kept(at, scores)?;
                kept.push(blocks.by_head(&of_rows)?);
                weights
            }
            false => softmax(at, scores)?,
        };
        let mixed = matmul(at, &weights, &rows_of(&v, &block.keys)?)?.share(); // (B, K, G·t, d)
        out.push(blocks.by_head(&mixed)?);
    }
    let out = Tensor::joined(&out, 2)?; // (B, H, T, d)
    if kept.is_empty() {
        return merge_heads(&out);
    }
    let saved = Saved { blocks, mask, q, k, v, out: out.clone(), kept: Tensor::joined(&kept, 2)? };
    let out = out.made_together(at, inputs, move |at, dy| saved.backward(at, dy, wanted));
    merge_heads(&out)
}

/// The scores of one block of queries, masked: (B, K, G·t, w).
fn scores(
    at: At,
    blocks: &Blocks,
    (block, mask): (&QueryBlock, &[(usize, Tensor)]),
    [q, k]: [&Tensor; 2],
) -> Result<Unshared> {
    let q = blocks.grouped(q, &block.rows)?;
    let scores = matmul(at, &q, &rows_of(k, &block.keys)?.t()?)?;
    masked_in_part(at, scores, mask)
}

/// Some keys, or values, of x (B, K, U, d), as a view.
fn rows_of(x: &Tensor, keys: &Range<usize>) -> Result<Tensor> {
    x.narrow(2, keys.start, keys.len())
}

impl Saved {
    /// The gradients that are wanted of q, k and v, given that of the output (B, H, T, d).
    fn backward(self, at: At, dy: &Tensor, wanted: [bool; 3]) -> Result<[Option<Tensor>; 3]> {
        let Self { blocks, mask, q, k, v, out, kept } = self;
        let [of_q, of_k, of_v] = wanted;
        let weighted = of_q || of_k;
        let dy = dy.contiguous()?;
        // Σ dy·y of each row, which is what Σ P·dP of its weights comes to.
        let dots = weighted.then(|| row_dots(at, &out, &dy)).transpose()?; // (B, H, T, 1)
        let (mut weights, mut slopes, mut dq) = (vec![], vec![], vec![]);
        for (block, mask) in blocks.queries.iter().zip(&mask) {
            let again = scores(at, &blocks, (block, mask), [&q, &k])?;
            let p = softmax_again(at, again, &blocks.grouped(&kept, &block.rows)?)?;
            if let Some(dots) = &dots {
                let dy = blocks.grouped(&dy, &block.rows)?;
                let dp = matmul(at, &dy, &rows_of(&v, &block.keys)?.t()?)?;
                let ds = scores_grad(at, &p, dp, &blocks.grouped(dots, &block.rows)?)?;
                if of_q {
                    let dq_rows = matmul(at, &ds, &rows_of(&k, &block.keys)?)?.share();
                    dq.push(blocks.by_head(&dq_rows)?);
                }
                slopes.extend(of_k.then_some(ds));
            }
            weights.extend(of_v.then_some(p));
        }
        let towards = |wanted: bool, scores: &[Tensor], rows: &Tensor| -> Result<_> {
            let of_block = |block: &KeyBlock| {
                let columns = blocks.columns(scores, block)?;
                let rows = blocks.grouped(rows, &block.rows)?;
                Ok(matmul(at, &columns.t()?, &rows)?.share()) // (B, K, w, d)
            };
            let parts = || blocks.keys.iter().map(of_block).collect::<Result<Vec<_>>>();
            wanted.then(|| Tensor::joined(&parts()?, 2)).transpose()
        };
        let (dk, dv) = (towards(of_k, &slopes, &q)?, towards(of_v, &weights, &dy)?);
        let dq = of_q.then(|| Tensor::joined(&dq, 2)).transpose()?;
        Ok([dq, dk, dv])
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn blocks(seq: usize, past: usize, window: Option<usize>) -> Vec<QueryBlock> {
        let past = crate::ops::mask::reached(past, window);
        cut(seq).map(|rows| QueryBlock::new(rows, past, past + seq, window)).collect()
    }

    #[test]
    fn blocks_by_hand() {
        let block = |rows, keys, masked| QueryBlock { rows, keys, masked };
        assert_eq!(
            blocks(130, 0, None),
            [
                block(0..64, 0..64, [0..0, 0..64]),
                block(64..128, 0..128, [0..0, 64..128]),
                block(128..130, 0..130, [0..0, 128..130]),
            ]
        );
        // A last row by itself sees everything.
        assert_eq!(blocks(65, 0, None)[1], block(64..65, 0..65, [0..0, 65..65]));
        // Of 70 tokens held, the first 64 are seen by all.
        assert_eq!(blocks(3, 70, None), [block(0..3, 0..73, [0..0, 64..73])]);
        // Rows 128 … 191 of a window of 64 see nothing before 65, and none of 64 … 127 whole.
        assert_eq!(blocks(192, 0, Some(64))[2], block(128..192, 64..192, [64..128, 128..192]));
    }

    proptest! {
        /// A block of keys is read if a row sees one of them, and masked unless all rows see all.
        #[test]
        fn blocks_are_what_rows_see(
            seq in 2usize..300, past in 0usize..300, window in proptest::option::of(1usize..300),
        ) {
            let held = crate::ops::mask::reached(past, window);
            let queries = blocks(seq, past, window);
            for block in &queries {
                let sees = |row: usize, key: usize| {
                    let at = held + row;
                    key <= at && window.is_none_or(|window| key + window > at)
                };
                for keys in cut(held + seq) {
                    let of = |row: usize| keys.clone().filter(move |key| sees(row, *key)).count();
                    let seen: usize = block.rows.clone().map(of).sum();
                    let inside = |range: &Range<usize>| {
                        range.start <= keys.start && keys.end <= range.end
                    };
                    let masked = block.masked.iter().any(inside);
                    prop_assert_eq!(inside(&block.keys), seen > 0, "{:?} {:?}", block, keys);
                    let some = seen > 0 && seen < keys.len() * block.rows.len();
                    prop_assert_eq!(masked, some, "{:?} {:?}", block, keys);
                }
            }
            for keys in cut(held + seq) {
                let block = KeyBlock::new(keys.clone(), &queries);
                let reads = |q: &&QueryBlock| q.keys.contains(&keys.start);
                let rows: usize = queries.iter().filter(reads).map(|q| q.rows.len()).sum();
                prop_assert_eq!(block.rows.len(), rows);
                prop_assert!(queries[block.readers.clone()].iter().all(|q| reads(&q)));
            }
        }
    }
}
