//! Closed forms: the cost of a workload as a polynomial in its lengths.
//!
//! Every op of a decoder pass costs a linear combination of three monomials: 1, the rows B·T, and
//! the scores B·T·S (S = past + T), for mask and head over the rows that they see. So a pass, and
//! any number of passes, is described by the sums of these monomials ([`Moments`]), and those have
//! closed forms.

use super::{
    moments::Moments,
    pieces::{only, product, times, zero},
    training::Training,
};
use crate::{
    config::{LoraConfig, ModelConfig, Projection},
    error::Result,
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
    setup(&mut tally, model, workload.positions())?;
    let phases = Moments::of(&workload.task);
    match workload.task {
        Task::Forward { .. } | Task::Generate { .. } => {
            for (phase, moments) in phases {
                passes(&mut tally, phase, model, lora, &moments)?;
            }
        }
        Task::Evaluate { passes, .. } => {
            for (phase, m) in phases {
                let mut pass = Tally::default();
                body(&mut pass, phase, model, lora, &m)?;
                pass.extend(Training::new(workload, false, m).head_and_loss(false)?)?;
                tally.extend_times(passes.into(), &pass)?;
            }
        }
        Task::Train { accumulate, steps, full, recompute, clip, .. } => {
            let (accumulate, steps) = (u128::from(accumulate), u128::from(steps));
            for (phase, m) in phases {
                let mut pass = Tally::default();
                let training = || Training::new(workload, full, m);
                body(&mut pass, phase, model, lora, &m)?;
                pass.extend(training().head_and_loss(true)?)?;
                if recompute {
                    layers(&mut pass, Phase::Recompute, model, lora, &m)?;
                }
                pass.extend(training().backward()?)?;
                pass.extend(training().sums_of_readers()?)?;
                tally.extend_times(accumulate * steps, &pass)?;
                let sums = (accumulate - 1) * steps;
                tally.extend_times(sums, &training().sum_of_gradients()?)?;
                tally.extend_times(steps, &training().update(clip)?)?;
            }
        }
    }
    if let Task::Generate { batch, new_tokens, sampling, .. } = workload.task {
        let (b, n) = (u128::from(batch), u128::from(new_tokens));
        let sum = draws(model, sampling, n, n * b);
        tally.add(Phase::Sampling, Component::Sampling, sum)?;
    }
    Ok(tally)
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
    body(tally, phase, model, lora, m)?;
    let (width, vocab) = (model.hidden_size as u128, model.vocab_size as u128);
    let cost = product(m.head_rows, width, vocab);
    tally.add(phase, Component::LmHead, Sum { calls: m.passes, cost })
}

/// The same up to the head: embedding, layers, final norm.
fn body(
    tally: &mut Tally,
    phase: Phase,
    model: &ModelConfig,
    lora: &LoraConfig,
    m: &Moments,
) -> Result<()> {
    layers(tally, phase, model, lora, m)?;
    let (calls, cost) = (m.passes, norm(m.head_rows, model.hidden_size as u128));
    tally.add(phase, Component::Embedding, Sum { calls, cost: Cost::default() })?;
    tally.add(phase, Component::Norm, Sum { calls, cost })
}

/// The layers alone.
pub(super) fn layers(
    tally: &mut Tally,
    phase: Phase,
    model: &ModelConfig,
    lora: &LoraConfig,
    m: &Moments,
) -> Result<()> {
    m.check(model)?;
    let layers = model.num_hidden_layers as u128;
    let width = model.hidden_size as u128;
    let mut row = |component, calls, cost| tally.add(phase, component, Sum { calls, cost });

    row(Component::Norm, 2 * layers * m.passes, norm(2 * layers * m.rows, width))?;
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
    row(Component::Glu, 2 * layers * m.passes, only(swiglu))?;
    let sums = Primitives { add: 2 * layers * m.rows * width, ..zero() };
    row(Component::Residual, 2 * layers * m.passes, only(sums))
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
    if model.has_bias(projection) {
        cost.other.add = rows * n as u128;
    }
    (1 + u128::from(model.has_bias(projection)), cost)
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
