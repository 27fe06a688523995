//! Hours, money, energy, published speeds and legal amounts through the command line.

mod program;

use std::path::Path;

use candle_core::Device;
use flopaudit::{
    bench::{Ceiling, DeviceInfo, MatmulRate, SCHEMA_VERSION, Stream},
    ledger::Dtype,
};
use program::{flopaudit, json, refused, stdout, tmp};
use serde_json::Value;

const TRAINING: &str = "--preset qwen2.5-7b --seq 4096 --batch 256";
const GPUS: &str = "--gpu h100-sxm --gpus 8";

fn number(value: &Value, key: &str) -> f64 {
    value[key].as_f64().unwrap_or_else(|| panic!("{key}: {value}"))
}

fn near(a: f64, b: f64) -> bool {
    (a / b - 1.0).abs() < 1e-9
}

#[test]
fn a_count_prints_hours_cost_and_energy() {
    insta::assert_snapshot!(stdout(&format!(
        "count train {TRAINING} --full --steps 10000 --recompute {GPUS} --mfu 42% \
         --price-per-gpu-hour 2.1 --watts 700"
    )));
}

#[test]
fn the_lists_and_tables() {
    insta::assert_snapshot!("gpus", stdout("gpus"));
    insta::assert_snapshot!(
        "mfu",
        stdout(&format!(
            "mfu --tokens-per-second 52000 {GPUS} --preset qwen2.5-7b --seq 4096 --recompute"
        ))
    );
    insta::assert_snapshot!(
        "thresholds",
        stdout(&format!(
            "count train {TRAINING} --full --steps 10000 --threshold eu --base-compute 3e24FLOP"
        ))
    );
    for line in [
        "gpus".to_string(),
        format!("mfu --step-seconds 9 {GPUS} {TRAINING}"),
        format!("count train {TRAINING} --full --steps 10000000 {GPUS} --hfu 0.4 --threshold eu"),
    ] {
        let text = stdout(&line);
        let widest = text.lines().map(|line| line.chars().count()).max();
        assert!(widest <= Some(80), "{line}: {text}");
    }
}

/// The prices of a count change nothing in its hours; its structure does.
#[test]
fn hours_are_of_matrix_products_whatever_is_priced() {
    let time = |flags: &str| {
        let line = format!("count train --preset tiny --full --seq 16 --steps 1000 {GPUS} {flags}");
        json(&format!("{line} --json"))["time"].clone()
    };
    let plain = time("--mfu 0.5");
    for same in ["--mfu 0.5 --prices coursework", "--mfu 0.5 --recompute", "--hfu 50%"] {
        assert_eq!(number(&time(same), "hours"), number(&plain, "hours"), "{same}");
    }
    let matmul =
        json("count train --preset tiny --full --seq 16 --steps 1000 --prices matmul --json");
    assert_eq!(plain["flops"], matmul["total_flops"]);
    let hours = number(&plain, "flops") / (0.5 * 989e12 * 8.0) / 3600.0;
    assert!(near(number(&plain, "hours"), hours));
    assert!(near(number(&plain, "gpu_hours"), 8.0 * hours));
    assert!(number(&time("--hfu 0.5 --recompute"), "hours") > number(&plain, "hours"));
    assert_ne!(time("--mfu 0.5 --structure 6nd")["flops"], plain["flops"]);
    // Of the element type that is asked for.
    let basis = |flags: &str| time(flags)["rate"]["datasheet"]["peak_flops_per_s"].clone();
    assert_eq!(basis("--mfu 0.5"), 989e12);
    assert_eq!(basis("--mfu 0.5 --dtype f32"), 67e12);
    assert_eq!(basis("--mfu 0.5 --dtype f32 --peak tf32"), 494.5e12);
    assert_eq!(basis("--mfu 0.5 --peak fp8"), 1979e12);
}

/// An MFU that `mfu` prints, given to `count`, takes as long as the speed says.
#[test]
fn a_speed_and_its_utilization_are_one() {
    for (workload, tokens) in [
        ("train --preset qwen2.5-0.5b --seq 64 --batch 3 --full --recompute", 3.0 * 64.0),
        ("train --preset qwen2.5-0.5b --seq 64 --lora-rank 4", 64.0),
        ("forward --preset qwen2.5-0.5b --seq 64 --batch 2", 128.0),
        ("generate --preset qwen2.5-0.5b --prompt-tokens 64 --new-tokens 9 --batch 2", 18.0),
    ] {
        let found = json(&format!("mfu {workload} --tokens-per-second 777 {GPUS} --json"));
        for row in found["rows"].as_array().unwrap() {
            let (structure, of) = (row["structure"].as_str().unwrap(), row["of"].as_str().unwrap());
            let share = number(row, "utilization");
            let line =
                format!("count {workload} {GPUS} --{of} {share} --structure {structure} --json");
            let hours = number(&json(&line)["time"], "hours");
            assert!(near(hours * 3600.0, tokens / 777.0), "{line}: {hours}");
        }
    }
    // Without a command, a training of every weight.
    let flags = format!("--tokens-per-second 777 {GPUS} --preset tiny --seq 8 --json");
    let short = json(&format!("mfu {flags}"));
    assert_eq!(short, json(&format!("mfu train --full {flags}")));
    assert_eq!(short["workload"]["full"], true);
    // Published in another unit.
    let each = json(&format!(
        "mfu --tokens-per-second-per-gpu 97.125 {GPUS} --preset tiny --seq 8 --json"
    ));
    assert_eq!(each["rows"], short["rows"]);
    let rate = number(&short["rows"][3], "flops_per_s_per_gpu") / 1e12;
    let by = format!("mfu --tflops-per-gpu {rate} --by palm {GPUS} --preset tiny --seq 8 --json");
    assert!(near(number(&json(&by), "tokens_per_s"), 777.0));
}

#[test]
fn what_is_missing_or_wrong_is_named() {
    let dir = tmp();
    for (args, parts) in [
        ("count train --full --preset tiny --gpu h100-sxm", &["--gpu", "--mfu or --hfu"][..]),
        ("count train --full --preset tiny --watts 700", &["--watts", "needs a rate"]),
        ("count train --full --preset tiny --gpu h100 --mfu 0.4", &["--gpu", "h100-pcie"]),
        ("count train --full --preset tiny --gpu t4 --mfu 0.4", &["--peak", "no bf16", "f32, f16"]),
        ("count train --full --preset tiny --gpu l4 --mfu 42", &["--mfu", "0.42 or 42%"]),
        ("count train --full --preset tiny --gpu l4 --mfu 0.4 --sweep seq=1,2", &["--sweep"]),
        ("count train --full --preset tiny --base-compute 3", &["--base-compute", "no unit"]),
        ("count train --full --preset tiny --base-compute 3FLOP", &["--threshold"]),
        ("count train --full --preset tiny --threshold us", &["--threshold", "eu"]),
        ("count forward --preset tiny --threshold eu", &["--threshold"]),
        ("mfu --preset tiny --gpu l4", &["--tokens-per-second", "missing"]),
        ("mfu --preset tiny --step-seconds 1", &["--gpu"]),
        ("mfu --preset tiny --gpu l4 --step-seconds 1 --tokens-per-second 2", &["cannot be used"]),
        ("mfu --preset tiny --gpu l4 --tflops-per-gpu 3", &["--by"]),
        ("mfu --preset tiny --gpu l4 --step-seconds 0", &["--step-seconds", "above 0"]),
    ] {
        refused(dir.path(), args, parts);
    }
    // What does not count a workload is left out with its reason.
    let line = format!("mfu generate --preset tiny --tokens-per-second 9 {GPUS}");
    assert!(stdout(&line).contains("megatron"));
}

#[test]
fn thresholds_are_of_every_operation() {
    let of = |flags: &str| json(&format!("count train --preset tiny --full {flags} --json"));
    let counted = of("--prices unit");
    let found = of("--prices coursework --recompute --threshold eu --base-compute 1kFLOP");
    let thresholds = &found["thresholds"];
    assert_eq!(thresholds["flops"], counted["total_flops"]);
    let lines = thresholds["lines"].as_array().unwrap();
    let passed: Vec<_> = lines.iter().map(|line| line["passed"].as_bool().unwrap()).collect();
    assert_eq!(passed, [false, false, false, true]);
    let flops = number(thresholds, "flops");
    assert!(near(number(&lines[0], "share"), flops / 1e23));
    assert!(near(number(&lines[3], "share"), 3.0 * flops / 1e3));
    let unknown = of("--threshold eu");
    assert!(near(number(&unknown["thresholds"]["lines"][3], "limit_flops"), 1e25 / 3.0));
}

/// A benchmark of the tiny model in `dir`.
fn bench(dir: &Path) -> Value {
    let ceiling = Ceiling {
        schema_version: SCHEMA_VERSION,
        command: "ceiling".into(),
        device: DeviceInfo::of(&Device::Cpu, "cpu"),
        date: "2026-01-31T12:00:00Z".into(),
        matmul: vec![MatmulRate {
            dtype: Dtype::F32,
            flops_per_s: 1e15,
            m: 1,
            k: 1,
            n: 1,
            samples: vec![1.0],
        }],
        stream: Stream { bytes_per_s: 1e12, buffer_bytes: 1 << 30, rates: vec![] },
        dispatch_s: 1e-9,
        datasheet: None,
    };
    std::fs::write(dir.join("ceiling.json"), serde_json::to_string(&ceiling).unwrap()).unwrap();
    let line = "bench train --preset tiny --seq 8,16 --lora-rank 2 --repetitions 2 \
                --ceiling ceiling.json --json bench.json";
    flopaudit(dir, line).assert().success();
    serde_json::from_slice(&std::fs::read(dir.join("bench.json")).unwrap()).unwrap()
}

#[test]
fn a_benchmark_gives_the_time_of_its_own_workload_alone() {
    let dir = tmp();
    let report = bench(dir.path());
    let median = number(&report["points"][1]["seconds"], "median");
    let count = "count train --preset tiny --seq 16 --lora-rank 2 --from-bench bench.json";
    let mut out =
        flopaudit(dir.path(), &format!("{count} --steps 500 --price-per-gpu-hour 3 --json"));
    let found: Value = serde_json::from_slice(&out.unwrap().stdout).unwrap();
    assert!(near(number(&found["time"], "hours"), 500.0 * median / 3600.0));
    assert!(near(number(&found["time"], "dollars"), 3.0 * number(&found["time"], "gpu_hours")));
    assert_eq!(found["time"]["rate"]["measured"]["file"], "bench.json");
    let text = flopaudit(dir.path(), count).unwrap().stdout;
    let text = String::from_utf8(text).unwrap();
    assert!(text.contains("the median of this very workload in bench.json"), "{text}");
    for (flags, parts) in [
        ("--batch 2", &["bench.json", "no other's rate", "batch 1, not 2"][..]),
        ("--lora-rank 4", &["lora.rank 2, not 4"]),
        ("--dtype bf16", &["dtype"]),
        ("--accumulate 2", &["accumulate 1, not 2"]),
        ("--gpus 2", &["--gpus", "one device"]),
        ("--mfu 0.4", &["--from-bench", "--mfu"]),
    ] {
        let line = match flags.split_once(' ') {
            Some(("--lora-rank", rank)) => {
                count.replace("--lora-rank 2", &format!("--lora-rank {rank}"))
            }
            _ => format!("{count} {flags}"),
        };
        refused(dir.path(), &line, parts);
    }
    // In a plan, beside it.
    let plan = "preset = \"tiny\"\nfrom_bench = \"bench.json\"\nbudget = \"1 GPU-hour\"\n\
                [[experiment]]\nkind = \"train\"\nseq = 16\nlora_rank = 2\nsteps = \"max\"\n";
    std::fs::write(dir.path().join("plan.toml"), plan).unwrap();
    let out = flopaudit(dir.path(), "plan plan.toml --json").unwrap().stdout;
    let account: Value = serde_json::from_slice(&out).unwrap();
    let steps = account["solved"]["value"].as_f64().unwrap();
    assert!(steps * median <= 3600.0 && (steps + 1.0) * median > 3600.0, "{steps} x {median}");
    let other = format!("{plan}[[experiment]]\nkind = \"evaluate\"\n");
    std::fs::write(dir.path().join("plan.toml"), other).unwrap();
    refused(dir.path(), "plan plan.toml", &["plan.toml: line 9", "bench.json", "no other's rate"]);
}

#[test]
fn figures_that_no_number_holds_are_refused() {
    let dir = tmp();
    let count = "count train --full --preset tiny --gpu h100-sxm";
    let mfu = "mfu --preset tiny --gpu h100-sxm --tokens-per-second";
    for (args, flag) in [
        (format!("{count} --price-per-gpu-hour 1e300 --mfu 1e-300"), "--price-per-gpu-hour"),
        (format!("{count} --mfu 1e-300"), "--mfu"),
        (format!("{count} --mfu 0.4 --watts 1e308"), "--watts"),
        (format!("{mfu} 1e300"), "--tokens-per-second"),
        (format!("{mfu} 1e-300"), "--tokens-per-second"),
    ] {
        refused(dir.path(), &args, &[flag, "1e-9 to 1"]);
    }
    // At the edge of what is taken, no figure has digits that were not counted.
    let edge = "count train --full --preset tiny --steps 100000000000000 --gpu h100-sxm --mfu 1e-9 \
                --price-per-gpu-hour 1e15 --watts 1e15";
    let text = stdout(edge);
    assert!(text.contains("cost        $") && !text.contains("340,282,366"), "{text}");
    assert!(text.lines().find(|line| line.starts_with("cost")).unwrap().contains('e'), "{text}");
}

#[test]
fn small_rates_keep_their_digits_and_peaks_their_source() {
    let text = stdout("mfu --preset tiny --gpu h100-sxm --tokens-per-second 9");
    assert!(!text.contains(" 0.0 ") && !text.contains("0.00 %"), "{text}");
    let count = "count train --full --preset tiny --gpu h100-sxm --mfu 0.4";
    let datasheet = &json(&format!("{count} --json"))["time"]["rate"]["datasheet"];
    let (source, year) = (datasheet["source"].as_str().unwrap(), &datasheet["year"]);
    assert!(year.as_u64().unwrap() > 2000);
    let text = stdout(count).split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(text.contains(&format!("peak: {source} ({year})")), "{text}");
}

#[test]
fn a_preset_in_place_of_weights_is_told_by_every_count() {
    let dir = tmp();
    let weights = dir.path().join("weights");
    let saved = "train --preset tiny --full --steps 1 --seq 8 --batch 1 --data d.txt --out weights";
    std::fs::write(dir.path().join("d.txt"), "some words to learn from").unwrap();
    flopaudit(dir.path(), saved).assert().success();
    assert!(weights.join("model.safetensors").exists());
    let plan = "[[experiment]]\nkind = \"eval\"\n";
    std::fs::write(dir.path().join("plan.toml"), plan).unwrap();
    let told = |args: &str| {
        let out = flopaudit(dir.path(), args).assert().success().get_output().stderr.clone();
        String::from_utf8(out).unwrap()
    };
    for line in [
        "count forward",
        "count forward --sweep seq=8,16",
        "reconcile --from exact --to 6nd forward",
        "mfu --gpu l4 --step-seconds 1",
        "plan plan.toml",
    ] {
        let note = "note: counted is the preset qwen2.5-0.5b";
        assert!(told(line).contains(note), "{line}: {}", told(line));
    }
    assert_eq!(told("count forward --sweep preset=tiny,qwen2.5-7b"), "");
    let long = told("reconcile --from exact --to 6nd forward --preset qwen2.5-7b --seq 200000");
    assert!(long.contains("a context of 200000 tokens is longer"), "{long}");
}
