//! Closed forms: the cost of a workload as a polynomial in its lengths.
//!
//! Every op of a decoder pass costs a linear combination of three monomials: 1, the rows B·T, and
//! the scores B·T·S (S = past + T, or as much of it as a window or blocks leave), for mask and head over the
//! rows that they see. So a pass, and any number of passes, of sequences alike or not, is described by the sums of these
//! monomials ([`Moments`]), and those have closed forms.

use std::ops::Range;

use super::{
    moments::{Moments, Scores},
    pieces::{only, product, times, zero},
    training::Training,
};
use crate::{
    config::{Activation, Adapted, ModelConfig, Projection, RopeScaling},
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
    of_passes(workload, Moments::executed(workload))
}

/// The same of passes that feed no padding.
pub(super) fn unpadded(workload: &Workload) -> Result<Tally> {
    workload.validate()?;
    of_passes(workload, Moments::unpadded(workload))
}

fn of_passes(workload: &Workload, phases: Vec<(Phase, Moments)>) -> Result<Tally> {
    let model = &workload.model;
    let mut tally = Tally::default();
    setup(&mut tally, model, workload.positions())?;
    for (phase, m) in phases {
        match workload.task {
            Task::Forward { .. } | Task::Generate { .. } | Task::Verify { .. } => {
                passes(&mut tally, phase, workload, &m)?;
            }
            Task::Evaluate { .. } => scored(&mut tally, workload, phase, m)?,
            Task::Train { accumulate, steps, full, clip, .. } => {
                let (accumulate, steps) = (u128::from(accumulate), u128::from(steps));
                scored(&mut tally, workload, phase, m)?;
                let training = || Training::new(workload, full, m);
                let sums = (accumulate - 1) * steps;
                tally.extend_times(sums, &training().sum_of_gradients()?)?;
                tally.extend_times(steps, &training().update(clip)?)?;
            }
        }
    }
    if let Some((sampling, steps, rows)) = choices(&workload.task) {
        let sum = draws(model, sampling, steps, rows);
        tally.add(Phase::Sampling, Component::Sampling, sum)?;
    }
    Ok(tally)
}

/// Passes of a training or an evaluation: forward with a loss, and in training their gradients.
fn scored(tally: &mut Tally, workload: &Workload, phase: Phase, m: Moments) -> Result<()> {
    let task = &workload.task;
    let (trains, full, again) = match *task {
        Task::Train { full, recompute, .. } => (true, full, recompute),
        Task::Forward { .. }
        | Task::Generate { .. }
        | Task::Verify { .. }
        | Task::Evaluate { .. } => (false, false, false),
    };
    let training = || Training::new(workload, full, m);
    body(tally, phase, workload, &m)?;
    tally.extend(training().head_and_loss(trains)?)?;
    if again {
        layers(tally, Phase::Recompute, workload, &m, training().reached())?;
    }
    if trains {
        tally.extend(training().backward()?)?;
        tally.extend(training().sums_of_readers()?)?;
    }
    Ok(())
}

/// What is executed for padding alone.
pub(super) fn padding(workload: &Workload) -> Result<Cost> {
    let mut tally = Tally::default();
    let Workload { model, task, .. } = workload;
    for (phase, m) in Moments::padding(workload) {
        match task {
            Task::Forward { .. } | Task::Generate { .. } | Task::Verify { .. } => {
                body(&mut tally, phase, workload, &m)?;
                head(&mut tally, phase, model, &m)?;
            }
            Task::Train { .. } | Task::Evaluate { .. } => scored(&mut tally, workload, phase, m)?,
        }
    }
    tally.sum(|_, _| true)
}

/// How tokens are chosen in a task that chooses some, how often, and for how many rows in all.
pub(super) fn choices(task: &Task) -> Option<(Sampling, u128, u128)> {
    match task {
        Task::Generate { batch, new_tokens, then, sampling, .. } => {
            let turns = then.iter().map(|turn| u128::from(turn.new_tokens));
            let steps = u128::from(*new_tokens) + turns.sum::<u128>();
            Some((*sampling, steps, steps * u128::from(*batch)))
        }
        Task::Verify { batch, drafted, rounds, .. } => {
            let (rounds, each) =
                (u128::from(*rounds), u128::from(*batch) * (1 + u128::from(*drafted)));
            Some((Sampling::GREEDY, rounds, rounds * each))
        }
        Task::Forward { .. } | Task::Train { .. } | Task::Evaluate { .. } => None,
    }
}

/// Tables of cos and sin: per frequency a power (div, log, mul, exp) and a reciprocal; per
/// position and frequency one mul and two trigs. Where frequencies are stretched, each costs so
/// much more; YaRN's factor is a mul for each cosine and sine besides.
pub(super) fn setup(tally: &mut Tally, model: &ModelConfig, positions: u64) -> Result<()> {
    let half = model.head_dim() as u128 / 2;
    let angles = u128::from(positions) * half;
    for rope in model.ropes() {
        // Calls beside the table's own, and of each frequency divs, adds, muls and cmps; muls of
        // each angle.
        let (calls, [div, add, mul, cmp], scale) = match rope.scaling {
            RopeScaling::Default => (0, [0; 4], 0),
            RopeScaling::Linear { .. } => (1, [1, 0, 0, 0], 0),
            RopeScaling::Llama3 { .. } => (1, [4, 3, 2, 2], 0),
            RopeScaling::Yarn { .. } => (2, [2, 3, 2, 2], 2),
        };
        let cost = only(Primitives {
            div: (2 + div) * half,
            add: add * half,
            log: half,
            exp: half,
            mul: (1 + mul) * half + (1 + scale) * angles,
            trig: 2 * angles,
            cmp: cmp * half,
            ..zero()
        });
        let sum = Sum { calls: 1 + calls, cost };
        tally.add(Phase::Setup, Component::RotaryTables, sum)?;
    }
    Ok(())
}

/// All passes of a phase.
pub(super) fn passes(
    tally: &mut Tally,
    phase: Phase,
    workload: &Workload,
    m: &Moments,
) -> Result<()> {
    if m.passes == 0 {
        return Ok(());
    }
    body(tally, phase, workload, m)?;
    head(tally, phase, &workload.model, m)
}

fn head(tally: &mut Tally, phase: Phase, model: &ModelConfig, m: &Moments) -> Result<()> {
    let (width, vocab) = (model.hidden_size as u128, model.vocab_size as u128);
    let cost = product(m.head_rows, width, vocab);
    tally.add(phase, Component::LmHead, Sum { calls: m.head_passes, cost })
}

/// The same up to the head: embedding, layers, final norm.
fn body(tally: &mut Tally, phase: Phase, workload: &Workload, m: &Moments) -> Result<()> {
    let model = &workload.model;
    layers(tally, phase, workload, m, 0..model.num_hidden_layers)?;
    let (scaled, width) = (u128::from(model.scaled_embedding), model.hidden_size as u128);
    let embedding = Primitives { mul: scaled * m.rows * width, ..zero() };
    let embedding = Sum { calls: m.passes * (1 + scaled), cost: only(embedding) };
    tally.add(phase, Component::Embedding, embedding)?;
    tally.add(phase, Component::Norm, norms(model, m.head_passes, m.head_rows, width))
}

/// The layers `of` this range alone.
pub(super) fn layers(
    tally: &mut Tally,
    phase: Phase,
    workload: &Workload,
    m: &Moments,
    of: Range<usize>,
) -> Result<()> {
    let Workload { model, lora, .. } = workload;
    m.check(model)?;
    let layers = of.len() as u128;
    let width = model.hidden_size as u128;
    for (of_layer, rows, width) in layer_norms(model) {
        let norms = norms(model, layers * of_layer * m.passes, layers * rows * m.rows, width);
        tally.add(phase, Component::Norm, norms)?;
    }
    let mut row = |component, calls, cost| tally.add(phase, component, Sum { calls, cost });

    for projection in Projection::ALL {
        let (calls, cost) = base(projection, model, m.rows);
        row(Component::Proj(projection), layers * m.passes * calls, times(layers, cost)?)?;
        if workload.dtype.is_8_bit() {
            let (calls, scales) = scaled(projection, model, m.rows);
            let cost = times(layers, only(scales))?;
            row(Component::Proj(projection), layers * m.passes * calls, cost)?;
        }
        let adapted = lora.adapted(projection, of.clone());
        if adapted.layers > 0 {
            let cost = adapters(projection, model, adapted, m.rows);
            row(Component::Lora(projection), adapted.layers * m.passes * 4, cost)?;
        }
    }
    // Two rotations, a scaling; keys and values written; by block, two products, a softmax, a mask.
    let Scores { blocks, masks, .. } = m.scores(model, of.clone());
    let calls = layers * (3 * m.attended + 2 * m.cached) + 3 * blocks + masks;
    row(Component::Attention, calls, attention(model, m, of))?;
    let inner = layers * m.rows * model.intermediate_size as u128;
    let mut glu = activation(model.activation, inner);
    glu.mul += inner;
    row(Component::Glu, 2 * layers * m.passes, only(glu))?;
    let sums = Primitives { add: 2 * layers * m.rows * width, ..zero() };
    row(Component::Residual, 2 * layers * m.passes, only(sums))
}

/// A layer's norms by their width: how many there are, and how many rows they have of each of the
/// layer's. Queries and keys have a row a head.
pub(super) fn layer_norms(model: &ModelConfig) -> Vec<(u128, u128, u128)> {
    let stream = if model.sandwich_norms { 4 } else { 2 };
    let heads = (model.num_attention_heads + model.num_key_value_heads) as u128;
    let of_stream = (stream, stream, model.hidden_size as u128);
    let of_heads = (2, heads, model.head_dim() as u128);
    if model.qk_norm { vec![of_stream, of_heads] } else { vec![of_stream] }
}

/// `calls` norms over `rows` rows in all; where a gain is stored less 1, each first adds it.
fn norms(model: &ModelConfig, calls: u128, rows: u128, width: u128) -> Sum {
    let shifts = if model.unit_offset_norms { calls } else { 0 };
    let mut cost = norm(rows, width);
    cost.other.add += shifts * width;
    Sum { calls: calls + shifts, cost }
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

/// What a projection in 8 bits takes beside its product: calls of a pass, and their cost. Each
/// output is multiplied by two scales. Of those that read one tensor, which are q, k and v, and gate
/// and up, the first has its rows quantized: a cmp and a mul an element, two divs a row.
pub(super) fn scaled(
    projection: Projection,
    model: &ModelConfig,
    rows: u128,
) -> (u128, Primitives) {
    use Projection::{DownProj, GateProj, KProj, OProj, QProj, UpProj, VProj};
    let (k, n) = projection.widths(model);
    let outputs = 2 * rows * n as u128;
    let read = rows * k as u128;
    match projection {
        KProj | VProj | UpProj => (1, Primitives { mul: outputs, ..zero() }),
        QProj | OProj | GateProj | DownProj => {
            (2, Primitives { mul: outputs + read, cmp: read, div: 2 * rows, ..zero() })
        }
    }
}

/// A, B, the scale and the sum of a projection's adapters in all layers that have one: r columns
/// from A, n from B, and a mul and an add for each of these n.
pub(super) fn adapters(
    projection: Projection,
    model: &ModelConfig,
    Adapted { layers, ranks }: Adapted,
    rows: u128,
) -> Cost {
    let (k, n) = projection.widths(model);
    let (k, n) = (k as u128, n as u128);
    let wide = rows * layers * n;
    let other = Primitives { mul: wide, add: wide, ..zero() };
    Cost { macs: rows * ranks * (k + n), outputs: rows * ranks + wide, other }
}

/// The activation of a layer's gate, of `n` elements. SiLU: neg, exp, add, div. GELU as
/// x / (1 + exp(x·(a + b·x²))): 3 muls, 2 adds, exp, div.
pub(super) fn activation(activation: Activation, n: u128) -> Primitives {
    match activation {
        Activation::Silu => Primitives { neg: n, exp: n, add: n, div: n, ..zero() },
        Activation::GeluTanh => Primitives { mul: 3 * n, add: 2 * n, exp: n, div: n, ..zero() },
    }
}

/// Attention of the layers `of` a range. H·d columns of q and K·d of k are rotated (2 muls and an
/// add each), q is scaled; per head and score: d macs for q·k, d for the values, one mask add, and softmax's
/// sub, exp, div, with one cmp and one add less than scores in each row.
fn attention(model: &ModelConfig, m: &Moments, of: Range<usize>) -> Cost {
    let (h, d) = (model.num_attention_heads as u128, model.head_dim() as u128);
    let rows = of.len() as u128 * m.rows;
    let q = rows * h * d;
    let rotated = q + rows * model.kv_width() as u128;
    let Scores { all, masked, .. } = m.scores(model, of);
    let (scores, rows) = (h * all, h * rows);
    let other = Primitives {
        mul: 2 * rotated + q,
        add: rotated + h * masked + (2 * scores - rows),
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
