//! The causal mask, of the whole context or of a window.

use std::ops::Range;

use candle_core::Device;

use super::{
    Kernel, Nodes, Ops, QueryBlock, Tensor, Unshared, candle_dtype,
    cuda::Kernels,
    elementwise::{Element, computed},
};
use crate::{
    error::Result,
    ledger::{Dtype, Op},
    meter::At,
};

/// The additive mask of T queries over the S keys that they reach, (T, S): 0 where a query may
/// look, −∞ after its own token and, in a window of W, at tokens W or more before it.
#[derive(Debug)]
pub struct CausalMask {
    seq: usize,
    past: usize,
    window: Option<usize>,
    /// Filled by index, without arithmetic; none where a kernel tells by index itself, or where
    /// parts of it are.
    values: Option<Tensor>,
}

impl CausalMask {
    /// The mask for scores of `dtype` on `device`, of `seq` queries that come after `past` tokens.
    ///
    /// # Errors
    /// The device's.
    pub fn new(
        seq: usize,
        past: usize,
        window: Option<usize>,
        dtype: Dtype,
        device: &Device,
    ) -> Result<Self> {
        let past = reached(past, window);
        let width = past + seq;
        let by_index = Kernels::on(device, candle_dtype(dtype)).is_some();
        if by_index && Kernels::takes_rows_of(width) {
            return Ok(Self { seq, past, window, values: None });
        }
        let mut values = vec![0f32; seq * width];
        for (i, row) in values.chunks_exact_mut(width).enumerate() {
            let seen = past + i + 1;
            row[seen..].fill(f32::NEG_INFINITY);
            let first = window.map_or(0, |window| seen.saturating_sub(window));
            row[..first].fill(f32::NEG_INFINITY);
        }
        let values = Tensor::from_vec(values, (seq, width), dtype, device)?;
        Ok(Self { seq, past, window, values: Some(values) })
    }

    /// The same for blocked attention, which adds parts of it.
    pub fn by_block(seq: usize, past: usize, window: Option<usize>) -> Self {
        Self { seq, past: reached(past, window), window, values: None }
    }

    /// The values (t, m) for a block's rows and each range of its columns that has any, with the first
    /// of these in the block.
    pub(super) fn parts(
        &self,
        block: &QueryBlock,
        dtype: Dtype,
        device: &Device,
    ) -> Result<Vec<(usize, Tensor)>> {
        let ranges = block.masked.iter().filter(|keys| !keys.is_empty());
        let part = |keys: &Range<usize>| {
            let value = |(row, key): (usize, usize)| {
                let sees = key <= row && self.window.is_none_or(|window| key + window > row);
                if sees { 0.0 } else { f32::NEG_INFINITY }
            };
            let rows = block.rows.clone().map(|row| self.past + row);
            let values = rows.flat_map(|row| keys.clone().map(move |key| (row, key))).map(value);
            let shape = (block.rows.len(), keys.len());
            let values = Tensor::from_vec(values.collect(), shape, dtype, device)?;
            Ok((keys.start - block.keys.start, values))
        };
        ranges.map(part).collect()
    }

    /// Queries.
    pub(super) fn seq(&self) -> usize {
        self.seq
    }

    /// Keys that all queries are behind.
    pub(super) fn past(&self) -> usize {
        self.past
    }

    /// W, where queries look no further back.
    pub(super) fn window(&self) -> Option<usize> {
        self.window
    }

    /// Whether it is a tensor, to be added.
    pub(super) fn is_values(&self) -> bool {
        self.values.is_some()
    }

    /// Refuses scores (…, T, S) of another shape.
    pub(super) fn check(&self, scores: &Tensor) -> Result<()> {
        let (rows, width) = scores.rows_width()?;
        let fits =
            width as usize == self.past + self.seq && rows.is_multiple_of(self.seq.max(1) as u64);
        anyhow::ensure!(fits, "a mask of {self:?} for scores {:?}", scores.dims());
        Ok(())
    }

    /// scores (…, T, S) + mask (T, S). The gradient as it is: softmax's is 0 where −∞ was.
    pub(super) fn add(&self, at: At, scores: Unshared) -> Result<Unshared> {
        let Some(mask) = &self.values else { anyhow::bail!("a mask without values is not added") };
        self.check(&scores.0)?;
        let shape = scores.dims().to_vec();
        let (rows, width) = scores.0.rows_width()?;
        let by_query =
            scores.reshape((rows as usize / self.seq, self.seq, width as usize))?.share();
        let masked = at.launch(&Masked { scores: &by_query, mask })?;
        let masked = masked.made_from(at, &by_query, |_, dy| Ok(dy.clone()));
        Unshared(masked).reshape(shape)
    }
}

/// Tokens before a pass that its queries reach: all `past` ones, or those that the first query's
/// window holds beside its own.
pub(super) fn reached(past: usize, window: Option<usize>) -> usize {
    window.map_or(past, |window| past.min(window.saturating_sub(1)))
}

struct Masked<'a> {
    scores: &'a Tensor, // (…, T, S)
    mask: &'a Tensor,   // (T, S)
}

impl Kernel for Masked<'_> {
    type Output = Tensor;

    fn device(&self) -> &Device {
        self.scores.device()
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        let (rows, width) = self.scores.rows_width()?;
        ops.add(Op::Mask { rows, width }, self.scores.dtype()?);
        Ok(())
    }

    fn run(&self, nodes: &Nodes) -> candle_core::Result<Tensor> {
        computed(Element::Add, &self.scores.data, &self.mask.data, nodes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_by_hand() {
        let rows = |seq, past, window| {
            let mask = CausalMask::new(seq, past, window, Dtype::F32, &Device::Cpu).unwrap();
            let values = mask.values.unwrap();
            let width = values.dims()[1];
            let seen =
                values.to_vec().unwrap().iter().map(|&v| u8::from(v == 0.0)).collect::<Vec<_>>();
            seen.chunks(width).map(<[u8]>::to_vec).collect::<Vec<_>>()
        };
        assert_eq!(rows(2, 1, None), [[1, 1, 0], [1, 1, 1]]);
        assert_eq!(rows(3, 0, Some(2)), [[1, 0, 0], [1, 1, 0], [0, 1, 1]]);
        // Of five tokens held, a window of 3 reaches two.
        assert_eq!(rows(2, 5, Some(3)), [[1, 1, 1, 0], [0, 1, 1, 1]]);
        assert_eq!(rows(1, 5, Some(1)), [[1]]);
    }
}
