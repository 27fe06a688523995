//! The HTML report, from JSON that the program itself wrote.

mod program;

use std::{fs, path::Path};

use flopaudit::report::digits;
use program::{flopaudit, refused, tmp};
use serde_json::{Value, json};

/// What `args` writes to `NAME.json` in `dir`.
fn made(dir: &Path, name: &str, args: &str) -> Value {
    flopaudit(dir, &format!("{args} --json {name}.json")).assert().success();
    serde_json::from_str(&fs::read_to_string(dir.join(name).with_extension("json")).unwrap())
        .unwrap()
}

/// The page of `files`, checked as any page must be.
fn page(dir: &Path, files: &str) -> String {
    flopaudit(dir, &format!("report {files} -o page.html"))
        .assert()
        .success()
        .stdout("")
        .stderr("");
    let page = fs::read_to_string(dir.join("page.html")).unwrap();
    well_formed(&page);
    self_contained(&page);
    page
}

/// Every element is closed, in order; no stray `<` in text; no attribute without quotes.
fn well_formed(page: &str) {
    const VOID: [&str; 2] = ["meta", "!doctype"];
    let mut open: Vec<&str> = vec![];
    let mut rest = page;
    while let Some(at) = rest.find('<') {
        rest = &rest[at + 1..];
        let end = rest.find('>').unwrap_or_else(|| panic!("no > after {}", &rest[..40]));
        let (tag, after) = (&rest[..end], &rest[end + 1..]);
        assert!(!tag.contains('<'), "stray < before {tag}");
        assert_eq!(tag.matches('"').count() % 2, 0, "quotes of {tag}");
        let name = tag.split([' ', '/']).find(|part| !part.is_empty()).unwrap();
        rest = after;
        match tag.strip_prefix('/') {
            Some(name) => assert_eq!(open.pop(), Some(name), "closed by </{name}>"),
            None if VOID.contains(&name) || tag.ends_with('/') => {}
            None => open.push(name),
        }
        // Their text is no markup.
        if let "script" | "style" = name
            && !tag.starts_with('/')
        {
            rest = &rest[rest.find(&format!("</{name}>")).unwrap()..];
        }
    }
    assert!(open.is_empty(), "not closed: {open:?}");
}

/// Nothing is loaded from anywhere.
fn self_contained(page: &str) {
    for outside in ["http://", "https://", "src=", "url(", "@import", "<link", "<img", "<iframe"] {
        assert!(!page.contains(outside), "the page holds {outside}");
    }
    for link in page.split("href=\"").skip(1) {
        assert!(link.starts_with('#'), "a link to {}", &link[..20]);
    }
    assert!(page.contains("default-src 'none'"));
}

fn count_of(page: &str, part: &str) -> usize {
    page.matches(part).count()
}

#[test]
fn a_generation_begins_with_its_verdict_and_holds_exact_totals() {
    let dir = tmp();
    let run = made(dir.path(), "run", "generate Hello --preset tiny --max-new-tokens 8 --op-times");
    let page = page(dir.path(), "run.json");
    let total = digits(run["total_flops"].as_u64().unwrap().into());
    let verdict = page.find("The audit balances").unwrap();
    let figures = page.find("<dl class=\"figures\">").unwrap();
    assert!(verdict < figures, "the verdict comes first");
    assert!(page.contains(&format!("closed form = predicted = executed = {total} FLOPs")));
    assert!(page.contains(&format!(">{total}</td>")), "the table's total");
    for row in run["rows"].as_array().unwrap() {
        let exact = format!("data-value=\"{}\"", row["flops"]);
        assert!(row["flops"] == 0 || page.contains(&exact), "{row}");
    }
    assert!(page.contains("<pre>oooooooo</pre>"));
    // By phase, by component and by time; each drawn for both widths, each with its words.
    assert_eq!(count_of(&page, "<figure class=\"chart\">"), 3);
    assert_eq!(count_of(&page, "role=\"img\""), 6);
    assert_eq!(count_of(&page, "<desc id="), 6);
}

#[test]
fn text_of_files_is_never_markup() {
    const HOSTILE: &str =
        "</pre></title></desc><script>alert('a')</script><img src=x onerror=\"a\">&amp;";
    let dir = tmp();
    let mut run = made(dir.path(), "run", "generate Hello --preset tiny --max-new-tokens 4");
    run["sequences"][0]["text"] = json!(HOSTILE);
    for key in ["model", "device"] {
        run[key] = json!(HOSTILE);
    }
    run["prices"]["name"] = json!(HOSTILE);
    run["rows"][3]["component"] = json!(HOSTILE);
    fs::write(dir.path().join("run.json"), run.to_string()).unwrap();
    let mut plan = made(dir.path(), "plan", &plan_args(dir.path()));
    plan["experiments"][0]["name"] = json!(HOSTILE);
    fs::write(dir.path().join("plan.json"), plan.to_string()).unwrap();
    flopaudit(dir.path(), "report run.json plan.json -o page.html").assert().success();
    let page = fs::read_to_string(dir.path().join("page.html")).unwrap();
    well_formed(&page);
    assert_eq!(count_of(&page, "<script>"), 1, "the page's own");
    assert!(!page.contains("<img"));
    assert!(page.contains("&lt;script&gt;alert("));
    assert!(page.contains("&amp;amp;"), "an entity in the text is text");
}

/// Of a small plan beside `dir`'s other files.
fn plan_args(dir: &Path) -> String {
    let plan = "budget = \"1e9 FLOP\"\nstructure = \"exact\"\npreset = \"tiny\"\n\
                [[experiment]]\nname = \"score\"\nkind = \"evaluate\"\nseq = 16\nbatch = 1\n";
    fs::write(dir.join("plan.toml"), plan).unwrap();
    "plan plan.toml".into()
}

#[test]
fn an_audit_that_does_not_balance_says_so_first() {
    let dir = tmp();
    let mut run = made(dir.path(), "run", "audit forward --preset tiny --seq 4");
    assert!(page(dir.path(), "run.json").contains("class=\"verdict good\""));
    run["balanced"] = json!(false);
    run["executed_flops"] = json!(1);
    run["differences"] = json!([{
        "phase": "forward", "scope": "layers.0.self_attn.q_proj", "op": "matmul 4x32x32 f32",
        "predicted_calls": 1, "executed_calls": 2, "predicted_flops": 8, "executed_flops": 16,
    }]);
    fs::write(dir.path().join("run.json"), run.to_string()).unwrap();
    let page = page(dir.path(), "run.json");
    assert!(page.contains("class=\"verdict bad\""));
    assert!(page.contains("The audit does not balance"));
    assert!(page.contains("layers.0.self_attn.q_proj") && page.contains(">+8</td>"));
}

#[test]
fn a_training_shows_losses_budget_and_proof() {
    let dir = tmp();
    fs::write(dir.path().join("text.txt"), "a few words to learn from. ".repeat(20)).unwrap();
    flopaudit(
        dir.path(),
        "train --preset tiny --data text.txt --eval-data text.txt --seq 16 --steps 8 \
         --eval-every 4 --budget 1e10 --out run",
    )
    .assert()
    .success();
    let file = dir.path().join("run/run.json");
    let mut run: Value = serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
    let found = page(dir.path(), "run/run.json");
    for part in ["Within the budget", "Every tensor learns", "Gradients equal finite differences"] {
        assert!(found.contains(part), "{part}");
    }
    let spent = digits(run["training"]["budget"]["spent"].as_u64().unwrap().into());
    assert!(found.contains(&format!("{spent} of 10,000,000,000 FLOPs spent")));
    let last = run["training"]["evaluations"][2]["loss"].as_f64().unwrap();
    assert!(found.contains(&format!("{last:.4}</td>")), "the last held-out loss");
    assert!(found.contains("<h3>Loss</h3>") && found.contains("<h3>Spent</h3>"));
    // Losses that no axis holds, and losses that do not differ.
    run["training"]["losses"][3]["loss"] = json!(1e308);
    run["training"]["evaluations"] = json!([]);
    run["training"]["budget"]["spent"] = json!(0);
    fs::write(&file, run.to_string()).unwrap();
    page(dir.path(), "run/run.json");
    for point in run["training"]["losses"].as_array_mut().unwrap() {
        point["loss"] = json!(4.0);
    }
    fs::write(&file, run.to_string()).unwrap();
    page(dir.path(), "run/run.json");
}

#[test]
fn counts_evaluations_plans_sweeps_and_reconciliations_have_pages() {
    let dir = tmp();
    let dir = dir.path();
    fs::write(dir.join("text.txt"), "some words to score. ".repeat(8)).unwrap();
    made(dir, "count", "count forward --preset qwen2.5-72b --structure notebook");
    made(dir, "eval", "eval --preset tiny --data text.txt --seq 16");
    made(dir, "plan", &plan_args(dir));
    made(dir, "sweep", "count forward --preset tiny --sweep seq=16,32 --sweep lora-rank=1,2");
    let way = made(dir, "way", "reconcile --from 6nd --to torch --prices matmul forward --seq 16");
    let page = page(dir, "count.json eval.json plan.json sweep.json way.json");
    // The contents, then the reports in the order given.
    let parts = [
        "5 reports",
        "href=\"#report-5\"",
        "Count of forward",
        "The notebook&#x27;s table",
        "Perplexity",
        "Within the budget",
        "Sweep of forward",
        "Reconciliation",
    ];
    for part in parts {
        assert!(page.contains(part), "{part}");
    }
    let ids = ["report-1", "report-2", "report-3", "report-4", "report-5"];
    let places = ids.map(|id| page.find(&format!("<article id=\"{id}\">")).unwrap());
    assert!(places.is_sorted());
    for step in way["steps"].as_array().unwrap() {
        assert!(page.contains(&format!("data-value=\"{}\"", step["flops"])), "{step}");
        assert!(page.contains(&format!("data-value=\"{}\"", step["running_total"])), "{step}");
    }
}

#[test]
fn benchmarks_and_ceilings_have_pages() {
    let dir = tmp();
    for name in ["bench", "ceiling"] {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/report/{name}.json"));
        fs::copy(file, dir.path().join(format!("{name}.json"))).unwrap();
    }
    let page = page(dir.path(), "bench.json ceiling.json");
    for part in ["Benchmark of decode", "Roofline", "Decode curve", "Every point is audited"] {
        assert!(page.contains(part), "{part}");
    }
    let bench: Value =
        serde_json::from_str(&fs::read_to_string(dir.path().join("bench.json")).unwrap()).unwrap();
    for point in bench["points"].as_array().unwrap() {
        assert!(page.contains(&format!("data-value=\"{}\"", point["flops"])));
    }
}

/// The benchmark of `tests/report` with `change` made to it, as `NAME.json`.
fn bench(dir: &Path, name: &str, change: impl FnOnce(&mut Value)) {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/report/bench.json");
    let mut bench: Value = serde_json::from_str(&fs::read_to_string(file).unwrap()).unwrap();
    change(&mut bench);
    fs::write(dir.join(name).with_extension("json"), bench.to_string()).unwrap();
}

#[test]
fn the_page_of_a_benchmark_says_what_the_terminal_says() {
    let dir = tmp();
    bench(dir.path(), "bench", |bench| {
        bench["points"][0]["predicted_s"] = json!(0.0123456789);
        bench["points"][1]["mfu_datasheet"] = json!(0.25);
    });
    let page = page(dir.path(), "bench.json").replace("&#x2f;", "/");
    for head in ["IQR", "bytes alone", "of datasheet", "tokens/s/TFLOP", "activations"] {
        assert!(
            page.contains(&format!("<th scope=\"col\" class=\"figure\">{head}</th>")),
            "{head}"
        );
    }
    for part in [
        "title=\"0.0123456789 s\">12.35 ms</td>",
        "title=\"7,471,872 bytes\">7.472 MB</td>",
        "dispatch, an op",
        "title=\"0.0544971595 s\">54.50 ms</td>",
        "step = 41.88 ms + FLOPs / 82.53 GFLOP/s",
    ] {
        assert!(page.contains(part), "{part}");
    }
}

#[test]
fn points_that_the_caches_hold_are_rings_in_the_roofline() {
    let dir = tmp();
    bench(dir.path(), "bench", |_| {});
    assert!(!page(dir.path(), "bench.json").contains("in cache"));
    bench(dir.path(), "bench", |bench| {
        for i in [0, 1] {
            bench["points"][i]["limits"]["memory_s"] = Value::Null;
            bench["points"][i]["bandwidth_use"] = Value::Null;
        }
    });
    let page = page(dir.path(), "bench.json");
    assert!(page.contains("<i class=\"ring\"") && page.contains("2 of 8 points"));
    let roofline = &page[page.find("<h3>Roofline</h3>").unwrap()..];
    let chart = &roofline[..roofline.find("</figure>").unwrap()];
    let circles = |fill: &str| {
        let circles = chart.split("<circle ").skip(1);
        circles.filter(|circle| circle.split('>').next().unwrap().contains(fill)).count()
    };
    // In the wide drawing and in the narrow one.
    assert_eq!((circles("fill=\"none\""), circles("fill=\"var(")), (4, 12));
}

#[test]
fn a_large_grid_is_drawn_without_numbers() {
    let dir = tmp();
    let labels = |page: &str| {
        let roofline = &page[page.find("<h3>Roofline</h3>").unwrap()..];
        let chart = &roofline[..roofline.find("</figure>").unwrap()];
        chart.lines().filter(|line| line.trim().parse::<u8>().is_ok_and(|n| n == 2)).count()
    };
    bench(dir.path(), "bench", |_| {});
    let few = labels(&page(dir.path(), "bench.json"));
    bench(dir.path(), "bench", |bench| {
        let points = bench["points"].as_array().unwrap().clone();
        bench["points"] = [&points[..]; 3].concat().into();
    });
    let many = labels(&page(dir.path(), "bench.json"));
    assert!(few > many, "{few} {many}");
}

#[test]
fn times_and_rates_that_nothing_has_are_refused_with_their_key() {
    let dir = tmp();
    let dir = dir.path();
    let cases: [(&str, Value, &str); 6] = [
        ("/points/2/seconds/min", json!(-1.0), "`points[2].seconds`"),
        ("/points/3/tokens_per_s", json!(-5), "`points[3].tokens_per_s`"),
        ("/points/0/limits/memory_s", json!(-1e-3), "`points[0].limits.memory_s`"),
        ("/curves/0/points/1/fitted_s", json!(-1), "`curves[0].points.fitted_s`"),
        ("/ceiling/dispatch_s", json!(-1), "`dispatch_s`"),
        ("/ceiling/stream/rates/0/samples/0", json!(0), "`samples`"),
    ];
    for (key, value, part) in cases {
        bench(dir, "bad", |bench| *bench.pointer_mut(key).unwrap() = value);
        refused(dir, "report bad.json -o page.html", &["bad.json", part]);
    }
    bench(dir, "bad", |_| {});
    let text = fs::read_to_string(dir.join("bad.json")).unwrap();
    let key = "\"tokens_per_s\":";
    let text = text.replacen(key, &format!("{key}1e999,\"x\":"), 1);
    fs::write(dir.join("bad.json"), text).unwrap();
    refused(dir, "report bad.json -o page.html", &["bad.json", "`points[0].tokens_per_s`"]);
}

#[test]
fn a_file_that_is_no_report_is_refused_with_the_key_at_fault() {
    let dir = tmp();
    let dir = dir.path();
    let run = made(dir, "run", "audit forward --preset tiny --seq 4");
    let broken = |change: &dyn Fn(&mut Value)| {
        let mut run = run.clone();
        change(&mut run);
        run.to_string()
    };
    let workload = |key: &str, value: Value| {
        broken(&|run| *run["workload"].pointer_mut(key).unwrap() = value.clone())
    };
    let many = broken(&|run| run["workload"] = json!([run["workload"], { "model": 3 }]));
    let cases: [(String, &[&str]); 12] = [
        ("nonsense".into(), &["bad.json", "is no report", "line 1"]),
        ("{}".into(), &["bad.json", "`schema_version`"]),
        ("[]".into(), &["bad.json", "is no report"]),
        (broken(&|run| run["schema_version"] = json!(99)), &["schema 99", "reads 1"]),
        (broken(&|run| run["command"] = json!("dance")), &["`command`", "`dance`"]),
        (broken(&|run| run["rows"][2]["flops"] = json!("x")), &["bad.json", "`rows[2].flops`"]),
        (broken(&|run| run["total_flops"] = json!(-1)), &["bad.json", "`total_flops`"]),
        (run.to_string() + "{}", &["bad.json", "trailing"]),
        (
            workload("/model/hidden_size", json!("x")),
            &["`workload.model`", "`hidden_size` is `x`, not a count"],
        ),
        (workload("/dtype", json!("f7")), &["`workload.dtype`", "`f7`"]),
        (many, &["`workload[1].model`"]),
        (broken(&|run| run["workload"] = json!(3)), &["`workload`", "a workload, or a list"]),
    ];
    for (text, parts) in cases {
        fs::write(dir.join("bad.json"), text).unwrap();
        fs::write(dir.join("page.html"), "before").unwrap();
        refused(dir, "report run.json bad.json -o page.html", parts);
        let left = fs::read_to_string(dir.join("page.html")).unwrap();
        assert_eq!(left, "before", "a page that was there stays");
    }
    refused(dir, "report none.json -o page.html", &["none.json"]);
    refused(dir, "report -o page.html", &["FILE.json"]);
    refused(dir, "report run.json", &["--out"]);
}

#[test]
fn figures_that_no_run_has_do_not_break_the_page() {
    let dir = tmp();
    let mut run = made(dir.path(), "run", "generate Hello --preset tiny --max-new-tokens 4");
    for row in run["rows"].as_array_mut().unwrap() {
        row["flops"] = json!(u64::MAX);
        row["seconds"] = json!(1e308);
    }
    run["timings"]["time_to_first_token_s"] = json!(0.0);
    run["total_flops"] = json!(0);
    fs::write(dir.path().join("run.json"), run.to_string()).unwrap();
    page(dir.path(), "run.json");
    run["total_flops"] = json!(1);
    run["rows"] = json!([]);
    fs::write(dir.path().join("run.json"), run.to_string()).unwrap();
    page(dir.path(), "run.json");
}

#[test]
fn a_bad_place_for_the_page_fails_before_anything_is_read() {
    let dir = tmp();
    refused(dir.path(), "report none.json -o nowhere/page.html", &["nowhere/page.html"]);
    refused(dir.path(), "report none.json -o .", &["is a directory"]);
    refused(dir.path(), "report run.json -o run.json", &["--out"]);
}

#[test]
fn no_spelling_of_a_file_to_read_is_written_over() {
    let dir = tmp();
    let dir = dir.path();
    made(dir, "run", "audit forward --preset tiny --seq 4");
    fs::create_dir(dir.join("sub")).unwrap();
    let before = fs::read_to_string(dir.join("run.json")).unwrap();
    let whole = format!("report run.json -o {}", dir.join("run.json").display());
    for args in ["report ./run.json -o run.json", "report run.json -o sub/../run.json", &whole] {
        refused(dir, args, &["--out"]);
    }
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink("run.json", dir.join("link.json")).unwrap();
        refused(dir, "report run.json -o link.json", &["--out"]);
        refused(dir, "report link.json -o run.json", &["--out"]);
    }
    assert_eq!(fs::read_to_string(dir.join("run.json")).unwrap(), before);
}

#[test]
fn the_page_goes_to_stdout_where_asked() {
    let dir = tmp();
    made(dir.path(), "run", "audit forward --preset tiny --seq 4");
    let out = flopaudit(dir.path(), "report run.json -o -").assert().success();
    let page = String::from_utf8(out.get_output().stdout.clone()).unwrap();
    assert!(page.starts_with("<!doctype html>") && page.trim_end().ends_with("</html>"));
}

#[test]
fn a_counts_page_has_its_hours_tokens_and_thresholds() {
    let dir = tmp();
    fs::write(dir.path().join("r4.txt"), "10\n3\n7\n5\n").unwrap();
    let line = "count train --full --preset tiny --lengths r4.txt --batch 4 --gpu h100-sxm --mfu 0.4 \
                --price-per-gpu-hour 2 --watts 700 --threshold eu";
    let count = made(dir.path(), "count", line);
    let page = page(dir.path(), "count.json");
    let padding = &count["tokens"]["padding"];
    assert_eq!(padding, 15);
    for figure in ["Tokens", "Padding", "Time", "Cost", "Energy", "Thresholds"] {
        assert!(page.contains(figure), "{figure}");
    }
    let law = count["thresholds"]["lines"][0]["name"].as_str().unwrap();
    assert!(page.contains(law), "{law}");
}
