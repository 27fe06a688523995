//! Decoding on a GPU: the same pass as ever, of one token a sequence, with ops computed several at
//! once, recorded after its first step and replayed.

use super::{Cache, Context, Decoder};
use crate::{
    audit::GraphView,
    error::Result,
    ledger::{Module, Phase},
    meter::Meter,
    ops::{Choosing, Fault, Recording, Sampler, Workspace, decodes},
    workload::Logits,
};

/// A batch that a GPU decodes.
#[derive(Debug)]
pub struct Decoding<'a> {
    model: &'a Decoder,
    workspace: Workspace,
    choosing: Choosing,
    how: How,
    recording: Option<Recording>,
    /// Whether a step has run, and with it every kernel once.
    ran: bool,
    /// Steps that were made, and that were made room for.
    steps: (usize, usize),
}

/// How a GPU's steps are run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct How {
    /// From a recording of the first one that asks for it.
    pub recorded: bool,
    /// What is planted in that recording, to see that it is found.
    pub fault: Option<Fault>,
}

impl How {
    /// From a recording.
    pub const RECORDED: Self = Self { recorded: true, fault: None };
}

impl Decoder {
    /// A decoding of at most `steps` steps on top of what `cache` holds, the first of which feeds
    /// the last token of each of `contexts`, while `sampler` chooses. None where the device, the
    /// element type or the model's widths ask for [`Decoder::forward`].
    ///
    /// # Errors
    /// The device's, out of memory among them.
    pub fn decoding(
        &self,
        cache: &mut Cache,
        sampler: &mut Sampler,
        contexts: &[Vec<u32>],
        steps: usize,
        how: How,
    ) -> Result<Option<Decoding<'_>>> {
        let config = self.config();
        let widths = [config.hidden_size, config.intermediate_size, config.q_width()];
        if !decodes(&cache.kv, config.num_attention_heads, &widths)? {
            return Ok(None);
        }
        let vocab = config.vocab_size;
        let choosing = Choosing::on_top_of(&mut cache.kv, sampler, contexts, vocab, steps)?;
        Ok(choosing.map(|choosing| Decoding {
            model: self,
            workspace: Workspace::default(),
            choosing,
            how,
            recording: None,
            ran: false,
            steps: (0, steps),
        }))
    }
}

impl Decoding<'_> {
    /// The next tokens of every sequence, `steps` of them, step after step.
    ///
    /// # Errors
    /// Logits that are not finite, a full cache, more steps than there is room for, a device that
    /// counts otherwise than the host, or the device's own.
    pub fn next(&mut self, meter: Meter, cache: &mut Cache, steps: usize) -> Result<Vec<Vec<u32>>> {
        let (done, most) = self.steps;
        anyhow::ensure!(done + steps <= most, "{done} + {steps} steps of {most}");
        for _ in 0..steps {
            self.step(meter, cache, true)?;
            cache.kv.advance(1)?;
        }
        self.steps.0 += steps;
        let chosen = self.choosing.chosen(done, steps)?;
        cache.kv.check_device()?;
        Ok(chosen)
    }

    /// One step up to the logits on top of what `cache` holds, which holds as much afterwards: the
    /// same step, however often.
    ///
    /// # Errors
    /// The device's.
    pub fn again(&mut self, meter: Meter, cache: &mut Cache) -> Result<()> {
        self.step(meter, cache, false)
    }

    /// The recording of a step from both sides, where there is one.
    pub fn recording(&self) -> Option<&GraphView> {
        self.recording.as_ref().map(Recording::view)
    }

    fn step(&mut self, meter: Meter, cache: &mut Cache, choose: bool) -> Result<()> {
        let (workspace, choosing, model) = (&self.workspace, &self.choosing, self.model);
        cache.kv.check_room(cache.kv.batch(), 1)?;
        let held = cache.kv.held() as u64 + 1;
        let run = |meter: Meter| -> Result<()> {
            let decode = meter.phase(Phase::Decode).within(workspace);
            let context = Context::Held(cache);
            let logits = model.forward(decode, choosing.ids(), context, Logits::Last)?;
            match choose {
                true => {
                    let at = meter.phase(Phase::Sampling).at(Module::Sampler);
                    choosing.choose(at, &logits.share(), &cache.kv)
                }
                false => Ok(()),
            }
        };
        // The first step loads kernels and makes buffers, which no recording may do.
        if !(self.how.recorded && self.ran) {
            self.ran = true;
            return run(meter);
        }
        if self.recording.is_none() {
            let (device, fault) = (model.device(), self.how.fault);
            self.recording = Some(Recording::record(device, meter, fault, run)?);
        }
        match &self.recording {
            Some(recording) => recording.replay(meter, held),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use candle_core::Device;

    use super::*;
    use crate::{
        audit::Audit,
        config::{LoraConfig, ModelConfig},
        ledger::{Dtype, Ledger},
        model::AdapterSource,
        ops::{Ids, Launched},
        weights::synthetic,
        workload::{Task, Workload},
    };

    /// The audit of one step of two sequences that is kept as launches, changed by `fault`, and
    /// then reported as a replay reports it.
    fn replayed(preset: &str, fault: impl FnOnce(&mut Vec<Launched>)) -> Audit {
        let (config, lora) = (ModelConfig::preset(preset).unwrap(), LoraConfig::none());
        let weights = synthetic(config.clone(), 0).unwrap().weights;
        let adapters = AdapterSource::Fresh { lora: lora.clone(), seed: 0 };
        let device = Device::Cpu;
        let model = Decoder::load(&config, &weights, &adapters, Dtype::F32, &device, |_| Ok(()));
        let model = model.unwrap();
        let ledger = RefCell::new(Ledger::default());
        let meter = Meter::new(&ledger, Phase::Setup);
        let mut cache = model.cache(meter, 2, 13).unwrap();
        cache.set_held(12).unwrap();
        let set_up = ledger.borrow().clone();

        let launches = RefCell::new(vec![]);
        let ids = Ids::Host { ids: &[3, 4], batch: 2 };
        let recording = meter.phase(Phase::Forward).recording(&launches);
        model.forward(recording, ids, Context::Cached(&mut cache), Logits::Last).unwrap();
        assert_eq!(*ledger.borrow(), set_up, "what is recorded is not reported");

        let mut launches = launches.into_inner();
        fault(&mut launches);
        meter.replayed(&launches, 13);
        let task =
            Task::Forward { batch: 2, seq: 1, past: 12, logits: Logits::Last, sequences: None };
        let workload = Workload {
            model: config,
            lora,
            dtype: Dtype::F32,
            attention: Default::default(),
            task,
        };
        Audit::new(&[workload], &ledger.into_inner()).unwrap()
    }

    #[test]
    fn a_replay_reports_the_very_launches() {
        for preset in ["tiny", "tiny-llama", "tiny-mistral", "tiny-qwen3", "tiny-gemma3"] {
            let audit = replayed(preset, |_| ());
            assert!(audit.balanced(), "{preset}: {:#?}", audit.key_differences);
        }
    }

    #[test]
    fn a_launch_dropped_from_a_recording_or_doubled_in_it_is_found() {
        let arithmetic = |launched: &Launched| !launched.ops.is_empty();
        for n in 0..40 {
            let dropped = replayed("tiny", |launches| drop(launches.remove(n)));
            assert!(!dropped.balanced(), "launch {n} dropped");
            let doubled = replayed("tiny", |launches| {
                assert!(arithmetic(&launches[n]));
                let ops = std::mem::take(&mut launches[n].ops);
                let again = |(phase, scope, op, dtype): &(_, _, crate::ops::Reported, _)| {
                    (*phase, *scope, crate::ops::Reported::Always(op.now()), *dtype)
                };
                let copy = ops.iter().map(again).collect();
                launches[n].ops = ops;
                launches.push(Launched { ops: copy, nodes: vec![] });
            });
            assert!(!doubled.balanced(), "launch {n} doubled");
        }
    }
}
