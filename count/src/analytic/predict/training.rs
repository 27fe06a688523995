//! What a training runs beside passes and their gradients: head and loss, sums of gradients over
//! micro-steps, update.

use super::{List, flow::Trained};
use crate::{
    ledger::{Dtype, Module, MomentDtype, Op, Phase},
    workload::LOSS_ROWS,
};

/// A trained tensor: where it is, in which phase its gradient is computed, and its elements.
#[derive(Debug, Clone, Copy)]
pub(super) struct Parameter {
    pub phase: Phase,
    pub layer: Option<u32>,
    pub module: Module,
    pub n: u64,
}

/// Chunks that head and loss run over: their rows, and how many there are of them.
fn chunks(rows: u64) -> [(u64, u64); 2] {
    let most = LOSS_ROWS as u64;
    [(most, rows / most), (rows % most, u64::from(!rows.is_multiple_of(most)))]
}

impl List<'_> {
    /// Head and loss over `rows` rows; in training with their gradients. Gives the head, where it
    /// is trained and a tensor of its own.
    pub(super) fn head_and_loss(&mut self, rows: u64, trained: Trained) -> Option<Parameter> {
        let (model, dtype) = (&self.workload.model, self.workload.dtype.base());
        let (d, v) = (model.hidden_size as u64, model.vocab_size as u64);
        let passes = self.times;
        for (m, chunks) in chunks(rows) {
            self.times = passes * chunks;
            let head = Op::Matmul { b: 1, m, k: d, n: v };
            self.add(Phase::Forward, None, Module::LmHead, head, dtype);
            let loss = Op::CrossEntropy { rows: m, width: v };
            self.add(Phase::Loss, None, Module::Loss, loss, Dtype::F32);
            if trained == Trained::NOTHING {
                continue;
            }
            let gradient = Op::CrossEntropyGrad { rows: m, width: v };
            self.add(Phase::Loss, None, Module::Loss, gradient, Dtype::F32);
            let dx = Op::Matmul { b: 1, m, k: v, n: d };
            self.add(Phase::BackwardX, None, Module::LmHead, dx, dtype);
            if trained.base {
                let dw = Op::Matmul { b: 1, m: v, k: m, n: d };
                self.add(Phase::BackwardW, None, Module::LmHead, dw, dtype);
            }
        }
        self.times = passes;
        let (phase, layer, n) = (Phase::BackwardW, None, v * d);
        let module = match model.tie_word_embeddings {
            // A tied head's gradient is the embedding's, which has one of its own besides.
            true => Module::EmbedTokens,
            false => Module::LmHead,
        };
        if trained.base {
            let gradients = rows.div_ceil(LOSS_ROWS as u64) + u64::from(model.tie_word_embeddings);
            self.times = passes * (gradients - 1);
            self.add(phase, layer, module, Op::Add { n }, dtype);
            self.times = passes;
        }
        let own = trained.base && !model.tie_word_embeddings;
        own.then_some(Parameter { phase, layer, module, n })
    }

    /// One more micro-step's gradients added to those so far.
    pub(super) fn sum_gradients(&mut self, trained: &[Parameter]) {
        for &Parameter { phase, layer, module, n } in trained {
            self.add(phase, layer, module, Op::Add { n }, Dtype::F32);
        }
    }

    /// Norm, clipping and update of every trained parameter.
    pub(super) fn update(&mut self, trained: &[Parameter], clip: bool, moments: MomentDtype) {
        let factor = Op::ClipFactor { tensors: trained.len() as u64 };
        self.add(Phase::Clipping, None, Module::Optimizer, factor, Dtype::F32);
        for &Parameter { layer, module, n, .. } in trained {
            self.add(Phase::Clipping, layer, module, Op::SumSquares { n }, Dtype::F32);
            if clip {
                self.add(Phase::Clipping, layer, module, Op::Scale { n }, Dtype::F32);
            }
            self.add(Phase::Optimizer, layer, module, Op::AdamW { n, moments }, Dtype::F32);
        }
    }
}
