//! `train` and `eval` as a user meets them, on tiny models.

mod program;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use program::*;
use serde_json::Value;

fn example(name: &str) -> String {
    format!("{}/examples/{name}", env!("CARGO_MANIFEST_DIR"))
}

fn text() -> String {
    example("overfit.txt")
}

fn read(file: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(file).unwrap()).unwrap()
}

/// `train` of the tiny preset on the shipped text, into `dir`/out.
fn line(more: &str) -> String {
    format!("train --preset tiny --data {} --seq 32 --batch 2 --out out {more}", text())
}

fn train(dir: &Path, more: &str) -> Value {
    flopaudit(dir, &line(more)).assert().success();
    read(&dir.join("out/run.json"))
}

/// Losses in metrics.jsonl: of steps, and of evaluations.
fn losses(dir: &Path) -> Vec<(u64, f64)> {
    let lines = fs::read_to_string(dir.join("out/metrics.jsonl")).unwrap();
    let of = |line: &str| {
        let value: Value = serde_json::from_str(line).unwrap();
        let loss = value["loss"].as_f64().or(value["eval_loss"].as_f64()).unwrap();
        (value["step"].as_u64().unwrap(), loss)
    };
    lines.lines().map(of).collect()
}

#[test]
fn a_run_is_audited_and_proved() {
    let dir = tmp();
    let held_out = example("alice-eval.txt");
    let run = train(
        dir.path(),
        &format!(
            "--steps 9 --accumulate 2 --lora-rank 2 --lora-targets q_proj,v_proj,down_proj --lr 0.01 \
             --eval-data {held_out} --eval-every 4 --recompute --seed 3"
        ),
    );
    assert_eq!(run["balanced"], true);
    assert_eq!(run["executed_flops"], run["total_flops"]);
    let training = &run["training"];
    assert_eq!(training["steps"], 9);
    assert_eq!(training["with_gradient"], 18, "three adapters in three layers");
    assert_eq!(training["check_passed"], true, "{}", training["check"]);
    let evaluations: Vec<u64> = training["evaluations"]
        .as_array()
        .unwrap()
        .iter()
        .map(|p| p["step"].as_u64().unwrap())
        .collect();
    assert_eq!(evaluations, [0, 4, 8, 9]);
    let phases: Vec<&str> =
        run["rows"].as_array().unwrap().iter().map(|r| r["phase"].as_str().unwrap()).collect();
    for phase in
        ["recompute", "loss", "backward dX", "backward dA", "backward dB", "clipping", "optimizer"]
    {
        assert!(phases.contains(&phase), "{phase}");
    }
    assert!(!phases.contains(&"backward dW"));

    // Other programs find the base model by its name alone.
    let config = read(&dir.path().join("out/adapter_config.json"));
    assert_eq!(config["base_model_name_or_path"], "synthetic, seed 0");
    // The adapter that was saved scores as the model that was trained.
    let eval = format!(
        "eval --preset tiny --data {held_out} --seq 32 --batch 2 --adapter {} --json",
        dir.path().join("out").display()
    );
    let eval = json(&eval);
    let trained = training["evaluations"][3]["loss"].as_f64().unwrap();
    let loss = eval["evaluation"]["loss"].as_f64().unwrap();
    assert!((loss - trained).abs() < 1e-9, "{loss} is not {trained}");
    assert_eq!(eval["balanced"], true);
    let perplexity = eval["evaluation"]["perplexity"].as_f64().unwrap();
    assert!((perplexity - loss.exp()).abs() < 1e-9);
}

#[test]
fn a_tiny_model_learns_a_text_by_heart() {
    let dir = tmp();
    fs::write(dir.path().join("short.txt"), "to be or not to be, that is the question").unwrap();
    let line = "train --preset tiny --data short.txt --seq 40 --steps 250 --full --lr 0.01 \
                --schedule cosine --warmup 10 --out out";
    flopaudit(dir.path(), line).assert().success();
    let run = read(&dir.path().join("out/run.json"));
    let losses = run["training"]["losses"].as_array().unwrap();
    let last = losses.last().unwrap()["loss"].as_f64().unwrap();
    assert!(losses[0]["loss"].as_f64().unwrap() > 5.0 && last < 0.1, "{last}");
    assert_eq!(run["balanced"], true);
    assert!(dir.path().join("out/model.safetensors").is_file());
    assert_eq!(read(&dir.path().join("out/config.json"))["model_type"], "qwen2");
}

/// Starts `line` and ends it with `signal` once it has done a few steps.
fn cut_short(dir: &Path, line: &str, signal: &str) -> Option<i32> {
    let mut child = Command::new(assert_cmd::cargo::cargo_bin("flopaudit"))
        .args(line.split_whitespace())
        .current_dir(dir)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let metrics = dir.join("out/metrics.jsonl");
    let start = Instant::now();
    while fs::read_to_string(&metrics).map_or(0, |m| m.lines().count()) < 7 {
        assert!(start.elapsed() < Duration::from_secs(60), "no steps after a minute");
        std::thread::sleep(Duration::from_millis(1));
    }
    let sent = Command::new("kill").args([signal, &child.id().to_string()]).status();
    assert!(sent.unwrap().success());
    child.wait().unwrap().code()
}

#[test]
fn a_run_cut_short_goes_on_bit_for_bit() {
    let more = "--steps 120 --accumulate 2 --schedule cosine --warmup 5 --lr 0.02 --save-every 1";
    let whole = tmp();
    let run = train(whole.path(), more);
    let adapter = |dir: &Path| fs::read(dir.join("out/adapter_model.safetensors")).unwrap();
    for signal in ["-INT", "-KILL"] {
        let dir = tmp();
        let code = cut_short(dir.path(), &line(more), signal);
        assert!(signal == "-KILL" || code == Some(130), "{code:?}");
        assert!(losses(dir.path()).len() < 120, "{signal}: ended before it was cut short");
        // A save that was cut short may leave its temporary file, and nothing else.
        let resumed = train(dir.path(), &format!("{more} --resume"));
        assert_eq!(losses(dir.path()), losses(whole.path()), "{signal}");
        assert_eq!(adapter(dir.path()), adapter(whole.path()), "{signal}");
        assert_eq!(resumed["balanced"], true);
        assert_eq!(resumed["training"]["losses"], run["training"]["losses"]);
        // All that the second process adds is its rotary tables.
        let setup = |run: &Value| {
            let rows = run["rows"].as_array().unwrap();
            rows.iter().find(|r| r["phase"] == "setup").unwrap()["calls"].as_u64().unwrap()
        };
        assert_eq!(setup(&resumed), setup(&run) + 1);
    }
}

/// Files of this process and its children cannot grow past `blocks` of 512 bytes: a full disk, to
/// those who write.
#[cfg(unix)]
fn with_little_space(dir: &Path, line: &str, blocks: u32) -> std::process::Output {
    Command::new("sh")
        .args(["-c", &format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$0\" \"$@\"")])
        .arg(assert_cmd::cargo::cargo_bin("flopaudit"))
        .args(line.split_whitespace())
        .current_dir(dir)
        .output()
        .unwrap()
}

#[cfg(unix)]
#[test]
fn a_full_disk_loses_nothing_already_saved() {
    let more = "--steps 60 --lr 0.02 --save-every 1 --check-gradients 0";
    let whole = tmp();
    train(whole.path(), more);
    let dir = tmp();
    cut_short(dir.path(), &line(more), "-KILL");
    let out = dir.path().join("out");
    let checkpoint = || fs::read(out.join("checkpoint.safetensors")).unwrap();
    let files = || fs::read_dir(&out).unwrap().count();
    let before = (checkpoint(), files());

    let full = with_little_space(dir.path(), &line(&format!("{more} --resume")), 32);
    let stderr = String::from_utf8(full.stderr).unwrap();
    assert_eq!(full.status.code(), Some(2), "{stderr}");
    let errors: Vec<&str> = stderr.lines().filter(|l| l.starts_with("error: ")).collect();
    assert!(
        matches!(errors[..], [one] if one.contains("out/checkpoint.safetensors: ")),
        "{stderr}"
    );
    assert!((checkpoint(), files()) == before, "the checkpoint changed, or a file stays behind");

    train(dir.path(), &format!("{more} --resume"));
    assert_eq!(losses(dir.path()), losses(whole.path()));
}

#[test]
fn a_budget_is_spent_and_never_passed() {
    let held_out = example("alice-eval.txt");
    for (structure, prices) in
        [("exact", "unit"), ("exact", "matmul"), ("notebook", "coursework"), ("6nd", "matmul")]
    {
        for accumulate in [1, 3] {
            let dir = tmp();
            let run = train(
                dir.path(),
                &format!(
                    "--budget 5e9 --accumulate {accumulate} --structure {structure} \
                     --prices {prices} --eval-data {held_out} --eval-every 7"
                ),
            );
            let budget = &run["training"]["budget"];
            let number = |key: &str| budget[key].as_u64().unwrap();
            assert!(number("spent") <= 5_000_000_000, "{structure} {prices}: {budget}");
            // One more step needs its own evaluation where the last one was due.
            let more = number("next_step") + number("evaluation");
            assert!(number("spent") + more > 5_000_000_000, "{structure} {prices}: {budget}");
            assert_eq!(budget["structure"], structure);
            if structure == "exact" {
                assert_eq!(run["executed_flops"], budget["spent"]);
            }
            assert_eq!(run["training"]["steps"], run["training"]["planned_steps"]);
        }
    }
    let dir = tmp();
    let poor = flopaudit(dir.path(), &line("--budget 1e6")).assert().code(1);
    let stderr = String::from_utf8(poor.get_output().stderr.clone()).unwrap();
    assert!(stderr.contains("over budget: `the first step"), "{stderr}");
}

#[test]
fn what_cannot_be_trained_is_one_line() {
    let dir = tmp();
    let write = |name: &str, bytes: &[u8]| fs::write(dir.path().join(name), bytes).unwrap();
    write("empty.txt", b"");
    write("latin.txt", b"caf\xe9 au lait");
    write("broken.jsonl", b"{\"text\": \"one\"}\n{\"text\": \n");
    write("chat.jsonl", b"{\"messages\": [{\"role\": \"user\", \"content\": \"hi\"}]}\n");
    let with = |data: &str, more: &str| {
        format!("train --preset tiny --data {data} --seq 8 --steps 2 --out out {more}")
    };
    let text = text();
    for (line, parts) in [
        (with("empty.txt", ""), vec!["empty.txt: is empty"]),
        (with("missing.txt", ""), vec!["missing.txt"]),
        (with("latin.txt", ""), vec!["latin.txt: line 1: is not UTF-8"]),
        (with("broken.jsonl", ""), vec!["broken.jsonl: line 2: not valid JSON"]),
        (with("chat.jsonl", ""), vec!["chat.jsonl: line 1", "no chat template"]),
        (with(&text, "--mask-prompt"), vec!["--mask-prompt", "only conversations"]),
        (with(&text, "--lora-rank 33"), vec!["--lora-rank", "33 is above"]),
        (with(&text, "--lora-targets q_proj,x_proj"), vec!["x_proj"]),
        (with(&text, "--lr 0"), vec!["--lr"]),
        (with(&text, "--lr nan"), vec!["--lr"]),
        (with(&text, "--clip -1"), vec!["--clip"]),
        (with(&text, "--budget 0"), vec!["--budget"]),
        (with(&text, "--epochs 0"), vec!["--epochs"]),
        (with(&text, "--resume"), vec!["holds no checkpoint"]),
        (with(&text, "--seq 100000"), vec!["--seq"]),
        (with(&text, "--batch 0"), vec!["--batch"]),
    ] {
        let line = match line.contains("--epochs") {
            true => line.replace("--steps 2", ""),
            false => line,
        };
        let line = match line.matches("--seq").count() {
            2 => line.replace("--seq 8", ""),
            _ => line,
        };
        refused(dir.path(), &line, &parts);
    }
    refused(dir.path(), &format!("train --preset tiny --data {text} --out out"), &["--steps"]);
    refused(dir.path(), &with(&text, "").replace("--out out", "--out empty.txt"), &["empty.txt"]);
    refused(dir.path(), "eval --preset tiny --data empty.txt", &["empty.txt"]);
    assert!(!dir.path().join("out/checkpoint.safetensors").exists());
}

#[test]
fn a_diverging_run_loses_nothing_already_saved() {
    let dir = tmp();
    let more =
        "--steps 40 --full --lr 1e30 --weight-decay 0 --clip 0 --save-every 1 --check-gradients 0";
    refused(dir.path(), &line(more), &["training diverged", "lower --lr"]);
    let saved = fs::metadata(dir.path().join("out/checkpoint.safetensors")).unwrap();
    assert!(saved.len() > 0);
    assert!(!losses(dir.path()).is_empty());
}

#[test]
fn a_run_is_neither_overwritten_nor_mixed_with_another() {
    let dir = tmp();
    train(dir.path(), "--steps 2");
    let before = fs::read(dir.path().join("out/checkpoint.safetensors")).unwrap();
    refused(dir.path(), &line("--steps 2"), &["holds a run", "--resume"]);
    let other = line("--steps 2 --lr 0.5 --resume");
    refused(dir.path(), &other, &["schedule.peak", "0.0002", "0.5"]);
    let cut: PathBuf = dir.path().join("out/checkpoint.safetensors");
    fs::write(&cut, &before[..before.len() / 2]).unwrap();
    refused(dir.path(), &line("--steps 2 --resume"), &["checkpoint.safetensors", "cannot be read"]);
    fs::write(&cut, &before).unwrap();
    // Nothing is left to do, and the account is the same.
    let first = read(&dir.path().join("out/run.json"));
    let again = train(dir.path(), "--steps 2 --resume");
    assert_eq!(again["total_flops"], first["total_flops"]);
}
