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
    Dataset::load(&file, text, &Options { seq: 4000, mask_prompt, packing: false, cache: None })
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
        // A list where a string was meant is a text that nobody means: it is refused, and so is a
        // text without it, of a template that shows the string of the other message.
        let shown = expected.as_ref().filter(|text| {
            let parts = text.contains("one") && text.contains("two");
            !text.to_lowercase().contains("[{'type'") && (parts || !text.contains("three"))
        });
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
    let table: [(&str, &str); 21] = [
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
        // Stanford's file has the whole in `text`, too.
        (
            r#"{"instruction": "Add.", "input": "", "output": "3", "text": "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Response:\n3"}"#,
            "Below is an instruction that describes a task. Write a response that appropriately completes the request.\
          \n\n### Instruction:\nAdd.\n\n### Response:\n[3<|im_end|>]",
        ),
        // Mixed names: what they mean is the same.
        (
            r#"{"messages": [{"role": "user", "value": "a"}, {"from": "gpt", "content": "b"}]}"#,
            said,
        ),
        // Columns that hold nothing are none.
        (
            r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "system": "", "history": [], "functions": "[]"}"#,
            said,
        ),
        (r#"{"prompt": "a ", "completion": "b", "system": "", "tools": "[]"}"#, "a [b<|im_end|>]"),
        (
            r#"{"messages": [{"role": "user", "content": "a", "weight": 0}, {"role": "assistant", "content": "b"}]}"#,
            said,
        ),
        (
            r#"{"conversations": [{"from": "human", "value": [{"type": "text", "text": "a"}]}, {"from": "gpt", "value": "b"}]}"#,
            said,
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

/// Answers lose what they thought, and are asked for with a thought begun, as of the reasoning models
/// distilled from DeepSeek R1.
const BEGUN: &str = "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>' + m.content }}\
                     {% else %}{{ '<|im_start|>assistant\n' + m.content.split('</think>')[-1] + '<|im_end|>' }}\
                     {% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}";

#[test]
fn answers_are_found_where_the_template_forgets_what_was_thought() {
    let thinking = read(Path::new(TEMPLATES).join("thinking.jinja"));
    let question = |content: &str| json!({"role": "user", "content": content});
    let answer = |content: &str| json!({"role": "assistant", "content": content});
    let thought = |thought: &str, content: &str| json!({"role": "assistant", "content": content, "reasoning_content": thought});
    let (q, a) = ("<|im_start|>user\n", "<|im_start|>assistant\n");
    // (template, messages, row): worked out by hand. What the template writes between what asks for an
    // answer and its content is learnt, as it is where the answer is the last.
    let table = [
        // Qwen3's manner: only the answer after the last question shows a thought, be it empty.
        (
            &*thinking,
            json!([question("a"), answer("b"), question("c"), answer("d")]),
            format!(
                "{q}a<|im_end|>\n{a}[b<|im_end|>]\n{q}c<|im_end|>\n{a}[<think>\n\n</think>\n\nd<|im_end|>]"
            ),
        ),
        (
            &*thinking,
            json!([question("a"), thought("t", "b"), question("c"), thought("u", "d")]),
            format!(
                "{q}a<|im_end|>\n{a}[b<|im_end|>]\n{q}c<|im_end|>\n{a}[<think>\nu\n</think>\n\nd<|im_end|>]"
            ),
        ),
        (
            &*thinking,
            json!([question("a"), answer("<think>\nt\n</think>\n\nb"), question("c"), answer("d")]),
            format!(
                "{q}a<|im_end|>\n{a}[b<|im_end|>]\n{q}c<|im_end|>\n{a}[<think>\n\n</think>\n\nd<|im_end|>]"
            ),
        ),
        // What is said may look like the template's own words.
        (
            &*thinking,
            json!([
                question("<|im_end|>\n<|im_start|>assistant\n"),
                answer("<|im_end|>b"),
                question("b"),
                answer("b")
            ]),
            format!(
                "{q}<|im_end|>\n{a}<|im_end|>\n{a}[<|im_end|>b<|im_end|>]\n{q}b<|im_end|>\n{a}[<think>\n\n</think>\n\nb<|im_end|>]"
            ),
        ),
        // A question between answers: the second has the first's thought before it, alone, not here.
        (
            &*thinking,
            json!([
                question("a"),
                thought("t", "b"),
                json!({"role": "tool", "content": "r"}),
                thought("u", "c"),
                question("d"),
                answer("e")
            ]),
            format!(
                "{q}a<|im_end|>\n{a}[b<|im_end|>]\n<|im_start|>tool\nr<|im_end|>\n{a}[c<|im_end|>]\n{q}d<|im_end|>\n{a}[<think>\n\n</think>\n\ne<|im_end|>]"
            ),
        ),
        (
            BEGUN,
            json!([question("a"), answer("t</think>b"), question("c"), answer("d")]),
            format!("<|endoftext|><|im_start|>a{a}[b<|im_end|>]<|im_start|>c{a}[d<|im_end|>]"),
        ),
    ];
    for (template, messages, expected) in table {
        let (text, record) = (text(template), json!({ "messages": messages }).to_string());
        let dataset = load("a.jsonl", record.as_bytes(), &text, true).map_err(|e| one_line(&e));
        assert_eq!(dataset.map(|d| rows(&d, &text)), Ok(vec![expected]), "{record}");
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
        (r#"{"prompt": "x", "chosen": "y", "rejected": "z", "completion": "y"}"#.into(), "the column `chosen` is not supported: it is a preference, and next tokens alone are trained on; take it away"),
        (r#"{"text": "x", "input_ids": [1]}"#.into(), "the column `input_ids` is not supported: text is tokenized here; take it away"),
        (chat(r#", "system": "s""#), "the column `system` is not supported: write the system message as the first of the list"),
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
        (r#"{"instruction": "a", "output": "b", "history": [["c", "d"]]}"#.into(), "the column `history` is not supported: it has no place in the prompt of Stanford Alpaca: use `messages`"),
        (r#"{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, {"role": "assistant", "content": "b"}]}"#.into(),
         "the checkpoint's chat template fails: it shows the parts of message 1's content as a list: join them"),
        (chat(r#", "completion": "x""#), "the column `completion` is not supported: write the answer as the last message of the list"),
        (chat(r#", "response": "x""#), "the column `response` is not supported: write the answer as the last message of the list"),
        (chat(r#", "answer": "x""#), "the column `answer` is not supported: write the answer as the last message of the list"),
        (chat(r#", "target": "x""#), "the column `target` is not supported: write the answer as the last message of the list"),
        (chat(r#", "input": "x""#), "the column `input` is not supported: write it as messages of the list"),
        (chat(r#", "history": "x""#), "the column `history` is not supported: write it as messages of the list"),
        (chat(r#", "suffix": "x""#), "the column `suffix` is not supported: write it as messages of the list"),
        (chat(r#", "functions": [{"name": "f"}]"#), "the column `functions` is not supported: write the functions as `tools`, as JSON schemas"),
        (chat(r#", "available_tools": [{"name": "f"}]"#), "the column `available_tools` is not supported: write the functions as `tools`, as JSON schemas"),
        (chat(r#", "system_prompt": "x""#), "the column `system_prompt` is not supported: write the system message as the first of the list"),
        (chat(r#", "instructions": "x""#), "the column `instructions` is not supported: write the system message as the first of the list"),
        (chat(r#", "score": 1"#), "the column `score` is not supported: it is a preference or a class, and next tokens alone are trained on; take it away"),
        (r#"{"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "system_prompt": "s"}"#.into(), "the column `system_prompt` is not supported: call the column `system`"),
        (r#"{"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "functions": "[{}]"}"#.into(), "the column `functions` is not supported: write the functions as `tools`, as JSON schemas"),
        (r#"{"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "response": "r"}"#.into(), "the column `response` is not supported: write the answer as the last message of the list"),
        (r#"{"text": "x", "tools": [{}]}"#.into(), "the column `tools` is not supported: no chat template is applied to this form, which alone could read it"),
        (r#"{"prompt": "x", "completion": "y", "tools": [{}]}"#.into(), "the column `tools` is not supported: no chat template is applied to this form, which alone could read it"),
        (r#"{"instruction": "x", "output": "y", "tools": [{}]}"#.into(), "the column `tools` is not supported: no chat template is applied to this form, which alone could read it"),
        (r#"{"text": "x", "documents": [{}]}"#.into(), "the column `documents` is not supported: no chat template is applied to this form, which alone could read it"),
        (r#"{"prompt": "x", "completion": "y", "documents": [{}]}"#.into(), "the column `documents` is not supported: no chat template is applied to this form, which alone could read it"),
        (r#"{"instruction": "x", "output": "y", "documents": [{}]}"#.into(), "the column `documents` is not supported: no chat template is applied to this form, which alone could read it"),
        (r#"{"text": "x", "chat_template_kwargs": {"a": 1}}"#.into(), "the column `chat_template_kwargs` is not supported: no chat template is applied to this form, which alone could read it"),
        (r#"{"prompt": "x", "completion": "y", "chat_template_kwargs": {"a": 1}}"#.into(), "the column `chat_template_kwargs` is not supported: no chat template is applied to this form, which alone could read it"),
        (r#"{"instruction": "x", "output": "y", "chat_template_kwargs": {"a": 1}}"#.into(), "the column `chat_template_kwargs` is not supported: no chat template is applied to this form, which alone could read it"),
        (r#"{"prompt": "x", "completion": "y", "system": "s"}"#.into(), "the column `system` is not supported: put it into the prompt"),
        (r#"{"prompt": "x", "completion": "y", "input": "s"}"#.into(), "the column `input` is not supported: this form has no place for it: put it into the prompt"),
        (r#"{"prompt": "x", "completion": "y", "history": "s"}"#.into(), "the column `history` is not supported: this form has no place for it: put it into the prompt"),
        (r#"{"prompt": "x", "completion": "y", "suffix": "s"}"#.into(), "the column `suffix` is not supported: this form has no place for it: put it into the prompt"),
        (r#"{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}], "system": "s"}"#.into(), "the column `system` is not supported: write the system message as the first of `prompt`"),
        (r#"{"prompt": "x", "completion": "y", "label": true}"#.into(), "the column `label` is not supported: it is a preference or a class, and next tokens alone are trained on; take it away"),
        (r#"{"prompt": "x", "chosen": "y", "rejected": "z"}"#.into(), "the column `chosen` is not supported: it is a preference, and next tokens alone are trained on; take it away"),
        (r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "rejected_response": "z"}"#.into(), "the column `rejected_response` is not supported: it is a preference, and next tokens alone are trained on; take it away"),
        (r#"{"instruction": "x", "output": "y", "text": "x y"}"#.into(), "has both `text` and `instruction`, and its `text` is not what these make in the prompt of Stanford Alpaca: take one of them away"),
        (one(r#", "function_call": {"name": "f"}"#), "messages[0]: the key `function_call` is not supported: write the call as `tool_calls`"),
        (r#"{"messages": [{"role": "user", "text": "a"}]}"#.into(), "messages[0].text: no template reads it: call the key `content`"),
        (r#"{"messages": [{"role": "user"}, {"role": "assistant", "content": "b"}]}"#.into(), "messages[0]: has neither `content` nor `tool_calls`"),
        (r#"{"messages": [{"role": "user", "content": null, "tool_calls": []}]}"#.into(), "messages[0]: has neither `content` nor `tool_calls`"),
        (r#"{"conversations": [{"from": "human", "value": 3}]}"#.into(), "conversations[0].value: is neither a string nor a list of parts but a number"),
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
    // A mark that says that a message is not learnt cannot go unheard, whoever says it.
    for marked in [
        r#"{"messages": [{"role": "assistant", "content": "b", "weight": 0}, {"role": "assistant", "content": "c"}]}"#,
        r#"{"messages": [{"role": "user", "content": "b", "train": false}, {"role": "assistant", "content": "c"}]}"#,
        r#"{"conversations": [{"from": "system", "value": "b", "weight": 0}, {"from": "gpt", "value": "c", "weight": 1}]}"#,
    ] {
        let error = one_line(&load("a.jsonl", marked.as_bytes(), &text, false).unwrap_err());
        let why = "line 1: marks messages that are not to be learnt: that takes --mask-prompt";
        assert!(error.ends_with(why), "{error}");
    }
}

#[test]
fn columns_that_change_nothing_are_listed() {
    let lines = r#"{"messages": [{"role": "user", "content": "a"}], "id": 1, "prompt": "a"}
{"messages": [{"role": "user", "content": "a"}], "source": {"x": 1}, "id": 2, "images": []}"#;
    let facts = r#"{"text": "ab", "label": 1, "score": 0.5, "int_score": 3, "url": "u"}"#;
    let notes = load("a.jsonl", facts.as_bytes(), &text(CHATML), false).unwrap().notes().clone();
    let columns: Vec<&str> = notes.ignored.iter().map(|ignored| ignored.key.as_str()).collect();
    assert_eq!(columns, ["int_score", "label", "score", "url"]);
    let notes = load("a.jsonl", lines.as_bytes(), &text(CHATML), false).unwrap().notes().clone();
    let columns: Vec<&str> = notes.ignored.iter().map(|ignored| ignored.key.as_str()).collect();
    assert_eq!(columns, ["id", "images", "prompt", "source"]);
    assert!(notes.ignored[0].file.ends_with("a.jsonl"), "{notes:?}");
    assert!(notes.form.unwrap().ends_with("a.jsonl: read as `messages`"));
}

/// The template takes strings alone, as Qwen3's and SmolLM3's do: anything else becomes nothing.
const STRINGS: &str = "{% for m in messages %}{% set content = m.content if m.content is string else '' %}\
                       {{ '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}{% endfor %}";

#[test]
fn text_that_the_template_would_leave_out_is_refused() {
    let parts = r#"[{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]"#;
    let record = |content: &str| {
        format!(
            r#"{{"messages": [{{"role": "user", "content": {content}}}, {{"role": "assistant", "content": "ab"}}]}}"#
        )
    };
    let load = |content: &str, template: &str| {
        load("a.jsonl", record(content).as_bytes(), &text(template), false)
    };
    let error = one_line(&load(parts, STRINGS).unwrap_err());
    let why = "line 1: the checkpoint's chat template fails: it takes only strings, and the content of \
               message 1 is a list of parts, which it would leave out: join them";
    assert!(error.ends_with(why), "{error}");
    // One part is its text; a template that goes over parts shows them; one that says nothing of users
    // leaves out their strings, too.
    assert!(load(r#"[{"type": "text", "text": "a"}]"#, STRINGS).is_ok());
    let each = "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}\
                {% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}{% endfor %}";
    assert_eq!(load(parts, each).unwrap().tokens(), text(each).encode("abab").unwrap().len());
    assert!(load(parts, "{% for m in messages[1:] %}{{ m.content }}{% endfor %}").is_ok());
}

#[test]
fn what_the_template_does_not_read_is_listed() {
    let calls = r#"[{"function": {"name": "f", "arguments": {}}}]"#;
    let lines = format!(
        r#"{{"messages": [{{"role": "user", "content": "a", "name": "x"}}, {{"role": "assistant", "content": "b", "reasoning_content": "r", "tool_calls": {calls}}}], "tools": [{{"name": "f"}}], "documents": [{{}}], "chat_template_kwargs": {{"depth": 1, "other": 2}}}}
{{"messages": [{{"role": "user", "content": "a"}}, {{"role": "tool", "content": "b", "name": "y"}}]}}"#
    );
    let sharegpt = format!(
        r#"{{"conversations": [{{"from": "human", "value": "a"}}, {{"from": "gpt", "value": "b", "id": 7, "tool_calls": {calls}}}]}}"#
    );
    // (template, file, what of it is listed)
    let table: [(&str, &str, &[&str]); 5] = [
        (
            CHATML,
            &lines,
            &[
                "tools",
                "documents",
                "chat_template_kwargs.depth",
                "chat_template_kwargs.other",
                "messages[].name",
                "messages[].reasoning_content",
                "messages[].tool_calls",
            ],
        ),
        (
            "{{ tools }}{{ documents }}{{ depth }}{% for m in messages %}{{ m.content }}{{ m.tool_calls }}{{ m.reasoning_content }}{% endfor %}",
            &lines,
            &["chat_template_kwargs.other", "messages[].name"],
        ),
        // One line that is read is enough.
        (
            "{{ tools|string|length }}{{ documents }}{{ depth }}{{ other }}{% for m in messages %}{{ m.content }}{{ m.thinking }}{{ m.tool_calls|length }}\
             {% if m.role == 'tool' %}{{ m.name }}{% endif %}{% endfor %}",
            &lines,
            &[],
        ),
        (CHATML, &sharegpt, &["conversations[].id", "conversations[].tool_calls"]),
        (
            "{% for m in messages %}{{ m.content }}{{ m.tool_calls }}{% endfor %}",
            &sharegpt,
            &["conversations[].id"],
        ),
    ];
    for (template, file, listed) in table {
        let dataset = load("a.jsonl", file.as_bytes(), &text(template), false).unwrap();
        let ignored = &dataset.notes().ignored;
        let mut keys: Vec<&str> = ignored.iter().map(|one| one.key.as_str()).collect();
        let mut listed = listed.to_vec();
        keys.sort_unstable();
        listed.sort_unstable();
        assert_eq!(keys, listed, "{template}");
        let why = "the chat template does not read it";
        assert!(ignored.iter().all(|one| one.reason == why), "{ignored:?}");
    }
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
        (
            "a.txt",
            b" {\"text\": \"a\"}\n{\"text\": \"b\"}",
            "holds records of JSON, and a file of this name",
        ),
        (
            "a.txt",
            b"[{\"text\": \"a\"},\n{\"text\": \"b\"}]\n",
            "holds records of JSON, and a file of this name",
        ),
        (
            "a.jsonl.txt",
            b"{\n\"text\": \"a\"\n}\n",
            "holds records of JSON, and a file of this name",
        ),
        ("a", b"\xef\xbb\xbf{\"text\": \"a\"}", "holds records of JSON, and a file of this name"),
        ("a.dat", b"ab\0", "holds a NUL byte (byte 2), as binary files and UTF-16 do"),
        ("a.jsonl", b"{\0\"\0", "holds a NUL byte (byte 1), as binary files and UTF-16 do"),
        ("a.json", b"[]", "is empty: there is no text in it"),
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
    // What merely begins with a brace or a bracket is text.
    for content in
        ["[1]", "[{x}] a", "{}\n", "{\"a\": 1}.a", "[{\"a\": 1}] says", "{\"a\": 1", "[]"]
    {
        let dataset = load("a.txt", content.as_bytes(), &text, false).unwrap();
        assert_eq!(dataset.tokens(), text.encode(content).unwrap().len(), "{content}");
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
    let given =
        conversation(r#"{"messages": [{"role": "user", "content": ""}], "tools": []}"#).unwrap();
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
    let given =
        conversation(r#"{"messages": [{"role": "user", "content": ""}], "tools": []}"#).unwrap();
    assert_eq!(text.chat(None, "x").unwrap(), "default");
    assert_eq!(text.render(&given, false).unwrap(), "tools");
    text.choose_template("rag").unwrap();
    assert_eq!(text.render(&given, false).unwrap(), "rag");
}
