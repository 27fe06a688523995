//! A JSON object read with types. It remembers which keys were read, so that none is left over in
//! silence.

use std::{cell::RefCell, collections::BTreeSet};

use serde_json::{Map, Value};

use crate::{
    config::{Ignored, Matters},
    error::{Error, Result},
};

/// An object of a `config.json`: the whole, or one inside it.
pub(super) struct Object<'a> {
    origin: &'a str,
    /// Where it stands, as errors give it: nothing, or a path with its last dot.
    path: String,
    values: &'a Map<String, Value>,
    read: RefCell<BTreeSet<&'a str>>,
    /// Of the whole file.
    ignored: &'a RefCell<Vec<Ignored>>,
}

impl<'a> Object<'a> {
    /// The whole file, named `origin` in errors.
    pub fn new(
        origin: &'a str,
        values: &'a Map<String, Value>,
        ignored: &'a RefCell<Vec<Ignored>>,
    ) -> Self {
        Self { origin, path: String::new(), values, read: RefCell::default(), ignored }
    }

    /// The file's name.
    pub fn origin(&self) -> &'a str {
        self.origin
    }

    /// An error that names the file and the key.
    pub fn refuse(&self, key: &str, why: impl Into<String>) -> anyhow::Error {
        Error::Config { origin: self.origin.into(), key: self.full(key), why: why.into() }.into()
    }

    /// The key with the path to it.
    pub fn full(&self, key: &str) -> String {
        format!("{}{key}", self.path)
    }

    /// Lists a key as one that is not used; nothing where there is none.
    pub fn ignore(&self, key: &str, reason: &str) {
        self.ignore_where(key, reason, Matters::Never);
    }

    /// The same of a key that `matters` somewhere.
    pub fn ignore_where(&self, key: &str, reason: &str, matters: Matters) {
        if self.get(key).is_some() || self.is_null(key) {
            let entry = Ignored::new(self.origin, self.full(key), reason).where_it(matters);
            self.ignored.borrow_mut().push(entry);
        }
    }

    /// The value of a key that is there and not null.
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        let (key, value) = self.values.get_key_value(key)?;
        self.read.borrow_mut().insert(key);
        Some(value).filter(|value| !value.is_null())
    }

    /// Whether a key is there as null.
    pub fn is_null(&self, key: &str) -> bool {
        self.values.get(key).is_some_and(Value::is_null)
    }

    /// The value that `read` makes of the key's; what it makes nothing of is not `kind`.
    fn typed<T>(
        &self,
        key: &str,
        kind: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let value = self.get(key).map(|value| read(value).ok_or(value)).transpose();
        value.map_err(|value| self.refuse(key, format!("is {}, not {kind}", shown(value))))
    }

    pub fn count(&self, key: &str) -> Result<Option<usize>> {
        self.typed(key, "a count", |value| value.as_u64().and_then(|n| n.try_into().ok()))
    }

    pub fn number(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number", Value::as_f64)
    }

    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", Value::as_bool)
    }

    pub fn text(&self, key: &str) -> Result<Option<&'a str>> {
        self.typed(key, "a string", Value::as_str)
    }

    pub fn texts(&self, key: &str) -> Result<Option<Vec<&'a str>>> {
        let all = |value: &'a Value| value.as_array()?.iter().map(Value::as_str).collect();
        self.typed(key, "a list of strings", all)
    }

    /// The object under a key.
    pub fn object(&self, key: &str) -> Result<Option<Object<'a>>> {
        let values = self.typed(key, "an object", Value::as_object)?;
        Ok(values.map(|values| Object {
            origin: self.origin,
            path: format!("{}.", self.full(key)),
            values,
            read: RefCell::default(),
            ignored: self.ignored,
        }))
    }

    /// The value that was `found` under a key, or the family's own where there is no such key. A null
    /// asks for a value that nobody names.
    pub fn or_silent<T>(&self, key: &str, found: Option<T>, silent: T) -> Result<T> {
        match found {
            Some(value) => Ok(value),
            None if self.is_null(key) => Err(self.refuse(key, NULL)),
            None => Ok(silent),
        }
    }

    /// A count that must be there.
    pub fn need(&self, key: &str) -> Result<usize> {
        self.count(key)?.ok_or_else(|| self.refuse(key, "is missing"))
    }

    /// The keys that nobody has read, with their values.
    pub fn unread(&self) -> Vec<(&'a str, &'a Value)> {
        let read = self.read.borrow();
        let all = self.values.iter().map(|(key, value)| (key.as_str(), value));
        all.filter(|(key, _)| !read.contains(key)).collect()
    }
}

/// Why a null is refused where a family needs a value.
pub(super) const NULL: &str =
    "is null, which is no value; without the key, the family's own is taken";

/// A value in an error: short, on one line.
pub(super) fn shown(value: &Value) -> String {
    const LONGEST: usize = 60;
    let text = match value {
        Value::String(text) => format!("`{text}`"),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_) => {
            value.to_string()
        }
    };
    match text.char_indices().nth(LONGEST) {
        None => text,
        Some((end, _)) => format!("{}…", &text[..end]),
    }
}
