//! Terms of the formulas that people quote: what counts by the number of parameters, and what is
//! no matmul.

use super::{Pass, adds};
use crate::{
    analytic::{
        causes::{Cause, Term},
        closed_form::activation,
        pieces::{macs, zero},
    },
    config::Projection,
    prices::{Cost, Primitives},
    workload::Workload,
};

impl Pass<'_> {
    /// All parameters by every token, where the head is among them: once as itself, and once more
    /// for an embedding of its own.
    pub(super) fn parameters(&self) -> Vec<Term> {
        let [_, d, _, v, ..] = self.sizes();
        let mut terms = vec![self.vectors(), self.all_logits()];
        if !self.workload.model.nominally_tied() {
            terms.push(Term::more(Cause::Embedding, macs(self.m.rows * d * v)));
        }
        terms
    }

    /// Biases, two or four gains a layer, of q and k too where they are normed, and one at the
    /// end, by every token.
    pub(super) fn vectors(&self) -> Term {
        let [layers, d, ..] = self.sizes();
        let model = &self.workload.model;
        let gains = if model.sandwich_norms { 4 * d } else { 2 * d };
        let of_heads = if model.qk_norm { 2 * model.head_dim() as u128 } else { 0 };
        let vectors = layers * (self.biases() + gains + of_heads) + d;
        Term::more(Cause::Vectors, macs(self.m.rows * vectors))
    }

    /// Elements of a layer's biases.
    pub(super) fn biases(&self) -> u128 {
        let model = &self.workload.model;
        let biased = Projection::ALL.into_iter().filter(|p| model.has_bias(*p));
        biased.map(|p| p.widths(model).1 as u128).sum()
    }

    /// The head at positions that need no logits.
    pub(super) fn all_logits(&self) -> Term {
        let [_, d, _, v, ..] = self.sizes();
        Term::more(Cause::AllLogits, macs((self.m.rows - self.m.head_rows) * d * v))
    }

    /// The head wherever it runs.
    pub(super) fn head(&self) -> Term {
        let [_, d, _, v, ..] = self.sizes();
        Term::less(Cause::Head, macs(self.m.head_rows * d * v))
    }

    /// Scores and weighted values: two products of H·d a score.
    pub(super) fn scores(&self) -> Term {
        let [_, _, _, _, q, _] = self.sizes();
        Term::less(Cause::Scores, macs(2 * self.scores_of_all().all * q))
    }

    /// The same of windowed layers, as if they saw the whole context.
    pub(super) fn windows(&self) -> Term {
        let [_, _, _, _, q, _] = self.sizes();
        let windowed = self.workload.model.windowed_layers() as u128;
        let scores = |of_layer: u128| macs(2 * windowed * of_layer * q);
        Term::swap(Cause::Windows, scores(self.m.whole.all), scores(self.m.windowed.all))
    }

    /// Half of the scores among tokens fed together: T²/2 of two products.
    pub(super) fn masked_half(&self) -> Term {
        let [layers, _, _, _, q, _] = self.sizes();
        Term::less(Cause::MaskedHalf, macs(layers * self.m.squares * q))
    }

    /// Adapters' products: r·(in + out) a token.
    pub(super) fn lora(&self) -> Term {
        let Workload { model, lora, .. } = self.workload;
        Term::less(Cause::LoraProducts, macs(self.m.rows * lora.parameters(model)))
    }

    /// What is no matmul, and the adds that sums of products do not need.
    pub(super) fn no_arithmetic(&self) -> Vec<Term> {
        let model = &self.workload.model;
        let ([layers, d, f, _, q, kv], m) = (self.sizes(), &self.m);
        let heads = model.num_attention_heads as u128;
        let of_head = self.scores_of_all();
        let (scores, rows) = (heads * of_head.all, layers * heads * m.rows);
        let (turned, inner) = (layers * m.rows * (q + kv), layers * m.rows * f);
        let mut glu = activation(model.activation, inner);
        glu.mul += inner;
        let of = |p: Projection| self.adapted(p).layers * p.widths(model).1 as u128;
        let adapted = m.rows * Projection::ALL.into_iter().map(of).sum::<u128>();
        let mut terms = self.no_norms();
        terms.extend([
            self.no_embedding_scale(),
            self.no_scales(),
            Term::none_of(Cause::Biases, adds(layers * m.rows * self.biases())),
            Term::none_of(Cause::Rotation, Primitives { mul: 2 * turned, ..adds(turned) }),
            Term::none_of(Cause::ScaledQueries, Primitives { mul: layers * m.rows * q, ..zero() }),
            Term::none_of(Cause::Mask, adds(heads * of_head.masked)),
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
            Term::none_of(Cause::Glu, glu),
            Term::none_of(Cause::Residuals, adds(2 * layers * m.rows * d)),
            Term::none_of(Cause::LoraSums, Primitives { mul: adapted, ..adds(adapted) }),
            self.first_adds(),
        ]);
        terms
    }

    /// Norms: those that every decoder has, and those that some families have besides.
    fn no_norms(&self) -> Vec<Term> {
        let ([layers, d, ..], m) = (self.sizes(), &self.m);
        let mut terms =
            vec![Term::none_of(Cause::Norms, norm(2 * layers * m.rows + m.head_rows, d))];
        terms.extend(self.no_further_norms());
        terms
    }

    /// Norms beside the two of a layer and the last, and the ones added to gains.
    pub(super) fn no_further_norms(&self) -> Vec<Term> {
        let ([layers, d, ..], m, model) = (self.sizes(), &self.m, &self.workload.model);
        // The last norm runs where there are logits.
        let (mut terms, mut gains) = (vec![], 2 * layers * d);
        if model.sandwich_norms {
            gains += 2 * layers * d;
            terms.push(Term::none_of(Cause::OuterNorms, norm(2 * layers * m.rows, d)));
        }
        if model.qk_norm {
            let heads = (model.num_attention_heads + model.num_key_value_heads) as u128;
            let width = model.head_dim() as u128;
            gains += 2 * layers * width;
            terms.push(Term::none_of(Cause::HeadNorms, norm(layers * m.rows * heads, width)));
        }
        if model.unit_offset_norms {
            let shifts = m.passes * gains + m.head_passes * d;
            terms.push(Term::none_of(Cause::GainOffset, adds(shifts)));
        }
        terms
    }

    /// √D on each element of embedded tokens, where the model has it.
    pub(super) fn no_embedding_scale(&self) -> Term {
        let [_, d, ..] = self.sizes();
        let scaled = if self.workload.model.scaled_embedding { self.m.rows * d } else { 0 };
        Term::none_of(Cause::EmbeddingScale, Primitives { mul: scaled, ..zero() })
    }

    /// Largest magnitudes, scales and quantized inputs of the layers' products, and both scales on each
    /// output, where they are in 8 bits.
    pub(super) fn no_scales(&self) -> Term {
        let [layers, d, f, _, q, kv] = self.sizes();
        if !self.workload.dtype.is_8_bit() {
            return Term::none_of(Cause::Scales, zero());
        }
        // Inputs of q, k and v, of o, of gate and up, of down; outputs of all seven.
        let (read, outputs) = (d + q + d + f, (q + 2 * kv) + d + 2 * f + d);
        let rows = layers * self.m.rows;
        let (cmp, div, mul) = (rows * read, 2 * 4 * rows, rows * (read + 2 * outputs));
        Term::none_of(Cause::Scales, Primitives { cmp, div, mul, ..zero() })
    }

    /// One add less than products in each executed sum: one an output of a matmul.
    fn first_adds(&self) -> Term {
        let model = &self.workload.model;
        let ([layers, _, _, v, q, _], m) = (self.sizes(), &self.m);
        let scores = model.num_attention_heads as u128 * self.scores_of_all().all;
        let width = |projection: Projection| {
            let (n, adapted) = (projection.widths(model).1 as u128, self.adapted(projection));
            layers * n + adapted.ranks + adapted.layers * n
        };
        let columns: u128 = Projection::ALL.into_iter().map(width).sum();
        let outputs = m.rows * (columns + layers * q) + scores + m.head_rows * v;
        Term::less(Cause::FirstAdd, Cost { outputs, ..Cost::default() })
    }
}

/// Executed norms over `rows` rows in all.
fn norm(rows: u128, width: u128) -> Primitives {
    let n = rows * width;
    Primitives { mul: 2 * n, add: n, div: n + rows, sqrt: rows, ..zero() }
}
