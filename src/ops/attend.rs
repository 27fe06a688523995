//! Attention with what comes before it: norms on queries and keys, rotary positions, the cache.

use std::sync::Arc;

use super::{
    CausalMask, KvCache, Norm, RopeTable, Tensor, attention::attention, block,
    blocks::blocked_attention, rotated_heads, split_heads,
};
use crate::{error::Result, meter::At, workload::AttentionMode};

/// What a layer's attention reads beside queries, keys and values.
#[derive(Clone, Copy)]
pub struct Attention<'a> {
    /// Where it is accounted for.
    pub at: At<'a>,
    /// H
    pub heads: usize,
    /// K
    pub kv_heads: usize,
    /// The factor on queries, one element.
    pub scale: &'a Tensor,
    /// On each head of the queries, before it is rotated.
    pub q_norm: Option<Norm<'a>>,
    /// On each head of the keys.
    pub k_norm: Option<Norm<'a>>,
    /// Rotary positions.
    pub rope: &'a RopeTable,
    /// W, where queries look no further back.
    pub window: Option<usize>,
    /// Which scores are computed.
    pub mode: AttentionMode,
}

/// The masks of one pass: of layers that see the whole context, and of windowed ones. A single
/// token may look at everything that it reaches, and has none.
#[derive(Debug, Default)]
pub struct Masks {
    /// Of the whole context.
    pub full: Option<CausalMask>,
    /// Of the window.
    pub windowed: Option<CausalMask>,
}

/// How the sequences of a pass lie in its rows.
#[derive(Debug)]
pub enum Sequences {
    /// All of one length, (B, T, ·), on top of as many tokens.
    Alike(Masks),
    /// One behind the other, (1, Σ T, ·), each with its own length on top of its own tokens.
    Each(Vec<Span>),
}

/// A sequence among the rows of a pass.
#[derive(Debug)]
pub struct Span {
    /// T
    pub length: usize,
    /// Its masks, which it shares with others of its length.
    pub masks: Arc<Masks>,
}

impl Masks {
    fn of(&self, window: Option<usize>) -> Option<&CausalMask> {
        match window {
            Some(_) => self.windowed.as_ref(),
            None => self.full.as_ref(),
        }
    }
}

/// The softmax-weighted values, (B, T, H·d), for q (B, T, H·d) and k and v (B, T, K·d) of the new
/// tokens, and those that layer `layer` of `cache` holds. Without a cache, the new tokens are all.
/// No sequence attends to another.
///
/// # Errors
/// Shapes that do not fit, a full cache, or the device's.
pub fn attend(
    a: Attention,
    [q, k, v]: [&Tensor; 3],
    sequences: &Sequences,
    cache: Option<(&KvCache, usize)>,
) -> Result<Tensor> {
    if let Some((cache, layer)) = cache
        && cache.on_device().is_some()
    {
        return block::attend_one(a, [q, k, v], cache, layer);
    }
    let q = normed_heads(a.q_norm, q, a.heads)?;
    let k = normed_heads(a.k_norm, k, a.kv_heads)?;
    let spans = match sequences {
        Sequences::Alike(masks) => return mixed(a, [&q, &k, v], masks, cache, None),
        Sequences::Each(spans) => spans,
    };
    let lengths: Vec<usize> = spans.iter().map(|span| span.length).collect();
    let [q, k, v] = [q.split(1, &lengths)?, k.split(1, &lengths)?, v.split(1, &lengths)?];
    let of_span = |(index, Span { masks, .. }): (usize, &Span)| {
        mixed(a, [&q[index], &k[index], &v[index]], masks, cache, Some(index))
    };
    let parts: Vec<Tensor> = spans.iter().enumerate().map(of_span).collect::<Result<_>>()?;
    Tensor::joined(&parts, 1)
}

/// The same of queries and keys that are normed: of all sequences alike, or of one of them.
fn mixed(
    a: Attention,
    [q, k, v]: [&Tensor; 3],
    masks: &Masks,
    cache: Option<(&KvCache, usize)>,
    sequence: Option<usize>,
) -> Result<Tensor> {
    let past = cache.map_or(0, |(cache, _)| cache.held_of(sequence));
    // Scaling q costs T·d for each head; scaling the scores would cost T·S.
    let q = rotated_heads(a.at, q, a.heads, a.rope, past, Some(a.scale))?; // (B, H, T, d)
    let k = rotated_heads(a.at, k, a.kv_heads, a.rope, past, None)?; // (B, K, T, d)
    let v = split_heads(v, a.kv_heads)?; // (B, K, T, d)
    let (k, v) = match cache {
        Some((cache, layer)) => cache.extend(a.at, (layer, sequence), &k, &v, a.window)?, // (B, K, S, d)
        None => (k, v),
    };
    match (a.mode, masks.of(a.window)) {
        (AttentionMode::Blocked, Some(mask)) => blocked_attention(a.at, &q, &k, &v, mask),
        // Without a mask, nothing is hidden.
        (AttentionMode::Blocked, None) => attention(a.at, &q, &k, &v, None),
        (AttentionMode::Dense, mask) => attention(a.at, &q, &k, &v, mask),
    }
}

/// x (B, T, heads · d) normed head by head, where there is a norm.
fn normed_heads(norm: Option<Norm>, x: &Tensor, heads: usize) -> Result<Tensor> {
    let Some(norm) = norm else { return Ok(x.clone()) };
    let (batch, seq, width) = x.data.dims3()?;
    let by_head = x.reshape((batch, seq, heads, width / heads))?;
    norm.of(&by_head)?.reshape((batch, seq, width))
}
