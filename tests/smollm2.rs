//! Trained weights of the Llama family: SmolLM2-135M-Instruct out of a Q4_1 GGUF, against
//! transformers on the same weights dequantized (scripts/witness/smollm2.py).

mod trained;

use std::{cell::RefCell, sync::LazyLock};

use flopaudit::{
    audit::Audit,
    config::{LoraConfig, Projection},
    generate::{Request, generate},
    ledger::{Dtype, Ledger, Phase},
    meter::Meter,
    model::{AdapterSource, Context, Decoder, How, Labelled, Trained},
    ops::Ids,
    prices::Prices,
    train::{Hyper, Trainer},
    weights::Checkpoint,
    workload::{Logits, Rows, Sampling, Task, Workload},
};
use serde::Deserialize;
use trained::{golden, load, smollm2};

static CHECKPOINT: LazyLock<Checkpoint> = LazyLock::new(smollm2);
static BASE: LazyLock<Decoder> = LazyLock::new(|| load(&CHECKPOINT, &fresh(LoraConfig::none())));

fn fresh(lora: LoraConfig) -> AdapterSource {
    AdapterSource::Fresh { lora, seed: 1 }
}

#[derive(Deserialize)]
struct Prompt {
    text: String,
    token_ids: Vec<u32>,
    top20_ids: Vec<usize>,
    top20_logits: Vec<f32>,
    greedy32_ids: Vec<u32>,
}

#[derive(Deserialize)]
struct Encoded {
    text: String,
    ids: Vec<u32>,
}

fn prompts() -> Vec<Prompt> {
    serde_json::from_value(golden("smollm2.json")["prompts"].clone()).unwrap()
}

fn forward(ids: &[u32], logits: Logits) -> (Vec<f32>, Ledger) {
    let ledger = RefCell::new(Ledger::default());
    let meter = Meter::new(&ledger, Phase::Setup);
    let mut cache = BASE.cache(meter, 1, ids.len()).unwrap();
    let (ids, context) = (Ids::Host { ids, batch: 1 }, Context::Cached(&mut cache));
    let out = BASE.forward(meter.phase(Phase::Forward), ids, context, logits).unwrap();
    (out.share().to_vec().unwrap(), ledger.into_inner())
}

#[test]
fn logits_equal_transformers() {
    for prompt in prompts() {
        let (last, _) = forward(&prompt.token_ids, Logits::Last);
        for (&id, &logit) in prompt.top20_ids.iter().zip(&prompt.top20_logits) {
            assert!((last[id] - logit).abs() < 2e-3, "{id}: {} is not {logit}", last[id]);
        }
    }
}

#[test]
fn greedy_tokens_equal_transformers_and_balance() {
    for prompt in prompts() {
        let request = Request {
            prompts: vec![prompt.token_ids],
            max_new_tokens: 32,
            sampling: Sampling::GREEDY,
            seeds: vec![0],
            kv_cache: true,
            eos: vec![],
            timed: false,
            how: How::RECORDED,
            past: 0,
            prefill_chunk: None,
            then: vec![],
        };
        let ledger = RefCell::new(Ledger::default());
        let run = generate(&BASE, &request, &ledger, |_, _| Ok(())).unwrap();
        assert_eq!(run.sequences[0].tokens, prompt.greedy32_ids, "{:?}", prompt.text);
        let audit = Audit::new(&[run.workload], &ledger.into_inner()).unwrap();
        assert!(audit.balanced(), "{:#?}", audit.key_differences);
    }
}

#[test]
fn flops_equal_flop_counter_modes() {
    let ids: Vec<u32> = (0..64).collect();
    let (_, ledger) = forward(&ids, Logits::All);
    let flops = Prices::matmul().flops(&ledger.cost().unwrap()).unwrap();
    let expected = golden("smollm2.json")["forward_1x64"]["total"].as_u64().unwrap();
    assert_eq!(flops, u128::from(expected));
}

#[test]
fn a_training_of_adapters_learns_and_balances() {
    let (model, targets) = (CHECKPOINT.config.clone(), [Projection::QProj, Projection::VProj]);
    let lora = LoraConfig::new(&model, 8, 16.0, &targets).unwrap();
    let adapted = load(&CHECKPOINT, &fresh(lora.clone()));
    let text = include_str!("../examples/alice.txt");
    let ids = CHECKPOINT.text.encode(&text[..2000]).unwrap();
    let (batch, seq, steps) = (2usize, 48usize, 4u64);
    let weights = vec![1.0 / (batch * seq) as f32; batch * seq];
    let ledger = RefCell::new(Ledger::default());
    let meter = Meter::new(&ledger, Phase::Setup);
    let hyper = Hyper::DEFAULT;
    let mut trainer = Trainer::new(meter, adapted, Trained::Adapters, hyper, seq, false).unwrap();
    let (fed, targets) = (&ids[..batch * seq], &ids[1..=batch * seq]);
    let text = Labelled { ids: fed, targets, weights: &weights, batch, sequences: None };
    let losses: Vec<f64> = (0..steps)
        .map(|_| {
            let found = trainer.gradients(meter, &[text]).unwrap();
            trainer.update(meter, found, 1e-3).unwrap().loss
        })
        .collect();
    assert!(losses.is_sorted_by(|a, b| a > b), "{losses:?}");
    let task = Task::Train {
        batch: batch as u64,
        seq: seq as u64,
        accumulate: 1,
        steps,
        full: false,
        recompute: false,
        clip: true,
        moments: Default::default(),
        rows: Rows::Whole,
    };
    let workload = Workload { model, lora, dtype: Dtype::F32, attention: Default::default(), task };
    let audit = Audit::new(&[workload], &ledger.into_inner()).unwrap();
    assert!(audit.balanced(), "{:#?}", audit.key_differences);
}

#[test]
fn the_file_is_read_as_transformers_does() {
    let checkpoint = &*CHECKPOINT;
    let config = &checkpoint.config;
    assert_eq!(config.parameters(), 134_515_008);
    assert_eq!((config.rope.theta, config.rms_norm_eps), (100_000.0, 1e-5));
    assert!(config.tie_word_embeddings && !config.bias.qkv && config.window.is_none());

    let texts = golden("smollm2.json")["tokenizer"]["texts"].clone();
    let texts: Vec<Encoded> = serde_json::from_value(texts).unwrap();
    assert!(!texts.is_empty());
    for Encoded { text, ids } in texts {
        assert_eq!(checkpoint.text.encode(&text).unwrap(), ids, "{text:?}");
        assert_eq!(checkpoint.text.decode(&ids, false).unwrap(), text);
    }
    assert_eq!(checkpoint.text.eos_ids(), [2, 0]);
    let system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face";
    let chat = checkpoint.text.chat(None, "Hi").unwrap();
    let expected = format!(
        "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n\
         <|im_start|>assistant\n"
    );
    assert_eq!(chat, expected);
}
