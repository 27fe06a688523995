//! Small ledgers that a hand can write: what families have beyond the first of them.

use std::collections::BTreeMap;

use flopaudit_count::{
    analytic::{closed_form, predict},
    config::{LoraConfig, ModelConfig, Projection, Rope, RopeScaling},
    ledger::{Dtype, Module, Op, Phase},
    prices::Prices,
    tally::Component,
    workload::{AttentionMode, Logits, Rows, Sampling, Task, Workload},
};

fn workload(preset: &str, targets: &[Projection], task: Task) -> Workload {
    let model = ModelConfig::preset(preset).unwrap();
    let lora = LoraConfig::new(&model, targets.len().min(2), 4.0, targets).unwrap();
    Workload { model, lora, dtype: Dtype::F32, attention: Default::default(), task }
}

fn generate(prompt_tokens: u64, new_tokens: u64, kv_cache: bool) -> Task {
    let (batch, max_new_tokens, sampling) = (1, new_tokens, Sampling::GREEDY);
    Task::Generate {
        batch,
        prompt_tokens,
        new_tokens,
        max_new_tokens,
        kv_cache,
        sampling,
        past: 0,
        prompts: None,
        then: vec![],
        prefill_chunk: None,
    }
}

fn train(full: bool) -> Task {
    let (batch, seq, accumulate, steps, clip) = (2, 3, 1, 1, false);
    Task::Train {
        batch,
        seq,
        accumulate,
        steps,
        full,
        recompute: false,
        clip,
        moments: Default::default(),
        rows: Rows::Whole,
    }
}

/// Calls of each op of a phase and module, over the layers that `of` picks.
fn calls(
    workload: &Workload,
    phase: Phase,
    module: Module,
    of: impl Fn(Option<u32>) -> bool,
) -> BTreeMap<String, u64> {
    let ledger = predict(workload).unwrap();
    let here = ledger
        .iter()
        .filter(|(key, _)| key.phase == phase && key.scope.module == module && of(key.scope.layer));
    let mut found = BTreeMap::new();
    for (key, entry) in here {
        *found.entry(key.op.to_string()).or_default() += entry.calls;
    }
    found
}

fn listed(ops: &[(Op, u64)]) -> BTreeMap<String, u64> {
    ops.iter().map(|(op, calls)| (op.to_string(), *calls)).collect()
}

#[test]
fn decoding_crosses_the_windows_edge() {
    // 3 layers, 6 heads on 3 of width 8, a window of 8. 6 tokens, then one at a time on top of
    // 6, 7, 8 and 9: 7 keys, and 8 from then on.
    let workload = workload("tiny-mistral", &[], generate(6, 5, true));
    let at = |phase| calls(&workload, phase, Module::SelfAttn, |_| true);
    let (b, m) = (3, 2);
    assert_eq!(
        at(Phase::Decode),
        listed(&[
            (Op::Rope { n: 48 }, 12),
            (Op::Rope { n: 24 }, 12),
            (Op::Scale { n: 48 }, 12),
            (Op::CacheWrite { rows: 1, width: 24 }, 24),
            (Op::Matmul { b, m, k: 8, n: 7 }, 3),
            (Op::Softmax { rows: 6, width: 7 }, 3),
            (Op::Matmul { b, m, k: 7, n: 8 }, 3),
            // On top of 7 and more; scores and values of 8 keys have the same dimensions.
            (Op::Matmul { b, m, k: 8, n: 8 }, 2 * 9),
            (Op::Softmax { rows: 6, width: 8 }, 9),
        ])
    );
    let prefill = at(Phase::Prefill);
    assert_eq!(prefill[&Op::CacheWrite { rows: 6, width: 24 }.to_string()], 6);
    assert_eq!(prefill[&Op::Mask { rows: 36, width: 6 }.to_string()], 3);
    // Two products of 8 a head and score: 36 scores, then 7 + 8 + 8 + 8.
    let tally = closed_form(&workload).unwrap();
    let macs = |phase| tally.get(phase, Component::Attention).cost.macs;
    assert_eq!(macs(Phase::Prefill), 3 * 6 * 2 * 8 * 36);
    assert_eq!(macs(Phase::Decode), 3 * 6 * 2 * 8 * (7 + 8 + 8 + 8));
}

#[test]
fn what_is_fed_together_is_scored_together() {
    // 12 tokens on top of 20 in a window of 8: the first sees 7 of them.
    let task = Task::Forward { batch: 2, seq: 12, past: 20, logits: Logits::All, sequences: None };
    let at =
        calls(&workload("tiny-mistral", &[], task), Phase::Forward, Module::SelfAttn, |_| true);
    assert_eq!(at[&Op::Softmax { rows: 2 * 6 * 12, width: 19 }.to_string()], 3);
    assert_eq!(at[&Op::Mask { rows: 2 * 6 * 12, width: 19 }.to_string()], 3);
    assert_eq!(at[&Op::CacheWrite { rows: 24, width: 24 }.to_string()], 6);
    // Without a cache, all of them each time, and nothing is written.
    let uncached = workload("tiny-mistral", &[], generate(20, 2, false));
    let at = calls(&uncached, Phase::Decode, Module::SelfAttn, |_| true);
    assert_eq!(at[&Op::Softmax { rows: 6 * 21, width: 21 }.to_string()], 3);
    assert!(at.keys().all(|op| !op.starts_with("cache_write")));
}

#[test]
fn layers_of_both_kinds() {
    // 7 layers, the sixth of which sees everything; 4 heads on 1.
    let task = Task::Forward { batch: 1, seq: 1, past: 30, logits: Logits::All, sequences: None };
    let gemma = workload("tiny-gemma3", &[], task);
    let at = |of: fn(Option<u32>) -> bool| calls(&gemma, Phase::Forward, Module::SelfAttn, of);
    let softmax = |width| Op::Softmax { rows: 4, width }.to_string();
    assert_eq!(at(|layer| layer == Some(5))[&softmax(31)], 1);
    assert_eq!(at(|layer| layer != Some(5))[&softmax(8)], 6);
    let macs = closed_form(&gemma).unwrap().get(Phase::Forward, Component::Attention).cost.macs;
    assert_eq!(macs, 4 * 2 * 8 * (31 + 6 * 8));
    // Two tables of 31 positions and 4 frequencies, one of them stretched.
    assert_eq!(
        calls(&gemma, Phase::Setup, Module::RotaryEmb, |_| true),
        listed(&[(Op::RopeTable { positions: 31, half: 4 }, 2), (Op::RopeLinear { half: 4 }, 1)])
    );
}

#[test]
fn gemmas_norms_activation_and_embedding() {
    // D 24, F 56, 4 heads on 1 of width 8, 7 layers; 2 sequences of 3 tokens.
    let task = Task::Evaluate { batch: 2, seq: 3, passes: 1, rows: Rows::Whole };
    let gemma = workload("tiny-gemma3", &[], task);
    let at = |module| calls(&gemma, Phase::Forward, module, |_| true);
    let norm = |rows, width, calls| {
        listed(&[(Op::Shift { n: width }, calls), (Op::RmsNorm { rows, width }, calls)])
    };
    assert_eq!(at(Module::QNorm), norm(6 * 4, 8, 7));
    assert_eq!(at(Module::KNorm), norm(6, 8, 7));
    for module in [
        Module::InputLayernorm,
        Module::PostAttentionLayernorm,
        Module::PreFeedforwardLayernorm,
        Module::PostFeedforwardLayernorm,
    ] {
        assert_eq!(at(module), norm(6, 24, 7));
    }
    assert_eq!(at(Module::Norm), norm(6, 24, 1));
    let n = 6 * 56;
    assert_eq!(at(Module::Mlp), listed(&[(Op::Gelu { n }, 7), (Op::Mul { n }, 7)]));
    let embed = Op::Embed { rows: 6, width: 24 };
    assert_eq!(at(Module::EmbedTokens), listed(&[(embed, 1), (Op::Scale { n: 6 * 24 }, 1)]));
    // A GELU is 3 muls, 2 adds, exp and div; the gate one mul more.
    let glu = closed_form(&gemma).unwrap().get(Phase::Forward, Component::Glu).cost;
    assert_eq!(Prices::unit().flops(&glu).unwrap(), 7 * 336 * 8);
    assert_eq!(Prices::coursework().flops(&glu).unwrap(), 7 * 336 * 17);
}

#[test]
fn gradients_reach_no_norm_below_the_first_adapter() {
    let gradient = |workload: &Workload, module, layer: u32| {
        let all = calls(workload, Phase::BackwardX, module, |at| at == Some(layer));
        all.keys().filter(|op| op.starts_with("rms_norm_grad")).count()
    };
    let norms = [
        Module::InputLayernorm,
        Module::QNorm,
        Module::KNorm,
        Module::PostAttentionLayernorm,
        Module::PreFeedforwardLayernorm,
        Module::PostFeedforwardLayernorm,
    ];
    use Projection::{DownProj, GateProj, KProj, OProj, VProj};
    for (target, lowest) in [
        // An adapter on v lies behind what attention gives, not behind queries and keys.
        (VProj, [0, 0, 0, 1, 1, 1]),
        (KProj, [0, 0, 1, 1, 1, 1]),
        (OProj, [0, 0, 0, 1, 1, 1]),
        (GateProj, [0, 0, 0, 0, 0, 1]),
        (DownProj, [0, 0, 0, 0, 0, 1]),
    ] {
        let workload = workload("tiny-gemma3", &[target], train(false));
        assert_eq!(norms.map(|module| gradient(&workload, module, 0)), lowest, "{target}");
        assert_eq!(norms.map(|module| gradient(&workload, module, 1)), [1; 6], "{target}");
    }
}

#[test]
fn a_full_training_of_gemma() {
    let gemma = workload("tiny-gemma3", &[], train(true));
    let at = |phase, module| calls(&gemma, phase, module, |_| true);
    let (rows, width) = (6, 24);
    // The embedding's rows times √24: the same factor on their gradient; layer 0 reads them twice.
    assert_eq!(
        at(Phase::BackwardX, Module::EmbedTokens),
        listed(&[(Op::Scale { n: 144 }, 1), (Op::Add { n: 144 }, 1)])
    );
    // Read by the embedding and by one chunk of the head.
    assert_eq!(
        at(Phase::BackwardW, Module::EmbedTokens),
        listed(&[(Op::EmbedGrad { rows, width }, 1), (Op::Add { n: 320 * 24 }, 1)])
    );
    // Queries have a row a head; a gain stored less 1 has the gradient of the gain.
    let q = Op::GainGrad { rows: 24, width: 8 };
    assert_eq!(at(Phase::BackwardW, Module::QNorm), listed(&[(q, 7)]));
    let q = Op::RmsNormGrad { rows: 24, width: 8 };
    assert_eq!(at(Phase::BackwardX, Module::QNorm), listed(&[(q, 7)]));
    let n = 6 * 56;
    assert_eq!(
        at(Phase::BackwardX, Module::Mlp),
        listed(&[(Op::Mul { n }, 14), (Op::GeluGrad { n }, 7)])
    );
    // Four norms and two of heads a layer, one at the end, seven matrices, one table.
    let tensors = Op::ClipFactor { tensors: 7 * (6 + 7) + 1 + 1 };
    assert_eq!(at(Phase::Clipping, Module::Optimizer), listed(&[(tensors, 1)]));
}

#[test]
fn frequencies_are_stretched_once() {
    let task = Task::Forward { batch: 1, seq: 5, past: 0, logits: Logits::Last, sequences: None };
    let with = |scaling| {
        let mut workload = workload("tiny", &[], task.clone());
        workload.model.rope = Rope { theta: 1e4, scaling };
        let tally = closed_form(&workload).unwrap();
        let sum = tally.get(Phase::Setup, Component::RotaryTables);
        let ops = calls(&workload, Phase::Setup, Module::RotaryEmb, |_| true);
        (ops, sum.calls, Prices::unit().flops(&sum.cost).unwrap())
    };
    // 4 frequencies of 5 primitives; 20 angles of a mul and two trigs.
    let (table, plain) = ((Op::RopeTable { positions: 5, half: 4 }, 1), 4 * 5 + 20 * 3);
    assert_eq!(with(RopeScaling::Default), (listed(&[table]), 1, plain));
    let linear = (Op::RopeLinear { half: 4 }, 1);
    let scaling = RopeScaling::Linear { factor: 2.0 };
    assert_eq!(with(scaling), (listed(&[table, linear]), 2, plain + 4));
    let llama3 = (Op::RopeLlama3 { half: 4 }, 1);
    let scaling = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 64,
    };
    assert_eq!(with(scaling), (listed(&[table, llama3]), 2, plain + 4 * 9));
    let yarn = [(Op::RopeYarn { half: 4 }, 1), (Op::Scale { n: 40 }, 1)];
    let scaling = RopeScaling::Yarn {
        factor: 4.0,
        beta_fast: 32.0,
        beta_slow: 1.0,
        original_max_position_embeddings: 64,
        attention_factor: 1.0,
        truncate: true,
    };
    assert_eq!(with(scaling), (listed(&[table, yarn[0], yarn[1]]), 3, plain + 4 * 7 + 40));
}

#[test]
fn blocked_attention_skips_what_the_mask_hides() {
    // 3 layers of 4 heads on 2 of width 8. 130 tokens are blocks of 64, 64 and 2: each reads the
    // blocks up to its own, and masks that.
    let task = Task::Forward { batch: 1, seq: 130, past: 0, logits: Logits::All, sequences: None };
    let dense = workload("tiny", &[], task);
    let blocked = Workload { attention: AttentionMode::Blocked, ..dense.clone() };
    let of_scores = |workload: &Workload| {
        let mut all = calls(workload, Phase::Forward, Module::SelfAttn, |_| true);
        all.retain(|op, _| !op.starts_with("rope") && !op.starts_with("scale"));
        all.retain(|op, _| !op.starts_with("cache_write"));
        all
    };
    let (b, d) = (2, 8);
    assert_eq!(
        of_scores(&blocked),
        listed(&[
            (Op::Matmul { b, m: 128, k: d, n: 64 }, 3),
            (Op::Matmul { b, m: 128, k: d, n: 128 }, 3),
            (Op::Matmul { b, m: 4, k: d, n: 130 }, 3),
            (Op::Mask { rows: 256, width: 64 }, 6),
            (Op::Mask { rows: 8, width: 2 }, 3),
            (Op::Softmax { rows: 256, width: 64 }, 3),
            (Op::Softmax { rows: 256, width: 128 }, 3),
            (Op::Softmax { rows: 8, width: 130 }, 3),
            (Op::Matmul { b, m: 128, k: 64, n: d }, 3),
            (Op::Matmul { b, m: 128, k: 128, n: d }, 3),
            (Op::Matmul { b, m: 4, k: 130, n: d }, 3),
        ])
    );
    let macs = |workload: &Workload| {
        closed_form(workload).unwrap().get(Phase::Forward, Component::Attention).cost.macs
    };
    assert_eq!(macs(&blocked), 3 * 4 * 2 * 8 * (64 * 64 + 64 * 128 + 2 * 130));
    assert_eq!(macs(&dense), 3 * 4 * 2 * 8 * 130 * 130);
}

#[test]
fn blocked_gradients_compute_scores_again() {
    // 65 tokens of each of 2 sequences: 64 rows over 64 keys, and a row that sees all.
    let task = Task::Train {
        batch: 2,
        seq: 65,
        accumulate: 1,
        steps: 1,
        full: false,
        recompute: false,
        clip: true,
        moments: Default::default(),
        rows: Rows::Whole,
    };
    let workload = workload("tiny", &[Projection::VProj], task);
    let blocked = Workload { attention: AttentionMode::Blocked, ..workload };
    let at =
        |of| calls(&blocked, Phase::BackwardX, Module::SelfAttn, move |layer| layer == Some(of));
    let (b, n) = (4, 8);
    let again = [
        (Op::Matmul { b, m: 128, k: 8, n: 64 }, 1),
        (Op::Mask { rows: 512, width: 64 }, 1),
        (Op::SoftmaxAgain { rows: 512, width: 64 }, 1),
        (Op::Matmul { b, m: 2, k: 8, n: 65 }, 1),
        (Op::SoftmaxAgain { rows: 8, width: 65 }, 1),
    ];
    // Towards values alone: all 65 rows read the first 64 keys, one the last.
    let values = [(Op::Matmul { b, m: 64, k: 130, n }, 1), (Op::Matmul { b, m: 1, k: 2, n }, 1)];
    assert_eq!(at(0), listed(&[&again[..], &values].concat()));
    // Towards all three: twice each product of a block of keys, and scores' gradients besides.
    let rest = [
        (Op::Matmul { b, m: 128, k: 8, n: 64 }, 2),
        (Op::Matmul { b, m: 2, k: 8, n: 65 }, 2),
        (Op::Mask { rows: 512, width: 64 }, 1),
        (Op::SoftmaxAgain { rows: 512, width: 64 }, 1),
        (Op::SoftmaxAgain { rows: 8, width: 65 }, 1),
        (Op::RowDot { rows: 2 * 4 * 65, width: 8 }, 1),
        (Op::ScoresGrad { rows: 512, width: 64 }, 1),
        (Op::ScoresGrad { rows: 8, width: 65 }, 1),
        (Op::Matmul { b, m: 128, k: 64, n }, 1),
        (Op::Matmul { b, m: 2, k: 65, n }, 1),
        (Op::Matmul { b, m: 64, k: 130, n }, 2),
        (Op::Matmul { b, m: 1, k: 2, n }, 2),
    ];
    let mut all = at(1);
    all.retain(|op, _| !op.starts_with("rope") && !op.starts_with("scale"));
    assert_eq!(all, listed(&rest));
    let mut dense = calls(&blocked.dense(), Phase::BackwardX, Module::SelfAttn, |_| true);
    dense.retain(|op, _| op.contains("again") || op.contains("row_dot"));
    assert!(dense.is_empty());
}
