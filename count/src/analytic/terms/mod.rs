//! Every structure as a common reference plus named terms, each computed from its own meaning.
//!
//! The reference is what this program executes for a forward pass or a generation where attention
//! is dense; for an evaluation, its forward passes; for training, three of them a micro-step. A test
//! checks that reference + terms is what [`super::count`] states independently, primitive by
//! primitive.

mod blocked;
mod formulas;
mod notebook;
mod tools;
mod training;

use std::ops::Range;

use super::{
    Structure,
    causes::{Cause, Term},
    closed_form::{choices, closed_form, draws, padding, passes, setup},
    moments::{Moments, Scores},
    notebook as notebooks,
    pieces::{times, zero},
    profilers::Profiler,
};
use crate::{
    config::{Adapted, Projection},
    error::{Error, Result},
    ledger::Phase,
    prices::{Cost, Primitives},
    tally::Tally,
    workload::{AttentionMode, Task, Workload},
};

/// What the terms of [`terms()`] are relative to.
///
/// # Errors
/// A workload that [`Workload::validate`] refuses, or a sum past 128 bits.
pub fn reference(workload: &Workload) -> Result<Cost> {
    let workload = workload.dense();
    workload.validate()?;
    match workload.task {
        Task::Forward { .. } | Task::Generate { .. } | Task::Verify { .. } => {
            closed_form(&workload)?.sum(|_, _| true)
        }
        Task::Train { .. } | Task::Evaluate { .. } => times(
            runs(&workload.task),
            executed(&workload, &total(Moments::of(&workload.task, &workload.model)))?,
        ),
    }
}

/// What `structure` counts differently from [`reference()`], cause by cause.
///
/// # Errors
/// As [`super::count`].
pub fn terms(structure: Structure, workload: &Workload) -> Result<Vec<Term>> {
    workload.validate()?;
    structure.covers(&workload.task)?;
    let m = total(Moments::of(&workload.task, &workload.model));
    let pass = Pass { workload: &workload.dense(), m };
    pass.m.check(&workload.model)?;
    let (task, model) = (&workload.task, &workload.model);
    let mut terms = match structure {
        Structure::Exact | Structure::Unpadded | Structure::ExactDense => vec![],
        Structure::Notebook => pass.notebook()?,
        Structure::SixNd => [pass.parameters(), vec![pass.scores(), pass.lora()]].concat(),
        Structure::Palm => [pass.parameters(), vec![pass.windows(), pass.lora()]].concat(),
        Structure::SixNdNoEmbedding => {
            vec![pass.vectors(), pass.head(), pass.scores(), pass.lora()]
        }
        // A tied head is the embedding, and goes with it.
        Structure::HfTrainer if model.nominally_tied() => {
            vec![pass.vectors(), pass.head(), pass.scores()]
        }
        Structure::HfTrainer => vec![pass.vectors(), pass.all_logits(), pass.scores()],
        Structure::Megatron => vec![pass.all_logits(), pass.windows(), pass.lora()],
        Structure::MegatronCausal => {
            vec![pass.all_logits(), pass.windows(), pass.lora(), pass.masked_half()]
        }
        Structure::Torch | Structure::TorchSdpa => vec![],
        Structure::TorchSdpaCpu => vec![pass.scores()],
        Structure::DeepSpeed => pass.profiled(Profiler::DeepSpeed),
        Structure::DeepSpeedSdpa => pass.profiled(Profiler::DeepSpeedSdpa),
        Structure::CalflopsSdpa => pass.profiled(Profiler::CalflopsSdpa),
        Structure::Ptflops => pass.profiled(Profiler::Ptflops),
        // A tied table is the head; one of its own is not in N.
        Structure::Torchtitan => {
            vec![pass.vectors(), pass.all_logits(), pass.windows(), pass.lora()]
        }
        Structure::MaxText => [pass.maxtext_scores(), vec![pass.lora()]].concat(),
        Structure::NemoLora => vec![pass.all_logits(), pass.windows(), pass.lora()],
        Structure::Vllm => vec![pass.last_logits(), pass.vllm_windows(), pass.lora()],
    };
    let as_executed =
        matches!(structure, Structure::Exact | Structure::Unpadded | Structure::ExactDense);
    if !as_executed && structure != Structure::Notebook {
        terms.extend(pass.no_arithmetic());
    }
    let runs = runs(task);
    let scaled = |term: Term| term.checked_mul(runs).ok_or_else(overflow);
    let mut terms = terms.into_iter().map(scaled).collect::<Result<Vec<_>, _>>()?;
    terms.extend(pass.gradients(structure)?);
    if !as_executed {
        // What runs once, not once a pass.
        terms.extend(once(structure, workload)?);
        return Ok(terms);
    }
    terms.extend(pass.beside_the_passes()?);
    if structure != Structure::ExactDense && workload.attention == AttentionMode::Blocked {
        terms.extend(pass.blocked(&total(Moments::executed(workload))));
    }
    if structure == Structure::Unpadded {
        terms.push(Term::less(Cause::Padding, padding(workload)?));
    }
    Ok(terms)
}

fn overflow() -> Error {
    Error::Overflow("this workload's operations".into())
}

/// How many forward passes a pass counts as: in training, itself and twice for its gradients.
fn runs(task: &Task) -> u128 {
    match task {
        Task::Train { .. } => 3,
        Task::Evaluate { .. }
        | Task::Forward { .. }
        | Task::Generate { .. }
        | Task::Verify { .. } => 1,
    }
}

/// All phases together: costs are linear in moments.
fn total(phases: Vec<(Phase, Moments)>) -> Moments {
    phases.into_iter().map(|(_, m)| m).fold(Moments::default(), Moments::plus)
}

/// What the executed model costs over `m`.
fn executed(workload: &Workload, m: &Moments) -> Result<Cost> {
    let mut tally = Tally::default();
    passes(&mut tally, Phase::Forward, workload, m)?;
    tally.sum(|_, _| true)
}

/// Rotary tables, and the choice of tokens.
fn once(structure: Structure, workload: &Workload) -> Result<Vec<Term>> {
    let model = &workload.model;
    if let Task::Train { .. } | Task::Evaluate { .. } = workload.task {
        return Ok(vec![]);
    }
    let mut terms = vec![Term::less(Cause::RotaryTables, tables(workload)?)];
    if let Some((sampling, steps, rows)) = choices(&workload.task) {
        let counted = match structure {
            Structure::Notebook => notebooks::draws(model, sampling, rows),
            _ => Cost::default(),
        };
        let chosen = draws(model, sampling, steps, rows).cost;
        terms.push(Term::swap(Cause::Sampling, counted, chosen));
    }
    Ok(terms)
}

/// Rotary tables of all positions.
fn tables(workload: &Workload) -> Result<Cost> {
    let mut tables = Tally::default();
    setup(&mut tables, &workload.model, workload.positions())?;
    tables.sum(|_, _| true)
}

/// Passes and the model that they run: terms of one forward pass each.
struct Pass<'a> {
    workload: &'a Workload,
    m: Moments,
}

impl Pass<'_> {
    /// L, D, F, V, H·d and K·d.
    fn sizes(&self) -> [u128; 6] {
        let model = &self.workload.model;
        [
            model.num_hidden_layers,
            model.hidden_size,
            model.intermediate_size,
            model.vocab_size,
            model.q_width(),
            model.kv_width(),
        ]
        .map(|n| n as u128)
    }

    /// Every layer.
    fn layers(&self) -> Range<usize> {
        0..self.workload.model.num_hidden_layers
    }

    /// The adapters of `projection`.
    fn adapted(&self, projection: Projection) -> Adapted {
        self.workload.lora.adapted(projection, self.layers())
    }

    /// Scores of one head in all layers.
    fn scores_of_all(&self) -> Scores {
        self.m.scores(&self.workload.model, self.layers())
    }
}

fn adds(add: u128) -> Primitives {
    Primitives { add, ..zero() }
}
