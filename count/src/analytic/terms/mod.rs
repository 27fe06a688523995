//! Every structure as a common reference plus named terms, each computed from its own meaning.
//!
//! The reference is what this program executes for a forward pass or a generation; for an
//! evaluation, its forward passes; for training, three of them a micro-step. A test checks that
//! reference + terms is what [`super::count`] states independently, primitive by primitive.

mod formulas;
mod notebook;
mod training;

use std::ops::Range;

use super::{
    Structure,
    causes::{Cause, Term},
    closed_form::{closed_form, draws, passes, setup},
    moments::{Moments, Scores},
    notebook as notebooks,
    pieces::{micro_steps, times, zero},
};
use crate::{
    config::{Adapted, Projection},
    error::{Error, Result},
    ledger::Phase,
    prices::{Cost, Primitives},
    tally::Tally,
    workload::{Task, Workload},
};

/// What the terms of [`terms()`] are relative to.
///
/// # Errors
/// A workload that [`Workload::validate`] refuses, or a sum past 128 bits.
pub fn reference(workload: &Workload) -> Result<Cost> {
    workload.validate()?;
    match workload.task {
        Task::Forward { .. } | Task::Generate { .. } => closed_form(workload)?.sum(|_, _| true),
        Task::Train { .. } | Task::Evaluate { .. } => times(
            runs(&workload.task),
            executed(workload, &total(Moments::of(&workload.task, &workload.model)))?,
        ),
    }
}

/// What `structure` counts differently from [`reference()`], cause by cause.
///
/// # Errors
/// As [`super::count`].
pub fn terms(structure: Structure, workload: &Workload) -> Result<Vec<Term>> {
    workload.validate()?;
    let pass = Pass { workload, m: total(Moments::of(&workload.task, &workload.model)) };
    pass.m.check(&workload.model)?;
    let (task, model) = (&workload.task, &workload.model);
    let mut terms = match structure {
        Structure::Exact => vec![],
        Structure::Notebook => pass.notebook()?,
        Structure::SixNd => [pass.parameters(), vec![pass.scores(), pass.lora()]].concat(),
        Structure::Palm => [pass.parameters(), vec![pass.windows(), pass.lora()]].concat(),
        Structure::SixNdNoEmbedding => {
            vec![pass.vectors(), pass.head(), pass.scores(), pass.lora()]
        }
        // A tied head is the embedding, and goes with it.
        Structure::HfTrainer if model.tie_word_embeddings => {
            vec![pass.vectors(), pass.head(), pass.scores()]
        }
        Structure::HfTrainer => vec![pass.vectors(), pass.all_logits(), pass.scores()],
        Structure::Megatron => vec![pass.all_logits(), pass.windows(), pass.lora()],
        Structure::MegatronCausal => {
            vec![pass.all_logits(), pass.windows(), pass.lora(), pass.masked_half()]
        }
        Structure::Torch | Structure::TorchSdpa => vec![],
        Structure::TorchSdpaCpu => vec![pass.scores()],
    };
    if !matches!(structure, Structure::Exact | Structure::Notebook) {
        terms.extend(pass.no_arithmetic());
    }
    let runs = runs(task);
    let scaled = |term: Term| term.checked_mul(runs).ok_or_else(overflow);
    let mut terms = terms.into_iter().map(scaled).collect::<Result<Vec<_>, _>>()?;
    let of_training = pass.gradients(structure)?.into_iter();
    let scaled = |term: Term| term.checked_mul(micro_steps(task)).ok_or_else(overflow);
    terms.extend(of_training.map(scaled).collect::<Result<Vec<_>, _>>()?);
    match structure {
        Structure::Exact => terms.extend(pass.beside_the_passes()?),
        // What runs once, not once a pass.
        _ => terms.extend(once(structure, workload)?),
    }
    Ok(terms)
}

fn overflow() -> Error {
    Error::Overflow("this workload's operations".into())
}

/// Forward passes, or thirds of training, per pass of [`Moments::of`].
fn runs(task: &Task) -> u128 {
    match task {
        Task::Train { .. } => micro_steps(task).saturating_mul(3),
        Task::Evaluate { .. } => micro_steps(task),
        Task::Forward { .. } | Task::Generate { .. } => 1,
    }
}

/// All phases together: costs are linear in moments.
fn total(phases: Vec<(Phase, Moments)>) -> Moments {
    phases.into_iter().map(|(_, m)| m).fold(Moments::default(), Moments::plus)
}

/// What the executed model costs over `m`.
fn executed(workload: &Workload, m: &Moments) -> Result<Cost> {
    let mut tally = Tally::default();
    passes(&mut tally, Phase::Forward, &workload.model, &workload.lora, m)?;
    tally.sum(|_, _| true)
}

/// Rotary tables, and the choice of tokens.
fn once(structure: Structure, workload: &Workload) -> Result<Vec<Term>> {
    let model = &workload.model;
    if let Task::Train { .. } | Task::Evaluate { .. } = workload.task {
        return Ok(vec![]);
    }
    let mut terms = vec![Term::less(Cause::RotaryTables, tables(workload)?)];
    if let Task::Generate { batch, new_tokens, sampling, .. } = workload.task {
        let rows = u128::from(batch) * u128::from(new_tokens);
        let counted = match structure {
            Structure::Notebook => notebooks::draws(model, sampling, rows),
            _ => Cost::default(),
        };
        let chosen = draws(model, sampling, new_tokens.into(), rows).cost;
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
