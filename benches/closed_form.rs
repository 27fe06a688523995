//! Counting takes no longer for more tokens: every structure, over generations of 10 tokens to a
//! million, and the way from one to another.
//!
//! `cargo bench --bench closed_form`.

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use flopaudit::{
    analytic::{Structure, closed_form, count},
    config::{LoraConfig, ModelConfig, Projection},
    ledger::Dtype,
    prices::Prices,
    reconcile::{End, reconcile},
    workload::{Sampling, Task, Workload},
};

const LENGTHS: [u64; 4] = [10, 1_000, 100_000, 1_000_000];

fn generation(new_tokens: u64, kv_cache: bool) -> Workload {
    let model = ModelConfig::preset("qwen2.5-72b").unwrap();
    let lora = LoraConfig::new(&model, 8, 16.0, &Projection::ALL).unwrap();
    let sampling = Sampling { temperature: 0.8, ..Sampling::GREEDY };
    let (prompt_tokens, max_new_tokens) = (1_000, new_tokens);
    let task = Task::Generate {
        batch: 1,
        prompt_tokens,
        new_tokens,
        max_new_tokens,
        kv_cache,
        sampling,
        past: 0,
        prompts: None,
        then: vec![],
        prefill_chunk: None,
    };
    Workload { model, lora, dtype: Dtype::BF16, attention: Default::default(), task }
}

fn flat_in_tokens(c: &mut Criterion) {
    let mut group = c.benchmark_group("closed_form");
    for new_tokens in LENGTHS {
        for (name, kv_cache) in [("cache", true), ("no_cache", false)] {
            let workload = generation(new_tokens, kv_cache);
            group.bench_with_input(BenchmarkId::new(name, new_tokens), &workload, |b, workload| {
                b.iter(|| closed_form(workload).unwrap());
            });
        }
    }
    group.finish();
}

fn structures(c: &mut Criterion) {
    let workload = generation(1_000_000, true);
    let mut group = c.benchmark_group("count");
    for structure in Structure::ALL.into_iter().filter(|s| s.covers(&workload.task).is_ok()) {
        group.bench_function(structure.name(), |b| {
            b.iter(|| count(structure, &workload).unwrap());
        });
    }
    group.finish();
    let end = |structure| End { structure, prices: Prices::coursework() };
    let (from, to) = (end(Structure::Notebook), end(Structure::Exact));
    c.bench_function("reconcile", |b| {
        b.iter(|| reconcile("", std::slice::from_ref(&workload), &from, &to).unwrap());
    });
}

criterion_group!(benches, flat_in_tokens, structures);
criterion_main!(benches);
