//! Structures on the command line: the notebook's table, reconciliations, finished runs, and every
//! figure that docs/conventions.md shows.

mod program;

use program::*;
use serde_json::Value;

#[test]
fn the_notebooks_table() {
    insta::assert_snapshot!(stdout(
        "count forward --structure notebook --prices coursework --seq 512 --lora-rank 4"
    ));
}

#[test]
fn the_notebooks_exact_figures() {
    let line = "count generate --structure notebook --prices coursework --prompt-tokens 512 --new-tokens 512 --lora-rank 5 --json";
    let count = json(line);
    assert_eq!(count["total_flops"], 473_527_096_538_624u64);
    assert_eq!(count["lora_flops"], 354_814_586_880u64);
    assert_eq!(count["structure"], "notebook");
    let forward =
        json("count forward --structure notebook --prices coursework --lora-rank 1 --json");
    let rows = forward["notebook_table"].as_array().unwrap();
    assert_eq!(rows[0]["flops"][4], 10);
    assert_eq!(rows[5]["name"], "Full Forward Pass");
    assert_eq!(rows[5]["total"], forward["total_flops"]);
    let train = "count train --structure notebook --prices coursework --batch 4 --lora-rank 4";
    let steps = json(&format!("{train} --steps 13800 --json"));
    let accumulated = json(&format!("{train} --accumulate 138 --steps 100 --json"));
    assert_eq!(steps["total_flops"], accumulated["total_flops"]);
    assert_eq!(steps["workload"]["kind"], "train");
}

#[test]
fn a_reconciliation() {
    insta::assert_snapshot!(stdout(
        "reconcile --from notebook --to exact --prices coursework generate --preset tiny --prompt-tokens 8 --new-tokens 4 --lora-rank 2"
    ));
}

#[test]
fn a_reconciliation_of_training() {
    insta::assert_snapshot!(stdout(
        "reconcile --from 6nd --to torch --prices matmul train --preset tiny --batch 2 --seq 8 --lora-rank 2"
    ));
}

#[test]
fn reconciliations_in_json_sum() {
    let way = json(
        "reconcile --from hf-trainer --to exact --from-prices matmul --to-prices unit forward --preset qwen2.5-7b --json",
    );
    let int = |v: &Value| v.as_i64().unwrap();
    let sum: i64 = way["steps"].as_array().unwrap().iter().map(|s| int(&s["flops"])).sum();
    assert_eq!(sum, int(&way["difference_flops"]));
    assert_eq!(int(&way["from"]["total_flops"]) + sum, int(&way["to"]["total_flops"]));
    let last = way["steps"].as_array().unwrap().last().unwrap();
    assert_eq!(last["running_total"], way["to"]["total_flops"]);
    assert!(last["cause"].as_str().unwrap().starts_with("price of"));
}

#[test]
fn a_finished_run_is_an_end() {
    let dir = tmp();
    let line = "generate Hello --preset tiny --max-new-tokens 6 --ignore-eos --quiet --prices matmul --json run.json";
    flopaudit(dir.path(), line).assert().success();
    let way = flopaudit(dir.path(), "reconcile --from 6nd --to run.json --json").assert().success();
    let way: Value = serde_json::from_slice(&way.get_output().stdout).unwrap();
    let run: Value =
        serde_json::from_slice(&std::fs::read(dir.path().join("run.json")).unwrap()).unwrap();
    assert_eq!(way["to"]["total_flops"], run["total_flops"]);
    assert_eq!(way["to"]["structure"], "exact");
    assert_eq!(way["to"]["run"]["agrees"], true);
    assert_eq!(way["from"]["prices"]["name"], "matmul");

    // Several prompts are several workloads.
    std::fs::write(dir.path().join("prompts.txt"), "ab\nabc\n").unwrap();
    let line = "generate --prompts prompts.txt --preset tiny --max-new-tokens 3 --ignore-eos --json two.json";
    flopaudit(dir.path(), line).assert().success();
    flopaudit(dir.path(), "reconcile --from two.json --to palm").assert().success();

    // A training is several too.
    std::fs::write(dir.path().join("text.txt"), "one two three four five").unwrap();
    let line =
        "train --preset tiny --data text.txt --eval-data text.txt --seq 9 --steps 3 --out out";
    flopaudit(dir.path(), line).assert().success();
    flopaudit(dir.path(), "reconcile --from 6nd --to out/run.json").assert().success();

    // So is a count, under its own structure.
    let line =
        "count evaluate --structure notebook --preset tiny --prices coursework --json count.json";
    flopaudit(dir.path(), line).assert().success();
    let to_torch = "reconcile --from count.json --to torch --to-prices matmul";
    flopaudit(dir.path(), to_torch).assert().success();
    flopaudit(dir.path(), "reconcile --from count.json").assert().success();
    refused(dir.path(), "reconcile --from count.json --to 6nd forward", &["run", "workload"]);
    // A run can be priced anew.
    let anew = "reconcile --from run.json --to exact --prices coursework --json";
    let way = flopaudit(dir.path(), anew).assert().success();
    let way: Value = serde_json::from_slice(&way.get_output().stdout).unwrap();
    assert_eq!(way["from"]["prices"]["name"], "coursework");
    assert_eq!(
        (&way["from"]["run"]["agrees"], &way["difference_flops"]),
        (&true.into(), &0.into())
    );
    assert!(way["from"]["total_flops"].as_u64() > run["total_flops"].as_u64());

    // A run that did not spend what its structure counts is told apart.
    let mut wrong = run;
    wrong["total_flops"] = Value::from(wrong["total_flops"].as_u64().unwrap() + 1);
    std::fs::write(dir.path().join("wrong.json"), wrong.to_string()).unwrap();
    let assert = flopaudit(dir.path(), "reconcile --from 6nd --to wrong.json").assert().code(1);
    let text = String::from_utf8(assert.get_output().stdout.clone()).unwrap();
    assert!(text.contains("which DIFFERS from exact"), "{text}");
}

#[test]
fn what_means_nothing_is_refused() {
    let dir = tmp();
    let path = dir.path();
    refused(path, "count train --steps 2", &["--lora-rank", "--full"]);
    refused(path, "count train --structure torch", &["--lora-rank", "--full"]);
    refused(path, "count train --structure torch --full --steps 0", &["--steps", "at least 1"]);
    refused(path, "count train --structure 6nd --full --accumulate 0", &["--accumulate"]);
    let many = u64::MAX;
    let line = format!("count train --structure 6nd --full --steps {many} --accumulate {many}");
    refused(path, &line, &["--steps", "above"]);
    refused(path, "reconcile", &["forward, generate, verify, train or eval"]);
    refused(path, "reconcile --from 7nd forward", &["--from", "7nd", "megatron-causal"]);
    refused(path, "reconcile --to no.json", &["no.json"]);
    std::fs::write(path.join("odd.json"), "{\"schema_version\": 1}").unwrap();
    refused(path, "reconcile --to odd.json", &["odd.json", "no finished run"]);
}

#[test]
fn the_guides_show_what_is_printed() {
    let guide =
        concat!(include_str!("../docs/conventions.md"), include_str!("../docs/training.md"));
    let mut commands = 0;
    for block in guide.split("```console\n").skip(1) {
        let block = block.split("```").next().unwrap();
        let mut lines = block.lines();
        let command = lines.next().unwrap().strip_prefix("$ flopaudit ").unwrap();
        let printed = stdout(command);
        let mut printed = printed.lines().map(str::trim);
        for line in lines.map(str::trim).filter(|l| !l.is_empty() && *l != "…") {
            assert!(printed.any(|p| p == line), "`{command}` does not print, in order: {line}");
        }
        commands += 1;
    }
    assert!(commands >= 7);
}

/// Totals that are right, of something that a reader may not have meant.
#[test]
fn a_count_says_what_may_surprise() {
    let dir = tmp();
    let told = |args: &str| {
        let output = flopaudit(dir.path(), args).output().unwrap();
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        let notes = report["notes"].as_array().cloned().unwrap_or_default();
        let notes: Vec<String> = notes.iter().map(|n| n.as_str().unwrap().to_string()).collect();
        assert!(notes.iter().all(|note| stderr.contains(note)), "{stderr}");
        notes
    };
    assert!(told("count forward --preset qwen2.5-0.5b --seq 32768 --json").is_empty());
    let notes = told("count eval --preset qwen2.5-0.5b --seq 32769 --json");
    assert_eq!(notes, ["a context of 32769 tokens is longer than the model was made for, 32768"]);
    // Beside weights that a run would take.
    assert!(told("count forward --json").is_empty());
    std::fs::create_dir(dir.path().join("weights")).unwrap();
    std::fs::write(dir.path().join("weights/model.gguf"), "").unwrap();
    let notes = told("count forward --json");
    assert!(
        notes[0].starts_with("counted is the preset qwen2.5-0.5b, not the weights"),
        "{notes:?}"
    );
}
