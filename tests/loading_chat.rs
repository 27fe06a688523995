//! Conversations as people have them: chat templates, against transformers' own texts and masks, and
//! the forms of training data, each with how its outcome is known.

mod checkpoints;

use std::{collections::HashMap, fs, path::Path};

use assert_cmd::Command;
use candle_core::quantized::{GgmlDType, gguf_file};
use checkpoints::{metadata, one_line, open, tensors, tiny, write_gguf};
use flopaudit::{
    text::Text,
    train::data::{Dataset, Options, conversation},
};
use serde::Deserialize;
use serde_json::{Value as Json, json};

const CASES: &str = "tests/cases/loading";
const TEMPLATES: &str = "tests/golden/templates";

fn read(file: impl AsRef<Path>) -> String {
    fs::read_to_string(&file).unwrap_or_else(|e| panic!("{}: {e}", file.as_ref().display()))
}

/// The tokenizer of the case `base` in a folder with these further files.
fn text_of(files: &[(&str, &str)]) -> anyhow::Result<Text> {
    let dir = tempfile::tempdir().unwrap();
    for name in ["tokenizer.json", "config.json"] {
        fs::copy(Path::new(CASES).join("base").join(name), dir.path().join(name)).unwrap();
    }
    for (name, content) in files {
        let file = dir.path().join(name);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, content).unwrap();
    }
    Text::from_directory(dir.path(), 1024)
}

/// The same with this template, and the special tokens of the goldens.
fn text(template: &str) -> Text {
    let config = json!({
        "bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "chat_template": template
    });
    text_of(&[("tokenizer_config.json", &config.to_string())]).unwrap()
}

/// What `content` in a file of this name gives.
fn load(name: &str, content: &[u8], text: &Text, mask_prompt: bool) -> anyhow::Result<Dataset> {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join(name);
    fs::write(&file, content).unwrap();
    Dataset::load(&file, text, &Options { seq: 4000, mask_prompt, cache: None })
}

/// Each row's text, with what counts of it in brackets.
fn rows(dataset: &Dataset, text: &Text) -> Vec<String> {
    let show = |index| {
        let batch = dataset.batch(&[index]);
        let mut out = text.decode(&batch.ids[..1], false).unwrap();
        let length = batch.weights.iter().rposition(|w| *w == 1.0).unwrap() + 1;
        let mut inside = false;
        for at in 0..length {
            let counts = batch.weights[at] == 1.0;
            if counts != inside {
                out.push(if counts { '[' } else { ']' });
            }
            inside = counts;
            out += &text.decode(&batch.targets[at..=at], false).unwrap();
        }
        out + "]"
    };
    (0..dataset.rows()).map(show).collect()
}

#[derive(Deserialize)]
struct Golden {
    cases: Vec<Case>,
    /// A template each, and its text; `None` where transformers refuses it.
    expressions: Vec<(String, Option<String>)>,
}

#[derive(Deserialize)]
struct Case {
    template: String,
    conversation: String,
    prompt: bool,
    text: Option<String>,
    mask: Option<String>,
}

fn golden() -> Golden {
    serde_json::from_str(&read(Path::new(TEMPLATES).join("rendered.json"))).unwrap()
}

#[test]
fn every_template_gives_the_text_that_transformers_gives() {
    let (golden, records) = (golden(), records());
    let (mut texts, mut wrong) = (HashMap::new(), vec![]);
    for Case { template, conversation: name, prompt, text: expected, .. } in &golden.cases {
        let text = texts
            .entry(template)
            .or_insert_with(|| text(&read(Path::new(TEMPLATES).join(format!("{template}.jinja")))));
        let chat = conversation(&records[name]).unwrap();
        let found = text.render(&chat, *prompt);
        // A list where a string was meant is a text that nobody means: it is refused.
        let shown = expected.as_ref().filter(|text| !text.to_lowercase().contains("[{'type'"));
        let shown =
            if name == "parts" && template != "json_variants" { shown } else { expected.as_ref() };
        if found.as_ref().ok() != shown {
            let found = found.map_err(|e| e.to_string());
            wrong.push(format!("{template} of {name}, {prompt}:\n  {expected:?}\n  {found:?}"));
        }
    }
    assert!(texts.len() >= 20, "{} templates", texts.len());
    assert!(wrong.is_empty(), "{} of {}\n{}", wrong.len(), golden.cases.len(), wrong.join("\n"));
}

/// The conversations as they are written, by name: the order of their keys is part of them.
fn records() -> HashMap<String, String> {
    let lines = read(Path::new(TEMPLATES).join("conversations.jsonl"));
    let named = |line: &str| {
        let json: Json = serde_json::from_str(line).unwrap();
        (json["name"].as_str().unwrap().to_string(), line.to_string())
    };
    lines.lines().map(named).collect()
}

#[test]
fn generation_blocks_mask_as_transformers_does() {
    let (golden, records) = (golden(), records());
    let mut compared = 0;
    for Case { template, conversation: name, prompt, mask, .. } in &golden.cases {
        let (Some(mask), false) = (mask, prompt) else { continue };
        let text = text(&read(Path::new(TEMPLATES).join(format!("{template}.jinja"))));
        if name == "parts" {
            continue;
        }
        let loaded = load("a.jsonl", records[name].as_bytes(), &text, true);
        // The first token is fed, never predicted; without any other there is nothing to train on.
        if !mask[1..].contains('1') {
            assert!(loaded.is_err(), "{template} of {name}");
            continue;
        }
        let batch = loaded.unwrap().batch(&[0]);
        let ours: String =
            batch.weights.iter().map(|weight| if *weight == 1.0 { '1' } else { '0' }).collect();
        assert_eq!(ours[..mask.len() - 1], mask[1..], "{template} of {name}");
        assert!(!ours[mask.len() - 1..].contains('1'));
        compared += 1;
    }
    assert!(compared > 15, "{compared} masks");
}

#[test]
fn expressions_give_what_jinja2_gives_or_are_refused() {
    // Of what transformers renders, these are refused: by name, in one line.
    const UNSUPPORTED: [&str; 23] = [
        "wordcount",
        "truncate",
        "striptags",
        "'x'|int",
        "attr(",
        "urlencode",
        "filesizeformat",
        "pprint",
        "center(20) }}",
        "xmlattr",
        "wordwrap",
        "expandtabs",
        "\"%r\"",
        "% 3.7",
        "{{ +3",
        "½",
        "{{ d.items() }}",
        "{{ d.keys() }}",
        "{{ d.values() }}",
        "{{ range(3) }}",
        "cycler(",
        "joiner(",
        "varargs",
    ];
    let record = read(Path::new(TEMPLATES).join("variables.json"));
    let chat = conversation(&record).unwrap();
    let (mut wrong, mut refused) = (vec![], vec![]);
    let expressions = golden().expressions;
    for (source, expected) in &expressions {
        match (text(source).render(&chat, true), expected) {
            (Ok(found), Some(expected)) if found == *expected => (),
            (Err(_), None) => (),
            (Err(error), Some(_)) => {
                let error = one_line(&error);
                let known = UNSUPPORTED.iter().any(|part| source.contains(part));
                if !known {
                    refused.push(format!("{source}: {error}"));
                }
            }
            (found, expected) => wrong.push(format!("{source}\n  {expected:?}\n  {found:?}")),
        }
    }
    assert!(expressions.len() > 500);
    assert!(wrong.is_empty(), "{} wrong\n{}", wrong.len(), wrong.join("\n"));
    assert!(refused.is_empty(), "{} refused\n{}", refused.len(), refused.join("\n"));
}

#[test]
fn what_would_take_all_memory_or_time_is_one_line() {
    let chat = conversation(r#"{"messages": [{"role": "user", "content": "a"}]}"#).unwrap();
    for (source, why) in [
        ("{{ '%999999999d' % 3 }}", "a width or precision of 999999999 is more than"),
        ("{{ '%.999999999f' % 3.0 }}", "a width or precision of 999999999 is more than"),
        ("{{ '%*d' % (999999999, 3) }}", "a width or precision of 999999999 is more than"),
        ("{{ '%99999999999999999999999d'|format(3) }}", "is more than"),
        ("{{ 'x'.center(99999999999) }}", "are too many"),
        ("{{ 'x'|indent(999999999) }}", "a width of 999999999 is more than"),
        ("{{ [1]|batch(999999999, 0)|list }}", "items are more than"),
        ("{{ [1]|slice(999999999)|list }}", "items are more than"),
        ("{{ 'a' * 1000000000 }}", "too large"),
        ("{{ [0] * 1000000000 }}", "too large"),
        ("{{ 10**10000 }}", ""),
        ("{{ range(10**9)|length }}", "more than 100000 items"),
        ("{{ -170141183460469231731687303715884105728 % 0 }}", "% by zero"),
        ("{{ 1 % 170141183460469231731687303715884105729 }}", "more than 127 bits"),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "recursion"),
        (r#"{{ "\N{BULLET}" }}"#, "write the character itself (its line 1)"),
        (r#"{{ "\ud83d" }}"#, "is no whole character (its line 1)"),
    ] {
        let error = one_line(&text(source).render(&chat, true).unwrap_err());
        assert!(error.contains(why), "{source}: {error}");
    }
    let least = text("{{ -170141183460469231731687303715884105728 % -1 }}");
    assert_eq!(least.render(&chat, true).unwrap(), "0");
}

/// How the rows of a table look: what counts under `--mask-prompt` is in brackets.
const CHATML: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + \
                      '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}\
                      {{ '<|im_start|>assistant\n' }}{% endif %}";

#[test]
fn records_are_read_in_the_forms_that_people_have() {
    let said = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[b<|im_end|>]";
    // (record, row): rows as TRL and transformers make them, worked out by hand.
    let table: [(&str, &str); 15] = [
        (
            r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#,
            said,
        ),
        // ShareGPT, with its own names of roles.
        (
            r#"{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}"#,
            said,
        ),
        (
            r#"{"conversations": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}], "system": ""}"#,
            said,
        ),
        (
            r#"{"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#,
            said,
        ),
        // TRL's conversational form.
        (
            r#"{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}"#,
            "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[b<|im_end|>\n]",
        ),
        // Of a prompt's own answers nothing counts.
        (
            r#"{"prompt": [{"role": "assistant", "content": "x"}, {"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}"#,
            "<|im_start|>assistant\nx<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[b<|im_end|>\n]",
        ),
        (
            r#"{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"}"#,
            "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[b<|im_end|>]",
        ),
        (r#"{"prompt": "a ", "completion": "b"}"#, "a [b<|im_end|>]"),
        // As TRL does, the end is not written twice.
        (r#"{"prompt": "a ", "completion": "b<|im_end|>"}"#, "a [b<|im_end|>]"),
        (
            r#"{"instruction": "Add.", "input": "1 2", "output": "3"}"#,
            "Below is an instruction that describes a task, paired with an input that provides further context. \
          Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\
          \n\n### Response:\n[3<|im_end|>]",
        ),
        (
            r#"{"instruction": "Add.", "input": "", "output": "3", "text": null}"#,
            "Below is an instruction that describes a task. Write a response that appropriately completes the request.\
          \n\n### Instruction:\nAdd.\n\n### Response:\n[3<|im_end|>]",
        ),
        // One part of text is its text.
        (
            r#"{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "assistant", "content": "b"}]}"#,
            said,
        ),
        // OpenAI's weight, axolotl's train.
        (
            r#"{"messages": [{"role": "assistant", "content": "x", "weight": 0}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 1}]}"#,
            "<|im_start|>assistant\nx<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[b<|im_end|>]",
        ),
        (
            r#"{"conversations": [{"from": "gpt", "value": "x", "train": false}, {"from": "human", "value": "a", "train": false}, {"from": "gpt", "value": "b"}]}"#,
            "<|im_start|>assistant\nx<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[b<|im_end|>]",
        ),
        (
            r#"{"messages": [{"role": "user", "content": "a", "name": null}, {"role": "assistant", "content": "b", "tool_calls": null}], "tools": null}"#,
            said,
        ),
    ];
    let text = text(CHATML);
    for (record, expected) in table {
        let dataset = load("a.jsonl", record.as_bytes(), &text, true).map_err(|e| e.to_string());
        assert_eq!(dataset.map(|d| rows(&d, &text)), Ok(vec![expected.to_string()]), "{record}");
        // The same in a list, and after a byte order mark.
        for (name, content) in [
            ("a.json", format!("[\n{record},\n{record}\n]")),
            ("a.jsonl", format!("\u{feff}{record}\n\n{record}")),
        ] {
            let dataset = load(name, content.as_bytes(), &text, true).unwrap();
            assert_eq!(rows(&dataset, &text), [expected, expected]);
        }
    }
}

#[test]
fn columns_reach_the_template() {
    let template = "{% for t in tools or [] %}{{ t.function.name }},{% endfor %}{{ depth }}{{ documents }}\
                    {% for m in messages %}{{ m.role }}:{{ m.content }}{{ m.tool_calls|default([])|length }}\
                    {{ m.tool_call_id }};{% endfor %}";
    let text = text(template);
    for (columns, expected) in [
        (r#""tools": [{"function": {"name": "f"}}]"#, "f,Nonetool:x0i;user:1;"),
        // As tables have them: JSON in a string.
        (r#""tools": "[{\"function\": {\"name\": \"f\"}}]""#, "f,Nonetool:x0i;user:1;"),
        (r#""chat_template_kwargs": {"depth": 2.50, "other": 1}"#, "2.5Nonetool:x0i;user:1;"),
        (r#""documents": [{"a": 1}]"#, "[{'a': 1}]tool:x0i;user:1;"),
        (r#""tools": [], "chat_template_kwargs": "{\"depth\": null}""#, "NoneNonetool:x0i;user:1;"),
    ] {
        let record = format!(
            r#"{{"messages": [{{"role": "tool", "content": "x", "tool_call_id": "i"}},
                {{"role": "user", "content": null, "tool_calls": [{{}}]}}], {columns}}}"#
        );
        let chat = conversation(&record).unwrap();
        assert_eq!(text.render(&chat, false).unwrap(), expected, "{columns}");
        let dataset = load("a.json", record.as_bytes(), &text, false).unwrap();
        assert_eq!(dataset.tokens(), text.encode(expected).unwrap().len());
    }
}

#[test]
fn what_would_change_what_is_learnt_is_refused_by_name() {
    let turns = r#"{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}"#;
    let chat = |more: &str| format!(r#"{{"messages": [{turns}]{more}}}"#);
    let one = |more: &str| {
        format!(
            r#"{{"messages": [{{"role": "user", "content": "a"{more}}}, {{"role": "assistant", "content": "b"}}]}}"#
        )
    };
    let table: Vec<(String, &str)> = vec![
        (chat(r#", "text": "x""#), "has both `text` and `messages`: which of them is to be learnt?"),
        (chat(r#", "conversations": []"#), "has both `messages` and `conversations`: which of them is to be learnt?"),
        (chat(r#", "weight": 0.5"#), "the column `weight` is not supported: rows cannot be weighted; take it away"),
        (chat(r#", "images": ["a.png"]"#), "the column `images` is not supported: only text is supported; take it away"),
        (r#"{"text": "x", "label": 1}"#.into(), "the column `label` is not supported: it is a preference or a class, and next tokens alone are trained on; take it away"),
        (r#"{"prompt": "x", "chosen": "y", "rejected": "z", "completion": "y"}"#.into(), "the column `chosen` is not supported: it is a preference or a class, and next tokens alone are trained on; take it away"),
        (r#"{"text": "x", "input_ids": [1]}"#.into(), "the column `input_ids` is not supported: text is tokenized here; take it away"),
        (chat(r#", "system": "s""#), "has both `messages` and `system`: write the system message as the first"),
        (chat(r#", "tools": {"name": "f"}"#), "`tools` is no list but a map"),
        (chat(r#", "tools": ["f"]"#), "`tools`[0] is no object, a function's JSON schema"),
        (chat(r#", "tools": "f""#), "`tools` is a string, but no JSON: EOF while parsing a value at line 1 column 1"),
        (chat(r#", "chat_template_kwargs": {"max_length": 3}"#), "`chat_template_kwargs`: `max_length` is no variable of a template"),
        (one(r#", "weight": 0.5"#), "messages[0].weight: is neither 0 nor 1"),
        (one(r#", "weight": 1"#), "messages[0]: a message of role `user` is marked to be learnt"),
        (one(r#", "loss": false"#), "messages[0]: the key `loss` is not supported: mark a message by `weight` 0 or 1"),
        (r#"{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}"#.into(), "messages[0].content[0]: is of type `image_url`; only text is supported"),
        (r#"{"messages": [{"role": "user", "content": ["a"]}]}"#.into(), "messages[0].content[0]: has no `type`"),
        (r#"{"messages": [{"role": "user", "content": 3}]}"#.into(), "messages[0].content: is neither a string nor a list of parts but a number"),
        (r#"{"messages": [{"content": "a"}]}"#.into(), "messages[0]: has no `role` that is a string"),
        (r#"{"messages": "a"}"#.into(), "`messages` is no list of messages but a string"),
        (r#"{"conversations": [{"from": "narrator", "value": "a"}]}"#.into(), "conversations[0].from: `narrator` is none of human, user, gpt, assistant, chatgpt, bing, bard, model, system, tool, observation, function_response"),
        (r#"{"conversations": [{"from": "function_call", "value": "{}"}]}"#.into(), "conversations[0].from: a `function_call` is not taken apart: use `messages` with `tool_calls`"),
        (r#"{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}"#.into(), "`prompt` and `completion` are not both strings, nor both lists of messages"),
        (r#"{"prompt": [{"role": "assistant", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}"#.into(), "`prompt` ends in an assistant's message, and answers are not continued"),
        (r#"{"prompt": "a"}"#.into(), "has only some of prompt and completion"),
        (r#"{"instruction": "a", "output": "b", "history": [["c", "d"]]}"#.into(), "the column `history` has no place in the prompt of Stanford Alpaca: use `messages`"),
        (r#"{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, {"role": "assistant", "content": "b"}]}"#.into(),
         "the checkpoint's chat template fails: it shows the parts of message 1's content as a list: join them"),
        (r#"["a"]"#.into(), "is no object but a sequence"),
        (r#"{"text": "x"}"#.into(), "is of another kind than those before: `text`, not `messages`"),
    ];
    let text = text("{% for m in messages %}{{ m.content }}{% endfor %}");
    for (record, why) in table {
        let file = format!("{}\n\n{record}\n", chat(""));
        let error = one_line(&load("a.jsonl", file.as_bytes(), &text, false).unwrap_err());
        let (_, error) = error.rsplit_once("a.jsonl: ").unwrap();
        assert_eq!(error, format!("line 3: {why}"), "{record}");
    }
    // A mark that says that an answer is not learnt cannot go unheard.
    let marked = r#"{"messages": [{"role": "assistant", "content": "b", "weight": 0}, {"role": "assistant", "content": "c"}]}"#;
    let error = one_line(&load("a.jsonl", marked.as_bytes(), &text, false).unwrap_err());
    assert!(
        error.ends_with(
            "line 1: marks messages that are not to be learnt: that takes --mask-prompt"
        ),
        "{error}"
    );
}

#[test]
fn columns_that_change_nothing_are_listed() {
    let lines = r#"{"messages": [{"role": "user", "content": "a"}], "id": 1, "prompt": "a"}
{"messages": [{"role": "user", "content": "a"}], "source": {"x": 1}, "id": 2, "images": []}"#;
    let notes = load("a.jsonl", lines.as_bytes(), &text(CHATML), false).unwrap().notes().clone();
    let columns: Vec<&str> = notes.ignored.iter().map(|ignored| ignored.key.as_str()).collect();
    assert_eq!(columns, ["id", "images", "prompt", "source"]);
    assert!(notes.ignored[0].file.ends_with("a.jsonl"), "{notes:?}");
    assert!(notes.form.unwrap().ends_with("a.jsonl: read as `messages`"));
    let turn = r#"{"conversations": [{"from": "gpt", "value": "a", "id": 7}]}"#;
    let notes = load("a.jsonl", turn.as_bytes(), &text(CHATML), false).unwrap().notes().clone();
    assert!(notes.ignored[0].key == "conversations[].id", "{notes:?}");
}

#[test]
fn files_that_are_no_text_say_what_to_do() {
    let text = text(CHATML);
    for (name, content, why) in [
        ("a.parquet", &b"PAR1"[..], "a .parquet file is no text: write it as JSON lines first"),
        ("a.csv", b"text\na\n", "a .csv file is no text: write it as JSON lines first"),
        ("a.arrow", b"ARROW1", "a .arrow file is no text: write it as JSON lines first"),
        ("a.jsonl.gz", b"\x1f\x8b", "a .gz file is compressed: unpack it first"),
        ("a.txt", b"PK\x03\x04", "a zip file is compressed: unpack it first"),
        ("a.json", b"[]", "is empty: there is nothing to train on"),
        ("a.json", b"[{\"text\": \"a\"}, 3]", "line 1: is no object but a number"),
        ("a.json", b"{\"data\": [{\"text\": \"a\"}]}", "line 1: has neither `text` nor `messages`"),
        (
            "a.json",
            b"{\"text\": \"ab\"}\n{\"text\": ",
            "line 2: not valid JSON: EOF while parsing a value",
        ),
    ] {
        let error = one_line(&load(name, content, &text, false).unwrap_err());
        assert!(error.contains(&format!("{name}: {why}")), "{error}");
    }
    // Plain text begins without its byte order mark.
    let dataset = load("a.txt", "\u{feff}ab".as_bytes(), &text, false).unwrap();
    assert_eq!(rows(&dataset, &text).concat().replace(['[', ']'], ""), "ab");
}

#[test]
fn templates_are_found_where_transformers_finds_them() {
    let chat = |text: &Text| text.chat(None, "x").map_err(|e| one_line(&e));
    let config = |template: Json| json!({ "chat_template": template }).to_string();
    let (one, two) = (
        config(json!("config")),
        config(json!([
            {"name": "default", "template": "listed"}, {"name": "tool_use", "template": "tools"}
        ])),
    );
    let legacy = config(json!("processor"));
    let none = "--template: none of the chat templates is the default: give one of `rag`";
    // (files, what a chat gives): transformers' order, worked out from its from_pretrained.
    for (files, expected) in [
        (vec![("tokenizer_config.json", &*one)], Ok("config")),
        (
            vec![("tokenizer_config.json", &*one), ("chat_template.jinja", "\u{feff}file")],
            Ok("file"),
        ),
        (vec![("tokenizer_config.json", &*one), ("chat_template.json", &*legacy)], Ok("config")),
        (vec![("chat_template.json", &*legacy)], Ok("processor")),
        (vec![("tokenizer_config.json", &*two)], Ok("listed")),
        (
            vec![("tokenizer_config.json", &*one), ("additional_chat_templates/rag.jinja", "r")],
            Err(none),
        ),
        (
            vec![("chat_template.jinja", "file"), ("additional_chat_templates/rag.jinja", "r")],
            Ok("file"),
        ),
    ] {
        let found = chat(&text_of(&files).unwrap());
        assert_eq!(found, expected.map(str::to_string).map_err(str::to_string), "{files:?}");
    }
    let error = one_line(&text_of(&[("chat_template.json", "{}")]).unwrap_err());
    assert!(error.ends_with("chat_template.json: has no `chat_template`"), "{error}");
    let error = one_line(
        &text_of(&[("tokenizer_config.json", &config(json!([{"name": "x"}])))]).unwrap_err(),
    );
    assert!(error.ends_with("`chat_template`[0].template is no template: a string"), "{error}");
}

#[test]
fn a_template_is_chosen_by_name_by_file_or_by_tools() {
    let list = json!({"chat_template": [
        {"name": "default", "template": "listed"}, {"name": "tool_use", "template": "tools"}
    ]});
    let mut text = text_of(&[("tokenizer_config.json", &list.to_string())]).unwrap();
    let given = conversation(r#"{"messages": [{"role": "user"}], "tools": []}"#).unwrap();
    assert_eq!(text.chat(None, "x").unwrap(), "listed");
    assert_eq!(text.render(&given, false).unwrap(), "tools");
    let before = text.fingerprint().unwrap();
    text.choose_template("default").unwrap();
    assert_eq!(text.render(&given, false).unwrap(), "listed");
    assert_ne!(text.fingerprint().unwrap(), before);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("mine.jinja");
    fs::write(&file, "mine").unwrap();
    text.choose_template(file.to_str().unwrap()).unwrap();
    assert_eq!(text.chat(None, "x").unwrap(), "mine");
    let error = one_line(&text.choose_template("rag").unwrap_err());
    assert!(
        error.starts_with("--template: the checkpoint has no chat template `rag`; it has "),
        "{error}"
    );
    assert!(error.contains("`default`, `tool_use`. Or give a .jinja file"), "{error}");

    // All of them survive saving.
    text.save(dir.path()).unwrap();
    let saved = Text::from_directory(dir.path(), 1024).unwrap();
    assert_eq!(saved.chat(None, "x").unwrap(), "listed");
    assert_eq!(saved.render(&given, false).unwrap(), "tools");
}

#[test]
fn what_minijinja_would_take_otherwise_is_refused() {
    for (template, why) in [
        (
            "a\n{{ messages[0].items }}",
            "`.items` without a call is a dict's method to Jinja2, not its key: write `['items']` (its line 2)",
        ),
        ("{% for x in none %}{% endfor %}", "a loop over none (its line 1)"),
        (
            "{{ messages[0].items() }}",
            "prints a sequence that is no list, which Jinja2 would show by its type (its line 1)",
        ),
        ("{{ absent|tojson }}", "tojson: an undefined value has no JSON (its line 1)"),
        ("{% generation %}", "unexpected end of input, expected end of block (its line 1)"),
    ] {
        let error = one_line(&text(template).chat(None, "x").unwrap_err());
        assert_eq!(error, format!("prompt: the checkpoint's chat template fails: {why}"));
    }
}

/// The case `base` with the tokenizer_config.json of another.
fn checkpoint(case: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        fs::copy(Path::new(CASES).join("base").join(name), dir.path().join(name)).unwrap();
    }
    let config = Path::new(CASES).join(case).join("tokenizer_config.json");
    fs::copy(config, dir.path().join("tokenizer_config.json")).unwrap();
    dir
}

/// What the program prints as JSON, and on stderr.
fn json_of(args: &[&str]) -> (Json, String) {
    let output = Command::cargo_bin("flopaudit").unwrap().args(args).output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{args:?}: {stderr}");
    (serde_json::from_slice(&output.stdout).unwrap(), stderr)
}

#[test]
fn a_template_is_chosen_on_the_command_line() {
    let model = checkpoint("base");
    let file = model.path().join("mine.jinja");
    fs::write(&file, "{{ messages[0].content }}!").unwrap();
    let (model, file) = (model.path().to_str().unwrap(), file.to_str().unwrap());
    let args = ["generate", "Hi", "--max-new-tokens", "1", "--model", model, "--template", file];
    let (report, _) = json_of(&[&args[..], &["--json"]].concat());
    assert_eq!(report["sequences"][0]["prompt_tokens"], 3);
    let args = ["generate", "Hi", "--model", model, "--template", "rag"];
    let output = Command::cargo_bin("flopaudit").unwrap().args(args).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    let stderr = String::from_utf8(output.stderr).unwrap();
    let why = "--template: the checkpoint has no chat template `rag`; it has `default`. Or give a \
               .jinja file";
    assert!(stderr.contains(why), "{stderr}");
}

#[test]
fn a_gguf_has_templates_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let mut metadata = metadata(&tiny());
    for (key, source) in [("", "default"), (".tool_use", "tools"), (".rag", "rag")] {
        let key = format!("tokenizer.chat_template{key}");
        metadata.insert(key, gguf_file::Value::String(source.into()));
    }
    write_gguf(&dir.path().join("m.gguf"), &metadata, &tensors(&tiny()), GgmlDType::F32);
    let mut text = open(dir.path()).unwrap().text;
    let given = conversation(r#"{"messages": [{"role": "user"}], "tools": []}"#).unwrap();
    assert_eq!(text.chat(None, "x").unwrap(), "default");
    assert_eq!(text.render(&given, false).unwrap(), "tools");
    text.choose_template("rag").unwrap();
    assert_eq!(text.render(&given, false).unwrap(), "rag");
}
