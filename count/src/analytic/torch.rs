//! What PyTorch's `FlopCounterMode` would report: 2·m·n·k of each mm, addmm and bmm dispatched,
//! forward and backward; everything else counts 0.
//!
//! Source: torch/utils/flop_counter.py. Autograd computes a product's gradients only towards what
//! needs one: with a frozen base, weights get none, and up to the lowest adapted layer's input
//! nothing is computed at all.
//!
//! Fused attention (`scaled_dot_product_attention`) is one operation: two products forward, five
//! backward (the scores once more, and the four gradients, needed or not). Some releases have no
//! formula for the CPU's, and count none of it.
//!
//! The counter is a dispatch mode, which sees what activation checkpointing runs again: of each
//! layer that gradients reach, the whole forward pass. That is `torch.utils.checkpoint` around each
//! layer without early stop. With it, which is the default of the non-reentrant kind, a layer's last
//! product is not run again where nothing after it keeps its output.

use super::{
    moments::Moments,
    pieces::{macs, times},
};
use crate::{
    config::{LoraConfig, ModelConfig, Projection},
    error::Result,
    ledger::Phase,
    tally::{Component, Sum, Tally},
    workload::{Task, Workload},
};

/// How the counted program computes attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Attention {
    /// Product by product.
    Eager,
    /// Fused, with a formula for it.
    Sdpa,
    /// Fused, without a formula for it.
    Unseen,
}

/// A product of the forward pass, and how many of as many multiply-accumulates its gradients take:
/// one towards each of its sides that needs one.
struct Product {
    component: Component,
    macs: u128,
    gradients: u128,
}

/// What is dispatched for `workload`. In a forward pass of eager attention, that is every matmul
/// that runs, so that the total is the exact structure's under prices of matmuls alone.
pub(super) fn count(workload: &Workload, attention: Attention) -> Result<Tally> {
    let Workload { model, lora, task, .. } = workload;
    let mut tally = Tally::default();
    let (trains, full, recompute) = match *task {
        Task::Train { full, recompute, .. } => (true, full, recompute),
        Task::Forward { .. }
        | Task::Generate { .. }
        | Task::Verify { .. }
        | Task::Evaluate { .. } => (false, false, false),
    };
    for (phase, moments) in Moments::of(task, model) {
        if moments.passes == 0 {
            continue;
        }
        moments.check(model)?;
        let head = Product {
            component: Component::LmHead,
            macs: moments.head_rows * model.hidden_size as u128 * model.vocab_size as u128,
            gradients: 1 + u128::from(full),
        };
        let (mut products, mut again) = (vec![head], vec![]);
        // The embedding's output needs a gradient only where the embedding is trained.
        let mut input = full;
        for index in 0..model.num_hidden_layers {
            let scores = model.window_of(index).map_or(moments.whole, |_| moments.windowed);
            let rows = moments.rows;
            let layer = Layer { model, lora, index, rows, full, attention, products: vec![] };
            let (of_layer, output) = layer.products(scores.all, input);
            // Without a gradient for its output, nothing asks for what a layer did not keep.
            if recompute && output {
                again.extend(of_layer.iter().map(|product| (product.component, product.macs)));
            }
            products.extend(of_layer);
            input = output;
        }
        for (component, product) in again {
            let cost = macs(product);
            tally.add(Phase::Recompute, component, Sum { calls: 0, cost })?;
        }
        for product in products {
            let one = macs(product.macs);
            tally.add(phase, product.component, Sum { calls: 0, cost: one })?;
            if trains {
                let cost = times(product.gradients, one)?;
                tally.add(Phase::Backward, product.component, Sum { calls: 0, cost })?;
            }
        }
    }
    Ok(tally)
}

/// One layer in the making.
struct Layer<'a> {
    model: &'a ModelConfig,
    lora: &'a LoraConfig,
    index: usize,
    rows: u128,
    full: bool,
    attention: Attention,
    products: Vec<Product>,
}

impl Layer<'_> {
    /// The products of so many scores, where the input needs a gradient or not; and whether the
    /// output does.
    fn products(mut self, scores: u128, input: bool) -> (Vec<Product>, bool) {
        use Projection::{DownProj, GateProj, KProj, OProj, QProj, UpProj, VProj};
        let q = self.projection(QProj, input);
        let k = self.projection(KProj, input);
        let v = self.projection(VProj, input);
        let mixed = self.attention(scores, [q, k, v]);
        let residual = self.projection(OProj, mixed) || input;
        let gate = self.projection(GateProj, residual);
        let up = self.projection(UpProj, residual);
        let output = self.projection(DownProj, gate || up) || residual;
        (self.products, output)
    }

    /// A projection and its adapter; whether its output needs a gradient.
    fn projection(&mut self, projection: Projection, input: bool) -> bool {
        let (k, n) = projection.widths(self.model);
        let (k, n) = (k as u128, n as u128);
        let adapter = self.lora.at(self.index, projection);
        let component = Component::Proj(projection);
        let macs = self.rows * k * n;
        let gradients = u128::from(input) + u128::from(self.full);
        self.products.push(Product { component, macs, gradients });
        if let Some(site) = adapter {
            let r = site.rank as u128;
            let component = Component::Lora(projection);
            // B's input, A x, depends on A, which is trained.
            let (a, b) = (self.rows * k * r, self.rows * r * n);
            self.products.extend([
                Product { component, macs: a, gradients: u128::from(input) + 1 },
                Product { component, macs: b, gradients: 2 },
            ]);
        }
        input || self.full || adapter.is_some()
    }

    /// Scores of queries and keys, and values weighted by scores: d a head and score, each; with
    /// which of q, k and v need a gradient, and whether the output does.
    fn attention(&mut self, scores: u128, [q, k, v]: [bool; 3]) -> bool {
        let macs = scores * self.model.q_width() as u128;
        let (weights, output) = (q || k, q || k || v);
        let gradients = match self.attention {
            Attention::Eager => {
                [[q, k], [weights, v]].map(|sides| sides.map(u128::from).iter().sum())
            }
            Attention::Sdpa => [5 * u128::from(output), 0],
            Attention::Unseen => return output,
        };
        let component = Component::Attention;
        let product = |gradients| Product { component, macs, gradients };
        self.products.extend(gradients.map(product));
        output
    }
}
