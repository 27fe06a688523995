//! `doctor`, `completions` and `man`.

mod checkpoints;
mod program;

use std::{fs, path::Path};

use program::*;
use serde_json::Value;

/// `doctor --json` in `dir`, whose own folder is its home, and its exit status.
fn doctor(dir: &Path, environment: &[(&str, &str)]) -> (Value, i32) {
    let mut command = flopaudit(dir, "doctor --json");
    command
        .env("HOME", dir)
        .env("XDG_CACHE_HOME", dir.join("cache"))
        .env_remove("RAYON_NUM_THREADS")
        .env_remove("NO_COLOR");
    command.envs(environment.iter().copied());
    let out = command.output().unwrap();
    (serde_json::from_slice(&out.stdout).unwrap(), out.status.code().unwrap())
}

/// The status, what was found, and the hint.
fn finding(diagnosis: &Value, subject: &str) -> (String, String, String) {
    let findings = diagnosis["findings"].as_array().unwrap();
    let finding = findings.iter().find(|f| f["subject"] == subject).unwrap();
    let text = |key: &str| finding[key].as_str().unwrap_or_default().to_string();
    (text("status"), text("found"), text("hint"))
}

fn write_checkpoint(dir: &Path) {
    let tiny = checkpoints::tiny();
    fs::create_dir_all(dir).unwrap();
    checkpoints::write_text_side(dir, &tiny);
    checkpoints::write_single(dir, &checkpoints::tensors(&tiny));
}

#[test]
fn without_weights_it_says_how_to_get_them() {
    let dir = tmp();
    let (diagnosis, code) = doctor(dir.path(), &[]);
    assert_eq!((code, &diagnosis["ready"]), (1, &Value::Bool(false)));
    assert_eq!(diagnosis["schema_version"], 1);
    assert!(diagnosis["default_model"].is_null());
    let (status, found, hint) = finding(&diagnosis, "weights");
    assert_eq!(status, "missing");
    assert!(found.contains("./weights") && found.contains("Qwen/Qwen2.5-0.5B-Instruct"));
    assert!(hint.contains("scripts/fetch-weights.sh") && hint.contains("synthetic"), "{hint}");
    let cache = dir.path().join("hf/hub").display().to_string();
    assert!(finding(&diagnosis, "hub cache").1.starts_with(&cache));
    let ceilings = dir.path().join("cache/flopaudit").display().to_string();
    #[cfg(target_os = "linux")]
    assert!(finding(&diagnosis, "ceilings").1.starts_with(&ceilings), "{diagnosis}");
    // For people: the same, and one line on stderr. Nothing is written anywhere.
    let assert = flopaudit(dir.path(), "doctor").env("HOME", dir.path()).assert().code(1);
    let out = assert.get_output();
    let (stdout, stderr) =
        (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(stdout.lines().any(|l| l.starts_with("missing  weights")), "{stdout}");
    assert!(stdout.is_ascii() && stdout.lines().all(|l| !l.ends_with(' ')), "{stdout}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn it_finds_what_a_run_would_take() {
    let dir = tmp();
    // In the hub's cache, as the hub's own client lays it out.
    let repository = dir.path().join("hf/hub/models--Qwen--Qwen2.5-0.5B-Instruct");
    let commit = "0123456789012345678901234567890123456789";
    let snapshot = repository.join("snapshots").join(commit);
    write_checkpoint(&snapshot);
    fs::create_dir_all(repository.join("refs")).unwrap();
    fs::write(repository.join("refs/main"), commit).unwrap();
    let (diagnosis, code) = doctor(dir.path(), &[]);
    assert_eq!((code, &diagnosis["ready"]), (0, &Value::Bool(true)));
    assert!(diagnosis["default_model"].as_str().unwrap().contains("Qwen/Qwen2.5-0.5B-Instruct"));
    assert!(finding(&diagnosis, "hub cache").1.ends_with("1 model"));
    // ./weights goes before it.
    write_checkpoint(&dir.path().join("weights"));
    let (diagnosis, code) = doctor(dir.path(), &[]);
    assert_eq!(code, 0);
    let found = diagnosis["default_model"].as_str().unwrap();
    assert!(found.starts_with("weights (safetensors"), "{found}");
    // A run says the same.
    let line = "audit forward --seq 2 --json";
    let run = flopaudit(dir.path(), line).assert().success().get_output().stdout.clone();
    assert_eq!(serde_json::from_slice::<Value>(&run).unwrap()["model"], found);
    // What is broken is not taken.
    fs::write(dir.path().join("weights/config.json"), "{").unwrap();
    let (diagnosis, code) = doctor(dir.path(), &[]);
    assert_eq!(code, 1);
    let (status, found, _) = finding(&diagnosis, "weights");
    assert!(status == "missing" && found.contains("config.json"), "{found}");
}

#[test]
fn the_environment_is_shown_and_its_secrets_are_not() {
    let dir = tmp();
    let set = [
        ("HF_TOKEN", "hf_verysecret"),
        ("HF_ENDPOINT", "https://me:password@mirror.org"),
        ("RAYON_NUM_THREADS", "3"),
        ("NO_COLOR", "1"),
    ];
    let (diagnosis, _) = doctor(dir.path(), &set);
    let text = diagnosis.to_string();
    assert!(!text.contains("verysecret") && !text.contains("password"), "{text}");
    assert!(finding(&diagnosis, "HF_TOKEN").1.starts_with("set"));
    assert!(finding(&diagnosis, "HF_ENDPOINT").1.contains("mirror.org"));
    assert_eq!(diagnosis["threads"], 3);
    assert!(finding(&diagnosis, "cpu").1.starts_with("3 threads"));
    assert_eq!(finding(&diagnosis, "NO_COLOR").1, "1");
    let (diagnosis, _) = doctor(dir.path(), &[("RAYON_NUM_THREADS", "many")]);
    assert_eq!(finding(&diagnosis, "RAYON_NUM_THREADS").0, "warning");
    assert_eq!(finding(&diagnosis, "HF_TOKEN").1, "not set");
    let (free, features) = (&diagnosis["memory_free_bytes"], diagnosis["features"].as_array());
    assert!(!cfg!(target_os = "linux") || free.as_u64().unwrap() > 1 << 20);
    assert_eq!(features.unwrap().iter().any(|f| f == "hub"), cfg!(feature = "hub"));
}

#[test]
fn shells_complete_commands_and_flags() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = stdout(&format!("completions {shell}"));
        for word in ["reconcile", "completions", "doctor", "trace", "lora-rank", "notebook"] {
            assert!(script.contains(word), "{shell} lacks {word}");
        }
    }
    refused(tmp().path(), "completions tcsh", &["tcsh", "bash"]);
    // bash itself, of a word begun.
    let dir = tmp();
    fs::write(dir.path().join("c.sh"), stdout("completions bash")).unwrap();
    let ask = "source ./c.sh; COMP_WORDS=(flopaudit rec); COMP_CWORD=1; \
               _flopaudit flopaudit rec flopaudit; echo ${COMPREPLY[@]}";
    let mut bash = std::process::Command::new("bash");
    let out = bash.args(["-c", ask]).current_dir(dir.path()).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&out.stdout).trim(), "reconcile", "{out:?}");
}

#[test]
fn every_command_has_a_page() {
    let page = stdout("man");
    assert!(page.contains(".TH flopaudit 1") && page.contains("flopaudit\\-reconcile(1)"));
    let dir = tmp();
    flopaudit(dir.path(), "man --out pages/man1").assert().success().stdout("");
    let read = |name: &str| fs::read_to_string(dir.path().join("pages/man1").join(name)).unwrap();
    assert_eq!(read("flopaudit.1"), page);
    for name in ["generate", "train", "eval", "plan", "reconcile", "doctor", "completions", "man"] {
        assert!(read(&format!("flopaudit-{name}.1")).contains(".SH OPTIONS"), "{name}");
    }
    assert!(read("flopaudit-audit-train.1").contains("\\-\\-recompute"));
    assert!(read("flopaudit-generate.1").contains("\\-\\-trace"));
    fs::write(dir.path().join("file"), "").unwrap();
    refused(dir.path(), "man --out file", &["file"]);
}
