//! Running the program in tests of its command line.

// Each test file uses its own part of these.
#![allow(dead_code)]

use std::path::Path;

use assert_cmd::Command;
use serde_json::Value;

/// The program in an empty directory, with no hub to reach and no colour.
pub fn flopaudit(dir: &Path, args: &str) -> Command {
    let mut command = Command::cargo_bin("flopaudit").unwrap();
    command.current_dir(dir).args(args.split_whitespace());
    command.env("HF_HOME", dir.join("hf")).env("HF_ENDPOINT", "http://127.0.0.1:9");
    command.env_remove("HF_HUB_CACHE").env_remove("HF_TOKEN").env_remove("RUST_BACKTRACE");
    command
}

pub fn tmp() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

pub fn stdout(args: &str) -> String {
    let out = flopaudit(tmp().path(), args).assert().success().get_output().stdout.clone();
    String::from_utf8(out).unwrap()
}

pub fn json(args: &str) -> Value {
    serde_json::from_str(&stdout(args)).unwrap()
}

/// Status 2 and exactly one line on stderr, which holds `parts`.
pub fn refused(dir: &Path, args: &str, parts: &[&str]) {
    let assert = flopaudit(dir, args).assert().code(2).stdout("");
    let stderr = String::from_utf8(assert.get_output().stderr.clone()).unwrap();
    // Only the word that synthetic weights are synthetic may come before it.
    let stderr: String = stderr
        .lines()
        .filter(|l| !l.starts_with("warning: synthetic"))
        .collect::<Vec<_>>()
        .join("\n");
    assert_eq!(stderr.lines().count(), 1, "{args}: {stderr}");
    assert!(stderr.starts_with("error: "), "{args}: {stderr}");
    for part in parts {
        assert!(stderr.contains(part), "{args}: {stderr} lacks {part}");
    }
}
