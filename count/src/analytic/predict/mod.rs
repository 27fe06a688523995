//! The predicted ledger: every op that a workload must run, pass by pass.
//!
//! ```text
//! workload ─> passes ─> flow: embedding, layers, norm, op by op, and the gradients of each
//!                          blocks: attention of many tokens, where it is blocked
//!                    ─> training: head and loss, sums of gradients, update
//! ```

mod blocks;
mod flow;
mod training;

use std::time::Duration;

use crate::{
    config::RopeScaling,
    error::{Error, Result},
    ledger::{Dtype, Key, Ledger, Module, Op, Phase, Scope},
    workload::{Lengths, Logits, Ragged, Rows, Sampling, Task, Turn, Workload},
};
use flow::{Behind, Flow, Trained};

/// The ops of `workload`, with dimensions and calls. Takes time and memory in the number of
/// different passes; for a total alone, [`super::closed_form`] needs neither.
///
/// # Errors
/// A workload that [`Workload::validate`] refuses, or more micro-steps than calls are counted in.
pub fn predict(workload: &Workload) -> Result<Ledger> {
    workload.validate()?;
    let mut list = List { workload, ledger: Ledger::default(), times: 1, part: Part::All };
    list.setup(workload.positions());
    match &workload.task {
        Task::Forward { sequences: Some(Ragged::Packed(sequences)), logits, .. } => {
            let sequences = alone(sequences);
            list.together(Phase::Forward, &sequences, *logits, false);
        }
        Task::Forward { batch, seq, past, logits, .. } => {
            let pass = Pass::new((*batch, *seq, *past), *logits, true);
            list.pass(Phase::Forward, pass);
        }
        Task::Verify { batch, past, drafted, accepted, rounds } => {
            for round in 0..*rounds {
                let shape = (*batch, drafted + 1, past + round * (accepted + 1));
                list.pass(Phase::Decode, Pass::new(shape, Logits::All, true));
                list.sample(batch * (drafted + 1), Sampling::GREEDY);
            }
        }
        Task::Generate {
            prompts: Some(Ragged::Packed(prompts)),
            new_tokens,
            kv_cache,
            sampling,
            ..
        } => {
            let rows = prompts.count() as u64;
            for step in 0..*new_tokens {
                let phase = if step == 0 { Phase::Prefill } else { Phase::Decode };
                let longer = |(prompt, count)| match kv_cache {
                    true if step > 0 => ((1, prompt + step - 1), count),
                    _ => ((prompt + step, 0), count),
                };
                let sequences: Vec<_> = prompts.iter().map(longer).collect();
                list.together(phase, &sequences, Logits::Last, *kv_cache);
                list.sample(rows, *sampling);
            }
        }
        Task::Generate { .. } => list.generation(),
        Task::Evaluate { batch, seq, passes, rows } => {
            bounded(*passes)?;
            list.scored(rows, (*batch, *seq), *passes, Trained::NOTHING);
        }
        Task::Train { batch, seq, accumulate, steps, full, recompute, clip, moments, rows } => {
            let trained = Trained { base: *full, adapters: true };
            let passes = bounded(accumulate.saturating_mul(*steps))?;
            let found = list.scored(rows, (*batch, *seq), passes, trained);
            if *recompute {
                let again = |list: &mut List, pass| {
                    let flow = Flow::new(list, Phase::Recompute, pass, Trained::NOTHING);
                    flow.run_layers(&found.layers);
                };
                list.each_shape(rows, (*batch, *seq), passes, again);
            }
            list.times = steps * (accumulate - 1);
            list.sum_gradients(&found.parameters);
            list.times = *steps;
            list.update(&found.parameters, *clip, *moments);
        }
    }
    Ok(list.ledger)
}

/// Sequences of these lengths on top of nothing: what each feeds and holds, and how many are such.
fn alone(lengths: &Lengths) -> Vec<((u64, u64), u64)> {
    lengths.iter().map(|(length, count)| ((length, 0), count)).collect()
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
    /// Rows that reach the final norm and the head.
    head_rows: u64,
    /// Keys and values are written to a cache.
    cached: bool,
}

impl Pass {
    fn new((batch, seq, past): (u64, u64, u64), logits: Logits, cached: bool) -> Self {
        let head_rows = match logits {
            Logits::All => batch * seq,
            Logits::Last => batch,
            Logits::None => 0,
        };
        Self { batch, seq, past, head_rows, cached }
    }

    /// Whole sequences, of which nothing is kept.
    fn of_text(batch: u64, seq: u64) -> Self {
        Self::new((batch, seq, 0), Logits::All, false)
    }

    /// Rows that the layers are fed.
    fn rows(&self) -> u64 {
        self.batch * self.seq
    }

    /// Keys that a layer reads: the pass's own and those held, of which a window of W reaches the
    /// latest W − 1 from the first of the new tokens.
    fn keys(&self, window: Option<usize>) -> u64 {
        self.seq + window.map_or(self.past, |width| self.past.min(width as u64 - 1))
    }
}

/// The part of passes that is listed: where sequences are of different lengths, attention runs for
/// each by itself, and everything else for all of them at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    All,
    Attention,
    ButAttention,
}

/// The ledger in the making.
struct List<'a> {
    workload: &'a Workload,
    ledger: Ledger,
    /// How often what is added next runs.
    times: u64,
    /// Of which only this part is added.
    part: Part,
}

impl List<'_> {
    fn add(&mut self, phase: Phase, layer: Option<u32>, module: Module, op: Op, dtype: Dtype) {
        let scope = Scope { layer, module };
        // Gradients of what attention gives are summed for all sequences at once.
        let of_attention = module == Module::SelfAttn && !matches!(op, Op::Add { .. });
        let listed = match self.part {
            Part::All => true,
            Part::Attention => of_attention,
            Part::ButAttention => !of_attention,
        };
        if self.times == 0 || !listed {
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
        let head = Op::Matmul { b: 1, m: pass.head_rows, k, n };
        if pass.head_rows > 0 {
            self.add(phase, None, Module::LmHead, head, self.workload.dtype.base());
        }
    }

    /// A pass over sequences that each feed and hold their own: so many of each.
    fn together(
        &mut self,
        phase: Phase,
        sequences: &[((u64, u64), u64)],
        logits: Logits,
        cached: bool,
    ) {
        let [rows, all] = sequences
            .iter()
            .fold([0, 0], |[rows, all], ((seq, _), count)| [rows + seq * count, all + count]);
        let head_rows = match logits {
            Logits::All => rows,
            Logits::Last => all,
            Logits::None => 0,
        };
        self.part = Part::ButAttention;
        self.pass(phase, Pass { batch: 1, seq: rows, past: 0, head_rows, cached });
        self.part = Part::Attention;
        for &((seq, past), count) in sequences {
            self.times = count;
            self.pass(phase, Pass::new((1, seq, past), Logits::None, cached));
        }
        (self.times, self.part) = (1, Part::All);
    }

    /// A generation whose prompts are of one length, turn by turn.
    fn generation(&mut self) {
        let Task::Generate {
            batch,
            past,
            prompt_tokens,
            new_tokens,
            then,
            prefill_chunk,
            kv_cache,
            sampling,
            ..
        } = &self.workload.task
        else {
            return;
        };
        let (batch, mut held) = (*batch, *past);
        let first = Turn { prompt_tokens: *prompt_tokens, new_tokens: *new_tokens };
        for (index, turn) in std::iter::once(&first).chain(then).enumerate() {
            // The last token of an answer is fed with the prompt after it.
            let mut fed = turn.prompt_tokens + u64::from(index > 0);
            for step in 0..turn.new_tokens {
                let phase = if step == 0 { Phase::Prefill } else { Phase::Decode };
                while let Some(chunk) = prefill_chunk.filter(|chunk| fed > *chunk) {
                    self.pass(phase, Pass::new((batch, chunk, held), Logits::None, true));
                    (held, fed) = (held + chunk, fed - chunk);
                }
                let shape = if *kv_cache { (batch, fed, held) } else { (batch, held + fed, 0) };
                self.pass(phase, Pass::new(shape, Logits::Last, *kv_cache));
                self.sample(batch, *sampling);
                (held, fed) = (held + fed, 1);
            }
        }
    }

    /// What `list` lists of each shape of the passes of a training or an evaluation.
    fn each_shape(
        &mut self,
        rows: &Rows,
        (batch, seq): (u64, u64),
        passes: u64,
        mut list: impl FnMut(&mut Self, Pass),
    ) {
        match rows {
            Rows::Whole => {
                self.times = passes;
                list(self, Pass::of_text(batch, seq));
            }
            Rows::Padded { widths, .. } => {
                for (width, passes) in widths.iter() {
                    self.times = passes;
                    list(self, Pass::of_text(batch, width));
                }
            }
            Rows::Packed { passes, documents } => {
                for (part, lengths) in [(Part::ButAttention, passes), (Part::Attention, documents)]
                {
                    self.part = part;
                    for (length, times) in lengths.iter() {
                        self.times = times;
                        list(self, Pass::of_text(1, length));
                    }
                }
                self.part = Part::All;
            }
        }
    }

    /// Passes with logits and a loss at every position, and their gradients; gives what was trained.
    fn scored(&mut self, rows: &Rows, shape: (u64, u64), passes: u64, trained: Trained) -> Behind {
        let mut found = Behind::default();
        self.each_shape(rows, shape, passes, |list, pass| {
            let mut behind = Flow::new(list, Phase::Forward, pass, trained).run();
            if list.part != Part::Attention {
                behind.parameters.extend(list.head_and_loss(pass.rows(), trained));
                found = behind;
            }
        });
        found
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
