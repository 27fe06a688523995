//! Gradients that are sums over rows.

use candle_core::{DType, Result, Tensor};

use super::{
    Kernels, args,
    call::{Call, File, Read, blocks},
    elements::{by_several, pack},
    tiles::{EMBED_GRAD_THREADS, SUM_COLUMNS, SUM_PARTS_THREADS, SUM_SHAPES, SUM_THREADS},
};
use crate::ops::launch::Nodes;

/// The most blocks that sum rows, each a part of them: two for each multiprocessor of an H100.
const MOST_PARTS: usize = 264;

/// The first shape that holds rows of `width`.
fn sum_shape(width: usize) -> Option<[u32; 3]> {
    let own = pack(by_several(width));
    let fits = |&[pack, packs, threads]: &[u32; 3]| {
        pack as usize == own && width <= (pack * packs * threads) as usize
    };
    SUM_SHAPES.into_iter().find(|shape| width > 0 && fits(shape))
}

impl Kernels {
    /// Those that sum the rows of `width` of all of `tensors`; none as for [`Kernels::of`], and
    /// where rows are too wide.
    pub(in crate::ops) fn for_sums(tensors: &[&Tensor], width: usize) -> Option<Self> {
        sum_shape(width).and(Self::of(tensors))
    }

    /// A table (vocab, D) of zeros but for the rows `ids`: the sum of those rows of `dy` (ids, D)
    /// that have the id. All ids are below `vocab`.
    ///
    /// # Errors
    /// Not one id a row; the device's.
    pub(in crate::ops) fn embed_grad(
        &self,
        nodes: &Nodes,
        vocab: usize,
        ids: &Tensor,
        dy: &Tensor,
    ) -> Result<Tensor> {
        let call = self.call(nodes, File::Sums, "embed_grad");
        let [rows, width] = call.dims(dy)?;
        call.check(rows > 0 && width > 0 && ids.elem_count() == rows, &[ids, dy])?;
        let table = Tensor::zeros((vocab, width), self.dtype(), self.device())?;
        let args = args::EmbedGrad {
            table: call.writes(&table)?,
            ids: call.reads(ids)?,
            dy: call.reads(dy)?,
            rows: call.size(rows)?,
            width: call.size(width)?,
        };
        let pack = pack(by_several(width));
        let [slices, ..] = blocks(width / pack, EMBED_GRAD_THREADS);
        // SAFETY: dy has a row for each id, and the table one for whatever an id is.
        unsafe { call.start(&[pack as u32], [rows, slices, 1], EMBED_GRAD_THREADS, &args)? };
        Ok(table)
    }

    /// The sum of all rows of `x` (…, width): (width).
    ///
    /// # Errors
    /// Rows that are too wide; the device's.
    pub(in crate::ops) fn sum_rows(&self, nodes: &Nodes, x: &Tensor) -> Result<Tensor> {
        let call = self.call(nodes, File::Sums, "sum_rows");
        self.sum(nodes, &call, None, x)
    }

    /// The gradient of [`Self::rms_norm`] towards its gain, `dy` being that of its result: the sum
    /// of all rows of dy · x / sqrt(mean(x²) + eps).
    ///
    /// # Errors
    /// Shapes that differ, or rows that are too wide; the device's.
    pub(in crate::ops) fn gain_grad(
        &self,
        nodes: &Nodes,
        x: &Tensor,
        eps: f64,
        dy: &Tensor,
    ) -> Result<Tensor> {
        let call = self.call(nodes, File::Sums, "gain_grad");
        let alike = x.elem_count() == dy.elem_count() && x.dims().last() == dy.dims().last();
        call.check(alike, &[x, dy])?;
        self.sum(nodes, &call, Some((x, eps)), dy)
    }

    /// Parts of the sum by many blocks, and the sum of these.
    fn sum(
        &self,
        nodes: &Nodes,
        call: &Call,
        normed: Option<(&Tensor, f64)>,
        dy: &Tensor,
    ) -> Result<Tensor> {
        let width = dy.dims().last().copied().unwrap_or(1);
        let Some(shape) = sum_shape(width) else {
            call.check(false, &[dy])?;
            candle_core::bail!("no rows");
        };
        let rows = dy.elem_count() / width;
        let [at_once, ..] = blocks(rows * shape[2] as usize, SUM_THREADS);
        let count = at_once.min(MOST_PARTS);
        let parts = self.empty((count, width), DType::F32)?;
        let args = args::SumRows {
            parts: call.writes(&parts)?,
            x: normed.map_or(Ok(Read::NULL), |(x, _)| call.reads(x))?,
            dy: call.reads(dy)?,
            rows: rows as u64,
            width: call.size(width)?,
            eps: normed.map_or(0.0, |(_, eps)| eps as f32),
        };
        // SAFETY: dy, and x where it is read, has these rows, parts has a row for each block.
        unsafe { call.start(&shape, [count, 1, 1], SUM_THREADS, &args)? };

        let call = self.call(nodes, File::Sums, "sum_parts");
        let out = self.empty(width, self.dtype())?;
        let args = args::SumParts {
            out: call.writes(&out)?,
            parts: call.reads(&parts)?,
            rows: call.size(count)?,
            width: call.size(width)?,
        };
        // SAFETY: there are so many parts of so many columns, and one column of the sum for each.
        unsafe { call.start(&[], blocks(width, SUM_COLUMNS), SUM_PARTS_THREADS, &args)? };
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_of_eights_has_a_shape() {
        for (width, shape) in [
            (0, None),
            (1, Some([1, 8, 32])),
            (64, Some([8, 1, 8])),
            (72, Some([8, 1, 16])),
            (257, Some([1, 8, 256])),
            (896, Some([8, 4, 32])),
            (1032, Some([8, 1, 256])),
            (8192, Some([8, 4, 256])),
            (8200, None),
            (2049, None),
        ] {
            assert_eq!(sum_shape(width), shape, "{width}");
        }
    }
}
