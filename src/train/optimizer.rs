//! AdamW over the trained parameters, with a norm over all gradients.

use std::iter::zip;

use crate::{
    error::{Error, Result},
    ledger::{Dtype, Module, MomentDtype, Phase, Scope},
    meter::Meter,
    model::{Decoder, Trained},
    ops::{AdamW, Draws, Gradients, Moments, Tensor, Update, clip_factor, sums_of_squares},
    weights::Named,
};

/// What an update depends on besides gradients and learning rate.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Hyper {
    /// β₁ and β₂, decay of the moments.
    pub betas: (f64, f64),
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled: the parameter shrinks by learning rate · this.
    pub weight_decay: f64,
    /// Most norm of all gradients together; above it they are scaled down. None: never scaled.
    pub clip: Option<f64>,
    /// How both moments are kept; all is computed in f32.
    #[serde(default)]
    pub moments: MomentDtype,
}

impl Hyper {
    /// What PyTorch's AdamW and most training scripts start from.
    pub const DEFAULT: Self = Self {
        betas: (0.9, 0.999),
        eps: 1e-8,
        weight_decay: 0.01,
        clip: Some(1.0),
        moments: MomentDtype::F32,
    };
}

/// Parameters in training, with their moments.
#[derive(Debug)]
pub struct Optimizer {
    hyper: Hyper,
    /// In the order of [`Decoder::trained`].
    parameters: Vec<Parameter>,
    /// Updates so far.
    steps: u64,
    /// Of how moments in bf16 are rounded.
    seed: u64,
}

#[derive(Debug)]
struct Parameter {
    name: String,
    moments: Moments,
}

impl Optimizer {
    /// Marks `model`'s parameters as trained, and takes over those that are: in f32 they become
    /// views of the optimizer's own, in a narrower type copies of it.
    ///
    /// # Errors
    /// A model without anything to train, or a device out of memory.
    pub fn new(model: &mut Decoder, trained: Trained, hyper: Hyper) -> Result<Self> {
        model.train(trained);
        let in_f32 = model.dtype() == Dtype::F32;
        let mut parameters = vec![];
        for (name, scope, tensor) in model.trained() {
            let moments = Moments::new(tensor, hyper.moments)?;
            if in_f32 {
                *tensor = moments.master(tensor)?.parameter(scope);
            }
            parameters.push(Parameter { name, moments });
        }
        match parameters.is_empty() {
            true => Err(Error::flag("--lora-rank", "0 leaves nothing to train").into()),
            false => Ok(Self { hyper, parameters, steps: 0, seed: 0 }),
        }
    }

    /// The same with moments in bf16 rounded by `seed`, which is 0 else.
    pub fn seeded(self, seed: u64) -> Self {
        Self { seed, ..self }
    }

    /// Updates so far.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Names of the parameters, in their order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.parameters.iter().map(|p| p.name.as_str())
    }

    /// One update of `model` by `gradients`, in f32, at learning rate `rate`: the norm of all
    /// gradients before clipping, and that of each in the order of [`Optimizer::names`].
    ///
    /// # Errors
    /// A parameter without a gradient, or the device's. Gradients that are not finite change
    /// nothing: they show in the norm.
    pub fn step(
        &mut self,
        meter: Meter,
        model: &mut Decoder,
        mut gradients: Gradients,
        rate: f64,
    ) -> Result<(f64, Vec<f64>)> {
        let (clipping, update) = (meter.phase(Phase::Clipping), meter.phase(Phase::Optimizer));
        let trained = model.trained();
        let mut found = vec![];
        for (name, scope, tensor) in &trained {
            let gradient = gradients.take(tensor);
            let gradient = gradient.ok_or_else(|| anyhow::anyhow!("{name} has no gradient"))?;
            found.push((clipping.scope(*scope), gradient));
        }
        let sums = sums_of_squares(&found.iter().map(|(at, g)| (*at, g)).collect::<Vec<_>>())?;
        let most = self.hyper.clip.unwrap_or(f64::INFINITY);
        let (norm, factor) = clip_factor(clipping.at(Module::Optimizer), &sums, most)?;
        let norms = sums.iter().map(|sum| sum.sqrt()).collect();
        if !norm.is_finite() {
            return Ok((norm, norms));
        }
        self.steps += 1;
        let updates: Vec<_> = zip(zip(zip(0.., &self.parameters), &found), &trained)
            .map(|(((number, parameter), (clipping, gradient)), (_, scope, tensor))| Update {
                clipping: *clipping,
                at: update.scope(*scope),
                moments: &parameter.moments,
                draws: Draws::new(self.seed, self.steps, number),
                gradient,
                parameter: tensor,
            })
            .collect();
        self.adamw(rate, self.hyper.clip.map(|_| factor)).step(&updates)?;
        Ok((norm, norms))
    }

    /// The factors of update number `steps`, of gradients times `clip`.
    fn adamw(&self, rate: f64, clip: Option<f64>) -> AdamW {
        let Hyper { betas, eps, weight_decay, .. } = self.hyper;
        let t = self.steps as f64;
        AdamW {
            clip,
            decay: 1.0 - rate * weight_decay,
            rate: rate / (1.0 - betas.0.powf(t)),
            correction: (1.0 - betas.1.powf(t)).sqrt(),
            betas,
            eps,
        }
    }

    /// Moves parameter `index` by `factor` · `direction`, its moments as they are, to look at the
    /// loss from there: the values before, for [`Optimizer::put_back`].
    ///
    /// # Errors
    /// The device's.
    pub(super) fn nudge(
        &self,
        model: &mut Decoder,
        index: usize,
        direction: &[f32],
        factor: f64,
    ) -> Result<Vec<f32>> {
        let before = self.parameters[index].moments.to_vec()?;
        let mut values = before.clone();
        for (value, d) in values.iter_mut().zip(direction) {
            *value += factor as f32 * d;
        }
        self.put_back(model, index, &values)?;
        Ok(before)
    }

    /// Sets parameter `index` and its moments.
    ///
    /// # Errors
    /// Another number of values.
    pub(super) fn put_back(&self, model: &mut Decoder, index: usize, values: &[f32]) -> Result<()> {
        let parameter = &self.parameters[index];
        parameter.moments.restore(values)?;
        parameter.moments.publish(model.trained()[index].2)
    }

    /// Every parameter of `model` at its latest update, in f32: the model's own may be narrower.
    ///
    /// # Errors
    /// The device's.
    pub fn masters(&self, model: &mut Decoder) -> Result<Vec<Named>> {
        let named = |(parameter, (name, _, tensor)): (&Parameter, (String, Scope, &mut Tensor))| {
            let values = parameter.moments.master(tensor)?.to_vec()?;
            Ok(Named { name, shape: tensor.dims().to_vec(), values })
        };
        self.parameters.iter().zip(model.trained()).map(named).collect()
    }

    /// Every parameter with its moments: name, then values as [`Moments::to_vec`] orders them.
    ///
    /// # Errors
    /// The device's.
    pub fn state(&self) -> Result<Vec<(&str, Vec<f32>)>> {
        self.parameters.iter().map(|p| Ok((p.name.as_str(), p.moments.to_vec()?))).collect()
    }

    /// Takes back what [`Optimizer::state`] gave after `steps` updates.
    ///
    /// # Errors
    /// A parameter that `find` does not know, or knows with another number of elements.
    pub fn restore(
        &mut self,
        model: &mut Decoder,
        steps: u64,
        find: impl Fn(&str) -> Result<Vec<f32>>,
    ) -> Result<()> {
        self.steps = steps;
        for (parameter, (_, _, tensor)) in self.parameters.iter().zip(model.trained()) {
            parameter.moments.restore(&find(&parameter.name)?)?;
            parameter.moments.publish(tensor)?;
        }
        Ok(())
    }
}
