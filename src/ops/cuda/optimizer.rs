//! What an optimizer does with many tensors at once, and sums of gradients.

use std::iter;

use candle_core::{DType, Result, Tensor};

use super::{
    Kernels,
    args::{self, AdamWFactors},
    call::{Call, File, Read, Write},
    elements::{by_several, pack},
    tiles::{ELEMENT_THREADS, SQUARED, UPDATED},
};
use crate::ops::{launch::Nodes, rounding::Draws};

/// The most tensors that one launch takes.
pub(in crate::ops) const TENSORS: usize = 64;

/// A parameter to be updated.
#[derive(Debug, Clone, Copy)]
pub(in crate::ops) struct Updated<'a> {
    /// In f32 (3, n): the parameter and both moments; or (2, n): the parameter, and words of both
    /// moments in bf16, the first in the lower half. One or the other in all of a launch.
    pub state: &'a Tensor,
    /// What decides how moments in bf16 are rounded.
    pub draws: Draws,
    /// n elements.
    pub gradient: &'a Tensor,
    /// n elements in bf16, where the parameter is written too.
    pub narrow: Option<&'a Tensor>,
}

impl args::Squared {
    /// No tensor: no block comes so late.
    const NONE: Self = Self { x: Read::NULL, n: 0, first: u32::MAX, packed: 0 };
}

impl args::Updated {
    /// As [`args::Squared::NONE`].
    const NONE: Self = Self {
        state: Write::NULL,
        gradient: Read::NULL,
        narrow: Write::NULL,
        n: 0,
        first: u32::MAX,
        packed: 0,
        draws: [0; 2],
    };
}

/// Whether `n` elements at these addresses can be taken in packs.
fn packed(n: usize, addresses: &[u64]) -> u32 {
    (by_several(n) && addresses.iter().all(|at| at.is_multiple_of(16))).into()
}

impl Call<'_> {
    /// Starts a kernel that has `blocks` blocks for all of its tensors together.
    ///
    /// # Safety
    /// As [`Self::start`].
    unsafe fn start_blocks<A: Copy>(&self, blocks: usize, args: &A) -> Result<()> {
        // SAFETY: the caller's.
        unsafe { self.start(&[], [blocks.max(1), 1, 1], ELEMENT_THREADS, args) }
    }
}

impl Kernels {
    /// Σ x² of each tensor, in their order, as f64 (tensors): [`TENSORS`] at most.
    ///
    /// # Errors
    /// More tensors; the device's.
    pub(in crate::ops) fn sum_squares(&self, nodes: &Nodes, all: &[&Tensor]) -> Result<Tensor> {
        let call = self.call(nodes, File::Optimizer, "sum_squares");
        call.check(all.len() <= TENSORS, all)?;
        let mut tensors = [args::Squared::NONE; TENSORS];
        let mut blocks = 0;
        for (to, x) in iter::zip(&mut tensors, all) {
            let (at, n) = (call.reads(x)?, x.elem_count());
            let packed = packed(n, &[at.address()]);
            *to = args::Squared { x: at, n: n as u64, first: call.size(blocks)?, packed };
            blocks += n.div_ceil(SQUARED as usize);
        }
        let sums = Tensor::zeros(all.len(), DType::F64, self.device())?;
        let done = Tensor::zeros(all.len(), DType::U32, self.device())?;
        let parts = self.empty(blocks.max(1), DType::F64)?;
        let args = args::SumSquares {
            tensors,
            parts: call.writes(&parts)?,
            done: call.writes(&done)?,
            sums: call.writes(&sums)?,
        };
        // SAFETY: each tensor has its n and so many blocks, each block a part, and each tensor a
        // sum and its count.
        unsafe { call.start_blocks(blocks, &args)? };
        Ok(sums)
    }

    /// One step of AdamW on each parameter: [`TENSORS`] at most.
    ///
    /// # Errors
    /// More of them, or tensors of other sizes; the device's.
    pub(in crate::ops) fn adamw(
        &self,
        nodes: &Nodes,
        all: &[Updated],
        by: AdamWFactors,
    ) -> Result<()> {
        let rows = all.first().and_then(|updated| updated.state.dims().first()).map_or(3, |n| *n);
        let name = if rows == 2 { "adamw_narrow" } else { "adamw" };
        let call = self.call(nodes, File::Optimizer, name);
        let gradients: Vec<_> = all.iter().map(|updated| updated.gradient).collect();
        call.check(all.len() <= TENSORS, &gradients)?;
        let mut tensors = [args::Updated::NONE; TENSORS];
        let mut blocks = 0;
        for (to, Updated { state, draws, gradient, narrow }) in iter::zip(&mut tensors, all) {
            let n = gradient.elem_count();
            let sized = (2..=3).contains(&rows) && state.dims() == [rows, n];
            let fits = sized && narrow.is_none_or(|t| t.elem_count() == n);
            call.check(fits, &[state, gradient])?;
            let (state, gradient) = (call.writes(state)?, call.reads(gradient)?);
            let narrow = call.writes_any(*narrow)?;
            let addresses = [state.address(), gradient.address(), narrow.address()];
            let (packed, first) = (packed(n, &addresses), call.size(blocks)?);
            let (n_u64, draws) = (n as u64, draws.key());
            *to = args::Updated { state, gradient, narrow, n: n_u64, first, packed, draws };
            blocks += n.div_ceil(UPDATED as usize);
        }
        let args = args::AdamW { tensors, by };
        // SAFETY: each gradient has n, its state as many times that as the kernel takes, and what is
        // narrow once.
        unsafe { call.start_blocks(blocks, &args) }
    }

    /// sum + x in f32, the sum being f32.
    ///
    /// # Errors
    /// Sizes that differ; the device's.
    pub(in crate::ops) fn add_to_sum(
        &self,
        nodes: &Nodes,
        sum: &Tensor,
        x: &Tensor,
    ) -> Result<Tensor> {
        let call = self.call(nodes, File::Optimizer, "add_to_sum");
        let n = x.elem_count();
        call.check(sum.elem_count() == n, &[sum, x])?;
        let out = self.empty(sum.shape(), DType::F32)?;
        let (to, from) = (call.writes::<f32>(&out)?, call.reads::<f32>(sum)?);
        let aligned = packed(n, &[to.address(), from.address()]) == 1;
        let args = args::AddToSum { out: to, sum: from, x: call.reads(x)?, n: n as u64 };
        // SAFETY: of each there are n.
        unsafe { call.start_packed(n, pack(aligned), &args)? };
        Ok(out)
    }
}
