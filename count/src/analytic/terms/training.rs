//! Terms of training: what is executed in place of two more forward passes.

use super::{Pass, executed, overflow, tables};
use crate::{
    analytic::{
        Structure,
        causes::{Cause, Term},
        closed_form::layers,
        pieces::{macs, only, times},
        training::Training,
    },
    config::{Projection, Site},
    error::Result,
    ledger::Phase,
    prices::Cost,
    tally::Tally,
    workload::{Task, Workload},
};

impl Pass<'_> {
    /// What of a training's two backward thirds, of a micro-step, a structure that goes by
    /// gradients leaves out or adds; nothing of other structures and tasks.
    pub(super) fn gradients(&self, structure: Structure) -> Result<Vec<Term>> {
        let Task::Train { full, recompute, .. } = self.workload.task else { return Ok(vec![]) };
        // The exact structure's recomputed layers are among what it executes beside the passes.
        let (attention, is_torch) = match structure {
            Structure::Exact | Structure::Unpadded | Structure::ExactDense => (true, false),
            Structure::Torch | Structure::TorchSdpa => (true, true),
            Structure::TorchSdpaCpu => (false, true),
            Structure::Notebook
            | Structure::SixNd
            | Structure::SixNdNoEmbedding
            | Structure::Palm
            | Structure::Megatron
            | Structure::MegatronCausal
            | Structure::HfTrainer
            | Structure::DeepSpeed
            | Structure::DeepSpeedSdpa
            | Structure::CalflopsSdpa
            | Structure::Ptflops
            | Structure::Torchtitan
            | Structure::MaxText
            | Structure::Vllm => return Ok(vec![]),
            Structure::NemoLora => return Ok(vec![self.frozen_weights()]),
        };
        let mut terms = match full {
            true => vec![],
            false => vec![self.frozen_weights(), self.below_adapters(attention)],
        };
        if structure == Structure::TorchSdpa {
            terms.push(self.fused_backward(full));
        }
        if is_torch && recompute {
            terms.push(self.products_again(full, attention)?);
        }
        Ok(terms)
    }

    /// Products of the layers that gradients reach, once more.
    fn products_again(&self, full: bool, attention: bool) -> Result<Term> {
        let model = &self.workload.model;
        let reached = Training::new(self.workload, full, self.m).reached();
        let [_, _, _, _, q, _] = self.sizes();
        let scores = match attention {
            true => 0,
            false => 2 * q * self.m.scores(model, reached.clone()).all,
        };
        let mut tally = Tally::default();
        layers(&mut tally, Phase::Recompute, self.workload, &self.m, reached)?;
        let all = tally.sum(|_, _| true)?.macs;
        Ok(Term::more(Cause::Recompute, macs(all - scores)))
    }

    /// Fused attention's gradients beside the four of eager attention: the scores once more, and in
    /// the lowest layer what it has no need of.
    fn fused_backward(&self, full: bool) -> Term {
        let Workload { model, lora, .. } = self.workload;
        let [_, _, _, _, q, _] = self.sizes();
        let reached = Training::new(self.workload, full, self.m).reached();
        let lowest = reached.clone().next().filter(|_| !full);
        let extra = |layer: usize| match lowest {
            Some(lowest) if layer == lowest => match untouched(|p| lora.at(layer, p)) {
                // It has no gradients at all.
                4 => 0,
                needless => 1 + needless,
            },
            Some(_) | None => 1,
        };
        let scores = |layer: usize| self.m.scores(model, layer..layer + 1).all;
        let products = reached.map(|layer| extra(layer) * scores(layer)).sum::<u128>();
        Term::more(Cause::FusedBackward, macs(products * q))
    }

    /// Weight gradients that a frozen base does not need: one product for each of its matrices.
    fn frozen_weights(&self) -> Term {
        let [layers, d, f, v, q, kv] = self.sizes();
        let matrices = layers * (2 * d * (q + kv) + 3 * d * f) + d * v;
        Term::less(Cause::FrozenWeights, macs(self.m.rows * matrices))
    }

    /// What a training or an evaluation executes beside forward passes, and in place of two more
    /// of them: gradients op by op, their sums, loss, update.
    pub(super) fn beside_the_passes(&self) -> Result<Vec<Term>> {
        let task = &self.workload.task;
        let training = |full| Training::new(self.workload, full, self.m);
        let all = |tally: Tally, n| times(n, tally.sum(|_, _| true)?);
        let is_loss = |phase, _| phase == Phase::Loss;
        let (trains, full) = match *task {
            Task::Forward { .. } | Task::Generate { .. } | Task::Verify { .. } => {
                return Ok(vec![]);
            }
            Task::Evaluate { .. } => (false, false),
            Task::Train { full, .. } => (true, full),
        };
        let head = training(full).head_and_loss(trains)?;
        let mut terms = vec![
            Term::more(Cause::RotaryTables, tables(self.workload)?),
            Term::more(Cause::Loss, head.sum(is_loss)?),
        ];
        let Task::Train { accumulate, steps, recompute, clip, .. } = *task else {
            return Ok(terms);
        };
        let towards = |phase, _| !matches!(phase, Phase::Loss | Phase::Forward);
        let backward = training(full).backward()?.sum(|_, _| true)?;
        let backward = backward.checked_add(head.sum(towards)?).ok_or_else(overflow)?;
        let twice = times(2, executed(self.workload, &self.m)?)?;
        // The products themselves are those of the forward pass, less what is not needed.
        let outputs = |cost: &Cost| Cost { outputs: cost.outputs, ..Cost::default() };
        let sums = training(full).sum_of_gradients()?;
        let again = (u128::from(accumulate) - 1) * u128::from(steps);
        let readers = all(training(full).sums_of_readers()?, 1)?;
        terms.extend([
            Term::swap(Cause::ShorterSums, outputs(&backward), outputs(&twice)),
            Term::swap(Cause::Derivatives, only(backward.other), only(twice.other)),
            Term::more(Cause::SumsOfReaders, readers),
            Term::more(Cause::Accumulation, all(sums, again)?),
            Term::more(Cause::Optimizer, all(training(full).update(clip)?, steps.into())?),
        ]);
        if recompute {
            let mut tally = Tally::default();
            let reached = training(full).reached();
            layers(&mut tally, Phase::Recompute, self.workload, &self.m, reached)?;
            terms.push(Term::more(Cause::Recompute, all(tally, 1)?));
        }
        Ok(terms)
    }

    /// Gradients towards activations that no adapter has touched yet: all of the layers below the
    /// first that carries one, and in that layer what lies before its adapters; those of attention
    /// where it is counted at all.
    fn below_adapters(&self, attention: bool) -> Term {
        let lora = &self.workload.lora;
        let untouched = self.layers().take_while(|layer| !lora.carries(*layer)).count();
        // So many layers without any, and then the one where the first adapter is.
        let below = untouched as u128 * self.towards_activations(attention, |_| None);
        let first =
            self.towards_activations(attention, |projection| lora.at(untouched, projection));
        Term::less(Cause::BelowAdapters, macs(below + first))
    }

    /// Products of one layer towards activations that the adapters `at` its projections, there
    /// being none in any layer below, have not touched.
    fn towards_activations(
        &self,
        attention: bool,
        at: impl Fn(Projection) -> Option<Site>,
    ) -> u128 {
        let model = &self.workload.model;
        let [_, _, _, _, q, _] = self.sizes();
        use Projection::{DownProj, GateProj, KProj, OProj, QProj, UpProj, VProj};
        let touched = |projections: &[Projection]| projections.iter().any(|p| at(*p).is_some());
        let before = |projection| match projection {
            QProj | KProj | VProj => false,
            OProj => touched(&[QProj, KProj, VProj]),
            GateProj | UpProj => touched(&[QProj, KProj, VProj, OProj]),
            DownProj => touched(&[QProj, KProj, VProj, OProj, GateProj, UpProj]),
        };
        // Towards the input of the projection, and of its adapter's A.
        let skipped = Projection::ALL.into_iter().filter(|p| !before(*p)).map(|projection| {
            let (k, n) = projection.widths(model);
            let adapter = at(projection).map_or(0, |site| site.rank);
            self.m.rows * (k * (n + adapter)) as u128
        });
        let scores = if attention { untouched(&at) * self.m.whole.all * q } else { 0 };
        skipped.sum::<u128>() + scores
    }
}

/// Products of attention's gradients that the adapters `at` a layer's projections do not ask for:
/// towards queries, keys, weights (from queries and keys) and values.
fn untouched(at: impl Fn(Projection) -> Option<Site>) -> u128 {
    let [q, k, v] =
        [Projection::QProj, Projection::KProj, Projection::VProj].map(|p| at(p).is_some());
    [q, k, q || k, v].into_iter().filter(|touched| !touched).count() as u128
}
