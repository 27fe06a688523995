//! Blocked attention: it computes what dense attention does, and what it runs is what was counted, to
//! the last FLOP.

#[path = "../count/tests/random/mod.rs"]
mod random;
mod program;
mod tiny;

use std::cell::RefCell;

use candle_core::Device;
use flopaudit::{
    audit::Audit,
    config::{LoraConfig, ModelConfig, Projection},
    generate::{Next, Request, generate},
    ledger::{Dtype, Ledger, Module, Op, Phase, Scope},
    meter::{At, Meter},
    model::{AdapterSource, Context, Decoder, How, Labelled, Trained},
    ops::{self, Blocks, CausalMask, Ids, Tensor},
    train::{Hyper, Trainer},
    weights::synthetic,
    workload::{AttentionMode, Filling, Layout, Logits, Rows, Sampling, Task},
};
use program::{flopaudit, tmp};
use proptest::{collection::vec, prelude::*};
use rand::{Rng, SeedableRng, rngs::StdRng};
use random::{BLOCKS, adapted};

const FAMILIES: [&str; 5] = ["tiny", "tiny-llama", "tiny-mistral", "tiny-qwen3", "tiny-gemma3"];

fn load(model: &ModelConfig, lora: &LoraConfig, dtype: Dtype) -> Decoder {
    let weights = synthetic(model.clone(), 5).unwrap().weights;
    let adapters = AdapterSource::Fresh { lora: lora.clone(), seed: 1 };
    let loaded = Decoder::load(model, &weights, &adapters, dtype, &Device::Cpu, |_| Ok(()));
    loaded.unwrap().with_attention(AttentionMode::Blocked)
}

fn tokens(n: usize, salt: usize, vocab: usize) -> Vec<u32> {
    (0..n).map(|i| ((i * i + 3 * i + 7 * salt) % vocab) as u32).collect()
}

/// What `run` executes on `model` must be what is counted for `task`.
fn balances(model: &Decoder, task: Task, ledger: &Ledger) {
    let workload = model.workload(task);
    let audit = Audit::new(std::slice::from_ref(&workload), ledger).unwrap();
    let (keys, sums) = (&audit.key_differences, &audit.sum_differences);
    assert!(audit.balanced(), "{:?}\n{keys:#?}\n{sums:#?}", workload.task);
}

fn most_apart(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// The ops of a ledger in these phases, each as often as it ran.
fn ops_of(ledger: &Ledger, phase: Phase) -> Vec<Op> {
    let of_phase = ledger.iter().filter(|(key, _)| key.phase == phase);
    let mut ops: Vec<Op> =
        of_phase.flat_map(|(key, entry)| vec![key.op; entry.calls as usize]).collect();
    ops.sort();
    ops
}

/// Attention alone: its output, and the gradients of what `wanted` says; and what ran.
struct Ran {
    out: Vec<f32>,
    gradients: [Option<Vec<f32>>; 3],
    ledger: Ledger,
}

/// B, K, G, T, tokens before them, and d.
type Shape = [usize; 6];

fn attend(
    blocked: bool,
    [b, k, g, t, past, d]: Shape,
    window: Option<usize>,
    wanted: [bool; 3],
) -> (Ran, Option<Blocks>) {
    let held = t + window.map_or(past, |window| past.min(window - 1));
    let mut rng = StdRng::seed_from_u64((t * 31 + past) as u64);
    let mut random = |shape: [usize; 4]| {
        let n = shape.iter().product();
        let values = (0..n).map(|_| rng.random_range(-1.0f32..1.0)).collect();
        Tensor::from_vec(values, shape.to_vec(), Dtype::F32, &Device::Cpu).unwrap()
    };
    let tensors = [[b, k * g, t, d], [b, k, held, d], [b, k, held, d]].map(&mut random);
    let dy = random([b, t, k * g, d]).reshape((b, t, k * g * d)).unwrap();
    let scope = |i| Scope { layer: Some(i), module: Module::Residual };
    let inputs: [Tensor; 3] = std::array::from_fn(|i| match wanted[i] {
        true => tensors[i].leaf(scope(i as u32)),
        false => tensors[i].clone(),
    });
    let ledger = RefCell::new(Ledger::default());
    let meter = Meter::new(&ledger, Phase::Forward);
    let at: At = meter.taped(true).at(Module::SelfAttn);
    let [q, key, value] = &inputs;
    let (y, blocks) = match blocked {
        true => {
            let mask = CausalMask::by_block(t, past, window);
            let y = ops::blocked_attention(at, q, key, value, &mask).unwrap();
            (y, Some(Blocks::new(q, key, &mask).unwrap()))
        }
        false => {
            let mask = CausalMask::new(t, past, window, Dtype::F32, &Device::Cpu).unwrap();
            (ops::attention(at, q, key, value, Some(&mask)).unwrap(), None)
        }
    };
    let mut found = ops::backward(meter, &y, dy).unwrap();
    let gradients = inputs.each_ref().map(|x| found.take(x).map(|dx| dx.to_vec().unwrap()));
    let out = y.to_vec().unwrap();
    (Ran { out, gradients, ledger: ledger.into_inner() }, blocks)
}

fn agrees_with_dense(shape: Shape, window: Option<usize>, wanted: [bool; 3]) {
    let (dense, _) = attend(false, shape, window, wanted);
    let (ran, blocks) = attend(true, shape, window, wanted);
    let what = format!("{shape:?} {window:?} {wanted:?}");
    assert!(most_apart(&ran.out, &dense.out) < 1e-5, "{what}");
    for (i, (ours, theirs)) in ran.gradients.iter().zip(&dense.gradients).enumerate() {
        assert_eq!(ours.is_some(), wanted[i], "{what}");
        let (Some(ours), Some(theirs)) = (ours, theirs) else { continue };
        let most = theirs.iter().fold(1.0f32, |most, x| most.max(x.abs()));
        assert!(most_apart(ours, theirs) < 1e-5 * most, "{what}: input {i}");
    }
    // What one launch would report is what all of them did.
    let blocks = blocks.unwrap();
    let sorted = |mut ops: Vec<Op>| {
        ops.sort();
        ops
    };
    let forward = sorted(blocks.forward().collect());
    assert_eq!(ops_of(&ran.ledger, Phase::Forward), forward, "{what}");
    let backward = sorted(blocks.backward(wanted));
    assert_eq!(ops_of(&ran.ledger, Phase::BackwardX), backward, "{what}");
}

#[test]
fn attention_at_the_edges_of_blocks() {
    for t in [2, 63, 64, 65, 128, 129, 130] {
        for past in [0, 1, 63, 64, 70] {
            for window in [None, Some(1), Some(64), Some(65), Some(100)] {
                agrees_with_dense([1, 2, 2, t, past, 4], window, [true; 3]);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn attention_is_that_of_dense(
        [b, k, g] in [1usize..3, 1usize..3, 1usize..4], t in 2usize..300, past in 0usize..200,
        d in 1usize..9, window in proptest::option::of(1usize..300), wanted in any::<[bool; 3]>(),
    ) {
        agrees_with_dense([b, k, g, t, past, d], window, wanted);
    }
}

/// Logits of `seq` tokens after `past` others; the pass must balance.
fn forward(model: &Decoder, [batch, seq, past]: [usize; 3]) -> Vec<f32> {
    let vocab = model.config().vocab_size;
    let ledger = RefCell::new(Ledger::default());
    let meter = Meter::new(&ledger, Phase::Setup);
    let mut cache = model.cache(meter, batch, past + seq).unwrap();
    // Ops before the pass are nobody's.
    let before = RefCell::new(());
    let fed = Meter::new(&before, Phase::Forward);
    if past > 0 {
        let ids = tokens(batch * past, 1, vocab);
        let ids = Ids::Host { ids: &ids, batch };
        model.feed(fed, ids, Context::Cached(&mut cache)).unwrap();
    }
    let ids = tokens(batch * seq, 2, vocab);
    let (ids, context) = (Ids::Host { ids: &ids, batch }, Context::Cached(&mut cache));
    let out = model.forward(meter.phase(Phase::Forward), ids, context, Logits::All).unwrap();
    let [batch, seq, past] = [batch, seq, past].map(|n| n as u64);
    let task = Task::Forward { batch, seq, past, logits: Logits::All, sequences: None };
    balances(model, task, &ledger.into_inner());
    out.share().to_vec().unwrap()
}

#[test]
fn families_have_the_logits_of_dense_attention() {
    for preset in FAMILIES {
        let config = ModelConfig::preset(preset).unwrap();
        let mut model = load(&config, &LoraConfig::none(), Dtype::F32);
        for shape in [[1, 200, 0], [2, 70, 5], [1, 64, 64], [1, 1, 90], [1, 130, 100]] {
            let blocked = forward(&model, shape);
            model = model.with_attention(AttentionMode::Dense);
            let dense = forward(&model, shape);
            model = model.with_attention(AttentionMode::Blocked);
            let most = dense.iter().fold(1.0f32, |most, x| most.max(x.abs()));
            assert!(most_apart(&blocked, &dense) < 1e-4 * most, "{preset} {shape:?}");
        }
    }
}

#[test]
fn losses_and_gradients_are_those_of_dense_attention() {
    let targets = [Projection::QProj, Projection::VProj];
    for (trained, recompute) in
        [(Trained::All, false), (Trained::All, true), (Trained::Adapters, false)]
    {
        let config = tiny::config(true);
        let mut model = tiny::model(&config, &targets, trained);
        let text = tiny::Text::new(&config, 2, 100);
        let (loss, dense) = tiny::gradients(&mut model, &text, recompute);
        let mut model = model.with_attention(AttentionMode::Blocked);
        let (blocked_loss, blocked) = tiny::gradients(&mut model, &text, recompute);
        assert!((loss - blocked_loss).abs() < 1e-5 * loss, "{loss} and {blocked_loss}");
        assert!((tiny::loss(&model, &text) - loss).abs() < 1e-5 * loss);
        let (apart, name) = tiny::worst(&blocked, &dense);
        assert!(apart < 1e-3, "{name}: {apart}");
    }
}

/// A step over micro-steps of rows of these lengths, packed or padded.
fn train(model: Decoder, passes: &[Vec<usize>], packs: bool, full: bool, recompute: bool) {
    let vocab = model.config().vocab_size;
    let seq = passes.iter().flatten().copied().max().unwrap();
    let rows = if packs { 1 } else { passes[0].len() };
    let mut fed = Filling::new(if packs { Layout::Packed } else { Layout::Padded });
    let mut texts = vec![];
    for lengths in passes {
        fed.add(&lengths.iter().map(|n| *n as u64).collect::<Vec<_>>(), 1);
        let width = lengths.iter().max().unwrap();
        let n = if packs { lengths.iter().sum() } else { rows * width };
        texts.push((tokens(n, 3, vocab), vec![1.0 / n as f32; n], lengths));
    }
    let labelled = |(ids, weights, lengths): &'_ (Vec<u32>, Vec<f32>, &Vec<usize>)| Labelled {
        ids: leaked(ids),
        targets: leaked(ids),
        weights: leaked(weights),
        batch: rows,
        sequences: packs.then(|| leaked(lengths)),
    };
    let texts: Vec<Labelled> = texts.iter().map(labelled).collect();
    let ledger = RefCell::new(Ledger::default());
    let meter = Meter::new(&ledger, Phase::Setup);
    let trained = if full { Trained::All } else { Trained::Adapters };
    let hyper = Hyper::DEFAULT;
    let mut trainer = Trainer::new(meter, model, trained, hyper, seq, recompute).unwrap();
    let found = trainer.gradients(meter, &texts).unwrap();
    trainer.update(meter, found, 0.01).unwrap();
    let task = Task::Train {
        batch: if packs { passes.iter().map(Vec::len).max().unwrap() } else { rows } as u64,
        seq: seq as u64,
        accumulate: passes.len() as u64,
        steps: 1,
        full,
        recompute,
        clip: true,
        moments: Default::default(),
        rows: fed.rows(seq as u64),
    };
    balances(&trainer.model, task, &ledger.into_inner());
}

/// The same for as long as the test runs.
fn leaked<T: Clone>(values: &[T]) -> &'static [T] {
    values.to_vec().leak()
}

#[test]
fn trainings_of_all_families_balance() {
    use Projection::{DownProj, KProj, OProj, QProj, VProj};
    for preset in FAMILIES {
        let config = ModelConfig::preset(preset).unwrap();
        // Towards values alone, keys alone, queries, nothing of the lowest layer's attention, all.
        for targets in [&[VProj][..], &[KProj], &[QProj, VProj], &[OProj, DownProj]] {
            let lora = LoraConfig::new(&config, 2, 4.0, targets).unwrap();
            train(load(&config, &lora, Dtype::F32), &[vec![130, 7]], false, false, false);
        }
        let none = LoraConfig::none();
        let packed = [vec![70, 1, 65], vec![128]];
        for recompute in [false, true] {
            train(load(&config, &none, Dtype::F32), &[vec![1], vec![90]], false, true, recompute);
            train(load(&config, &none, Dtype::BF16), &packed, true, true, recompute);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn forward_balances(
        (model, lora) in adapted(BLOCKS, 3), batch in 1usize..3, seq in 1usize..200,
        past in 0usize..200, half_precision in any::<bool>(),
    ) {
        let dtype = if half_precision { Dtype::BF16 } else { Dtype::F32 };
        forward(&load(&model, &lora, dtype), [batch, seq, past]);
    }

    #[test]
    fn generation_balances(
        (model, lora) in adapted(BLOCKS, 3), lengths in vec(1usize..140, 1..4), new in 1usize..4,
        kv_cache in any::<bool>(),
    ) {
        let decoder = load(&model, &lora, Dtype::F32);
        let prompts = lengths.iter().enumerate().map(|(i, n)| tokens(*n, i, model.vocab_size));
        generated(&decoder, &Request { kv_cache, ..request(prompts.collect(), new) });
    }

    #[test]
    fn prefixes_parts_and_turns_balance(
        (model, lora) in adapted(BLOCKS, 3), prompt in 1usize..200, new in 1usize..4,
        past in 0usize..150, chunk in prop::option::of(1usize..100),
        turns in vec((1usize..100, 1usize..3), 0..3),
    ) {
        let decoder = load(&model, &lora, Dtype::F32);
        let of = |length: usize| vec![tokens(length, 20, model.vocab_size)];
        let next = |(prompt, new): &(usize, usize)| Next { prompts: of(*prompt), new_tokens: *new };
        let then = turns.iter().map(next).collect();
        generated(&decoder, &Request { past, prefill_chunk: chunk, then, ..request(of(prompt), new) });
    }

    #[test]
    fn training_balances(
        (model, lora) in adapted(BLOCKS, 3), [full, recompute, packs, bf16] in any::<[bool; 4]>(),
        passes in vec(vec(prop_oneof![1usize..9, 60usize..140], 1..3), 1..3),
    ) {
        let dtype = if bf16 { Dtype::BF16 } else { Dtype::F32 };
        // Padded passes are all of as many rows.
        let rows = passes[0].len();
        let passes: Vec<Vec<usize>> = passes
            .into_iter()
            .map(|of| if packs { of } else { of.into_iter().cycle().take(rows).collect() })
            .collect();
        train(load(&model, &lora, dtype), &passes, packs, full || lora.rank == 0, recompute);
    }

    #[test]
    fn evaluation_balances(
        (model, lora) in adapted(BLOCKS, 3), batch in 1usize..3, seq in 1usize..200,
    ) {
        let decoder = load(&model, &lora, Dtype::F32);
        let ledger = RefCell::new(Ledger::default());
        let meter = Meter::new(&ledger, Phase::Setup);
        let positions = decoder.positions(meter, seq).unwrap();
        let ids = tokens(batch * seq, 2, model.vocab_size);
        let weights = vec![1.0; ids.len()];
        let text = Labelled { ids: &ids, targets: &ids, weights: &weights, batch, sequences: None };
        decoder.loss(meter, text, &positions).unwrap();
        let [batch, seq] = [batch, seq].map(|n| n as u64);
        let task = Task::Evaluate { batch, seq, passes: 1, rows: Rows::Whole };
        balances(&decoder, task, &ledger.into_inner());
    }
}

fn request(prompts: Vec<Vec<u32>>, new: usize) -> Request {
    Request {
        seeds: (7..).take(prompts.len()).collect(),
        prompts,
        max_new_tokens: new,
        sampling: Sampling::GREEDY,
        kv_cache: true,
        eos: vec![],
        timed: false,
        how: How::RECORDED,
        past: 0,
        prefill_chunk: None,
        then: vec![],
    }
}

fn generated(model: &Decoder, request: &Request) {
    let ledger = RefCell::new(Ledger::default());
    let out = generate(model, request, &ledger, |_, _| Ok(())).unwrap();
    assert_eq!(out.workload.attention, AttentionMode::Blocked);
    balances(model, out.workload.task, &ledger.into_inner());
}

#[test]
fn commands_run_it() {
    let dir = tmp();
    for args in [
        "audit forward --seq 150 --past 40 --preset tiny-gemma3",
        "audit generate --prompt-tokens 150 --new-tokens 3 --prefill-chunk 50 --preset tiny-mistral",
        "audit verify --past 60 --drafted 9 --accepted 3 --rounds 3 --preset tiny",
        "audit train --seq 100 --batch 2 --lora-rank 2 --recompute --preset tiny-qwen3",
        "audit train --seq 100 --full --preset tiny-llama",
        "audit eval --seq 100 --preset tiny-mistral",
        "train --data data.txt --seq 80 --steps 2 --out out --preset tiny --check-gradients 3",
        "eval --data data.txt --seq 80 --preset tiny",
    ] {
        std::fs::write(dir.path().join("data.txt"), "so much text ".repeat(60)).unwrap();
        flopaudit(dir.path(), &format!("{args} --attention blocked")).assert().success();
    }
}

#[test]
fn a_count_is_smaller_and_its_difference_named() {
    let total = |args: &str| -> u64 {
        let args = format!("count forward --seq 4096 --preset qwen2.5-0.5b {args} --json");
        program::json(&args)["total_flops"].as_u64().unwrap()
    };
    let [dense, blocked] = ["", "--attention blocked"].map(total);
    assert_eq!(total("--attention blocked --structure exact:dense"), dense);
    assert!(blocked < dense);
    let way = program::json(
        "reconcile forward --seq 4096 --preset qwen2.5-0.5b --attention blocked --from exact \
         --to exact:dense --json",
    );
    assert_eq!(way["difference_flops"].as_u64().unwrap(), dense - blocked);
    let steps: Vec<_> = way["steps"].as_array().unwrap().iter().map(|s| &s["cause"]).collect();
    assert_eq!(steps, ["blocks of scores skipped"]);
}
