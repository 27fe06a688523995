//! The loss of labelled text, and its gradients.

use super::{Context, Decoder, Positions, decoder::Layer, parameters::Parameter};
use crate::{
    error::Result,
    ledger::{Module, Phase, Scope},
    meter::Meter,
    ops::{self, Gradients, Ids, Losses, Tensor, backward},
    workload::LOSS_ROWS,
};

/// Sequences and what each position should predict, row after row.
#[derive(Debug, Clone, Copy)]
pub struct Labelled<'a> {
    /// Tokens to feed, (B, T).
    pub ids: &'a [u32],
    /// The token after each, (B, T).
    pub targets: &'a [u32],
    /// Weight of each position in the loss, (B, T): 0 where nothing is to be learnt.
    pub weights: &'a [f32],
    /// B.
    pub batch: usize,
    /// Lengths of sequences of their own, one behind the other in the one row that there is then;
    /// none where each row is a sequence.
    pub sequences: Option<&'a [usize]>,
}

/// Which parameters are trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trained {
    /// The adapters alone.
    Adapters,
    /// Every weight.
    All,
}

impl Labelled<'_> {
    fn ids(&self) -> Ids<'_> {
        Ids::Host { ids: self.ids, batch: self.batch }
    }

    fn context<'a>(&'a self, positions: &'a Positions) -> Context<'a> {
        match self.sequences {
            Some(lengths) => Context::Packed(positions, lengths),
            None => Context::Whole(positions),
        }
    }
}

impl Decoder {
    /// Has gradients computed of the parameters that `trained` says, and of no other.
    pub fn train(&mut self, trained: Trained) {
        for Parameter { scope, tensor, .. } in self.parameters() {
            let is_adapter = matches!(scope.module, Module::Lora(..));
            *tensor = match is_adapter || trained == Trained::All {
                true => tensor.parameter(scope),
                false => tensor.detach(),
            };
        }
    }

    /// The trained parameters, with their names in a checkpoint or in PEFT's format, in the order
    /// of the data flow.
    pub fn trained(&mut self) -> Vec<(String, Scope, &mut Tensor)> {
        let trained = self.parameters().into_iter().filter(|p| p.tensor.needs_gradient());
        trained.map(|Parameter { name, scope, tensor }| (name, scope, tensor)).collect()
    }

    /// Σ weight · cross-entropy over all positions, without gradients.
    ///
    /// # Errors
    /// An id outside the vocabulary, more tokens than `positions` was made for, or the device's.
    pub fn loss(&self, meter: Meter, text: Labelled, positions: &Positions) -> Result<f64> {
        let forward = meter.phase(Phase::Forward);
        let x = self.hidden(forward, text.ids(), &text.context(positions))?; // (B, T, D)
        let h = self.normed(forward, &x.share())?;
        self.head_loss(meter, &h, text, None).map(|(loss, _)| loss)
    }

    /// Σ weight · cross-entropy over all positions, and its gradients towards every trained
    /// parameter. With `recompute`, a layer keeps nothing but its input, and runs forward again
    /// when its gradients are computed.
    ///
    /// # Errors
    /// As [`Decoder::loss`].
    pub fn loss_and_gradients(
        &self,
        meter: Meter,
        text: Labelled,
        positions: &Positions,
        recompute: bool,
    ) -> Result<(f64, Gradients)> {
        let context = text.context(positions);
        match recompute {
            false => self.keeping_activations(meter, text, &context),
            true => self.recomputing_layers(meter, text, &context),
        }
    }

    fn keeping_activations(
        &self,
        meter: Meter,
        text: Labelled,
        context: &Context,
    ) -> Result<(f64, Gradients)> {
        let forward = meter.phase(Phase::Forward).taped(true);
        let x = self.hidden(forward, text.ids(), context)?; // (B, T, D)
        let h = self.normed(forward, &x.share())?;
        let mut gradients = Gradients::default();
        let (loss, dh) = self.head_loss(meter, &h, text, Some(&mut gradients))?;
        gradients.merge(meter, backward(meter, &h, dh)?)?;
        Ok((loss, gradients))
    }

    fn recomputing_layers(
        &self,
        meter: Meter,
        text: Labelled,
        context: &Context,
    ) -> Result<(f64, Gradients)> {
        let forward = meter.phase(Phase::Forward);
        let embedded = self.embed(forward.taped(true), text.ids())?; // (B, T, D)
        let sequences = self.sequences(&embedded, context)?;
        let embedded = embedded.share();
        let (mut x, mut inputs) = (embedded.clone(), vec![]);
        for (i, layer) in self.layers.iter().enumerate() {
            x = self.start_of_layer(i, &x, &embedded);
            inputs.push(x.clone());
            x = layer.forward(forward.layer(i), i, x.copied()?, &sequences, context)?.share();
        }
        x = self.start_of_layer(self.layers.len(), &x, &embedded);
        let h = self.normed(forward.taped(true), &x)?;
        let mut gradients = Gradients::default();
        let (loss, dh) = self.head_loss(meter, &h, text, Some(&mut gradients))?;
        gradients.merge(meter, backward(meter, &h, dh)?)?;
        while let Some(input) = inputs.pop() {
            let i = inputs.len();
            let Some(dy) = gradients.take(&x) else { break };
            let again = meter.phase(Phase::Recompute).taped(true).layer(i);
            let y = self.layers[i].forward(again, i, input.copied()?, &sequences, context)?.share();
            gradients.merge(meter, backward(meter, &y, dy)?)?;
            x = input;
        }
        if let Some(dx) = gradients.take(&x) {
            gradients.merge(meter, backward(meter, &embedded, dx)?)?;
        }
        Ok((loss, gradients))
    }

    /// The input of layer `i` as a graph of its own; without one where nothing below is trained,
    /// which is the embedding where any weight but adapters is.
    fn start_of_layer(&self, i: usize, x: &Tensor, embedded: &Tensor) -> Tensor {
        let trained =
            embedded.needs_gradient() || self.layers[..i].iter().any(Layer::trains_adapters);
        let scope = match i.checked_sub(1) {
            _ if !trained => return x.detach(),
            Some(below) => Scope { layer: Some(below as u32), module: Module::Residual },
            None => Scope { layer: None, module: Module::EmbedTokens },
        };
        x.leaf(scope)
    }

    /// The head and the loss of normed activations `h` (B, T, D), [`LOSS_ROWS`] rows at a time, so
    /// that logits of all positions are never held at once. Where `gradients` are wanted, those of
    /// the head go there, and that of `h` is returned; else it is empty.
    fn head_loss(
        &self,
        meter: Meter,
        h: &Tensor,
        text: Labelled,
        mut gradients: Option<&mut Gradients>,
    ) -> Result<(f64, Tensor)> {
        let shape = h.dims().to_vec();
        let rows = shape[0] * shape[1];
        let h = h.detach().reshape((rows, shape[2]))?;
        let head = self.head_weight();
        let at_loss = meter.phase(Phase::Loss).at(Module::Loss);
        let (mut losses, mut dh) = (vec![], vec![]);
        for start in (0..rows).step_by(LOSS_ROWS) {
            let end = rows.min(start + LOSS_ROWS);
            let part = h.narrow(0, start, end - start)?;
            let (targets, weights) = (&text.targets[start..end], &text.weights[start..end]);
            let logits =
                ops::linear(meter.phase(Phase::Forward).at(Module::LmHead), &part, &head.detach())?;
            let Some(gradients) = gradients.as_deref_mut() else {
                losses.push(ops::cross_entropy(at_loss, logits, targets, weights)?);
                continue;
            };
            let (loss, d) = ops::cross_entropy_with_gradient(at_loss, logits, targets, weights)?;
            losses.push(loss);
            let d = d.to_dtype(self.dtype().base())?;
            let at = |phase| meter.phase(phase).at(Module::LmHead);
            dh.push(ops::matmul(at(Phase::BackwardX), &d, &head.detach())?.share());
            if head.needs_gradient() {
                let at = at(Phase::BackwardW);
                gradients.add_product(meter, head, at, (&d.t()?, &part))?;
            }
        }
        let dh = Tensor::stacked(&dh, &h)?.reshape(shape)?;
        Ok((Losses::sum(&losses)?, dh))
    }
}
