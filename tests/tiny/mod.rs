//! A decoder small enough to be differentiated by hand, whose every weight matters: in the family's
//! initialiser attention is next to uniform, and faults in it would not show.

// Each test file uses its own part of these.
#![allow(dead_code)]

use std::cell::RefCell;

use candle_core::Device;
use flopaudit::{
    config::{LoraConfig, ModelConfig, Projection, Rope, RopeScaling},
    ledger::{Dtype, Phase},
    meter::{Meter, Observer},
    model::{AdapterSource, Decoder, Labelled, Trained},
    ops::Tensor,
    weights::synthetic,
};
use rand::{Rng, SeedableRng, rngs::StdRng};

/// Every width another, as far as they can be: none passes for another.
pub fn config(tied: bool) -> ModelConfig {
    ModelConfig {
        vocab_size: 22,
        hidden_size: 12,
        intermediate_size: 14,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: Some(4),
        rope: Rope { theta: 100.0, scaling: RopeScaling::Default },
        tie_word_embeddings: tied,
        head_stored_apart: false,
        ..ModelConfig::preset("tiny").unwrap()
    }
}

/// The model with every weight drawn anew, B of the adapters among them; rank 3 on `targets`.
pub fn model(config: &ModelConfig, targets: &[Projection], trained: Trained) -> Decoder {
    model_in(Dtype::F32, config, targets, trained)
}

/// The same weights to the last bit in any type.
pub fn model_in(
    dtype: Dtype,
    config: &ModelConfig,
    targets: &[Projection],
    trained: Trained,
) -> Decoder {
    let rank = if targets.is_empty() { 0 } else { 3 };
    let lora = LoraConfig::new(config, rank, 4.5, targets).unwrap();
    let adapters = AdapterSource::Fresh { lora, seed: 0 };
    let weights = synthetic(config.clone(), 0).unwrap().weights;
    let load = Decoder::load(config, &weights, &adapters, dtype, &Device::Cpu, |_| Ok(()));
    let mut model = load.unwrap();
    model.train(Trained::All);
    let mut rng = StdRng::seed_from_u64(1);
    for (name, _, tensor) in model.trained() {
        let middle = if name.ends_with("norm.weight") { 1.0 } else { 0.0 };
        let values =
            (0..tensor.elements()).map(|_| middle + rng.random_range(-64..64) as f32 / 128.0);
        write(tensor, values.collect());
    }
    model.train(trained);
    model
}

/// Sets the elements of a parameter.
pub fn write(tensor: &Tensor, values: Vec<f32>) {
    let dtype = tensor.dtype().unwrap();
    let values = Tensor::from_vec(values, tensor.dims(), dtype, &Device::Cpu).unwrap();
    tensor.overwrite(&values).unwrap();
}

/// Sequences to learn from.
pub struct Text {
    pub ids: Vec<u32>,
    pub targets: Vec<u32>,
    pub weights: Vec<f32>,
    pub batch: usize,
}

impl Text {
    /// Random tokens, all positions alike.
    pub fn new(config: &ModelConfig, batch: usize, seq: usize) -> Self {
        let mut rng = StdRng::seed_from_u64(2);
        let n = batch * seq;
        let mut tokens = || (0..n).map(|_| rng.random_range(0..config.vocab_size as u32)).collect();
        Self { ids: tokens(), targets: tokens(), weights: vec![1.0 / n as f32; n], batch }
    }

    /// Each sequence as a text of its own, its weights as they are.
    pub fn rows(&self) -> Vec<Self> {
        let seq = self.ids.len() / self.batch;
        let of = |row| row * seq..(row + 1) * seq;
        let row = |row| Self {
            ids: self.ids[of(row)].to_vec(),
            targets: self.targets[of(row)].to_vec(),
            weights: self.weights[of(row)].to_vec(),
            batch: 1,
        };
        (0..self.batch).map(row).collect()
    }

    pub fn labelled(&self) -> Labelled<'_> {
        let Self { ids, targets, weights, batch } = self;
        Labelled { ids, targets, weights, batch: *batch, sequences: None }
    }
}

/// One gradient, by its parameter's name.
pub type Gradient = (String, Vec<f64>);

/// The loss, and every trained parameter's gradient.
pub fn gradients(model: &mut Decoder, text: &Text, recompute: bool) -> (f64, Vec<Gradient>) {
    observed(model, text, recompute, &RefCell::new(()))
}

/// [`gradients`], with every op told to `observer`.
pub fn observed(
    model: &mut Decoder,
    text: &Text,
    recompute: bool,
    observer: &RefCell<impl Observer>,
) -> (f64, Vec<Gradient>) {
    let meter = Meter::new(observer, Phase::Setup);
    let positions = model.positions(meter, text.ids.len() / text.batch).unwrap();
    let found = model.loss_and_gradients(meter, text.labelled(), &positions, recompute);
    let (loss, mut found) = found.unwrap();
    let gradient = |(name, _, tensor): (String, _, &mut Tensor)| {
        let gradient = found.take(tensor).unwrap_or_else(|| panic!("{name} has no gradient"));
        assert_eq!(gradient.dims(), tensor.dims(), "{name}");
        (name, gradient.to_vec().unwrap().into_iter().map(f64::from).collect())
    };
    (loss, model.trained().into_iter().map(gradient).collect())
}

/// The loss alone.
pub fn loss(model: &Decoder, text: &Text) -> f64 {
    let observer = RefCell::new(());
    let meter = Meter::new(&observer, Phase::Setup);
    let positions = model.positions(meter, text.ids.len() / text.batch).unwrap();
    model.loss(meter, text.labelled(), &positions).unwrap()
}

pub fn norm(x: &[f64]) -> f64 {
    x.iter().map(|x| x * x).sum::<f64>().sqrt()
}

/// Most ‖a − b‖ / ‖b‖ of all parameters, and whose it is. A single token attends to itself alone,
/// whatever its query and key: their gradients are 0, or what f64 rounds that to.
pub fn worst(a: &[Gradient], b: &[Gradient]) -> (f64, String) {
    assert_eq!(a.len(), b.len());
    let apart = a.iter().zip(b).map(|((name, a), (other, b))| {
        assert_eq!((name, a.len()), (other, b.len()));
        let difference: Vec<f64> = a.iter().zip(b).map(|(a, b)| a - b).collect();
        (norm(&difference) / norm(b).max(1e-9), name.clone())
    });
    apart.max_by(|a, b| a.0.total_cmp(&b.0)).unwrap()
}
