//! Every structure as a common reference plus named terms, each computed from its own meaning.
//!
//! The reference is what this program executes for a forward pass or a generation; for an
//! evaluation, its forward passes; for training, three of them a micro-step. A test checks that
//! reference + terms is what [`super::count`] states independently, primitive by primitive.

use super::{
    Structure,
    causes::{Cause, Term},
    closed_form::{adapter, closed_form, draws, layers, passes, setup},
    moments::Moments,
    notebook,
    pieces::{macs, micro_steps, only, product, times, zero},
    training::Training,
};
use crate::{
    config::Projection,
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
        Task::Train { .. } | Task::Evaluate { .. } => {
            times(runs(&workload.task), executed(workload, &total(Moments::of(&workload.task)))?)
        }
    }
}

/// What `structure` counts differently from [`reference()`], cause by cause.
///
/// # Errors
/// As [`super::count`].
pub fn terms(structure: Structure, workload: &Workload) -> Result<Vec<Term>> {
    workload.validate()?;
    let pass = Pass { workload, m: total(Moments::of(&workload.task)) };
    pass.m.check(&workload.model)?;
    let (task, model) = (&workload.task, &workload.model);
    let mut terms = match structure {
        Structure::Exact => vec![],
        Structure::Notebook => pass.notebook()?,
        Structure::SixNd => [pass.parameters(), vec![pass.scores(), pass.lora()]].concat(),
        Structure::Palm => [pass.parameters(), vec![pass.lora()]].concat(),
        Structure::SixNdNoEmbedding => {
            vec![pass.vectors(), pass.head(), pass.scores(), pass.lora()]
        }
        // A tied head is the embedding, and goes with it.
        Structure::HfTrainer if model.tie_word_embeddings => {
            vec![pass.vectors(), pass.head(), pass.scores()]
        }
        Structure::HfTrainer => vec![pass.vectors(), pass.all_logits(), pass.scores()],
        Structure::Megatron => vec![pass.all_logits(), pass.lora()],
        Structure::MegatronCausal => vec![pass.all_logits(), pass.lora(), pass.masked_half()],
        Structure::Torch => vec![],
    };
    if !matches!(structure, Structure::Exact | Structure::Notebook) {
        terms.extend(pass.no_arithmetic());
    }
    let runs = runs(task);
    let scaled = |term: Term| term.checked_mul(runs).ok_or_else(overflow);
    let mut terms = terms.into_iter().map(scaled).collect::<Result<Vec<_>, _>>()?;
    let by_gradient = matches!(structure, Structure::Exact | Structure::Torch);
    if let (true, Task::Train { full: false, .. }) = (by_gradient, task) {
        for term in [pass.frozen_weights(), pass.below_adapters()] {
            terms.push(term.checked_mul(micro_steps(task)).ok_or_else(overflow)?);
        }
    }
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
            Structure::Notebook => notebook::draws(model, sampling, rows),
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

    /// From what is executed to what the notebook assumes: first every pass over its whole
    /// context, then logits everywhere, then module by module.
    fn notebook(&self) -> Result<Vec<Term>> {
        let Workload { model, lora, task, .. } = self.workload;
        let uncached = total(Moments::without_cache(task));
        uncached.check(model)?;
        let recomputed = executed(self.workload, &uncached)?;
        let cached = executed(self.workload, &self.m)?;
        let whole = Pass { workload: self.workload, m: uncached };
        let m = uncached;

        let [layers, d, f, v, q, kv] = self.sizes();
        let (t, rank) = (m.rows, lora.rank as u128);
        let heads = model.num_attention_heads as u128;
        let with_bias = |n| Cost { other: adds(t * n), ..product(t, d, n) };
        let both = |a: Cost, b: Cost| a.checked_add(b).ok_or_else(overflow);

        let wide_q = both(with_bias(d), product(t, d, d))?;
        let true_q = both(with_bias(q), product(t, q, d))?;
        let rotated = t * (q + kv);
        let scaled = Primitives { div: heads * m.squares, sqrt: m.sequences, ..zero() };
        let maximum =
            Primitives { add: heads * m.squares, cmp: heads * (m.squares - m.rows), ..zero() };
        let rotation = Primitives { mul: 2 * rotated, add: rotated, ..zero() };
        let mut each_layer = vec![
            Term::swap(
                Cause::MultiHead,
                both(with_bias(d), with_bias(d))?,
                both(with_bias(kv), with_bias(kv))?,
            ),
            Term::swap(Cause::QueryWidth, wide_q, true_q),
            Term::swap(Cause::DenseRope, both(product(t, d, d), product(t, d, d))?, only(rotation)),
            Term::swap(
                Cause::ScaledScores,
                only(scaled),
                only(Primitives { mul: t * q, ..zero() }),
            ),
            Term::none_of(Cause::SoftmaxMax, maximum),
            Term::none_of(Cause::Mask, adds(heads * m.masked_scores)),
            Term::none_of(Cause::SiluSign, Primitives { neg: t * f, ..zero() }),
            Term::none_of(Cause::Epsilon, adds(2 * t)),
        ];
        if rank > 0 {
            each_layer.extend(self.notebook_lora(t));
        }
        let mut terms = each_layer
            .into_iter()
            .map(|term| term.checked_mul(layers).ok_or_else(overflow))
            .collect::<Result<Vec<_>, _>>()?;
        terms.extend([
            Term::swap(Cause::NoCache, recomputed, cached),
            whole.all_logits_and_norms(),
            Term::none_of(Cause::Epsilon, adds(t)),
            Term::more(Cause::HeadBias, only(adds(t * v))),
        ]);
        Ok(terms)
    }

    /// A layer's adapters: on q and v whatever the targets are, each D wide.
    fn notebook_lora(&self, t: u128) -> Vec<Term> {
        let Workload { model, lora, .. } = self.workload;
        let (d, r) = (model.hidden_size as u128, lora.rank as u128);
        let wide = Cost { other: Primitives { mul: t * d, ..adds(t * d) }, ..Cost::default() };
        let wide = Cost { macs: 2 * t * d * r, outputs: t * (r + d), ..wide };
        let elsewhere = Projection::ALL.into_iter().filter_map(|projection| {
            let here = adapter(projection, model, lora, t);
            let counted = matches!(projection, Projection::QProj | Projection::VProj);
            match (counted, lora.adapts(projection)) {
                (true, false) => Some(Term::more(Cause::LoraTargets, here)),
                (false, true) => Some(Term::less(Cause::LoraTargets, here)),
                (true, true) | (false, false) => None,
            }
        });
        let width =
            |cause, projection| Term::swap(cause, wide, adapter(projection, model, lora, t));
        let widths = [
            width(Cause::QueryWidth, Projection::QProj),
            width(Cause::LoraWidth, Projection::VProj),
        ];
        elsewhere.chain(widths).collect()
    }

    /// All parameters by every token, where the head is among them: once as itself, and once more
    /// for an embedding of its own.
    fn parameters(&self) -> Vec<Term> {
        let [_, d, _, v, ..] = self.sizes();
        let mut terms = vec![self.vectors(), self.all_logits()];
        if !self.workload.model.tie_word_embeddings {
            terms.push(Term::more(Cause::Embedding, macs(self.m.rows * d * v)));
        }
        terms
    }

    /// Biases of q, k and v, two gains a layer and one at the end, by every token.
    fn vectors(&self) -> Term {
        let [layers, d, _, _, q, kv] = self.sizes();
        let vectors = layers * (q + 2 * kv + 2 * d) + d;
        Term::more(Cause::Vectors, macs(self.m.rows * vectors))
    }

    /// The head at positions that need no logits.
    fn all_logits(&self) -> Term {
        let [_, d, _, v, ..] = self.sizes();
        Term::more(Cause::AllLogits, macs((self.m.rows - self.m.head_rows) * d * v))
    }

    /// The same as executed: the final norm before it, and no first add.
    fn all_logits_and_norms(&self) -> Term {
        let [_, d, _, v, ..] = self.sizes();
        let rows = self.m.rows - self.m.head_rows;
        let n = rows * d;
        let norm = Primitives { mul: 2 * n, add: n, div: n + rows, sqrt: rows, ..zero() };
        Term::more(Cause::AllLogits, Cost { other: norm, ..product(rows, d, v) })
    }

    /// The head wherever it runs.
    fn head(&self) -> Term {
        let [_, d, _, v, ..] = self.sizes();
        Term::less(Cause::Head, macs(self.m.head_rows * d * v))
    }

    /// Scores and weighted values: two products of H·d a score.
    fn scores(&self) -> Term {
        let [layers, _, _, _, q, _] = self.sizes();
        Term::less(Cause::Scores, macs(2 * layers * self.m.scores * q))
    }

    /// Half of the scores among tokens fed together: T²/2 of two products.
    fn masked_half(&self) -> Term {
        let [layers, _, _, _, q, _] = self.sizes();
        Term::less(Cause::MaskedHalf, macs(layers * self.m.squares * q))
    }

    /// Adapters' products: r·(in + out) a token.
    fn lora(&self) -> Term {
        let Workload { model, lora, .. } = self.workload;
        Term::less(Cause::LoraProducts, macs(self.m.rows * lora.parameters(model)))
    }

    /// What is no matmul, and the adds that sums of products do not need.
    fn no_arithmetic(&self) -> Vec<Term> {
        let Workload { model, lora, .. } = self.workload;
        let ([layers, d, f, _, q, kv], m) = (self.sizes(), &self.m);
        let heads = model.num_attention_heads as u128;
        let (scores, rows) = (layers * heads * m.scores, layers * heads * m.rows);
        let normed = 2 * layers * m.rows + m.head_rows;
        let (n, turned, inner) = (normed * d, layers * m.rows * (q + kv), layers * m.rows * f);
        let targets = Projection::ALL.into_iter().filter(|p| lora.adapts(*p));
        let adapted: u128 = targets.map(|p| p.widths(model).1 as u128).sum();
        let adapted = layers * m.rows * adapted;
        vec![
            Term::none_of(Cause::Biases, adds(layers * m.rows * (q + 2 * kv))),
            Term::none_of(
                Cause::Norms,
                Primitives { mul: 2 * n, add: n, div: n + normed, sqrt: normed, ..zero() },
            ),
            Term::none_of(Cause::Rotation, Primitives { mul: 2 * turned, ..adds(turned) }),
            Term::none_of(Cause::ScaledQueries, Primitives { mul: layers * m.rows * q, ..zero() }),
            Term::none_of(Cause::Mask, adds(layers * heads * m.masked_scores)),
            Term::none_of(
                Cause::Softmax,
                Primitives {
                    cmp: scores - rows,
                    add: 2 * scores - rows,
                    exp: scores,
                    div: scores,
                    ..zero()
                },
            ),
            Term::none_of(
                Cause::Glu,
                Primitives { neg: inner, exp: inner, add: inner, div: inner, mul: inner, ..zero() },
            ),
            Term::none_of(Cause::Residuals, adds(2 * layers * m.rows * d)),
            Term::none_of(Cause::LoraSums, Primitives { mul: adapted, ..adds(adapted) }),
            self.first_adds(),
        ]
    }

    /// One add less than products in each executed sum: one an output of a matmul.
    fn first_adds(&self) -> Term {
        let Workload { model, lora, .. } = self.workload;
        let ([layers, _, _, v, q, _], m) = (self.sizes(), &self.m);
        let width = |projection: Projection| {
            let n = projection.widths(model).1 as u128;
            let adapter = if lora.adapts(projection) { lora.rank as u128 + n } else { 0 };
            n + adapter
        };
        let columns: u128 = Projection::ALL.into_iter().map(width).sum();
        let attention = model.num_attention_heads as u128 * m.scores + m.rows * q;
        let outputs = layers * (m.rows * columns + attention) + m.head_rows * v;
        Term::less(Cause::FirstAdd, Cost { outputs, ..Cost::default() })
    }

    /// Weight gradients that a frozen base does not need: one product for each of its matrices.
    fn frozen_weights(&self) -> Term {
        let [layers, d, f, v, q, kv] = self.sizes();
        let matrices = layers * (2 * d * (q + kv) + 3 * d * f) + d * v;
        Term::less(Cause::FrozenWeights, macs(self.m.rows * matrices))
    }

    /// What a training or an evaluation executes beside forward passes, and in place of two more
    /// of them: gradients op by op, their sums, loss, update.
    fn beside_the_passes(&self) -> Result<Vec<Term>> {
        let Workload { model, lora, task, .. } = self.workload;
        let training = |full| Training::new(self.workload, full, self.m);
        let runs = micro_steps(task);
        let all = |tally: Tally, n| times(n, tally.sum(|_, _| true)?);
        let is_loss = |phase, _| phase == Phase::Loss;
        let (trains, full) = match *task {
            Task::Forward { .. } | Task::Generate { .. } => return Ok(vec![]),
            Task::Evaluate { .. } => (false, false),
            Task::Train { full, .. } => (true, full),
        };
        let head = training(full).head_and_loss(trains)?;
        let mut terms = vec![
            Term::more(Cause::RotaryTables, tables(self.workload)?),
            Term::more(Cause::Loss, times(runs, head.sum(is_loss)?)?),
        ];
        let Task::Train { accumulate, steps, recompute, clip, .. } = *task else {
            return Ok(terms);
        };
        let towards = |phase, _| !matches!(phase, Phase::Loss | Phase::Forward);
        let backward = training(full).backward()?.sum(|_, _| true)?;
        let backward = backward.checked_add(head.sum(towards)?).ok_or_else(overflow)?;
        let backward = times(runs, backward)?;
        let twice = times(runs, times(2, executed(self.workload, &self.m)?)?)?;
        // The products themselves are those of the forward pass, less what is not needed.
        let outputs = |cost: &Cost| Cost { outputs: cost.outputs, ..Cost::default() };
        let sums = training(full).sum_of_gradients()?;
        let again = (u128::from(accumulate) - 1) * u128::from(steps);
        let readers = all(training(full).sums_of_readers()?, runs)?;
        terms.extend([
            Term::swap(Cause::ShorterSums, outputs(&backward), outputs(&twice)),
            Term::swap(Cause::Derivatives, only(backward.other), only(twice.other)),
            Term::more(Cause::SumsOfReaders, readers),
            Term::more(Cause::Accumulation, all(sums, again)?),
            Term::more(Cause::Optimizer, all(training(full).update(clip)?, steps.into())?),
        ]);
        if recompute {
            let mut tally = Tally::default();
            layers(&mut tally, Phase::Recompute, model, lora, &self.m)?;
            terms.push(Term::more(Cause::Recompute, all(tally, runs)?));
        }
        Ok(terms)
    }

    /// In the lowest layer, gradients towards activations that no adapter has touched yet.
    fn below_adapters(&self) -> Term {
        let Workload { model, lora, .. } = self.workload;
        let [_, _, _, _, q, _] = self.sizes();
        use Projection::{DownProj, GateProj, KProj, OProj, QProj, UpProj, VProj};
        let touched = |projections: &[Projection]| projections.iter().any(|p| lora.adapts(*p));
        let before = |projection| match projection {
            QProj | KProj | VProj => false,
            OProj => touched(&[QProj, KProj, VProj]),
            GateProj | UpProj => touched(&[QProj, KProj, VProj, OProj]),
            DownProj => touched(&[QProj, KProj, VProj, OProj, GateProj, UpProj]),
        };
        // Towards the input of the projection, and of its adapter's A.
        let skipped = Projection::ALL.into_iter().filter(|p| !before(*p)).map(|projection| {
            let (k, n) = projection.widths(model);
            let adapter = if lora.adapts(projection) { lora.rank } else { 0 };
            self.m.rows * (k * (n + adapter)) as u128
        });
        // Of attention: towards queries, keys, weights (from queries and keys) and values.
        let sides =
            [touched(&[QProj]), touched(&[KProj]), touched(&[QProj, KProj]), touched(&[VProj])];
        let untouched = sides.into_iter().filter(|touched| !touched).count() as u128;
        let skipped = skipped.sum::<u128>() + untouched * self.m.scores * q;
        Term::less(Cause::BelowAdapters, macs(skipped))
    }
}

fn adds(add: u128) -> Primitives {
    Primitives { add, ..zero() }
}
