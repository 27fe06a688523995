//! Adapters that differ by layer and projection, by PEFT on the models of the families: its logits,
//! its gradients, FlopCounterMode's totals (tests/golden/adapters, by scripts/witness/adapters.py).

mod peft_gradients;

use std::{cell::RefCell, fs, path::PathBuf};

use candle_core::Device;
use flopaudit::{
    analytic::{Structure, closed_form, count, predict},
    config::ModelConfig,
    ledger::{Dtype, Ledger, Phase},
    meter::Meter,
    model::{AdapterSource, Context, Decoder, Labelled, Trained},
    ops::Ids,
    prices::{Cost, Prices},
    weights::{self, Named, PeftAdapter, read, save_adapter},
    workload::{Logits, Rows, Task, Workload},
};
use serde::Deserialize;

const ADAPTERS: [&str; 4] = ["patterns", "all-linear", "expression", "single"];

#[derive(Deserialize)]
struct Expected {
    base: String,
    ids: Vec<u32>,
    loss: f64,
    flops: Flops,
    logits: Vec<Vec<f32>>,
}

#[derive(Deserialize)]
struct Flops {
    forward: u128,
    train: u128,
}

struct Golden {
    folder: PathBuf,
    config: ModelConfig,
    expected: Expected,
}

impl Golden {
    fn open(name: &str) -> Self {
        let golden = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
        let folder = golden.join("adapters").join(name);
        let expected = fs::read_to_string(folder.join("expected.json")).unwrap();
        let expected: Expected = serde_json::from_str(&expected).unwrap();
        let config = golden.join("families").join(&expected.base).join("config.json");
        Self { config: ModelConfig::from_file(&config).unwrap(), folder, expected }
    }

    fn adapter(&self) -> PeftAdapter {
        PeftAdapter::open(&self.folder, &self.config).unwrap()
    }

    fn load(&self, adapter: PeftAdapter) -> Decoder {
        let base = self.folder.join("../../families").join(&self.expected.base);
        // It comes without a text side, which nothing here reads.
        let dir = tempfile::tempdir().unwrap();
        let tokenizer = r#"{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}"#;
        fs::write(dir.path().join("tokenizer.json"), tokenizer).unwrap();
        for file in ["config.json", "model.safetensors"] {
            fs::copy(base.join(file), dir.path().join(file)).unwrap();
        }
        let checkpoint = weights::open(dir.path().to_str()).unwrap();
        let adapters = AdapterSource::Peft(adapter);
        let (weights, device) = (&checkpoint.weights, Device::Cpu);
        Decoder::load(&self.config, weights, &adapters, Dtype::F32, &device, |_| Ok(())).unwrap()
    }

    fn workload(&self, task: Task) -> Workload {
        let (model, lora) = (self.config.clone(), self.adapter().lora);
        Workload { model, lora, dtype: Dtype::F32, attention: Default::default(), task }
    }
}

fn logits(model: &Decoder, ids: &[u32]) -> Vec<f32> {
    let ledger = RefCell::new(Ledger::default());
    let meter = Meter::new(&ledger, Phase::Forward);
    let mut cache = model.cache(meter, 1, ids.len()).unwrap();
    let (ids, context) = (Ids::Host { ids, batch: 1 }, Context::Cached(&mut cache));
    model.forward(meter, ids, context, Logits::All).unwrap().share().to_vec().unwrap()
}

fn matmuls(cost: Cost) -> u128 {
    Prices::matmul().flops(&cost).unwrap()
}

#[test]
fn logits_equal_pefts() {
    for name in ADAPTERS {
        let golden = Golden::open(name);
        let found = logits(&golden.load(golden.adapter()), &golden.expected.ids);
        let expected: Vec<f32> = golden.expected.logits.concat();
        assert_eq!(found.len(), expected.len(), "{name}");
        let apart = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        println!("{name}: logits {apart:.1e} apart");
        assert!(apart < 1e-4, "{name}: {apart} apart");
    }
}

#[test]
fn gradients_equal_pefts() {
    for name in ADAPTERS {
        let golden = Golden::open(name);
        let mut model = golden.load(golden.adapter());
        let Expected { ids, loss, .. } = &golden.expected;
        peft_gradients::equal(name, &mut model, ids, *loss, &golden.folder);
    }
}

#[test]
fn flops_equal_pytorchs() {
    for name in ADAPTERS {
        let golden = Golden::open(name);
        let Flops { forward, train } = golden.expected.flops;
        let (batch, seq) = (2, 12);
        let (accumulate, steps, full, recompute, clip) = (1, 1, false, false, false);
        let step = Task::Train {
            batch,
            seq,
            accumulate,
            steps,
            full,
            recompute,
            clip,
            moments: Default::default(),
            rows: Rows::Whole,
        };
        for (task, expected) in [
            (Task::Forward { batch, seq, past: 0, logits: Logits::All, sequences: None }, forward),
            (step, train),
        ] {
            let workload = golden.workload(task);
            let all = |tally: flopaudit::tally::Tally| matmuls(tally.sum(|_, _| true).unwrap());
            assert_eq!(all(count(Structure::Torch, &workload).unwrap()), expected, "{name}");
            assert_eq!(all(closed_form(&workload).unwrap()), expected, "{name}");
            assert_eq!(matmuls(predict(&workload).unwrap().cost().unwrap()), expected, "{name}");
        }

        let mut model = golden.load(golden.adapter());
        model.train(Trained::Adapters);
        let (ids, weights) = (vec![3; 24], vec![1.0; 24]);
        let text =
            Labelled { ids: &ids, targets: &ids, weights: &weights, batch: 2, sequences: None };
        let ledger = RefCell::new(Ledger::default());
        let meter = Meter::new(&ledger, Phase::Setup);
        let positions = model.positions(meter, 12).unwrap();
        model.loss_and_gradients(meter, text, &positions, false).unwrap();
        assert_eq!(matmuls(ledger.into_inner().cost().unwrap()), train, "{name}");
    }
}

/// What is saved has one spelling of its own, and says the same.
#[test]
fn a_saved_adapter_is_the_same() {
    for name in ADAPTERS {
        let golden = Golden::open(name);
        let (dir, lora) = (tempfile::tempdir().unwrap(), golden.adapter().lora);
        let tensors: Vec<Named> = read(&golden.folder.join("adapter_model.safetensors")).unwrap().0;
        save_adapter(dir.path(), "base", &lora, &tensors).unwrap();
        let again = PeftAdapter::open(dir.path(), &golden.config).unwrap();
        assert_eq!(again.lora, lora, "{name}");
        let ids = &golden.expected.ids;
        let [once, twice] = [golden.adapter(), again].map(|a| logits(&golden.load(a), ids));
        assert_eq!(once, twice, "{name}");
    }
}
