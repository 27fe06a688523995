//! The data flow of a pass: which op makes each tensor from which others, and, in training, which
//! gradients that brings.
//!
//! A tensor needs a gradient if a trained parameter lies behind it: if it was made from one, or
//! from a tensor that needs one. An op lists its own gradient towards each such input as it is
//! passed on the way forward, for the order of a ledger does not matter; an input that was read
//! before gets the sum of both gradients, on account of the module that made it.

use super::{List, Pass, training::Parameter};
use crate::{
    config::{Activation, ModelConfig, Projection},
    ledger::{Lora, Module, Op, Phase},
    workload::AttentionMode,
};

/// Which parameters get gradients.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Trained {
    /// Every weight of the model itself.
    pub base: bool,
    /// The adapters that there are.
    pub adapters: bool,
}

impl Trained {
    /// A pass without gradients.
    pub const NOTHING: Self = Self { base: false, adapters: false };
}

/// A tensor on its way.
pub(super) struct Tensor {
    /// Rows of tokens.
    rows: u64,
    /// Elements in a row.
    width: u64,
    layer: Option<u32>,
    /// The module that made it.
    module: Module,
    pub(super) needs_gradient: bool,
    /// An op that gives it a gradient has read it.
    read: bool,
}

impl Tensor {
    fn n(&self) -> u64 {
        self.rows * self.width
    }
}

/// What a pass leaves for its gradients.
#[derive(Default)]
pub(super) struct Behind {
    /// The trained parameters, in the order of the flow.
    pub parameters: Vec<Parameter>,
    /// The layers whose output needs a gradient.
    pub layers: Vec<usize>,
}

/// One pass, in a ledger.
pub(super) struct Flow<'l, 'w> {
    list: &'l mut List<'w>,
    phase: Phase,
    pass: Pass,
    trained: Trained,
    layer: Option<u32>,
    behind: Behind,
}

impl<'l, 'w> Flow<'l, 'w> {
    pub fn new(list: &'l mut List<'w>, phase: Phase, pass: Pass, trained: Trained) -> Self {
        Self { list, phase, pass, trained, layer: None, behind: Behind::default() }
    }

    /// Embedding, layers and final norm; gives what was trained on the way.
    pub fn run(mut self) -> Behind {
        let mut x = self.embed();
        for layer in 0..self.model().num_hidden_layers {
            x = self.layer(layer, x);
            self.behind.layers.extend(x.needs_gradient.then_some(layer));
        }
        x.rows = self.pass.head_rows;
        if x.rows > 0 {
            self.norm(Module::Norm, &mut x);
        }
        self.behind
    }

    /// These layers alone.
    pub fn run_layers(mut self, layers: &[usize]) {
        for &layer in layers {
            let x = self.tensor(Module::Residual, self.hidden(), false);
            self.layer(layer, x);
        }
    }

    fn layer(&mut self, layer: usize, x: Tensor) -> Tensor {
        self.layer = Some(layer as u32);
        let x = self.inside(layer, x);
        self.layer = None;
        x
    }

    fn embed(&mut self) -> Tensor {
        let (at, rows, width) = (Module::EmbedTokens, self.pass.rows(), self.hidden());
        let model = self.model();
        self.op(at, Op::Embed { rows, width });
        self.weight(at, model.vocab_size as u64 * width, Op::EmbedGrad { rows, width });
        let x = self.tensor(at, width, self.trained.base);
        match model.scaled_embedding {
            true => self.scaled(at, x),
            false => x,
        }
    }

    fn inside(&mut self, layer: usize, mut x: Tensor) -> Tensor {
        use Projection::{DownProj, GateProj, KProj, OProj, QProj, UpProj, VProj};
        let sandwich = self.model().sandwich_norms;
        let mut h = self.norm(Module::InputLayernorm, &mut x);
        self.quantized(QProj, &h);
        let [q, k, v] = [QProj, KProj, VProj].map(|p| self.projection(layer, p, &mut h));
        let mut mixed = self.attention(layer, q, k, v);
        self.quantized(OProj, &mixed);
        let mut h = self.projection(layer, OProj, &mut mixed);
        if sandwich {
            h = self.norm(Module::PostAttentionLayernorm, &mut h);
        }
        let mut x = self.residual(x, h);
        let before_mlp = match sandwich {
            true => Module::PreFeedforwardLayernorm,
            false => Module::PostAttentionLayernorm,
        };
        let mut h = self.norm(before_mlp, &mut x);
        self.quantized(GateProj, &h);
        let [gate, up] = [GateProj, UpProj].map(|p| self.projection(layer, p, &mut h));
        let mut inner = self.gated(gate, up);
        self.quantized(DownProj, &inner);
        let mut h = self.projection(layer, DownProj, &mut inner);
        if sandwich {
            h = self.norm(Module::PostFeedforwardLayernorm, &mut h);
        }
        self.residual(x, h)
    }

    /// A norm of each row, or of each of a row's heads where it is one of queries or keys.
    fn norm(&mut self, module: Module, x: &mut Tensor) -> Tensor {
        let model = self.model();
        let of_heads = matches!(module, Module::QNorm | Module::KNorm);
        let width = if of_heads { model.head_dim() as u64 } else { x.width };
        let rows = x.n() / width;
        if model.unit_offset_norms {
            self.op(module, Op::Shift { n: width });
        }
        self.op(module, Op::RmsNorm { rows, width });
        self.towards(x, module, [Op::RmsNormGrad { rows, width }]);
        self.weight(module, width, Op::GainGrad { rows, width });
        let needs = x.needs_gradient || self.trained.base;
        Tensor { rows: x.rows, ..self.tensor(module, x.width, needs) }
    }

    /// What projections read, in 8 bits where they multiply so: once for all of them, on account of
    /// the first.
    fn quantized(&mut self, first: Projection, x: &Tensor) {
        if self.list.workload.dtype.is_8_bit() {
            self.op(Module::Proj(first), Op::Quantize { rows: x.rows, width: x.width });
        }
    }

    /// The product of a projection; in 8 bits, of integers times scales that it is multiplied by
    /// after. Its gradient is in the type of everything else.
    fn multiplied(&mut self, base: Module, [rows, k, n]: [u64; 3]) {
        let (layer, dtype) = (self.layer, self.list.workload.dtype);
        self.list.add(self.phase, layer, base, Op::Matmul { b: 1, m: rows, k, n }, dtype);
        if dtype.is_8_bit() {
            self.op(base, Op::Dequantize { rows, width: n });
        }
    }

    /// A projection: product, bias, adapter.
    fn projection(&mut self, layer: usize, projection: Projection, x: &mut Tensor) -> Tensor {
        let (model, lora) = (self.model(), &self.list.workload.lora);
        let (k, n) = projection.widths(model);
        let (k, n, rows) = (k as u64, n as u64, x.rows);
        let base = Module::Proj(projection);
        let product = |m, k, n| Op::Matmul { b: 1, m, k, n };
        self.multiplied(base, [rows, k, n]);
        self.towards(x, base, [product(rows, n, k)]);
        self.weight(base, k * n, product(n, rows, k));
        let mut y = self.tensor(base, n, x.needs_gradient || self.trained.base);
        if model.has_bias(projection) {
            self.op(base, Op::Bias { rows, width: n });
            self.weight(base, n, Op::SumRows { rows, width: n });
        }
        if let Some(site) = lora.at(layer, projection) {
            let (r, trains) = (site.rank as u64, self.trained.adapters);
            let part = |part| Module::Lora(projection, part);
            self.op(part(Lora::A), product(rows, k, r));
            self.towards(x, part(Lora::A), [product(rows, r, k)]);
            self.adapter(Phase::BackwardA, part(Lora::A), r * k, product(r, rows, k));
            let mut low = self.tensor(part(Lora::A), r, x.needs_gradient || trains);
            self.op(part(Lora::B), product(rows, r, n));
            self.towards(&mut low, part(Lora::B), [product(rows, n, r)]);
            self.adapter(Phase::BackwardB, part(Lora::B), n * r, product(n, rows, r));
            let high = self.tensor(part(Lora::B), n, low.needs_gradient || trains);
            let high = self.scaled(part(Lora::Scale), high);
            y = self.sum(part(Lora::Sum), y, high);
        }
        y
    }

    fn attention(&mut self, layer: usize, q: Tensor, k: Tensor, v: Tensor) -> Tensor {
        let model = self.model();
        let (width, cached) = (model.kv_width() as u64, self.pass.cached);
        let window = model.window_of(layer);
        let (rows, at) = (self.pass.rows(), Module::SelfAttn);

        let q = self.rotated(Module::QNorm, q);
        let q = self.scaled(at, q);
        let k = self.rotated(Module::KNorm, k);
        if cached {
            for _ in ["keys", "values"] {
                self.op(at, Op::CacheWrite { rows, width });
            }
        }
        match self.list.workload.attention {
            AttentionMode::Blocked if self.pass.seq > 1 => self.mixed_by_block(window, [q, k, v]),
            AttentionMode::Blocked | AttentionMode::Dense => self.mixed(window, [q, k, v]),
        }
    }

    /// H, K and d.
    pub(super) fn heads(&self) -> [u64; 3] {
        let model = self.model();
        [model.num_attention_heads, model.num_key_value_heads, model.head_dim()].map(|n| n as u64)
    }

    /// Sequences, tokens fed to each, and keys before these that a layer of such a window reads.
    pub(super) fn span(&self, window: Option<usize>) -> (u64, u64, u64) {
        let Pass { batch, seq, .. } = self.pass;
        (batch, seq, self.pass.keys(window) - seq)
    }

    /// The weighted values, every score being computed.
    fn mixed(&mut self, window: Option<usize>, [mut q, mut k, mut v]: [Tensor; 3]) -> Tensor {
        let [h, heads, d] = self.heads();
        let (held, t) = (self.pass.keys(window), self.pass.seq);
        let (b, grouped, scores) =
            (self.pass.batch * heads, h / heads * t, self.pass.batch * h * t);
        let at = Module::SelfAttn;
        let product = |m, k, n| Op::Matmul { b, m, k, n };
        self.op(at, product(grouped, d, held));
        self.towards(&mut q, at, [product(grouped, held, d)]);
        self.towards(&mut k, at, [product(d, grouped, held)]);
        if t > 1 {
            self.op(at, Op::Mask { rows: scores, width: held });
        }
        let weighted = q.needs_gradient || k.needs_gradient;
        let mut weights = self.tensor(at, h * held, weighted);
        self.op(at, Op::Softmax { rows: scores, width: held });
        self.op(at, product(grouped, held, d));
        let softmax = Op::SoftmaxGrad { rows: scores, width: held };
        self.towards(&mut weights, at, [product(grouped, d, held), softmax]);
        self.towards(&mut v, at, [product(held, grouped, d)]);
        self.tensor(at, h * d, weighted || v.needs_gradient)
    }

    /// Queries or keys by position, normed before where the model does so.
    fn rotated(&mut self, norm: Module, mut x: Tensor) -> Tensor {
        if self.model().qk_norm {
            x = self.norm(norm, &mut x);
        }
        let turn = Op::Rope { n: x.n() };
        self.each(Module::SelfAttn, x, turn, turn)
    }

    /// The activated gate times the other side.
    fn gated(&mut self, gate: Tensor, mut up: Tensor) -> Tensor {
        let (at, n) = (Module::Mlp, gate.n());
        let (activation, gradient) = match self.model().activation {
            Activation::Silu => (Op::Silu { n }, Op::SiluGrad { n }),
            Activation::GeluTanh => (Op::Gelu { n }, Op::GeluGrad { n }),
        };
        let mut gate = self.each(at, gate, activation, gradient);
        let product = Op::Mul { n };
        self.op(at, product);
        self.towards(&mut gate, at, [product]);
        self.towards(&mut up, at, [product]);
        self.tensor(at, up.width, gate.needs_gradient || up.needs_gradient)
    }

    /// `h` added to the stream `x`, of which both go on.
    fn residual(&mut self, x: Tensor, h: Tensor) -> Tensor {
        self.sum(Module::Residual, x, h)
    }

    /// A sum, whose gradient is that of each side.
    fn sum(&mut self, module: Module, mut a: Tensor, mut b: Tensor) -> Tensor {
        self.op(module, Op::Add { n: a.n() });
        self.towards(&mut a, module, []);
        self.towards(&mut b, module, []);
        self.tensor(module, a.width, a.needs_gradient || b.needs_gradient)
    }

    fn scaled(&mut self, module: Module, x: Tensor) -> Tensor {
        let scale = Op::Scale { n: x.n() };
        self.each(module, x, scale, scale)
    }

    /// An op on each element by itself, and its gradient.
    fn each(&mut self, module: Module, mut x: Tensor, op: Op, gradient: Op) -> Tensor {
        self.op(module, op);
        self.towards(&mut x, module, [gradient]);
        self.tensor(module, x.width, x.needs_gradient)
    }

    fn model(&self) -> &'w ModelConfig {
        &self.list.workload.model
    }

    fn hidden(&self) -> u64 {
        self.model().hidden_size as u64
    }

    pub(super) fn tensor(&self, module: Module, width: u64, needs_gradient: bool) -> Tensor {
        let (rows, layer) = (self.pass.rows(), self.layer);
        Tensor { rows, width, layer, module, needs_gradient, read: false }
    }

    pub(super) fn op(&mut self, module: Module, op: Op) {
        self.list.add(self.phase, self.layer, module, op, self.list.workload.dtype.base());
    }

    /// An op for the gradient of an activation.
    pub(super) fn back(&mut self, module: Module, op: Op) {
        self.list.add(Phase::BackwardX, self.layer, module, op, self.list.workload.dtype.base());
    }

    /// What an op at `module` runs for the gradient of its input `x`, if `x` needs one.
    fn towards<const N: usize>(&mut self, x: &mut Tensor, module: Module, ops: [Op; N]) {
        if !x.needs_gradient {
            return;
        }
        for op in ops {
            self.back(module, op);
        }
        if x.read {
            let dtype = self.list.workload.dtype.base();
            self.list.add(Phase::BackwardX, x.layer, x.module, Op::Add { n: x.n() }, dtype);
        }
        x.read = true;
    }

    /// A weight of the model itself, of `n` elements, and what its gradient runs.
    fn weight(&mut self, module: Module, n: u64, gradient: Op) {
        if self.trained.base {
            self.parameter(Phase::BackwardW, module, n, gradient);
        }
    }

    /// The same of a factor of an adapter.
    fn adapter(&mut self, phase: Phase, module: Module, n: u64, gradient: Op) {
        if self.trained.adapters {
            self.parameter(phase, module, n, gradient);
        }
    }

    fn parameter(&mut self, phase: Phase, module: Module, n: u64, gradient: Op) {
        let layer = self.layer;
        self.list.add(phase, layer, module, gradient, self.list.workload.dtype.base());
        self.behind.parameters.push(Parameter { phase, layer, module, n });
    }
}
