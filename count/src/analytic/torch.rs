//! What PyTorch's `FlopCounterMode` would report: 2·m·n·k of each mm, addmm and bmm dispatched,
//! forward and backward; everything else counts 0.
//!
//! Source: torch/utils/flop_counter.py. Autograd computes a product's gradients only towards what
//! needs one: with a frozen base, weights get none, and up to the lowest adapted layer's input
//! nothing is computed at all.

use super::{
    moments::Moments,
    pieces::{macs, micro_steps, times},
};
use crate::{
    config::{LoraConfig, ModelConfig, Projection},
    error::Result,
    ledger::Phase,
    tally::{Component, Sum, Tally},
    workload::{Task, Workload},
};

/// A product of the forward pass, and towards which of its two sides a gradient is computed: each
/// is a product of as many multiply-accumulates.
struct Product {
    component: Component,
    macs: u128,
    /// Towards the left side: an activation.
    left: bool,
    /// Towards the right side: a weight, or another activation.
    right: bool,
}

/// What is dispatched for `workload`. In a forward pass, that is every matmul that runs, so that
/// the total is the exact structure's under prices of matmuls alone.
pub(super) fn count(workload: &Workload) -> Result<Tally> {
    let Workload { model, lora, task, .. } = workload;
    let mut tally = Tally::default();
    let (trains, full) = match *task {
        Task::Train { full, .. } => (true, full),
        Task::Forward { .. } | Task::Generate { .. } | Task::Evaluate { .. } => (false, false),
    };
    let runs = micro_steps(task);
    for (phase, moments) in Moments::of(task, model) {
        if moments.passes == 0 {
            continue;
        }
        moments.check(model)?;
        let head = Product {
            component: Component::LmHead,
            macs: moments.head_rows * model.hidden_size as u128 * model.vocab_size as u128,
            left: true,
            right: full,
        };
        let mut products = vec![head];
        // The embedding's output needs a gradient only where the embedding is trained.
        let mut input = full;
        for index in 0..model.num_hidden_layers {
            let scores = model.window_of(index).map_or(moments.whole, |_| moments.windowed);
            let layer = Layer { model, lora, index, rows: moments.rows, full, products: vec![] };
            let (of_layer, output) = layer.products(scores.all, input);
            products.extend(of_layer);
            input = output;
        }
        for product in products {
            let one = times(runs, macs(product.macs))?;
            tally.add(phase, product.component, Sum { calls: 0, cost: one })?;
            if trains {
                let gradients = u128::from(product.left) + u128::from(product.right);
                let cost = times(gradients, one)?;
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
        let weights = self.attention(scores, q, k);
        let mixed = self.attention(scores, weights, v);
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
        self.products.push(Product { component, macs, left: input, right: self.full });
        if let Some(site) = adapter {
            let r = site.rank as u128;
            let component = Component::Lora(projection);
            // B's input, A x, depends on A, which is trained.
            self.products.extend([
                Product { component, macs: self.rows * k * r, left: input, right: true },
                Product { component, macs: self.rows * r * n, left: true, right: true },
            ]);
        }
        input || self.full || adapter.is_some()
    }

    /// Scores of queries and keys, or values weighted by scores: d a head and score.
    fn attention(&mut self, scores: u128, left: bool, right: bool) -> bool {
        let macs = scores * self.model.q_width() as u128;
        self.products.push(Product { component: Component::Attention, macs, left, right });
        left || right
    }
}
