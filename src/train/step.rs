//! One optimizer step: micro-batches, gradients, update.

use super::optimizer::{Hyper, Optimizer};
use crate::{
    error::{Error, Result},
    ledger::{Dtype, Phase},
    meter::Meter,
    model::{Decoder, Labelled, Positions, Trained},
    ops::Gradients,
};

/// A model in training.
#[derive(Debug)]
pub struct Trainer {
    /// The model, at its latest update.
    pub model: Decoder,
    /// Its optimizer.
    pub optimizer: Optimizer,
    positions: Positions,
    recompute: bool,
}

/// What a step found.
#[derive(Debug, Clone, PartialEq)]
pub struct Step {
    /// The loss before the update.
    pub loss: f64,
    /// Norm of all gradients, before clipping.
    pub gradient_norm: f64,
    /// Norm of each parameter's gradient, in the order of [`Optimizer::names`].
    pub norms: Vec<f64>,
}

impl Trainer {
    /// Prepares `model` for steps over sequences of `seq` tokens. Rotary tables are metered.
    ///
    /// # Errors
    /// A model without anything to train, or a device out of memory.
    pub fn new(
        meter: Meter,
        mut model: Decoder,
        trained: Trained,
        hyper: Hyper,
        seq: usize,
        recompute: bool,
    ) -> Result<Self> {
        let optimizer = Optimizer::new(&mut model, trained, hyper)?;
        let positions = model.positions(meter.phase(Phase::Setup), seq)?;
        Ok(Self { model, optimizer, positions, recompute })
    }

    /// The same with moments in bf16 rounded by `seed`, as [`Optimizer::seeded`].
    pub fn seeded(self, seed: u64) -> Self {
        Self { optimizer: self.optimizer.seeded(seed), ..self }
    }

    /// The loss over `texts`, whose weights sum to 1, and its gradients: of one text in the model's
    /// own type, of several summed in f32.
    ///
    /// # Errors
    /// Nothing to learn from, a loss that is not finite, or the device's.
    pub fn gradients(&self, meter: Meter, texts: &[Labelled]) -> Result<(f64, Gradients)> {
        // The optimizer reads bf16 as it is; no kernel of ours reads f16.
        let as_it_is = texts.len() == 1 && self.model.dtype() != Dtype::F16;
        let (mut loss, mut sum) = (0.0, Gradients::default());
        for text in texts {
            let (part, gradients) =
                self.model.loss_and_gradients(meter, *text, &self.positions, self.recompute)?;
            loss += part;
            match as_it_is {
                true => sum = gradients,
                false => sum.add_pass(meter, gradients)?,
            }
        }
        match loss.is_finite() {
            true => Ok((loss, sum)),
            false => Err(self.diverged("loss", loss)),
        }
    }

    /// One update at learning rate `rate` from [`Trainer::gradients`].
    ///
    /// # Errors
    /// A norm that is not finite: the parameters are as before. Else as
    /// [`Optimizer::step`].
    pub fn update(
        &mut self,
        meter: Meter,
        (loss, gradients): (f64, Gradients),
        rate: f64,
    ) -> Result<Step> {
        let (gradient_norm, norms) =
            self.optimizer.step(meter, &mut self.model, gradients, rate)?;
        match gradient_norm.is_finite() {
            true => Ok(Step { loss, gradient_norm, norms }),
            false => Err(self.diverged("gradients' norm", gradient_norm)),
        }
    }

    fn diverged(&self, what: &str, value: f64) -> anyhow::Error {
        let step = self.optimizer.steps() + 1;
        diverged(&format!("{what} of step {step}"), value, self.model.dtype())
    }
}

/// What went wrong, and what may help.
pub(super) fn diverged(what: &str, value: f64, dtype: Dtype) -> anyhow::Error {
    let narrow = if dtype == Dtype::F32 { "" } else { ", or use --dtype f32" };
    Error::Diverged(format!("the {what} is {value}; lower --lr{narrow}")).into()
}
