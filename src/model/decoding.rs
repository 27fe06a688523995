//! Decoding on a GPU: the same pass as ever, of one token a sequence, with ops computed several at
//! once, recorded after its first step and replayed.

use std::cell::RefCell;

use super::{Cache, Context, Decoder};
use crate::{
    audit::GraphView,
    error::Result,
    ledger::{Module, Phase},
    meter::Meter,
    ops::{Choosing, Fault, Recording, Sampler, WholeStep, Workspace, decodes},
    workload::Logits,
};

/// A batch that a GPU decodes.
#[derive(Debug)]
pub struct Decoding<'a> {
    model: &'a Decoder,
    workspace: Workspace,
    /// What a step is, where it is one launch.
    whole: Option<WholeStep>,
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
        let Some(choosing) = choosing else { return Ok(None) };
        // Tensors alone are of interest here, and nothing is launched.
        let nobody = RefCell::new(());
        let model = self.whole(Meter::new(&nobody, Phase::Setup), cache)?;
        let whole = model.map(|model| WholeStep::new(&model, &cache.kv)).transpose()?.flatten();
        Ok(Some(Decoding {
            model: self,
            workspace: Workspace::default(),
            whole,
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
        let whole = self.whole.as_ref();
        cache.kv.check_room(cache.kv.batch(), 1)?;
        let held = cache.kv.held() as u64 + 1;
        let run = |meter: Meter| -> Result<()> {
            let decode = meter.phase(Phase::Decode).within(workspace);
            let context = Context::Held(cache);
            let at = meter.phase(Phase::Sampling).at(Module::Sampler);
            let described = whole.map(|_| model.whole(decode, cache)).transpose()?.flatten();
            let logits = match (whole, described) {
                (Some(whole), Some(model)) => whole.run(&model, &cache.kv, choosing.ids())?.clone(),
                _ => model.forward(decode, choosing.ids(), context, Logits::Last)?.share(),
            };
            match choose {
                true => choosing.choose(at, &logits, &cache.kv),
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

    #[cfg(feature = "cuda")]
    #[test]
    fn a_step_in_one_launch_computes_what_the_launches_of_a_step_do() {
        use crate::workload::Sampling;

        let device = Device::new_cuda(0).unwrap();
        let lora = LoraConfig::none();
        // Widths of which each block has several rows, or none; heads of both widths; all that a
        // family may add.
        for (preset, hidden, inner, heads, kv_heads, d, layers) in [
            ("tiny", 896, 4864, 14, 2, 64, 3),
            ("tiny", 64, 192, 2, 1, 64, 2),
            ("tiny-llama", 2048, 8192, 32, 8, 64, 2),
            ("tiny-qwen3", 1024, 3072, 16, 8, 128, 2),
            ("tiny-mistral", 256, 640, 4, 2, 64, 3),
        ] {
            let mut config = ModelConfig::preset(preset).unwrap();
            config.hidden_size = hidden;
            config.intermediate_size = inner;
            config.num_attention_heads = heads;
            config.num_key_value_heads = kv_heads;
            config.head_dim = Some(d);
            config.num_hidden_layers = layers;
            config.max_position_embeddings = 2048;
            let weights = synthetic(config.clone(), 1).unwrap().weights;
            let adapters = AdapterSource::Fresh { lora: lora.clone(), seed: 0 };
            let dtype = Dtype::BF16;
            let model = Decoder::load(&config, &weights, &adapters, dtype, &device, |_| Ok(()));
            let model = model.unwrap();
            let nobody = RefCell::new(());
            let meter = Meter::new(&nobody, Phase::Decode);
            for (prompt, capacity) in [(1, 40), (130, 200), (900, 1000), (1900, 2000)] {
                let ids: Vec<u32> = (0..prompt).map(|i| (i * 7 % 97) as u32).collect();
                let steps = |whole: bool, before: usize| {
                    let mut cache = model.cache(meter, 1, capacity).unwrap();
                    let fed = Ids::Host { ids: &ids, batch: 1 };
                    model.feed(meter, fed, Context::Cached(&mut cache)).unwrap();
                    let mut sampler = Sampler::new(Sampling::GREEDY, &[1]);
                    let contexts = [vec![5u32]];
                    let how = How::RECORDED;
                    let decoding =
                        model.decoding(&mut cache, &mut sampler, &contexts, 8, how).unwrap();
                    let mut decoding = decoding.unwrap();
                    let made = decoding.whole.is_some();
                    assert!(made, "{preset} of {hidden}: no launch for a whole step");
                    if !whole {
                        decoding.whole = None;
                    }
                    let tokens = match before {
                        0 => vec![],
                        _ => decoding.next(meter, &mut cache, before).unwrap(),
                    };
                    // One more, whose logits are looked at.
                    let context = Context::Held(&cache);
                    let logits = match &decoding.whole {
                        Some(whole) => {
                            let described = model.whole(meter, &cache).unwrap().unwrap();
                            whole
                                .run(&described, &cache.kv, decoding.choosing.ids())
                                .unwrap()
                                .clone()
                        }
                        None => {
                            let meter = meter.within(&decoding.workspace);
                            let ids = decoding.choosing.ids();
                            model.forward(meter, ids, context, Logits::Last).unwrap().share()
                        }
                    };
                    (tokens, logits.to_vec().unwrap())
                };
                let square =
                    |v: &mut dyn Iterator<Item = f32>| v.map(|x| f64::from(x * x)).sum::<f64>();
                for before in [0, 6] {
                    let ((tokens, logits), (expected, close_to)) =
                        (steps(true, before), steps(false, before));
                    let all = square(&mut close_to.iter().copied());
                    let apart = square(&mut logits.iter().zip(&close_to).map(|(a, b)| a - b));
                    let apart = (apart / all).sqrt();
                    println!(
                        "{preset} {hidden} after {prompt} + {before}: {apart:.1e}, {tokens:?}"
                    );
                    // Of two tokens that are as likely rounding decides, and then all is another text.
                    let same = tokens == expected;
                    let what = format!("{preset} of {hidden} after {prompt} + {before}");
                    assert!(!same || apart < 0.05, "{what}: {apart}");
                }
            }
        }
    }
}
