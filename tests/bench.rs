//! `ceiling` and `bench` through the command line, on the tiny model.

mod program;

use std::path::Path;

use candle_core::Device;
use flopaudit::{
    bench::{BenchReport, Ceiling, DeviceInfo, MatmulRate, SCHEMA_VERSION, Stream},
    ledger::Dtype,
};
use program::{flopaudit, refused, tmp};
use serde_json::Value;

/// A ceiling of this device in `dir`, so high that nothing reaches it.
fn ceiling(dir: &Path, flops_per_s: f64) {
    let rate = |dtype| MatmulRate { dtype, flops_per_s, m: 1, k: 1, n: 1, samples: vec![1.0] };
    let ceiling = Ceiling {
        schema_version: SCHEMA_VERSION,
        command: "ceiling".into(),
        device: DeviceInfo::of(&Device::Cpu, "cpu"),
        date: "2026-01-31T12:00:00Z".into(),
        matmul: vec![rate(Dtype::F32), rate(Dtype::BF16)],
        stream: Stream { bytes_per_s: 1e12, buffer_bytes: 1 << 30, rates: vec![] },
        dispatch_s: 1e-9,
        datasheet: None,
    };
    std::fs::write(dir.join("ceiling.json"), serde_json::to_string(&ceiling).unwrap()).unwrap();
}

const TINY: &str = "--preset tiny --ceiling ceiling.json --repetitions 3";

fn bench(dir: &Path, args: &str) -> Value {
    let out = flopaudit(dir, &format!("bench {args} {TINY} --json")).assert().success();
    serde_json::from_slice(&out.get_output().stdout).unwrap()
}

#[test]
fn every_kind_runs_over_its_grid_and_is_audited() {
    let dir = tmp();
    ceiling(dir.path(), 1e15);
    for (args, points, tokens) in [
        ("prefill --seq 4,8 --batch 1,3 --dtype f32,bf16", 8, vec![4, 8, 12, 24]),
        ("decode --context 1..64:*8 --batch 2 --new-tokens 2", 2 + 1, vec![2, 2, 2]),
        ("train --seq 8 --lora-rank 1,2", 2, vec![8, 8]),
        ("train --seq 8 --full --recompute", 1, vec![8]),
        ("prefill --seq 80 --attention dense,blocked", 2, vec![80, 80]),
        ("train --seq 80 --attention blocked", 1, vec![80]),
    ] {
        let report = bench(dir.path(), args);
        let found = report["points"].as_array().unwrap();
        assert_eq!(found.len(), points, "{args}");
        for (point, tokens) in found.iter().zip(tokens) {
            assert_eq!(point["balanced"], true, "{args}");
            assert_eq!(point["tokens"], tokens, "{args}");
            let median = point["seconds"]["median"].as_f64().unwrap();
            let rate = point["tokens_per_s"].as_f64().unwrap();
            assert!((rate * median / tokens as f64 - 1.0).abs() < 1e-9, "{args}");
            assert!(point["mfu_measured"].as_f64().unwrap() < 1.0, "{args}");
        }
    }
}

/// What `count` says of the same workload is what the bench counted.
#[test]
fn flops_are_those_that_count_states() {
    let dir = tmp();
    ceiling(dir.path(), 1e15);
    let counted = |args: &str, phase: &str| {
        let count = format!("count {args} --preset tiny --prices matmul --json");
        let out = flopaudit(dir.path(), &count).unwrap().stdout;
        let report: Value = serde_json::from_slice(&out).unwrap();
        let rows = report["rows"].as_array().unwrap().iter();
        let of_phase = rows.filter(|row| row["phase"] == phase);
        of_phase.map(|row| row["flops"].as_u64().unwrap()).sum::<u64>()
    };
    let flops = |args: &str| bench(dir.path(), args)["points"][0]["flops"].as_u64().unwrap();
    let generation = "generate --prompt-tokens 9 --new-tokens 2 --batch 2";
    assert_eq!(flops("prefill --seq 9 --batch 2"), counted(generation, "prefill"));
    assert_eq!(flops("decode --context 9 --batch 2"), counted(generation, "decode"));
    // A decoding step of the tiny model by hand, a layer: q and o 2·32·32 each, k and v 2·32·16
    // each, scores and values 2·32·10 each, MLP 3 · 2·32·48; and the head, 2·32·320.
    let layer = 2 * (2 * 32 * 32) + 2 * (2 * 32 * 16) + 2 * (2 * 32 * 10) + 3 * (2 * 32 * 48);
    assert_eq!(flops("decode --context 9"), 3 * layer + 2 * 32 * 320);
}

#[test]
fn decoding_has_a_curve() {
    let dir = tmp();
    ceiling(dir.path(), 1e15);
    let report = bench(dir.path(), "decode --context 8,64,256 --batch 1,4 --dtype f32,bf16");
    let curves = report["curves"].as_array().unwrap();
    assert_eq!(curves.len(), 2);
    assert_eq!(curves[0]["points"].as_array().unwrap().len(), 6);
    assert!(curves[0]["residual"].as_f64().unwrap() >= 0.0);
    let few = bench(dir.path(), "decode --context 8,64");
    assert_eq!(few["curves"].as_array().unwrap().len(), 0);
}

#[test]
fn tables_csv_and_markdown_hold_every_point() {
    let dir = tmp();
    ceiling(dir.path(), 1e15);
    let text = |args: &str| {
        let out = flopaudit(dir.path(), &format!("bench {args} {TINY}")).assert().success();
        String::from_utf8(out.get_output().stdout.clone()).unwrap()
    };
    let table = text("decode --context 4,16,64 --csv points.csv --markdown points.md");
    for part in
        ["time per token", "MFU", "bound", "every point is audited", "curve     f32: step ="]
    {
        assert!(table.contains(part), "{table} lacks {part}");
    }
    let csv = std::fs::read_to_string(dir.path().join("points.csv")).unwrap();
    let lines: Vec<_> = csv.split_terminator("\r\n").collect();
    assert_eq!(lines.len(), 4);
    assert!(lines.iter().all(|line| line.split(',').count() == lines[0].split(',').count()));
    assert!(lines[0].starts_with("dtype,lora_rank,batch,seq,context,ops,samples,median_s"));
    assert!(lines[3].starts_with("f32,0,1,1,64,") && lines[3].contains(",24,"));
    let markdown = std::fs::read_to_string(dir.path().join("points.md")).unwrap();
    assert_eq!(markdown.lines().count(), 5);
    assert!(markdown.starts_with("| dtype | batch | context | time per token |"));
    assert!(text("prefill --seq 4 --csv").starts_with("dtype,"));
    assert!(text("prefill --seq 4 --markdown").starts_with("| dtype |"));
}

#[test]
fn reports_survive_their_json() {
    let dir = tmp();
    ceiling(dir.path(), 1e15);
    let file = dir.path().join("run.json");
    let args = "bench decode --context 4,16,64 --json run.json";
    flopaudit(dir.path(), &format!("{args} {TINY}")).assert().success();
    let report = BenchReport::read(&file).unwrap();
    let again: BenchReport =
        serde_json::from_str(&serde_json::to_string(&report).unwrap()).unwrap();
    assert_eq!(report.points.len(), 3);
    assert_eq!(again.points[0].workload, report.points[0].workload);
    assert_eq!(again.points[0].flops, report.points[0].flops);
    assert_eq!(again.points[0].seconds.samples.len(), report.points[0].seconds.samples.len());
    let read = Ceiling::read(&dir.path().join("ceiling.json")).unwrap();
    assert_eq!(read, report.ceiling);
}

#[test]
fn compare_says_what_changed_beyond_the_noise() {
    let dir = tmp();
    ceiling(dir.path(), 1e15);
    let args = "bench decode --context 4,16 --json before.json --new-tokens 4";
    flopaudit(dir.path(), &format!("{args} {TINY}")).assert().success();
    let mut report = BenchReport::read(&dir.path().join("before.json")).unwrap();
    // Steady times, of which the second point later takes half and the first as long as before.
    let mut set = |name: &str, times: [f64; 2]| {
        for (point, time) in report.points.iter_mut().zip(times) {
            let samples = [0.99, 1.0, 1.01, 1.0, 1.02].map(|s| s * time).to_vec();
            point.seconds = flopaudit::bench::Seconds::of(samples).unwrap();
        }
        std::fs::write(dir.path().join(name), serde_json::to_string(&report).unwrap()).unwrap();
    };
    set("before.json", [1.0, 1.0]);
    set("after.json", [1.001, 0.5]);
    let compare = |args: &str| {
        let out = flopaudit(dir.path(), &format!("bench compare {args}")).assert().success();
        String::from_utf8(out.get_output().stdout.clone()).unwrap()
    };
    let json: Value = serde_json::from_str(&compare("before.json after.json --json")).unwrap();
    let verdict = |i: usize| json["changes"][i]["verdict"].as_str().unwrap().to_string();
    assert_eq!((verdict(0), verdict(1)), ("same".into(), "faster".into()));
    assert!((json["changes"][1]["ratio"].as_f64().unwrap() - 0.5).abs() < 1e-9);
    let table = compare("after.json before.json");
    assert!(table.contains("slower") && table.contains("1 of 2 changed"), "{table}");
    assert!(compare("before.json after.json --noise 60").contains("0 of 2 changed"));
    assert!(table.contains("on ") && table.contains("debug build"), "{table}");
    let other = format!("bench decode --context 5 --json other.json {TINY}");
    flopaudit(dir.path(), &other).assert().success();
    refused(dir.path(), "bench compare before.json other.json", &["no workload is in both"]);
}

#[test]
fn what_cannot_be_is_refused() {
    let dir = tmp();
    let dir = dir.path();
    ceiling(dir, 1e3);
    let tiny = format!("bench decode {TINY} --context 4");
    refused(dir, &tiny, &["ceiling:", "% of the measured f32 matmul ceiling cannot be", "busy"]);
    ceiling(dir, 1e15);
    refused(dir, &format!("{tiny} --dtype f16"), &["ceiling.json", "no rate for f16"]);
    for (args, parts) in [
        ("decode --context 40000", vec!["--context", "40000", "32768"]),
        ("prefill --seq 0", vec!["--seq", "0"]),
        ("prefill --seq 1..8", vec!["--seq", "lacks its step"]),
        ("prefill --batch 0", vec!["--batch"]),
        ("train --lora-rank 0", vec!["--lora-rank", "nothing to train"]),
        ("prefill --repetitions 0", vec!["--repetitions"]),
        ("prefill --csv --json", vec!["--csv", "--json"]),
        ("prefill --ceiling none.json", vec!["none.json"]),
        ("prefill --device cuda:x", vec!["--device"]),
        ("compare none.json none.json", vec!["none.json"]),
        ("decode --context 1..30000:+1 --batch 1..60000:+1", vec!["--context", "10000 points"]),
        ("prefill --ceiling ceiling.json --threads 1024", vec!["ceiling.json", "1024 threads"]),
    ] {
        let preset = if args.starts_with("compare") { "" } else { "--preset tiny" };
        refused(dir, &format!("bench {args} {preset}"), &parts);
    }
    std::fs::write(dir.join("other.json"), "{\"schema_version\": 1}").unwrap();
    refused(dir, "bench compare other.json other.json", &["other.json", "is no benchmark"]);
    let text = std::fs::read_to_string(dir.join("ceiling.json")).unwrap();
    let name = DeviceInfo::of(&Device::Cpu, "cpu").name;
    std::fs::write(dir.join("other.json"), text.replace(&name, "Abacus")).unwrap();
    refused(dir, "bench prefill --preset tiny --ceiling other.json", &["is of Abacus"]);
    std::fs::write(dir.join("other.json"), text.replace("1e-9", "-1.0")).unwrap();
    refused(dir, "bench prefill --preset tiny --ceiling other.json", &["`dispatch_s` is -1"]);
}

#[test]
fn points_that_are_done_are_kept() {
    let dir = tmp();
    ceiling(dir.path(), 1e15);
    let file = dir.path().join("ceiling.json");
    let mut low: Ceiling = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    low.matmul[1].flops_per_s = 1e3;
    std::fs::write(&file, serde_json::to_string(&low).unwrap()).unwrap();
    let line = format!("bench prefill --seq 4 --dtype f32,bf16 --json done.json {TINY}");
    let out = flopaudit(dir.path(), &line).assert().code(2);
    let stderr = String::from_utf8(out.get_output().stderr.clone()).unwrap();
    assert!(stderr.contains("% of the measured bf16 matmul ceiling"), "{stderr}");
    let report = BenchReport::read(&dir.path().join("done.json")).unwrap();
    assert_eq!(report.points.len(), 1);
    assert_eq!(report.points[0].workload.dtype, Dtype::F32);
}

#[cfg(target_os = "linux")]
#[test]
fn files_do_not_depend_on_who_reads_the_table() {
    let dir = tmp();
    ceiling(dir.path(), 1e15);
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut command = std::process::Command::new(assert_cmd::cargo::cargo_bin("flopaudit"));
    let line = format!("bench prefill --seq 4 --csv a.csv --markdown a.md --json a.json {TINY}");
    let status = command
        .args(line.split_whitespace())
        .current_dir(dir.path())
        .stdout(full)
        .stderr(std::process::Stdio::null())
        .status();
    assert_eq!(status.unwrap().code(), Some(2));
    for name in ["a.csv", "a.md", "a.json"] {
        assert!(dir.path().join(name).is_file(), "{name}");
    }
}

#[test]
fn tables_show_every_digit_on_request() {
    let dir = tmp();
    ceiling(dir.path(), 1e15);
    let line = format!("bench decode --context 9 --exact {TINY}");
    let out = flopaudit(dir.path(), &line).assert().success().get_output().stdout.clone();
    // By hand, as above.
    assert!(String::from_utf8(out).unwrap().contains(" 70,400 "));
}

/// The real thing: measured, kept, and taken by the next bench.
#[test]
fn a_ceiling_is_measured_and_kept() {
    let dir = tmp();
    let run = |args: &str| -> Value {
        let mut command = flopaudit(dir.path(), args);
        command.env("XDG_CACHE_HOME", dir.path()).env("HOME", dir.path());
        serde_json::from_slice(&command.assert().success().get_output().stdout).unwrap()
    };
    let measured = run("ceiling --dtype f32 --repetitions 2 --json");
    assert!(measured["matmul"][0]["flops_per_s"].as_f64().unwrap() > 1e8);
    assert!(measured["stream"]["bytes_per_s"].as_f64().unwrap() > 1e8);
    let dispatch = measured["dispatch_s"].as_f64().unwrap();
    assert!(dispatch > 0.0 && dispatch < 1e-2);
    let report = run("bench prefill --preset tiny --seq 4 --repetitions 1 --json");
    assert_eq!(report["ceiling"], measured);
}
