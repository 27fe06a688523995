//! Times by hand, and what is refused.

use proptest::prelude::*;

use super::*;
use crate::{
    config::{LoraConfig, ModelConfig},
    ledger::Dtype,
    workload::{Key, Kind, Rows, Value},
};

fn workload(task: Task) -> Workload {
    let model = ModelConfig::preset("tiny").unwrap();
    Workload {
        model,
        lora: LoraConfig::none(),
        dtype: Dtype::BF16,
        attention: Default::default(),
        task,
    }
}

fn training(steps: u64, recompute: bool) -> Workload {
    let (batch, seq, accumulate, full, clip) = (2, 8, 3, true, true);
    let rows = Rows::Whole;
    workload(Task::Train {
        batch,
        seq,
        accumulate,
        steps,
        full,
        recompute,
        clip,
        moments: Default::default(),
        rows,
    })
}

fn spec() -> RateSpec {
    RateSpec {
        gpu: Some("h100-sxm".into()),
        gpus: Some(8),
        mfu: Some(Share(0.5)),
        ..RateSpec::default()
    }
}

fn rate(spec: &RateSpec) -> Rate {
    spec.resolve(Precision::Bf16).unwrap().unwrap()
}

#[test]
fn a_time_by_hand() {
    // 6ND of N parameters and 2·8·3·10 tokens, on 8 × 989 TFLOP/s at a half: 3956 TFLOP/s.
    let (spec, workload) = (spec(), training(10, false));
    let flops = 6 * workload.model.parameters() * 480;
    let rate = rate(&RateSpec {
        price_per_gpu_hour: Some(Amount(2.0)),
        watts: Some(Amount(700.0)),
        ..spec
    });
    let time = rate.time(Structure::SixNd, &workload, 1).unwrap();
    assert_eq!(time.flops, Some(flops));
    assert_eq!(rate.flops_per_s(), Some(3956e12));
    assert_eq!(time.hours, flops as f64 / 3956e12 / 3600.0);
    assert_eq!(time.gpu_hours, 8.0 * time.hours);
    assert_eq!(time.dollars, Some(2.0 * time.gpu_hours));
    assert_eq!(time.kwh, Some(0.7 * time.gpu_hours));
}

#[test]
fn mfu_is_of_the_model_and_hfu_of_all_that_runs() {
    let hfu = RateSpec { mfu: None, hfu: Some(Share(0.5)), ..spec() };
    let of = |spec: &RateSpec, recompute| {
        let time = rate(spec).time(Structure::Exact, &training(4, recompute), 1).unwrap();
        time.flops.unwrap()
    };
    let plain = of(&spec(), false);
    assert_eq!((of(&spec(), true), of(&hfu, false)), (plain, plain));
    let products =
        Products::of(&analytic::count(Structure::Exact, &training(4, true)).unwrap()).unwrap();
    assert_eq!(products.model, plain);
    assert!(products.recomputed > plain / 5);
    assert_eq!(of(&hfu, true), plain + products.recomputed);
    // A formula that leaves them out has no HFU of theirs.
    let of = |recompute| rate(&hfu).time(Structure::Palm, &training(4, recompute), 1);
    assert!(of(false).is_ok());
    assert!(of(true).unwrap_err().to_string().starts_with("--hfu: needs another --structure"));
}

#[test]
fn what_lacks_or_contradicts_is_named() {
    let empty = RateSpec::default;
    let gpu = || Some("h100-sxm".to_string());
    let bench = || Some("b.json".into());
    let half = Some(Share(0.5));
    for (spec, flag, part) in [
        (RateSpec { gpu: gpu(), ..empty() }, "--gpu", "--mfu or --hfu"),
        (RateSpec { mfu: half, ..empty() }, "--mfu", "--gpu with"),
        (RateSpec { gpus: Some(8), ..empty() }, "--gpus", "needs a rate"),
        (RateSpec { price_per_gpu_hour: Some(Amount(2.0)), ..empty() }, "--price", "needs a rate"),
        (RateSpec { watts: Some(Amount(7.0)), ..empty() }, "--watts", "needs a rate"),
        (RateSpec { peak: Some(Precision::Fp8), ..empty() }, "--peak", "needs a rate"),
        (RateSpec { hfu: half, ..spec() }, "--hfu", "beside --mfu"),
        (RateSpec { gpus: Some(0), ..spec() }, "--gpus", "at least 1"),
        (RateSpec { gpu: Some("h100".into()), ..spec() }, "--gpu", "h100-pcie"),
        (RateSpec { gpu: Some("t4".into()), ..spec() }, "--peak", "stated are f32, f16"),
        (RateSpec { from_bench: bench(), ..spec() }, "--from-bench", "--gpu"),
        (RateSpec { from_bench: bench(), mfu: half, ..empty() }, "--from-bench", "--mfu"),
        (RateSpec { from_bench: bench(), gpus: Some(2), ..empty() }, "--gpus", "one device"),
        (
            RateSpec { from_bench: bench(), peak: Some(Precision::F32), ..empty() },
            "--peak",
            "measured",
        ),
        (RateSpec { from_bench: bench(), ..empty() }, "b.json", ""),
    ] {
        let error = spec.resolve(Precision::Bf16).unwrap_err().to_string();
        assert!(error.starts_with(flag) && error.contains(part), "{error} lacks {part}");
    }
    assert_eq!(empty().resolve(Precision::Bf16).unwrap(), None);
}

#[test]
fn flags_override_a_file_and_never_mix_two_rates() {
    let flags = RateSpec { mfu: Some(Share(0.3)), ..RateSpec::default() };
    let both = flags.clone().or(spec());
    assert_eq!(
        (both.mfu, both.gpus, both.gpu.as_deref()),
        (Some(Share(0.3)), Some(8), Some("h100-sxm"))
    );
    let hfu = RateSpec { hfu: Some(Share(0.3)), ..RateSpec::default() }.or(spec());
    assert_eq!((hfu.mfu, hfu.hfu), (None, Some(Share(0.3))));
    let measured = RateSpec { from_bench: Some("b.json".into()), ..RateSpec::default() };
    let over = measured.clone().or(RateSpec { watts: Some(Amount(7.0)), ..spec() });
    assert_eq!(over, RateSpec { watts: Some(Amount(7.0)), ..measured.clone() });
    assert_eq!(spec().or(measured), spec());
}

#[test]
fn shares_and_amounts() {
    assert_eq!(("0.42".parse(), "42 %".parse()), (Ok(Share(0.42)), Ok(Share(0.42))));
    for bad in ["42", "0", "-0.1", "0%", "101%", "x", "nan", "inf", ""] {
        assert!(bad.parse::<Share>().unwrap_err().contains("0.42 or 42%"), "{bad}");
    }
    assert_eq!("1e3".parse(), Ok(Amount(1000.0)));
    for bad in ["0", "-1", "inf", "nan", "$2"] {
        assert!(bad.parse::<Amount>().is_err(), "{bad}");
    }
}

#[test]
fn tokens_are_what_is_fed() {
    let task = |kind: Kind, dimensions: &[(Key, u64)]| {
        let mut task = kind.task();
        for (key, n) in dimensions {
            key.set(&mut task, &Value::Number(*n)).unwrap();
        }
        task
    };
    let fed = |task: &Task| task.tokens().real;
    let shape = [(Key::Batch, 2), (Key::Seq, 5)];
    let forward = task(Kind::Forward, &[shape[0], shape[1], (Key::Past, 7)]);
    let evaluate = task(Kind::Evaluate, &[shape[0], shape[1], (Key::Passes, 3)]);
    assert_eq!([forward, evaluate].map(|task| fed(&task)), [10, 30]);
    assert_eq!(fed(&training(10, false).task), 480);
    let lengths = [(Key::Batch, 2), (Key::PromptTokens, 5), (Key::NewTokens, 3)];
    let mut generate = task(Kind::Generate, &lengths);
    // The token chosen last is not fed; without a cache, each pass feeds its whole context.
    assert_eq!((fed(&generate), new_tokens(&generate)), (2 * (5 + 2), 6));
    Key::KvCache.set(&mut generate, &Value::Switch(false)).unwrap();
    assert_eq!(fed(&generate), 2 * (5 + 6 + 7));
    Key::KvCache.set(&mut generate, &Value::Switch(true)).unwrap();
    Key::Then.set(&mut generate, &Value::Text("4+1".into())).unwrap();
    assert_eq!((fed(&generate), new_tokens(&generate)), (2 * (5 + 2 + 1 + 4), 8));
    // 4 drafted, 2 kept, and the next.
    let verify = task(Kind::Verify, &[(Key::Batch, 2), (Key::Rounds, 3)]);
    assert_eq!((fed(&verify), new_tokens(&verify)), (30, 18));
}

/// A benchmark of one step, as its JSON has it.
fn report(workload: &Workload, median: f64, kind: &str) -> serde_json::Value {
    serde_json::json!({
        "schema_version": 1, "command": "bench", "kind": kind,
        "device": { "name": "Abacus", "kind": "cpu" },
        "points": [{ "workload": workload, "seconds": { "median": median }, "balanced": true }],
    })
}

#[test]
fn a_benchmark_serves_its_own_workload_alone() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("b.json");
    let one = training(1, false);
    let read = |json: serde_json::Value| {
        std::fs::write(&file, json.to_string()).unwrap();
        Bench::read(&file)
    };
    let bench = read(report(&one, 1.5, "train")).unwrap();
    assert_eq!(bench.seconds(&training(10, false)).unwrap(), 15.0);
    let rate = rate(&RateSpec { from_bench: Some(file.clone()), ..RateSpec::default() });
    let time = rate.time(Structure::Exact, &training(10, false), 4).unwrap();
    assert_eq!((time.hours, time.flops), (60.0 / 3600.0, None));
    assert_eq!(rate.device_hours(), "device-hours");

    let mut other = training(10, true);
    other.dtype = Dtype::F32;
    other.model.hidden_size = 64;
    if let Task::Train { batch, .. } = &mut other.task {
        *batch = 4;
    }
    let error = bench.seconds(&other).unwrap_err().to_string();
    for part in [
        "b.json",
        "no other's rate",
        "batch 2, not 4",
        "dtype \"BF16\", not \"F32\"",
        "model.hidden_size 32, not 64",
        "recompute false, not true",
    ] {
        assert!(error.to_lowercase().contains(&part.to_lowercase()), "{error} lacks {part}");
    }
    assert!(!error.contains("steps"), "{error}");
    for (json, part) in [
        (report(&one, 0.0, "train"), "points[0].seconds.median"),
        (report(&one, 1.0, "decode"), "single decoding steps"),
        (serde_json::json!({}), "no benchmark"),
    ] {
        let error = read(json).unwrap_err().to_string();
        assert!(error.contains(part), "{error} lacks {part}");
    }
    let mut unbalanced = report(&one, 1.0, "train");
    unbalanced["points"][0]["balanced"] = false.into();
    assert!(read(unbalanced).unwrap_err().to_string().contains("does not balance"));
    let mut newer = report(&one, 1.0, "train");
    newer["schema_version"] = 9.into();
    assert!(read(newer).unwrap_err().to_string().contains("schema 9"));
}

proptest! {
    /// Twice the devices halve the hours and leave the GPU-hours; twice the utilization halves both.
    #[test]
    fn times_scale(gpus in 1u64..10_000, share in 0.001f64..0.5, steps in 1u64..1 << 40) {
        let of = |gpus, share| {
            let spec = RateSpec { gpus: Some(gpus), mfu: Some(Share(share)), ..spec() };
            rate(&spec).time(Structure::Exact, &training(steps, false), 1).unwrap()
        };
        let near = |a: f64, b: f64| (a / b - 1.0).abs() < 1e-12;
        let (one, wide, fast) = (of(gpus, share), of(2 * gpus, share), of(gpus, 2.0 * share));
        prop_assert!(near(one.hours, 2.0 * wide.hours) && near(one.gpu_hours, wide.gpu_hours));
        prop_assert!(near(one.hours, 2.0 * fast.hours));
        // And back: what the hours at that rate come to are the FLOPs.
        let back = one.hours * 3600.0 * share * 989e12 * gpus as f64;
        prop_assert!(near(back, one.flops.unwrap() as f64));
    }
}
