//! Terms of training and serving frameworks' own counts, and of profilers.

use super::{Pass, adds};
use crate::{
    analytic::{
        causes::{Cause, Term},
        formulas::{maxtext_layers, maxtext_scores},
        pieces::{macs, only, zero},
        profilers::Profiler,
    },
    config::Activation,
    prices::Primitives,
};

impl Pass<'_> {
    /// Softmax and SiLU as one operation an element, and biases, where `profiler` counts them; no
    /// products of attention where it does not.
    pub(super) fn profiled(&self, profiler: Profiler) -> Vec<Term> {
        let [products, softmax, biases] = profiler.sees();
        let model = &self.workload.model;
        let [layers, _, f, ..] = self.sizes();
        let scores = model.num_attention_heads as u128 * self.scores_of_all().all;
        let activated = match model.activation {
            Activation::Silu => layers * self.m.rows * f,
            Activation::GeluTanh => 0,
        };
        let exp = activated + if softmax { scores } else { 0 };
        let mut terms = vec![Term::more(Cause::OneEach, only(Primitives { exp, ..zero() }))];
        if biases {
            let added = adds(layers * self.m.rows * self.biases());
            terms.push(Term::more(Cause::Biases, only(added)));
        }
        if !products {
            terms.push(self.scores());
        }
        terms
    }

    /// Half of the scores of layers that MaxText takes for global, and of the others what a window
    /// shows.
    pub(super) fn maxtext_scores(&self) -> Vec<Term> {
        let [_, _, _, _, q, _] = self.sizes();
        let [global, local] = maxtext_layers(&self.workload.model);
        let [counted, executed] = maxtext_scores(&self.workload.model, &self.m);
        vec![
            Term::less(Cause::MaskedHalf, macs(global * self.m.squares * q)),
            Term::swap(Cause::WithinWindows, macs(local * counted * q), macs(local * executed * q)),
        ]
    }

    /// The head over one position a sequence and pass.
    pub(super) fn last_logits(&self) -> Term {
        let [_, d, _, v, ..] = self.sizes();
        let head = |rows: u128| macs(rows * d * v);
        Term::swap(Cause::LastLogits, head(self.m.sequences), head(self.m.head_rows))
    }

    /// Windowed layers as vLLM scores them.
    pub(super) fn vllm_windows(&self) -> Term {
        let [_, _, _, _, q, _] = self.sizes();
        let windowed = self.workload.model.windowed_layers() as u128;
        let scores = |of_layer: u128| macs(2 * windowed * of_layer * q);
        Term::swap(Cause::WithinWindows, scores(self.m.within_window), scores(self.m.windowed.all))
    }
}
