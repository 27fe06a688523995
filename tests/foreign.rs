//! `reconcile` of what other tools wrote.

mod program;

use std::path::Path;

use program::{flopaudit, refused, tmp};
use serde_json::Value;

/// The samples in a directory of their own.
fn samples() -> tempfile::TempDir {
    let dir = tmp();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/foreign");
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    dir
}

const TRAIN: &str = "train --preset tiny --batch 2 --seq 12 --accumulate 2 --steps 3";
const FORWARD: &str = "forward --preset tiny --batch 2 --seq 12";

/// The document of a reconciliation that ends with `code`.
fn way(dir: &Path, args: &str, code: i32) -> Value {
    let assert = flopaudit(dir, &format!("reconcile {args} --json")).assert().code(code);
    serde_json::from_slice(&assert.get_output().stdout).unwrap()
}

#[test]
fn every_format_leads_to_exact() {
    let dir = samples();
    let served = "generate --preset tiny --batch 2 --prompt-tokens 12 --new-tokens 4";
    let lora = "--lora-rank 4 --lora-targets q_proj,v_proj";
    let one = "train --preset tiny --batch 2 --seq 12";
    let megatron =
        "train --preset qwen2.5-0.5b --batch 4 --accumulate 8 --seq 2048 --steps 30 --full";
    let pp512 = "forward --preset qwen2.5-7b --seq 512 --logits last";
    for (from, workload, structure, stated, agreement) in [
        ("trainer_state.json", format!("{TRAIN} --full"), "hf-trainer", 20_265_984, "exact"),
        ("trainer_state_lora.json", format!("{TRAIN} {lora}"), "hf-trainer", 21_427_200, "exact"),
        ("torch_train_lora.txt", format!("{one} {lora}"), "torch:eager", 3_591_168, "exact"),
        ("torch_forward_sdpa.txt", FORWARD.into(), "torch:sdpa", 1_708_032, "exact"),
        ("deepspeed_sdpa.txt", FORWARD.into(), "deepspeed:sdpa", 1_710_000, "within-rounding"),
        ("calflops_sdpa.txt", FORWARD.into(), "calflops:sdpa", 1_600_000, "within-rounding"),
        ("vllm_metrics.txt --gpus 1", served.into(), "vllm", 1_689_088, "exact"),
        (
            "megatron.log",
            megatron.into(),
            "megatron-causal",
            6_344_013_600_000_000u64,
            "within-rounding",
        ),
        ("llama_bench.json", pp512.into(), "torch:eager", 0, "no-figure"),
    ] {
        let way = way(dir.path(), &format!("--from {from} {workload}"), 0);
        let tool = &way["from"]["tool"];
        assert_eq!(way["from"]["structure"], structure, "{from}");
        assert_eq!(tool["agreement"], agreement, "{from}: {tool}");
        let total = way["from"]["total_flops"].as_i64().unwrap();
        if stated > 0 {
            assert_eq!(total, i64::try_from(stated).unwrap(), "{from}");
        }
        let steps = way["steps"].as_array().unwrap();
        let sum: i64 = steps.iter().map(|step| step["flops"].as_i64().unwrap()).sum();
        assert_eq!(Some(total + sum), way["to"]["total_flops"].as_i64(), "{from}");
        assert_eq!(way["to"]["structure"], "exact");
    }
}

#[test]
fn a_difference_is_shown_and_fails() {
    let dir = samples();
    let args = "--from trainer_state.json train --preset tiny --batch 2 --seq 12 --steps 3 --full";
    let way = way(dir.path(), args, 1);
    assert_eq!(way["steps"][0]["cause"], "unexplained by the stated workload");
    assert_eq!(way["steps"][0]["flops"], -20_265_984 / 2);
    assert_eq!(way["from"]["tool"]["notes"][0], "it states 2 times what hf-trainer counts");
    let assert = flopaudit(dir.path(), &format!("reconcile {args}")).assert().code(1);
    let output = assert.get_output();
    let [text, why] = [&output.stdout, &output.stderr].map(|b| String::from_utf8_lossy(b));
    assert!(text.contains("which DIFFERS: hf-trainer counts 10,132,992"), "{text}");
    assert!(why.contains("trainer_state.json states 20265984 FLOPs, hf-trainer counts 10132992"));
    // At the other end it is the last step.
    let args = args.replace("--from", "--from 6nd --to");
    let way = self::way(dir.path(), &args, 1);
    let steps = way["steps"].as_array().unwrap();
    assert_eq!(steps.last().unwrap()["flops"], 20_265_984 / 2);
    assert_eq!(way["to"]["total_flops"], 20_265_984);
}

#[test]
fn stdin_is_read() {
    let dir = samples();
    let table = std::fs::read(dir.path().join("torch_forward_sdpa.txt")).unwrap();
    let line = format!("reconcile --from - {FORWARD}");
    flopaudit(dir.path(), &line).write_stdin(table).assert().success();
    refused(dir.path(), &line, &["stdin: is none of what is read", "vLLM's /metrics"]);
    refused(dir.path(), "reconcile --from - --to - forward", &["stdin is read once"]);
}

#[test]
fn what_cannot_be_read_is_one_line() {
    let dir = samples();
    let path = dir.path();
    std::fs::write(path.join("latin.txt"), b"caf\xe9").unwrap();
    std::fs::write(path.join("notes.txt"), "none").unwrap();
    let whole = std::fs::read_to_string(path.join("trainer_state.json")).unwrap();
    std::fs::write(path.join("cut.json"), &whole[..whole.len() / 2]).unwrap();
    for (args, parts) in [
        (format!("--from latin.txt {FORWARD}"), &["latin.txt", "is not UTF-8"][..]),
        (
            format!("--from notes.txt {FORWARD}"),
            &["notes.txt: is none of what is read", "DeepSpeed"],
        ),
        (format!("--from cut.json {TRAIN} --full"), &["cut.json: is no JSON"]),
        (format!("--from gone.txt {FORWARD}"), &["gone.txt"]),
        (format!("--from trainer_state.json {FORWARD}"), &["is of train"]),
        ("--from trainer_state.json".into(), &["of which workload?"]),
        (format!("--from vllm_metrics.txt {FORWARD}"), &["give --gpus"]),
        (format!("--from exact --to 6nd --gpus 2 {FORWARD}"), &["--gpus"]),
        (
            format!("--from trainer_state.json --to vllm_metrics.txt {FORWARD}"),
            &["one file at a time"],
        ),
        (
            format!("--from torch_forward_sdpa.txt --from-prices unit {FORWARD}"),
            &["--from-prices", "has its tool's"],
        ),
    ] {
        refused(path, &format!("reconcile {args}"), parts);
    }
}

#[test]
fn the_guide_shows_what_is_printed() {
    let dir = samples();
    let mut commands = 0;
    for block in include_str!("../docs/other-tools.md").split("```console\n").skip(1) {
        let mut lines = block.split("```").next().unwrap().lines();
        let command = lines.next().unwrap().strip_prefix("$ flopaudit ").unwrap();
        let printed = flopaudit(dir.path(), command).output().unwrap().stdout;
        let printed = String::from_utf8(printed).unwrap();
        let mut printed = printed.lines().map(str::trim);
        for line in lines.map(str::trim).filter(|l| !l.is_empty() && *l != "…") {
            assert!(printed.any(|p| p == line), "`{command}` does not print, in order: {line}");
        }
        commands += 1;
    }
    assert_eq!(commands, 3);
}
