//! Sweeps: the grid, its three formats, and what a bad axis gets.

mod program;

use std::time::Instant;

use program::*;

#[test]
fn a_table_over_the_product() {
    insta::assert_snapshot!(stdout(
        "count forward --sweep seq=128..512:*2 --sweep lora-rank=0,8 --prices coursework"
    ));
}

/// Four sequences of 3 to 10 tokens.
const LENGTHS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/lengths.txt");

#[test]
fn every_point_is_what_count_says() {
    let lengths = |kind: &str| format!("{kind} --preset tiny --lengths {LENGTHS}");
    let of_lengths = ["eval", "train --full", "forward", "generate"].map(lengths);
    for (kind, sweeps) in [
        ("forward --past 3", "--sweep preset=tiny,qwen2.5-0.5b --sweep batch=1..5:+2"),
        (
            "generate --preset tiny --temperature 1",
            "--sweep prompt-tokens=4,9 --sweep new-tokens=3,7",
        ),
        (
            "train --preset tiny --lora-rank 2 --structure notebook",
            "--sweep steps=1,10 --sweep accumulate=1,2 --sweep lora-rank=1,4",
        ),
        ("evaluate --preset tiny --structure notebook", "--sweep seq=1..8:*2 --sweep batch=2"),
        ("forward --preset tiny", "--sweep past=0..2:+1"),
        ("train --preset tiny-mistral --full", "--sweep attention=dense,blocked --sweep seq=4,200"),
        (&of_lengths[0], "--sweep batch=1,2 --sweep layout=padded,bucketed,packed"),
        (&of_lengths[1], "--sweep steps=1,3 --sweep batch=2,3 --sweep seq=10,16"),
        (&of_lengths[2], "--sweep layout=padded,packed --sweep logits=all,last"),
        (&of_lengths[3], "--sweep new-tokens=2,5 --sweep layout=padded,packed"),
    ] {
        let sweep = json(&format!("count {kind} {sweeps} --json"));
        assert_eq!(sweep["command"], "sweep");
        let points = sweep["points"].as_array().unwrap();
        for point in points {
            let at = point["at"].as_object().unwrap();
            let flags: String = at
                .iter()
                .map(|(key, value)| format!(" --{key} {}", value.to_string().replace('"', "")))
                .collect();
            // A flag that is swept may not stand twice on the command line of one count.
            let mut kind = kind.to_string();
            if at.contains_key("lora-rank") {
                kind = kind.replace("--lora-rank 2", "");
            }
            let count = json(&format!("count {kind}{flags} --json"));
            for figure in ["total_flops", "lora_flops", "matmul_macs", "primitives"] {
                assert_eq!(point[figure], count[figure], "{kind}{flags}: {figure}");
            }
        }
        let size: usize = match sweeps.matches("--sweep").count() {
            3 => 8,
            1 => 3,
            _ => points.len(),
        };
        assert_eq!(points.len(), size);
    }
}

#[test]
fn csv_has_a_header_and_a_line_a_point() {
    let dir = tempfile::tempdir().unwrap();
    let line = "count forward --preset tiny --sweep seq=2,4 --sweep lora-rank=0,1 --csv out.csv";
    flopaudit(dir.path(), line).assert().success();
    let csv = std::fs::read_to_string(dir.path().join("out.csv")).unwrap();
    insta::assert_snapshot!(csv.replace("\r\n", "\n"));
    assert_eq!(csv.matches("\r\n").count(), 5);
    assert_eq!(csv.matches('\n').count(), 5);
    // Without a file, stdout holds the CSV and nothing else.
    assert_eq!(stdout(&line.replace("out.csv", "")), csv);
}

#[test]
fn ten_thousand_points_take_less_than_a_second() {
    let line = "count generate --sweep prompt-tokens=1..100:+1 --sweep new-tokens=1..100:+1 --csv";
    let start = Instant::now();
    let csv = stdout(line);
    let elapsed = start.elapsed();
    assert_eq!(csv.lines().count(), 10_001);
    assert!(elapsed.as_secs_f64() < 1.0, "{elapsed:?}");
}

#[test]
fn a_bad_sweep_is_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let listed = |kind: &str, sweep: &str| format!("{kind} --lengths {LENGTHS} --sweep {sweep}");
    for (args, parts) in [
        ("forward --sweep seq", &["--sweep", "a..b:*k"][..]),
        ("forward --sweep seq=1..8:3", &["seq", "*k", "+k"]),
        ("forward --sweep seq=0,4", &["--seq", "at least 1", "seq=0"]),
        ("forward --sweep steps=4", &["`steps`", "forward"]),
        ("evaluate --structure notebook --sweep past=4", &["`past`", "dimension of eval"]),
        ("forward --sweep seq=4 --sweep seq=8", &["`seq`", "twice"]),
        ("forward --sweep preset=tiny,big", &["`big`", "qwen2.5-0.5b"]),
        ("forward --sweep seq=1..2000:+1 --sweep batch=1..2000:+1", &["1000000 points"]),
        ("forward --sweep seq=1..9999999:+1", &["1000000 points"]),
        ("forward --sweep lora-rank=4,2000", &["--lora-rank", "lora-rank=2000"]),
        ("eval --data d.txt --sweep seq=4", &["--data", "--lengths"]),
        ("forward --sweep layout=padded", &["`layout`", "--lengths"]),
        ("forward --sweep attention=flash", &["--attention", "`flash`", "dense, blocked"]),
        (&listed("eval", "layout=even"), &["--layout", "`even`", "bucketed"]),
        (&listed("eval", "passes=2"), &["`passes` of", "follows from --lengths"]),
        (&listed("forward", "seq=2"), &["`seq` of forward follows from --lengths"]),
        (&listed("forward", "layout=bucketed"), &["--layout", "one, eval has more"]),
        (&listed("verify", "rounds=2"), &["--lengths", "verification"]),
        ("forward --sweep seq=4 --csv no/such/dir.csv", &["no/such/dir.csv"]),
    ] {
        let out = flopaudit(dir.path(), &format!("count {args}")).assert().code(2);
        let out = out.get_output();
        assert!(out.stdout.is_empty(), "{args}");
        let stderr = String::from_utf8(out.stderr.clone()).unwrap();
        for part in parts {
            assert!(stderr.contains(part), "{args}: {stderr} lacks {part}");
        }
    }
    flopaudit(dir.path(), "count forward --csv").assert().code(2);
    flopaudit(dir.path(), "count forward --sweep seq=4 --csv --json").assert().code(2);
}
