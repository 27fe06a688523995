//! Chat templates: the checkpoint's own, rendered as the transformers library renders them.
//!
//! ```text
//! template ─> rewritten for minijinja ─> rendered in Python's ways ─> text, and what is generated
//! ```

mod clock;
mod compare;
mod display;
mod escapes;
mod format;
mod mask;
mod methods;
mod parts;
mod python;
mod rewrite;
mod template;
mod templates;

use minijinja::{Value, value::ValueKind};
use serde::{Serialize, Serializer};

pub(super) use templates::Templates;

/// One message of a conversation: a dict with a `role`, and whatever else its template reads, in
/// the order in which it was written.
#[derive(Debug, Clone, PartialEq)]
pub struct Message {
    role: String,
    /// All keys, the role among them.
    value: Value,
}

impl Message {
    /// What `role` says.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        let role = role.into();
        let pairs = [("role", role.clone()), ("content", content.into())];
        Self { value: Value::from_pairs(pairs), role }
    }

    /// A message of these keys; the error says why it is none.
    pub(crate) fn from_value(value: Value) -> Result<Self, String> {
        if value.kind() != ValueKind::Map {
            return Err(format!("is no object but a {}", value.kind()));
        }
        let role = value.get_attr("role").unwrap_or_default();
        let role = role.as_str().ok_or("has no `role` that is a string")?.to_string();
        Ok(Self { role, value })
    }

    /// Who speaks; which roles there are is the template's to say.
    pub fn role(&self) -> &str {
        &self.role
    }

    /// Whether its content is a list that a text shows as such, of a template that knows only strings.
    fn is_shown_in(&self, text: &str) -> bool {
        let content = self.content();
        content.kind() == ValueKind::Seq
            && display::repr(&content).is_ok_and(|shown| text.contains(&shown))
    }

    /// What it says: mostly a string; undefined if it says nothing.
    fn content(&self) -> Value {
        self.value.get_attr("content").unwrap_or_default()
    }

    /// Whether it has no content, or an empty one.
    pub(crate) fn says_nothing(&self) -> bool {
        let content = self.content();
        content.is_undefined() || content.is_none() || content.len() == Some(0)
    }

    /// The names of its keys, in order.
    pub(crate) fn keys(&self) -> impl Iterator<Item = String> {
        self.value.try_iter().into_iter().flatten().map(|key| key.to_string())
    }

    /// The same without the key `name`.
    pub(crate) fn without(&self, name: &str) -> Self {
        Self { value: Value::from_pairs(self.others(name)), role: self.role.clone() }
    }

    /// Its keys but the one called `name`, with their values.
    fn others(&self, name: &str) -> impl Iterator<Item = (String, Value)> {
        let pair = |key: String| self.value.get_attr(&key).ok().map(|value| (key, value));
        self.keys().filter(move |key| key != name).filter_map(pair)
    }

    /// The same, saying something else.
    fn saying(&self, content: Value) -> Self {
        let content = ("content".to_string(), content);
        let value = Value::from_pairs(self.others("content").chain([content]));
        Self { value, role: self.role.clone() }
    }

    /// What transformers gives a template of it: no keys that are null, and what was thought under
    /// each of its names.
    fn normal(&self) -> Value {
        const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];
        let keys = self.value.try_iter().into_iter().flatten();
        let pair = |key: Value| self.value.get_item(&key).ok().map(|value| (key, value));
        let mut pairs: Vec<(Value, Value)> =
            keys.filter_map(pair).filter(|(_, value)| !value.is_none()).collect();
        let named = |name: &str| {
            let found = pairs.iter().find(|(key, _)| key.as_str() == Some(name));
            found.map(|(_, value)| value.clone())
        };
        if let Some(thought) = REASONING.into_iter().find_map(named) {
            if named("thinking").is_none() {
                pairs.insert(0, (Value::from("thinking"), thought.clone()));
            }
            pairs.push((Value::from("reasoning_content"), thought));
        }
        Value::from_pairs(pairs)
    }
}

impl Serialize for Message {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.value.serialize(serializer)
    }
}

/// A conversation, and what else its template is given.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Chat {
    /// Who says what, in turn.
    pub messages: Vec<Message>,
    /// The functions that the assistant may call, as JSON schemas; a list.
    pub(crate) tools: Option<Value>,
    /// What it may look up; a list.
    pub(crate) documents: Option<Value>,
    /// Further variables of the template, by name.
    pub(crate) arguments: Vec<(String, Value)>,
}

impl Chat {
    /// A conversation of these messages alone.
    pub fn new(messages: impl Into<Vec<Message>>) -> Self {
        Self { messages: messages.into(), ..Self::default() }
    }

    /// The same with the message of this index saying something else.
    pub(crate) fn saying(&self, index: usize, content: impl Into<Value>) -> Self {
        let mut chat = self.clone();
        if let Some(message) = chat.messages.get_mut(index) {
            *message = message.saying(content.into());
        }
        chat
    }

    /// The same with other messages.
    pub(crate) fn with(&self, messages: &[Message]) -> Self {
        Self { messages: messages.to_vec(), ..self.clone() }
    }
}
