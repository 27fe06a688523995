//! The audit catches what it is there to catch, and says where.

use std::{cell::RefCell, time::Duration};

use candle_core::Device;
use flopaudit::{
    analytic::{Structure, closed_form, predict},
    audit::{Audit, GraphView},
    config::{LoraConfig, ModelConfig, Projection},
    error::Error,
    ledger::{Dtype, Key, Ledger, Module, Op, Phase},
    meter::{Meter, Observer},
    model::{AdapterSource, Context, Decoder},
    ops::{self, Ids, Tensor},
    prices::Prices,
    report::{Figures, Report, render},
    weights,
    workload::{Logits, Task, Workload},
};

const TASK: Task =
    Task::Forward { batch: 2, seq: 5, past: 3, logits: Logits::All, sequences: None };

fn workload() -> Workload {
    let model = ModelConfig::preset("tiny").unwrap();
    let lora = LoraConfig::new(&model, 2, 4.0, &[Projection::QProj]).unwrap();
    Workload { model, lora, dtype: Dtype::F32, attention: Default::default(), task: TASK }
}

/// Runs the workload, each op's key passed through `fault`, then whatever `more` runs.
fn run(fault: impl Fn(&Key) -> Vec<Key> + 'static, more: impl Fn(Meter)) -> Ledger {
    struct Faulty<F>(Ledger, F);
    impl<F: Fn(&Key) -> Vec<Key>> Observer for Faulty<F> {
        fn op(&mut self, key: &Key, time: Option<Duration>) {
            for key in self.1(key) {
                self.0.op(&key, time);
            }
        }
    }
    let Workload { model, lora, dtype, .. } = workload();
    let weights = weights::synthetic(model.clone(), 1).unwrap().weights;
    let adapters = AdapterSource::Fresh { lora, seed: 2 };
    let model =
        Decoder::load(&model, &weights, &adapters, dtype, &Device::Cpu, |_| Ok(())).unwrap();
    let observer = RefCell::new(Faulty(Ledger::default(), fault));
    let meter = Meter::new(&observer, Phase::Setup);
    let mut cache = model.cache(meter, 2, 8).unwrap();
    cache.set_held(3).unwrap();
    let meter = meter.phase(Phase::Forward);
    model
        .forward(
            meter,
            Ids::Host { ids: &[1; 10], batch: 2 },
            Context::Cached(&mut cache),
            Logits::All,
        )
        .unwrap();
    more(meter);
    observer.into_inner().0
}

fn audit(ledger: &Ledger) -> Audit {
    Audit::new(&[workload()], ledger).unwrap()
}

/// (scope, predicted, executed) of each difference, and the components whose sums differ.
fn located(audit: &Audit) -> (Vec<(String, u64, u64)>, Vec<String>) {
    assert!(!audit.balanced());
    let error = audit.verdict().unwrap_err();
    assert_eq!(Error::exit_code(&error), 1);
    let keys = audit.key_differences.iter();
    let keys = keys.map(|d| (d.key.scope.to_string(), d.predicted, d.executed)).collect();
    (keys, audit.sum_differences.iter().map(|d| d.component.to_string()).collect())
}

fn at(key: &Key, scope: &str, op: &str) -> bool {
    key.scope.to_string() == scope && key.op.name() == op
}

#[test]
fn without_a_fault_it_balances() {
    let audit = audit(&run(|key| vec![*key], |_| ()));
    assert!(audit.balanced());
    audit.verdict().unwrap();
}

#[test]
fn a_doubled_op() {
    let again = |meter: Meter| {
        let x = Tensor::zeros((2, 5, 32), Dtype::F32, &Device::Cpu).unwrap();
        let w = Tensor::zeros((32, 32), Dtype::F32, &Device::Cpu).unwrap();
        ops::linear(meter.layer(1).at(Module::Proj(Projection::OProj)), &x, &w).unwrap();
    };
    let (keys, sums) = located(&audit(&run(|key| vec![*key], again)));
    assert_eq!(keys, [("layers.1.self_attn.o_proj".into(), 1, 2)]);
    assert_eq!(sums, ["o_proj"]);
}

#[test]
fn a_skipped_bias() {
    let skip = |key: &Key| match at(key, "layers.2.self_attn.k_proj", "bias") {
        true => vec![],
        false => vec![*key],
    };
    let (keys, sums) = located(&audit(&run(skip, |_| ())));
    assert_eq!(keys, [("layers.2.self_attn.k_proj".into(), 1, 0)]);
    assert_eq!(sums, ["k_proj"]);
}

#[test]
fn an_unmetered_shortcut() {
    let skip = |key: &Key| if at(key, "layers.0.mlp", "silu") { vec![] } else { vec![*key] };
    let (keys, sums) = located(&audit(&run(skip, |_| ())));
    assert_eq!(keys, [("layers.0.mlp".into(), 1, 0)]);
    assert_eq!(sums, ["GLU"]);
}

/// A kernel that is given half of its rows says so, since it has nothing else to say it from.
#[test]
fn a_kernel_given_half_the_rows() {
    let norm = "layers.1.post_attention_layernorm";
    let whole = Op::RmsNorm { rows: 10, width: 32 };
    let skip = move |key: &Key| match at(key, norm, "rms_norm") && key.op == whole {
        true => vec![],
        false => vec![*key],
    };
    let half = |meter: Meter| {
        let device = Device::Cpu;
        let x = Tensor::zeros((2, 5, 32), Dtype::F32, &device).unwrap().narrow(0, 0, 1).unwrap();
        let gain = Tensor::zeros(32, Dtype::F32, &device).unwrap();
        let at = meter.layer(1).at(Module::PostAttentionLayernorm);
        ops::rms_norm(at, &x, &gain, 1e-6).unwrap();
    };
    let (keys, sums) = located(&audit(&run(skip, half)));
    assert_eq!(keys, [(norm.into(), 0, 1), (norm.into(), 1, 0)]);
    assert_eq!(sums, ["norms"]);
}

#[test]
fn an_op_of_the_wrong_shape() {
    let reshape = |key: &Key| {
        let mut key = *key;
        if at(&key, "lm_head", "matmul") {
            key.op = Op::Matmul { b: 2, m: 5, k: 32, n: 321 };
        }
        vec![key]
    };
    let (keys, sums) = located(&audit(&run(reshape, |_| ())));
    assert_eq!(keys, [("lm_head".into(), 1, 0), ("lm_head".into(), 0, 1)]);
    assert_eq!(sums, ["lm_head"]);
}

#[test]
fn the_same_flops_in_another_shape() {
    // b·m·k·n alone would not tell: the keys do.
    let reshape = |key: &Key| {
        let mut key = *key;
        if let (true, Op::Matmul { b, m, k, n }) = (at(&key, "lm_head", "matmul"), key.op) {
            key.op = Op::Matmul { b: m, m: b, k, n };
        }
        vec![key]
    };
    let (keys, sums) = located(&audit(&run(reshape, |_| ())));
    assert_eq!(keys.len(), 2);
    assert!(sums.is_empty());
}

#[test]
fn a_wrong_kv_head_count_in_the_config() {
    let ledger = run(|key| vec![*key], |_| ());
    let mut wrong = workload();
    wrong.model.num_key_value_heads = 4;
    let audit = Audit::new(&[wrong], &ledger).unwrap();
    let (keys, sums) = located(&audit);
    let scopes: Vec<&str> = keys.iter().map(|(scope, ..)| &scope[9..]).collect();
    assert!(
        scopes.iter().all(|s| ["self_attn", "self_attn.k_proj", "self_attn.v_proj"].contains(s))
    );
    assert_eq!(sums, ["k_proj", "v_proj", "attention"]);
}

#[test]
fn an_op_missing_from_the_prediction() {
    let ledger = run(|key| vec![*key], |_| ());
    let mut predicted = Ledger::default();
    for (key, entry) in predict(&workload()).unwrap().iter() {
        if !at(key, "layers.1", "add") {
            predicted.add(*key, entry.calls, Duration::ZERO);
        }
    }
    let closed = closed_form(&workload()).unwrap();
    let audit = Audit::compare(closed, &predicted, &ledger).unwrap();
    assert_eq!(located(&audit), (vec![("layers.1".into(), 0, 2)], vec![]));
}

#[test]
fn a_wrong_closed_form() {
    let ledger = run(|key| vec![*key], |_| ());
    let mut other = workload();
    other.lora = LoraConfig::new(&other.model, 3, 4.0, &[Projection::QProj]).unwrap();
    let closed = closed_form(&other).unwrap();
    let audit = Audit::compare(closed, &predict(&workload()).unwrap(), &ledger).unwrap();
    assert_eq!(located(&audit), (vec![], vec!["q_proj LoRA".into()]));
}

#[test]
fn another_dtype_is_another_op() {
    let mut half = workload();
    half.dtype = Dtype::BF16;
    let audit = Audit::new(&[half], &run(|key| vec![*key], |_| ())).unwrap();
    assert!(audit.sum_differences.is_empty() && !audit.balanced());
}

/// What a report with `audit` prints, and its JSON.
fn reported(audit: &Audit) -> (String, serde_json::Value) {
    let (tally, prices) = (&audit.executed, Prices::matmul());
    let report =
        Report::new("audit", "tiny", vec![workload()], Structure::Exact, &prices, tally).unwrap();
    let report = report.with_audit(audit).unwrap();
    let mut out = vec![];
    render(&mut anstream::StripStream::new(&mut out), &report, Figures::Human, false).unwrap();
    (String::from_utf8(out).unwrap(), serde_json::to_value(&report).unwrap())
}

#[test]
fn the_report_shows_where() {
    let double = |key: &Key| match at(key, "layers.1.mlp.up_proj", "matmul") {
        true => vec![*key; 2],
        false => vec![*key],
    };
    let (text, _) = reported(&audit(&run(double, |_| ())));
    insta::assert_snapshot!(&text[text.find("the audit").unwrap()..]);
}

/// The words of the code in a folder of the crate, `::` among them, comments left out.
fn words(folder: &str) -> Vec<String> {
    let dir = format!("{}/src/{folder}", env!("CARGO_MANIFEST_DIR"));
    let mut words = vec![];
    for entry in std::fs::read_dir(dir).unwrap() {
        let text = std::fs::read_to_string(entry.unwrap().path()).unwrap();
        let code = text.lines().filter(|l| !l.trim_start().starts_with("//"));
        let split = |line: &str| -> Vec<String> {
            let line = line.replace("::", " :: ");
            line.split(|c: char| !c.is_alphanumeric() && !"_:".contains(c))
                .map(String::from)
                .collect()
        };
        words.extend(code.flat_map(split).filter(|w| !w.is_empty()));
    }
    assert!(words.len() > 500);
    words
}

#[test]
fn the_model_computes_with_metered_ops_alone() {
    let words = words("model");
    // Of candle, the model knows devices; arithmetic on a raw tensor would need its type.
    let uses: Vec<_> = words.windows(3).filter(|w| w[0] == "candle_core").collect();
    assert!(uses.len() >= 3 && uses.iter().all(|w| w[1..] == ["::", "Device"]));
    assert!(!words.iter().any(|w| w == "candle_nn"));
}

#[test]
fn a_token_outside_the_vocabulary_is_refused() {
    let table = Tensor::zeros((4, 2), Dtype::F32, &Device::Cpu).unwrap();
    let ledger = RefCell::new(Ledger::default());
    let at = Meter::new(&ledger, Phase::Forward).at(Module::EmbedTokens);
    let embed = |ids: &[u32], batch| ops::embed(at, &table, Ids::Host { ids, batch }, None);
    let error = embed(&[1, 4], 1).unwrap_err();
    assert_eq!(error.to_string(), "prompt: token id 4 is outside the vocabulary of 4");
    assert_eq!(Error::exit_code(&error), 2);
    assert!(embed(&[], 1).is_err() && embed(&[1, 2, 3], 2).is_err());
    assert!(ledger.into_inner().is_empty());
}

#[test]
fn logits_that_are_not_finite_are_refused_in_every_row() {
    use flopaudit::{ops::Sampler, workload::Sampling};
    let mut logits = vec![0.5f32; 12];
    logits[9] = f32::NAN;
    let logits = Tensor::from_vec(logits, (3, 4), Dtype::F32, &Device::Cpu).unwrap();
    let ledger = RefCell::new(Ledger::default());
    let at = Meter::new(&ledger, Phase::Sampling).at(Module::Sampler);
    let warm = Sampling { temperature: 1.0, ..Sampling::GREEDY };
    let error = Sampler::new(warm, &[0; 3]).next(at, &logits, &[const { vec![] }; 3]).unwrap_err();
    assert!(error.to_string().contains("not finite"), "{error}");
}

/// A device's graph that is not what was launched fails an audit whose ledgers agree, and the
/// table and the JSON say where.
#[test]
fn a_graph_that_differs_fails_the_audit() {
    let balanced = || audit(&run(|key| vec![*key], |_| ()));
    let view = |nodes, difference: Option<&str>| GraphView {
        nodes,
        launches: 19,
        difference: difference.map(String::from),
    };
    let sound = balanced().with_graphs([view(19, None), view(20, None)]);
    sound.verdict().unwrap();
    let why = "launch 4 of 19 is silu; in its place is nothing more";
    let audit = balanced().with_graphs([view(19, None), view(18, Some(why))]);
    assert!(!audit.balanced());
    assert_eq!(Error::exit_code(&audit.verdict().unwrap_err()), 1);
    let (text, json) = reported(&audit);
    assert!(text.contains(why), "{text}");
    assert_eq!(json["graph_nodes"], 37);
    assert_eq!(json["graph_launches"], 38);
    assert_eq!(json["graph_difference"], why);
}
