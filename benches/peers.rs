//! flopaudit and candle-transformers' qwen2 on the same tensors, side by side: prefill of 512
//! tokens and one decoded token after them; and what metering costs.
//!
//! `cargo bench --bench peers`; `PEERS_DTYPE=bf16` for another dtype.

mod candle;

use std::{cell::RefCell, time::Duration};

use candle_core::{Device, Tensor};
use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use flopaudit::{
    analytic::predict,
    config::{LoraConfig, ModelConfig},
    ledger::{Dtype, Ledger, Phase},
    meter::{Meter, Observer},
    model::{AdapterSource, Context, Decoder},
    ops::{Ids, candle_dtype},
    weights::{self, Checkpoint},
    workload::{Logits, Task, Workload},
};

const PROMPT: usize = 512;

fn dtype() -> Dtype {
    match std::env::var("PEERS_DTYPE").as_deref() {
        Ok("bf16") => Dtype::BF16,
        Ok("f16") => Dtype::F16,
        _ => Dtype::F32,
    }
}

fn ours(checkpoint: &Checkpoint) -> Decoder {
    let Checkpoint { config, weights, .. } = checkpoint;
    let adapters = AdapterSource::Fresh { lora: LoraConfig::none(), seed: 0 };
    Decoder::load(config, weights, &adapters, dtype(), &Device::Cpu, |_| Ok(())).unwrap()
}

fn peers(c: &mut Criterion) {
    let config = ModelConfig::preset("qwen2.5-0.5b").unwrap();
    let checkpoint = weights::synthetic(config, 0).unwrap();
    let ids: Vec<u32> = (0..PROMPT as u32).collect();
    let name = dtype().name();
    let ledger = RefCell::new(Ledger::default());
    let meter = Meter::new(&ledger, Phase::Forward);

    let model = ours(&checkpoint);
    let mut cache = model.cache(meter, 1, PROMPT + 1).unwrap();
    let mut peer = candle::load(&checkpoint, candle_dtype(dtype())).unwrap();
    let prompt = Tensor::new(&ids[..], &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    let next = Tensor::new(&[[1u32]], &Device::Cpu).unwrap();

    let mut group = c.benchmark_group(format!("prefill {PROMPT} {name}"));
    group.sample_size(10).measurement_time(Duration::from_secs(30));
    group.bench_function("flopaudit", |b| {
        b.iter(|| {
            cache.set_held(0).unwrap();
            model
                .forward(
                    meter,
                    Ids::Host { ids: &ids, batch: 1 },
                    Context::Cached(&mut cache),
                    Logits::Last,
                )
                .unwrap()
        })
    });
    group.bench_function("candle-transformers", |b| {
        b.iter(|| {
            peer.clear_kv_cache();
            peer.forward(&prompt, 0).unwrap()
        })
    });
    group.finish();

    let mut group = c.benchmark_group(format!("decode after {PROMPT} {name}"));
    group.sample_size(30).measurement_time(Duration::from_secs(10));
    group.bench_function("flopaudit", |b| {
        b.iter(|| {
            cache.set_held(PROMPT).unwrap();
            model
                .forward(
                    meter,
                    Ids::Host { ids: &[1], batch: 1 },
                    Context::Cached(&mut cache),
                    Logits::Last,
                )
                .unwrap()
        })
    });
    // Their cache grows by concatenation: cloned, so that each sample starts after the prompt.
    group.bench_function("candle-transformers", |b| {
        b.iter_batched(
            || peer.clone(),
            |mut peer| peer.forward(&next, PROMPT).unwrap(),
            BatchSize::LargeInput,
        )
    });
    group.finish();
}

/// One decode step's ops told to a ledger: to be compared with the decode step itself.
fn metering(c: &mut Criterion) {
    let model = ModelConfig::preset("qwen2.5-0.5b").unwrap();
    let task = Task::Forward {
        batch: 1,
        seq: 1,
        past: PROMPT as u64,
        logits: Logits::Last,
        sequences: None,
    };
    let lora = LoraConfig::none();
    let step =
        predict(&Workload { model, lora, dtype: dtype(), attention: Default::default(), task })
            .unwrap();
    c.bench_function("metering of one decode step", |b| {
        b.iter(|| {
            let mut ledger = Ledger::default();
            for (key, entry) in step.iter() {
                (0..entry.calls).for_each(|_| ledger.op(key, None));
            }
            ledger
        })
    });
}

criterion_group!(benches, metering, peers);
criterion_main!(benches);
