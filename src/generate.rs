//! The generation loop: prefill, then one token a step for every sequence of the batch.

use std::{
    cell::RefCell,
    time::{Duration, Instant},
};

use crate::{
    config::{LoraConfig, ModelConfig},
    error::{Error, Result},
    ledger::{Dtype, Module, Phase},
    meter::{Meter, Observer},
    model::Qwen2,
    ops::Sampler,
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
    /// On a GPU, record a step once and replay it.
    pub recorded: bool,
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
    model: &Qwen2,
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
    let mut cache = model.cache(meter, batch, length + max_new_tokens - 1)?;
    let mut sampler = Sampler::new(*sampling, &request.seeds);
    let mut contexts = prompts.clone();
    let mut sequences = vec![Sequence { tokens: vec![], stopped: false }; batch];

    let start = Instant::now();
    let mut first_token = Duration::ZERO;
    let mut steps = 0;
    let mut decoder = None;
    while steps < *max_new_tokens && sequences.iter().any(|s| !s.stopped) {
        let latest = |fed| contexts.iter().flat_map(move |c: &Vec<u32>| &c[c.len() - fed..]);
        if steps == 1 && request.kv_cache && !request.timed {
            let (steps, recorded) = (max_new_tokens - 1, request.recorded);
            decoder = model.decoder(&cache, &mut sampler, &contexts, steps, recorded)?;
        }
        let several = match &mut decoder {
            Some(decoder) => {
                // Nobody asks for the tokens before the device may go on, unless one may end it.
                let ahead = if request.eos.is_empty() { AHEAD } else { 1 };
                let steps = ahead.min(max_new_tokens - steps);
                decoder.next(meter, &mut cache, steps)?
            }
            None => {
                let (phase, fed) = match steps {
                    0 => (Phase::Prefill, length),
                    _ if request.kv_cache => (Phase::Decode, 1),
                    _ => {
                        cache.set_past(0)?;
                        (Phase::Decode, length + steps)
                    }
                };
                let ids: Vec<u32> = latest(fed).copied().collect();
                let meter_now = meter.phase(phase);
                let logits = model.forward(meter_now, &ids, batch, &mut cache, Logits::Last)?;
                let at = meter.phase(Phase::Sampling).at(Module::Sampler);
                vec![sampler.next(at, &logits, &contexts)?]
            }
        };
        for chosen in several {
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
    Ok(Generation { sequences, workload, first_token, decode })
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
