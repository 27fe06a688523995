//! Blocked attention of bf16 on a GPU: one kernel for all blocks, and one for their gradients.

use candle_core::Device;

use super::{
    super::{Kernel, Nodes, Ops, cuda::Kernels},
    Blocks, CausalMask, Tensor,
};
use crate::{error::Result, meter::At};

/// The same as [`super::blocked_attention`], (B, T, H·d), where a GPU's kernel takes the tensors.
pub(super) fn blocked_attention(
    at: At,
    inputs: [&Tensor; 3],
    mask: &CausalMask,
) -> Result<Option<Tensor>> {
    let [q, k, v] = inputs;
    let kernels = match Kernels::of(&[&q.data]) {
        Some(kernels) if Kernels::attention_serves(&q.data, &k.data, &v.data) => kernels,
        Some(_) | None => return Ok(None),
    };
    let wanted = inputs.map(|t| at.is_taped() && t.needs_gradient());
    let keep = wanted.contains(&true);
    let [q, k, v] = inputs.map(Tensor::detach);
    let (out, kept) = at.launch(&Forward { kernels: &kernels, q: &q, k: &k, v: &v, mask, keep })?;
    let Some(kept) = kept else { return Ok(Some(out)) };
    let (saved, mask) = (out.clone(), CausalMask::by_block(mask.seq(), mask.past(), mask.window()));
    let out = out.made_together(at, inputs, move |at, dy| {
        let dy = dy.contiguous()?;
        let (q, k, v, out, dy, kept, mask) = (&q, &k, &v, &saved, &dy, &kept, &mask);
        at.launch(&Backward { kernels: &kernels, q, k, v, out, dy, kept, mask, wanted })
    });
    Ok(Some(out))
}

struct Forward<'a> {
    kernels: &'a Kernels,
    q: &'a Tensor, // (B, H, T, d)
    k: &'a Tensor, // (B, K, U, d)
    v: &'a Tensor, // (B, K, U, d)
    mask: &'a CausalMask,
    /// Whether each row's maximum and sum are kept, (2, B, H, T).
    keep: bool,
}

impl Kernel for Forward<'_> {
    type Output = (Tensor, Option<Tensor>);

    fn device(&self) -> &Device {
        self.q.device()
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        let (blocks, dtype) = (Blocks::new(self.q, self.k, self.mask)?, self.q.dtype()?);
        blocks.forward().for_each(|op| ops.add(op, dtype));
        Ok(())
    }

    fn run(&self, nodes: &Nodes) -> candle_core::Result<Self::Output> {
        let [q, k, v] = [self.q, self.k, self.v].map(|t| &t.data);
        let causal = self.mask.causal();
        let (out, kept) = self.kernels.attention_blocked(nodes, q, k, v, causal, self.keep)?;
        Ok((Tensor::of(out), kept.map(Tensor::of)))
    }
}

struct Backward<'a> {
    kernels: &'a Kernels,
    q: &'a Tensor,    // (B, H, T, d)
    k: &'a Tensor,    // (B, K, U, d)
    v: &'a Tensor,    // (B, K, U, d)
    out: &'a Tensor,  // (B, T, H·d)
    dy: &'a Tensor,   // (B, T, H·d)
    kept: &'a Tensor, // (2, B, H, T)
    mask: &'a CausalMask,
    /// Of which inputs.
    wanted: [bool; 3],
}

impl Kernel for Backward<'_> {
    type Output = [Option<Tensor>; 3];

    fn device(&self) -> &Device {
        self.q.device()
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        let (blocks, dtype) = (Blocks::new(self.q, self.k, self.mask)?, self.q.dtype()?);
        blocks.backward(self.wanted).into_iter().for_each(|op| ops.add(op, dtype));
        Ok(())
    }

    fn run(&self, nodes: &Nodes) -> candle_core::Result<Self::Output> {
        let inputs = [self.q, self.k, self.v].map(|t| &t.data);
        let outputs = [self.out, self.dy, self.kept].map(|t| &t.data);
        let causal = self.mask.causal();
        let gradients =
            self.kernels.attention_gradients(nodes, inputs, outputs, causal, self.wanted)?;
        Ok(gradients.map(|gradient| gradient.map(Tensor::of)))
    }
}
