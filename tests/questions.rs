//! docs/questions.md: each command prints what stands under it. `INSTA_UPDATE=always` writes it anew.

mod program;

use std::{env, fs, path::Path};

use program::flopaudit;

/// The words of a command line, of which some are quoted.
fn words(line: &str) -> Vec<String> {
    let mut words = vec![];
    for (index, part) in line.split('"').enumerate() {
        match index.is_multiple_of(2) {
            true => words.extend(part.split_whitespace().map(String::from)),
            false => words.push(part.into()),
        }
    }
    words
}

#[test]
fn each_command_prints_what_stands_under_it() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let file = root.join("docs/questions.md");
    let page = fs::read_to_string(&file).unwrap();
    let mut made = String::new();
    let mut commands = 0;
    for (index, part) in page.split("```").enumerate() {
        if index > 0 {
            made += "```";
        }
        let Some(block) = part.strip_prefix("console\n$ flopaudit ") else {
            made += part;
            continue;
        };
        let line = block.lines().next().unwrap();
        let mut command = flopaudit(root, "");
        let out = command.args(words(line)).assert().success().get_output().stdout.clone();
        let out = String::from_utf8(out).unwrap();
        made += &format!("console\n$ flopaudit {line}\n{}\n", out.trim_end());
        commands += 1;
    }
    assert!(commands >= 20, "{commands}");
    match env::var("INSTA_UPDATE").is_ok_and(|update| update == "always") {
        true => fs::write(&file, made).unwrap(),
        false => assert!(made == page, "docs/questions.md is stale: INSTA_UPDATE=always writes it"),
    }
}
