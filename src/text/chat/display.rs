//! Values as Python writes them: `str`, `repr` and `json.dumps`.

use std::{fmt::Write, sync::Arc};

use minijinja::{
    Error, ErrorKind, Value,
    value::{Enumerator, Object, ObjectRepr, ValueKind},
};

/// What can be gone over but not shown: Python's ranges, and the views of a dict.
#[derive(Debug)]
pub(super) struct Unshown(pub(super) Vec<Value>);

impl Object for Unshown {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Iterable
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Values(self.0.clone())
    }
}

/// One group of `groupby`: a pair, whose parts have names too.
#[derive(Debug)]
pub(super) struct Group(pub(super) [Value; 2]);

impl Object for Group {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Seq
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        match (key.as_usize(), key.as_str()) {
            (Some(0), _) | (_, Some("grouper")) => Some(self.0[0].clone()),
            (Some(1), _) | (_, Some("list")) => Some(self.0[1].clone()),
            _ => None,
        }
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Seq(2)
    }
}

pub(super) fn is_unshown(value: &Value) -> bool {
    value.downcast_object_ref::<Unshown>().is_some()
}

/// `str(value)`; the error is a value that Python would show by its address or type.
pub(super) fn str(value: &Value) -> Result<String, Error> {
    match (value.kind(), value.as_str()) {
        (ValueKind::Undefined, _) => Ok(String::new()),
        (_, Some(text)) => Ok(text.to_string()),
        _ => repr(value),
    }
}

/// `repr(value)`; the error is that of [`str`].
pub(super) fn repr(value: &Value) -> Result<String, Error> {
    let refuse = |what: &str| {
        let why = format!("prints {what}, which Jinja2 would show by its type");
        Err(Error::new(ErrorKind::InvalidOperation, why))
    };
    match value.kind() {
        ValueKind::Undefined => Ok("Undefined".into()),
        ValueKind::None | ValueKind::Bool => Ok(value.to_string()),
        ValueKind::Number => Ok(number(value)),
        ValueKind::String => Ok(quoted(value.as_str().unwrap_or_default())),
        ValueKind::Iterable if is_unshown(value) => refuse("a sequence that is no list"),
        ValueKind::Seq | ValueKind::Iterable => {
            let items = items(value)?;
            let tuple = value.is_tuple() || value.downcast_object_ref::<Group>().is_some();
            let one = items.len() == 1;
            let items: Result<Vec<_>, _> = items.iter().map(repr).collect();
            let items = items?.join(", ");
            Ok(match (tuple, one) {
                (true, true) => format!("({items},)"),
                (true, false) => format!("({items})"),
                (false, _) => format!("[{items}]"),
            })
        }
        ValueKind::Map => {
            let pair = |key: &Value| {
                Ok::<_, Error>(format!("{}: {}", repr(key)?, repr(&value.get_item(key)?)?))
            };
            let pairs: Result<Vec<_>, _> = items(value)?.iter().map(pair).collect();
            Ok(format!("{{{}}}", pairs?.join(", ")))
        }
        ValueKind::Plain => refuse("a function or an object"),
        ValueKind::Bytes => refuse("bytes"),
        // The rest are errors on their way, and kinds that may come.
        _ => refuse("something else"),
    }
}

fn items(value: &Value) -> Result<Vec<Value>, Error> {
    Ok(value.try_iter()?.collect())
}

/// A number: whole ones as they are, others as Python's shortest `repr`.
fn number(value: &Value) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    f64::try_from(value.clone()).map_or_else(|_| value.to_string(), float)
}

/// `repr(x)`: digits as they are from 1e-4 to below 1e16, else an exponent.
pub(super) fn float(x: f64) -> String {
    if x.is_nan() {
        return "nan".into();
    }
    if x.is_infinite() {
        return if x > 0.0 { "inf".into() } else { "-inf".into() };
    }
    let scientific = format!("{x:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    match exponent.parse::<i32>().unwrap_or_default() {
        -4..16 => {
            let plain = x.to_string();
            if plain.contains('.') { plain } else { plain + ".0" }
        }
        exponent => {
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{digits}e{sign}{:02}", exponent.abs())
        }
    }
}

/// A string in Python's quotes.
fn quoted(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::from(quote);
    for c in text.chars() {
        match c {
            '\n' => out += "\\n",
            '\r' => out += "\\r",
            '\t' => out += "\\t",
            '\\' => out += "\\\\",
            c if c == quote => out.extend(['\\', c]),
            c if is_printable(c) => out.push(c),
            c if u32::from(c) < 0x100 => out += &format!("\\x{:02x}", u32::from(c)),
            c if u32::from(c) < 0x1_0000 => out += &format!("\\u{:04x}", u32::from(c)),
            c => out += &format!("\\U{:08x}", u32::from(c)),
        }
    }
    out.push(quote);
    out
}

/// What `str.isprintable` says: no separators but the space, no controls, formats or private uses.
fn is_printable(c: char) -> bool {
    !(c.is_control()
        || (c.is_whitespace() && c != ' ')
        || matches!(u32::from(c),
            0xad | 0x600..=0x605 | 0x61c | 0x6dd | 0x70f | 0x890 | 0x891 | 0x8e2 | 0x180e
            | 0x200b..=0x200f | 0x202a..=0x202e | 0x2060..=0x206f | 0xe000..=0xf8ff | 0xfeff
            | 0xfff9..=0xfffb | 0x1_3430..=0x1_343f | 0x1_bca0..=0x1_bca3 | 0x1_d173..=0x1_d17a
            | 0xe_0000..=0xe_007f | 0xf_0000..))
}

/// How `json.dumps` writes.
#[derive(Debug, Default)]
pub(super) struct Json {
    /// Whether every character outside ASCII is escaped.
    pub(super) ensure_ascii: bool,
    /// What each level is indented by; without it all is one line.
    pub(super) indent: Option<String>,
    /// Between items, and between a key and its value.
    pub(super) separators: Option<(String, String)>,
    /// Whether keys come in their order, not as they were put in.
    pub(super) sort_keys: bool,
}

impl Json {
    /// `json.dumps(value, …)`; the error is a value that has no JSON.
    pub(super) fn dumps(&self, value: &Value) -> Result<String, Error> {
        let mut out = String::new();
        self.write(&mut out, value, 0)?;
        Ok(out)
    }

    fn write(&self, out: &mut String, value: &Value, depth: usize) -> Result<(), Error> {
        let refuse = |what: &str| {
            Err(Error::new(ErrorKind::BadSerialization, format!("tojson: {what} has no JSON")))
        };
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => out.push_str(&json_number(value)),
            ValueKind::String => self.string(out, value.as_str().unwrap_or_default()),
            ValueKind::Iterable if is_unshown(value) => {
                return refuse("a sequence that is no list");
            }
            ValueKind::Seq | ValueKind::Iterable => {
                let items = items(value)?;
                self.container(out, ['[', ']'], &items, depth, |out, item| {
                    self.write(out, item, depth + 1)
                })?;
            }
            ValueKind::Map => {
                let keys = self.keys(value)?;
                self.container(out, ['{', '}'], &keys, depth, |out, key| {
                    self.string(out, &json_key(key)?);
                    out.push_str(self.separators.as_ref().map_or(": ", |(_, colon)| colon));
                    self.write(out, &value.get_item(key)?, depth + 1)
                })?;
            }
            ValueKind::Undefined => return refuse("an undefined value"),
            ValueKind::Plain => return refuse("an object"),
            ValueKind::Bytes => return refuse("bytes"),
            // The rest are errors on their way, and kinds that may come.
            _ => return refuse("something else"),
        }
        Ok(())
    }

    fn container(
        &self,
        out: &mut String,
        [open, close]: [char; 2],
        items: &[Value],
        depth: usize,
        write: impl Fn(&mut String, &Value) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let line = |out: &mut String, depth| {
            if let Some(indent) = &self.indent {
                out.push('\n');
                out.push_str(&indent.repeat(depth));
            }
        };
        let comma = match (&self.separators, &self.indent) {
            (Some((comma, _)), _) => comma,
            (None, Some(_)) => ",",
            (None, None) => ", ",
        };
        out.push(open);
        for (index, item) in items.iter().enumerate() {
            if index > 0 {
                out.push_str(comma);
            }
            line(out, depth + 1);
            write(out, item)?;
        }
        if !items.is_empty() {
            line(out, depth);
        }
        out.push(close);
        Ok(())
    }

    fn keys(&self, map: &Value) -> Result<Vec<Value>, Error> {
        let mut keys = items(map)?;
        if self.sort_keys {
            if keys.iter().any(|key| key.as_str().is_none()) {
                let why = "tojson: sort_keys needs keys that are strings";
                return Err(Error::new(ErrorKind::BadSerialization, why));
            }
            keys.sort_by(|a, b| a.as_str().cmp(&b.as_str()));
        }
        Ok(keys)
    }

    fn string(&self, out: &mut String, text: &str) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && c > '~') => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        // A string takes all that is written to it.
                        let _ = write!(out, "\\u{unit:04x}");
                    }
                }
                c => out.push(c),
            }
        }
        out.push('"');
    }
}

fn json_number(value: &Value) -> String {
    let text = number(value);
    match text.as_str() {
        "nan" => "NaN".into(),
        "inf" => "Infinity".into(),
        "-inf" => "-Infinity".into(),
        _ => text,
    }
}

fn json_key(key: &Value) -> Result<String, Error> {
    match key.kind() {
        ValueKind::None => Ok("null".into()),
        ValueKind::Bool => Ok(if key.is_true() { "true".into() } else { "false".into() }),
        ValueKind::Number => Ok(json_number(key)),
        ValueKind::String => Ok(key.as_str().unwrap_or_default().to_string()),
        kind => {
            let why = format!("tojson: a key that is a {kind} has no JSON");
            Err(Error::new(ErrorKind::BadSerialization, why))
        }
    }
}
