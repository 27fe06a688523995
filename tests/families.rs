//! Tiny checkpoints of each family, made by transformers: its logits, its greedy tokens, PEFT's
//! gradients and FlopCounterMode's totals (tests/golden/families/README.md says how they were made).

mod peft_gradients;

use std::{cell::RefCell, fs, path::PathBuf};

use candle_core::Device;
use flopaudit::{
    analytic::{Structure, count},
    audit::Audit,
    config::{LoraConfig, Projection},
    generate::{Request, generate},
    ledger::{Dtype, Ledger, Phase},
    meter::Meter,
    model::{AdapterSource, Context, Decoder, How, Labelled, Trained},
    ops::Ids,
    prices::Prices,
    weights::{self, Checkpoint, PeftAdapter},
    workload::{Logits, Rows, Sampling, Task, Workload},
};
use serde::Deserialize;

const FAMILIES: [&str; 10] = [
    "qwen2-a",
    "qwen2-b",
    "llama-a",
    "llama-b",
    "mistral-a",
    "mistral-b",
    "qwen3-a",
    "qwen3-b",
    "gemma3-a",
    "gemma3-b",
];

#[derive(Deserialize)]
struct Expected {
    ids: Vec<u32>,
    logits: Vec<Vec<f32>>,
    greedy: Greedy,
    adapter_logits_last: Vec<f32>,
    lora: Lora,
    flops: Flops,
}

#[derive(Deserialize)]
struct Greedy {
    prompt: Vec<u32>,
    tokens: Vec<u32>,
}

#[derive(Deserialize)]
struct Lora {
    targets: Vec<Projection>,
    r: usize,
    alpha: f64,
    loss: f64,
}

#[derive(Deserialize)]
struct Flops {
    forward: Total,
    decode: Decode,
    train_full: Total,
    train_lora: Total,
}

#[derive(Deserialize)]
struct Total {
    total: u128,
}

#[derive(Deserialize)]
struct Decode {
    prefill: u128,
    steps: Vec<u128>,
}

struct Golden {
    name: &'static str,
    folder: PathBuf,
    checkpoint: Checkpoint,
    expected: Expected,
}

impl Golden {
    fn open(name: &'static str) -> Self {
        let folder =
            PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/families").join(name);
        // They come without a text side, which nothing here reads.
        let dir = tempfile::tempdir().unwrap();
        let tokenizer = r#"{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}"#;
        fs::write(dir.path().join("tokenizer.json"), tokenizer).unwrap();
        for file in ["config.json", "model.safetensors"] {
            fs::copy(folder.join(file), dir.path().join(file)).unwrap();
        }
        let checkpoint = weights::open(dir.path().to_str()).unwrap();
        let expected = fs::read_to_string(folder.join("expected.json")).unwrap();
        let expected = serde_json::from_str(&expected).unwrap();
        Self { name, folder, checkpoint, expected }
    }

    fn load(&self, adapters: &AdapterSource) -> Decoder {
        let Checkpoint { config, weights, .. } = &self.checkpoint;
        Decoder::load(config, weights, adapters, Dtype::F32, &Device::Cpu, |_| Ok(())).unwrap()
    }

    fn base(&self) -> Decoder {
        self.load(&AdapterSource::Fresh { lora: LoraConfig::none(), seed: 0 })
    }

    fn adapted(&self) -> Decoder {
        let adapter = PeftAdapter::open(&self.folder.join("adapter"), &self.checkpoint.config);
        self.load(&AdapterSource::Peft(adapter.unwrap()))
    }

    fn lora(&self) -> LoraConfig {
        let Lora { targets, r, alpha, .. } = &self.expected.lora;
        LoraConfig::new(&self.checkpoint.config, *r, *alpha, targets).unwrap()
    }

    fn workload(&self, lora: LoraConfig, task: Task) -> Workload {
        Workload {
            model: self.checkpoint.config.clone(),
            lora,
            dtype: Dtype::F32,
            attention: Default::default(),
            task,
        }
    }
}

fn forward(model: &Decoder, ids: &[u32], batch: usize, logits: Logits) -> (Vec<f32>, Ledger) {
    let ledger = RefCell::new(Ledger::default());
    let meter = Meter::new(&ledger, Phase::Setup);
    let mut cache = model.cache(meter, batch, ids.len() / batch).unwrap();
    let (ids, context) = (Ids::Host { ids, batch }, Context::Cached(&mut cache));
    let out = model.forward(meter.phase(Phase::Forward), ids, context, logits).unwrap();
    (out.share().to_vec().unwrap(), ledger.into_inner())
}

fn most_apart<'a>(
    a: impl IntoIterator<Item = &'a f32>,
    b: impl IntoIterator<Item = &'a f32>,
) -> f32 {
    a.into_iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn matmuls(ledger: &Ledger) -> u128 {
    Prices::matmul().flops(&ledger.cost().unwrap()).unwrap()
}

fn torch(workload: &Workload) -> u128 {
    let tally = count(Structure::Torch, workload).unwrap();
    Prices::matmul().flops(&tally.sum(|_, _| true).unwrap()).unwrap()
}

#[test]
fn logits_equal_transformers() {
    for golden in FAMILIES.map(Golden::open) {
        let Expected { ids, logits, adapter_logits_last, .. } = &golden.expected;
        let (found, _) = forward(&golden.base(), ids, 1, Logits::All);
        let apart = most_apart(&found, logits.iter().flatten());
        println!("{}: logits {apart:.1e} apart", golden.name);
        assert_eq!(found.len(), logits.iter().flatten().count(), "{}", golden.name);
        assert!(apart < 1e-4, "{}: logits {apart} apart", golden.name);
        let (found, _) = forward(&golden.adapted(), ids, 1, Logits::Last);
        let apart = most_apart(&found, adapter_logits_last);
        assert!(apart < 1e-4, "{}: logits of the adapter {apart} apart", golden.name);
    }
}

#[test]
fn greedy_tokens_equal_transformers_and_balance() {
    for golden in FAMILIES.map(Golden::open) {
        let model = golden.base();
        for kv_cache in [true, false] {
            let Greedy { prompt, tokens } = &golden.expected.greedy;
            let request = Request {
                prompts: vec![prompt.clone()],
                max_new_tokens: tokens.len(),
                sampling: Sampling::GREEDY,
                seeds: vec![0],
                kv_cache,
                eos: vec![],
                timed: false,
                how: How::RECORDED,
                past: 0,
                prefill_chunk: None,
                then: vec![],
            };
            let ledger = RefCell::new(Ledger::default());
            let run = generate(&model, &request, &ledger, |_, _| Ok(())).unwrap();
            assert_eq!(run.sequences[0].tokens, *tokens, "{}, cache {kv_cache}", golden.name);
            let audit = Audit::new(&[run.workload], &ledger.into_inner()).unwrap();
            assert!(audit.balanced(), "{}: {:#?}", golden.name, audit.key_differences);
        }
    }
}

#[test]
fn gradients_of_adapters_equal_pefts() {
    for golden in FAMILIES.map(Golden::open) {
        let (mut model, loss) = (golden.adapted(), golden.expected.lora.loss);
        let ids = &golden.expected.ids;
        peft_gradients::equal(golden.name, &mut model, ids, loss, &golden.folder);
    }
}

#[test]
fn flops_equal_pytorchs() {
    for golden in FAMILIES.map(Golden::open) {
        let (name, flops) = (golden.name, &golden.expected.flops);
        let vocab = golden.checkpoint.config.vocab_size as u32;
        let ids: Vec<u32> = (0..24).map(|i| i * 5 % vocab).collect();

        let (_, ledger) = forward(&golden.base(), &ids, 2, Logits::All);
        assert_eq!(matmuls(&ledger), flops.forward.total, "{name}");

        let request = Request {
            prompts: vec![ids[..9].to_vec(), ids[9..18].to_vec()],
            max_new_tokens: flops.decode.steps.len() + 1,
            sampling: Sampling::GREEDY,
            seeds: vec![0, 1],
            kv_cache: true,
            eos: vec![],
            timed: false,
            how: How::RECORDED,
            past: 0,
            prefill_chunk: None,
            then: vec![],
        };
        let ledger = RefCell::new(Ledger::default());
        generate(&golden.base(), &request, &ledger, |_, _| Ok(())).unwrap();
        let all = flops.decode.prefill + flops.decode.steps.iter().sum::<u128>();
        assert_eq!(matmuls(&ledger.into_inner()), all, "{name}");

        let weights = vec![1.0; 24];
        let text =
            Labelled { ids: &ids, targets: &ids, weights: &weights, batch: 2, sequences: None };
        for (trained, mut model, expected) in [
            (Trained::All, golden.base(), flops.train_full.total),
            (Trained::Adapters, golden.adapted(), flops.train_lora.total),
        ] {
            model.train(trained);
            let ledger = RefCell::new(Ledger::default());
            let meter = Meter::new(&ledger, Phase::Setup);
            let positions = model.positions(meter, 12).unwrap();
            model.loss_and_gradients(meter, text, &positions, false).unwrap();
            assert_eq!(matmuls(&ledger.into_inner()), expected, "{name} {trained:?}");
            let full = trained == Trained::All;
            let lora = if full { LoraConfig::none() } else { golden.lora() };
            let (accumulate, steps, recompute, clip) = (1, 1, false, false);
            let task = Task::Train {
                batch: 2,
                seq: 12,
                accumulate,
                steps,
                full,
                recompute,
                clip,
                moments: Default::default(),
                rows: Rows::Whole,
            };
            assert_eq!(torch(&golden.workload(lora, task)), expected, "{name} {trained:?}");
        }
    }
}
