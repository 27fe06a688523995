//! What costs are linear in: sums of monomials of the lengths, over any number of passes, in
//! closed form (Σ i = n(n+1)/2, Σ i² = n(n+1)(2n+1)/6).

use std::ops::Range;

use crate::{
    config::ModelConfig,
    error::{Error, Result},
    ledger::Phase,
    workload::{Logits, Task},
};

/// Sums over passes of T tokens fed to each of B sequences, S = past + T held. A layer whose window
/// is W reads U = T + min(past, W − 1) keys of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Moments {
    /// Σ 1
    pub passes: u128,
    /// Σ 1 over passes that write a cache.
    pub cached_passes: u128,
    /// Σ 1 over passes of more than one token: only those have a mask.
    pub masked_passes: u128,
    /// Σ B
    pub sequences: u128,
    /// Σ B·T
    pub rows: u128,
    /// Σ B·T²: the part of the scores that causality concerns; cached keys are all visible.
    pub squares: u128,
    /// Σ rows that reach the final norm and the head.
    pub head_rows: u128,
    /// Of a layer that sees the whole context.
    pub whole: Scores,
    /// Of a layer that sees a window; none is counted where the model has none.
    pub windowed: Scores,
}

/// Scores of one layer and one head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Scores {
    /// Σ B·T·S, of a window Σ B·T·U.
    pub all: u128,
    /// The same over passes of more than one token.
    pub masked: u128,
}

impl Scores {
    fn plus(self, other: Self) -> Self {
        Self { all: self.all + other.all, masked: self.masked + other.masked }
    }

    fn times(self, n: u128) -> Self {
        Self { all: n * self.all, masked: n * self.masked }
    }
}

/// How far windowed layers see: W, or beyond any context where the model has none.
#[derive(Debug, Clone, Copy)]
struct Sight(Option<u128>);

impl Sight {
    /// min(past, W − 1): how many of `past` keys the first of new tokens sees.
    fn back(self, past: u128) -> u128 {
        self.0.map_or(past, |width| past.min(width - 1))
    }

    /// Σ min(p + i, W) over i = 1 … n: up to W while the context still fits the window, W after.
    fn of_steps(self, p: u128, n: u128) -> u128 {
        let growing = self.0.map_or(n, |width| n.min(width.saturating_sub(p)));
        let full = self.0.map_or(0, |width| (n - growing) * width);
        growing * p + growing * (growing + 1) / 2 + full
    }
}

impl Moments {
    /// One pass.
    fn pass(batch: u128, seq: u128, past: u128, logits: Logits, sight: Sight) -> Self {
        let rows = batch * seq;
        let masked = u128::from(seq > 1);
        let scores = |keys| Scores { all: rows * keys, masked: masked * rows * keys };
        Self {
            passes: 1,
            cached_passes: 0,
            masked_passes: masked,
            sequences: batch,
            rows,
            squares: rows * seq,
            head_rows: match logits {
                Logits::All => rows,
                Logits::Last => batch,
            },
            whole: scores(seq + past),
            windowed: scores(seq + sight.back(past)),
        }
    }

    /// Steps i = 1 … n of one token each, S = p + i.
    fn cached_steps(batch: u128, p: u128, n: u128, sight: Sight) -> Self {
        let rows = batch * n;
        let scores = |sight: Sight| Scores { all: batch * sight.of_steps(p, n), masked: 0 };
        Self {
            passes: n,
            cached_passes: n,
            masked_passes: 0,
            sequences: rows,
            rows,
            squares: rows,
            head_rows: rows,
            whole: scores(Sight(None)),
            windowed: scores(sight),
        }
    }

    /// Steps i = 1 … n over the whole context, T = S = p + i, logits of the last position. What
    /// is fed together is scored together, whatever the window.
    fn uncached_steps(batch: u128, p: u128, n: u128) -> Self {
        let rows = batch * (n * p + n * (n + 1) / 2);
        let squares = n * p * p + p * n * (n + 1) + n * (n + 1) * (2 * n + 1) / 6;
        let squares = batch * squares;
        let scores = Scores { all: squares, masked: squares };
        Self {
            passes: n,
            cached_passes: 0,
            masked_passes: n,
            sequences: batch * n,
            rows,
            squares,
            head_rows: batch * n,
            whole: scores,
            windowed: scores,
        }
    }

    /// The passes of a task as they run; of training, those of one micro-step.
    pub fn of(task: &Task, model: &ModelConfig) -> Vec<(Phase, Self)> {
        let sight = Sight(model.window.as_ref().map(|window| window.width as u128));
        let whole = |batch: u64, seq: u64, past: u64, logits| {
            Self::pass(batch.into(), seq.into(), past.into(), logits, sight)
        };
        match *task {
            Task::Forward { batch, seq, past, logits } => {
                let pass = Self { cached_passes: 1, ..whole(batch, seq, past, logits) };
                vec![(Phase::Forward, pass)]
            }
            Task::Train { batch, seq, .. } | Task::Evaluate { batch, seq, .. } => {
                vec![(Phase::Forward, whole(batch, seq, 0, Logits::All))]
            }
            Task::Generate { batch, prompt_tokens, new_tokens, kv_cache, .. } => {
                let prefill = whole(batch, prompt_tokens, 0, Logits::Last);
                let prefill = Self { cached_passes: u128::from(kv_cache), ..prefill };
                let (b, p, n) = (batch.into(), prompt_tokens.into(), u128::from(new_tokens) - 1);
                let decode = match kv_cache {
                    true => Self::cached_steps(b, p, n, sight),
                    false => Self::uncached_steps(b, p, n),
                };
                vec![(Phase::Prefill, prefill), (Phase::Decode, decode)]
            }
        }
    }

    /// The same passes with nothing kept from one to the next: each runs over its whole context.
    pub fn without_cache(task: &Task, model: &ModelConfig) -> Vec<(Phase, Self)> {
        let mut task = *task;
        match &mut task {
            Task::Forward { seq, past, .. } => (*seq, *past) = (*seq + *past, 0),
            Task::Generate { kv_cache, .. } => *kv_cache = false,
            Task::Train { .. } | Task::Evaluate { .. } => {}
        }
        Self::of(&task, model)
    }

    /// Both together.
    pub fn plus(self, other: Self) -> Self {
        Self {
            passes: self.passes + other.passes,
            cached_passes: self.cached_passes + other.cached_passes,
            masked_passes: self.masked_passes + other.masked_passes,
            sequences: self.sequences + other.sequences,
            rows: self.rows + other.rows,
            squares: self.squares + other.squares,
            head_rows: self.head_rows + other.head_rows,
            whole: self.whole.plus(other.whole),
            windowed: self.windowed.plus(other.windowed),
        }
    }

    /// Scores of one head in the layers `of` a range together: so many windowed ones, the others
    /// whole.
    pub fn scores(&self, model: &ModelConfig, of: Range<usize>) -> Scores {
        let all = of.len() as u128;
        let windowed = of.filter(|layer| model.window_of(*layer).is_some()).count() as u128;
        let whole = all - windowed;
        self.whole.times(whole).plus(self.windowed.times(windowed))
    }

    /// Refuses sums whose cost could come near 128 bits, so that no polynomial in these moments
    /// can overflow: none has a term above layers · (scores · H·d + rows · widest product), nor
    /// more than a few dozen of them.
    pub fn check(&self, model: &ModelConfig) -> Result<()> {
        let widest = model.hidden_size.max(model.intermediate_size).max(model.q_width()) as f64;
        let columns = widest.max(model.vocab_size as f64);
        let terms =
            self.whole.all as f64 * model.q_width() as f64 + self.rows as f64 * widest * columns;
        match 64.0 * model.num_hidden_layers as f64 * terms < 2f64.powi(126) {
            true => Ok(()),
            false => Err(Error::Overflow("this workload's operations".into()).into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_caps_each_step() {
        for width in 1..9 {
            for p in 1..12 {
                for n in 0..12 {
                    let steps: u128 = (1..=n).map(|i| (p + i).min(width)).sum();
                    assert_eq!(Sight(Some(width)).of_steps(p, n), steps);
                }
            }
        }
        assert_eq!(Sight(None).of_steps(3, 4), 4 + 5 + 6 + 7);
        assert_eq!([0, 3, 4, 9].map(|past| Sight(Some(5)).back(past)), [0, 3, 4, 4]);
    }
}
