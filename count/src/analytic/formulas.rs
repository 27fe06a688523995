//! Formulas that people quote. Each states multiply-accumulates of a forward pass, as a function
//! of the tokens fed and of their contexts; training is three times that, as all of them define
//! it (one product forward, two backward), over every micro-step.
//!
//! Those defined for training alone are taken at a third for a forward pass. A generation is
//! counted by the passes that it runs: with a cache, each token is fed once; without, each step
//! feeds its whole context. None of them counts the choice of tokens, the loss or the optimizer.

use super::{
    Structure,
    moments::Moments,
    pieces::{macs, times},
};
use crate::{
    config::{Family, ModelConfig, Projection},
    error::Result,
    ledger::Phase,
    prices::Cost,
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
    let n = workload.model.nominal_parameters();
    passes(workload, |m| vec![(Component::Parameters, n * m.rows)])
}

/// C ≈ 2N a token forward and 6N in training, N without embedding and head.
///
/// Source: Kaplan et al. 2020 (arXiv 2001.08361), section 2.1: N excludes vocabulary and
/// positional embeddings. Leaves out the head besides what [`six_nd`] leaves out.
pub(super) fn six_nd_no_embedding(workload: &Workload) -> Result<Tally> {
    let n = without_tables(&workload.model);
    passes(workload, |m| vec![(Component::Parameters, n * m.rows)])
}

/// 6N + 12·L·H·Q·T a token in training: L layers, H heads of width Q, T tokens of context.
///
/// Source: Chowdhery et al. 2022, *PaLM* (arXiv 2204.02311), appendix B; `estimate_mfu` in
/// karpathy/nanoGPT's model.py (N with the tied embedding). T is each pass's own context. Leaves
/// out what [`six_nd`] does, except attention's scores, which it counts whole: no causal saving, no
/// windows.
pub(super) fn palm(workload: &Workload) -> Result<Tally> {
    let (n, model) = (workload.model.nominal_parameters(), &workload.model);
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
    let n = model.nominal_parameters() - model.table();
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

/// 6N + 12·L·H·Q·T a token in training, as [`palm`], where N has no embedding but a tied one.
///
/// Source: `get_dense_model_nparams_and_flops` and `get_moe_model_nparams_and_flops` in
/// pytorch/torchtitan's torchtitan/models/utils.py, commit b5bcd76 (August 2026): a tied table is
/// the head's and stays in N. Leaves out adapters, frozen weights, windows and everything that is
/// no matmul; counts biases and gains as if they were matrices, and logits of every position.
pub(super) fn torchtitan(workload: &Workload) -> Result<Tally> {
    let model = &workload.model;
    let n = with_one_table(model);
    passes(workload, |m| {
        vec![
            (Component::Parameters, n * m.rows),
            (Component::Attention, attention(model, m.whole.all)),
        ]
    })
}

/// [`megatron_causal`] for training; of Gemma 3, five layers of six score T·W − W²/2, W the window
/// or T.
///
/// Source: `calculate_tflops_training_per_device` and
/// `calculate_mixed_attention_model_tflops_training_per_device` in AI-Hypercomputer/maxtext's
/// src/maxtext/utils/maxtext_utils.py, commit e591f30 (August 2026). Other families' windows are
/// not looked at, nor are Gemma 3's own kinds of layers: every sixth is global.
pub(super) fn maxtext(workload: &Workload) -> Result<Tally> {
    let model = &workload.model;
    let [global, local] = maxtext_layers(model);
    passes(workload, |m| {
        let [in_windows, _] = maxtext_scores(model, m);
        let attention = (global * m.squares + local * in_windows) * model.q_width() as u128;
        matmuls(model, m, attention)
    })
}

/// Layers that [`maxtext`] takes for global and for windowed.
pub(super) fn maxtext_layers(model: &ModelConfig) -> [u128; 2] {
    let layers = model.num_hidden_layers as u128;
    match model.family {
        Family::Gemma3 => [layers / 6, layers - layers / 6],
        Family::Qwen2 | Family::Llama | Family::Mistral | Family::Qwen3 => [layers, 0],
    }
}

/// Of one layer and head, 2·(T·W − W²/2) and 2·T² of each sequence: both products of the scores of
/// a window, and of all.
pub(super) fn maxtext_scores(model: &ModelConfig, m: &Moments) -> [u128; 2] {
    let seq = m.rows / m.sequences.max(1);
    let width = model.window.as_ref().map_or(seq, |window| seq.min(window.width as u128));
    [2 * m.rows * width - m.sequences * width * width, 2 * m.squares]
}

/// [`megatron`] where the base is frozen: its matmuls once forward and once backward, attention
/// twice backward.
///
/// Source: the branch of LoRA in `num_floating_point_operations`,
/// src/megatron/bridge/training/utils/flop_utils.py of NVIDIA-NeMo/Megatron-Bridge, commit 067f987
/// (August 2026): 2/3 of the frozen matmuls, the head among them, and 12·L·D·T² of attention a
/// sequence. It is written for Llama 3 70B, where H·d = D; here q and o are as wide as they are.
/// Leaves out the adapters themselves, windows and everything that is no matmul.
pub(super) fn nemo_lora(workload: &Workload) -> Result<Tally> {
    let model = &workload.model;
    let backward = |component| if component == Component::Attention { 2 } else { 1 };
    passes_and_gradients(workload, backward, |m| {
        let parts = matmuls(model, m, attention(model, m.whole.all)).into_iter();
        parts.map(|(component, part)| (component, macs(part))).collect()
    })
}

/// Every matmul of the base as served: attention over the context of each request, windowed layers
/// over min(context, W), logits of the last position of each prompt, or part of one, and of each token
/// after.
///
/// Source: `AttentionMetrics`, `FfnMetrics` and `UnembedMetrics` in vllm-project/vllm's
/// vllm/v1/metrics/perf.py of vLLM 0.33.0, on one GPU: the sum behind the counter
/// `vllm:estimated_flops_per_gpu_total`. A prompt is scheduled in the parts that it is fed in.
/// Leaves out adapters and everything that is no matmul.
pub(super) fn vllm(workload: &Workload) -> Result<Tally> {
    let model = &workload.model;
    passes(workload, |m| {
        let windowed = model.windowed_layers() as u128;
        let whole = model.num_hidden_layers as u128 - windowed;
        let scores = whole * m.whole.all + windowed * m.within_window;
        let mut parts = matmuls(model, m, 2 * scores * model.q_width() as u128);
        let head = m.sequences * model.hidden_size as u128 * model.vocab_size as u128;
        for (component, part) in &mut parts {
            if *component == Component::LmHead {
                *part = head;
            }
        }
        parts
    })
}

/// All parameters but those of embedding and head.
fn without_tables(model: &ModelConfig) -> u128 {
    with_one_table(model) - model.table()
}

/// All parameters, of embedding and head those of one.
fn with_one_table(model: &ModelConfig) -> u128 {
    let two = !model.nominally_tied();
    model.nominal_parameters() - if two { model.table() } else { 0 }
}

/// N of a formula that goes by parameters, adapters aside, and which they are; none of structures
/// that take none.
pub fn parameters_taken(structure: Structure, model: &ModelConfig) -> Option<(u128, &'static str)> {
    let tied = model.nominally_tied();
    match structure {
        Structure::SixNd | Structure::Palm if tied => {
            Some((model.nominal_parameters(), "all, embedding and head being one table"))
        }
        Structure::SixNd | Structure::Palm => {
            Some((model.nominal_parameters(), "all, embedding and head each"))
        }
        Structure::SixNdNoEmbedding => Some((without_tables(model), "without embedding and head")),
        Structure::HfTrainer if tied => {
            Some((without_tables(model), "without the embedding, which the head is too"))
        }
        Structure::HfTrainer => Some((with_one_table(model), "without the embedding")),
        Structure::Torchtitan if tied => {
            Some((with_one_table(model), "all, embedding and head being one table"))
        }
        Structure::Torchtitan => Some((with_one_table(model), "without the embedding")),
        Structure::Exact
        | Structure::Unpadded
        | Structure::ExactDense
        | Structure::Notebook
        | Structure::Megatron
        | Structure::MegatronCausal
        | Structure::Torch
        | Structure::TorchSdpa
        | Structure::TorchSdpaCpu
        | Structure::DeepSpeed
        | Structure::DeepSpeedSdpa
        | Structure::CalflopsSdpa
        | Structure::Ptflops
        | Structure::MaxText
        | Structure::NemoLora
        | Structure::Vllm => None,
    }
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
    let costs = |m: &Moments| forward(m).into_iter().map(|(component, n)| (component, macs(n)));
    passes_and_gradients(workload, |_| 2, |m| costs(m).collect())
}

/// `forward` over every pass as it runs; in training once forward, and backward so many times.
pub(super) fn passes_and_gradients(
    workload: &Workload,
    backward: impl Fn(Component) -> u128,
    forward: impl Fn(&Moments) -> Vec<(Component, Cost)>,
) -> Result<Tally> {
    let (task, mut tally) = (&workload.task, Tally::default());
    for (phase, moments) in Moments::of(task, &workload.model) {
        if moments.passes == 0 {
            continue;
        }
        moments.check(&workload.model)?;
        for (component, part) in forward(&moments) {
            let cost = part;
            tally.add(phase, component, Sum { calls: 0, cost })?;
            if let Task::Train { .. } = task {
                let cost = times(backward(component), cost)?;
                tally.add(Phase::Backward, component, Sum { calls: 0, cost })?;
            }
        }
    }
    Ok(tally)
}
