//! The generation loop: prefill, then one token a step for every sequence of the batch.

use std::{
    cell::RefCell,
    time::{Duration, Instant},
};

use crate::{
    audit::GraphView,
    config::ModelConfig,
    error::{Error, Result},
    ledger::{Module, Phase},
    meter::{Meter, Observer},
    model::{Cache, Context, Decoder, Decoding, How, Positions},
    ops::{Ids, Sampler, Unshared},
    workload::{Lengths, Logits, Ragged, Sampling, Task, Turn, Workload},
};

/// What to generate.
#[derive(Debug, Clone)]
pub struct Request {
    /// Token ids of each prompt. Where they are of different lengths, they are fed one behind the
    /// other, and none is padded.
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
    /// Tokens that each sequence holds already: zeros, which cost the same. Needs the cache.
    pub past: usize,
    /// Most tokens of a prompt that one pass feeds. Needs the cache.
    pub prefill_chunk: Option<usize>,
    /// Further turns, which run to their full lengths: no token may end a sequence.
    pub then: Vec<Next>,
}

/// A further turn.
#[derive(Debug, Clone)]
pub struct Next {
    /// Token ids that go on each sequence, all of one length.
    pub prompts: Vec<Vec<u32>>,
    /// New tokens of each sequence.
    pub new_tokens: usize,
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
    /// A GPU's recordings of a step from both sides, where there are any: one of each turn.
    pub recordings: Vec<GraphView>,
}

/// Steps that a GPU is given at once where no token can end a sequence.
const AHEAD: usize = 16;

/// Generates, reporting each op to `observer` and each token, with its sequence, to `on_token`,
/// whose error ends the run.
///
/// # Errors
/// A prompt that is empty, too long for the model or outside its vocabulary; a request that
/// contradicts itself; logits that are not finite; the device's.
pub fn generate(
    model: &Decoder,
    request: &Request,
    observer: &RefCell<impl Observer>,
    mut on_token: impl FnMut(usize, u32) -> Result<()>,
) -> Result<Generation> {
    let Request { prompts, sampling, .. } = request;
    let workload = model.workload(request.task());
    request.check(model.config())?;
    workload.validate()?;

    let meter = Meter::new(observer, Phase::Setup).timed(request.timed);
    let mut passes = Passes::new(model, meter, request, &workload)?;
    let mut sampler = Sampler::new(*sampling, &request.seeds);
    let mut contexts = vec![vec![]; prompts.len()];
    let mut sequences = vec![Sequence { tokens: vec![], stopped: false }; prompts.len()];

    let start = Instant::now();
    let mut first_token = Duration::ZERO;
    let mut first_steps = None;
    let turns = request.then.iter().map(|next| (&next.prompts, next.new_tokens));
    for (prompts, most) in std::iter::once((prompts, request.max_new_tokens)).chain(turns) {
        passes.begin(prompts.iter().map(Vec::len));
        contexts.iter_mut().zip(prompts).for_each(|(context, prompt)| context.extend(prompt));
        let mut steps = 0;
        while steps < most && sequences.iter().any(|s| !s.stopped) {
            let left = most - steps;
            for chosen in passes.next(meter, request, &mut sampler, &contexts, left)? {
                steps += 1;
                if first_token.is_zero() {
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
        first_steps.get_or_insert(steps);
    }
    let decode = start.elapsed() - first_token;
    let workload = workload.with_new_tokens(first_steps.unwrap_or(0) as u64);
    let recordings = passes.recordings();
    Ok(Generation { sequences, workload, first_token, decode, recordings })
}

/// The passes of a generation.
struct Passes<'a> {
    model: &'a Decoder,
    memory: Memory,
    /// A GPU's own way of decoding, once the prompt has been fed.
    decoding: Option<Decoding<'a>>,
    /// Recordings of the turns before.
    recordings: Vec<GraphView>,
    /// Tokens of each sequence that the next pass feeds, the first of a turn.
    unfed: Option<Vec<usize>>,
    /// Whether sequences are of different lengths.
    ragged: bool,
    turns: usize,
}

/// What passes keep from one to the next.
enum Memory {
    Kept(Cache),
    /// Nothing: each runs over the whole context.
    Nothing(Positions),
}

impl<'a> Passes<'a> {
    fn new(
        model: &'a Decoder,
        meter: Meter,
        request: &Request,
        workload: &Workload,
    ) -> Result<Self> {
        let (batch, most) = (request.prompts.len(), workload.positions() as usize);
        let memory = match request.kv_cache {
            true => {
                let mut cache = model.cache(meter, batch, most)?;
                cache.set_held(request.past)?;
                Memory::Kept(cache)
            }
            false => Memory::Nothing(model.positions(meter, most)?),
        };
        Ok(Self {
            model,
            memory,
            decoding: None,
            recordings: vec![],
            unfed: None,
            ragged: request.is_ragged(),
            turns: 0,
        })
    }

    /// Begins a turn whose prompts are of these lengths.
    fn begin(&mut self, prompts: impl Iterator<Item = usize>) {
        // What was chosen last has not been fed yet.
        let before = usize::from(self.turns > 0);
        self.unfed = Some(prompts.map(|length| length + before).collect());
        self.turns += 1;
        self.recordings = self.recordings();
        self.decoding = None;
        if let Memory::Kept(cache) = &mut self.memory {
            cache.count_on_host();
        }
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
        let prompts = self.unfed.take();
        if let Memory::Kept(cache) = &mut self.memory {
            if self.decoding.is_none() && prompts.is_none() && !request.timed {
                let model = self.model;
                self.decoding = model.decoding(cache, sampler, contexts, left, request.how)?;
            }
            if let Some(decoding) = &mut self.decoding {
                // Nobody asks for the tokens before the device may go on, unless one may end it.
                let ahead = if request.eos.is_empty() { AHEAD } else { 1 };
                return decoding.next(meter, cache, ahead.min(left));
            }
        }
        let phase = if prompts.is_some() { Phase::Prefill } else { Phase::Decode };
        let fed = match self.memory {
            Memory::Kept(_) => prompts.unwrap_or(vec![1; contexts.len()]),
            Memory::Nothing(_) => contexts.iter().map(Vec::len).collect(),
        };
        let meter = meter.phase(phase);
        let logits = self.feed(meter, contexts, fed, request.prefill_chunk)?.share();
        let at = meter.phase(Phase::Sampling).at(Module::Sampler);
        Ok(vec![sampler.next(at, &logits, contexts)?])
    }

    /// Feeds the latest tokens of each context, so many as `fed` says, in parts of at most `chunk`:
    /// logits of the last.
    fn feed(
        &mut self,
        meter: Meter,
        contexts: &[Vec<u32>],
        fed: Vec<usize>,
        chunk: Option<usize>,
    ) -> Result<Unshared> {
        let latest = |fed: &[usize], most: usize| -> Vec<u32> {
            let parts = contexts.iter().zip(fed);
            let parts =
                parts.map(|(context, fed)| &context[context.len() - fed..][..most.min(*fed)]);
            parts.flatten().copied().collect()
        };
        if self.ragged {
            let ids = latest(&fed, usize::MAX);
            let ids = Ids::Host { ids: &ids, batch: 1 };
            let context = match &mut self.memory {
                Memory::Kept(cache) => Context::Each(cache, &fed),
                Memory::Nothing(positions) => Context::Packed(positions, &fed),
            };
            return self.model.forward(meter, ids, context, Logits::Last);
        }
        let mut left = fed;
        while let (Some(chunk), Memory::Kept(cache)) = (chunk, &mut self.memory)
            && left.iter().any(|left| *left > chunk)
        {
            let ids = latest(&left, chunk);
            let ids = Ids::Host { ids: &ids, batch: contexts.len() };
            self.model.feed(meter, ids, Context::Cached(cache))?;
            left.iter_mut().for_each(|left| *left -= chunk);
        }
        let ids = latest(&left, usize::MAX);
        let ids = Ids::Host { ids: &ids, batch: contexts.len() };
        let context = match &mut self.memory {
            Memory::Kept(cache) => Context::Cached(cache),
            Memory::Nothing(positions) => Context::Whole(positions),
        };
        self.model.forward(meter, ids, context, Logits::Last)
    }

    /// Of all turns so far.
    fn recordings(&self) -> Vec<GraphView> {
        let now = self.decoding.as_ref().and_then(|decoding| decoding.recording().cloned());
        self.recordings.iter().cloned().chain(now).collect()
    }
}

impl Request {
    /// Whether prompts are of different lengths.
    pub fn is_ragged(&self) -> bool {
        let lengths = self.prompts.iter().map(Vec::len);
        lengths.clone().max() != lengths.min()
    }

    /// What runs if no sequence ends early.
    pub fn task(&self) -> Task {
        let lengths: Lengths = self.prompts.iter().map(|prompt| prompt.len() as u64).collect();
        let turn = |next: &Next| Turn {
            prompt_tokens: next.prompts.first().map_or(0, Vec::len) as u64,
            new_tokens: next.new_tokens as u64,
        };
        Task::Generate {
            batch: self.prompts.len() as u64,
            past: self.past as u64,
            prompt_tokens: lengths.range().map_or(0, |(_, longest)| longest),
            prompts: self.is_ragged().then_some(Ragged::Packed(lengths)),
            new_tokens: self.max_new_tokens as u64,
            max_new_tokens: self.max_new_tokens as u64,
            then: self.then.iter().map(turn).collect(),
            prefill_chunk: self.prefill_chunk.map(|chunk| chunk as u64),
            kv_cache: self.kv_cache,
            sampling: self.sampling,
        }
    }

    /// Refuses what `model` cannot run, before anything runs.
    ///
    /// # Errors
    /// A prompt that is empty or too long; further turns that are not of one length, or that a token
    /// could end.
    pub fn check(&self, model: &ModelConfig) -> Result<()> {
        let Request { prompts, max_new_tokens, seeds, then, .. } = self;
        let fail = |why: String| Err(Error::Prompt(why).into());
        if prompts.is_empty() {
            return fail("is empty".into());
        }
        if let Some(empty) = prompts.iter().position(Vec::is_empty) {
            return fail(match prompts.len() {
                1 => "is empty".into(),
                _ => format!("number {} is empty", empty + 1),
            });
        }
        anyhow::ensure!(
            seeds.len() == prompts.len(),
            "{} seeds for {} prompts",
            seeds.len(),
            prompts.len()
        );
        for next in then {
            let length = next.prompts.first().map_or(0, Vec::len);
            let alike = next.prompts.iter().all(|prompt| prompt.len() == length);
            anyhow::ensure!(
                alike && next.prompts.len() == prompts.len() && self.eos.is_empty(),
                "a further turn needs a prompt of one length for each sequence, and none may end"
            );
        }
        if *max_new_tokens == 0 {
            return Err(Error::flag("--max-new-tokens", "must be at least 1").into());
        }
        let most = model.max_position_embeddings;
        let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
        if longest > most {
            return fail(format!("{longest} tokens are past the model's {most} positions"));
        }
        let turns = then.iter().flat_map(|next| [next.prompts[0].len(), next.new_tokens]);
        let all = [self.past, longest, *max_new_tokens].into_iter().chain(turns);
        match all.into_iter().try_fold(0usize, usize::checked_add) {
            Some(all) if all <= most => Ok(()),
            Some(all) if self.past > 0 || !then.is_empty() => {
                fail(format!("{all} tokens in all are past the model's {most} positions"))
            }
            _ => {
                let why = format!(
                    "{longest} prompt tokens and {max_new_tokens} new ones are past the model's {most} \
                     positions; lower --max-new-tokens"
                );
                fail(why)
            }
        }
    }
}
