//! What costs are linear in: sums of monomials of the lengths, over any number of passes, in
//! closed form (Σ i = n(n+1)/2, Σ i² = n(n+1)(2n+1)/6).

use crate::{
    config::ModelConfig,
    error::{Error, Result},
    ledger::Phase,
    workload::{Logits, Task},
};

/// Sums over passes of T tokens fed to each of B sequences, S = past + T held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Moments {
    /// Σ 1
    pub passes: u128,
    /// Σ B
    pub sequences: u128,
    /// Σ B·T
    pub rows: u128,
    /// Σ B·T·S
    pub scores: u128,
    /// Σ B·T²: the part of the scores that causality concerns; cached keys are all visible.
    pub squares: u128,
    /// Σ 1 over passes of more than one token: only those have a mask.
    pub masked_passes: u128,
    /// Σ B·T·S over the same.
    pub masked_scores: u128,
    /// Σ rows that reach the final norm and the head.
    pub head_rows: u128,
}

impl Moments {
    /// One pass.
    pub fn pass(batch: u128, seq: u128, past: u128, logits: Logits) -> Self {
        let rows = batch * seq;
        let scores = rows * (past + seq);
        let masked = u128::from(seq > 1);
        Self {
            passes: 1,
            sequences: batch,
            rows,
            scores,
            squares: rows * seq,
            masked_passes: masked,
            masked_scores: masked * scores,
            head_rows: match logits {
                Logits::All => rows,
                Logits::Last => batch,
            },
        }
    }

    /// Steps i = 1 … n of one token each, S = p + i.
    fn cached_steps(batch: u128, p: u128, n: u128) -> Self {
        let rows = batch * n;
        Self {
            passes: n,
            sequences: rows,
            rows,
            scores: batch * (n * p + n * (n + 1) / 2),
            squares: rows,
            masked_passes: 0,
            masked_scores: 0,
            head_rows: rows,
        }
    }

    /// Steps i = 1 … n over the whole context, T = S = p + i, logits of the last position.
    fn uncached_steps(batch: u128, p: u128, n: u128) -> Self {
        let rows = batch * (n * p + n * (n + 1) / 2);
        let squares = n * p * p + p * n * (n + 1) + n * (n + 1) * (2 * n + 1) / 6;
        let scores = batch * squares;
        Self {
            passes: n,
            sequences: batch * n,
            rows,
            scores,
            squares: scores,
            masked_passes: n,
            masked_scores: scores,
            head_rows: batch * n,
        }
    }

    /// The passes of a task as they run; of training, those of one micro-step.
    pub fn of(task: &Task) -> Vec<(Phase, Self)> {
        match *task {
            Task::Forward { batch, seq, past, logits } => {
                let pass = Self::pass(batch.into(), seq.into(), past.into(), logits);
                vec![(Phase::Forward, pass)]
            }
            Task::Train { batch, seq, .. } | Task::Evaluate { batch, seq, .. } => {
                vec![(Phase::Forward, Self::pass(batch.into(), seq.into(), 0, Logits::All))]
            }
            Task::Generate { batch, prompt_tokens, new_tokens, kv_cache, .. } => {
                let (b, p, n) = (batch.into(), prompt_tokens.into(), u128::from(new_tokens));
                let prefill = Self::pass(b, p, 0, Logits::Last);
                let decode = match kv_cache {
                    true => Self::cached_steps(b, p, n - 1),
                    false => Self::uncached_steps(b, p, n - 1),
                };
                vec![(Phase::Prefill, prefill), (Phase::Decode, decode)]
            }
        }
    }

    /// The same passes with nothing kept from one to the next: each runs over its whole context.
    pub fn without_cache(task: &Task) -> Vec<(Phase, Self)> {
        let mut task = *task;
        match &mut task {
            Task::Forward { seq, past, .. } => (*seq, *past) = (*seq + *past, 0),
            Task::Generate { kv_cache, .. } => *kv_cache = false,
            Task::Train { .. } | Task::Evaluate { .. } => {}
        }
        Self::of(&task)
    }

    /// Both together.
    pub fn plus(self, other: Self) -> Self {
        Self {
            passes: self.passes + other.passes,
            sequences: self.sequences + other.sequences,
            rows: self.rows + other.rows,
            scores: self.scores + other.scores,
            squares: self.squares + other.squares,
            masked_passes: self.masked_passes + other.masked_passes,
            masked_scores: self.masked_scores + other.masked_scores,
            head_rows: self.head_rows + other.head_rows,
        }
    }

    /// Refuses sums whose cost could come near 128 bits, so that no polynomial in these moments
    /// can overflow: none has a term above layers · (scores · H·d + rows · widest product), nor
    /// more than a few dozen of them.
    pub fn check(&self, model: &ModelConfig) -> Result<()> {
        let widest = model.hidden_size.max(model.intermediate_size).max(model.q_width()) as f64;
        let columns = widest.max(model.vocab_size as f64);
        let terms =
            self.scores as f64 * model.q_width() as f64 + self.rows as f64 * widest * columns;
        match 64.0 * model.num_hidden_layers as f64 * terms < 2f64.powi(126) {
            true => Ok(()),
            false => Err(Error::Overflow("this workload's operations".into()).into()),
        }
    }
}
