//! Attention between the projections: scores, mask, softmax, weighted values.

use super::{
    CausalMask, Tensor,
    cuda::{Arg, File, Kernels},
    masked_softmax, matmul, merge_heads, softmax,
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
/// On a GPU, in bf16 and where no gradient is wanted, one kernel runs all of it.
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
    if let (Some(kernels), Some(mask)) = (kernels(at, q, k, v), mask) {
        return fused(at, &kernels, q, k, v, mask);
    }
    let ((batch, heads, seq, d), kv_heads) = (q.data.dims4()?, k.dims()[1]);
    let q = q.reshape((batch, kv_heads, heads / kv_heads * seq, d))?;
    let scores = matmul(at, &q, &k.t()?)?; // (B, K, G·T, S)
    let weights = match mask {
        Some(mask) => masked_softmax(at, scores, mask)?,
        None => softmax(at, scores)?,
    };
    let mixed = matmul(at, &weights, v)?; // (B, K, G·T, d)
    merge_heads(&mixed.reshape((batch, heads, seq, d))?)
}

/// Whether a GPU runs all of it in one kernel in such a type, where no gradient is wanted: scores
/// are then never held.
pub fn is_one_kernel(dtype: Dtype, head_dim: usize) -> bool {
    dtype == Dtype::BF16 && matches!(head_dim, 64 | 128)
}

/// Those that take all of it at once.
fn kernels(at: At, q: &Tensor, k: &Tensor, v: &Tensor) -> Option<Kernels> {
    let taped = at.is_taped() && [q, k, v].iter().any(|t| t.needs_gradient());
    // Keys and values may be the held part of a cache: dense but for what follows each head.
    let by_head = |t: &Tensor| {
        let (dims, stride) = (t.dims(), t.data.stride());
        let dense = stride[3] == 1 && stride[2] == dims[3] && stride[0] == dims[1] * stride[1];
        dense && t.data.layout().start_offset().is_multiple_of(8)
    };
    let serves = is_one_kernel(q.dtype().ok()?, *q.dims().last()?)
        && q.dims()[0] <= 65_535
        && by_head(k)
        && by_head(v)
        && k.data.stride() == v.data.stride();
    Kernels::of(&[&q.data]).filter(|_| serves && !taped)
}

fn fused(
    at: At,
    kernels: &Kernels,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    mask: &CausalMask,
) -> Result<Tensor> {
    let (batch, heads, seq, d) = q.data.dims4()?;
    let (kv_heads, held) = (k.dims()[1], k.dims()[2]);
    let past = mask.past_of(seq, held)?;
    let (dtype, device) = (q.dtype()?, q.device());
    let [b, h, kv, t, s, width] = [batch, heads, kv_heads, seq, held, d].map(|n| n as u64);
    let (rows, grouped) = (b * h * t, h / kv * t);
    at.ran(Op::Matmul { b: b * kv, m: grouped, k: width, n: s }, dtype);
    at.ran(Op::Mask { rows, width: s }, dtype);
    at.ran(Op::Softmax { rows, width: s }, dtype);
    let values = Op::Matmul { b: b * kv, m: grouped, k: s, n: width };
    let mixed = at.run(values, dtype, device, || {
        let out = kernels.output(&q.data)?.reshape((batch, seq, heads * d))?;
        let args = [
            Arg::Of(&out),
            Arg::Of(&q.data),
            Arg::Strided(&k.data),
            Arg::Strided(&v.data),
            Arg::U32(seq as u32),
            Arg::U32(held as u32),
            Arg::U32(past as u32),
            Arg::U32(heads as u32),
            Arg::U32(kv_heads as u32),
            Arg::U64(k.data.stride()[1] as u64),
        ];
        // Query rows of a block: `64 · MT` in attention.cu.
        let rows = if d == 64 { 128 } else { 64 };
        let grid = [seq.div_ceil(rows), heads, batch].map(|n| n as u64);
        kernels.launch(File::Attention, &format!("attention_bf16_{d}"), grid, 128, &args)?;
        Ok(out)
    })?;
    Ok(mixed.into())
}
