//! The loss over known text.

use super::data::Passes;
use crate::{
    error::Result,
    ledger::{Dtype, Phase},
    meter::Meter,
    model::Decoder,
    workload::{Task, Workload, evaluations},
};

/// What an evaluation found and ran.
#[derive(Debug, Clone)]
pub struct Evaluation {
    /// Mean cross-entropy of the tokens that count, in nats.
    pub loss: f64,
    /// How many they are.
    pub tokens: usize,
    /// What ran, in turn.
    pub workloads: Vec<Workload>,
}

impl Evaluation {
    /// e to the loss: among how many equally likely tokens the model is torn.
    pub fn perplexity(&self) -> f64 {
        self.loss.exp()
    }
}

/// Tasks that score every row of `passes` once.
pub fn tasks(passes: &Passes, batch: usize) -> Vec<Task> {
    let batch = batch.clamp(1, passes.len().max(1)) as u64;
    let (layout, seq) = (passes.layout(), passes.data().seq() as u64);
    evaluations(passes.groups(), layout, passes.lengths(), batch, seq)
}

/// Scores every row of `passes` with `model`, `batch` rows a pass; `progress` hears of each pass
/// with the rows done, and its error ends the evaluation.
///
/// # Errors
/// A loss that is not finite, or the device's.
pub fn evaluate(
    meter: Meter,
    model: &Decoder,
    passes: &Passes,
    batch: usize,
    mut progress: impl FnMut(usize) -> Result<()>,
) -> Result<Evaluation> {
    let (mut sum, mut done) = (0.0, 0);
    let data = passes.data();
    let tasks = tasks(passes, batch);
    let mut groups = 0..passes.len();
    for task in &tasks {
        let Task::Evaluate { seq, passes: times, .. } = *task else { continue };
        let positions = model.positions(meter.phase(Phase::Setup), seq as usize)?;
        for _ in 0..times {
            let text = passes.batch(groups.by_ref().take(passes.groups().per_pass));
            sum += model.loss(meter, text.labelled(), &positions)?;
            done += text.sequences.as_ref().map_or(text.rows, Vec::len);
            progress(done)?;
        }
    }
    let tokens = data.loss_tokens();
    let loss = sum / tokens as f64;
    let advice = if model.dtype() == Dtype::F32 { "" } else { "; try --dtype f32" };
    anyhow::ensure!(loss.is_finite(), "the loss is not finite ({loss}){advice}");
    let workloads = tasks.into_iter().map(|task| model.workload(task)).collect();
    Ok(Evaluation { loss, tokens, workloads })
}
