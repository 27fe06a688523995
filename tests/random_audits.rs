//! The audit balances on random small models and workloads, executed for real: models of every
//! family, and of others that could be.

#[path = "../count/tests/random/mod.rs"]
mod random;

use std::cell::RefCell;

use candle_core::Device;
use flopaudit::{
    audit::Audit,
    config::{LoraConfig, ModelConfig},
    generate::{Request, generate},
    ledger::{Dtype, Ledger, MomentDtype, Phase},
    meter::Meter,
    model::{AdapterSource, Context, Decoder, How, Labelled, Trained},
    ops::Ids,
    train::{Hyper, Trainer},
    weights::synthetic,
    workload::{Logits, Rows, Sampling, Task, Workload},
};
use proptest::prelude::*;
use random::{SMALL, adapted};

fn samplings() -> impl Strategy<Value = Sampling> {
    let stochastic =
        (0.1f64..3.0, proptest::option::of(1usize..70), proptest::option::of(0.05f64..1.0));
    (proptest::option::of(stochastic), prop_oneof![Just(1.0), Just(1.3)]).prop_map(
        |(s, repeat_penalty)| match s {
            None => Sampling { repeat_penalty, ..Sampling::GREEDY },
            Some((temperature, top_k, top_p)) => {
                Sampling { temperature, top_k, top_p, repeat_penalty }
            }
        },
    )
}

fn dtypes() -> impl Strategy<Value = Dtype> {
    prop_oneof![Just(Dtype::F32), Just(Dtype::BF16), Just(Dtype::Fp8)]
}

fn load(model: &ModelConfig, lora: &LoraConfig, dtype: Dtype) -> Decoder {
    let weights = synthetic(model.clone(), 1).unwrap().weights;
    let adapters = AdapterSource::Fresh { lora: lora.clone(), seed: 2 };
    Decoder::load_to_train(model, &weights, &adapters, dtype, &Device::Cpu, |_| Ok(())).unwrap()
}

fn assert_balanced(workload: &Workload, ledger: &Ledger) {
    let audit = Audit::new(std::slice::from_ref(workload), ledger).unwrap();
    assert!(audit.balanced(), "{:#?}\n{:#?}", audit.key_differences, audit.sum_differences);
    let [closed, predicted, executed] =
        audit.totals(&flopaudit::prices::Prices::coursework()).unwrap();
    assert!(closed == executed && predicted == executed && executed > 0);
}

/// (batch, length) of texts: a few tokens, or more rows than one chunk of the loss takes.
fn texts() -> impl Strategy<Value = (usize, usize)> {
    prop_oneof![15 => (1usize..4, 1usize..9), 1 => (9usize..12, 114usize..128)]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn forward_balances(
        (model, lora) in adapted(SMALL, 3), batch in 1usize..4, seq in 1usize..9, past in 0usize..9,
        all in any::<bool>(), dtype in dtypes(),
    ) {
        let logits = if all { Logits::All } else { Logits::Last };
        let qwen = load(&model, &lora, dtype);
        let ledger = RefCell::new(Ledger::default());
        let meter = Meter::new(&ledger, Phase::Setup);
        let mut cache = qwen.cache(meter, batch, past + seq).unwrap();
        cache.set_held(past).unwrap();
        let ids: Vec<u32> = (0..batch * seq).map(|i| (i % model.vocab_size) as u32).collect();
        let out = qwen.forward(meter.phase(Phase::Forward), Ids::Host { ids: &ids, batch }, Context::Cached(&mut cache), logits).unwrap();
        let rows = if all { seq } else { 1 };
        prop_assert_eq!(out.dims(), [batch, rows, model.vocab_size]);
        let (batch, seq, past) = (batch as u64, seq as u64, past as u64);
        let task = Task::Forward { batch, seq, past, logits, sequences: None };
        assert_balanced(&Workload { model, lora, dtype, attention: Default::default(), task }, &ledger.into_inner());
    }

    #[test]
    fn generation_balances(
        (model, lora) in adapted(SMALL, 3), batch in 1usize..3, prompt in 1usize..7, new in 1usize..7,
        kv_cache in any::<bool>(), sampling in samplings(), eos in any::<bool>(), dtype in dtypes(),
    ) {
        let qwen = load(&model, &lora, dtype);
        let prompts = (0..batch).map(|b| (0..prompt).map(|i| ((b + 3 * i) % model.vocab_size) as u32).collect());
        let request = Request {
            prompts: prompts.collect(),
            max_new_tokens: new,
            sampling,
            seeds: (7..).take(batch).collect(),
            kv_cache,
            eos: if eos { vec![0, 1] } else { vec![] },
            timed: false,
            how: How::RECORDED, past: 0, prefill_chunk: None, then: vec![] };
        let ledger = RefCell::new(Ledger::default());
        let mut told = 0;
        let out = generate(&qwen, &request, &ledger, |_, _| {
            told += 1;
            Ok(())
        }).unwrap();
        prop_assert_eq!(told, out.sequences.iter().map(|s| s.tokens.len()).sum::<usize>());
        assert_balanced(&out.workload, &ledger.into_inner());
    }

    #[test]
    fn training_balances(
        (model, lora) in adapted(SMALL, 3), (batch, seq) in texts(),
        accumulate in 1usize..4, steps in 1usize..3, [full, recompute, clip, narrow] in any::<[bool; 4]>(),
        dtype in dtypes(),
    ) {
        let full = full || lora.rank == 0;
        // Weights in 8 bits are frozen.
        let dtype = if full { dtype.base() } else { dtype };
        let ledger = RefCell::new(Ledger::default());
        let meter = Meter::new(&ledger, Phase::Setup);
        let trained = if full { Trained::All } else { Trained::Adapters };
        let clip_at = clip.then_some(0.1);
        let moments = if narrow { MomentDtype::BF16 } else { MomentDtype::F32 };
        let hyper = Hyper { betas: (0.9, 0.99), eps: 1e-8, weight_decay: 0.1, clip: clip_at, moments };
        let qwen = load(&model, &lora, dtype);
        let mut trainer =
            Trainer::new(meter, qwen, trained, hyper, seq, recompute).unwrap();
        let ids: Vec<u32> = (0..batch * seq).map(|i| (i * i % model.vocab_size) as u32).collect();
        let weights = vec![1.0 / (ids.len() * accumulate) as f32; ids.len()];
        let text = Labelled { ids: &ids, targets: &ids, weights: &weights, batch, sequences: None };
        for _ in 0..steps {
            let found = trainer.gradients(meter, &vec![text; accumulate]).unwrap();
            trainer.update(meter, found, 0.01).unwrap();
        }
        let [batch, seq, accumulate, steps] = [batch, seq, accumulate, steps].map(|n| n as u64);
        let task = Task::Train { batch, seq, accumulate, steps, full, recompute, clip, moments, rows: Rows::Whole };
        assert_balanced(&Workload { model, lora, dtype, attention: Default::default(), task }, &ledger.into_inner());
    }

    #[test]
    fn evaluation_balances(
        (model, lora) in adapted(SMALL, 3), (batch, seq) in texts(),
        passes in 1usize..3, dtype in dtypes(),
    ) {
        let qwen = load(&model, &lora, dtype);
        let ledger = RefCell::new(Ledger::default());
        let meter = Meter::new(&ledger, Phase::Setup);
        let positions = qwen.positions(meter, seq).unwrap();
        let ids: Vec<u32> = (0..batch * seq).map(|i| (i % model.vocab_size) as u32).collect();
        let weights = vec![1.0; ids.len()];
        let text = Labelled { ids: &ids, targets: &ids, weights: &weights, batch, sequences: None };
        for _ in 0..passes {
            prop_assert!(qwen.loss(meter, text, &positions).unwrap() > 0.0);
        }
        let [batch, seq, passes] = [batch, seq, passes].map(|n| n as u64);
        let task = Task::Evaluate { batch, seq, passes, rows: Rows::Whole };
        assert_balanced(&Workload { model, lora, dtype, attention: Default::default(), task }, &ledger.into_inner());
    }
}
