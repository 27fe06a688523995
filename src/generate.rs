//! The generation loop: prefill, then one token a step for every sequence of the batch.

use std::{
    cell::RefCell,
    time::{Duration, Instant},
};

use crate::{
    audit::GraphView,
    config::{LoraConfig, ModelConfig},
    error::{Error, Result},
    ledger::{Dtype, Module, Phase},
    meter::{Meter, Observer},
    model::{Cache, Context, Decoder, Decoding, How, Positions},
    ops::{Ids, Sampler},
    workload::{Logits, Sampling, Task, Workload},
};

/// What to generate.
#[derive(Debug, Clone)]
pub struct Request {
    /// Token ids of each prompt, all of one length.
    pub prompts: Vec<Vec<u32>>,
    /// Most new tokens of a sequence.
    pub max_new_tokens: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Seed of each prompt's draws.
    pub seeds: Vec<u64>,
    /// Without a cache, every step runs over the whole context.
    pub kv_cache: bool,
    /// Tokens that end a sequence; none: every sequence runs to `max_new_tokens`.
    pub eos: Vec<u32>,
    /// Time each op, at the price of waiting for the device around it.
    pub timed: bool,
    /// How a GPU's steps are run.
    pub how: How,
}

/// One finished sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sequence {
    /// New tokens, the ending one included.
    pub tokens: Vec<u32>,
    /// Whether an ending token ended it, rather than the limit.
    pub stopped: bool,
}

/// What was generated, and how long it took.
#[derive(Debug, Clone)]
pub struct Generation {
    /// The sequences, in the order of the prompts.
    pub sequences: Vec<Sequence>,
    /// What ran: its `new_tokens` is the number of passes.
    pub workload: Workload,
    /// From the start to the first token, prefill and its choice.
    pub first_token: Duration,
    /// All later steps.
    pub decode: Duration,
    /// A GPU's recording of a step from both sides, where there is one.
    pub recording: Option<GraphView>,
}

/// Steps that a GPU is given at once where no token can end a sequence.
const AHEAD: usize = 16;

/// Generates, reporting each op to `observer` and each token, with its sequence, to `on_token`,
/// whose error ends the run.
///
/// # Errors
/// A prompt that is empty, of another length, too long for the model or outside its vocabulary;
/// logits that are not finite; the device's.
pub fn generate(
    model: &Decoder,
    request: &Request,
    observer: &RefCell<impl Observer>,
    mut on_token: impl FnMut(usize, u32) -> Result<()>,
) -> Result<Generation> {
    let Request { prompts, max_new_tokens, sampling, .. } = request;
    let (batch, length) = (prompts.len(), prompts.first().map_or(0, Vec::len));
    let workload = request.workload(model.config(), model.lora(), model.dtype());
    request.check(model.config())?;
    workload.validate()?;

    let meter = Meter::new(observer, Phase::Setup).timed(request.timed);
    let mut passes = Passes::new(model, meter, request, length)?;
    let mut sampler = Sampler::new(*sampling, &request.seeds);
    let mut contexts = prompts.clone();
    let mut sequences = vec![Sequence { tokens: vec![], stopped: false }; batch];

    let start = Instant::now();
    let mut first_token = Duration::ZERO;
    let mut steps = 0;
    while steps < *max_new_tokens && sequences.iter().any(|s| !s.stopped) {
        let left = max_new_tokens - steps;
        for chosen in passes.next(meter, request, &mut sampler, &contexts, left)? {
            steps += 1;
            if steps == 1 {
                first_token = start.elapsed();
            }
            for (row, (&id, sequence)) in chosen.iter().zip(&mut sequences).enumerate() {
                contexts[row].push(id);
                if !sequence.stopped {
                    sequence.tokens.push(id);
                    sequence.stopped = request.eos.contains(&id);
                    on_token(row, id)?;
                }
            }
        }
    }
    let decode = start.elapsed() - first_token;
    let workload = workload.with_new_tokens(steps as u64);
    let recording = passes.recording();
    Ok(Generation { sequences, workload, first_token, decode, recording })
}

/// The passes of a generation.
struct Passes<'a> {
    model: &'a Decoder,
    memory: Memory,
    /// A GPU's own way of decoding, once the prompt has been fed.
    decoding: Option<Decoding<'a>>,
    prefilled: bool,
}

/// What passes keep from one to the next.
enum Memory {
    Kept(Cache),
    /// Nothing: each runs over the whole context.
    Nothing(Positions),
}

impl<'a> Passes<'a> {
    fn new(model: &'a Decoder, meter: Meter, request: &Request, length: usize) -> Result<Self> {
        let (batch, most) = (request.prompts.len(), length + request.max_new_tokens - 1);
        let memory = match request.kv_cache {
            true => Memory::Kept(model.cache(meter, batch, most)?),
            false => Memory::Nothing(model.positions(meter, most)?),
        };
        Ok(Self { model, memory, decoding: None, prefilled: false })
    }

    /// The next tokens of all sequences, of which `left` more are wanted: one step, or as many as a
    /// GPU is given at once.
    fn next(
        &mut self,
        meter: Meter,
        request: &Request,
        sampler: &mut Sampler,
        contexts: &[Vec<u32>],
        left: usize,
    ) -> Result<Vec<Vec<u32>>> {
        let first = !std::mem::replace(&mut self.prefilled, true);
        if let Memory::Kept(cache) = &mut self.memory {
            if self.decoding.is_none() && !first && !request.timed {
                let model = self.model;
                self.decoding = model.decoding(cache, sampler, contexts, left, request.how)?;
            }
            if let Some(decoding) = &mut self.decoding {
                // Nobody asks for the tokens before the device may go on, unless one may end it.
                let ahead = if request.eos.is_empty() { AHEAD } else { 1 };
                return decoding.next(meter, cache, ahead.min(left));
            }
        }
        let phase = if first { Phase::Prefill } else { Phase::Decode };
        let all = contexts.first().map_or(0, Vec::len);
        let (context, fed) = match &mut self.memory {
            Memory::Kept(cache) if first => (Context::Cached(cache), all),
            Memory::Kept(cache) => (Context::Cached(cache), 1),
            Memory::Nothing(positions) => (Context::Whole(positions), all),
        };
        let latest = contexts.iter().flat_map(|context| &context[context.len() - fed..]);
        let ids: Vec<u32> = latest.copied().collect();
        let ids = Ids::Host { ids: &ids, batch: contexts.len() };
        let logits = self.model.forward(meter.phase(phase), ids, context, Logits::Last)?.share();
        let at = meter.phase(Phase::Sampling).at(Module::Sampler);
        Ok(vec![sampler.next(at, &logits, contexts)?])
    }

    fn recording(&self) -> Option<GraphView> {
        self.decoding.as_ref().and_then(|decoding| decoding.recording().cloned())
    }
}

impl Request {
    /// What runs if no sequence ends early.
    pub fn workload(&self, model: &ModelConfig, lora: &LoraConfig, dtype: Dtype) -> Workload {
        let task = Task::Generate {
            batch: self.prompts.len() as u64,
            prompt_tokens: self.prompts.first().map_or(0, Vec::len) as u64,
            new_tokens: self.max_new_tokens as u64,
            max_new_tokens: self.max_new_tokens as u64,
            kv_cache: self.kv_cache,
            sampling: self.sampling,
        };
        Workload { model: model.clone(), lora: lora.clone(), dtype, task }
    }

    /// Refuses what `model` cannot run, before anything runs.
    ///
    /// # Errors
    /// A prompt that is empty, of another length or too long.
    pub fn check(&self, model: &ModelConfig) -> Result<()> {
        let Request { prompts, max_new_tokens, seeds, .. } = self;
        let fail = |why: String| Err(Error::Prompt(why).into());
        let Some(first) = prompts.first().filter(|p| !p.is_empty()) else {
            return fail("is empty".into());
        };
        if let Some((i, p)) = prompts.iter().enumerate().find(|(_, p)| p.len() != first.len()) {
            let (n, m) = (p.len(), first.len());
            return fail(format!(
                "number {} has {n} tokens, the first has {m}; a batch needs equal lengths",
                i + 1
            ));
        }
        anyhow::ensure!(
            seeds.len() == prompts.len(),
            "{} seeds for {} prompts",
            seeds.len(),
            prompts.len()
        );
        if *max_new_tokens == 0 {
            return Err(Error::flag("--max-new-tokens", "must be at least 1").into());
        }
        let most = model.max_position_embeddings;
        if first.len() > most {
            return fail(format!("{} tokens are past the model's {most} positions", first.len()));
        }
        match first.len().checked_add(*max_new_tokens) {
            Some(all) if all <= most => Ok(()),
            _ => {
                let why = format!(
                    "{} prompt tokens and {max_new_tokens} new ones are past the model's {most} positions; \
                 lower --max-new-tokens",
                    first.len()
                );
                fail(why)
            }
        }
    }
}
