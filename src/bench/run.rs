//! Runs a workload again and again, timed and metered.

use std::{cell::RefCell, time::Instant};

use rand::{Rng, SeedableRng, rngs::StdRng};

use super::{Clocks, EnergyCounter};
use crate::{
    analytic,
    audit::Audit,
    error::Result,
    generate::{Request, generate},
    ledger::{Ledger, MomentDtype, Phase},
    meter::Meter,
    model::{Context, Decoder, How, Labelled, Trained},
    ops::Ids,
    ops::Sampler,
    tally::Tally,
    train::{Hyper, Trainer},
    workload::{Logits, Rows, Sampling, Task, Workload},
};

/// How often, and who hears of it.
#[derive(Clone, Copy)]
pub struct Runner<'a> {
    /// Units that run before any is timed.
    pub warmup: usize,
    /// Units that are timed.
    pub samples: usize,
    /// Seed of the tokens, which are random.
    pub seed: u64,
    /// What the device draws, where it tells.
    pub energy: Option<&'a EnergyCounter>,
    /// Hears of each unit done, and may end the work with an error.
    pub tick: &'a dyn Fn() -> Result<()>,
}

/// How a step trains.
#[derive(Debug, Clone, Copy)]
pub struct Training {
    /// Every weight, not the adapters alone.
    pub full: bool,
    /// Layers run forward again for their gradients.
    pub recompute: bool,
    /// How the optimizer keeps its moments.
    pub moments: MomentDtype,
}

/// What ran, how often, and how long each timed unit took.
#[derive(Debug)]
pub struct Measured {
    /// One unit.
    pub workload: Workload,
    /// Seconds of each timed unit.
    pub samples: Vec<f64>,
    /// Joules of the timed units together.
    pub joules: Option<f64>,
    /// Clocks right after them.
    pub clocks: Option<Clocks>,
    /// Everything that ran, warm-up and setup among it.
    pub ledger: Ledger,
    /// Units that ran, warm-up among them.
    pub units: u64,
    /// Predicted against executed, of everything that ran.
    pub audit: Audit,
}

/// What the timing of units leaves behind.
struct Timed {
    samples: Vec<f64>,
    joules: Option<f64>,
    clocks: Option<Clocks>,
}

impl Runner<'_> {
    /// Passes over random prompts, each with the choice of its first tokens: what a user waits
    /// for. A pass starts with an empty cache.
    ///
    /// # Errors
    /// A workload that the model cannot run, or the device's.
    pub fn prefill(&self, model: &Decoder, batch: u64, seq: u64) -> Result<Measured> {
        let mut tokens = self.tokens(model);
        let request = Request {
            prompts: (0..batch).map(|_| tokens(seq)).collect(),
            max_new_tokens: 1,
            sampling: Sampling::GREEDY,
            seeds: vec![self.seed; batch as usize],
            kv_cache: true,
            eos: vec![],
            timed: false,
            how: How::RECORDED,
            past: 0,
            prefill_chunk: None,
            then: vec![],
        };
        let ledger = RefCell::new(Ledger::default());
        let timed = self.time(|| {
            let run = generate(model, &request, &ledger, |_, _| Ok(()))?;
            Ok(run.first_token.as_secs_f64())
        })?;
        let workload = model.workload(request.task());
        let ledger = ledger.into_inner();
        let audit = Audit::new(&vec![workload.clone(); self.units()], &ledger)?;
        Ok(self.measured(workload, timed, ledger, audit))
    }

    /// One further token for each of `batch` sequences that hold `context` already: zeros, which
    /// cost the same. No token is chosen.
    ///
    /// # Errors
    /// As [`Runner::prefill`].
    pub fn decode(&self, model: &Decoder, batch: u64, context: u64) -> Result<Measured> {
        let ids = self.tokens(model)(batch);
        let ledger = RefCell::new(Ledger::default());
        let meter = Meter::new(&ledger, Phase::Setup);
        let (rows, past) = (batch as usize, context as usize);
        let mut cache = model.cache(meter, rows, past + 1)?;
        let meter = meter.phase(Phase::Decode);
        cache.set_held(past)?;
        let mut sampler = Sampler::new(Sampling::GREEDY, &vec![0; rows]);
        let fed: Vec<_> = ids.iter().map(|&id| vec![id]).collect();
        let mut on_gpu = model.decoding(&mut cache, &mut sampler, &fed, 1, How::RECORDED)?;
        let timed = self.time(|| {
            let ids = Ids::Host { ids: &ids, batch: rows };
            model.device().synchronize()?;
            let start = Instant::now();
            match &mut on_gpu {
                Some(decoding) => decoding.again(meter, &mut cache)?,
                None => drop(model.forward(meter, ids, Context::Held(&cache), Logits::Last)?),
            }
            model.device().synchronize()?;
            Ok(start.elapsed().as_secs_f64())
        })?;
        let task = Task::Generate {
            batch,
            prompt_tokens: context,
            new_tokens: 2,
            max_new_tokens: 2,
            kv_cache: true,
            sampling: Sampling::GREEDY,
            past: 0,
            prompts: None,
            then: vec![],
            prefill_chunk: None,
        };
        let workload = model.workload(task);
        let ledger = ledger.into_inner();
        let audit = decoding(&workload, self.units() as u64, &ledger)?;
        let recording = on_gpu.as_ref().and_then(|decoding| decoding.recording().cloned());
        let audit = audit.with_graphs(recording);
        Ok(self.measured(workload, timed, ledger, audit))
    }

    /// Optimizer steps on random tokens, of one micro-step of batch × seq each. Gives the model back,
    /// trained.
    ///
    /// # Errors
    /// As [`Runner::prefill`]; a model without anything to train.
    pub fn train(
        &self,
        model: Decoder,
        (batch, seq): (u64, u64),
        Training { full, recompute, moments }: Training,
    ) -> Result<(Measured, Decoder)> {
        let task = |steps| Task::Train {
            batch,
            seq,
            accumulate: 1,
            steps,
            full,
            recompute,
            clip: true,
            moments,
            rows: Rows::Whole,
        };
        let workload = model.workload(task(1));
        let all = model.workload(task(self.units() as u64));
        workload.validate()?;
        let mut tokens = self.tokens(&model);
        let (ids, targets) = (tokens(batch * seq), tokens(batch * seq));
        let weights = vec![1.0 / ids.len() as f32; ids.len()];
        let text = Labelled {
            ids: &ids,
            targets: &targets,
            weights: &weights,
            batch: batch as usize,
            sequences: None,
        };

        let ledger = RefCell::new(Ledger::default());
        let meter = Meter::new(&ledger, Phase::Setup);
        let trained = if full { Trained::All } else { Trained::Adapters };
        let hyper = Hyper { moments, ..Hyper::DEFAULT };
        let mut trainer = Trainer::new(meter, model, trained, hyper, seq as usize, recompute)?;
        let device = trainer.model.device().clone();
        let timed = self.time(|| {
            device.synchronize()?;
            let start = Instant::now();
            let found = trainer.gradients(meter, &[text])?;
            trainer.update(meter, found, 1e-5)?;
            device.synchronize()?;
            Ok(start.elapsed().as_secs_f64())
        })?;
        let ledger = ledger.into_inner();
        let audit = Audit::new(&[all], &ledger)?;
        Ok((self.measured(workload, timed, ledger, audit), trainer.model))
    }

    fn units(&self) -> usize {
        self.warmup + self.samples
    }

    /// Warm-up, then timed units.
    fn time(&self, mut unit: impl FnMut() -> Result<f64>) -> Result<Timed> {
        for _ in 0..self.warmup {
            unit()?;
            (self.tick)()?;
        }
        let joules = || self.energy.and_then(EnergyCounter::joules);
        let before = joules();
        let mut samples = Vec::with_capacity(self.samples);
        for _ in 0..self.samples {
            samples.push(unit()?);
            (self.tick)()?;
        }
        let clocks = self.energy.and_then(EnergyCounter::clocks);
        let joules = joules().zip(before).map(|(after, before)| after - before);
        Ok(Timed { samples, joules, clocks })
    }

    /// Draws so many random tokens.
    fn tokens(&self, model: &Decoder) -> impl FnMut(u64) -> Vec<u32> + use<> {
        let mut rng = StdRng::seed_from_u64(self.seed);
        let vocab = model.config().vocab_size as u32;
        move |n| (0..n).map(|_| rng.random_range(0..vocab)).collect()
    }

    fn measured(&self, workload: Workload, timed: Timed, ledger: Ledger, audit: Audit) -> Measured {
        let Timed { samples, joules, clocks } = timed;
        Measured { workload, samples, joules, clocks, ledger, units: self.units() as u64, audit }
    }
}

/// Compares the decoding of `generation`, `times` over, and the tables it needs once, with what
/// ran.
fn decoding(generation: &Workload, times: u64, executed: &Ledger) -> Result<Audit> {
    let calls = |phase| match phase {
        Phase::Setup => 1,
        Phase::Decode => times,
        _ => 0,
    };
    let mut predicted = Ledger::default();
    for (key, entry) in analytic::predict(generation)?.iter() {
        if calls(key.phase) > 0 {
            predicted.add(*key, entry.calls * calls(key.phase), entry.time);
        }
    }
    let mut closed_form = Tally::default();
    for (phase, component, sum) in analytic::closed_form(generation)?.iter() {
        let mut row = Tally::default();
        row.add(phase, component, *sum)?;
        closed_form.extend_times(calls(phase).into(), &row)?;
    }
    Audit::compare(closed_form, &predicted, executed)
}
