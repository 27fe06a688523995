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
    assert_eq!(names, ["train-1", "eval-2"]);
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

#[test]
fn each_attention_is_a_row() {
    let dir = with_plan(
        "preset = \"tiny\"\n[[experiment]]\nkind = \"eval\"\nseq = 200\n\
         attention = [\"dense\", \"blocked\"]\n",
    );
    let (code, stdout, stderr) = plan_with(dir.path(), "--json");
    assert_eq!((code, stderr.as_str()), (0, ""));
    let account: Value = serde_json::from_str(&stdout).unwrap();
    for (row, mode) in ["dense", "blocked"].into_iter().enumerate() {
        let counted =
            json(&format!("count eval --seq 200 --preset tiny --attention {mode} --json"));
        assert_eq!(account["experiments"][row]["flops"], counted["total_flops"], "{mode}");
        assert_eq!(account["experiments"][row]["workload"]["attention"], mode);
    }
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
            proptest::prop_assert!(account.balance.over == 0 && account.verdict().is_ok());
        }
        let over = read(&(solved.value + 1).to_string());
        proptest::prop_assert!(over.verdict().is_err());
        proptest::prop_assert_eq!(Some(over.balance.over), solved.next_over.1);
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
        ("<eval>seq = 99999999999999", &["line 3: `seq`", "tokens"]),
        ("<eval>lora_rank = [4, 100000]", &["line 3: `lora_rank`", "100000"]),
        ("<eval>attention = \"flash\"", &["line 3: `attention`", "\"flash\"", "\"blocked\""]),
        ("<eval>attention = true", &["line 3: `attention`", "true"]),
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

/// A plan of one open training on eight GPUs, and one evaluation.
fn timed(budget: &str, keys: &str) -> String {
    format!(
        "budget = \"{budget}\"\npreset = \"tiny\"\nprices = \"coursework\"\n{keys}\
         [[experiment]]\nkind = \"train\"\nseq = 64\nfull = true\nsteps = \"max\"\n\
         [[experiment]]\nkind = \"evaluate\"\nseq = 64\nseed = [1, 2]\n"
    )
}

const RATE: &str =
    "gpu = \"h100-sxm\"\ngpus = 8\nmfu = 0.5\nprice_per_gpu_hour = 2.5\nwatts = 700\n";

#[test]
fn budgets_in_gpu_hours_dollars_and_tokens_are_solved() {
    // Hours × GPUs are FLOPs of matrix products over 0.5 · 989e12 · 3600, on however many GPUs.
    let matmul = |args: &str| {
        json(&format!("count {args} --preset tiny --prices matmul --json"))["total_flops"].as_f64()
    };
    let step = matmul("train --seq 64 --full").unwrap();
    let rest = 2.0 * matmul("eval --seq 64").unwrap();
    let affords = |gpu_hours: f64| ((gpu_hours * 3600.0 * 0.5 * 989e12 - rest) / step).floor();
    for (budget, key, steps) in [
        ("0.25 GPU-hours", "gpu_hours", affords(0.25)),
        ("3 $", "dollars", affords(3.0 / 2.5)),
        ("1e6 tokens", "tokens", (1e6f64 - 128.0).div_euclid(64.0)),
    ] {
        let account = plan_json(&timed(budget, RATE));
        let value = account["solved"]["value"].as_f64().unwrap();
        assert!((value - steps).abs() <= 1.0, "{budget}: {value}, {steps}");
        let of = |name: &str| account[format!("{name}_{key}")].as_f64().unwrap();
        let sum = (of("total") + of("left") - of("budget")).abs();
        assert!(sum < 1e-9 * of("budget") && of("over") == 0.0, "{account}");
        let next = account["solved"][format!("next_over_{key}")].as_f64().unwrap();
        let row = &account["experiments"][0];
        let each = row[format!("cost_{key}")].as_f64().unwrap() / value;
        assert!(next > 0.0 && near(of("left") + next, each, of("budget")), "{next} {each}");
        // FLOPs are still the plan's own.
        let line = format!("count train --seq 64 --full --steps {value} --preset tiny --json");
        let own = json(&format!("{line} --prices coursework"))["total_flops"].clone();
        assert_eq!(row["flops"], own);
        assert!(near(
            row["time"]["kwh"].as_f64().unwrap(),
            row["time"]["gpu_hours"].as_f64().unwrap() * 0.7,
            1.0
        ));
    }
    let (code, stdout, stderr) = plan(&timed("3 $", RATE));
    assert_eq!((code, stderr.as_str()), (0, ""));
    insta::assert_snapshot!(stdout);
    // A page has bars of FLOPs.
    let dir = with_plan(&timed("3 $", RATE));
    plan_with(dir.path(), "--json plan.json");
    refused(dir.path(), "report plan.json -o plan.html", &["`budget_dollars`", "FLOPs alone"]);
    // Tokens need no rate.
    assert_eq!(plan_json(&timed("1e6 tokens", ""))["budget_tokens"], 1_000_000);
}

fn near(a: f64, b: f64, whole: f64) -> bool {
    (a - b).abs() < 1e-9 * whole
}

#[test]
fn flags_go_before_the_files_rate() {
    let dir = with_plan(&timed("1 GPU-hour", RATE));
    let steps = |flags: &str| {
        let (code, stdout, stderr) = plan_with(dir.path(), &format!("--json {flags}"));
        assert_eq!(code, 0, "{stderr}");
        serde_json::from_str::<Value>(&stdout).unwrap()["solved"]["value"].as_f64().unwrap()
    };
    assert!((steps("--mfu 0.25") / steps("") - 0.5).abs() < 1e-6);
    assert!((steps("--gpus 1") / steps("") - 1.0).abs() < 1e-6);
    assert!((steps("--gpu a100-sxm-80gb") / steps("") - 312.0 / 989.0).abs() < 1e-6);
    let dir = with_plan(&timed("1 GPU-hour", ""));
    let (code, _, stderr) = plan_with(dir.path(), "--gpu l4");
    assert!(code == 2 && stderr.starts_with("error: --gpu: needs --mfu"), "{stderr}");
}

#[test]
fn an_overspent_budget_says_so_in_its_unit() {
    let plan_of = timed("1 GPU-hour", RATE).replace("\"max\"", "9999999999999");
    let (code, stdout, stderr) = plan(&plan_of);
    assert_eq!(code, 1);
    assert!(stdout.contains("over the budget: `train-1` lacks"), "{stdout}");
    assert!(
        stderr.contains("`train-1` needs") && stderr.contains("GPU-hours, 1.000 are left"),
        "{stderr}"
    );
    // What ran comes off it in the same unit.
    let dir = with_plan(&timed("1e6 tokens", ""));
    let run = "audit eval --preset tiny --seq 7 --batch 3 --json run.json";
    flopaudit(dir.path(), run).assert().success();
    let (code, stdout, stderr) = plan_with(dir.path(), "--check run.json --json");
    assert_eq!(code, 0, "{stderr}");
    let account: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(account["spent_tokens"], 21);
    assert_eq!(account["spent_flops"], account["spent"][0]["flops"]);
}

#[test]
fn what_a_budget_or_a_rate_lacks_is_named_at_its_line() {
    for (file, parts) in [
        (timed("1 GPU-hour", ""), &["line 1: `budget`", "`gpu` with `mfu`"][..]),
        (timed("1 $", ""), &["line 1: `budget`", "`price_per_gpu_hour`"]),
        (timed("1 $", &RATE.replace("price_per_gpu_hour = 2.5\n", "")), &["`price_per_gpu_hour`"]),
        (timed("1e300 GPU-hours", RATE), &["line 1: `budget`", "128 bits"]),
        (timed("1e25 GPU-hours", RATE), &["line 1: `budget`", "128 bits"]),
        (timed("1 $", "gpu = \"l4\"\nmfu = 1e-30\n"), &["line 5: `mfu`", "1e-9"]),
        (timed("1 euro", ""), &["line 1: `budget`", "not known", "\"2000 $\""]),
        (timed("1 $", "gpu = \"h100\"\nmfu = 0.4\n"), &["line 4: `gpu`", "h100-nvl"]),
        (timed("1 $", "gpu = \"l4\"\n"), &["line 4: `gpu`", "`mfu`"]),
        (timed("1 $", "gpu = \"l4\"\nmfu = 42\n"), &["line 5: `mfu`", "0.42"]),
        (timed("1 $", "gpu = \"l4\"\nmfu = 0.4\nhfu = 0.4\n"), &["line 6: `hfu`", "`mfu`"]),
        (timed("1 $", "gpu = \"t4\"\nmfu = 0.4\npeak = \"bf16\"\n"), &["line 6: `peak`", "f16"]),
        (timed("1 $", "dtype = \"int4\"\n"), &["line 4: `dtype`", "bf16"]),
        (timed("1 $", "watts = -3\n"), &["line 4: `watts`", "above 0"]),
        (timed("1 $", "from_bench = \"no.json\"\n"), &["no.json"]),
    ] {
        let (code, stdout, stderr) = plan(&file);
        assert_eq!((code, stdout.as_str(), stderr.lines().count()), (2, "", 1), "{stderr}");
        for part in parts {
            assert!(stderr.contains(part), "{file}\n{stderr} lacks {part}");
        }
    }
}

#[test]
fn what_no_sum_fits_is_refused_at_its_line() {
    let train = "preset = \"tiny\"\n[[experiment]]\nkind = \"train\"\nfull = true\nsteps = ";
    let refused = |rest: &str, parts: [&str; 2]| {
        let (code, _, stderr) = plan(&format!("{train}{rest}"));
        assert_eq!(code, 2, "{stderr}");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
        parts.iter().for_each(|part| assert!(stderr.contains(part), "{stderr}"));
    };
    let most = i64::MAX;
    refused(&format!("{most}\naccumulate = 100"), ["line 5: `steps`", "above"]);
    refused(&format!("1\neval_rows = {most}"), ["line 6: `eval_rows`", "above"]);
    refused(&format!("1\ncheck_gradients = {most}"), ["line 6: `check_gradients`", "above"]);
    // A budget that no number of steps spends: what is solved ends where counting does.
    let file = format!("budget = \"1e38 FLOP\"\n{train}\"max\"\neval_rows = 3\neval_every = 1");
    let (code, stdout, stderr) = plan(&file);
    assert_eq!(code, 0, "{stderr}");
    assert!(stdout.contains("281,474,976,710,656 fits"), "{stdout}");
}

#[test]
fn a_plan_and_a_count_have_the_same_tokens() {
    for (cache, flag) in [(true, ""), (false, "--no-kv-cache")] {
        let account = plan_json(&format!(
            "budget = \"1e6 tokens\"\npreset = \"tiny\"\n[[experiment]]\nkind = \"generate\"\n\
             prompt_tokens = 100\nnew_tokens = 200\nkv_cache = {cache}\n"
        ));
        let line = "count generate --preset tiny --prompt-tokens 100 --new-tokens 200 --json";
        let count = json(&format!("{line} {flag}"));
        assert_eq!(account["experiments"][0]["cost_tokens"], count["tokens"]["real"]);
        if cache {
            assert_eq!(count["tokens"]["real"], 299);
        }
    }
}

/// What `count` charges, summed over these lines and how often each runs.
fn charged(dir: &Path, lines: &[(&str, u64)]) -> u64 {
    let one = |(line, times): &(&str, u64)| {
        let line = format!("count {line} --preset tiny --json");
        let out = flopaudit(dir, &line).assert().success().get_output().stdout.clone();
        let count: Value = serde_json::from_slice(&out).unwrap();
        times * count["total_flops"].as_u64().unwrap()
    };
    lines.iter().map(one).sum()
}

#[test]
fn experiments_have_lengths() {
    let head = "preset = \"tiny\"\nbudget = \"1 PFLOP\"\n[[experiment]]\n";
    let lengths = |experiment: &str| {
        let dir = with_plan(&format!("{head}{experiment}"));
        std::fs::write(dir.path().join("rows.txt"), "10\n3\n7\n5\n4\n").unwrap();
        std::fs::write(dir.path().join("held.txt"), "[9, 2, 6]").unwrap();
        dir
    };
    let dir = lengths(
        "kind = \"train\"\nfull = true\nbatch = 2\nsteps = 5\naccumulate = 2\nlengths = \"rows.txt\"\n\
         eval_lengths = \"held.txt\"\neval_every = 2\ncheck_gradients = 3\n\
         [[experiment]]\nkind = \"eval\"\nbatch = 2\nlengths = \"rows.txt\"\nlayout = \"bucketed\"\n\
         [[experiment]]\nkind = \"generate\"\nnew_tokens = 4\nlengths = \"rows.txt\"\n\
         [[experiment]]\nkind = \"forward\"\nlengths = \"rows.txt\"\npacking = true\n",
    );
    std::fs::write(dir.path().join("first.txt"), "10\n3\n7\n5\n").unwrap();
    let (code, stdout, stderr) = plan_with(dir.path(), "--json");
    assert_eq!(code, 0, "{stderr}");
    let plan: Value = serde_json::from_str(&stdout).unwrap();
    let flops = |row: usize| plan["experiments"][row]["flops"].as_u64().unwrap();
    let training = [
        ("train --full --batch 2 --steps 5 --accumulate 2 --lengths rows.txt", 1),
        ("eval --batch 2 --lengths held.txt", 4),
        // Both sides of three gradients, over the rows of the first step.
        ("eval --batch 2 --lengths first.txt", 6),
    ];
    assert_eq!(flops(0), charged(dir.path(), &training));
    let eval = "eval --batch 2 --lengths rows.txt --layout bucketed";
    assert_eq!(flops(1), charged(dir.path(), &[(eval, 1)]));
    assert_eq!(plan["experiments"][1]["workload"].as_array().unwrap().len(), 2);
    assert_eq!(flops(2), charged(dir.path(), &[("generate --new-tokens 4 --lengths rows.txt", 1)]));
    assert_eq!(flops(3), charged(dir.path(), &[("forward --lengths rows.txt --packing", 1)]));

    // The largest number of steps is found whatever it is.
    let dir = lengths("kind = \"train\"\nfull = true\nsteps = \"max\"\nlengths = \"rows.txt\"\n");
    let (_, stdout, _) = plan_with(dir.path(), "--json");
    let solved: Value = serde_json::from_str(&stdout).unwrap();
    let steps = solved["solved"]["value"].as_u64().unwrap();
    let at = |steps: u64| {
        let line = format!("train --full --lengths rows.txt --steps {steps}");
        charged(dir.path(), &[(&line, 1)])
    };
    assert!(at(steps) <= 10u64.pow(15) && 10u64.pow(15) < at(steps + 1), "{steps}");

    for (experiment, parts) in [
        ("kind = \"verify\"\nlengths = \"rows.txt\"", &["line 5: `lengths` means nothing"][..]),
        ("kind = \"eval\"\nlayout = \"packed\"", &["line 5: `layout` needs `lengths`"]),
        ("kind = \"eval\"\nlengths = \"none.txt\"", &["line 5: `lengths`", "none.txt"]),
        ("kind = \"eval\"\nlengths = \"rows.txt\"\npasses = 3", &["line 6: `passes` follows"]),
        ("kind = \"eval\"\nlengths = \"rows.txt\"\nseq = 9", &["`lengths`", "10 tokens"]),
        ("kind = \"eval\"\nlengths = \"rows.txt\"\nlayout = \"even\"", &["line 6: `layout`"]),
        (
            "kind = \"train\"\nsteps = 1\nfull = true\neval_lengths = \"held.txt\"\nseq = 8",
            &["`eval_lengths`", "9 tokens"],
        ),
        (
            "kind = \"train\"\nsteps = 1\nevery = 3",
            &[
                "`every` is unknown; known:",
                "eval_rows",
                "eval_lengths",
                "eval_every",
                "check_gradients",
            ],
        ),
    ] {
        let (code, _, stderr) = plan_with(lengths(experiment).path(), "");
        assert_eq!((code, stderr.lines().count()), (2, 1), "{experiment}: {stderr}");
        for part in parts {
            assert!(stderr.contains(part), "{experiment}: {stderr} lacks {part}");
        }
    }
}
