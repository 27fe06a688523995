//! The predicted ledger: every op that a workload must run, pass by pass.
//!
//! ```text
//! workload ─> passes ─> flow: embedding, layers, norm, op by op, and the gradients of each
//!                    ─> training: head and loss, sums of gradients, update
//! ```

mod flow;
mod training;

use std::time::Duration;

use crate::{
    config::RopeScaling,
    error::{Error, Result},
    ledger::{Dtype, Key, Ledger, Module, Op, Phase, Scope},
    workload::{Logits, Sampling, Task, Workload},
};
use flow::{Flow, Trained};

/// The ops of `workload`, with dimensions and calls. Takes time and memory in the number of
/// different passes; for a total alone, [`super::closed_form`] needs neither.
///
/// # Errors
/// A workload that [`Workload::validate`] refuses, or more micro-steps than calls are counted in.
pub fn predict(workload: &Workload) -> Result<Ledger> {
    workload.validate()?;
    let mut list = List { workload, ledger: Ledger::default(), times: 1 };
    list.setup(workload.positions());
    match workload.task {
        Task::Forward { batch, seq, past, logits } => {
            list.pass(Phase::Forward, Pass { batch, seq, past, logits, cached: true });
        }
        Task::Generate { batch, prompt_tokens, new_tokens, kv_cache, sampling, .. } => {
            for step in 0..new_tokens {
                let (phase, seq, past) = match step {
                    0 => (Phase::Prefill, prompt_tokens, 0),
                    _ if kv_cache => (Phase::Decode, 1, prompt_tokens + step - 1),
                    _ => (Phase::Decode, prompt_tokens + step, 0),
                };
                let pass = Pass { batch, seq, past, logits: Logits::Last, cached: kv_cache };
                list.pass(phase, pass);
                list.sample(batch, sampling);
            }
        }
        Task::Evaluate { batch, seq, passes } => {
            list.times = bounded(passes)?;
            Flow::new(&mut list, Phase::Forward, Pass::of_text(batch, seq), Trained::NOTHING).run();
            list.head_and_loss(batch * seq, Trained::NOTHING);
        }
        Task::Train { batch, seq, accumulate, steps, full, recompute, clip } => {
            let pass = Pass::of_text(batch, seq);
            let trained = Trained { base: full, adapters: true };
            list.times = bounded(accumulate.saturating_mul(steps))?;
            let behind = Flow::new(&mut list, Phase::Forward, pass, trained).run();
            let mut parameters = behind.parameters;
            parameters.extend(list.head_and_loss(batch * seq, trained));
            if recompute {
                let again = Flow::new(&mut list, Phase::Recompute, pass, Trained::NOTHING);
                again.run_layers(&behind.layers);
            }
            list.times = steps * (accumulate - 1);
            list.sum_gradients(&parameters);
            list.times = steps;
            list.update(&parameters, clip);
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
#[derive(Debug, Clone, Copy)]
struct Pass {
    batch: u64,
    seq: u64,
    past: u64,
    logits: Logits,
    /// Keys and values are written to a cache.
    cached: bool,
}

impl Pass {
    /// Whole sequences, of which nothing is kept.
    fn of_text(batch: u64, seq: u64) -> Self {
        Self { batch, seq, past: 0, logits: Logits::All, cached: false }
    }

    /// Rows that the layers are fed.
    fn rows(&self) -> u64 {
        self.batch * self.seq
    }

    /// Rows that reach the final norm and the head.
    fn head_rows(&self) -> u64 {
        match self.logits {
            Logits::All => self.rows(),
            Logits::Last => self.batch,
        }
    }

    /// Keys that a layer reads: the pass's own and those held, of which a window of W reaches the
    /// latest W − 1 from the first of the new tokens.
    fn keys(&self, window: Option<usize>) -> u64 {
        self.seq + window.map_or(self.past, |width| self.past.min(width as u64 - 1))
    }
}

/// The ledger in the making.
struct List<'a> {
    workload: &'a Workload,
    ledger: Ledger,
    /// How often what is added next runs.
    times: u64,
}

impl List<'_> {
    fn add(&mut self, phase: Phase, layer: Option<u32>, module: Module, op: Op, dtype: Dtype) {
        let scope = Scope { layer, module };
        if self.times == 0 {
            return;
        }
        self.ledger.add(Key { phase, scope, op, dtype }, self.times, Duration::ZERO);
    }

    /// Tables of every kind of rotary positions.
    fn setup(&mut self, positions: u64) {
        let half = self.workload.model.head_dim() as u64 / 2;
        for rope in self.workload.model.ropes() {
            let mut ops = vec![Op::RopeTable { positions, half }];
            match rope.scaling {
                RopeScaling::Default => {}
                RopeScaling::Linear { .. } => ops.push(Op::RopeLinear { half }),
                RopeScaling::Llama3 { .. } => ops.push(Op::RopeLlama3 { half }),
                // Its factor is on cosines and on sines.
                RopeScaling::Yarn { .. } => {
                    ops.extend([Op::RopeYarn { half }, Op::Scale { n: 2 * positions * half }]);
                }
            }
            for op in ops {
                self.add(Phase::Setup, None, Module::RotaryEmb, op, Dtype::F32);
            }
        }
    }

    fn pass(&mut self, phase: Phase, pass: Pass) {
        Flow::new(self, phase, pass, Trained::NOTHING).run();
        let model = &self.workload.model;
        let (k, n) = (model.hidden_size as u64, model.vocab_size as u64);
        let head = Op::Matmul { b: 1, m: pass.head_rows(), k, n };
        self.add(phase, None, Module::LmHead, head, self.workload.dtype);
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
