//! A GGUF's metadata, read with types. It remembers what was read, so that a key which nobody
//! honours can be refused.

use std::{
    cell::RefCell,
    collections::{BTreeSet, HashMap},
    path::Path,
};

use candle_core::quantized::gguf_file::Value;
use serde_json::Value as Json;

use crate::error::{Error, Result};

/// The key-value pairs of one file.
pub(crate) struct Metadata<'a> {
    file: &'a Path,
    values: &'a HashMap<String, Value>,
    read: RefCell<BTreeSet<String>>,
    /// Those of them that turned out to ask for nothing.
    idle: RefCell<BTreeSet<String>>,
}

impl<'a> Metadata<'a> {
    pub(crate) fn new(file: &'a Path, values: &'a HashMap<String, Value>) -> Self {
        Self { file, values, read: RefCell::default(), idle: RefCell::default() }
    }

    /// The file that holds them.
    pub(crate) fn file(&self) -> &'a Path {
        self.file
    }

    /// The keys that there are, in no order.
    pub(crate) fn keys(&self) -> impl Iterator<Item = &'a str> {
        self.values.keys().map(String::as_str)
    }

    /// The file's name, as errors give it.
    pub(crate) fn origin(&self) -> String {
        self.file.display().to_string()
    }

    /// An error that names the file and the key.
    pub(crate) fn bad(&self, key: &str, why: impl Into<String>) -> anyhow::Error {
        Error::Config { origin: self.origin(), key: key.into(), why: why.into() }.into()
    }

    /// An error for a key that must be there.
    pub(crate) fn missing(&self, key: &str) -> anyhow::Error {
        self.bad(key, "is missing")
    }

    fn get(&self, key: &str) -> Option<&'a Value> {
        let value = self.values.get(key)?;
        self.read.borrow_mut().insert(key.into());
        Some(value)
    }

    /// The value that `read` makes of the key's; what it makes nothing of is no `kind`.
    fn typed<T>(
        &self,
        key: &str,
        kind: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let value = self.get(key).map(|value| read(value).ok_or(value));
        value.transpose().map_err(|_| self.bad(key, format!("is not {kind}")))
    }

    pub(crate) fn text(&self, key: &str) -> Result<Option<&'a str>> {
        self.typed(key, "a string", as_text)
    }

    pub(crate) fn integer(&self, key: &str) -> Result<Option<usize>> {
        self.typed(key, "a count", as_count)
    }

    pub(crate) fn float(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a float", as_float)
    }

    pub(crate) fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", as_flag)
    }

    /// A number, a flag or a string, whichever it is.
    pub(crate) fn scalar(&self, key: &str) -> Result<Option<Json>> {
        self.typed(key, "a number, a string or true or false", |value| match value {
            Value::Bool(on) => Some(Json::from(*on)),
            Value::String(text) => Some(Json::from(text.as_str())),
            Value::I32(n) => Some(Json::from(*n)),
            other => as_float(other).map(Json::from).or_else(|| as_count(other).map(Json::from)),
        })
    }

    pub(crate) fn texts(&self, key: &str) -> Result<Option<Vec<&'a str>>> {
        self.typed(key, "a list of strings", |value| list(value, as_text))
    }

    pub(crate) fn integers(&self, key: &str) -> Result<Option<Vec<usize>>> {
        self.typed(key, "a list of counts", |value| list(value, as_count))
    }

    pub(crate) fn floats(&self, key: &str) -> Result<Option<Vec<f64>>> {
        self.typed(key, "a list of floats", |value| list(value, as_float))
    }

    /// Which of `layers` a pattern picks: an answer for each, or a period whose last layer is the
    /// exception (none: all are picked).
    pub(crate) fn pattern(&self, key: &str, layers: usize) -> Result<Option<Vec<bool>>> {
        self.typed(key, "a period or a list of answers", |value| {
            list(value, as_flag).or_else(|| Some(every_but_last(as_count(value)?, layers)))
        })
    }

    /// Counts a key that was read among those that change nothing.
    pub(crate) fn ignore(&self, key: &str) {
        self.idle.borrow_mut().insert(key.into());
    }

    /// Refuses a key whose value, as a number (true is 1), is another than `harmless`.
    pub(crate) fn refuse_unless(&self, key: &str, harmless: f64) -> Result<()> {
        let Some(value) = self.get(key) else { return Ok(()) };
        let number = as_float(value)
            .or_else(|| as_count(value).map(|n| n as f64))
            .or_else(|| as_flag(value).map(|on| if on { 1.0 } else { 0.0 }));
        match number {
            Some(number) if number == harmless => {
                self.ignore(key);
                Ok(())
            }
            _ => Err(self.bad(key, format!("is {}, which is not supported", shown(value)))),
        }
    }

    /// The keys that nobody has read or that ask for nothing, sorted.
    pub(super) fn unused(&self) -> Vec<&'a str> {
        let (read, idle) = (self.read.borrow(), self.idle.borrow());
        let mut unread: Vec<&str> = self.values.keys().map(String::as_str).collect();
        unread.retain(|key| !read.contains(*key) || idle.contains(*key));
        unread.sort_unstable();
        unread
    }

    /// Refuses the first key that starts with `prefix` and that nobody has read; one after the
    /// prefix that is in `idle` changes nothing.
    pub(crate) fn refuse_unread(&self, prefix: &str, idle: &[&str]) -> Result<()> {
        let read = self.read.borrow();
        let unread = |key: &&String| {
            let rest = key.strip_prefix(prefix);
            rest.is_some_and(|rest| !idle.contains(&rest)) && !read.contains(*key)
        };
        match self.values.keys().filter(unread).min() {
            None => Ok(()),
            Some(key) => {
                let why = "is not supported, and may change what the model computes";
                Err(self.bad(key, why))
            }
        }
    }
}

/// Answers for `layers`: in each group of `period`, all but the last are picked.
pub(super) fn every_but_last(period: usize, layers: usize) -> Vec<bool> {
    (0..layers).map(|layer| period == 0 || layer % period < period - 1).collect()
}

fn as_text(value: &Value) -> Option<&str> {
    match value {
        Value::String(text) => Some(text),
        _ => None,
    }
}

fn as_count(value: &Value) -> Option<usize> {
    match *value {
        Value::I8(n) => usize::try_from(n).ok(),
        Value::I16(n) => usize::try_from(n).ok(),
        Value::I32(n) => usize::try_from(n).ok(),
        Value::I64(n) => usize::try_from(n).ok(),
        _ => value.to_u64().ok().and_then(|n| usize::try_from(n).ok()),
    }
}

fn as_float(value: &Value) -> Option<f64> {
    match value {
        Value::F64(x) => Some(*x),
        // Through the shortest decimal: the f32 nearest to 1e-6 was meant as 1e-6.
        Value::F32(x) => x.to_string().parse().ok(),
        _ => None,
    }
}

fn as_flag(value: &Value) -> Option<bool> {
    match value {
        Value::Bool(on) => Some(*on),
        _ => None,
    }
}

fn list<'a, T>(value: &'a Value, read: impl Fn(&'a Value) -> Option<T>) -> Option<Vec<T>> {
    match value {
        Value::Array(values) => values.iter().map(read).collect(),
        _ => None,
    }
}

/// A value in an error: short.
fn shown(value: &Value) -> String {
    match value {
        Value::Bool(on) => on.to_string(),
        Value::String(text) => format!("`{text}`"),
        Value::Array(values) => format!("a list of {}", values.len()),
        other => match (as_float(other), as_count(other)) {
            (Some(x), _) => x.to_string(),
            (None, Some(n)) => n.to_string(),
            (None, None) => "negative".into(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_are_lists_or_periods() {
        let list = Value::Array([true, false, true].map(Value::Bool).into());
        let values: HashMap<String, Value> = [
            ("list", list),
            ("three", Value::U32(3)),
            ("none", Value::U32(1)),
            ("all", Value::I32(0)),
            ("text", Value::String("x".into())),
        ]
        .map(|(key, value)| (key.to_string(), value))
        .into();
        let metadata = Metadata::new(Path::new("m.gguf"), &values);
        let pattern = |key| metadata.pattern(key, 5).unwrap().unwrap();
        assert_eq!(pattern("list"), [true, false, true]);
        assert_eq!(pattern("three"), [true, true, false, true, true]);
        assert_eq!(pattern("none"), [false; 5]);
        assert_eq!(pattern("all"), [true; 5]);
        let error = metadata.pattern("text", 5).unwrap_err().to_string();
        assert_eq!(error, "m.gguf: `text` is not a period or a list of answers");
    }

    #[test]
    fn what_nobody_has_read_is_named() {
        let values: HashMap<String, Value> = ["a.read", "a.idle", "a.new", "b.other"]
            .map(|key| (key.to_string(), Value::U8(2)))
            .into();
        let metadata = Metadata::new(Path::new("m.gguf"), &values);
        assert_eq!(metadata.integer("a.read").unwrap(), Some(2));
        let error = metadata.refuse_unread("a.", &["idle"]).unwrap_err().to_string();
        assert!(error.starts_with("m.gguf: `a.new` is not supported"), "{error}");
        metadata.refuse_unless("a.new", 2.0).unwrap();
        metadata.refuse_unread("a.", &["idle"]).unwrap();
        let error = metadata.refuse_unless("a.read", 0.0).unwrap_err().to_string();
        assert_eq!(error, "m.gguf: `a.read` is 2, which is not supported");
    }
}
