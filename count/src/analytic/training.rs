//! Closed forms of training and evaluation: what runs beside the layers' forward passes.
//!
//! With R = B·T rows of a pass and B·T² scores, or as many of them as blocks leave, a gradient costs a linear combination of the same
//! monomials as its op does, and of 1: a sum over the rows of a pass takes R − 1 adds. So all passes
//! together are described by the sums of these, as their forward passes are.
//!
//! Which gradients there are follows from where training begins. Everything above the first
//! trained parameter of the model gets a gradient, and nothing below it. In a full training that
//! is the embedding; of adapters, it stands in the lowest layer that carries one, at the first
//! [`stage`] of it that is adapted: all layers above it are reached whole, none below it is.

use std::ops::Range;

use super::{
    closed_form::layer_norms,
    moments::{Moments, Scores},
    pieces::{only, product, times, zero},
};
use crate::{
    config::{Activation, Adapted, LoraConfig, ModelConfig, Projection},
    error::Result,
    ledger::Phase,
    prices::{Cost, Primitives},
    tally::{Component, Sum, Tally},
    workload::{AttentionMode, Workload},
};

/// Where a layer's projections stand in its data flow: those of one stage read the same tensor,
/// and each reads what the stage before gave. 0 is what the layer reads.
const fn stage(projection: Projection) -> u8 {
    match projection {
        Projection::QProj | Projection::KProj | Projection::VProj => 1,
        Projection::OProj => 2,
        Projection::GateProj | Projection::UpProj => 3,
        Projection::DownProj => 4,
    }
}

/// The part of some layers that gradients reach, the same in each.
#[derive(Clone)]
struct Reach<'a> {
    /// One layer, or such as lie above the first trained parameter.
    layers: Range<usize>,
    /// The stage of the first trained parameter; 0 where it lies below the layers.
    first: u8,
    lora: &'a LoraConfig,
}

impl Reach<'_> {
    /// How many layers they are.
    fn count(&self) -> u128 {
        self.layers.len() as u128
    }

    /// The adapters of `projection` in these layers.
    fn adapted(&self, projection: Projection) -> Adapted {
        self.lora.adapted(projection, self.layers.clone())
    }

    /// Whether what `stage` reads gets a gradient: a stage before it is trained.
    fn before(&self, stage: u8) -> bool {
        self.first < stage
    }

    /// Whether what `projection` gives gets one: it, or a stage before it, is trained.
    fn after(&self, projection: Projection) -> bool {
        self.before(stage(projection)) || self.adapted(projection).layers > 0
    }

    /// Whether queries, keys and values get one.
    fn towards(&self) -> [bool; 3] {
        [Projection::QProj, Projection::KProj, Projection::VProj].map(|of| self.after(of))
    }
}

/// Attention in the layers of a [`Reach`] together.
#[derive(Clone, Copy)]
struct Attended {
    /// How often it is computed.
    times: u128,
    /// Of tokens.
    rows: u128,
    /// Of one head.
    scores: Scores,
}

impl Attended {
    /// `self` without `part`.
    fn but(self, part: Self) -> Self {
        let (all, of_part) = (self.scores, part.scores);
        let scores = Scores {
            all: all.all - of_part.all,
            masked: all.masked - of_part.masked,
            blocks: all.blocks - of_part.blocks,
            masks: all.masks - of_part.masks,
        };
        Self { times: self.times - part.times, rows: self.rows - part.rows, scores }
    }
}

/// The gradients of all passes, and what becomes of them.
pub(super) struct Training<'a> {
    model: &'a ModelConfig,
    lora: &'a LoraConfig,
    /// Every weight is trained, not the adapters alone.
    full: bool,
    mode: AttentionMode,
    m: Moments,
    tally: Tally,
}

impl<'a> Training<'a> {
    pub fn new(workload: &'a Workload, full: bool, m: Moments) -> Self {
        let Workload { model, lora, attention, .. } = workload;
        Self { model, lora, full, mode: *attention, m, tally: Tally::default() }
    }

    /// Adds a cost of all passes, `calls` ops of each.
    fn add(&mut self, phase: Phase, component: Component, calls: u128, cost: Cost) -> Result<()> {
        self.add_once(phase, component, calls * self.m.passes, cost)
    }

    fn add_once(
        &mut self,
        phase: Phase,
        component: Component,
        calls: u128,
        cost: Cost,
    ) -> Result<()> {
        // Rows of padding cost something, and are no op of their own.
        match calls == 0 && cost == Cost::default() {
            true => Ok(()),
            false => self.tally.add(phase, component, Sum { calls, cost }),
        }
    }

    /// R, D, F, V, H·d and K·d.
    fn sizes(&self) -> [u128; 6] {
        let model = self.model;
        let [d, f, v] = [model.hidden_size, model.intermediate_size, model.vocab_size];
        let [d, f, v, q, kv] = [d, f, v, model.q_width(), model.kv_width()].map(|n| n as u128);
        [self.m.rows, d, f, v, q, kv]
    }

    /// Head and loss; in training with their gradients.
    pub fn head_and_loss(mut self, trains: bool) -> Result<Tally> {
        let [rows, d, _, v, ..] = self.sizes();
        let chunks = self.m.loss_chunks;
        self.add_once(Phase::Forward, Component::LmHead, chunks, product(rows, d, v))?;
        let loss = Primitives {
            cmp: rows * (v - 1),
            add: rows * (2 * v + 1),
            exp: rows * v,
            log: rows,
            mul: rows,
            ..zero()
        };
        self.add_once(Phase::Loss, Component::Loss, chunks, only(loss))?;
        if !trains {
            return Ok(self.tally);
        }
        let gradient = Primitives { div: rows, mul: rows * v, add: rows, ..zero() };
        self.add_once(Phase::Loss, Component::Loss, chunks, only(gradient))?;
        self.add_once(Phase::BackwardX, Component::LmHead, chunks, product(rows, v, d))?;
        if self.full {
            let dw = Cost { outputs: chunks * v * d, ..product(v, rows, d) };
            self.add_once(Phase::BackwardW, Component::LmHead, chunks, dw)?;
        }
        Ok(self.tally)
    }

    /// The lowest layer of which anything is trained, and all above it: those that gradients
    /// reach. A layer that is run again for its gradients is one of them.
    pub fn reached(&self) -> Range<usize> {
        let all = 0..self.model.num_hidden_layers;
        let lowest = all.clone().find(|layer| self.full || self.lora.carries(*layer));
        lowest.unwrap_or(all.end)..all.end
    }

    /// The layers that gradients reach: their range, and whether their queries, keys and values get
    /// one.
    pub fn towards_attention(&self) -> Vec<(Range<usize>, [bool; 3])> {
        self.stack().map(|reach| (reach.layers.clone(), reach.towards())).into()
    }

    /// The lowest such layer and the others above it, with how far gradients reach there.
    fn stack(&self) -> [Reach<'a>; 2] {
        let (lora, reached) = (self.lora, self.reached());
        let above = reached.end.min(reached.start + 1);
        let adapted = Projection::ALL.into_iter().filter(|p| lora.at(reached.start, *p).is_some());
        let first = if self.full { 0 } else { adapted.map(stage).min().unwrap_or(u8::MAX) };
        [
            Reach { layers: reached.start..above, first, lora },
            Reach { layers: above..reached.end, first: 0, lora },
        ]
    }

    /// Gradients of each op, from the final norm down.
    pub fn backward(mut self) -> Result<Tally> {
        let [rows, d, ..] = self.sizes();
        self.norms_towards_input(1, rows, d)?;
        for reach in self.stack() {
            self.layers(&reach)?;
        }
        if self.full {
            self.gains()?;
            self.add(Phase::BackwardW, Component::Embedding, 1, adds(rows * d))?;
            if self.model.scaled_embedding {
                let scale = only(Primitives { mul: rows * d, ..zero() });
                self.add(Phase::BackwardX, Component::Embedding, 1, scale)?;
            }
        }
        Ok(self.tally)
    }

    /// Sums of the gradients of what is read more than once: one sum less than readers.
    pub fn sums_of_readers(mut self) -> Result<Tally> {
        use Projection::{DownProj, GateProj, KProj, OProj, QProj, UpProj, VProj};
        let [rows, d, f, v, q, _] = self.sizes();
        for reach in self.stack() {
            let layers = reach.count();
            let with = |of: &[Projection], n: u128| {
                layers * n + of.iter().map(|p| reach.adapted(*p).layers).sum::<u128>()
            };
            // What each stage reads; and the stream after attention, read by norm and residual.
            let sums: [(u8, Component, u128, u128); 5] = [
                (1, Component::Norm, with(&[QProj, KProj, VProj], 2), d),
                (2, Component::Attention, with(&[OProj], 0), q),
                (3, Component::Norm, with(&[GateProj, UpProj], 1), d),
                (3, Component::Residual, layers, d),
                (4, Component::Glu, with(&[DownProj], 0), f),
            ];
            for (_, component, sums, width) in sums.into_iter().filter(|s| reach.before(s.0)) {
                self.add(Phase::BackwardX, component, sums, adds(sums * rows * width))?;
            }
        }
        // A layer's input goes to its norm and past its attention.
        let [_, upper] = self.stack();
        let upper = upper.count();
        self.add(Phase::BackwardX, Component::Residual, upper, adds(upper * rows * d))?;
        if self.full {
            self.add(Phase::BackwardX, Component::Embedding, 1, adds(rows * d))?;
            // The head is read by every chunk; a tied one is the embedding, read once more.
            let passes = self.m.passes;
            let again = self.m.loss_chunks - passes;
            let (owner, sums) = match self.model.tie_word_embeddings {
                true => (Component::Embedding, again + passes),
                false => (Component::LmHead, again),
            };
            self.add_once(Phase::BackwardW, owner, sums, adds(sums * v * d))?;
        }
        Ok(self.tally)
    }

    fn layers(&mut self, reach: &Reach) -> Result<()> {
        use Projection::{DownProj, GateProj, KProj, OProj, QProj, UpProj};
        let [rows, d, f, ..] = self.sizes();
        let (model, layers) = (self.model, reach.count());
        if layers == 0 {
            return Ok(());
        }
        for projection in Projection::ALL {
            self.projection(reach, projection)?;
        }
        self.attention(reach)?;
        let n = layers * rows * f;
        let sides = u128::from(reach.after(GateProj)) + u128::from(reach.after(UpProj));
        let gates = only(Primitives { mul: sides * n, ..zero() });
        self.add(Phase::BackwardX, Component::Glu, layers * sides, gates)?;
        if reach.after(GateProj) {
            let slope = match model.activation {
                Activation::Silu => {
                    Primitives { neg: n, exp: n, div: n, add: 3 * n, mul: 3 * n, ..zero() }
                }
                Activation::GeluTanh => {
                    Primitives { exp: n, div: n, add: 5 * n, mul: 8 * n, ..zero() }
                }
            };
            self.add(Phase::BackwardX, Component::Glu, layers, only(slope))?;
        }
        let heads = |n: usize| (rows * n as u128, model.head_dim() as u128);
        let (stream, qk, outer) = ((rows, d), model.qk_norm, model.sandwich_norms);
        let norms = [
            (reach.before(1), stream),
            (qk && reach.after(QProj), heads(model.num_attention_heads)),
            (qk && reach.after(KProj), heads(model.num_key_value_heads)),
            (outer && reach.after(OProj), stream),
            (reach.before(3), stream),
            (outer && reach.after(DownProj), stream),
        ];
        for (_, (rows, width)) in norms.into_iter().filter(|(reached, _)| *reached) {
            self.norms_towards_input(layers, rows, width)?;
        }
        Ok(())
    }

    /// Gradients of so many norms, each of `rows` rows, towards their inputs.
    fn norms_towards_input(&mut self, norms: u128, rows: u128, width: u128) -> Result<()> {
        let (mul, add) = (rows * (5 * width + 2), rows * (3 * width - 1));
        let dx = only(Primitives { mul, add, div: 3 * rows, sqrt: rows, ..zero() });
        self.add(Phase::BackwardX, Component::Norm, norms, times(norms, dx)?)
    }

    /// Gradients of every norm towards its gain: of each row 3w muls, w adds, 2 divs and a root,
    /// and the rows summed into one.
    fn gains(&mut self) -> Result<()> {
        let ([rows, d, ..], layers) = (self.sizes(), self.model.num_hidden_layers as u128);
        let of_layers = layer_norms(self.model).into_iter();
        let of_layers =
            of_layers.map(|(norms, of_row, width)| (layers * norms, layers * of_row, width));
        for (norms, of_row, width) in of_layers.chain([(1, 1, d)]) {
            let rows = of_row * rows;
            let (mul, add) = (3 * rows * width, (2 * rows - norms * self.m.passes) * width);
            let gain = only(Primitives { mul, add, div: 2 * rows, sqrt: rows, ..zero() });
            self.add(Phase::BackwardW, Component::Norm, norms, gain)?;
        }
        Ok(())
    }

    /// Gradients of a matrix (n, k): a product over the rows of each pass.
    fn weight(&self, n: u128, k: u128) -> Cost {
        Cost { outputs: self.m.passes * n * k, ..product(n, self.m.rows, k) }
    }

    fn projection(&mut self, reach: &Reach, projection: Projection) -> Result<()> {
        let (k, n) = projection.widths(self.model);
        let (k, n, rows) = (k as u128, n as u128, self.m.rows);
        let (layers, fed) = (reach.count(), reach.before(stage(projection)));
        let base = Component::Proj(projection);
        if fed {
            self.add(Phase::BackwardX, base, layers, times(layers, product(rows, n, k))?)?;
        }
        if self.full {
            self.add(Phase::BackwardW, base, layers, times(layers, self.weight(n, k))?)?;
            if self.model.has_bias(projection) {
                self.add(
                    Phase::BackwardW,
                    base,
                    layers,
                    adds(layers * (rows - self.m.passes) * n),
                )?;
            }
        }
        // Products of r columns or rows: those of all these adapters are as one of Σ r.
        let (lora, Adapted { layers, ranks }) =
            (Component::Lora(projection), reach.adapted(projection));
        let scale = Primitives { mul: layers * rows * n, ..zero() };
        let low = Cost { other: scale, ..product(rows, n, ranks) };
        self.add(Phase::BackwardX, lora, 2 * layers, low)?;
        self.add(Phase::BackwardB, lora, layers, self.weight(n, ranks))?;
        self.add(Phase::BackwardA, lora, layers, self.weight(ranks, k))?;
        if fed {
            let towards = Cost { outputs: layers * rows * k, ..product(rows, ranks, k) };
            self.add(Phase::BackwardX, lora, layers, towards)?;
        }
        Ok(())
    }

    /// Towards queries and keys: their rotation and the queries' factor; before these, what attention
    /// itself has.
    fn attention(&mut self, reach: &Reach) -> Result<()> {
        let wanted = reach.towards();
        let [of_q, of_k, _] = wanted;
        let ([rows, _, _, _, q, kv], layers) = (self.sizes(), reach.count());
        let turn = |n| Primitives { mul: 2 * n, add: n, ..zero() };
        let (turned_q, turned_k) = (turn(layers * rows * q), turn(layers * rows * kv));
        let scaled_q = Primitives { mul: turned_q.mul + layers * rows * q, ..turned_q };
        let (attended, alone) = (layers * self.m.attended, layers * self.m.alone);
        for (_, ops, other) in
            [(of_q, 2, scaled_q), (of_k, 1, turned_k)].into_iter().filter(|(wanted, ..)| *wanted)
        {
            self.of_attention(ops * attended, only(other))?;
        }
        let scores = self.m.scores(self.model, reach.layers.clone());
        let all = Attended { times: attended, rows: layers * rows, scores };
        match self.mode {
            AttentionMode::Dense => self.of_weights(wanted, all),
            AttentionMode::Blocked => {
                // A token by itself has one score a head.
                let rows = layers * self.m.alone_rows;
                let scores = Scores { all: rows, blocks: alone, ..Scores::default() };
                let alone = Attended { times: alone, rows, scores };
                self.of_weights(wanted, alone)?;
                self.of_blocks(wanted, all.but(alone))
            }
        }
    }

    fn of_attention(&mut self, calls: u128, cost: Cost) -> Result<()> {
        self.add_once(Phase::BackwardX, Component::Attention, calls, cost)
    }

    /// H, d and K.
    fn heads(&self) -> [u128; 3] {
        let model = self.model;
        [model.num_attention_heads, model.head_dim(), model.num_key_value_heads].map(|n| n as u128)
    }

    /// Towards scores, values, queries and keys a product each; softmax for the scores.
    fn of_weights(&mut self, [of_q, of_k, of_v]: [bool; 3], all: Attended) -> Result<()> {
        let ([h, d, k], Attended { times, rows, scores }) = (self.heads(), all);
        let scores = h * scores.all;
        let towards = |outputs| Cost { macs: scores * d, outputs, other: zero() };
        let softmax = Primitives { mul: 2 * scores, add: 2 * scores - h * rows, ..zero() };
        let gradients = [
            (of_q || of_k, 2, Cost { other: softmax, ..towards(scores) }),
            (of_v, 1, towards(rows * k * d)),
            (of_q, 1, towards(rows * h * d)),
            (of_k, 1, towards(rows * k * d)),
        ];
        for (_, ops, cost) in gradients.into_iter().filter(|(wanted, ..)| *wanted) {
            self.of_attention(ops * times, cost)?;
        }
        Ok(())
    }

    /// The same of blocked attention, where it keeps no weights: scores once more, masked and
    /// exponentiated; the sum that softmax's gradient takes off, as the product of each row of the
    /// output and its gradient; and by block of queries, or of keys, the same products.
    ///
    /// A training feeds whole sequences on top of nothing: keys are in as many blocks as queries.
    fn of_blocks(&mut self, [of_q, of_k, of_v]: [bool; 3], all: Attended) -> Result<()> {
        let ([h, d, k], Attended { times, rows, scores }) = (self.heads(), all);
        let Scores { all, masked, blocks, masks } = scores;
        let scores = h * all;
        let towards = |outputs| Cost { macs: scores * d, outputs, other: zero() };
        let softmax = Primitives { add: scores + h * masked, exp: scores, div: scores, ..zero() };
        let dots = Primitives { mul: h * rows * d, add: h * rows * (d - 1), ..zero() };
        let of_scores = Primitives { mul: scores, add: scores, ..zero() };
        let gradients = [
            (of_q || of_k || of_v, 2 * blocks + masks, Cost { other: softmax, ..towards(scores) }),
            (of_q || of_k, times, only(dots)),
            (of_q || of_k, 2 * blocks, Cost { other: of_scores, ..towards(scores) }),
            (of_v, blocks, towards(rows * k * d)),
            (of_q, blocks, towards(rows * h * d)),
            (of_k, blocks, towards(rows * k * d)),
        ];
        for (_, calls, cost) in gradients.into_iter().filter(|(wanted, ..)| *wanted) {
            self.of_attention(calls, cost)?;
        }
        Ok(())
    }

    /// One more micro-step's gradients added to those so far.
    pub fn sum_of_gradients(mut self) -> Result<Tally> {
        for (phase, component, tensors, n) in self.trained() {
            self.add_once(phase, component, tensors, adds(n))?;
        }
        Ok(self.tally)
    }

    /// Norm of the gradients, clipping, AdamW.
    pub fn update(mut self, clip: bool) -> Result<Tally> {
        let mut all = 0;
        for (_, component, tensors, n) in self.trained() {
            all += tensors;
            let squares = Primitives { mul: n, add: n - tensors, ..zero() };
            self.add_once(Phase::Clipping, component, tensors, only(squares))?;
            if clip {
                let scale = Primitives { mul: n, ..zero() };
                self.add_once(Phase::Clipping, component, tensors, only(scale))?;
            }
            let adamw = Primitives { mul: 7 * n, add: 4 * n, div: 2 * n, sqrt: n, ..zero() };
            self.add_once(Phase::Optimizer, component, tensors, only(adamw))?;
        }
        let factor = Primitives { add: all, sqrt: 1, div: 1, cmp: 1, ..zero() };
        self.add_once(Phase::Clipping, Component::Optimizer, 1, only(factor))?;
        Ok(self.tally)
    }

    /// Trained tensors and their elements, by the phase of their gradients and by component.
    fn trained(&self) -> Vec<(Phase, Component, u128, u128)> {
        let layers = self.model.num_hidden_layers as u128;
        let [_, d, _, v, ..] = self.sizes();
        let mut all = vec![];
        for projection in Projection::ALL {
            let (k, n) = projection.widths(self.model);
            let (k, n) = (k as u128, n as u128);
            let adapted = self.lora.adapted(projection, 0..self.model.num_hidden_layers);
            if adapted.layers > 0 {
                let lora = Component::Lora(projection);
                all.push((Phase::BackwardA, lora, adapted.layers, adapted.ranks * k));
                all.push((Phase::BackwardB, lora, adapted.layers, n * adapted.ranks));
            }
            if self.full {
                let bias = u128::from(self.model.has_bias(projection));
                let (tensors, elements) = (layers * (1 + bias), layers * n * (k + bias));
                all.push((Phase::BackwardW, Component::Proj(projection), tensors, elements));
            }
        }
        if self.full {
            for (norms, _, width) in layer_norms(self.model) {
                let norms = layers * norms;
                all.push((Phase::BackwardW, Component::Norm, norms, norms * width));
            }
            all.push((Phase::BackwardW, Component::Norm, 1, d));
            all.push((Phase::BackwardW, Component::Embedding, 1, v * d));
            if !self.model.tie_word_embeddings {
                all.push((Phase::BackwardW, Component::LmHead, 1, v * d));
            }
        }
        all
    }
}

fn adds(n: u128) -> Cost {
    only(Primitives { add: n, ..zero() })
}
