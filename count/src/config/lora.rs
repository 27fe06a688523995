//! Adapters.

use serde::{Deserialize, Serialize};

use super::{ModelConfig, Projection};
use crate::error::{Error, Result};

/// Low-rank adapters: y += alpha/rank · B(A x) beside each target projection.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LoraConfig {
    /// r: rows of A, columns of B. 0 means no adapter.
    pub rank: usize,
    /// Numerator of the scale.
    pub alpha: f64,
    /// Adapted projections, sorted, without repeats.
    pub targets: Vec<Projection>,
}

impl LoraConfig {
    /// No adapter at all.
    pub fn none() -> Self {
        Self { rank: 0, alpha: 1.0, targets: vec![] }
    }

    /// Checks a rank and its targets against the model.
    ///
    /// # Errors
    /// A rank above a target's smaller width, no target, or an alpha that is not finite.
    pub fn new(
        config: &ModelConfig,
        rank: usize,
        alpha: f64,
        targets: &[Projection],
    ) -> Result<Self> {
        let mut targets = targets.to_vec();
        targets.sort();
        targets.dedup();
        if rank == 0 {
            return Ok(Self::none());
        }
        if targets.is_empty() {
            return Err(Error::flag("--lora-targets", "names no projection").into());
        }
        if !alpha.is_finite() {
            return Err(
                Error::flag("--lora-alpha", format!("{alpha} is not a finite number")).into()
            );
        }
        for target in &targets {
            let (k, n) = target.widths(config);
            if rank > k.min(n) {
                let why = format!("{rank} is above {}, the smaller width of {target}", k.min(n));
                return Err(Error::flag("--lora-rank", why).into());
            }
        }
        Ok(Self { rank, alpha, targets })
    }

    /// Whether `projection` carries an adapter.
    pub fn adapts(&self, projection: Projection) -> bool {
        self.rank > 0 && self.targets.contains(&projection)
    }

    /// alpha / rank, the factor on B(A x).
    pub fn scaling(&self) -> f64 {
        self.alpha / self.rank as f64
    }

    /// Trainable parameters: r·(in + out) per target and layer.
    pub fn parameters(&self, config: &ModelConfig) -> u128 {
        let per_layer: usize = self
            .targets
            .iter()
            .map(|t| {
                let (k, n) = t.widths(config);
                self.rank * (k + n)
            })
            .sum();
        (per_layer * config.num_hidden_layers) as u128
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lora_rank_is_bounded_by_the_narrower_side() {
        let config = ModelConfig::preset("qwen2.5-0.5b").unwrap();
        let targets = [Projection::VProj, Projection::QProj, Projection::QProj];
        let lora = LoraConfig::new(&config, 8, 16.0, &targets).unwrap();
        assert_eq!(lora.targets, [Projection::QProj, Projection::VProj]);
        assert_eq!(lora.parameters(&config), 24 * 8 * (896 + 896 + 896 + 128));
        let error = LoraConfig::new(&config, 129, 16.0, &targets).unwrap_err().to_string();
        assert!(error.contains("129 is above 128"), "{error}");
    }
}
