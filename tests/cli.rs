//! The command line as a user meets it.

mod program;

use predicates::prelude::*;
use predicates::str::contains;
use program::*;
use serde_json::Value;

#[test]
fn help_lists_the_commands() {
    insta::assert_snapshot!(stdout("--help"));
}

#[test]
fn count_forward_prints_a_table() {
    insta::assert_snapshot!(stdout(
        "count forward --preset qwen2.5-0.5b --seq 512 --lora-rank 8 --prices coursework"
    ));
}

#[test]
fn count_generate_prints_phases() {
    insta::assert_snapshot!(stdout(
        "count generate --preset tiny --prompt-tokens 8 --new-tokens 4 --temperature 0.7 --top-k 40 --top-p 0.9"
    ));
}

#[test]
fn audit_prints_its_verdict() {
    let line = "audit forward --preset tiny --seq 5 --batch 2 --past 3 --lora-rank 2";
    insta::assert_snapshot!(stdout(line));
}

#[test]
fn tables_are_for_people_and_exact_on_request() {
    for (line, figure, digits, total) in [
        (
            "count forward --preset qwen2.5-0.5b --seq 512 --prices coursework",
            "107.0 G",
            "107,045,978,112",
            "530,217,687,264 FLOPs",
        ),
        ("audit forward --preset tiny --seq 5 --lora-rank 2", "30.24 k", "30,240", "balances"),
        ("count forward --preset tiny --sweep seq=64,128", "6.113 M", "6,113,172", ""),
        (
            "reconcile --from 6nd --to torch --prices matmul train --preset tiny --batch 2 --seq 8 --lora-rank 2",
            "-1.065 M",
            "-1,064,960",
            "2,264,064 - 3,234,816 = -970,752 FLOPs",
        ),
    ] {
        let (human, exact) = (stdout(line), stdout(&format!("{line} --exact")));
        assert!(human.contains(figure) && !human.contains(digits), "{human}");
        assert!(exact.contains(digits) && !exact.contains(figure), "{exact}");
        assert!(human.contains(total) && exact.contains(total), "{human}{exact}");
    }
}

#[test]
fn tables_fit_a_terminal() {
    for line in [
        "count forward --preset qwen2.5-0.5b --seq 512 --lora-rank 8",
        "count train --preset qwen2.5-0.5b --seq 512 --lora-rank 8",
        "count generate --preset qwen2.5-72b --prompt-tokens 100000 --new-tokens 1000 --temperature 0.7",
        "audit forward --preset tiny --seq 5 --lora-rank 2 --op-times",
        "audit train --preset tiny --seq 5 --lora-rank 2",
        "reconcile --from 6nd --to torch --prices matmul train --preset tiny --batch 2 --seq 8 --lora-rank 2",
        "count forward --sweep preset=qwen2.5-0.5b,qwen2.5-72b --sweep seq=64,4096 --lora-rank 8",
    ] {
        let text = stdout(line);
        // The verdict has every digit.
        let widest =
            text.lines().filter(|l| !l.starts_with("the audit")).max_by_key(|l| l.len()).unwrap();
        assert!(widest.len() <= 80, "{line}: {widest}");
    }
}

#[test]
fn counts_are_exact_integers() {
    let count = json("count forward --preset qwen2.5-0.5b --seq 512 --prices matmul --json");
    assert_eq!(count["schema_version"], 1);
    assert_eq!(count["total_flops"], 528_364_863_488u64);
    assert_eq!(count["lora_flops"], 0);
    assert_eq!(count["workload"]["kind"], "forward");
    let rows = count["rows"].as_array().unwrap();
    let sum: u64 = rows.iter().map(|r| r["flops"].as_u64().unwrap()).sum();
    assert_eq!(sum, 528_364_863_488);
    for name in ["add", "mul", "div", "exp", "log", "sqrt", "trig", "cmp", "neg"] {
        assert!(count["primitives"][name].as_u64().is_some(), "{name}");
    }
    // A million tokens without a cache: past 64 bits, still an exact integer.
    let long = stdout(
        "count generate --preset qwen2.5-72b --prompt-tokens 1000 --new-tokens 1000000 --no-kv-cache --json",
    );
    let total = long.lines().find(|l| l.contains("\"total_flops\"")).unwrap();
    let digits: String = total.chars().filter(char::is_ascii_digit).collect();
    assert!(digits.len() > 22, "{total}");
}

#[test]
fn audits_carry_all_three_countings() {
    for what in [
        "forward --seq 4",
        "forward --seq 1 --past 6 --batch 3 --logits last --dtype bf16",
        "generate --prompt-tokens 5 --new-tokens 4 --lora-rank 3 --lora-targets o_proj,down_proj",
        "generate --prompt-tokens 5 --new-tokens 4 --no-kv-cache --temperature 0.9 --dtype f16",
    ] {
        let audit = json(&format!("audit {what} --preset tiny --json"));
        assert_eq!(audit["balanced"], true, "{what}");
        let executed = audit["executed_flops"].as_u64().unwrap();
        assert!(executed > 0);
        for side in ["closed_form_flops", "predicted_flops", "total_flops"] {
            assert_eq!(audit[side], executed, "{what}: {side}");
        }
        assert!(audit["keys_compared"].as_u64().unwrap() > 30);
        assert_eq!(audit["differences"], Value::Array(vec![]));
        // What ran is what `count` says without running.
        let count =
            json(&format!("count {} --preset tiny --json", what.replace("--dtype f16", "")));
        assert_eq!(count["total_flops"], executed, "{what}");
    }
}

#[test]
fn generate_reports_text_tokens_and_times() {
    let dir = tmp();
    let line =
        "generate --model synthetic:tiny:3 --max-new-tokens 6 --ignore-eos --json run.json Hello";
    let assert = flopaudit(dir.path(), line).assert().success();
    assert.stdout(contains("the audit balances")).stderr(contains("synthetic weights"));
    let run: Value =
        serde_json::from_slice(&std::fs::read(dir.path().join("run.json")).unwrap()).unwrap();
    assert_eq!(run["token_ids"].as_array().unwrap().len(), 6);
    assert_eq!(run["balanced"], true);
    assert_eq!(run["workload"]["prompt_tokens"], 5);
    assert!(run["timings"]["time_to_first_token_s"].as_f64().unwrap() > 0.0);
    assert!(run["timings"]["decode_flops_per_s"].as_f64().unwrap() > 0.0);
    assert!(run["bytes_per_decoded_token"]["weights"].as_u64().unwrap() > 0);
    // Without a file, stdout holds the JSON and nothing else; the same seed gives the same tokens.
    let again =
        json("generate Hello --model synthetic:tiny:3 --max-new-tokens 6 --ignore-eos --json");
    assert_eq!(again["token_ids"], run["token_ids"]);
    let sampled = |seed| {
        json(&format!(
            "generate Hello --model synthetic:tiny:3 --new-tokens 16 --ignore-eos --temperature 5 --seed {seed} --json"
        ))["token_ids"]
            .clone()
    };
    assert_eq!(sampled(1), sampled(1));
    assert_ne!(sampled(1), sampled(2));
}

#[test]
fn quiet_prints_the_text_alone() {
    let text = stdout("generate Hello --preset tiny --max-new-tokens 4 --ignore-eos --quiet");
    assert_eq!(text.lines().count(), 1, "{text}");
    let unaudited = json("generate Hello --preset tiny --max-new-tokens 4 --no-audit --json");
    assert!(unaudited.get("balanced").is_none());
}

#[test]
fn prompts_of_a_file_run_as_one_batch_without_padding() {
    let dir = tmp();
    std::fs::write(dir.path().join("prompts.txt"), "abcd\nxy\n\nefgh\n").unwrap();
    let line = "generate --prompts prompts.txt --preset tiny --max-new-tokens 3 --ignore-eos --op-times --json out.json";
    flopaudit(dir.path(), line).assert().success().stdout(contains("[3]"));
    let run: Value =
        serde_json::from_slice(&std::fs::read(dir.path().join("out.json")).unwrap()).unwrap();
    let prompt_lengths: Vec<_> = run["sequences"]
        .as_array()
        .unwrap()
        .iter()
        .map(|s| s["prompt_tokens"].as_u64().unwrap())
        .collect();
    assert_eq!(prompt_lengths, [4, 2, 4]);
    let workload = &run["workload"];
    assert_eq!(workload["batch"], 3);
    assert_eq!(workload["prompts"], serde_json::json!({"packed": [[2, 1], [4, 2]]}));
    assert_eq!(run["balanced"], true);
    assert!(run["rows"][1]["seconds"].as_f64().is_some());
}

#[test]
fn user_prices_are_applied() {
    let dir = tmp();
    std::fs::write(dir.path().join("mine.toml"), "# mine\nexp = 7\nmac = 3\n").unwrap();
    let line = "count forward --preset tiny --seq 4 --prices mine.toml --json -";
    let out = flopaudit(dir.path(), line).assert().success().get_output().stdout.clone();
    let count: Value = serde_json::from_slice(&out).unwrap();
    let macs = {
        let all = json("count forward --preset tiny --seq 4 --prices matmul --json");
        all["total_flops"].as_u64().unwrap() / 2
    };
    let exps = count["primitives"]["exp"].as_u64().unwrap();
    // The table of rotary angles has exps of its own, among the primitives too.
    assert_eq!(count["total_flops"], 3 * macs + 7 * exps);
    assert_eq!(count["prices"]["name"], "mine");
}

#[test]
fn padding_is_seen_where_lengths_are_padded() {
    let dir = tmp();
    std::fs::write(dir.path().join("r4.txt"), "10\n3\n7\n5\n").unwrap();
    let json = |line: &str| -> Value {
        let out = flopaudit(dir.path(), line).assert().success().get_output().stdout.clone();
        serde_json::from_slice(&out).unwrap()
    };
    for (kind, padded, real, tokens) in [
        ("forward", 2_816_000, 1_734_272, [40, 25]),
        ("generate --new-tokens 3", 2_646_528, 1_860_480, [48, 33]),
    ] {
        let work = format!("{kind} --preset tiny --lengths r4.txt --prices matmul --json");
        let line = format!("reconcile --from exact --to exact:unpadded {work} --layout padded");
        let way = json(&line);
        assert_eq!(way["from"]["total_flops"], padded, "{kind}");
        assert_eq!(way["to"]["total_flops"], real, "{kind}");
        assert_eq!(json(&format!("count {work} --packing"))["total_flops"], real, "{kind}");
        let count = json(&format!("count {work} --layout padded"));
        let [fed, kept] = tokens;
        let account = serde_json::json!({
            "fed": fed, "real": kept, "padding": fed - kept, "padding_flops": padded - real,
        });
        assert_eq!(count["tokens"], account, "{kind}");
    }
}

#[test]
fn flags_that_would_change_nothing_are_refused() {
    let dir = tmp();
    std::fs::write(dir.path().join("r4.txt"), "10\n3\n7\n5\n").unwrap();
    std::fs::write(dir.path().join("d.txt"), "some text").unwrap();
    for (line, flag) in [
        ("generate --lengths r4.txt --prompt-tokens 99", "--prompt-tokens"),
        ("generate --lengths r4.txt --batch 3", "--batch"),
        ("forward --lengths r4.txt --seq 5", "--seq"),
        ("forward --lengths r4.txt --batch 2", "--batch"),
        ("eval --lengths r4.txt --passes 3", "--passes"),
        ("eval --data d.txt --passes 3", "--passes"),
        ("train --full --seed 3", "--data"),
        ("train --full --lengths r4.txt --template x", "--template"),
        ("eval --template x", "--template"),
        ("eval --packing", "--layout"),
        ("forward --data d.txt", "--data"),
    ] {
        refused(dir.path(), &format!("count {line} --preset tiny"), &[flag]);
    }
}

#[test]
fn help_offers_what_works() {
    let help = |kind: &str| stdout(&format!("count {kind} --help"));
    for (kind, lengths, data) in
        [("verify", false, false), ("forward", true, false), ("train", true, true)]
    {
        let help = help(kind);
        assert_eq!(["--lengths ", "--packing"].map(|flag| help.contains(flag)), [lengths; 2]);
        assert_eq!(
            ["--data ", "--mask-prompt", "--template "].map(|f| help.contains(f)),
            [data; 3]
        );
    }
    // Of an audit, --seed is that of its random tokens.
    assert!(stdout("audit verify --help").contains("--seed"));
}

#[test]
fn bad_input_is_one_clear_line() {
    let dir = tmp();
    let path = dir.path();
    let write = |name: &str, text: &str| std::fs::write(path.join(name), text).unwrap();
    refused(path, "generate hi", &["scripts/fetch-weights.sh", "--model", "synthetic"]);
    refused(path, "generate hi --model ./nowhere", &["./nowhere", "no such file"]);
    refused(path, "generate hi --model no/such.gguf", &["no/such.gguf"]);
    refused(path, "count forward --preset qwen9", &["--preset", "qwen9", "qwen2.5-0.5b"]);
    refused(path, "count forward --preset tiny --seq 0", &["--seq", "at least 1"]);
    refused(path, "count generate --preset tiny --new-tokens 0", &["--new-tokens"]);
    refused(path, "count forward --preset tiny --batch 99999999999999", &["--batch"]);
    refused(path, "count forward --preset tiny --seq 18446744073709551615 --past 9", &["--seq"]);
    let above = u64::MAX;
    for (line, flag) in [
        ("forward --past", "--past"),
        ("generate --prompt-tokens", "--prompt-tokens"),
        ("generate --new-tokens", "--new-tokens"),
        ("verify --rounds", "--rounds"),
        ("verify --drafted", "--drafted"),
        ("eval --seq", "--seq"),
    ] {
        refused(path, &format!("count {line} {above} --preset tiny"), &[&format!("error: {flag}")]);
    }
    write("long-lengths.txt", "18446744073709551615\n3\n");
    refused(
        path,
        "count forward --preset tiny --lengths long-lengths.txt",
        &["error: --lengths", "68719476736"],
    );
    refused(
        path,
        "count forward --seq 18446744073709551616",
        &["--seq", "above 18446744073709551615"],
    );
    refused(path, "count forward --seq -1", &["--seq", "`-1`", "no whole number"]);
    refused(path, "reconcile", &["verify"]);
    refused(
        path,
        "count train --full --threshold eu --base-compute NaN",
        &["--base-compute", "no number with its unit"],
    );
    refused(path, "count forward --preset tiny --lora-rank 33", &["--lora-rank", "33"]);
    refused(path, "count generate --preset tiny --temperature -1", &["temperature"]);
    refused(path, "count generate --preset tiny --top-k 4", &["--temperature"]);
    refused(path, "count forward --preset tiny --prices dear", &["--prices", "dear", "coursework"]);
    refused(path, "count forward --preset tiny --json no/such/dir/x.json", &["no/such/dir/x.json"]);
    refused(path, "audit forward --preset tiny --device cuda:x", &["--device", "x"]);
    refused(path, "audit forward --preset tiny --device tpu", &["--device", "tpu"]);
    refused(
        path,
        "generate hi --preset tiny --max-new-tokens 40000",
        &["32768", "--max-new-tokens"],
    );
    refused(path, "generate hi --preset tiny --adapter nowhere", &["nowhere"]);
    write("long.txt", &"a".repeat(40_000));
    refused(path, "generate --prompts long.txt --preset tiny", &["40000 tokens", "32768"]);
    write("empty.txt", "\n\n");
    refused(
        path,
        "generate --prompts empty.txt --preset tiny",
        &["--prompts", "empty.txt", "is empty"],
    );
    write("bad.toml", "add = 1\nmul = 1\nsine = 4\n");
    refused(path, "count forward --prices bad.toml", &["bad.toml", "line 3", "sine"]);
    write("neg.toml", "add = 1\nexp = -4\n");
    refused(path, "count forward --prices neg.toml", &["neg.toml", "line 2"]);
    write("cut.json", "{\"vocab_size\": 3,");
    refused(path, "count forward --config cut.json", &["cut.json", "line 1"]);
    write("nameless.json", "{\"vocab_size\": 3}");
    refused(path, "count forward --config nameless.json", &["`model_type` is missing"]);
    let lacks = r#"{"model_type": "qwen2", "num_attention_heads": 2, "vocab_size": 3}"#;
    write("lacks.json", lacks);
    refused(path, "count forward --config lacks.json", &["lacks.json", "`hidden_size` is missing"]);
    write("mamba.json", "{\"model_type\": \"mamba\"}");
    refused(
        path,
        "count forward --config mamba.json",
        &["mamba.json", "model_type", "mamba", "llama, mistral"],
    );
}

#[test]
fn usage_errors_are_one_line_too() {
    let dir = tmp();
    refused(dir.path(), "generate --preset tiny", &["<PROMPT>", "--help"]);
    refused(dir.path(), "count forward --lora-targets foo", &["foo", "q_proj"]);
    refused(dir.path(), "audit forward --threads 0", &["--threads"]);
    refused(dir.path(), "generate hi --system x --raw", &["--system", "--raw"]);
    refused(dir.path(), "count forward --sequence 3", &["--sequence"]);
    refused(dir.path(), "generate hi --preset tiny --max-new-tokens 0", &["--max-new-tokens"]);
    refused(dir.path(), "generate hi --preset tiny --temperature 1e-40", &["--temperature"]);
    refused(
        dir.path(),
        "audit forward --preset tiny --seq 1 --past 32768",
        &["32769 tokens", "32768"],
    );
    let memory = "audit forward --preset qwen2.5-72b --seq 4";
    refused(dir.path(), memory, &["out of memory", "of weights", "of KV cache", "free"]);
    std::fs::write(dir.path().join("free.toml"), "name = \"free\"\n").unwrap();
    refused(dir.path(), "count forward --prices free.toml", &["free.toml", "prices nothing"]);
    std::fs::write(dir.path().join("x.gguf"), "GGUF and then nothing").unwrap();
    refused(dir.path(), "generate hi --model x.gguf", &["x.gguf"]);
    let negative = r#"{"model_type": "qwen2", "vocab_size": -4, "hidden_size": 8, "intermediate_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1,
        "max_position_embeddings": 8}"#;
    std::fs::write(dir.path().join("negative.json"), negative).unwrap();
    refused(dir.path(), "count forward --config negative.json", &["negative.json", "vocab_size"]);
}

/// Ctrl-C ends the run with 130 and leaves no file behind.
#[test]
#[cfg(unix)]
fn an_interrupt_leaves_nothing_half_written() {
    use std::process::Stdio;
    let dir = tmp();
    let line = "generate hi --preset tiny --max-new-tokens 30000 --ignore-eos --json out.json";
    let mut child = std::process::Command::new(assert_cmd::cargo::cargo_bin!("flopaudit"))
        .args(line.split_whitespace())
        .current_dir(dir.path())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    std::thread::sleep(std::time::Duration::from_millis(1500));
    let killed =
        std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status();
    assert!(killed.unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
#[cfg(unix)]
fn outputs_are_treated_as_what_they_are() {
    use std::os::unix::fs::{FileTypeExt, symlink};
    let dir = tmp();
    // A device stays a device, a link stays a link.
    flopaudit(dir.path(), "count forward --preset tiny --json /dev/null").assert().success();
    assert!(std::fs::metadata("/dev/null").unwrap().file_type().is_char_device());
    std::fs::write(dir.path().join("real.json"), "old").unwrap();
    symlink("real.json", dir.path().join("link.json")).unwrap();
    flopaudit(dir.path(), "count forward --preset tiny --json link.json").assert().success();
    assert!(std::fs::symlink_metadata(dir.path().join("link.json")).unwrap().is_symlink());
    assert!(std::fs::read_to_string(dir.path().join("real.json")).unwrap().starts_with('{'));
    // A reader that leaves early is no error.
    let program = assert_cmd::cargo::cargo_bin!("flopaudit").display().to_string();
    let pipe =
        format!("{program} count generate --preset tiny --json | head -1; exit ${{PIPESTATUS[0]}}");
    let status = std::process::Command::new("bash").args(["-c", &pipe]).output().unwrap();
    assert!(status.status.success() && status.stderr.is_empty(), "{status:?}");
}

#[test]
fn one_line_serves_count_and_audit() {
    let flags = "forward --preset tiny --seq 3 --dtype bf16 --device cpu --threads 1 --json";
    let (count, audit) = (json(&format!("count {flags}")), json(&format!("audit {flags}")));
    assert_eq!(count["total_flops"], audit["total_flops"]);
    assert_eq!(audit["workload"]["dtype"], "bf16");
    assert_eq!(audit["device"], "cpu");
}

#[test]
fn a_batch_of_copies_and_a_prompt_from_stdin() {
    let dir = tmp();
    let line = "generate - --model synthetic:tiny:3 --batch 2 --new-tokens 5 --ignore-eos --json";
    let out = flopaudit(dir.path(), line).write_stdin("Hello").assert().success();
    let run: Value = serde_json::from_slice(&out.get_output().stdout).unwrap();
    assert_eq!(run["workload"]["batch"], 2);
    assert_eq!(run["sequences"][0]["token_ids"], run["sequences"][1]["token_ids"]);
    // What a prompt draws does not depend on which others are in the file.
    let drawn = |prompts: &str| -> Vec<Value> {
        std::fs::write(dir.path().join("p.txt"), prompts).unwrap();
        let line = "generate --prompts p.txt --model synthetic:tiny:3 --new-tokens 8 --ignore-eos --temperature 3 --json";
        let out = flopaudit(dir.path(), line).assert().success();
        let run: Value = serde_json::from_slice(&out.get_output().stdout).unwrap();
        run["sequences"].as_array().unwrap().iter().map(|s| s["token_ids"].clone()).collect()
    };
    assert_eq!(drawn("abcd\nwxyz\n")[1], drawn("ab\nwxyz\n")[1]);
}

#[test]
fn an_empty_prompt_is_refused() {
    let dir = tmp();
    flopaudit(dir.path(), "generate --preset tiny --raw")
        .arg("")
        .assert()
        .code(2)
        .stderr(predicate::str::diff("error: prompt: is empty\n"));
}

#[test]
fn no_color_and_pipes_are_plain() {
    let text = stdout("audit forward --preset tiny --seq 3");
    assert!(!text.contains('\u{1b}') && text.is_ascii(), "{text}");
}

#[test]
fn a_fault_that_nothing_is_recorded_for_is_refused() {
    let dir = tmp();
    for task in [
        "forward --seq 3",
        "generate --prompt-tokens 3 --new-tokens 2",
        "train --seq 3 --lora-rank 2",
    ] {
        let line = format!("audit {task} --preset tiny --plant-fault drop:0");
        refused(dir.path(), &line, &["--plant-fault: no CUDA graph was recorded"]);
    }
}

#[test]
fn what_no_sum_fits_is_refused_by_flag() {
    let dir = tmp();
    let line =
        "count train --preset qwen2.5-72b --full --steps 18446744073709551615 --accumulate 2";
    let why = "--steps: --steps × --accumulate is above";
    for structure in ["exact", "notebook", "6nd", "torch:sdpa", "maxtext"] {
        refused(dir.path(), &format!("{line} --structure {structure} --seq 100000"), &[why]);
    }
    let line = "count eval --preset tiny --passes 18446744073709551615";
    refused(dir.path(), line, &["--passes: their number is above"]);
}

#[test]
fn eval_is_the_word_and_evaluate_is_read() {
    for word in ["eval", "evaluate"] {
        let line = format!("count {word} --preset tiny --seq 8");
        assert_eq!(json(&format!("{line} --json"))["workload"]["kind"], "eval");
        assert!(stdout(&line).contains("workload  eval 1 x batch 1, 8 tokens"));
    }
    let task = r#"{ "kind": "evaluate", "batch": 1, "seq": 8 }"#;
    let task: flopaudit::workload::Task = serde_json::from_str(task).unwrap();
    assert_eq!(task.name(), "eval");
}

#[test]
fn verification_costs_so_much_for_each_token_gained() {
    let line = "count verify --preset tiny --drafted 4 --accepted 2 --rounds 3 --batch 2";
    let count = json(&format!("{line} --json"));
    let number = |key: &str| count[key].as_f64().unwrap();
    // Each round feeds five tokens and gains three.
    assert_eq!((count["tokens"]["fed"].as_u64(), number("new_tokens")), (Some(30), 18.0));
    assert_eq!(number("flops_per_token"), number("total_flops") / 30.0);
    assert_eq!(number("flops_per_new_token"), number("total_flops") / 18.0);
    let text = stdout(line);
    assert!(text.contains("tokens    30, ") && text.contains("18 new, "), "{text}");
}

#[test]
fn counts_state_padding_and_its_cost() {
    let dir = tmp();
    std::fs::write(dir.path().join("r4.txt"), "10\n3\n7\n5\n").unwrap();
    let line = "count eval --preset tiny --lengths r4.txt --batch 4 --json";
    let of = |structure: &str| {
        let line = format!("{line} --structure {structure}");
        let out = flopaudit(dir.path(), &line).assert().success().get_output().stdout.clone();
        serde_json::from_slice::<Value>(&out).unwrap()
    };
    let (exact, unpadded) = (of("exact"), of("exact:unpadded"));
    let [padded, real] = [&exact, &unpadded].map(|count| count["total_flops"].as_u64().unwrap());
    let tokens = &exact["tokens"];
    assert_eq!(
        [&tokens["fed"], &tokens["real"], &tokens["padding"]].map(Value::as_u64),
        [Some(40), Some(25), Some(15)]
    );
    assert_eq!(tokens["padding_flops"], padded - real);
    assert_eq!(unpadded["tokens"]["padding_flops"], 0);
    assert_eq!(of("6nd")["tokens"]["padding_flops"], Value::Null);
    let text = flopaudit(dir.path(), &line.replace(" --json", "")).assert().success();
    text.stdout(contains("25 real, ").and(contains("15 of padding (37.500 % of all), ")));
}
