//! Formulas that people quote. Each states multiply-accumulates of a forward pass, as a function
//! of the tokens fed and of their contexts; training is three times that, as all of them define
//! it (one product forward, two backward), over every micro-step.
//!
//! Those defined for training alone are taken at a third for a forward pass. A generation is
//! counted by the passes that it runs: with a cache, each token is fed once; without, each step
//! feeds its whole context. None of them counts the choice of tokens, the loss or the optimizer.

use super::{
    moments::Moments,
    pieces::{macs, micro_steps, times},
};
use crate::{
    config::{ModelConfig, Projection},
    error::Result,
    ledger::Phase,
    tally::{Component, Sum, Tally},
    workload::{Task, Workload},
};

/// Multiply-accumulates of all passes in `moments`, by component.
type Forward = Vec<(Component, u128)>;

/// C ≈ 2N a token forward and 6N in training, N with embeddings.
///
/// Source: Kaplan et al. 2020, *Scaling Laws for Neural Language Models* (arXiv 2001.08361),
/// section 2.1; with all parameters in N, as Hoffmann et al. 2022 (arXiv 2203.15556) and most users
/// take it. Leaves out attention's scores, adapters, frozen weights and everything that is no
/// matmul; counts biases and gains as if they were matrices, the embedding as if it were
/// multiplied, and logits of every position.
pub(super) fn six_nd(workload: &Workload) -> Result<Tally> {
    let n = workload.model.parameters();
    passes(workload, |m| vec![(Component::Parameters, n * m.rows)])
}

/// C ≈ 2N a token forward and 6N in training, N without embedding and head.
///
/// Source: Kaplan et al. 2020 (arXiv 2001.08361), section 2.1: N excludes vocabulary and
/// positional embeddings. Leaves out the head besides what [`six_nd`] leaves out.
pub(super) fn six_nd_no_embedding(workload: &Workload) -> Result<Tally> {
    let n = workload.model.parameters() - tables(&workload.model);
    passes(workload, |m| vec![(Component::Parameters, n * m.rows)])
}

/// 6N + 12·L·H·Q·T a token in training: L layers, H heads of width Q, T tokens of context.
///
/// Source: Chowdhery et al. 2022, *PaLM* (arXiv 2204.02311), appendix B; `estimate_mfu` in
/// karpathy/nanoGPT's model.py (N with the tied embedding). T is each pass's own context. Leaves
/// out what [`six_nd`] does, except attention's scores, which it counts whole: no causal saving, no
/// windows.
pub(super) fn palm(workload: &Workload) -> Result<Tally> {
    let (n, model) = (workload.model.parameters(), &workload.model);
    passes(workload, |m| {
        vec![
            (Component::Parameters, n * m.rows),
            (Component::Attention, attention(model, m.whole.all)),
        ]
    })
}

/// Every matmul of the model three times in training; attention over all scores.
///
/// Source: Narayanan et al. 2021 (arXiv 2104.04473), appendix, as `num_floating_point_operations`
/// in NVIDIA/Megatron-LM's megatron/training/training.py adapts it to grouped-query attention and
/// SwiGLU, in the earlier versions that take attention whole, windows or not. The vocabulary is not padded. Leaves
/// out adapters, frozen weights and everything that is no matmul; counts logits of every position.
pub(super) fn megatron(workload: &Workload) -> Result<Tally> {
    let model = &workload.model;
    passes(workload, |m| matmuls(model, m, attention(model, m.whole.all)))
}

/// [`megatron`] with "only half of the attention matrix", as later versions of that function count:
/// of the T × T scores of tokens fed together, half; cached keys are all visible. The exact causal
/// part is T(T + 1)/2: the formula's half is T/2 scores short.
pub(super) fn megatron_causal(workload: &Workload) -> Result<Tally> {
    let model = &workload.model;
    // Two products of H·d a score, so that half of the squares is H·d for each of them.
    let hidden =
        |m: &Moments| m.squares * model.q_width() as u128 * model.num_hidden_layers as u128;
    passes(workload, |m| matmuls(model, m, attention(model, m.whole.all) - hidden(m)))
}

/// 6 · tokens · parameters without embeddings.
///
/// Source: `PreTrainedModel.floating_point_ops` (huggingface/transformers, modeling_utils.py),
/// which Trainer sums into `total_flos`. Embeddings are what is an `nn.Embedding`: a tied head
/// goes with it, an untied one stays in N. PEFT's adapters are in N, frozen or not. Leaves out
/// attention's scores, frozen weights and everything that is no matmul.
pub(super) fn hf_trainer(workload: &Workload) -> Result<Tally> {
    let Workload { model, lora, .. } = workload;
    let n = model.parameters() - model.vocab_size as u128 * model.hidden_size as u128;
    passes(workload, |m| {
        let mut parts = vec![(Component::Parameters, n * m.rows)];
        parts.extend(Projection::ALL.into_iter().map(|projection| {
            let (k, n) = projection.widths(model);
            let ranks = lora.adapted(projection, 0..model.num_hidden_layers).ranks;
            (Component::Lora(projection), ranks * (k + n) as u128 * m.rows)
        }));
        parts.retain(|(_, macs)| *macs > 0);
        parts
    })
}

/// Parameters of the embedding and, if untied, of the head.
fn tables(model: &ModelConfig) -> u128 {
    let one = model.vocab_size as u128 * model.hidden_size as u128;
    if model.tie_word_embeddings { one } else { 2 * one }
}

/// Scores and weighted values of all layers: H·d each, twice, a score.
fn attention(model: &ModelConfig, scores: u128) -> u128 {
    2 * scores * model.q_width() as u128 * model.num_hidden_layers as u128
}

/// Projections, MLP and head, beside `attention`.
fn matmuls(model: &ModelConfig, m: &Moments, attention: u128) -> Forward {
    let (d, v) = (model.hidden_size as u128, model.vocab_size as u128);
    let layers = model.num_hidden_layers as u128;
    let mut parts = vec![(Component::Attention, attention), (Component::LmHead, m.rows * d * v)];
    parts.extend(Projection::ALL.map(|projection| {
        let (k, n) = projection.widths(model);
        (Component::Proj(projection), layers * m.rows * k as u128 * n as u128)
    }));
    parts
}

/// `forward` over every pass as it runs; in training once forward and twice backward.
fn passes(workload: &Workload, forward: impl Fn(&Moments) -> Forward) -> Result<Tally> {
    let (task, mut tally) = (&workload.task, Tally::default());
    let runs = micro_steps(task);
    for (phase, moments) in Moments::of(task, &workload.model) {
        if moments.passes == 0 {
            continue;
        }
        moments.check(&workload.model)?;
        for (component, part) in forward(&moments) {
            let cost = times(runs, macs(part))?;
            tally.add(phase, component, Sum { calls: 0, cost })?;
            if let Task::Train { .. } = task {
                let cost = times(2, cost)?;
                tally.add(Phase::Backward, component, Sum { calls: 0, cost })?;
            }
        }
    }
    Ok(tally)
}
