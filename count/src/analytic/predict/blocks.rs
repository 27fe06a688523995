//! Attention block by block: the queries of a block read the blocks of keys that any of them sees,
//! and mask those that one of them does not see wholly.

use std::ops::Range;

use super::flow::{Flow, Tensor};
use crate::{
    ledger::{Module, Op},
    workload::ATTENTION_BLOCK,
};

/// A block of queries.
struct Rows {
    /// Queries in it.
    count: u64,
    /// The blocks of keys that it reads.
    reads: Range<usize>,
    /// Keys in these.
    width: u64,
    /// Keys in those of them that are masked.
    masked: u64,
}

/// The blocks of a pass.
struct Blocks {
    rows: Vec<Rows>,
    keys: Vec<Range<u64>>,
}

/// `n` cut into blocks.
fn blocks(n: u64) -> impl Iterator<Item = Range<u64>> {
    let block = ATTENTION_BLOCK as u64;
    (0..n.div_ceil(block)).map(move |index| index * block..n.min((index + 1) * block))
}

/// Keys of blocks that follow one another.
fn width(blocks: &[Range<u64>]) -> u64 {
    blocks.iter().map(|block| block.end - block.start).sum()
}

impl Blocks {
    /// Those of `queries` tokens that are fed on top of `past`.
    fn new(queries: u64, past: u64, window: Option<u64>) -> Self {
        let keys: Vec<Range<u64>> = blocks(past + queries).collect();
        let rows = blocks(queries).map(|rows| {
            // Where its first and last row stand; and what a row sees from.
            let (first, last) = (past + rows.start, past + rows.end - 1);
            let from = |at: u64| window.map_or(0, |window| (at + 1).saturating_sub(window));
            let reads = keys.partition_point(|block| block.end <= from(first))
                ..keys.partition_point(|block| block.start <= last);
            let hidden = |block: &&Range<u64>| block.start < from(last) || block.end > first + 1;
            let masked: Vec<_> = keys[reads.clone()].iter().filter(hidden).cloned().collect();
            Rows {
                count: rows.end - rows.start,
                width: width(&keys[reads.clone()]),
                masked: width(&masked),
                reads,
            }
        });
        Self { rows: rows.collect(), keys }
    }

    /// Of each block of keys, how many it has and how many queries read it.
    fn columns(&self) -> Vec<(u64, u64)> {
        let mut readers = vec![0; self.keys.len()];
        for rows in &self.rows {
            readers[rows.reads.clone()].iter_mut().for_each(|all| *all += rows.count);
        }
        self.keys.iter().map(|keys| keys.end - keys.start).zip(readers).collect()
    }
}

impl Flow<'_, '_> {
    /// The weighted values, without the scores of blocks that a mask hides wholly. For gradients, the
    /// maximum and sum of each row are kept, and scores are computed again.
    pub(super) fn mixed_by_block(
        &mut self,
        window: Option<usize>,
        [q, k, v]: [Tensor; 3],
    ) -> Tensor {
        let [h, heads, d] = self.heads();
        let (batch, t, past) = self.span(window);
        let (at, b, group) = (Module::SelfAttn, batch * heads, h / heads);
        let product = |m, k, n| Op::Matmul { b, m, k, n };
        let [of_q, of_k, of_v] = [&q, &k, &v].map(|tensor| tensor.needs_gradient);
        let weighted = of_q || of_k;
        let blocks = Blocks::new(t, past, window.map(|width| width as u64));
        for &Rows { count, width, masked, .. } in &blocks.rows {
            let (m, rows) = (group * count, batch * h * count);
            let scores = product(m, d, width);
            let mask = (masked > 0).then_some(Op::Mask { rows, width: masked });
            self.op(at, scores);
            mask.into_iter().for_each(|mask| self.op(at, mask));
            self.op(at, Op::Softmax { rows, width });
            self.op(at, product(m, width, d));
            if weighted || of_v {
                self.back(at, scores);
                mask.into_iter().for_each(|mask| self.back(at, mask));
                self.back(at, Op::SoftmaxAgain { rows, width });
            }
            if weighted {
                self.back(at, scores);
                self.back(at, Op::ScoresGrad { rows, width });
            }
            if of_q {
                self.back(at, product(m, width, d));
            }
        }
        if weighted {
            self.back(at, Op::RowDot { rows: batch * h * t, width: d });
        }
        for (keys, readers) in blocks.columns() {
            for _ in [of_k, of_v].into_iter().filter(|wanted| *wanted) {
                self.back(at, product(keys, group * readers, d));
            }
        }
        self.tensor(at, h * d, weighted || of_v)
    }
}
