//! `train` and `eval` as a user meets them, on tiny models.

mod checkpoints;
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
fn adapters_have_ranks_and_layers_of_their_own() {
    let (dir, held_out) = (tmp(), example("alice-eval.txt"));
    let lora = "--lora-rank 4 --lora-targets all-linear --lora-layers 1-2 \
                --lora-rank-pattern q_proj=8,layers.2.mlp.up_proj=2 --lora-alpha-pattern v_proj=3";
    let run = train(
        dir.path(),
        &format!("--steps 3 --lr 0.01 {lora} --recompute --eval-data {held_out}"),
    );
    assert_eq!(run["balanced"], true);
    assert_eq!(run["training"]["with_gradient"], 28, "seven adapters in two layers");
    assert_eq!(run["training"]["check_passed"], true, "{}", run["training"]["check"]);
    let config = read(&dir.path().join("out/adapter_config.json"));
    assert_eq!(config["layers_to_transform"], serde_json::json!([1, 2]));
    assert_eq!(config["rank_pattern"], serde_json::json!({"layers.2.mlp.up_proj": 2, "q_proj": 8}));
    assert_eq!(config["alpha_pattern"], serde_json::json!({"v_proj": 3.0}));
    let out = dir.path().join("out");
    let eval = format!(
        "eval --preset tiny --data {held_out} --seq 32 --batch 2 --adapter {} --json",
        out.display()
    );
    let (eval, evaluations) = (program::json(&eval), &run["training"]["evaluations"]);
    let [loss, trained] =
        [&eval["evaluation"]["loss"], &evaluations[1]["loss"]].map(|l| l.as_f64().unwrap());
    assert!((loss - trained).abs() < 1e-9, "{loss} is not {trained}");
    let other = lora.replace("q_proj=8", "q_proj=6");
    let again =
        line(&format!("--steps 3 --lr 0.01 {other} --recompute --eval-data {held_out} --resume"));
    refused(dir.path(), &again, &["--lora-rank-pattern 8, this command asks for 6"]);
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
    for signal in ["-INT", "-TERM", "-KILL"] {
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

#[test]
fn moments_in_bf16_go_on_to_the_same_bits() {
    let more = "--steps 40 --accumulate 2 --lr 0.02 --save-every 1 --moments bf16 --seed 4";
    let whole = tmp();
    let run = train(whole.path(), more);
    assert_eq!(run["balanced"], true);
    let workloads = run["workload"].as_array().unwrap();
    assert!(workloads.iter().any(|workload| workload["moments"] == "bf16"), "{workloads:?}");
    let dir = tmp();
    cut_short(dir.path(), &line(more), "-KILL");
    refused(
        dir.path(),
        &line(&more.replace("--moments bf16", "--resume")),
        &["--moments \"bf16\", this command asks for \"f32\""],
    );
    let resumed = train(dir.path(), &format!("{more} --resume"));
    assert_eq!(resumed["balanced"], true);
    for file in ["metrics.jsonl", "adapter_model.safetensors"] {
        let of = |dir: &Path| match file {
            "metrics.jsonl" => format!("{:?}", losses(dir)).into_bytes(),
            file => fs::read(dir.join("out").join(file)).unwrap(),
        };
        assert!(of(dir.path()) == of(whole.path()), "{file}");
    }
    let wide = tmp();
    train(wide.path(), &more.replace("--moments bf16", "--moments f32"));
    let (narrow, wide) = (losses(whole.path()), losses(wide.path()));
    assert_eq!(narrow[0], wide[0]);
    assert_ne!(narrow, wide);
    for ((step, narrow), (_, wide)) in narrow.iter().zip(&wide) {
        assert!((narrow - wide).abs() < 0.05 * wide, "step {step}: {narrow} and {wide}");
    }
}

/// Runs `line` where files cannot grow past 32 blocks. With `told`, to write more is an error, as on
/// a full disk; else the process is killed in the middle of it.
#[cfg(unix)]
fn with_little_space(dir: &Path, line: &str, told: bool) -> std::process::Output {
    let trap = if told { "trap '' XFSZ;" } else { "" };
    Command::new("sh")
        .args(["-c", &format!("{trap} ulimit -c 0; ulimit -f 32; exec \"$0\" \"$@\"")])
        .arg(assert_cmd::cargo::cargo_bin("flopaudit"))
        .args(line.split_whitespace())
        .current_dir(dir)
        .output()
        .unwrap()
}

#[cfg(unix)]
#[test]
fn neither_a_full_disk_nor_death_while_saving_loses_what_is_saved() {
    let more = "--steps 60 --lr 0.02 --save-every 1 --check-gradients 0";
    let whole = tmp();
    train(whole.path(), more);
    let dir = tmp();
    cut_short(dir.path(), &line(more), "-KILL");
    let out = dir.path().join("out");
    let checkpoint = || fs::read(out.join("checkpoint.safetensors")).unwrap();
    let temporary = || {
        let names = fs::read_dir(&out).unwrap().map(|file| file.unwrap().file_name());
        names.filter(|name| name.to_string_lossy().starts_with(".tmp")).count()
    };
    let before = checkpoint();

    let resumed = line(&format!("{more} --resume"));
    let full = with_little_space(dir.path(), &resumed, true);
    let stderr = String::from_utf8(full.stderr).unwrap();
    assert_eq!(full.status.code(), Some(2), "{stderr}");
    let errors: Vec<&str> = stderr.lines().filter(|l| l.starts_with("error: ")).collect();
    assert!(
        matches!(errors[..], [one] if one.contains("out/checkpoint.safetensors: ")),
        "{stderr}"
    );
    assert!(checkpoint() == before, "the checkpoint changed");
    assert_eq!(temporary(), 0, "a file in the making stays behind");

    let killed = with_little_space(dir.path(), &resumed, false);
    assert_eq!(killed.status.code(), None, "a signal ends it");
    assert!(checkpoint() == before && temporary() > 0, "it did not end while saving");

    train(dir.path(), &format!("{more} --resume"));
    assert_eq!(losses(dir.path()), losses(whole.path()));
    assert_eq!(temporary(), 0, "swept");
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
            // The evaluation after the last step would come after one more, unless it was due.
            let due = run["training"]["steps"].as_u64().unwrap().is_multiple_of(7);
            let more = number("next_step") + if due { number("evaluation") } else { 0 };
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
        (with(&text, "--lora-layers 0,3"), vec!["--lora-layers", "no layer 3"]),
        (with(&text, "--lora-layers 2-1"), vec!["--lora-layers", "`2-1`"]),
        (with(&text, "--lora-rank-pattern k_proj=2"), vec!["--lora-rank-pattern", "k_proj"]),
        (with(&text, "--lora-rank-pattern q_proj"), vec!["--lora-rank-pattern", "NAME=VALUE"]),
        (with(&text, "--lora-rank-pattern q_proj=1,q_proj=2"), vec!["q_proj stands twice"]),
        (with(&text, "--lora-rank-pattern q_proj=99"), vec!["99 is above 32"]),
        (with(&text, "--lora-layers 0 --adapter x"), vec!["--lora-layers", "--adapter"]),
        (with(&text, "--lr 0"), vec!["--lr"]),
        (with(&text, "--lr nan"), vec!["--lr"]),
        (with(&text, "--clip -1"), vec!["--clip"]),
        (with(&text, "--budget 0"), vec!["--budget"]),
        (with(&text, "--epochs 0"), vec!["--epochs"]),
        (with(&text, "--resume"), vec!["holds no checkpoint"]),
        (with(&text, "--seq 100000"), vec!["--seq"]),
        (with(&text, "--batch 0"), vec!["--batch"]),
        (with(&text, "--lora-rank 0"), vec!["--lora-rank", "nothing to train"]),
        (with(&text, "--full --lora-rank 2"), vec!["--full", "adapters"]),
        (with(&text, "--accumulate 4294967295"), vec!["out of memory", "a step's tokens"]),
        (with(&text, "--dtype bf16 --check-gradients 2"), vec!["--check-gradients", "f32"]),
        (with(&text, "--token-cache empty.txt"), vec!["--token-cache: empty.txt"]),
        (with(&text, "--lr 1e10"), vec!["--weight-decay, --lr", "0.01"]),
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
    let to_file = with(&text, "").replace("--out out", "--out empty.txt");
    refused(dir.path(), &to_file, &["empty.txt: is a file"]);
    refused(dir.path(), "eval --preset tiny --data empty.txt", &["empty.txt"]);
    assert!(!dir.path().join("out").exists(), "a folder for nothing");
}

#[test]
fn what_is_not_the_runs_own_is_not_overwritten() {
    for name in ["model.safetensors", "config.json", "adapter_model.safetensors", "run.json"] {
        let dir = tmp();
        let file = dir.path().join("out").join(name);
        fs::create_dir(dir.path().join("out")).unwrap();
        fs::write(&file, "theirs").unwrap();
        for more in ["--steps 2", "--steps 2 --full"] {
            refused(dir.path(), &line(more), &[name, "is there already"]);
        }
        assert_eq!(fs::read_to_string(file).unwrap(), "theirs");
    }
}

#[test]
fn gradients_of_nothing_are_not_checked() {
    // At the only step B is zero, and A has no gradient; scaled by zero, neither has.
    for (more, slopes) in [("--steps 1", 2), ("--steps 3 --lora-alpha 0", 0)] {
        let dir = tmp();
        let run = train(dir.path(), &format!("{more} --lora-rank 4"));
        let check = &run["training"]["check"]["slopes"];
        assert_eq!(check.as_array().map_or(0, Vec::len), slopes, "{more}: {check}");
        assert_eq!(run["training"]["check_passed"].as_bool(), (slopes > 0).then_some(true));
        assert_eq!(run["balanced"], true);
        let again = train(dir.path(), &format!("{more} --lora-rank 4 --resume"));
        assert_eq!(again["training"]["losses"], run["training"]["losses"]);
    }
}

#[test]
fn a_fully_trained_model_scores_as_it_was_trained() {
    let dir = tmp();
    let held_out = example("alice-eval.txt");
    let base =
        checkpoints::directory(&checkpoints::tiny(), &checkpoints::tensors(&checkpoints::tiny()));
    let full = line(&format!("--steps 4 --full --lr 0.01 --eval-data {held_out}"))
        .replace("--preset tiny", &format!("--model {}", base.path().display()));
    flopaudit(dir.path(), &full).assert().success();
    let run = read(&dir.path().join("out/run.json"));
    let trained = run["training"]["evaluations"].as_array().unwrap().last().unwrap().clone();
    let eval = format!("eval --model out --data {held_out} --seq 32 --batch 2 --json");
    let eval = flopaudit(dir.path(), &eval).assert().success();
    let eval: Value = serde_json::from_slice(&eval.get_output().stdout).unwrap();
    let (loss, trained) = (&eval["evaluation"]["loss"], &trained["loss"]);
    assert!((loss.as_f64().unwrap() - trained.as_f64().unwrap()).abs() < 1e-9, "{loss} {trained}");
}

#[test]
fn an_adapter_is_trained_further_and_epochs_end() {
    let dir = tmp();
    train(dir.path(), "--steps 3 --lora-rank 2 --lr 0.01");
    let more = line("--epochs 0.5 --adapter out --token-cache tokens --seed 5")
        .replace("--out out", "--out further");
    for _ in 0..2 {
        flopaudit(dir.path(), &more).assert().success();
        let run = read(&dir.path().join("further/run.json"));
        let (first, last) =
            (&run["training"]["losses"][0]["loss"], run["training"]["steps"].as_u64());
        let rows = fs::read_to_string(text()).unwrap().len().div_ceil(32) as u64;
        assert_eq!(last, Some(rows.div_ceil(2).div_ceil(2)), "half the rows, two a step");
        assert!(first.as_f64().unwrap() < 6.0);
        fs::remove_dir_all(dir.path().join("further")).unwrap();
    }
    assert_eq!(fs::read_dir(dir.path().join("tokens")).unwrap().count(), 1, "tokenized once");
}

#[test]
fn a_diverging_run_loses_nothing_already_saved() {
    let dir = tmp();
    let more = "--steps 40 --full --lr 1e30 --weight-decay 0 --clip 0 --save-every 1";
    refused(dir.path(), &line(more), &["training diverged", "lower --lr", "out holds step 1"]);
    assert_eq!(losses(dir.path()).len(), 1);
    // It can be gone on with, to the same end.
    let again = line(&format!("{more} --resume"));
    refused(dir.path(), &again, &["training diverged", "out holds step 1"]);
}

#[test]
fn a_run_is_neither_overwritten_nor_mixed_with_another() {
    let dir = tmp();
    train(dir.path(), "--steps 2");
    let before = fs::read(dir.path().join("out/checkpoint.safetensors")).unwrap();
    refused(dir.path(), &line("--steps 2"), &["holds a run", "--resume"]);
    let other = line("--steps 2 --lr 0.5 --resume");
    refused(dir.path(), &other, &["--lr 0.0002", "0.5"]);
    // What depends on another flag is not blamed.
    refused(dir.path(), &line("--steps 2 --dtype bf16 --resume"), &["--dtype \"f32\"", "\"bf16\""]);
    let other = line("--steps 2 --resume").replace(&text(), &example("alice-eval.txt"));
    refused(dir.path(), &other, &["other rows of --data"]);
    let other = line("--steps 2 --resume").replace("--preset tiny", "--model synthetic:tiny:1");
    refused(dir.path(), &other, &["another --model or --adapter"]);
    // The same model by another name is the same.
    let same = line("--steps 2 --resume").replace("--preset tiny", "--model synthetic:tiny:0");
    flopaudit(dir.path(), &same).assert().success();
    let cut: PathBuf = dir.path().join("out/checkpoint.safetensors");
    fs::write(&cut, &before[..before.len() / 2]).unwrap();
    refused(dir.path(), &line("--steps 2 --resume"), &["checkpoint.safetensors", "cannot be read"]);
    fs::write(&cut, &before).unwrap();
    // Nothing is left to do, and the account is the same.
    let first = read(&dir.path().join("out/run.json"));
    let again = train(dir.path(), "--steps 2 --resume");
    assert_eq!(again["total_flops"], first["total_flops"]);
}

#[test]
fn steps_of_many_lengths_have_a_mean_and_all_padding_is_told() {
    let dir = tmp();
    let records: String = ["a", "a few words", "some more words than that", "b", "and a last one"]
        .map(|text| format!("{{\"prompt\":\"{text}\",\"completion\":\" {text} {text}\"}}\n"))
        .concat();
    fs::write(dir.path().join("d.jsonl"), records).unwrap();
    let line = "train --preset tiny --data d.jsonl --eval-data d.jsonl --seq 128 --batch 2 --steps 4 \
                --check-gradients 1 --out out --exact";
    let out = flopaudit(dir.path(), line).assert().success().get_output().stdout.clone();
    let text = String::from_utf8(out).unwrap();
    let run = read(&dir.path().join("out/run.json"));
    let (training, tokens) = (&run["training"], &run["tokens"]);
    let number = |value: &Value, key: &str| value[key].as_u64().unwrap();
    let budget = &training["budget"];
    // All that was spent: steps, two evaluations, the check, and one rotary table.
    let [steps, spent] = ["steps", "spent"].map(|key| number(budget, key));
    assert!(steps + 2 * number(budget, "evaluation") < spent);
    assert!(steps > spent / 4, "{budget}");
    let mean = digits(steps / 4);
    assert!(text.contains(&format!("{mean} FLOP a step on average")), "{text}");
    // Padding of steps alone, and of evaluations and checks too.
    assert!(number(tokens, "padding") > number(&training["tokens"], "padding"), "{tokens}");
    assert!(number(tokens, "padding_flops") > number(&training["tokens"], "padding_flops"));
    assert_eq!(number(tokens, "fed"), number(tokens, "real") + number(tokens, "padding"));
    assert!(text.contains("evaluations and checks included"), "{text}");
    let labelled = |label| text.lines().filter(|line| line.starts_with(label)).count();
    assert_eq!((labelled("tokens "), labelled("steps ")), (1, 1), "{text}");

    let what = format!("{line} --check-gradients {}", u64::MAX).replace("--check-gradients 1 ", "");
    refused(dir.path(), &what.replace("--out out", "--out other"), &["--check-gradients: above"]);
    let many = line.replace("--steps 4", &format!("--steps {} --accumulate 2", u64::MAX));
    refused(
        dir.path(),
        &many.replace("--out out", "--out other"),
        &["--steps: --steps × --accumulate is above"],
    );
}

fn digits(n: u64) -> String {
    flopaudit::report::digits(n.into())
}
