//! `--trace` on every command that runs something: the format, and FLOPs that are the ledger's.

mod chrome;
mod program;

use std::{fs, path::Path};

use chrome::{Slice, checked, on, slices};
use program::*;
use serde_json::{Value, json};

fn read(file: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(file).unwrap()).unwrap()
}

/// Runs `line` with a trace and a report beside it: the trace, its ops, and the report.
fn traced(dir: &Path, line: &str) -> (Value, Vec<Slice>, Value) {
    let line = format!("{line} --trace trace.json --json run.json");
    flopaudit(dir, &line).assert().success();
    let (trace, run) = (read(&dir.join("trace.json")), read(&dir.join("run.json")));
    let ops = checked(&trace);
    let sum: u64 = ops.iter().map(|op| op.arg("flops")).sum();
    assert_eq!(run["total_flops"], sum, "{line}");
    let macs = run["matmul_macs"].as_u64().unwrap();
    assert_eq!(trace["otherData"]["total_matmul_flops"], 2 * macs, "{line}");
    let rows = run["rows"].as_array().unwrap();
    let calls: u64 = rows.iter().map(|row| row["calls"].as_u64().unwrap()).sum();
    assert_eq!(ops.len() as u64, calls, "{line}");
    assert_eq!(run["balanced"], true, "{line}");
    // The times are the report's, too.
    let seconds: f64 = rows.iter().map(|row| row["seconds"].as_f64().unwrap()).sum();
    let slices: u64 = ops.iter().map(|op| op.end - op.start).sum();
    assert!((seconds * 1e9 - slices as f64).abs() < 1e3 + 1e-9 * slices as f64, "{line}");
    (trace, ops, run)
}

fn passes(trace: &Value) -> Vec<String> {
    on(&slices(trace).unwrap(), "passes").iter().map(|pass| pass.name.clone()).collect()
}

#[test]
fn a_generation_has_a_slice_an_op() {
    let dir = tmp();
    let line = "generate Hello --preset tiny --max-new-tokens 3 --ignore-eos --lora-rank 2 --prices coursework";
    let (trace, ops, _) = traced(dir.path(), line);
    assert_eq!(
        passes(&trace),
        ["setup 1", "prefill 1", "sampling 1", "decode 1", "sampling 2", "decode 2", "sampling 3"]
    );
    let about = &trace["otherData"];
    assert_eq!(about["command"], "generate");
    assert_eq!(about["prices"]["name"], "coursework");
    assert_eq!(about["workload"][0]["new_tokens"], 3);
    // One product of a decoded token, by hand: 1 × 32 times 32 × 48.
    let up = |op: &&Slice| op.cat == "decode" && op.args["scope"] == "layers.2.mlp.up_proj";
    let up = ops.iter().find(up).unwrap();
    assert_eq!(up.name, "mlp.up_proj matmul");
    assert_eq!(up.args["dims"], json!({"b": 1, "m": 1, "k": 32, "n": 48}));
    assert_eq!(up.args["dtype"], "f32");
    assert_eq!(up.arg("flops"), 48 * (32 + 31));
    assert_eq!(up.arg("matmul_flops"), 48 * 64);
    assert_eq!(up.args["bytes"]["weights"], 4 * 32 * 48);
}

#[test]
fn prompts_of_different_lengths_are_one_pass() {
    let dir = tmp();
    fs::write(dir.path().join("p.txt"), "abcd\nxy\nefgh\n").unwrap();
    let line = "generate --prompts p.txt --preset tiny --max-new-tokens 2 --ignore-eos";
    let (trace, ..) = traced(dir.path(), line);
    assert_eq!(trace["otherData"]["workload"].as_array().unwrap().len(), 1);
    assert_eq!(passes(&trace).last().unwrap(), "sampling 2");
}

#[test]
fn audits_of_all_kinds() {
    let dir = tmp();
    let (trace, ops, _) = traced(dir.path(), "audit forward --preset tiny --seq 4 --past 3");
    assert_eq!(passes(&trace), ["setup 1", "forward 1"]);
    let layers = slices(&trace).unwrap();
    let layers: Vec<_> = on(&layers, "layers").iter().map(|s| s.name.clone()).collect();
    assert_eq!(layers, ["layer 0", "layer 1", "layer 2"]);
    assert_eq!(ops.last().unwrap().name, "lm_head matmul");
    traced(
        dir.path(),
        "audit generate --preset tiny --prompt-tokens 4 --new-tokens 3 --no-kv-cache",
    );
    traced(dir.path(), "audit evaluate --preset tiny --seq 5 --passes 2 --dtype bf16");
    let line = "audit train --preset tiny --seq 5 --lora-rank 2 --steps 2 --accumulate 2 --recompute --prices matmul";
    let (trace, ..) = traced(dir.path(), line);
    let step = ["forward", "loss", "backward", "forward", "loss", "backward", "update"];
    let found: Vec<String> = passes(&trace);
    let kinds: Vec<&str> = found.iter().map(|p| p.split_once(' ').unwrap().0).collect();
    assert_eq!(kinds, [&["setup"][..], &step, &step].concat());
    traced(dir.path(), "audit train --preset tiny --seq 4 --full");
}

#[test]
fn a_training_with_evaluations_and_a_check() {
    let dir = tmp();
    let example = |name| format!("{}/examples/{name}", env!("CARGO_MANIFEST_DIR"));
    let line = format!(
        "train --preset tiny --data {} --eval-data {} --seq 128 --steps 3 --eval-every 2 --lora-rank 2 --out out",
        example("overfit.txt"),
        example("overfit.txt")
    );
    let (_, ops, run) = traced(dir.path(), &line);
    assert!(ops.iter().any(|op| op.cat == "backward dA"));
    assert_eq!(run["training"]["check_passed"], true);
    // A run that goes on traces what it adds.
    let line = line.replace("--steps 3", "--steps 3 --resume") + " --trace more.json";
    flopaudit(dir.path(), &line).assert().success();
    let more = read(&dir.path().join("more.json"));
    assert!(slices(&more).is_ok());
}

#[test]
fn an_evaluation() {
    let dir = tmp();
    let text = format!("{}/examples/overfit.txt", env!("CARGO_MANIFEST_DIR"));
    let (trace, ..) = traced(dir.path(), &format!("eval --preset tiny --data {text} --seq 64"));
    assert_eq!(trace["otherData"]["command"], "eval");
}

#[test]
fn bad_places_are_refused_before_anything_runs() {
    let dir = tmp();
    let line = "generate hi --preset tiny --trace";
    refused(dir.path(), &format!("{line} no/such/t.json"), &["no/such/t.json"]);
    refused(dir.path(), &format!("{line} -"), &["--trace", "file"]);
    refused(dir.path(), &format!("{line} ."), &["directory"]);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

/// A full disk costs the trace, in one line, and not the report.
#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_is_one_clear_error() {
    let dir = tmp();
    let line = "audit forward --preset tiny --seq 4 --json run.json --trace /dev/full";
    let assert = flopaudit(dir.path(), line).assert().code(2);
    let stderr = String::from_utf8(assert.get_output().stderr.clone()).unwrap();
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(stderr.contains("/dev/full") && stderr.contains("No space"), "{stderr}");
    assert_eq!(read(&dir.path().join("run.json"))["balanced"], true);
}

/// The rules catch what breaks them.
#[test]
fn the_rules_are_rules() {
    let dir = tmp();
    let line = "audit forward --preset tiny --seq 2 --trace t.json";
    flopaudit(dir.path(), line).assert().success();
    let good = read(&dir.path().join("t.json"));
    assert!(slices(&good).is_ok());
    let ops = good["traceEvents"].as_array().unwrap();
    let op = ops.iter().position(|e| e["ph"] == "X" && e["tid"] == 3).unwrap();
    let break_it = |key: &str, value: Value| {
        let mut bad = good.clone();
        bad["traceEvents"][op][key] = value;
        slices(&bad).unwrap_err()
    };
    assert!(break_it("ts", json!("now")).contains("ts"));
    assert!(break_it("dur", json!(-1)).contains("dur"));
    assert!(break_it("name", json!(3)).contains("name"));
    assert!(break_it("args", json!([])).contains("args"));
    assert!(break_it("tid", json!(9)).contains("no name"));
    assert!(break_it("ph", json!("Q")).contains("another kind"));
    // Into the middle of the next op.
    let next = &ops[op + 2..].iter().find(|e| e["tid"] == 3).unwrap();
    let into = next["ts"].as_f64().unwrap() + next["dur"].as_f64().unwrap() / 2.0;
    let dur = ((into - ops[op]["ts"].as_f64().unwrap()) * 1e3).round() / 1e3;
    assert!(break_it("dur", json!(dur)).contains("overlap"));
}
