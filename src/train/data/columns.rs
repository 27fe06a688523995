//! Columns that would change what is learnt and are not supported: in every form, and beside some.

use minijinja::Value;

/// Names of columns, and why a record with one of them is refused.
pub(super) type Refused = &'static [(&'static [&'static str], &'static str)];

/// Whatever the form.
pub(super) const ALWAYS: Refused = &[
    (
        &["chosen", "rejected", "chosen_response", "rejected_response", "kto_tag"],
        "it is a preference, and next tokens alone are trained on; take it away",
    ),
    (
        &["weight", "weights", "sample_weight", "loss_weight"],
        "rows cannot be weighted; take it away",
    ),
    (
        &[
            "input_ids",
            "labels",
            "attention_mask",
            "position_ids",
            "loss_mask",
            "completion_mask",
            "assistant_masks",
        ],
        "text is tokenized here; take it away",
    ),
    (
        &["images", "image", "videos", "video", "audios", "audio"],
        "only text is supported; take it away",
    ),
];

/// Beside an answer. Beside plain text these are facts about it, which the next token does not read.
const JUDGEMENT: (&[&str], &str) = (
    &["label", "score", "reward"],
    "it is a preference or a class, and next tokens alone are trained on; take it away",
);

/// What a chat template would be given, where none is applied.
const NO_TEMPLATE: (&[&str], &str) = (
    &["tools", "documents", "chat_template_kwargs", "functions", "available_tools"],
    "no chat template is applied to this form, which alone could read it",
);

/// Tools under names that no template is given.
const TOOLS: (&[&str], &str) =
    (&["functions", "available_tools"], "write the functions as `tools`, as JSON schemas");

/// What would stand before the answers.
const SYSTEM: &[&str] = &["system", "system_prompt", "system_message", "instructions"];
const MORE: (&[&str], &str) =
    (&["input", "history", "suffix"], "this form has no place for it: put it into the prompt");

/// Beside `text`.
pub(super) const TEXT: Refused = &[NO_TEMPLATE];

/// Beside `messages`.
pub(super) const MESSAGES: Refused = &[
    JUDGEMENT,
    TOOLS,
    (SYSTEM, "write the system message as the first of the list"),
    ANSWER,
    PLACED,
];

/// Beside `conversations`, whose `system` is honoured.
pub(super) const CONVERSATIONS: Refused = &[
    JUDGEMENT,
    TOOLS,
    (&["system_prompt", "system_message", "instructions"], "call the column `system`"),
    ANSWER,
    PLACED,
];

const ANSWER: (&[&str], &str) = (
    &["completion", "response", "answer", "target", "output"],
    "write the answer as the last message of the list",
);
const PLACED: (&[&str], &str) =
    (&["input", "history", "suffix"], "write it as messages of the list");

/// Beside `prompt` and `completion` that are strings.
pub(super) const PAIR: Refused =
    &[JUDGEMENT, NO_TEMPLATE, (SYSTEM, "put it into the prompt"), MORE];

/// Beside `prompt` and `completion` that are lists of messages.
pub(super) const MESSAGE_PAIR: Refused =
    &[JUDGEMENT, TOOLS, (SYSTEM, "write the system message as the first of `prompt`"), PLACED];

/// Beside `instruction`, `input` and `output`.
pub(super) const ALPACA: Refused = &[
    JUDGEMENT,
    NO_TEMPLATE,
    (SYSTEM, "it has no place in the prompt of Stanford Alpaca: use `messages`"),
    (&["history"], "it has no place in the prompt of Stanford Alpaca: use `messages`"),
];

/// Refuses a record that has one of these columns and something in it.
pub(super) fn refuse(columns: &[(String, Value)], refused: Refused) -> Result<(), String> {
    for (names, why) in refused {
        let given =
            |(name, value): &&(String, Value)| names.contains(&name.as_str()) && !is_empty(value);
        if let Some((name, _)) = columns.iter().find(given) {
            return Err(format!("the column `{name}` is not supported: {why}"));
        }
    }
    Ok(())
}

/// Whether a column holds nothing: tables write an empty list, object or null as a string, too.
fn is_empty(value: &Value) -> bool {
    let written = value.as_str().map(str::trim);
    value.len() == Some(0) || written.is_some_and(|text| ["", "[]", "{}", "null"].contains(&text))
}
