//! PEFT's loss and gradients of one text's adapters, against ours.

use std::{cell::RefCell, path::Path};

use candle_core::Device;
use flopaudit::{
    ledger::Phase,
    meter::Meter,
    model::{Decoder, Labelled, Trained},
};

/// Trains the adapters of `model` on `ids`, with layers kept and recomputed: the loss must be
/// `expected`, and each gradient that of lora_gradients.safetensors in `folder`. `name` is for errors.
pub fn equal(name: &str, model: &mut Decoder, ids: &[u32], expected: f64, folder: &Path) {
    model.train(Trained::Adapters);
    let (fed, targets) = (&ids[..ids.len() - 1], &ids[1..]);
    let weights = vec![1.0 / fed.len() as f32; fed.len()];
    let text = Labelled { ids: fed, targets, weights: &weights, batch: 1, sequences: None };
    let file = folder.join("lora_gradients.safetensors");
    let theirs = candle_core::safetensors::load(file, &Device::Cpu).unwrap();
    for recompute in [false, true] {
        let observer = RefCell::new(());
        let meter = Meter::new(&observer, Phase::Setup);
        let positions = model.positions(meter, fed.len()).unwrap();
        let found = model.loss_and_gradients(meter, text, &positions, recompute);
        let (loss, mut gradients) = found.unwrap();
        assert!((loss - expected).abs() < 1e-4, "{name}: {loss}");
        let trained = model.trained();
        assert_eq!(trained.len(), theirs.len(), "{name}");
        for (factor, _, tensor) in trained {
            let ours = gradients.take(tensor).unwrap().to_vec().unwrap();
            let theirs: Vec<f32> = theirs[&factor].flatten_all().unwrap().to_vec1().unwrap();
            let norm = |x: &[f32]| x.iter().map(|x| f64::from(x * x)).sum::<f64>().sqrt();
            let apart: Vec<f32> = ours.iter().zip(&theirs).map(|(a, b)| a - b).collect();
            let apart = norm(&apart) / norm(&theirs);
            assert!(apart < 1e-3, "{name} {factor}: {apart} apart");
        }
    }
}
