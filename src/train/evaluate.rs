//! The loss over known text.

use super::data::Dataset;
use crate::{
    error::Result,
    ledger::{Dtype, Phase},
    meter::Meter,
    model::Decoder,
    workload::{Task, Workload},
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

/// Tasks that score `rows` rows of `seq` tokens: passes of `batch`, then one of what is left.
pub fn tasks(rows: usize, seq: usize, batch: usize) -> Vec<Task> {
    let (batch, seq) = (batch.clamp(1, rows.max(1)) as u64, seq as u64);
    let (passes, rest) = (rows as u64 / batch, rows as u64 % batch);
    let whole = (passes > 0).then_some(Task::Evaluate { batch, seq, passes });
    let last = (rest > 0).then_some(Task::Evaluate { batch: rest, seq, passes: 1 });
    whole.into_iter().chain(last).collect()
}

/// Scores every row of `data` with `model`, `batch` rows a pass; `progress` hears of each pass
/// with the rows done, and its error ends the evaluation.
///
/// # Errors
/// A loss that is not finite, or the device's.
pub fn evaluate(
    meter: Meter,
    model: &Decoder,
    data: &Dataset,
    batch: usize,
    mut progress: impl FnMut(usize) -> Result<()>,
) -> Result<Evaluation> {
    let (mut sum, mut done) = (0.0, 0);
    let tasks = tasks(data.rows(), data.seq(), batch);
    for task in &tasks {
        let Task::Evaluate { batch, seq, passes } = *task else { continue };
        let batch = batch as usize;
        let positions = model.positions(meter.phase(Phase::Setup), seq as usize)?;
        for _ in 0..passes {
            let rows: Vec<usize> = (done..done + batch).collect();
            let text = data.batch(&rows);
            sum += model.loss(meter, text.labelled(), &positions)?;
            done += batch;
            progress(done)?;
        }
    }
    let tokens = data.loss_tokens();
    let loss = sum / tokens as f64;
    let advice = if model.dtype() == Dtype::F32 { "" } else { "; try --dtype f32" };
    anyhow::ensure!(loss.is_finite(), "the loss is not finite ({loss}){advice}");
    let workload = |task| Workload {
        model: model.config().clone(),
        lora: model.lora().clone(),
        dtype: model.dtype(),
        task,
    };
    Ok(Evaluation { loss, tokens, workloads: tasks.into_iter().map(workload).collect() })
}
