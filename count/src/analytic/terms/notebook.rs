//! Terms of the notebook's formulas.

use super::{Pass, adds, executed, overflow, total};
use crate::{
    analytic::{
        causes::{Cause, Term},
        closed_form::adapters,
        moments::Moments,
        pieces::{only, product, times, zero},
    },
    config::{Activation, Adapted, Projection},
    error::Result,
    prices::{Cost, Primitives},
    workload::Workload,
};

impl Pass<'_> {
    /// From what is executed to what the notebook assumes: first every pass over its whole
    /// context, then logits everywhere, then module by module.
    pub(super) fn notebook(&self) -> Result<Vec<Term>> {
        let Workload { model, lora, task, .. } = self.workload;
        let uncached = total(Moments::without_cache(task, model));
        uncached.check(model)?;
        let recomputed = executed(self.workload, &uncached)?;
        let cached = executed(self.workload, &self.m)?;
        let whole = Pass { workload: self.workload, m: uncached };
        let m = uncached;

        let [layers, d, f, v, q, kv] = self.sizes();
        let t = m.rows;
        let heads = model.num_attention_heads as u128;
        let bias = |n| if model.bias.qkv { t * n } else { 0 };
        let with_bias = |n| Cost { other: adds(bias(n)), ..product(t, d, n) };
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
            Term::none_of(Cause::Mask, adds(heads * m.whole.masked)),
            notebook_activation(model.activation, t * f),
            Term::none_of(Cause::Epsilon, adds(2 * t)),
        ];
        each_layer.extend(self.notebook_biases(t));
        let mut terms = each_layer
            .into_iter()
            .map(|term| term.checked_mul(layers).ok_or_else(overflow))
            .collect::<Result<Vec<_>, _>>()?;
        if lora.rank > 0 {
            terms.extend(self.notebook_lora(t)?);
        }
        terms.extend([
            Term::swap(Cause::NoCache, recomputed, cached),
            whole.all_logits_and_norms(),
            Term::none_of(Cause::Epsilon, adds(t)),
            Term::more(Cause::HeadBias, only(adds(t * v))),
            whole.no_embedding_scale(),
            whole.no_scales(),
        ]);
        terms.extend(whole.no_further_norms());
        Ok(terms)
    }

    /// A layer's biases: counted on q, k and v, there or not, and nowhere else.
    fn notebook_biases(&self, t: u128) -> Vec<Term> {
        let [_, d, f, ..] = self.sizes();
        let bias = self.workload.model.bias;
        let elsewhere = u128::from(bias.o) * d + u128::from(bias.mlp) * (2 * f + d);
        let mut terms = vec![Term::none_of(Cause::Biases, adds(t * elsewhere))];
        if !bias.qkv {
            terms.push(Term::more(Cause::AssumedBiases, only(adds(3 * t * d))));
        }
        terms
    }

    /// Adapters: on q and v of every layer whatever the targets are, of one rank, each D wide.
    fn notebook_lora(&self, t: u128) -> Result<Vec<Term>> {
        let Workload { model, lora, .. } = self.workload;
        let [layers, d, ..] = self.sizes();
        let r = lora.rank as u128;
        let everywhere = Adapted { layers, ranks: layers * r };
        let wide = Cost { other: Primitives { mul: t * d, ..adds(t * d) }, ..Cost::default() };
        let wide = Cost { macs: 2 * t * d * r, outputs: t * (r + d), ..wide };
        let wide = times(layers, wide)?;
        let elsewhere = Projection::ALL.into_iter().filter_map(|projection| {
            let counted = match projection {
                Projection::QProj | Projection::VProj => everywhere,
                Projection::KProj
                | Projection::OProj
                | Projection::GateProj
                | Projection::UpProj
                | Projection::DownProj => Adapted::default(),
            };
            let executed = self.adapted(projection);
            let cost = |adapted| adapters(projection, model, adapted, t);
            let term = || Term::swap(Cause::LoraTargets, cost(counted), cost(executed));
            (counted != executed).then(term)
        });
        let width =
            |cause, projection| Term::swap(cause, wide, adapters(projection, model, everywhere, t));
        let widths = [
            width(Cause::QueryWidth, Projection::QProj),
            width(Cause::LoraWidth, Projection::VProj),
        ];
        Ok(elsewhere.chain(widths).collect())
    }

    /// The same as executed: the final norm before it, and no first add.
    fn all_logits_and_norms(&self) -> Term {
        let [_, d, _, v, ..] = self.sizes();
        let rows = self.m.rows - self.m.head_rows;
        let n = rows * d;
        let norm = Primitives { mul: 2 * n, add: n, div: n + rows, sqrt: rows, ..zero() };
        Term::more(Cause::AllLogits, Cost { other: norm, ..product(rows, d, v) })
    }
}

/// The gate's activation of `n` elements: exp, add and div of SiLU, whatever it is.
fn notebook_activation(activation: Activation, n: u128) -> Term {
    let silu = Primitives { exp: n, add: n, div: n, ..zero() };
    match activation {
        Activation::Silu => Term::none_of(Cause::SiluSign, Primitives { neg: n, ..zero() }),
        Activation::GeluTanh => Term::swap(
            Cause::Gelu,
            only(silu),
            only(Primitives { mul: 3 * n, add: 2 * n, exp: n, div: n, ..zero() }),
        ),
    }
}
