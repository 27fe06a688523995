//! The predicted ledger: every op that a workload must run, pass by pass.

use std::time::Duration;

use super::backward::Training;
use crate::{
    config::Projection,
    error::{Error, Result},
    ledger::{Dtype, Key, Ledger, Lora, Module, Op, Phase, Scope},
    workload::{Logits, Sampling, Task, Workload},
};

/// The ops of `workload`, with dimensions and calls. Takes time and memory in the number of
/// different passes; for a total alone, [`super::closed_form`] needs neither.
///
/// # Errors
/// A workload that [`Workload::validate`] refuses, or more micro-steps than calls are counted in.
pub fn predict(workload: &Workload) -> Result<Ledger> {
    workload.validate()?;
    let mut list = List { workload, ledger: Ledger::default(), times: 1 };
    match workload.task {
        Task::Forward { batch, seq, past, logits } => {
            list.setup(past + seq);
            list.pass(Phase::Forward, Pass { batch, seq, past, logits });
        }
        Task::Generate { batch, prompt_tokens, new_tokens, max_new_tokens, kv_cache, sampling } => {
            list.setup(prompt_tokens + max_new_tokens - 1);
            for step in 0..new_tokens {
                let (phase, seq, past) = match step {
                    0 => (Phase::Prefill, prompt_tokens, 0),
                    _ if kv_cache => (Phase::Decode, 1, prompt_tokens + step - 1),
                    _ => (Phase::Decode, prompt_tokens + step, 0),
                };
                list.pass(phase, Pass { batch, seq, past, logits: Logits::Last });
                list.sample(batch, sampling);
            }
        }
        Task::Evaluate { batch, seq, passes } => {
            list.setup(seq);
            list.times = bounded(passes)?;
            list.hidden(Phase::Forward, &Pass { batch, seq, past: 0, logits: Logits::All });
            list.head_and_loss(batch * seq, None);
        }
        Task::Train { batch, seq, accumulate, steps, full, recompute, clip } => {
            let training = Training { batch, seq, full, clip };
            let pass = Pass { batch, seq, past: 0, logits: Logits::All };
            list.setup(seq);
            list.times = bounded(accumulate.saturating_mul(steps))?;
            list.hidden(Phase::Forward, &pass);
            list.head_and_loss(batch * seq, Some(training));
            if recompute {
                list.layers(Phase::Recompute, &pass);
            }
            list.backward(training);
            list.times = steps * (accumulate - 1);
            list.sum_gradients(training);
            list.times = steps;
            list.update(training);
        }
    }
    Ok(list.ledger)
}

/// So many passes that calls of them still fit 64 bits.
fn bounded(passes: u64) -> Result<u64> {
    match passes <= 1 << 32 {
        true => Ok(passes),
        false => Err(Error::Overflow("calls (more than 2^32 passes)".into()).into()),
    }
}

/// One pass: `seq` tokens fed to each of `batch` sequences that hold `past` already.
pub(super) struct Pass {
    batch: u64,
    seq: u64,
    past: u64,
    logits: Logits,
}

impl Pass {
    /// Rows that reach the final norm and the head.
    fn head_rows(&self) -> u64 {
        match self.logits {
            Logits::All => self.batch * self.seq,
            Logits::Last => self.batch,
        }
    }
}

/// The ledger in the making.
pub(super) struct List<'a> {
    pub workload: &'a Workload,
    ledger: Ledger,
    /// How often what is added next runs.
    pub times: u64,
}

impl List<'_> {
    pub(super) fn add(
        &mut self,
        phase: Phase,
        layer: Option<u32>,
        module: Module,
        op: Op,
        dtype: Dtype,
    ) {
        let scope = Scope { layer, module };
        if self.times == 0 {
            return;
        }
        self.ledger.add(Key { phase, scope, op, dtype }, self.times, Duration::ZERO);
    }

    fn setup(&mut self, positions: u64) {
        let half = self.workload.model.head_dim() as u64 / 2;
        let op = Op::RopeTable { positions, half };
        self.add(Phase::Setup, None, Module::RotaryEmb, op, Dtype::F32);
    }

    fn pass(&mut self, phase: Phase, pass: Pass) {
        self.hidden(phase, &pass);
        let model = &self.workload.model;
        let (k, n) = (model.hidden_size as u64, model.vocab_size as u64);
        let head = Op::Matmul { b: 1, m: pass.head_rows(), k, n };
        self.add(phase, None, Module::LmHead, head, self.workload.dtype);
    }

    /// Embedding, layers and final norm.
    fn hidden(&mut self, phase: Phase, pass: &Pass) {
        let (width, dtype) = (self.workload.model.hidden_size as u64, self.workload.dtype);
        let rows = pass.batch * pass.seq;
        self.add(phase, None, Module::EmbedTokens, Op::Embed { rows, width }, dtype);
        self.layers(phase, pass);
        let norm = Op::RmsNorm { rows: pass.head_rows(), width };
        self.add(phase, None, Module::Norm, norm, dtype);
    }

    fn layers(&mut self, phase: Phase, pass: &Pass) {
        for layer in 0..self.workload.model.num_hidden_layers as u32 {
            self.layer(phase, layer, pass);
        }
    }

    fn layer(&mut self, phase: Phase, layer: u32, pass: &Pass) {
        let model = &self.workload.model;
        let dtype = self.workload.dtype;
        let [h, kv, d] = [model.num_attention_heads, model.num_key_value_heads, model.head_dim()]
            .map(|n| n as u64);
        let (width, inner) = (model.hidden_size as u64, model.intermediate_size as u64);
        let (b, t) = (pass.batch, pass.seq);
        let (rows, held) = (b * t, pass.past + t);
        let group = h / kv;

        let mut ops = vec![(Module::InputLayernorm, Op::RmsNorm { rows, width })];
        for projection in [Projection::QProj, Projection::KProj, Projection::VProj] {
            ops.extend(self.projection(projection, rows));
        }
        let attention = |op| (Module::SelfAttn, op);
        ops.extend([
            attention(Op::Rope { n: rows * h * d }),
            attention(Op::Rope { n: rows * kv * d }),
            attention(Op::Scale { n: rows * h * d }),
            attention(Op::Matmul { b: b * kv, m: group * t, k: d, n: held }),
            attention(Op::Softmax { rows: b * h * t, width: held }),
            attention(Op::Matmul { b: b * kv, m: group * t, k: held, n: d }),
        ]);
        if t > 1 {
            ops.push(attention(Op::Mask { rows: b * h * t, width: held }));
        }
        ops.extend(self.projection(Projection::OProj, rows));
        ops.push((Module::Residual, Op::Add { n: rows * width }));
        ops.push((Module::PostAttentionLayernorm, Op::RmsNorm { rows, width }));
        for projection in [Projection::GateProj, Projection::UpProj, Projection::DownProj] {
            ops.extend(self.projection(projection, rows));
        }
        ops.push((Module::Mlp, Op::Silu { n: rows * inner }));
        ops.push((Module::Mlp, Op::Mul { n: rows * inner }));
        ops.push((Module::Residual, Op::Add { n: rows * width }));
        for (module, op) in ops {
            self.add(phase, Some(layer), module, op, dtype);
        }
    }

    /// A projection of `rows` rows: product, bias, adapter.
    fn projection(&self, projection: Projection, rows: u64) -> Vec<(Module, Op)> {
        let Workload { model, lora, .. } = self.workload;
        let (k, n) = projection.widths(model);
        let (k, n, r) = (k as u64, n as u64, lora.rank as u64);
        let base = Module::Proj(projection);
        let mut ops = vec![(base, Op::Matmul { b: 1, m: rows, k, n })];
        if model.has_bias(projection) {
            ops.push((base, Op::Bias { rows, width: n }));
        }
        if lora.adapts(projection) {
            let part = |part| Module::Lora(projection, part);
            ops.extend([
                (part(Lora::A), Op::Matmul { b: 1, m: rows, k, n: r }),
                (part(Lora::B), Op::Matmul { b: 1, m: rows, k: r, n }),
                (part(Lora::Scale), Op::Scale { n: rows * n }),
                (part(Lora::Sum), Op::Add { n: rows * n }),
            ]);
        }
        ops
    }

    fn sample(&mut self, rows: u64, sampling: Sampling) {
        let vocab = self.workload.model.vocab_size as u64;
        let mut ops = vec![];
        if sampling.repeat_penalty != 1.0 {
            ops.push(Op::RepeatPenalty { rows, width: vocab });
        }
        if sampling.temperature == 0.0 {
            ops.push(Op::Argmax { rows, width: vocab });
        } else {
            let width = sampling.top_k.map_or(vocab, |k| vocab.min(k as u64));
            ops.push(Op::Scale { n: rows * vocab });
            ops.push(Op::Softmax { rows, width: vocab });
            ops.extend(sampling.top_p.map(|_| Op::Nucleus { rows, width }));
            ops.push(Op::Draw { rows, width });
        }
        for op in ops {
            self.add(Phase::Sampling, None, Module::Sampler, op, Dtype::F32);
        }
    }
}
