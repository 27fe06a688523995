//! Products in 8 bits: every family audited in every kind of workload, what is refused, and what the
//! program says of them.

mod program;

use flopaudit::{
    analytic::predict,
    config::{LoraConfig, ModelConfig, Projection},
    ledger::{Dtype, Module, Op, Phase},
    workload::{Logits, Task, Workload},
};
use program::*;

const FAMILIES: [&str; 5] = ["tiny", "tiny-llama", "tiny-mistral", "tiny-qwen3", "tiny-gemma3"];

#[test]
fn every_family_balances_in_every_kind_of_workload() {
    for preset in FAMILIES {
        for line in [
            "forward --seq 9 --past 3",
            "generate --prompt-tokens 5 --new-tokens 4 --batch 2",
            "verify --past 4 --rounds 2",
            "eval --seq 20 --batch 2",
            "train --seq 12 --lora-rank 2 --lora-targets all-linear --accumulate 2",
            "train --seq 12 --lora-rank 3 --recompute --attention blocked",
        ] {
            let report = json(&format!("audit {line} --preset {preset} --dtype fp8 --json"));
            assert_eq!(report["balanced"], true, "{preset} {line}");
            assert_eq!(report["workload"]["dtype"], "fp8", "{preset} {line}");
        }
    }
}

#[test]
fn what_is_read_by_several_is_quantized_once() {
    // tiny: D 32, F 48, H·d 32, K·d 16; q, k and v have biases.
    let workload = Workload {
        model: ModelConfig::preset("tiny").unwrap(),
        lora: LoraConfig::none(),
        dtype: Dtype::Fp8,
        attention: Default::default(),
        task: Task::Forward { batch: 2, seq: 3, past: 0, logits: Logits::All, sequences: None },
    };
    let ledger = predict(&workload).unwrap();
    let of_layer = |projection: Projection| {
        let keys = ledger.iter().filter(|(key, _)| {
            key.scope.layer == Some(1) && key.scope.module == Module::Proj(projection)
        });
        let mut ops: Vec<(Op, Dtype)> = keys.map(|(key, _)| (key.op, key.dtype)).collect();
        ops.sort();
        ops
    };
    let rows = 6;
    let product = |k, n| (Op::Matmul { b: 1, m: rows, k, n }, Dtype::Fp8);
    let quantize = |width| (Op::Quantize { rows, width }, Dtype::BF16);
    let dequantize = |width| (Op::Dequantize { rows, width }, Dtype::BF16);
    let bias = |width| (Op::Bias { rows, width }, Dtype::BF16);
    use Projection::{DownProj, GateProj, KProj, OProj, QProj, UpProj};
    let (d, f, kv) = (32, 48, 16);
    for (projection, ops) in [
        (QProj, vec![product(d, d), quantize(d), dequantize(d), bias(d)]),
        (KProj, vec![product(d, kv), dequantize(kv), bias(kv)]),
        (OProj, vec![product(d, d), quantize(d), dequantize(d)]),
        (GateProj, vec![product(d, f), quantize(d), dequantize(f)]),
        (UpProj, vec![product(d, f), dequantize(f)]),
        (DownProj, vec![product(f, d), quantize(f), dequantize(d)]),
    ] {
        assert_eq!(of_layer(projection), ops, "{projection}");
    }
    // All else is bf16: the head, attention, norms.
    let keys: Vec<_> = ledger.iter().map(|(key, _)| key).collect();
    let narrow: Vec<_> = keys.iter().filter(|key| key.dtype == Dtype::Fp8).collect();
    assert!(narrow.iter().all(|key| matches!(key.scope.module, Module::Proj(_))));
    assert_eq!(narrow.len(), 7 * 3);
}

#[test]
fn gradients_are_in_bf16() {
    let model = ModelConfig::preset("tiny").unwrap();
    let lora = LoraConfig::new(&model, 2, 8.0, &[Projection::QProj]).unwrap();
    let mut task = flopaudit::workload::Kind::Train.task();
    if let Task::Train { seq, .. } = &mut task {
        *seq = 8;
    }
    let workload = Workload { model, lora, dtype: Dtype::Fp8, attention: Default::default(), task };
    for (key, _) in predict(&workload).unwrap().iter() {
        let narrow = key.phase == Phase::Forward
            && matches!(key.scope.module, Module::Proj(_))
            && matches!(key.op, Op::Matmul { .. });
        assert_eq!(key.dtype == Dtype::Fp8, narrow, "{key}");
    }
}

#[test]
fn weights_in_8_bits_take_a_byte_each() {
    let memory = |line: &str| {
        let report = json(&format!("count {line} --preset qwen2.5-7b --json"));
        report["memory"]["weights_bytes"].as_u64().unwrap()
    };
    // 28 layers of D 3584, F 18944, K·d 512.
    let (d, f, kv) = (3584u64, 18_944, 512);
    let (elements, rows) =
        (28 * (2 * d * d + 2 * d * kv + 3 * d * f), 28 * (3 * d + 2 * kv + 2 * f));
    let (wide, narrow) = (memory("forward --dtype bf16"), memory("forward --dtype fp8"));
    assert_eq!(wide - narrow, elements - 4 * rows);
    // A training holds both.
    let train = |dtype| memory(&format!("train --lora-rank 8 --dtype {dtype}"));
    assert_eq!(train("fp8") - train("bf16"), elements + 4 * rows);
}

#[test]
fn what_does_not_go_with_it_is_refused() {
    let dir = tmp();
    std::fs::write(dir.path().join("text.txt"), "one two three four five six").unwrap();
    let full = ["--full", "--dtype fp8", "frozen"];
    for line in [
        "count train --preset tiny --full --dtype fp8",
        "audit train --preset tiny --full --dtype fp8 --seq 8",
        "bench train --preset tiny --full --dtype fp8 --seq 8",
        "train --preset tiny --data text.txt --seq 9 --steps 1 --out out --full --dtype fp8",
    ] {
        refused(dir.path(), line, &full);
    }
    let line = "train --preset tiny --data text.txt --seq 9 --steps 1 --out out --dtype fp8 --check-gradients 1";
    refused(dir.path(), line, &["--check-gradients", "--dtype f32"]);
}

#[test]
fn a_training_of_adapters_runs_and_goes_on() {
    let dir = tmp();
    std::fs::write(dir.path().join("text.txt"), "one two three four five six").unwrap();
    let line =
        "train --preset tiny --data text.txt --eval-data text.txt --seq 9 --out out --dtype fp8";
    flopaudit(dir.path(), &format!("{line} --steps 2")).assert().success();
    let run = std::fs::read(dir.path().join("out/run.json")).unwrap();
    let run: serde_json::Value = serde_json::from_slice(&run).unwrap();
    assert_eq!(run["balanced"], true);
    assert_eq!(run["workload"][0]["dtype"], "fp8");
    flopaudit(dir.path(), &format!("{line} --steps 2 --resume")).assert().success();
    refused(dir.path(), &format!("{line} --steps 2 --resume").replace("fp8", "bf16"), &["--dtype"]);
    let adapter = "eval --preset tiny --data text.txt --seq 9 --dtype fp8 --adapter out";
    flopaudit(dir.path(), adapter).assert().success();
}

#[test]
fn reconciliations_name_what_it_takes() {
    let way = json(
        "reconcile --from 6nd --to exact --prices unit forward --preset tiny --seq 4 --dtype fp8 --json",
    );
    let steps = way["steps"].as_array().unwrap();
    let scales = steps.iter().find(|s| s["cause"] == "scales of 8-bit products left out").unwrap();
    // Of each of 3 layers and 4 rows: 32 + 32 + 32 + 48 muls and 4 times 2 divs for what is read, two
    // muls for each of 64 + 32 + 96 + 32 outputs.
    assert_eq!(scales["flops"], 3 * 4 * ((144 + 8) + 2 * 224));
}

#[test]
fn plans_and_sweeps_take_it() {
    let dir = tmp();
    let plan = "preset = \"tiny\"\ndtype = \"fp8\"\nbudget = \"1e12 FLOP\"\n[[experiment]]\nname = \"a\"\nkind = \"forward\"\nseq = 8\n";
    std::fs::write(dir.path().join("plan.toml"), plan).unwrap();
    let out = flopaudit(dir.path(), "plan plan.toml --json");
    let out = { out }.assert().success().get_output().stdout.clone();
    assert!(String::from_utf8(out).unwrap().contains("fp8"));
    let sweep = stdout("count forward --preset tiny --sweep dtype=bf16,fp8");
    assert!(sweep.contains("fp8") && sweep.contains("bf16"), "{sweep}");
}
