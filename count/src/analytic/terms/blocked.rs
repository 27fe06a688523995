//! Terms of blocked attention: scores that it does not compute, and those that it computes again.

use std::ops::Range;

use super::Pass;
use crate::{
    analytic::{
        causes::{Cause, Term},
        moments::{Moments, Scores},
        pieces::{only, zero},
        training::Training,
    },
    prices::{Cost, Primitives},
    workload::Task,
};

impl Pass<'_> {
    /// What is executed over `blocked` in place of these passes with every score computed.
    pub(super) fn blocked(&self, blocked: &Moments) -> Vec<Term> {
        let heads = self.workload.model.num_attention_heads as u128;
        let of = |m: &Moments, layers: &Range<usize>| {
            let Scores { all, masked, .. } = m.scores(&self.workload.model, layers.clone());
            [heads * all, heads * masked]
        };
        let skipped = |layers: &Range<usize>| {
            let [all, few] = [of(&self.m, layers), of(blocked, layers)];
            [all[0] - few[0], all[1] - few[1]]
        };
        let mut terms = vec![self.skipped_forward(skipped(&self.layers()))];
        let Task::Train { full, recompute, .. } = self.workload.task else { return terms };
        let training = Training::new(self.workload, full, self.m);
        if recompute {
            terms.push(self.skipped_forward(skipped(&training.reached())));
        }
        for (layers, wanted) in training.towards_attention() {
            terms.push(self.skipped_backward(skipped(&layers), wanted));
            // A token by itself has one score a head, and its gradients as ever.
            let alone = heads * layers.len() as u128 * blocked.alone_rows;
            let rows = heads * layers.len() as u128 * blocked.rows - alone;
            let [all, masked] = of(blocked, &layers);
            terms.extend(self.again([all - alone, masked], rows, wanted));
        }
        terms
    }

    /// d
    fn head_dim(&self) -> u128 {
        self.workload.model.head_dim() as u128
    }

    /// Of so many scores, and masked ones: two products, mask and softmax.
    fn skipped_forward(&self, [scores, masked]: [u128; 2]) -> Term {
        let softmax = Primitives {
            cmp: scores,
            add: 2 * scores + masked,
            exp: scores,
            div: scores,
            ..zero()
        };
        let macs = 2 * scores * self.head_dim();
        Term::less(Cause::SkippedBlocks, Cost { macs, outputs: scores, other: softmax })
    }

    /// Their gradients, where queries, keys and values need such: a product towards each, and one
    /// with softmax's gradient before the first two.
    fn skipped_backward(&self, [scores, _]: [u128; 2], [q, k, v]: [bool; 3]) -> Term {
        let weights = u128::from(q || k) * scores;
        let products = [q, k, v].map(u128::from).iter().sum::<u128>() * scores + weights;
        let other = Primitives { mul: 2 * weights, add: 2 * weights, ..zero() };
        let macs = products * self.head_dim();
        Term::less(Cause::SkippedBlocks, Cost { macs, outputs: weights, other })
    }

    /// What the backward pass does for want of weights: their product, mask and softmax, whose
    /// maximum and sum are kept; and the product of each row of the output and its gradient.
    fn again(&self, [scores, masked]: [u128; 2], rows: u128, [q, k, v]: [bool; 3]) -> Vec<Term> {
        let d = self.head_dim();
        let softmax = Primitives { add: scores + masked, exp: scores, div: scores, ..zero() };
        let again = Cost { macs: scores * d, outputs: scores, other: softmax };
        let mut terms = vec![];
        if q || k || v {
            terms.push(Term::more(Cause::ScoresAgain, again));
        }
        if q || k {
            let (mul, add) = (rows * d + scores, rows * (d - 1) + scores);
            let by_output = Primitives { mul, add, ..zero() };
            let by_weights = Primitives { mul: 2 * scores, add: 2 * scores - rows, ..zero() };
            terms.push(Term::swap(Cause::OutputDots, only(by_output), only(by_weights)));
        }
        terms
    }
}
