//! The messages of a record: OpenAI's with `role` and `content`, and ShareGPT's with `from` and
//! `value`.

use std::borrow::Cow;

use minijinja::{Value, value::ValueKind};

use crate::text::Message;

/// The keys of one message, in order.
type Keys = Vec<(String, Value)>;

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

/// Keys of a message that would change what is learnt in a way that is not supported, and what to
/// write instead.
const REFUSED: [(&[&str], &str); 2] = [
    (
        &["loss", "loss_weight", "loss_mask", "mask", "train_detail", "masked"],
        "mark a message by `weight` 0 or 1",
    ),
    (&["function_call"], "write the call as `tool_calls`"),
];

/// Keys in ShareGPT's words, and in a template's.
const NAMES: [(&str, &str); 2] = [("from", "role"), ("value", "content")];

impl Turn {
    /// What the system says.
    pub(super) fn system(text: &str) -> Self {
        Self { message: Message::new("system", text), counts: None }
    }
}

/// The messages of `list`, the column `name`.
pub(super) fn read(list: &Value, name: &str) -> Result<Vec<Turn>, String> {
    let items: Vec<Value> = match list.kind() {
        ValueKind::Seq => list.try_iter().map_err(|e| e.to_string())?.collect(),
        kind => return Err(format!("`{name}` is no list of messages but a {kind}")),
    };
    if items.is_empty() {
        return Err(format!("`{name}` is empty"));
    }
    let turn = |(at, item)| turn(item).map_err(|why: String| format!("{name}[{at}]{why}"));
    items.iter().enumerate().map(turn).collect()
}

/// One message; the error begins with what stands after its place.
fn turn(item: &Value) -> Result<Turn, String> {
    let (keys, counts) = marked(keys(item)?)?;
    let given = |name: &str| keys.iter().any(|(key, _)| key == name);
    for (names, instead) in REFUSED {
        if let Some(key) = names.iter().find(|key| given(key)) {
            return Err(format!(": the key `{key}` is not supported: {instead}"));
        }
    }
    let pairs: Vec<(Cow<str>, Value)> =
        keys.iter().map(|(key, value)| pair(key, value, &given)).collect::<Result<_, _>>()?;
    says_something(&pairs)?;
    let message =
        Message::from_value(Value::from_pairs(pairs)).map_err(|why| format!(": {why}"))?;
    if counts == Some(true) && message.role() != "assistant" {
        return Err(format!(": a message of role `{}` is marked to be learnt", message.role()));
    }
    Ok(Turn { message, counts })
}

/// The keys of a message, without those that are null: these are none.
fn keys(item: &Value) -> Result<Keys, String> {
    if item.kind() != ValueKind::Map {
        return Err(format!(": is no object but a {}", item.kind()));
    }
    let mut keys = vec![];
    for key in item.try_iter().map_err(|e| format!(": {e}"))? {
        let value = item.get_item(&key).map_err(|e| format!(": {e}"))?;
        if !value.is_none() {
            keys.push((key.to_string(), value));
        }
    }
    Ok(keys)
}

/// Takes the marks off the keys of a message: the others, and what the marks say.
fn marked(keys: Keys) -> Result<(Keys, Option<bool>), String> {
    let (marks, others): (Vec<_>, Vec<_>) =
        keys.into_iter().partition(|(key, _)| MARKS.contains(&key.as_str()));
    let mut counts = None;
    for (key, value) in marks {
        let mark = mark(&key, &value)?;
        if counts.is_some_and(|before| before != mark) {
            return Err(format!(".{key}: contradicts another mark of the message"));
        }
        counts = Some(mark);
    }
    Ok((others, counts))
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

/// A key and its value in a template's words; `given` says which keys the message has.
fn pair<'a>(
    key: &'a str,
    value: &Value,
    given: &impl Fn(&str) -> bool,
) -> Result<(Cow<'a, str>, Value), String> {
    // Beside the template's own word, the other is a key like any other.
    let known = NAMES.iter().find(|(name, own)| *name == key && !given(own));
    let own = known.map_or(key, |(_, own)| own);
    let value = match own {
        "role" if key == "from" => speaker(value)?,
        "content" => content(key, value.clone())?,
        _ => value.clone(),
    };
    Ok((own.into(), value))
}

/// A template's word for who speaks in ShareGPT's.
fn speaker(from: &Value) -> Result<Value, String> {
    let from = from.as_str().ok_or(".from: is not a string")?;
    match SPEAKERS.iter().find(|(names, _)| names.contains(&from)) {
        Some((_, role)) => Ok(Value::from(*role)),
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

/// Refuses a message whose text stands where no template looks for it, or that has none.
fn says_something(pairs: &[(Cow<str>, Value)]) -> Result<(), String> {
    let given = |name: &str| pairs.iter().any(|(key, value)| key == name && value.len() != Some(0));
    match pairs.iter().any(|(key, _)| key == "content") {
        true => Ok(()),
        false if given("text") => Err(".text: no template reads it: call the key `content`".into()),
        false if given("tool_calls") => Ok(()),
        false => Err(": has neither `content` nor `tool_calls`".into()),
    }
}

/// What the key `name` says: a string, or parts of text. A single part is its text.
fn content(name: &str, value: Value) -> Result<Value, String> {
    if value.kind() != ValueKind::Seq {
        return match value.kind() {
            ValueKind::String => Ok(value),
            kind => Err(format!(".{name}: is neither a string nor a list of parts but a {kind}")),
        };
    }
    let parts: Vec<Value> = value.try_iter().map_err(|e| e.to_string())?.collect();
    for (at, part) in parts.iter().enumerate() {
        let key = |name: &str| part.get_attr(name).unwrap_or_default();
        let why = match key("type").as_str() {
            Some("text") if key("text").as_str().is_some() => continue,
            Some("text") => "has no `text` that is a string".into(),
            Some(other) => format!("is of type `{other}`; only text is supported"),
            None => "has no `type`".into(),
        };
        return Err(format!(".{name}[{at}]: {why}"));
    }
    match &parts[..] {
        [one] => Ok(one.get_attr("text").unwrap_or_default()),
        _ => Ok(value),
    }
}
