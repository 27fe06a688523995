//! Attention between the projections: scores, mask, softmax, weighted values.

use candle_core::Device;

use super::{
    CausalMask, Kernel, Nodes, Ops, Tensor, cuda::Kernels, masked_softmax, matmul, merge_heads,
    softmax,
};
use crate::{
    error::Result,
    ledger::{Dtype, Op},
    meter::At,
};

/// softmax(q · kᵀ + mask) · v for q (B, H, T, d), scaled already, and k and v (B, K, S, d), laid out
/// by token, (B, T, H·d). The G = H/K query heads of one key head are rows of one product: K is
/// never repeated. Without a mask every query sees all of S.
///
/// On a GPU, in bf16 and where no gradient is wanted, one launch computes all of it.
///
/// # Errors
/// Shapes that do not fit one another.
pub fn attention(
    at: At,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    mask: Option<&CausalMask>,
) -> Result<Tensor> {
    let taped = at.is_taped() && [q, k, v].iter().any(|t| t.needs_gradient());
    if let (false, Some(mask)) = (taped, mask)
        && let Some(kernels) = Kernels::of(&[&q.data])
        && Kernels::attention_serves(&q.data, &k.data, &v.data)
    {
        return at.launch(&InOneLaunch { kernels, q, k, v, mask });
    }
    let ((batch, heads, seq, d), kv_heads) = (q.data.dims4()?, k.dims()[1]);
    let q = q.reshape((batch, kv_heads, heads / kv_heads * seq, d))?;
    let scores = matmul(at, &q, &k.t()?)?; // (B, K, G·T, S)
    let weights = match mask {
        Some(mask) => masked_softmax(at, scores, mask)?,
        None => softmax(at, scores)?,
    };
    let mixed = matmul(at, &weights, v)?.share(); // (B, K, G·T, d)
    merge_heads(&mixed.reshape((batch, heads, seq, d))?)
}

/// Whether a GPU runs all of it in one kernel in such a type, where no gradient is wanted: scores
/// are then never held.
pub fn is_one_kernel(dtype: Dtype, head_dim: usize) -> bool {
    dtype == Dtype::BF16 && matches!(head_dim, 64 | 128)
}

struct InOneLaunch<'a> {
    kernels: Kernels,
    q: &'a Tensor, // (B, H, T, d)
    k: &'a Tensor, // (B, K, S, d)
    v: &'a Tensor, // (B, K, S, d)
    mask: &'a CausalMask,
}

impl Kernel for InOneLaunch<'_> {
    type Output = Tensor;

    fn device(&self) -> &Device {
        self.q.device()
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        let (batch, heads, seq, d) = self.q.data.dims4()?;
        let (_, kv_heads, held, _) = self.k.data.dims4()?;
        let fits = seq == self.mask.seq() && held == self.mask.past() + seq;
        anyhow::ensure!(fits, "a mask of {:?} for scores ({seq}, {held})", self.mask);
        let [b, h, kv, t, s, d] = [batch, heads, kv_heads, seq, held, d].map(|n| n as u64);
        let (rows, grouped, dtype) = (b * h * t, h / kv * t, self.q.dtype()?);
        for op in [
            Op::Matmul { b: b * kv, m: grouped, k: d, n: s },
            Op::Mask { rows, width: s },
            Op::Softmax { rows, width: s },
            Op::Matmul { b: b * kv, m: grouped, k: s, n: d },
        ] {
            ops.add(op, dtype);
        }
        Ok(())
    }

    fn run(&self, nodes: &Nodes) -> candle_core::Result<Tensor> {
        let [q, k, v] = [self.q, self.k, self.v].map(|t| &t.data);
        Ok(Tensor::of(self.kernels.attention(nodes, q, k, v, self.mask.causal())?))
    }
}
