//! Closed forms: the cost of a workload as a polynomial in its lengths.
//!
//! Every op of a decoder pass costs a linear combination of three monomials: 1, the rows B·T, and
//! the scores B·T·S (S = past + T), for mask and head over the rows that they see. So a pass, and
//! any number of passes, is described by the sums of these monomials ([`Moments`]), and those have
//! closed forms.

use super::{
    moments::Moments,
    pieces::{only, product, times, zero},
};
use crate::{
    config::{LoraConfig, ModelConfig, Projection},
    error::{Error, Result},
    ledger::Phase,
    prices::{Cost, Primitives},
    tally::{Component, Sum, Tally},
    workload::{Sampling, Task, Workload},
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
        Task::Forward { seq, past, .. } => setup(&mut tally, model, past + seq)?,
        Task::Generate { batch, prompt_tokens, new_tokens, max_new_tokens, sampling, .. } => {
            setup(&mut tally, model, prompt_tokens + max_new_tokens - 1)?;
            let (b, n) = (u128::from(batch), u128::from(new_tokens));
            let sum = draws(model, sampling, n, n * b);
            tally.add(Phase::Sampling, Component::Sampling, sum)?;
        }
        Task::Train { .. } | Task::Evaluate { .. } => return Err(not_executed(&workload.task)),
    }
    for (phase, moments) in Moments::of(&workload.task) {
        passes(&mut tally, phase, model, lora, &moments)?;
    }
    Ok(tally)
}

/// `exact` counts what this program executes, and nothing else.
pub(super) fn not_executed(task: &Task) -> anyhow::Error {
    let why = format!("exact counts forward and generate, not {}; choose another", task.name());
    Error::flag("--structure", why).into()
}

/// Tables of cos and sin: per frequency a power (div, log, mul, exp) and a reciprocal; per
/// position and frequency one mul and two trigs.
pub(super) fn setup(tally: &mut Tally, model: &ModelConfig, positions: u64) -> Result<()> {
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
pub(super) fn passes(
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
pub(super) fn adapter(
    projection: Projection,
    model: &ModelConfig,
    lora: &LoraConfig,
    rows: u128,
) -> Cost {
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
pub(super) fn draws(model: &ModelConfig, sampling: Sampling, steps: u128, rows: u128) -> Sum {
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
