//! The notebook's formulas: a course's accounting of Qwen2.5-0.5B with LoRA, for any config.
//!
//! It writes T, D, H, d, F, V, L and r, and these assumptions: keys and values are as wide as the
//! hidden state (multi-head attention), and so are the queries; RoPE is a dense D × D product;
//! scores are divided by √d; softmax subtracts no maximum; nothing is masked and nothing cached;
//! every position gets logits, with a bias; q, k and v have biases and no norms; a layer has two
//! norms; RMSNorm adds no epsilon; the MLP's activation is SiLU; LoRA sits on q and v, whatever the
//! targets are, from a rank above 0; a training step is three forward passes; loss and optimizer
//! are free.

use super::{
    closed_form::choices,
    moments::Moments,
    pieces::{only, product, times, zero},
};
use crate::{
    config::{ModelConfig, Projection},
    error::{Error, Result},
    ledger::Phase,
    prices::{Cost, Prices, Primitives},
    tally::{Component, Sum, Tally},
    workload::{Sampling, Task, Workload},
};

/// What the notebook counts for `workload`. A generation is a closed sum over its steps; the
/// notebook knows one sequence, so a batch is as many times that.
pub(super) fn count(workload: &Workload) -> Result<Tally> {
    let Workload { model, lora, task, .. } = workload;
    let mut tally = Tally::default();
    for (phase, moments) in Moments::without_cache(task, model) {
        if moments.passes == 0 {
            continue;
        }
        moments.check(model)?;
        for (component, cost) in forward(model, lora.rank as u128, &moments)? {
            let sum = Sum { calls: 0, cost };
            tally.add(phase, component, sum)?;
            if let Task::Train { .. } = task {
                let sum = Sum { calls: 0, cost: times(2, sum.cost)? };
                tally.add(Phase::Backward, component, sum)?;
            }
        }
    }
    if let Some((sampling, _, rows)) = choices(task) {
        let cost = draws(model, sampling, rows);
        tally.add(Phase::Sampling, Component::Sampling, Sum { calls: 0, cost })?;
    }
    Ok(tally)
}

/// Forward = L layers + one RMSNorm + matmul(T,D,V) + T·V bias adds.
fn forward(model: &ModelConfig, rank: u128, m: &Moments) -> Result<Vec<(Component, Cost)>> {
    let layers = model.num_hidden_layers as u128;
    let (d, v) = (model.hidden_size as u128, model.vocab_size as u128);
    let all = |(part, cost)| Ok((part, times(layers, cost)?));
    let mut parts: Vec<_> = layer(model, rank, m).into_iter().map(all).collect::<Result<_>>()?;
    parts.push((Component::Norm, norm(m.rows, d)));
    parts.push((Component::LmHead, biased(m.rows, d, v)));
    Ok(parts)
}

/// One layer over all of `m`'s passes.
fn layer(model: &ModelConfig, rank: u128, m: &Moments) -> Vec<(Component, Cost)> {
    let (d, f) = (model.hidden_size as u128, model.intermediate_size as u128);
    let (t, n) = (m.rows, m.rows * d);
    use Projection::{DownProj, GateProj, KProj, OProj, QProj, UpProj, VProj};
    let base = |projection| Component::Proj(projection);
    let inner = t * f;
    let swiglu = Primitives { exp: inner, add: inner, div: inner, mul: inner, ..zero() };
    let mut parts = vec![
        (base(QProj), biased(t, d, d)),
        (base(KProj), biased(t, d, d)),
        (base(VProj), biased(t, d, d)),
        // RoPE on q and on k: the dense rotation matrix, zeros included.
        (Component::Attention, product(t, d, d)),
        (Component::Attention, product(t, d, d)),
        (Component::Attention, heads(model, m)),
        (base(OProj), product(t, d, d)),
        (base(GateProj), product(t, d, f)),
        (base(UpProj), product(t, d, f)),
        (base(DownProj), product(t, f, d)),
        (Component::Glu, only(swiglu)),
        (Component::Norm, norm(t, d)),
        (Component::Norm, norm(t, d)),
        (Component::Residual, only(Primitives { add: 2 * n, ..zero() })),
    ];
    if rank > 0 {
        parts.push((Component::Lora(QProj), adapter(t, d, rank)));
        parts.push((Component::Lora(VProj), adapter(t, d, rank)));
    }
    parts
}

/// A matmul and its bias adds.
fn biased(rows: u128, k: u128, n: u128) -> Cost {
    Cost { other: Primitives { add: rows * n, ..zero() }, ..product(rows, k, n) }
}

/// Per head: matmul(T,d,T); T² divs; softmax of T² exps, T(T−1) adds, T² divs; matmul(T,T,d). And
/// one root a block, of each sequence.
fn heads(model: &ModelConfig, m: &Moments) -> Cost {
    let (h, d) = (model.num_attention_heads as u128, model.head_dim() as u128);
    let (squares, rows) = (h * m.squares, h * m.rows);
    let other = Primitives {
        div: 2 * squares,
        exp: squares,
        add: squares - rows,
        sqrt: m.sequences,
        ..zero()
    };
    Cost { macs: 2 * squares * d, outputs: squares + rows * d, other }
}

/// RMSNorm: 2·T·D muls, T(D−1) adds, T(D+1) divs, T roots.
fn norm(rows: u128, d: u128) -> Cost {
    let n = rows * d;
    only(Primitives { mul: 2 * n, add: n - rows, div: n + rows, sqrt: rows, ..zero() })
}

/// matmul(T,D,r) + matmul(T,r,D) + T·D muls (scale) + T·D adds (sum).
fn adapter(rows: u128, d: u128, rank: u128) -> Cost {
    let n = rows * d;
    let other = Primitives { mul: n, add: n, ..zero() };
    Cost { macs: 2 * n * rank, outputs: rows * rank + n, other }
}

/// Choosing tokens: nothing where greedy, V exps + (V−1) adds + V divs where stochastic.
pub(super) fn draws(model: &ModelConfig, sampling: Sampling, rows: u128) -> Cost {
    if sampling.temperature == 0.0 {
        return Cost::default();
    }
    let n = rows * model.vocab_size as u128;
    only(Primitives { exp: n, add: n - rows, div: n, ..zero() })
}

/// A row of the notebook's table of a forward pass.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct TableRow {
    /// Its name there.
    pub name: String,
    /// Priced additions, multiplications, divisions, exponentiations and square roots.
    pub flops: [u128; 5],
    /// Their sum.
    pub total: u128,
    /// Whether the notebook leaves its square roots and its total blank.
    #[serde(skip)]
    pub blank_end: bool,
}

/// The notebook's own table: one layer by block, then the whole pass. None for other tasks, and
/// under prices of whole multiply-accumulates, which have no column.
///
/// # Errors
/// As [`super::count`].
pub fn table(workload: &Workload, prices: &Prices) -> Result<Option<Vec<TableRow>>> {
    workload.validate()?;
    let Workload { model, lora, task: task @ Task::Forward { .. }, .. } = workload else {
        return Ok(None);
    };
    if prices.mac.is_some() {
        return Ok(None);
    }
    let rank = lora.rank as u128;
    let mut rows = vec![];
    for (_, m) in Moments::without_cache(task, model) {
        m.check(model)?;
        let layer = layer(model, rank, &m);
        let mut row = |name: &str, parts: &[(Component, Cost)], keep: fn(Component) -> bool| {
            let kept = parts.iter().filter(|(part, _)| keep(*part));
            rows.push(table_row(name, kept.map(|(_, cost)| cost), prices)?);
            Ok::<_, anyhow::Error>(())
        };
        row("Single Attention Block", &layer, in_attention)?;
        row("Single MLP Block", &layer, in_mlp)?;
        let rest = |part| matches!(part, Component::Norm | Component::Residual);
        row("RMS, Residual etc", &layer, rest)?;
        row(&format!("Single Transformer Layer (r={rank})"), &layer, |_| true)?;
        if rank > 0 {
            let adapters = |part| matches!(part, Component::Lora(_));
            row(&format!("LoRA cost in this Layer, r={rank}"), &layer, adapters)?;
        }
        row("Full Forward Pass", &forward(model, rank, &m)?, |_| true)?;
    }
    if let Some(last) = rows.last_mut() {
        last.blank_end = true;
    }
    Ok(Some(rows))
}

fn in_attention(part: Component) -> bool {
    match part {
        Component::Proj(projection) => projection.parent() == "self_attn",
        part => part == Component::Attention,
    }
}

fn in_mlp(part: Component) -> bool {
    match part {
        Component::Proj(projection) => projection.parent() == "mlp",
        part => part == Component::Glu,
    }
}

fn table_row<'a>(
    name: &str,
    costs: impl Iterator<Item = &'a Cost>,
    prices: &Prices,
) -> Result<TableRow> {
    let overflow = || Error::Overflow(name.into());
    let mut sum = Primitives::default();
    costs.for_each(|cost| sum += cost.primitives());
    let cells = [
        (sum.add, prices.add),
        (sum.mul, prices.mul),
        (sum.div, prices.div),
        (sum.exp, prices.exp),
        (sum.sqrt, prices.sqrt),
    ];
    let mut flops = [0; 5];
    for (cell, (n, price)) in flops.iter_mut().zip(cells) {
        *cell = n.checked_mul(price.into()).ok_or_else(overflow)?;
    }
    let total = flops.iter().try_fold(0u128, |sum, n| sum.checked_add(*n)).ok_or_else(overflow)?;
    Ok(TableRow { name: name.into(), flops, total, blank_end: false })
}
