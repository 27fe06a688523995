//! Plans: budgets, unknowns, finished runs, and what a bad file gets.

mod program;

use std::path::Path;

use program::*;
use serde_json::Value;

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// A directory that holds `plan.toml`.
fn with_plan(plan: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("plan.toml"), plan).unwrap();
    dir
}

/// Status, stdout, stderr of `plan plan.toml` with more flags.
fn plan_with(dir: &Path, flags: &str) -> (i32, String, String) {
    let out = flopaudit(dir, &format!("plan plan.toml {flags}")).output().unwrap();
    (out.status.code().unwrap(), text(&out.stdout), text(&out.stderr))
}

fn plan(file: &str) -> (i32, String, String) {
    plan_with(with_plan(file).path(), "")
}

fn plan_json(file: &str) -> Value {
    let (code, stdout, stderr) = plan_with(with_plan(file).path(), "--json");
    assert!(code < 2, "{stderr}");
    serde_json::from_str(&stdout).unwrap()
}

/// What `count` says under the notebook's structure and prices.
fn counted(args: &str) -> u64 {
    let dir = tempfile::tempdir().unwrap();
    let line = format!("count {args} --structure notebook --prices coursework --json");
    let out = flopaudit(dir.path(), &line).assert().success().get_output().stdout.clone();
    let count: Value = serde_json::from_slice(&out).unwrap();
    count["total_flops"].as_u64().unwrap()
}

const NOTEBOOK: &str = r#"
budget = "1e17 FLOP"
structure = "notebook"
prices = "coursework"
"#;

const TRAINING: &str = r#"
[[experiment]]
name = "training"
kind = "train"
batch = 4
seq = 512
lora_rank = 4
"#;

/// One step of [`TRAINING`] under the notebook's structure and prices.
const STEP: u64 = 7_245_520_468_800;

#[test]
fn training_is_solved_to_the_last_step() {
    // The notebook's 13 800 steps are 99.988 % of its budget: alone, they leave 1.63 steps' worth.
    let (code, stdout, _) = plan(&format!("{NOTEBOOK}{TRAINING}steps = 13800"));
    assert!(code == 0 && stdout.contains("99.988 %"), "{stdout}");
    let solved = plan_json(&format!("{NOTEBOOK}{TRAINING}steps = \"max\""));
    assert_eq!(solved["solved"]["value"], 13_801);
    assert_eq!(solved["solved"]["next_over_flops"], 13_802 * STEP - 10u64.pow(17));
    assert_eq!(solved["total_flops"], 13_801 * STEP);
    assert_eq!(solved["left_flops"], 10u64.pow(17) - 13_801 * STEP);
    assert_eq!(solved["over_flops"], 0);
    // One evaluation beside it, and 13 801 are over the budget.
    let evaluation = "[[experiment]]\nkind = \"evaluate\"\nbatch = 8\n";
    let account = plan_json(&format!("{NOTEBOOK}{TRAINING}steps = \"max\"\n{evaluation}"));
    assert_eq!(account["solved"]["value"], 13_800);
    let (code, _, stderr) = plan(&format!("{NOTEBOOK}{evaluation}{TRAINING}steps = 13801"));
    let (needed, left) = (13_801 * STEP, 10u64.pow(17) - counted("evaluate --batch 8"));
    assert_eq!(code, 1);
    assert_eq!(
        stderr,
        format!("error: over budget: `training` needs {needed} FLOPs, {left} are left for it\n")
    );
}

#[test]
fn the_example_is_the_notebooks_plan() {
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/budget.toml");
    let example = std::fs::read_to_string(example).unwrap();
    let (code, stdout, stderr) = plan(&example);
    assert_eq!((code, stderr.as_str()), (0, ""));
    insta::assert_snapshot!(stdout);
    let account = plan_json(&example);
    assert_eq!(account["solved"]["value"], 13_800);
    // The rows sum to the total, the running total counts up, and each row is what `count` says.
    let rows = account["experiments"].as_array().unwrap();
    let flops = |row: &Value, key: &str| row[key].as_u64().unwrap();
    let mut running = 0;
    for row in rows {
        running += flops(row, "flops");
        assert_eq!(flops(row, "running_flops"), running);
        assert_eq!(flops(row, "left_flops"), 10u64.pow(17) - running);
        let runs = flops(row, "runs");
        assert_eq!(flops(row, "flops_per_run") * runs, flops(row, "flops"));
    }
    assert_eq!(flops(&account, "total_flops"), running);
    for (row, args) in rows.iter().zip([
        "evaluate --batch 4 --seq 512",
        "train --seq 64 --lora-rank 2",
        "train --seq 64 --lora-rank 8",
        "train --batch 4 --seq 512 --lora-rank 4 --steps 13800",
        "generate --prompt-tokens 128 --new-tokens 16 --no-kv-cache --temperature 0.8 --lora-rank 4",
    ]) {
        assert_eq!(flops(row, "flops_per_run"), counted(args), "{args}");
    }
    assert_eq!(rows[1]["runs"], 4);
    assert_eq!(rows[1]["learning_rates"], serde_json::json!([1e-5, 1e-4]));
}

#[test]
fn a_plan_worked_out_by_hand() {
    // Only roots cost. A pass of the notebook over 4 tokens of `tiny` has 3 layers of one root a
    // block and one a token in each of two norms, then one a token in the last norm:
    // 3·(1 + 2·4) + 4 = 31. Two sequences evaluated: 62. A training step: 3·31 = 93. Of 1000, 938
    // are left for steps: 10 of them, 930, and 8 FLOPs left; one more lacks 85.
    let dir = with_plan(
        "budget = \"1 kFLOP\"\nstructure = \"notebook\"\nprices = \"roots.toml\"\npreset = \"tiny\"\n\
         [[experiment]]\nkind = \"train\"\nseq = 4\nlora_rank = 1\nsteps = \"max\"\n\
         [[experiment]]\nkind = \"evaluate\"\nbatch = 2\nseq = 4\n",
    );
    std::fs::write(dir.path().join("roots.toml"), "sqrt = 1\n").unwrap();
    let (code, stdout, stderr) = plan_with(dir.path(), "--json");
    assert_eq!((code, stderr.as_str()), (0, ""));
    let account: Value = serde_json::from_str(&stdout).unwrap();
    let names: Vec<_> =
        account["experiments"].as_array().unwrap().iter().map(|row| row["name"].clone()).collect();
    assert_eq!(names, ["train-1", "evaluate-2"]);
    assert_eq!(account["experiments"][0]["flops"], 930);
    assert_eq!(account["experiments"][1]["flops"], 62);
    assert_eq!(account["solved"]["value"], 10);
    assert_eq!(account["solved"]["next_over_flops"], 85);
    assert_eq!(account["left_flops"], 8);
}

/// What `count` says of a workload is what a plan says of it.
#[test]
fn a_plan_prices_what_the_flags_say() {
    let cases = [
        (
            "kind = \"forward\"\nseq = 5\npast = 7\nlogits = \"last\"",
            "forward --seq 5 --past 7 --logits last",
        ),
        ("kind = \"eval\"\nseq = 5\npasses = 3", "eval --seq 5 --passes 3"),
        (
            "kind = \"train\"\nseq = 5\nsteps = 2\nfull = true\nrecompute = true",
            "train --seq 5 --steps 2 --full --recompute --batch 1",
        ),
        (
            "kind = \"train\"\nseq = 5\nsteps = 2\nlora_rank = 3\nrecompute = true",
            "train --seq 5 --steps 2 --lora-rank 3 --recompute --batch 1",
        ),
    ];
    for (table, flags) in cases {
        let dir = with_plan(&format!(
            "structure = \"torch\"\npreset = \"tiny\"\n[[experiment]]\n{table}\n"
        ));
        let (code, stdout, stderr) = plan_with(dir.path(), "--json");
        assert_eq!((code, stderr.as_str()), (0, ""), "{table}");
        let account: Value = serde_json::from_str(&stdout).unwrap();
        let line = format!("count {flags} --preset tiny --structure torch:eager --json");
        let counted = json(&line)["total_flops"].clone();
        assert_eq!(account["experiments"][0]["flops"], counted, "{table}");
    }
    let dir =
        with_plan("preset = \"tiny\"\n[[experiment]]\nkind = \"train\"\nsteps = 1\npasses = 2\n");
    let (code, _, stderr) = plan_with(dir.path(), "--json");
    assert_eq!(code, 2);
    assert!(stderr.contains("`passes` means nothing where kind = \"train\""), "{stderr}");
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]
    #[test]
    fn what_is_solved_fits_and_one_more_does_not(
        budget in 1_000_000u64..1 << 50,
        seq in 1u64..200,
        rank in 1u64..=16,
        seeds in 1usize..4,
        other in 1u64..50,
    ) {
        let read = |steps: &str| {
            let seeds: Vec<_> = (0..seeds).collect();
            let dir = with_plan(&format!(
                "budget = \"{budget} FLOP\"\nstructure = \"notebook\"\npreset = \"tiny\"\n\
                 [[experiment]]\nkind = \"generate\"\nnew_tokens = 2\nprompt_tokens = {other}\n\
                 [[experiment]]\nkind = \"train\"\nseq = {seq}\nlora_rank = [1, {rank}]\n\
                 seed = {seeds:?}\nsteps = {steps}\n"
            ));
            let plan = flopaudit::plan::Plan::read(&dir.path().join("plan.toml")).unwrap();
            flopaudit::plan::Account::new(&plan, vec![]).unwrap()
        };
        let solved = read("\"max\"").solved.unwrap();
        if solved.value > 0 {
            let account = read(&solved.value.to_string());
            proptest::prop_assert!(account.over_flops == 0 && account.verdict().is_ok());
        }
        let over = read(&(solved.value + 1).to_string());
        proptest::prop_assert!(over.verdict().is_err());
        proptest::prop_assert_eq!(Some(over.over_flops), solved.next_over_flops);
    }
}

#[test]
fn whatever_is_left_open_takes_what_the_others_leave() {
    // An evaluation of 8 sequences after it must be paid too: its place does not matter.
    let rest = "[[experiment]]\nkind = \"evaluate\"\nbatch = 8\nseq = 512\n";
    let open = format!("{TRAINING}steps = \"max\"\nseed = [1, 2, 3]\n");
    let step = counted("train --batch 4 --seq 512 --lora-rank 4");
    let evaluation = counted("evaluate --batch 8 --seq 512");
    let expected = (10u64.pow(17) - evaluation) / (3 * step);
    for file in [format!("{NOTEBOOK}{open}{rest}"), format!("{NOTEBOOK}{rest}{open}")] {
        let account = plan_json(&file);
        assert_eq!(account["solved"]["value"], expected);
        assert_eq!(account["solved"]["key"], "steps");
        assert_eq!(account["total_flops"], evaluation + 3 * step * expected);
    }
}

#[test]
fn tokens_are_solved_too() {
    for (cache, structure) in [(true, "exact"), (false, "exact"), (false, "notebook")] {
        let account = plan_json(&format!(
            "budget = \"20 MFLOP\"\npreset = \"tiny\"\nstructure = \"{structure}\"\n\
             [[experiment]]\nkind = \"generate\"\nprompt_tokens = 5\nkv_cache = {cache}\n\
             new_tokens = \"max\"\n"
        ));
        let n = account["solved"]["value"].as_u64().unwrap();
        let count = |n: u64| {
            let cache = if cache { "" } else { "--no-kv-cache" };
            let line = format!(
                "count generate --preset tiny --prompt-tokens 5 --new-tokens {n} {cache} \
                 --structure {structure} --json"
            );
            let dir = tempfile::tempdir().unwrap();
            let out = flopaudit(dir.path(), &line).assert().success().get_output().stdout.clone();
            serde_json::from_slice::<Value>(&out).unwrap()["total_flops"].as_u64().unwrap()
        };
        assert!(n > 1 && count(n) <= 20_000_000 && count(n + 1) > 20_000_000, "{n}");
        assert_eq!(account["solved"]["next_over_flops"], count(n + 1) - 20_000_000);
    }
}

#[test]
fn a_budget_that_not_even_one_step_fits_is_over() {
    let tight = NOTEBOOK.replace("1e17", "7e12");
    let (code, stdout, stderr) = plan(&format!("{tight}{TRAINING}steps = \"max\""));
    assert_eq!(code, 1);
    assert!(stdout.contains("steps = 0 fits"), "{stdout}");
    assert!(stderr.contains("`training` needs 7245520468800 FLOPs, 7000000000000"), "{stderr}");
    // Where the others alone pass the budget, the first that does is to blame.
    let rest = "[[experiment]]\nname = \"eval\"\nkind = \"evaluate\"\nbatch = 100\n";
    let (code, _, stderr) = plan(&format!("{tight}{TRAINING}steps = \"max\"\n{rest}"));
    assert!(code == 1 && stderr.contains("`eval` needs 60341912907200"), "{stderr}");
}

#[test]
fn over_budget_still_prints_and_writes_everything() {
    let dir = with_plan(&format!("{NOTEBOOK}{TRAINING}steps = 13802"));
    let (code, stdout, _) = plan_with(dir.path(), "--json plan.json");
    assert_eq!(code, 1);
    insta::assert_snapshot!(stdout);
    let account: Value =
        serde_json::from_slice(&std::fs::read(dir.path().join("plan.json")).unwrap()).unwrap();
    assert_eq!(account["over_flops"], 13_802 * STEP - 10u64.pow(17));
    assert_eq!(account["over_budget"]["name"], "training");
    // A path that cannot be written fails before anything is printed.
    let (code, stdout, _) = plan_with(dir.path(), "--json no/such/dir.json");
    assert_eq!((code, stdout.as_str()), (2, ""));
}

/// A directory with a plan under `prices`, and what `run.json` of an audited run spent under them.
fn with_run(prices: &str, run_prices: &str) -> (tempfile::TempDir, u64) {
    let dir = with_plan(&format!(
        "budget = \"1 GFLOP\"\nprices = \"{prices}\"\npreset = \"tiny\"\n\
         [[experiment]]\nkind = \"generate\"\nprompt_tokens = 8\nnew_tokens = 4\n"
    ));
    let run = "audit generate --preset tiny --prompt-tokens 6 --new-tokens 5 --lora-rank 2";
    flopaudit(dir.path(), &format!("{run} --prices {run_prices} --json run.json"))
        .assert()
        .success();
    let same = run.replace("audit", "count");
    let line = format!("{same} --prices {prices} --json");
    let out = flopaudit(dir.path(), &line).assert().success().get_output().stdout.clone();
    let count: Value = serde_json::from_slice(&out).unwrap();
    (dir, count["total_flops"].as_u64().unwrap())
}

#[test]
fn finished_runs_come_off_the_budget_under_the_plans_prices() {
    for (prices, run_prices) in [
        ("unit", "unit"),
        ("coursework", "unit"),
        ("matmul", "coursework"),
        ("unit", "matmul"),
        ("matmul", "matmul"),
    ] {
        let (dir, spent) = with_run(prices, run_prices);
        let (code, stdout, stderr) = plan_with(dir.path(), "--check run.json --json");
        assert_eq!((code, stderr.as_str()), (0, ""));
        let account: Value = serde_json::from_str(&stdout).unwrap();
        assert_eq!(account["spent_flops"], spent, "{prices} after {run_prices}");
        assert_eq!(account["spent"][0]["audited"], true);
        let total = account["total_flops"].as_u64().unwrap();
        assert_eq!(account["left_flops"], 1_000_000_000 - spent - total);
        assert_eq!(account["experiments"][0]["running_flops"], spent + total);
        let (_, stdout, _) = plan_with(dir.path(), "--check run.json");
        assert!(stdout.contains("spent: run.json"), "{stdout}");
        assert_eq!(stdout.contains("priced anew"), prices != run_prices, "{stdout}");
    }
}

#[test]
fn runs_that_cannot_be_trusted_are_refused() {
    let (dir, _) = with_run("coursework", "unit");
    let run = std::fs::read_to_string(dir.path().join("run.json")).unwrap();
    let refused = |text: &str, flags: &str, part: &str| {
        std::fs::write(dir.path().join("bad.json"), text).unwrap();
        let (code, stdout, stderr) = plan_with(dir.path(), flags);
        assert_eq!((code, stdout.as_str()), (2, ""), "{stderr}");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
        assert!(stderr.contains("bad.json") && stderr.contains(part), "{stderr} lacks {part}");
    };
    let check = "--check run.json bad.json";
    refused(&run.replace("\"balanced\": true", "\"balanced\": false"), check, "does not balance");
    refused(&run.replace("\"total_flops\": ", "\"total_flops\": 1"), check, "it was changed");
    refused(&run.replace("\"command\": \"audit\"", "\"command\": \"count\""), check, "nothing ran");
    refused(&run.replace("schema_version\": 1", "schema_version\": 9"), check, "schema 9");
    refused("{}", check, "no finished run");
    refused("", check, "line 1");
    let hidden = "\"hidden_size\": ";
    let bad = run.replace(hidden, "\"hidden_size\": -");
    assert_ne!(bad, run);
    refused(&bad, check, "workload.model: model: `hidden_size`");
    refused(&run, "--check bad.json ./bad.json", "twice");
    let old = run.replace("\"matmul_macs\"", "\"x\"");
    std::fs::write(
        dir.path().join("plan.toml"),
        "prices = \"matmul\"\n[[experiment]]\nkind = \"generate\"\nnew_tokens = 1\n",
    )
    .unwrap();
    refused(&old, "--check bad.json", "lacks `matmul_macs`");
    std::fs::remove_file(dir.path().join("bad.json")).unwrap();
    let (code, _, stderr) = plan_with(dir.path(), "--check bad.json");
    assert!(code == 2 && stderr.contains("bad.json"), "{stderr}");
}

#[test]
fn sums_past_64_bits_are_read_back_exactly() {
    let dir =
        with_plan("budget = \"1e30 FLOP\"\n[[experiment]]\nkind = \"generate\"\nnew_tokens = 1\n");
    let line = "count generate --preset qwen2.5-72b --prompt-tokens 1000 --new-tokens 1000000 \
                --no-kv-cache --json run.json";
    flopaudit(dir.path(), line).assert().success();
    let run = std::fs::read_to_string(dir.path().join("run.json")).unwrap();
    let run = run.replace("\"command\": \"count\"", "\"command\": \"generate\"");
    std::fs::write(dir.path().join("run.json"), &run).unwrap();
    let (code, stdout, stderr) = plan_with(dir.path(), "--check run.json --json");
    assert_eq!(code, 0, "{stderr}");
    let figure = |text: &str, key: &str| {
        let line = text.lines().find(|l| l.contains(&format!("\"{key}\""))).unwrap();
        line.chars().filter(char::is_ascii_digit).collect::<String>()
    };
    assert_eq!(figure(&stdout, "spent_flops"), figure(&run, "total_flops"));
    assert!(figure(&stdout, "spent_flops").len() > 22);
    assert!(stdout.contains("\"audited\": false"));
}

#[test]
fn a_bad_plan_is_one_line_with_file_line_and_key() {
    for (file, parts) in [
        ("", &["line 1: `experiment`"][..]),
        ("budget = \"1e17 FLOP\"\n", &["line 1: `experiment`", "[[experiment]]"]),
        ("\nbudget = 1e17\n", &["line 2: `budget`", "has no unit", "\"100 PFLOP\""]),
        ("budget = \"100\"", &["line 1: `budget`", "has no unit"]),
        ("budget = \"-1 PFLOP\"", &["line 1: `budget`", "negative"]),
        ("budgte = \"1 PFLOP\"", &["line 1: `budgte`"]),
        ("structure = \"guess\"\n<eval>", &["line 1: `structure`", "`guess`", "notebook"]),
        ("prices = \"dear\"\n<eval>", &["line 1: `prices`", "`dear`", "coursework"]),
        ("\nprices = \"no.toml\"\n<eval>", &["line 2: `prices`", "no.toml"]),
        ("preset = \"gpt\"\n<eval>", &["line 1: `preset`", "`gpt`", "qwen2.5-0.5b"]),
        ("config = \"no.json\"\n<eval>", &["line 1: `config`", "no.json"]),
        ("preset = \"tiny\"\nconfig = \"c.json\"\n<eval>", &["line 2: `config`", "`preset`"]),
        ("<eval>steps = 2", &["line 3: `steps`", "means nothing"]),
        ("<eval>seq = -2", &["line 3: `seq`", "negative"]),
        ("<eval>seq = \"long\"", &["line 3: `seq`", "\"long\""]),
        ("<eval>seq = 99999999999999", &["line 1: `batch`", "tokens"]),
        ("<eval>lora_rank = [4, 100000]", &["line 3: `lora_rank`", "100000"]),
        ("<eval>lora_targets = []\nlora_rank = 1", &["line 3: `lora_targets`"]),
        ("<eval>lora_rank = 1\nlora_layers = [99]", &["line 4: `lora_layers`", "no layer 99"]),
        (
            "<eval>lora_rank = 1\nlora_rank_pattern = { k_proj = 2 }",
            &["line 4: `lora_rank_pattern`", "k_proj carries no adapter"],
        ),
        ("structure = \"notebook\"\n<eval>name = \"a\"\n<eval>name = \"a\"", &["line 7: `name`"]),
        ("[[experiment]]\nkind = \"train\"\nlora_rank = 1", &["line 1: `steps`", "missing"]),
        ("[[experiment]]\nkind = \"train\"\nsteps = 1", &["line 1: `lora_rank`", "`full`"]),
        ("[[experiment]]\nkind = \"dance\"", &["line 2: `kind`", "`dance`"]),
        ("<gen>top_k = 4\n", &["line 4: `top_k`", "temperature"]),
        ("<gen>temperature = -1.0\n", &["line 4: `temperature`", "-1"]),
        ("<gen><gen>name = \"b\"", &["line 6: `new_tokens`", "second \"max\""]),
        (
            "structure = \"exact\"\n[[experiment]]\nkind = \"train\"\nsteps = 1\nbatch = 0",
            &["line 5: `batch`", "at least 1"],
        ),
    ] {
        let file = file
            .replace("<eval>", "[[experiment]]\nkind = \"evaluate\"\n")
            .replace("<gen>", "[[experiment]]\nkind = \"generate\"\nnew_tokens = \"max\"\n");
        let (code, stdout, stderr) = plan(&file);
        assert_eq!((code, stdout.as_str()), (2, ""), "{file}\n{stderr}");
        assert_eq!(stderr.lines().count(), 1, "{file}\n{stderr}");
        for part in ["error: plan.toml: "].iter().chain(parts) {
            assert!(stderr.contains(part), "{file}\n{stderr} lacks {part}");
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let (code, _, stderr) = plan_with(dir.path(), "");
    assert!(code == 2 && stderr.starts_with("error: plan.toml: "), "{stderr}");
}
