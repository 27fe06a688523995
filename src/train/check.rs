//! Gradients against finite differences, on the run's own text.

use rand::{SeedableRng, rngs::StdRng, seq::index};
use serde::{Deserialize, Serialize};

use super::step::{Trainer, diverged};
use crate::{
    error::Result,
    ledger::Phase,
    meter::Meter,
    model::{Decoder, Labelled},
    ops::Gradients,
};

/// Slopes of the loss along the gradients of a few tensors: a gradient is right if the slope along
/// it is its norm.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Check {
    /// One a tensor.
    pub slopes: Vec<Slope>,
}

/// One tensor's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Slope {
    /// The tensor.
    pub name: String,
    /// Norm of its gradient.
    pub norm: f64,
    /// (loss ahead − loss behind) / distance.
    pub slope: f64,
}

impl Slope {
    /// How far slope and norm are apart, of the norm.
    pub fn error(&self) -> f64 {
        (self.slope / self.norm - 1.0).abs()
    }
}

impl Check {
    /// Most [`Slope::error`] that rounding in f32 explains.
    pub const TOLERANCE: f64 = 0.02;

    /// Whether every slope is its norm, within what rounding explains.
    pub fn passes(&self) -> bool {
        self.slopes.iter().all(|slope| slope.error() <= Self::TOLERANCE)
    }
}

/// Walks a little along the gradients of `tensors` tensors, chosen by `seed` among those of the
/// largest norms, and back: two passes each over all of `texts`, whose sequences have at most `seq`
/// tokens.
pub(super) fn run(
    meter: Meter,
    trainer: &mut Trainer,
    (loss, gradients): &(f64, Gradients),
    (texts, seq): (&[Labelled], usize),
    tensors: usize,
    seed: u64,
) -> Result<Check> {
    let mut found = vec![];
    let names = trainer.model.trained().into_iter();
    for (i, (name, _, tensor)) in names.enumerate() {
        let gradient = gradients.values(tensor)?.unwrap_or_default();
        let norm = gradient.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        found.push((norm, i, name, gradient));
    }
    // Along a gradient of next to nothing, the loss only shows rounding; along none, nothing.
    found.retain(|(norm, ..)| *norm > 0.0);
    if found.is_empty() {
        return Ok(Check { slopes: vec![] });
    }
    found.sort_by(|a, b| b.0.total_cmp(&a.0));
    found.truncate((4 * tensors).min(found.len()));
    let mut rng = StdRng::seed_from_u64(seed);
    let chosen = index::sample(&mut rng, found.len(), tensors.min(found.len()));

    let positions = trainer.model.positions(meter.phase(Phase::Setup), seq)?;
    let total = |model: &Decoder| {
        texts.iter().try_fold(0.0, |sum, t| {
            Ok::<_, anyhow::Error>(sum + model.loss(meter, *t, &positions)?)
        })
    };
    let mut slopes = vec![];
    for which in chosen {
        let (norm, i, name, gradient) = &found[which];
        // So far that the loss changes by 2e-4 of itself: well above f32's rounding, and little
        // enough for its curve to be a line.
        let factor = 2e-4 * loss / (norm * norm);
        let Trainer { model, optimizer, .. } = &mut *trainer;
        let mut loss_at = |factor| {
            let before = optimizer.nudge(model, *i, gradient, factor)?;
            let loss = total(model);
            optimizer.put_back(model, *i, &before)?;
            loss
        };
        let (ahead, behind) = (loss_at(factor)?, loss_at(-factor)?);
        if !(ahead - behind).is_finite() {
            let what = format!("loss beside {name} at the gradients' check");
            return Err(diverged(&what, ahead - behind, model.dtype()));
        }
        let slope = (ahead - behind) / (2.0 * factor * norm);
        slopes.push(Slope { name: name.clone(), norm: *norm, slope });
    }
    Ok(Check { slopes })
}
