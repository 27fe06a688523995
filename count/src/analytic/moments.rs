//! What costs are linear in: sums of monomials of the lengths, over any number of passes, in
//! closed form (Σ i = n(n+1)/2, Σ i² = n(n+1)(2n+1)/6).

use std::ops::Range;

use super::blocked::{Grows, Span};
use crate::{
    config::ModelConfig,
    error::{Error, Result},
    ledger::Phase,
    workload::{AttentionMode, LOSS_ROWS, Logits, Ragged, Rows, Task, Turn, Workload},
};

/// Sums over passes of T tokens fed to each of B sequences, S = past + T held. A layer whose window
/// is W reads U = T + min(past, W − 1) keys of them.
///
/// Attention is computed for all sequences of a pass together where they are alike, and for each by
/// itself where they are not: that many times.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Moments {
    /// Σ 1
    pub passes: u128,
    /// Σ 1 over passes that give logits.
    pub head_passes: u128,
    /// Σ ⌈rows / [`LOSS_ROWS`]⌉ over passes that are scored.
    pub loss_chunks: u128,
    /// How often attention is computed.
    pub attended: u128,
    /// Of which so often into a cache.
    pub cached: u128,
    /// Of which so often for one token of each sequence; and the rows of these.
    pub alone: u128,
    pub alone_rows: u128,
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
    /// Σ B·T·min(S, W): what vLLM takes a windowed layer's scores for.
    pub within_window: u128,
}

/// Scores of one layer and one head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Scores {
    /// Σ B·T·S, of a window Σ B·T·U; of blocked attention as many of them as it computes.
    pub all: u128,
    /// Of which so many get a mask: where attention is dense, those of more than one token together.
    pub masked: u128,
    /// Products of queries and keys, that many of scores and values, and softmaxes.
    pub blocks: u128,
    /// Masks.
    pub masks: u128,
}

impl Scores {
    pub fn plus(self, other: Self) -> Self {
        Self {
            all: self.all + other.all,
            masked: self.masked + other.masked,
            blocks: self.blocks + other.blocks,
            masks: self.masks + other.masks,
        }
    }

    pub fn times(self, n: u128) -> Self {
        Self { blocks: n * self.blocks, masks: n * self.masks, ..self.of_each(n) }
    }

    /// Those of `batch` sequences together.
    fn of_each(self, batch: u128) -> Self {
        Self { all: batch * self.all, masked: batch * self.masked, ..self }
    }
}

/// Which scores are computed.
#[derive(Debug, Clone, Copy)]
struct Sight {
    /// How far windowed layers see: W, or beyond any context where the model has none.
    window: Option<u128>,
    attention: AttentionMode,
}

/// Σ min(held + i·stride, W) over i = 0 … n − 1.
fn within(window: Option<u128>, held: u128, stride: u128, n: u128) -> u128 {
    back(window.map(|width| width + 1), held, stride, n)
}

/// Σ min(past + i·stride, W − 1) over i = 0 … n − 1: how many of the keys held before each of n
/// passes their first token sees.
fn back(window: Option<u128>, past: u128, stride: u128, n: u128) -> u128 {
    let sum = |n: u128| n * past + stride * (n * n.saturating_sub(1) / 2);
    let Some(most) = window.map(|width| width - 1) else { return sum(n) };
    // So many passes come before what is held reaches W − 1.
    let growing = match most.saturating_sub(past) {
        0 => 0,
        _ if stride == 0 => n,
        gap => n.min(gap.div_ceil(stride)),
    };
    sum(growing) + (n - growing) * most
}

/// Passes that each feed `seq` tokens to every one of `batch` sequences: the first on top of `past`,
/// each later one on top of `stride` more.
#[derive(Clone, Copy)]
struct Run {
    batch: u128,
    seq: u128,
    past: u128,
    stride: u128,
    passes: u128,
}

impl Run {
    const fn once(batch: u128, seq: u128, past: u128) -> Self {
        Self { batch, seq, past, stride: 0, passes: 1 }
    }

    /// Of one token, each on top of the ones before.
    const fn steps(batch: u128, past: u128, passes: u128) -> Self {
        Self { batch, seq: 1, past, stride: 1, passes }
    }

    /// Its moments, without logits, loss or cache.
    fn moments(self, sight: Sight) -> Moments {
        let Self { batch, seq, past, stride, passes } = self;
        let (rows, more) = (batch * seq, u128::from(seq > 1));
        let scores = |window: Option<u128>| match sight.attention {
            AttentionMode::Dense => {
                let all = rows * (passes * seq + back(window, past, stride, passes));
                Scores { all, masked: more * all, blocks: passes, masks: more * passes }
            }
            AttentionMode::Blocked => {
                let past = window.map_or(past, |width| past.min(width - 1));
                let first = Span { queries: seq, past, window };
                first.sum(Grows::Past(stride), passes).of_each(batch)
            }
        };
        Moments {
            passes,
            attended: passes,
            alone: (1 - more) * passes,
            alone_rows: (1 - more) * passes * batch,
            sequences: passes * batch,
            rows: passes * rows,
            squares: passes * rows * seq,
            whole: scores(None),
            windowed: scores(sight.window),
            within_window: rows * within(sight.window, past + seq, stride, passes),
            ..Moments::default()
        }
    }
}

impl Moments {
    /// The same passes with keys and values kept.
    fn cached(self) -> Self {
        Self { cached: self.attended, ..self }
    }

    /// The same with logits of so many rows of each pass.
    fn with_logits(self, rows_of_each: u128) -> Self {
        Self { head_passes: self.passes, head_rows: self.passes * rows_of_each, ..self }
    }

    /// Passes that together feed these sequences, each by itself in attention.
    fn together(passes: u128, sequences: impl IntoIterator<Item = Self>) -> Self {
        let sum = sequences.into_iter().fold(Self::default(), Self::plus);
        Self { passes, ..sum }
    }

    /// `count` times the same.
    fn times(self, count: u128) -> Self {
        Self {
            passes: count * self.passes,
            head_passes: count * self.head_passes,
            loss_chunks: count * self.loss_chunks,
            attended: count * self.attended,
            cached: count * self.cached,
            alone: count * self.alone,
            alone_rows: count * self.alone_rows,
            sequences: count * self.sequences,
            rows: count * self.rows,
            squares: count * self.squares,
            head_rows: count * self.head_rows,
            whole: self.whole.times(count),
            windowed: self.windowed.times(count),
            within_window: count * self.within_window,
        }
    }

    /// Passes i = 0 … n − 1 over the whole context of two tokens and more, T = S = p + i·stride, with
    /// logits of so many rows each. What is fed together is scored together, whatever the window, if
    /// attention is dense.
    fn uncached(batch: u128, [p, stride, n]: [u128; 3], logits: u128, sight: Sight) -> Self {
        let pairs = n * n.saturating_sub(1) / 2; // Σ i
        let rows = batch * (n * p + stride * pairs);
        let of_i = stride * stride * (pairs * (2 * n).saturating_sub(1) / 3); // Σ (i·stride)²
        let squares = batch * (n * p * p + 2 * p * stride * pairs + of_i);
        let scores = |window| match sight.attention {
            AttentionMode::Dense => Scores { all: squares, masked: squares, blocks: n, masks: n },
            AttentionMode::Blocked => {
                let first = Span { queries: p, past: 0, window };
                first.sum(Grows::Queries(stride), n).of_each(batch)
            }
        };
        let passes = Self {
            passes: n,
            attended: n,
            sequences: batch * n,
            rows,
            squares,
            whole: scores(None),
            windowed: scores(sight.window),
            ..Self::default()
        };
        passes.with_logits(logits)
    }

    /// Steps of one token each after `p` tokens, each over its whole context.
    fn uncached_steps(batch: u128, p: u128, n: u128, sight: Sight) -> Self {
        Self::uncached(batch, [p + 1, 1, n], batch, sight)
    }

    /// All passes of a workload as they run, by phase.
    pub fn executed(workload: &Workload) -> Vec<(Phase, Self)> {
        Self::with(workload.attention, &workload.task, &workload.model)
    }

    /// The same where attention computes every score: what others count from.
    pub fn of(task: &Task, model: &ModelConfig) -> Vec<(Phase, Self)> {
        Self::with(AttentionMode::Dense, task, model)
    }

    fn with(attention: AttentionMode, task: &Task, model: &ModelConfig) -> Vec<(Phase, Self)> {
        let window = model.window.as_ref().map(|window| window.width as u128);
        let sight = Sight { window, attention };
        let wide = u128::from;
        match task {
            Task::Forward { sequences: Some(Ragged::Packed(lengths)), seq, logits, .. } => {
                let alone = |(length, count)| {
                    Run::once(1, wide(length), 0).moments(sight).times(wide(count))
                };
                let pass = Self::together(1, lengths.iter().map(alone));
                let rows = logits_of(*logits, wide(*seq), lengths.count());
                vec![(Phase::Forward, rows.map_or(pass, |rows| pass.with_logits(rows)))]
            }
            Task::Forward { batch, seq, past, logits, .. } => {
                let pass = Run::once(wide(*batch), wide(*seq), wide(*past)).moments(sight).cached();
                let rows = logits_of(*logits, wide(*batch) * wide(*seq), wide(*batch));
                vec![(Phase::Forward, rows.map_or(pass, |rows| pass.with_logits(rows)))]
            }
            Task::Verify { batch, past, drafted, accepted, rounds } => {
                let (batch, seq, passes) = (wide(*batch), 1 + wide(*drafted), wide(*rounds));
                let (past, stride) = (wide(*past), 1 + wide(*accepted));
                let run = Run { batch, seq, past, stride, passes };
                vec![(Phase::Decode, run.moments(sight).cached().with_logits(batch * seq))]
            }
            Task::Train { batch, seq, rows, .. } | Task::Evaluate { batch, seq, rows, .. } => {
                let passes = task.scored_passes();
                let all = Self::scored(rows, wide(*batch), wide(*seq), passes, sight);
                vec![(Phase::Forward, all)]
            }
            Task::Generate {
                prompts: Some(Ragged::Packed(prompts)), new_tokens, kv_cache, ..
            } => {
                let (new, batch) = (wide(*new_tokens) - 1, prompts.count());
                let each = |of: &dyn Fn(u128) -> Self| {
                    let of = |(length, count)| of(wide(length)).times(wide(count));
                    prompts.iter().map(of).fold(Self::default(), Self::plus)
                };
                let prefill = each(&|p| Run::once(1, p, 0).moments(sight));
                let decode = each(&|p| match kv_cache {
                    true => Run::steps(1, p, new).moments(sight),
                    false => Self::uncached_steps(1, p, new, sight),
                });
                let [prefill, decode] = [(prefill, 1), (decode, new)]
                    .map(|(all, passes)| Self { passes, ..all }.with_logits(batch))
                    .map(|all| if *kv_cache { all.cached() } else { all });
                vec![(Phase::Prefill, prefill), (Phase::Decode, decode)]
            }
            Task::Generate {
                batch,
                past,
                prompt_tokens,
                new_tokens,
                then,
                prefill_chunk,
                kv_cache,
                ..
            } => {
                let batch = wide(*batch);
                let chunk = prefill_chunk.map(wide);
                let mut held = wide(*past);
                let mut sums = [Self::default(); 2];
                let first = Turn { prompt_tokens: *prompt_tokens, new_tokens: *new_tokens };
                for (index, turn) in std::iter::once(&first).chain(then).enumerate() {
                    let (prompt, new) = (wide(turn.prompt_tokens), wide(turn.new_tokens) - 1);
                    // The token chosen last before is fed with the prompt that follows it.
                    let fed = prompt + u128::from(index > 0);
                    let both = match kv_cache {
                        true => [
                            Self::prefill(batch, fed, held, chunk, sight),
                            Run::steps(batch, held + fed, new)
                                .moments(sight)
                                .cached()
                                .with_logits(batch),
                        ],
                        false => {
                            let whole = held + fed;
                            let first =
                                Run::once(batch, whole, 0).moments(sight).with_logits(batch);
                            [first, Self::uncached_steps(batch, whole, new, sight)]
                        }
                    };
                    held += fed + new;
                    sums = [sums[0].plus(both[0]), sums[1].plus(both[1])];
                }
                vec![(Phase::Prefill, sums[0]), (Phase::Decode, sums[1])]
            }
        }
    }

    /// A prompt of `fed` tokens on top of `held`, in parts of at most `chunk`, of which the last
    /// gives logits.
    fn prefill(batch: u128, fed: u128, held: u128, chunk: Option<u128>, sight: Sight) -> Self {
        let seq = chunk.unwrap_or(fed);
        let full = (fed - 1) / seq;
        let run = Run { batch, seq, past: held, stride: seq, passes: full };
        let last = Run::once(batch, fed - full * seq, held + full * seq);
        run.moments(sight).plus(last.moments(sight).with_logits(batch)).cached()
    }

    /// `passes` passes with logits and a loss at every position.
    fn scored(rows: &Rows, batch: u128, seq: u128, passes: u128, sight: Sight) -> Self {
        let chunks = |rows: u128| rows.div_ceil(LOSS_ROWS as u128);
        let alike = |seq: u128, passes: u128| {
            let run = Run { batch, seq, past: 0, stride: 0, passes };
            let all = run.moments(sight).with_logits(batch * seq);
            Self { loss_chunks: passes * chunks(batch * seq), ..all }
        };
        match rows {
            Rows::Whole => alike(seq, passes),
            Rows::Padded { widths, .. } => {
                let of = |(width, passes): (u64, u64)| alike(width.into(), passes.into());
                widths.iter().map(of).fold(Self::default(), Self::plus)
            }
            Rows::Packed { passes: fed, documents } => {
                let alone = |(length, count): (u64, u64)| {
                    Run::once(1, length.into(), 0).moments(sight).times(count.into())
                };
                let all = Self::together(passes, documents.iter().map(alone));
                let (head_passes, loss_chunks) = (passes, fed.sum(chunks));
                Self { head_passes, loss_chunks, head_rows: all.rows, ..all }
            }
        }
    }

    /// What padding adds to the passes of a workload, phase by phase: rows and scores, and no pass.
    pub fn padding(workload: &Workload) -> Vec<(Phase, Self)> {
        let Workload { model, attention, task, .. } = workload;
        let Some(packed) = packed(task) else { return vec![] };
        let real = Self::with(*attention, &packed, model).into_iter().map(|(_, real)| real);
        let both = Self::executed(workload).into_iter().zip(real);
        both.map(|((phase, all), real)| (phase, all.beyond(real, *attention))).collect()
    }

    /// The rows and scores of padded passes that are not those of the sequences in them. A token by
    /// itself has no mask, but in a wider row it runs with one, and its gradients as that row's do.
    fn beyond(self, real: Self, attention: AttentionMode) -> Self {
        let scores = |all: Scores, real: Scores| {
            let padding = all.all - real.all;
            let masked = match attention {
                AttentionMode::Dense if all.masked == 0 => 0,
                AttentionMode::Dense => padding,
                AttentionMode::Blocked => all.masked - real.masked,
            };
            Scores { all: padding, masked, ..Scores::default() }
        };
        Self {
            rows: self.rows - real.rows,
            squares: self.squares - real.squares,
            head_rows: self.head_rows - real.head_rows,
            whole: scores(self.whole, real.whole),
            windowed: scores(self.windowed, real.windowed),
            ..Self::default()
        }
    }

    /// The passes of a workload without the rows and scores of padding.
    pub fn unpadded(workload: &Workload) -> Vec<(Phase, Self)> {
        let mut all = Self::executed(workload);
        for ((_, all), (_, padding)) in all.iter_mut().zip(Self::padding(workload)) {
            *all = all.less(padding);
        }
        all
    }

    /// `self` without the rows and scores of `part`.
    fn less(self, part: Self) -> Self {
        let scores = |all: Scores, part: Scores| Scores {
            all: all.all - part.all,
            masked: all.masked - part.masked,
            ..all
        };
        Self {
            rows: self.rows - part.rows,
            squares: self.squares - part.squares,
            head_rows: self.head_rows - part.head_rows,
            whole: scores(self.whole, part.whole),
            windowed: scores(self.windowed, part.windowed),
            ..self
        }
    }

    /// The same passes with nothing kept from one to the next: each runs over its whole context.
    pub fn without_cache(task: &Task, model: &ModelConfig) -> Vec<(Phase, Self)> {
        let mut task = task.clone();
        match &mut task {
            Task::Forward { seq, past, .. } => (*seq, *past) = (*seq + *past, 0),
            Task::Generate { prompt_tokens, past, kv_cache, prefill_chunk, .. } => {
                (*prompt_tokens, *past) = (*prompt_tokens + *past, 0);
                (*kv_cache, *prefill_chunk) = (false, None);
            }
            Task::Verify { batch, past, drafted, accepted, rounds } => {
                let [batch, past, fed, kept, rounds] =
                    [*batch, *past, *drafted + 1, *accepted + 1, *rounds].map(u128::from);
                let sight = Sight { window: None, attention: AttentionMode::Dense };
                let run = Self::uncached(batch, [past + fed, kept, rounds], batch * fed, sight);
                return vec![(Phase::Decode, run)];
            }
            Task::Train { .. } | Task::Evaluate { .. } => {}
        }
        Self::of(&task, model)
    }

    /// Both together.
    pub fn plus(self, other: Self) -> Self {
        Self {
            passes: self.passes + other.passes,
            head_passes: self.head_passes + other.head_passes,
            loss_chunks: self.loss_chunks + other.loss_chunks,
            attended: self.attended + other.attended,
            cached: self.cached + other.cached,
            alone: self.alone + other.alone,
            alone_rows: self.alone_rows + other.alone_rows,
            sequences: self.sequences + other.sequences,
            rows: self.rows + other.rows,
            squares: self.squares + other.squares,
            head_rows: self.head_rows + other.head_rows,
            whole: self.whole.plus(other.whole),
            windowed: self.windowed.plus(other.windowed),
            within_window: self.within_window + other.within_window,
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

/// The same sequences without padding, where a task pads some: it has their rows and scores.
fn packed(task: &Task) -> Option<Task> {
    let mut task = task.clone();
    match &mut task {
        Task::Forward { batch, seq, sequences: Some(ragged @ Ragged::Padded(_)), .. } => {
            let lengths = ragged.lengths().clone();
            (*batch, *seq) = (1, u64::try_from(lengths.tokens()).unwrap_or(u64::MAX));
            *ragged = Ragged::Packed(lengths);
        }
        Task::Generate { prompts: Some(ragged @ Ragged::Padded(_)), .. } => {
            *ragged = Ragged::Packed(ragged.lengths().clone());
        }
        Task::Train { rows, .. } | Task::Evaluate { rows, .. } => {
            let Rows::Padded { widths, lengths } = rows else { return None };
            let (passes, documents) = (widths.clone(), lengths.clone());
            *rows = Rows::Packed { passes, documents };
        }
        Task::Forward { .. } | Task::Generate { .. } | Task::Verify { .. } => return None,
    }
    Some(task)
}

/// Rows of a pass that get logits; none where the pass gives none.
fn logits_of(logits: Logits, all: u128, last: u128) -> Option<u128> {
    match logits {
        Logits::All => Some(all),
        Logits::Last => Some(last),
        Logits::None => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_caps_each_pass() {
        for width in 1..9u128 {
            for past in 0..12 {
                for stride in 0..4 {
                    for n in 0..12 {
                        let each = (0..n).map(|i| (past + i * stride).min(width - 1));
                        let sum: u128 = each.sum();
                        assert_eq!(back(Some(width), past, stride, n), sum);
                    }
                }
            }
        }
        assert_eq!(back(None, 4, 1, 4), 4 + 5 + 6 + 7);
    }
}
