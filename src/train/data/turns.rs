//! The messages of a record: OpenAI's with `role`, and ShareGPT's with `from` and `value`.

use std::collections::BTreeSet;

use minijinja::{Value, value::ValueKind};

use crate::text::Message;

/// A message, and whether the record says that it counts.
#[derive(Debug, PartialEq)]
pub(super) struct Turn {
    pub(super) message: Message,
    pub(super) counts: Option<bool>,
}

/// Who speaks in ShareGPT's words, and in a template's.
const SPEAKERS: [(&[&str], &str); 4] = [
    (&["human", "user"], "user"),
    (&["gpt", "assistant", "chatgpt", "bing", "bard", "model"], "assistant"),
    (&["system"], "system"),
    (&["tool", "observation", "function_response"], "tool"),
];

/// Keys of a message that say whether it counts.
const MARKS: [&str; 3] = ["weight", "train", "training"];

/// Keys of a message that would change what counts in a way that is not supported.
const REFUSED: [&str; 6] = ["loss", "loss_weight", "loss_mask", "mask", "train_detail", "masked"];

impl Turn {
    /// What the system says.
    pub(super) fn system(text: &str) -> Self {
        Self { message: Message::new("system", text), counts: None }
    }
}

/// The messages of `list`, the column `name`; keys that change nothing are added to `ignored`.
pub(super) fn read(
    list: &Value,
    name: &str,
    ignored: &mut BTreeSet<String>,
) -> Result<Vec<Turn>, String> {
    let items: Vec<Value> = match list.kind() {
        ValueKind::Seq => list.try_iter().map_err(|e| e.to_string())?.collect(),
        kind => return Err(format!("`{name}` is no list of messages but a {kind}")),
    };
    if items.is_empty() {
        return Err(format!("`{name}` is empty"));
    }
    let turn =
        |(at, item)| turn(item, name, ignored).map_err(|why: String| format!("{name}[{at}]{why}"));
    items.iter().enumerate().map(turn).collect()
}

/// One message; the error begins with what stands after its place.
fn turn(item: &Value, name: &str, ignored: &mut BTreeSet<String>) -> Result<Turn, String> {
    if item.kind() != ValueKind::Map {
        return Err(format!(": is no object but a {}", item.kind()));
    }
    let mut keys = vec![];
    for key in item.try_iter().map_err(|e| format!(": {e}"))? {
        let value = item.get_item(&key).map_err(|e| format!(": {e}"))?;
        keys.push((key.to_string(), value));
    }
    let given = |name: &str| {
        keys.iter().find(|(key, value)| key == name && !value.is_none()).map(|(_, value)| value)
    };
    if let Some(key) = REFUSED.into_iter().find(|key| given(key).is_some()) {
        return Err(format!(
            ": the key `{key}` is not supported: mark a message by `weight` 0 or 1"
        ));
    }
    let marks = MARKS.into_iter().filter_map(|key| Some((key, given(key)?)));
    let mut counts = None;
    for (key, value) in marks {
        let mark = mark(key, value)?;
        if counts.is_some_and(|before| before != mark) {
            return Err(format!(".{key}: contradicts another mark of the message"));
        }
        counts = Some(mark);
    }
    let message = match (given("role"), given("from"), given("value")) {
        (None, Some(from), Some(value)) => {
            let known = |key: &str| ["from", "value"].contains(&key) || MARKS.contains(&key);
            let others = keys.iter().filter(|(key, value)| !known(key) && !value.is_none());
            ignored.extend(others.map(|(key, _)| format!("{name}[].{key}")));
            sharegpt(from, value)?
        }
        _ => {
            let shown = keys.iter().filter(|(key, _)| !MARKS.contains(&key.as_str())).cloned();
            let pair = |(key, value): (String, Value)| match key.as_str() {
                "content" => Ok((key, content(value)?)),
                _ => Ok((key, value)),
            };
            let pairs = shown.map(pair).collect::<Result<Vec<_>, String>>()?;
            Message::from_value(Value::from_pairs(pairs)).map_err(|why| format!(": {why}"))?
        }
    };
    if counts == Some(true) && message.role() != "assistant" {
        return Err(format!(": a message of role `{}` is marked to be learnt", message.role()));
    }
    Ok(Turn { message, counts })
}

/// Whether a mark says that its message counts.
fn mark(key: &str, value: &Value) -> Result<bool, String> {
    match (value.kind(), f64::try_from(value.clone())) {
        (ValueKind::Bool, _) => Ok(value.is_true()),
        (ValueKind::Number, Ok(0.0)) => Ok(false),
        (ValueKind::Number, Ok(1.0)) => Ok(true),
        _ => Err(format!(".{key}: is neither 0 nor 1")),
    }
}

fn sharegpt(from: &Value, value: &Value) -> Result<Message, String> {
    let from = from.as_str().ok_or(".from: is not a string")?;
    let text = value.as_str().ok_or(".value: is not a string")?;
    let speaker = SPEAKERS.iter().find(|(names, _)| names.contains(&from));
    match speaker {
        Some((_, role)) => Ok(Message::new(*role, text)),
        None if from == "function_call" => {
            Err(".from: a `function_call` is not taken apart: use `messages` with `tool_calls`"
                .into())
        }
        None => {
            let names: Vec<&str> = SPEAKERS.iter().flat_map(|(names, _)| *names).copied().collect();
            Err(format!(".from: `{from}` is none of {}", names.join(", ")))
        }
    }
}

/// What a message says: a string, nothing, or parts of text. A single part is its text.
fn content(value: Value) -> Result<Value, String> {
    if value.kind() != ValueKind::Seq {
        return match value.kind() {
            ValueKind::String | ValueKind::None => Ok(value),
            kind => Err(format!(".content: is neither a string nor a list of parts but a {kind}")),
        };
    }
    let parts: Vec<Value> = value.try_iter().map_err(|e| e.to_string())?.collect();
    for (at, part) in parts.iter().enumerate() {
        let key = |name: &str| part.get_attr(name).unwrap_or_default();
        let kind = key("type");
        match kind.as_str() {
            Some("text") if key("text").as_str().is_some() => (),
            Some("text") => return Err(format!(".content[{at}]: has no `text` that is a string")),
            Some(other) => {
                return Err(format!(
                    ".content[{at}]: is of type `{other}`; only text is supported"
                ));
            }
            None => return Err(format!(".content[{at}]: has no `type`")),
        }
    }
    match &parts[..] {
        [one] => Ok(one.get_attr("text").unwrap_or_default()),
        _ => Ok(value),
    }
}
