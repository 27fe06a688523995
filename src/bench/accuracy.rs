//! What a narrower type costs in accuracy: the same tokens through the same weights in both.

use std::cell::RefCell;

use rand::{Rng, SeedableRng, rngs::StdRng};
use serde::{Deserialize, Serialize};

use crate::{
    error::Result,
    ledger::{Dtype, Phase},
    meter::Meter,
    model::{Context, Decoder},
    ops::Ids,
    workload::Logits,
};

/// Tokens that are fed, at most.
const TOKENS: usize = 128;

/// How far a model in one element type is from itself in another.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Accuracy {
    /// The type that was measured.
    pub dtype: Dtype,
    /// What it is held against.
    pub against: Dtype,
    /// Tokens fed, which are random.
    pub tokens: u64,
    /// Mean cross-entropy of each next token.
    pub loss: f64,
    /// The same in the other type.
    pub loss_against: f64,
    /// √(Σ (a − b)² / Σ b²) of all logits, b being the other type's.
    pub logits_apart: f64,
}

/// What a model makes of random tokens.
#[derive(Debug)]
pub struct Outcome {
    dtype: Dtype,
    tokens: u64,
    logits: Vec<f32>,
    loss: f64,
}

impl Outcome {
    /// That of `model`, without being metered; the same tokens for each `seed` and vocabulary.
    ///
    /// # Errors
    /// The device's.
    pub fn of(model: &Decoder, seed: u64) -> Result<Self> {
        let (vocab, most) = (model.config().vocab_size, model.config().max_position_embeddings);
        let mut rng = StdRng::seed_from_u64(seed);
        let ids: Vec<u32> =
            (0..TOKENS.min(most)).map(|_| rng.random_range(0..vocab as u32)).collect();
        let nobody = RefCell::new(());
        let meter = Meter::new(&nobody, Phase::Forward);
        let positions = model.positions(meter, ids.len())?;
        let fed = Ids::Host { ids: &ids, batch: 1 };
        let logits = model.forward(meter, fed, Context::Whole(&positions), Logits::All)?;
        let logits = logits.share().to_vec()?;
        let rows = logits.chunks_exact(vocab).zip(ids.iter().skip(1));
        let losses: Vec<f64> = rows.map(|(row, next)| cross_entropy(row, *next)).collect();
        let loss = losses.iter().sum::<f64>() / losses.len().max(1) as f64;
        Ok(Self { dtype: model.dtype(), tokens: ids.len() as u64, logits, loss })
    }

    /// How far it is from `other`, the same model in another type.
    ///
    /// # Errors
    /// Logits that are not finite, or of another model.
    pub fn against(&self, other: &Self) -> Result<Accuracy> {
        anyhow::ensure!(self.logits.len() == other.logits.len(), "outcomes of two models");
        let square = |x: f32| f64::from(x) * f64::from(x);
        let pairs = self.logits.iter().zip(&other.logits);
        let apart: f64 = pairs.map(|(a, b)| square(a - b)).sum();
        let all: f64 = other.logits.iter().map(|b| square(*b)).sum();
        let logits_apart = if apart == 0.0 { 0.0 } else { (apart / all).sqrt() };
        let found = Accuracy {
            dtype: self.dtype,
            against: other.dtype,
            tokens: self.tokens,
            loss: self.loss,
            loss_against: other.loss,
            logits_apart,
        };
        let name = found.dtype.name();
        anyhow::ensure!(found.is_sound(), "logits in {name} are not finite");
        Ok(found)
    }
}

impl Accuracy {
    /// Whether its figures can be.
    pub fn is_sound(&self) -> bool {
        [self.loss, self.loss_against, self.logits_apart]
            .into_iter()
            .all(|x| x >= 0.0 && x.is_finite())
    }

    /// In a line, after the type's name.
    pub fn says(&self) -> String {
        let Self { against, tokens, loss, loss_against, logits_apart, .. } = self;
        let name = against.name();
        format!(
            "loss {loss:.4} against {loss_against:.4} in {name}, logits {:.2} % apart, over {tokens} \
             random tokens",
            100.0 * logits_apart
        )
    }
}

/// −log softmax of a row at `target`.
fn cross_entropy(logits: &[f32], target: u32) -> f64 {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|x| f64::from(x - most).exp()).sum();
    let at = logits.get(target as usize).map_or(f64::NAN, |x| f64::from(x - most));
    sum.ln() - at
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::{
        config::{LoraConfig, ModelConfig},
        model::AdapterSource,
        weights::synthetic,
    };

    #[test]
    fn it_is_nothing_against_itself_and_little_against_bf16() {
        let config = ModelConfig::preset("tiny").unwrap();
        let weights = synthetic(config.clone(), 0).unwrap().weights;
        let adapters = AdapterSource::Fresh { lora: LoraConfig::none(), seed: 0 };
        let outcome = |dtype| {
            let model =
                Decoder::load(&config, &weights, &adapters, dtype, &Device::Cpu, |_| Ok(()));
            Outcome::of(&model.unwrap(), 3).unwrap()
        };
        let (narrow, wide) = (outcome(Dtype::Fp8), outcome(Dtype::BF16));
        let none = wide.against(&wide).unwrap();
        assert!(none.logits_apart == 0.0 && none.loss == none.loss_against);
        let found = narrow.against(&wide).unwrap();
        assert!(found.logits_apart > 1e-4 && found.logits_apart < 0.2, "{found:?}");
        assert!((found.loss - found.loss_against).abs() < 0.1, "{found:?}");
        assert!(found.says().contains("in bf16, logits "), "{}", found.says());
    }

    #[test]
    fn cross_entropy_of_equal_logits_is_their_number() {
        assert!((cross_entropy(&[2.0; 8], 3) - 8f64.ln()).abs() < 1e-12);
    }
}
