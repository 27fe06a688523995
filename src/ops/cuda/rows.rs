//! What is done row by row.

use std::iter;

use candle_core::{DType, Result, Tensor};

use super::{
    Kernels,
    args::{self, Normed},
    call::{Call, Element, File, Read, blocks},
    elements::{by_several, pack},
    tiles::{CROSS_ENTROPY_THREADS, ROW_SHAPES, WARP_ROWS_THREADS},
};
use crate::ops::launch::Nodes;

/// What a query sees: `seq` of them, one after another behind `past` earlier tokens, see no token
/// after their own and, where there is a window, only so many of the latest. Of all tokens the keys
/// are the last ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::ops) struct Causal {
    /// Queries.
    pub seq: usize,
    /// Tokens before the first query.
    pub past: usize,
    /// The most tokens that a query sees, its own among them.
    pub window: Option<usize>,
}

impl Causal {
    /// Where the first query's own key is among `keys`; none where a query's would be missing.
    pub(super) fn own(self, keys: usize) -> Option<usize> {
        let all = self.past + self.seq;
        let seen = self.window.map_or(all, |window| (window + self.seq - 1).min(all));
        let fits = self.seq > 0 && self.window != Some(0) && (seen..=all).contains(&keys);
        fits.then(|| keys - self.seq)
    }

    /// The window as kernels take it.
    pub(super) fn window(self) -> u32 {
        window(self.window)
    }
}

/// A window as kernels take it: one that is wider than they count hides nothing.
pub(super) fn window(tokens: Option<usize>) -> u32 {
    tokens.and_then(|n| u32::try_from(n).ok()).unwrap_or(u32::MAX)
}

/// RMSNorm by a gain of the row's width.
#[derive(Debug, Clone, Copy)]
pub(in crate::ops) struct Norm<'a> {
    /// One factor a column.
    pub gain: &'a Tensor,
    /// Added to the mean square.
    pub eps: f64,
    /// The factors are 1 + gain.
    pub shift: bool,
}

impl Normed {
    /// No norm.
    const NONE: Self = Self { gain: Read::NULL, eps: 0.0, shift: 0.0 };
}

impl Call<'_> {
    /// A norm of rows of `width`, or none.
    pub(super) fn norm(&self, norm: Option<Norm>, width: usize) -> Result<Normed> {
        let Some(Norm { gain, eps, shift }) = norm else { return Ok(Normed::NONE) };
        self.check(gain.elem_count() == width, &[gain])?;
        let shift = if shift { 1.0 } else { 0.0 };
        Ok(Normed { gain: self.reads(gain)?, eps: eps as f32, shift })
    }

    /// `x` as rows along its last dimension.
    fn rows(&self, x: &Tensor) -> Result<Rows> {
        let width = x.dims().last().copied().unwrap_or(1);
        let shape = row_shape(width).filter(|_| width > 0);
        let Some(shape) = shape else {
            self.check(false, &[x])?;
            candle_core::bail!("no rows");
        };
        Ok(Rows { rows: x.elem_count() / width, width: self.size(width)?, shape })
    }
}

/// Rows, and how a kernel takes them.
#[derive(Clone, Copy)]
struct Rows {
    rows: usize,
    width: u32,
    /// (elements of a pack, packs a thread, threads a row)
    shape: [u32; 3],
}

impl Rows {
    /// Starts a kernel on them.
    ///
    /// # Safety
    /// As [`Call::start`].
    unsafe fn start<A: Copy>(self, call: &Call, args: &A) -> Result<()> {
        let [.., threads] = self.shape;
        let block = threads.max(WARP_ROWS_THREADS);
        // SAFETY: the caller's.
        unsafe { call.start(&self.shape, blocks(self.rows, block / threads), block, args) }
    }
}

/// The first shape that holds rows of `width`.
fn row_shape(width: usize) -> Option<[u32; 3]> {
    let own = pack(by_several(width));
    let fits = |&[pack, packs, threads]: &[u32; 3]| {
        pack as usize == own && width <= (pack * packs * threads) as usize
    };
    ROW_SHAPES.into_iter().find(fits)
}

impl Kernels {
    /// Whether row-wise kernels take rows of `width` elements.
    pub(in crate::ops) fn takes_rows_of(width: usize) -> bool {
        row_shape(width).is_some()
    }

    /// Softmax of each row, in its place; where `causal` is given, of what the row's query sees:
    /// row r is query r % seq.
    ///
    /// # Errors
    /// Rows that are too wide, or not as many keys as the queries see; the device's.
    pub(in crate::ops) fn softmax(
        &self,
        nodes: &Nodes,
        x: &Tensor,
        causal: Option<Causal>,
    ) -> Result<()> {
        let call = self.call(nodes, File::Rows, "softmax");
        let all = call.rows(x)?;
        let own = causal.map(|causal| causal.own(all.width as usize));
        let by_query = causal.is_none_or(|causal| all.rows.is_multiple_of(causal.seq));
        call.check(own != Some(None) && by_query, &[x])?;
        let args = args::Softmax {
            x: call.writes(x)?,
            rows: all.rows as u64,
            width: all.width,
            seq: call.size(causal.map_or(0, |causal| causal.seq))?,
            own: call.size(own.flatten().unwrap_or(0))?,
            window: causal.map_or(u32::MAX, Causal::window),
        };
        // SAFETY: x has these rows.
        unsafe { all.start(&call, &args) }
    }

    /// y · (dy − Σ y·dy), row by row.
    ///
    /// # Errors
    /// Shapes that differ, or rows that are too wide; the device's.
    pub(in crate::ops) fn softmax_grad(
        &self,
        nodes: &Nodes,
        y: &Tensor,
        dy: &Tensor,
    ) -> Result<Tensor> {
        let call = self.call(nodes, File::Rows, "softmax_grad");
        call.check(y.elem_count() == dy.elem_count(), &[y, dy])?;
        let (all, dx) = (call.rows(y)?, self.output(y)?);
        let args = args::SoftmaxGrad {
            dx: call.writes(&dx)?,
            y: call.reads(y)?,
            dy: call.reads(dy)?,
            rows: all.rows as u64,
            width: all.width,
        };
        // SAFETY: each has these rows.
        unsafe { all.start(&call, &args)? };
        Ok(dx)
    }

    /// x / sqrt(mean(x²) + eps) · gain, row by row.
    ///
    /// # Errors
    /// A gain of another width, or rows that are too wide; the device's.
    pub(in crate::ops) fn rms_norm(
        &self,
        nodes: &Nodes,
        x: &Tensor,
        gain: &Tensor,
        eps: f64,
    ) -> Result<Tensor> {
        let y = self.output(x)?;
        self.rms_norm_into(nodes, &y, x, Norm { gain, eps, shift: false })?;
        Ok(y)
    }

    /// out = `norm` of x, row by row.
    ///
    /// # Errors
    /// A gain of another width, or rows that are too wide; the device's.
    pub(in crate::ops) fn rms_norm_into(
        &self,
        nodes: &Nodes,
        out: &Tensor,
        x: &Tensor,
        norm: Norm,
    ) -> Result<()> {
        let call = self.call(nodes, File::Rows, "rms_norm");
        call.check(out.elem_count() == x.elem_count(), &[out, x])?;
        let all = call.rows(x)?;
        let args = args::RmsNorm {
            y: call.writes(out)?,
            x: call.reads(x)?,
            norm: call.norm(Some(norm), all.width as usize)?,
            rows: all.rows as u64,
            width: all.width,
        };
        // SAFETY: x and out have these rows, the gain has their width.
        unsafe { all.start(&call, &args) }
    }

    /// The gradient towards x of [`Self::rms_norm`], `dy` being that of its result.
    ///
    /// # Errors
    /// Shapes that differ, a gain of another width, or rows that are too wide; the device's.
    pub(in crate::ops) fn rms_norm_grad(
        &self,
        nodes: &Nodes,
        x: &Tensor,
        gain: &Tensor,
        eps: f64,
        dy: &Tensor,
    ) -> Result<Tensor> {
        let call = self.call(nodes, File::Rows, "rms_norm_grad");
        call.check(x.elem_count() == dy.elem_count(), &[x, dy])?;
        let (all, dx) = (call.rows(x)?, self.output(x)?);
        call.check(gain.elem_count() == all.width as usize, &[x, gain])?;
        let args = args::RmsNormGrad {
            dx: call.writes(&dx)?,
            x: call.reads(x)?,
            gain: call.reads(gain)?,
            dy: call.reads(dy)?,
            rows: all.rows as u64,
            width: all.width,
            eps: eps as f32,
        };
        // SAFETY: each has these rows, the gain has their width.
        unsafe { all.start(&call, &args)? };
        Ok(dx)
    }

    /// The loss of each row of logits (rows, V) at its target, (rows) in f32. With weights, the
    /// logits become gradients; without, they stay. Targets (rows) are below V.
    ///
    /// # Errors
    /// Not one target and weight a row; the device's.
    pub(in crate::ops) fn cross_entropy(
        &self,
        nodes: &Nodes,
        logits: &Tensor,
        targets: &Tensor,
        weights: Option<&Tensor>,
    ) -> Result<Tensor> {
        let call = self.call(nodes, File::Rows, "cross_entropy");
        let [rows, width] = call.dims(logits)?;
        let by_row = [Some(targets), weights].into_iter().flatten();
        let fits = rows > 0 && by_row.clone().all(|t| t.elem_count() == rows);
        call.check(fits, &iter::once(logits).chain(by_row).collect::<Vec<_>>())?;
        let losses = self.empty(rows, DType::F32)?;
        let args = args::CrossEntropy {
            x: call.writes::<Element>(logits)?,
            targets: call.reads(targets)?,
            weights: call.reads_any(weights)?,
            losses: call.writes(&losses)?,
            width: call.size(width)?,
        };
        let variant = [pack(by_several(width)) as u32];
        // SAFETY: there are so many rows of so many logits, and of the rest one a row.
        unsafe { call.start(&variant, [rows, 1, 1], CROSS_ENTROPY_THREADS, &args)? };
        Ok(losses)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_of_eights_has_a_kernel() {
        for (width, shape) in [
            (8, Some([8, 1, 32])),
            (7, Some([1, 8, 32])),
            (513, Some([1, 8, 256])),
            (896, Some([8, 4, 32])),
            (2048, Some([8, 1, 256])),
            (32_768, Some([8, 4, 1024])),
            (32_776, None),
            (2_049, None),
        ] {
            assert_eq!(row_shape(width), shape, "{width}");
        }
    }

    #[test]
    fn keys_are_the_last_tokens() {
        let causal = |seq, past, window| Causal { seq, past, window };
        assert_eq!(causal(3, 4, None).own(7), Some(4));
        assert_eq!(causal(3, 4, None).own(6), None);
        assert_eq!(causal(3, 4, None).own(8), None);
        // The first query sees itself and one before it.
        assert_eq!(causal(3, 4, Some(2)).own(7), Some(4));
        assert_eq!(causal(3, 4, Some(2)).own(4), Some(1));
        assert_eq!(causal(3, 4, Some(2)).own(3), None);
        assert_eq!(causal(3, 0, Some(2)).own(3), Some(0));
        assert_eq!(causal(1, 0, Some(0)).own(1), None);
    }
}
