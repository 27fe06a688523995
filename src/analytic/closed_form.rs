//! Closed forms: the cost of a workload as a polynomial in its lengths.
//!
//! Every op of a decoder pass costs a linear combination of three monomials: 1, the rows B·T, and
//! the scores B·T·S (S = past + T), for mask and head over the rows that they see. So a pass, and
//! any number of passes, is described by the sums of these monomials ([`Moments`]), and those have
//! closed forms: Σ i = n(n+1)/2, Σ i² = n(n+1)(2n+1)/6.

use crate::{
    config::{LoraConfig, ModelConfig, Projection},
    error::{Error, Result},
    ledger::Phase,
    prices::{Cost, Primitives},
    tally::{Component, Sum, Tally},
    workload::{Logits, Sampling, Task, Workload},
};

/// The cost of `workload` by phase and component, in time independent of its lengths.
///
/// # Errors
/// A workload that [`Workload::validate`] refuses, or a sum past 128 bits.
pub fn closed_form(workload: &Workload) -> Result<Tally> {
    workload.validate()?;
    let Workload { model, lora, .. } = workload;
    let mut tally = Tally::default();
    match workload.task {
        Task::Forward { batch, seq, past, logits } => {
            setup(&mut tally, model, past + seq)?;
            let moments = Moments::pass(batch.into(), seq.into(), past.into(), logits);
            passes(&mut tally, Phase::Forward, model, lora, &moments)?;
        }
        Task::Generate { batch, prompt_tokens, new_tokens, max_new_tokens, kv_cache, sampling } => {
            setup(&mut tally, model, prompt_tokens + max_new_tokens - 1)?;
            let (b, p, n) = (batch.into(), prompt_tokens.into(), u128::from(new_tokens));
            let prefill = Moments::pass(b, p, 0, Logits::Last);
            passes(&mut tally, Phase::Prefill, model, lora, &prefill)?;
            let decode = match kv_cache {
                true => Moments::cached_steps(b, p, n - 1),
                false => Moments::uncached_steps(b, p, n - 1),
            };
            passes(&mut tally, Phase::Decode, model, lora, &decode)?;
            let sum = draws(model, sampling, n, n * b);
            tally.add(Phase::Sampling, Component::Sampling, sum)?;
        }
    }
    Ok(tally)
}

/// Sums over passes of what each pass's cost is linear in.
#[derive(Debug, Clone, Copy)]
struct Moments {
    /// Σ 1
    passes: u128,
    /// Σ B·T
    rows: u128,
    /// Σ B·T·S
    scores: u128,
    /// Σ 1 over passes of more than one token: only those have a mask.
    masked_passes: u128,
    /// Σ B·T·S over the same.
    masked_scores: u128,
    /// Σ rows that reach the final norm and the head.
    head_rows: u128,
}

impl Moments {
    fn pass(batch: u128, seq: u128, past: u128, logits: Logits) -> Self {
        let rows = batch * seq;
        let scores = rows * (past + seq);
        let masked = u128::from(seq > 1);
        let head_rows = match logits {
            Logits::All => rows,
            Logits::Last => batch,
        };
        let (masked_passes, masked_scores) = (masked, masked * scores);
        Self { passes: 1, rows, scores, masked_passes, masked_scores, head_rows }
    }

    /// Steps i = 1 … n of one token each, S = p + i.
    fn cached_steps(batch: u128, p: u128, n: u128) -> Self {
        let scores = batch * (n * p + n * (n + 1) / 2);
        let rows = batch * n;
        Self { passes: n, rows, scores, masked_passes: 0, masked_scores: 0, head_rows: rows }
    }

    /// Steps i = 1 … n over the whole context, T = S = p + i, logits of the last position.
    fn uncached_steps(batch: u128, p: u128, n: u128) -> Self {
        let rows = batch * (n * p + n * (n + 1) / 2);
        let squares = n * p * p + p * n * (n + 1) + n * (n + 1) * (2 * n + 1) / 6;
        let scores = batch * squares;
        Self {
            passes: n,
            rows,
            scores,
            masked_passes: n,
            masked_scores: scores,
            head_rows: batch * n,
        }
    }

    /// Refuses sums whose cost could pass 128 bits, so that what follows cannot overflow: no term
    /// below is above 8 · layers · (scores · H·d + rows · widest product).
    fn check(&self, model: &ModelConfig) -> Result<()> {
        let widest = model.hidden_size.max(model.intermediate_size).max(model.q_width()) as f64;
        let columns = widest.max(model.vocab_size as f64);
        let terms =
            self.scores as f64 * model.q_width() as f64 + self.rows as f64 * widest * columns;
        match 8.0 * model.num_hidden_layers as f64 * terms < 2f64.powi(126) {
            true => Ok(()),
            false => Err(Error::Overflow("this workload's operations".into()).into()),
        }
    }
}

/// Tables of cos and sin: per frequency a power (div, log, mul, exp) and a reciprocal; per
/// position and frequency one mul and two trigs.
fn setup(tally: &mut Tally, model: &ModelConfig, positions: u64) -> Result<()> {
    let half = model.head_dim() as u128 / 2;
    let angles = u128::from(positions) * half;
    let other = Primitives {
        div: 2 * half,
        log: half,
        exp: half,
        mul: half + angles,
        trig: 2 * angles,
        ..Primitives::default()
    };
    let cost = Cost { other, ..Cost::default() };
    tally.add(Phase::Setup, Component::RotaryTables, Sum { calls: 1, cost })
}

/// All passes of a phase.
fn passes(
    tally: &mut Tally,
    phase: Phase,
    model: &ModelConfig,
    lora: &LoraConfig,
    m: &Moments,
) -> Result<()> {
    if m.passes == 0 {
        return Ok(());
    }
    m.check(model)?;
    let layers = model.num_hidden_layers as u128;
    let (width, vocab) = (model.hidden_size as u128, model.vocab_size as u128);
    let mut row = |component, calls, cost| tally.add(phase, component, Sum { calls, cost });

    row(Component::Embedding, m.passes, Cost::default())?;
    let normed_rows = 2 * layers * m.rows + m.head_rows;
    row(Component::Norm, (2 * layers + 1) * m.passes, norm(normed_rows, width))?;
    for projection in Projection::ALL {
        let (calls, cost) = base(projection, model, m.rows);
        row(Component::Proj(projection), layers * m.passes * calls, times(layers, cost)?)?;
        if lora.adapts(projection) {
            let cost = adapter(projection, model, lora, m.rows);
            row(Component::Lora(projection), layers * m.passes * 4, times(layers, cost)?)?;
        }
    }
    let calls = layers * (6 * m.passes + m.masked_passes);
    row(Component::Attention, calls, times(layers, attention(model, m))?)?;
    let inner = layers * m.rows * model.intermediate_size as u128;
    // SiLU: neg, exp, add, div; gate: mul.
    let swiglu =
        Primitives { neg: inner, exp: inner, add: inner, div: inner, mul: inner, ..zero() };
    row(Component::SwiGlu, 2 * layers * m.passes, only(swiglu))?;
    let sums = Primitives { add: 2 * layers * m.rows * width, ..zero() };
    row(Component::Residual, 2 * layers * m.passes, only(sums))?;
    row(Component::LmHead, m.passes, product(m.head_rows, width, vocab))
}

/// `rows` rows of k by k × n: rows·n·k muls for rows·n outputs.
fn product(rows: u128, k: u128, n: u128) -> Cost {
    Cost { macs: rows * k * n, outputs: rows * n, ..Cost::default() }
}

/// Norms: w squares and w gains, w − 1 adds and one for eps, w + 1 divs, one root a row.
fn norm(rows: u128, width: u128) -> Cost {
    let n = rows * width;
    only(Primitives { mul: 2 * n, add: n, div: n + rows, sqrt: rows, ..zero() })
}

/// A projection with its bias: calls and cost.
fn base(projection: Projection, model: &ModelConfig, rows: u128) -> (u128, Cost) {
    let (k, n) = projection.widths(model);
    let mut cost = product(rows, k as u128, n as u128);
    if projection.has_bias() {
        cost.other.add = rows * n as u128;
    }
    (1 + u128::from(projection.has_bias()), cost)
}

/// A, B, the scale and the sum.
fn adapter(projection: Projection, model: &ModelConfig, lora: &LoraConfig, rows: u128) -> Cost {
    let (k, n) = projection.widths(model);
    let (k, n, r) = (k as u128, n as u128, lora.rank as u128);
    let other = Primitives { mul: rows * n, add: rows * n, ..zero() };
    Cost { macs: rows * r * (k + n), outputs: rows * (r + n), other }
}

/// Attention of one layer. H·d columns of q and K·d of k are rotated (2 muls and an add each), q
/// is scaled; per head and score: d macs for q·k, d for the values, one mask add, and softmax's
/// sub, exp, div, with one cmp and one add less than scores in each row.
fn attention(model: &ModelConfig, m: &Moments) -> Cost {
    let (h, d) = (model.num_attention_heads as u128, model.head_dim() as u128);
    let q = m.rows * h * d;
    let rotated = q + m.rows * model.kv_width() as u128;
    let (scores, rows) = (h * m.scores, h * m.rows);
    let other = Primitives {
        mul: 2 * rotated + q,
        add: rotated + h * m.masked_scores + (2 * scores - rows),
        cmp: scores - rows,
        exp: scores,
        div: scores,
        ..zero()
    };
    Cost { macs: 2 * scores * d, outputs: scores + rows * d, other }
}

/// `steps` choices, `rows` rows in all.
fn draws(model: &ModelConfig, sampling: Sampling, steps: u128, rows: u128) -> Sum {
    let vocab = model.vocab_size as u128;
    let (mut calls, mut p) = (1, zero());
    if sampling.repeat_penalty != 1.0 {
        calls += 1;
        p.cmp += rows * vocab;
        p.mul += rows * vocab;
    }
    if sampling.temperature == 0.0 {
        p.cmp += rows * (vocab - 1);
        return Sum { calls: steps * calls, cost: only(p) };
    }
    let kept = sampling.top_k.map_or(vocab, |k| vocab.min(k as u128));
    // Temperature, softmax, then one running sum for top-p and one for the draw.
    let sums = 1 + u128::from(sampling.top_p.is_some());
    calls += 1 + sums;
    p.mul += rows * vocab + sums * rows;
    p.cmp += rows * (vocab - 1) + sums * rows * kept;
    p.add += rows * (2 * vocab - 1) + sums * rows * (kept - 1);
    p.exp += rows * vocab;
    p.div += rows * vocab;
    Sum { calls: steps * calls, cost: only(p) }
}

fn zero() -> Primitives {
    Primitives::default()
}

fn only(other: Primitives) -> Cost {
    Cost { other, ..Cost::default() }
}

fn times(layers: u128, cost: Cost) -> Result<Cost> {
    cost.checked_mul(layers).ok_or_else(|| Error::Overflow("all layers".into()).into())
}
