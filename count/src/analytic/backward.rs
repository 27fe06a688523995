//! The predicted ledger of training beside its forward passes: loss, gradients, update.

use super::{needs::Needs, predict::List};
use crate::{
    config::Projection,
    ledger::{Dtype, Lora, Module, Op, Phase},
    workload::LOSS_ROWS,
};

/// What a training trains and how.
#[derive(Debug, Clone, Copy)]
pub(super) struct Training {
    /// Sequences of a micro-step.
    pub batch: u64,
    /// Tokens of each.
    pub seq: u64,
    /// Every weight, not the adapters alone.
    pub full: bool,
    /// Gradients are scaled.
    pub clip: bool,
}

/// Chunks that head and loss run over: their rows, and how many there are of them.
fn chunks(rows: u64) -> [(u64, u64); 2] {
    let most = LOSS_ROWS as u64;
    [(most, rows / most), (rows % most, u64::from(!rows.is_multiple_of(most)))]
}

impl List<'_> {
    /// Head and loss over `rows` rows; with their gradients in training.
    pub(super) fn head_and_loss(&mut self, rows: u64, training: Option<Training>) {
        let (model, dtype) = (&self.workload.model, self.workload.dtype);
        let (d, v) = (model.hidden_size as u64, model.vocab_size as u64);
        // A tied head's gradient is the embedding's.
        let tied = model.tie_word_embeddings;
        let shared = if tied { Module::EmbedTokens } else { Module::LmHead };
        let passes = self.times;
        for (m, chunks) in chunks(rows) {
            self.times = passes * chunks;
            let head = Op::Matmul { b: 1, m, k: d, n: v };
            self.add(Phase::Forward, None, Module::LmHead, head, dtype);
            let loss = Op::CrossEntropy { rows: m, width: v };
            self.add(Phase::Loss, None, Module::Loss, loss, Dtype::F32);
            let Some(training) = training else { continue };
            let gradient = Op::CrossEntropyGrad { rows: m, width: v };
            self.add(Phase::Loss, None, Module::Loss, gradient, Dtype::F32);
            let dx = Op::Matmul { b: 1, m, k: v, n: d };
            self.add(Phase::BackwardX, None, Module::LmHead, dx, dtype);
            if training.full {
                let dw = Op::Matmul { b: 1, m: v, k: m, n: d };
                self.add(Phase::BackwardW, None, Module::LmHead, dw, dtype);
            }
        }
        if training.is_some_and(|training| training.full) {
            self.times = passes * (rows.div_ceil(LOSS_ROWS as u64) - 1);
            self.add(Phase::BackwardW, None, shared, Op::Add { n: v * d }, dtype);
        }
        self.times = passes;
    }

    /// Gradients of one micro-step, from the final norm down.
    pub(super) fn backward(&mut self, training: Training) {
        let (model, dtype) = (&self.workload.model, self.workload.dtype);
        let (rows, width) = (training.batch * training.seq, model.hidden_size as u64);
        let layers = model.num_hidden_layers as u32;
        let (vocab, tied) = (model.vocab_size as u64, model.tie_word_embeddings);
        let norm = Op::RmsNormGrad { rows, width };
        self.add(Phase::BackwardX, None, Module::Norm, norm, dtype);
        if training.full {
            let gain = Op::GainGrad { rows, width };
            self.add(Phase::BackwardW, None, Module::Norm, gain, dtype);
        }
        for layer in (0..layers).rev() {
            let needs = Needs::of(&self.workload.lora, training.full, layer > 0 || training.full);
            for (phase, module, op) in self.layer_backward(training, &needs) {
                self.add(phase, Some(layer), module, op, dtype);
            }
            // A layer's input goes to its norm and past its attention.
            let sum = Op::Add { n: rows * width };
            match layer.checked_sub(1) {
                Some(below) => {
                    self.add(Phase::BackwardX, Some(below), Module::Residual, sum, dtype);
                }
                None if training.full => {
                    self.add(Phase::BackwardX, None, Module::EmbedTokens, sum, dtype);
                }
                None => {}
            }
        }
        if training.full {
            let at = Module::EmbedTokens;
            self.add(Phase::BackwardW, None, at, Op::EmbedGrad { rows, width }, dtype);
            if tied {
                self.add(Phase::BackwardW, None, at, Op::Add { n: vocab * width }, dtype);
            }
        }
    }

    fn layer_backward(&self, training: Training, needs: &Needs) -> Vec<(Phase, Module, Op)> {
        use Projection::{DownProj, GateProj, KProj, OProj, QProj, UpProj, VProj};
        let (model, lora) = (&self.workload.model, &self.workload.lora);
        let (width, inner) = (model.hidden_size as u64, model.intermediate_size as u64);
        let rows = training.batch * training.seq;
        let mut ops = vec![];
        for projection in Projection::ALL {
            ops.extend(self.projection_backward(projection, rows, training.full, needs));
        }
        ops.extend(self.attention_backward(training, needs));

        // Where one tensor was read more than once, its gradients are summed.
        let adapters = |of: &[Projection]| of.iter().filter(|p| lora.adapts(**p)).count();
        let mut sums = |needed: bool, module, readers: usize, n| {
            let sum = (Phase::BackwardX, module, Op::Add { n });
            ops.extend(std::iter::repeat_n(sum, if needed { readers - 1 } else { 0 }));
        };
        let qkv = 3 + adapters(&[QProj, KProj, VProj]);
        sums(needs.normed, Module::InputLayernorm, qkv, rows * width);
        sums(needs.mixed, Module::SelfAttn, 1 + adapters(&[OProj]), rows * model.q_width() as u64);
        sums(needs.middle, Module::Residual, 2, rows * width);
        let gate_up = 2 + adapters(&[GateProj, UpProj]);
        sums(needs.normed_again, Module::PostAttentionLayernorm, gate_up, rows * width);
        sums(needs.inner, Module::Mlp, 1 + adapters(&[DownProj]), rows * inner);

        let n = rows * inner;
        if needs.gate {
            ops.push((Phase::BackwardX, Module::Mlp, Op::Mul { n }));
            ops.push((Phase::BackwardX, Module::Mlp, Op::SiluGrad { n }));
        }
        if needs.up {
            ops.push((Phase::BackwardX, Module::Mlp, Op::Mul { n }));
        }
        let norms =
            [(Module::InputLayernorm, needs.input), (Module::PostAttentionLayernorm, needs.middle)];
        for (module, needed) in norms {
            if needed {
                ops.push((Phase::BackwardX, module, Op::RmsNormGrad { rows, width }));
            }
            if training.full {
                ops.push((Phase::BackwardW, module, Op::GainGrad { rows, width }));
            }
        }
        ops
    }

    fn projection_backward(
        &self,
        projection: Projection,
        rows: u64,
        full: bool,
        needs: &Needs,
    ) -> Vec<(Phase, Module, Op)> {
        let (model, lora) = (&self.workload.model, &self.workload.lora);
        let (k, n) = projection.widths(model);
        let (k, n, r) = (k as u64, n as u64, lora.rank as u64);
        let base = Module::Proj(projection);
        let product = |m, k, n| Op::Matmul { b: 1, m, k, n };
        let mut ops = vec![];
        if needs.fed(projection) {
            ops.push((Phase::BackwardX, base, product(rows, n, k)));
        }
        if full {
            ops.push((Phase::BackwardW, base, product(n, rows, k)));
            if model.has_bias(projection) {
                ops.push((Phase::BackwardW, base, Op::SumRows { rows, width: n }));
            }
        }
        if lora.adapts(projection) {
            let part = |part| Module::Lora(projection, part);
            ops.push((Phase::BackwardX, part(Lora::Scale), Op::Scale { n: rows * n }));
            ops.push((Phase::BackwardX, part(Lora::B), product(rows, n, r)));
            ops.push((Phase::BackwardB, part(Lora::B), product(n, rows, r)));
            ops.push((Phase::BackwardA, part(Lora::A), product(r, rows, k)));
            if needs.fed(projection) {
                ops.push((Phase::BackwardX, part(Lora::A), product(rows, r, k)));
            }
        }
        ops
    }

    fn attention_backward(&self, training: Training, needs: &Needs) -> Vec<(Phase, Module, Op)> {
        let model = &self.workload.model;
        let [h, kv, d] = [model.num_attention_heads, model.num_key_value_heads, model.head_dim()]
            .map(|n| n as u64);
        let (batch, t) = (training.batch, training.seq);
        let (b, rows, grouped) = (batch * kv, batch * t, h / kv * t);
        let mut ops = vec![];
        if needs.scores {
            ops.push(Op::Matmul { b, m: grouped, k: d, n: t });
            ops.push(Op::SoftmaxGrad { rows: batch * h * t, width: t });
        }
        if needs.v {
            ops.push(Op::Matmul { b, m: t, k: grouped, n: d });
        }
        if needs.q {
            ops.push(Op::Matmul { b, m: grouped, k: t, n: d });
            ops.push(Op::Scale { n: rows * h * d });
            ops.push(Op::Rope { n: rows * h * d });
        }
        if needs.k {
            ops.push(Op::Matmul { b, m: d, k: grouped, n: t });
            ops.push(Op::Rope { n: rows * kv * d });
        }
        ops.into_iter().map(|op| (Phase::BackwardX, Module::SelfAttn, op)).collect()
    }

    /// One more micro-step's gradients added to those so far.
    pub(super) fn sum_gradients(&mut self, training: Training) {
        for (layer, module, n) in self.trained(training.full) {
            let phase = match module {
                Module::Lora(_, Lora::A) => Phase::BackwardA,
                Module::Lora(_, Lora::B) => Phase::BackwardB,
                _ => Phase::BackwardW,
            };
            self.add(phase, layer, module, Op::Add { n }, Dtype::F32);
        }
    }

    /// Norm, clipping and update of every trained parameter.
    pub(super) fn update(&mut self, training: Training) {
        let trained = self.trained(training.full);
        let factor = Op::ClipFactor { tensors: trained.len() as u64 };
        self.add(Phase::Clipping, None, Module::Optimizer, factor, Dtype::F32);
        for (layer, module, n) in trained {
            self.add(Phase::Clipping, layer, module, Op::SumSquares { n }, Dtype::F32);
            if training.clip {
                self.add(Phase::Clipping, layer, module, Op::Scale { n }, Dtype::F32);
            }
            self.add(Phase::Optimizer, layer, module, Op::AdamW { n }, Dtype::F32);
        }
    }

    /// Trained tensors: where, and how many elements.
    fn trained(&self, full: bool) -> Vec<(Option<u32>, Module, u64)> {
        let (model, lora) = (&self.workload.model, &self.workload.lora);
        let (d, v) = (model.hidden_size as u64, model.vocab_size as u64);
        let mut all = vec![];
        for layer in (0..model.num_hidden_layers as u32).map(Some) {
            for projection in Projection::ALL {
                let (k, n) = projection.widths(model);
                let (k, n, r) = (k as u64, n as u64, lora.rank as u64);
                if full {
                    all.push((layer, Module::Proj(projection), k * n));
                    all.extend(model.has_bias(projection).then_some((
                        layer,
                        Module::Proj(projection),
                        n,
                    )));
                }
                if lora.adapts(projection) {
                    all.push((layer, Module::Lora(projection, Lora::A), r * k));
                    all.push((layer, Module::Lora(projection, Lora::B), n * r));
                }
            }
            if full {
                all.push((layer, Module::InputLayernorm, d));
                all.push((layer, Module::PostAttentionLayernorm, d));
            }
        }
        if full {
            all.extend([(None, Module::EmbedTokens, v * d), (None, Module::Norm, d)]);
            all.extend((!model.tie_word_embeddings).then_some((None, Module::LmHead, v * d)));
        }
        all
    }
}
