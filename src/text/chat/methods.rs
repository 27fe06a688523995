//! The methods of Python's values that a template calls.

use minijinja::{
    Error, State, Value,
    value::{Tuple, ValueKind, from_args},
};
use minijinja_contrib::pycompat::unknown_method_callback;

use super::{
    display::Unshown,
    python::{bind, fail, is_true},
};

/// A method of a value: those of Python that are missing or differ, then pycompat's.
pub(super) fn method(
    state: &mut State,
    value: &Value,
    name: &str,
    args: &[Value],
) -> Result<Value, Error> {
    let done = match (value.kind(), value.as_str()) {
        (ValueKind::String, Some(text)) => text_method(text, name, args)?,
        (ValueKind::Seq, _) => list_method(value, name, args)?,
        (ValueKind::Map, _) if name == "copy" => Some(value.clone()),
        _ => None,
    };
    if let Some(done) = done {
        return Ok(done);
    }
    let done = unknown_method_callback(state, value, name, args)?;
    Ok(match done.kind() {
        ValueKind::Iterable => Value::from_object(Unshown(done.try_iter()?.collect())),
        _ => done,
    })
}

fn list_method(list: &Value, name: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    match name {
        "copy" => Ok(Some(list.clone())),
        "index" => {
            let (what,): (&Value,) = from_args(args)?;
            let found = list.try_iter()?.position(|item| item == *what);
            found.map_or_else(|| fail("index: the list has no such item"), |at| Ok(Some(at.into())))
        }
        _ => Ok(None),
    }
}

/// `str`'s methods; `None` is one that pycompat has as Python does.
fn text_method(text: &str, name: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    let value = match name {
        "strip" | "lstrip" | "rstrip" => {
            let (chars,): (Option<&str>,) = from_args(args)?;
            let (left, right) = (name != "rstrip", name != "lstrip");
            Value::from(strip(text, chars, left, right))
        }
        "split" | "rsplit" => split(text, name == "rsplit", args)?,
        "splitlines" => {
            let [keep] = bind(args, ["keepends"])?;
            split_lines(text, is_true(keep)).into_iter().map(Value::from).collect()
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            let last = name == "rpartition";
            let found = if last { text.rsplit_once(separator) } else { text.split_once(separator) };
            let parts = match found {
                Some((before, after)) => [before, separator, after],
                None if last => ["", "", text],
                None => [text, "", ""],
            };
            Value::from(Tuple::new(parts.map(Value::from).to_vec()))
        }
        "removeprefix" | "removesuffix" => {
            let (part,): (&str,) = from_args(args)?;
            let rest = match name {
                "removeprefix" => text.strip_prefix(part),
                _ => text.strip_suffix(part),
            };
            Value::from(rest.unwrap_or(text))
        }
        "find" | "rfind" | "index" | "rindex" | "count" => search(text, name, args)?,
        "startswith" | "endswith" => affix(text, name == "startswith", args)?,
        "center" | "ljust" | "rjust" | "zfill" => padded(text, name, args)?,
        "title" | "swapcase" | "casefold" | "capitalize" => {
            let () = from_args(args)?;
            cased(text, name)?
        }
        "istitle" | "isidentifier" | "isdecimal" | "isdigit" | "isnumeric" => {
            let () = from_args(args)?;
            is(text, name)?
        }
        "join" => {
            let (items,): (&Value,) = from_args(args)?;
            let items: Vec<Value> = items.try_iter()?.collect();
            let Some(items) = items.iter().map(Value::as_str).collect::<Option<Vec<_>>>() else {
                return fail("join: an item is no string");
            };
            Value::from(items.join(text))
        }
        _ => return Ok(None),
    };
    Ok(Some(value))
}

/// What `str.isspace` takes for blank.
fn is_blank(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// `str.strip` of these characters, or of blanks, on one side or both.
pub(super) fn strip<'a>(text: &'a str, chars: Option<&str>, left: bool, right: bool) -> &'a str {
    let goes = |c: char| chars.map_or_else(|| is_blank(c), |chars| chars.contains(c));
    let text = if left { text.trim_start_matches(goes) } else { text };
    if right { text.trim_end_matches(goes) } else { text }
}

/// `str.split` and `str.rsplit`, with `sep` and `maxsplit`.
fn split(text: &str, from_right: bool, args: &[Value]) -> Result<Value, Error> {
    let [separator, most] = bind(args, ["sep", "maxsplit"])?;
    let separator = match &separator {
        Some(value) if !value.is_none() => match value.as_str() {
            Some(text) => Some(text),
            None => return fail("split: the separator is no string"),
        },
        _ => None,
    };
    let most = most.map_or(Ok(-1), i64::try_from)?;
    let most = usize::try_from(most).ok().and_then(|most| most.checked_add(1));
    let mut parts: Vec<&str> = match (separator, most, from_right) {
        (Some(""), ..) => return fail("split: the separator is empty"),
        (Some(by), None, _) => text.split(by).collect(),
        (Some(by), Some(most), false) => text.splitn(most, by).collect(),
        (Some(by), Some(most), true) => text.rsplitn(most, by).collect(),
        (None, most, _) => words(text, most.unwrap_or(usize::MAX), from_right),
    };
    if from_right && most.is_some() {
        parts.reverse();
    }
    Ok(parts.into_iter().map(Value::from).collect())
}

/// At most this many parts between blanks, in the order that they are found in.
fn words(text: &str, most: usize, from_right: bool) -> Vec<&str> {
    let mut rest = strip(text, None, !from_right, from_right);
    let mut parts = vec![];
    while !rest.is_empty() {
        let cut = if from_right { rest.rfind(is_blank) } else { rest.find(is_blank) };
        match cut.filter(|_| parts.len() + 1 < most) {
            None => {
                parts.push(strip(rest, None, from_right, !from_right));
                if parts.len() < most {
                    break;
                }
                // The last part keeps the blanks inside it, and those at its far end.
                parts.pop();
                parts.push(rest);
                break;
            }
            Some(at) if from_right => {
                let blank = rest[at..].chars().next().map_or(0, char::len_utf8);
                parts.push(&rest[at + blank..]);
                rest = strip(&rest[..at], None, false, true);
            }
            Some(at) => {
                parts.push(&rest[..at]);
                rest = strip(&rest[at..], None, true, false);
            }
        }
    }
    if from_right && most == usize::MAX {
        parts.reverse();
    }
    parts
}

/// `str.splitlines`.
pub(super) fn split_lines(text: &str, keep: bool) -> Vec<&str> {
    let ends = |c: char| matches!(c, '\n'..='\r' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}');
    let mut lines = vec![];
    let mut rest = text;
    while let Some(at) = rest.find(ends) {
        let end = match &rest[at..] {
            both if both.starts_with("\r\n") => at + 2,
            one => at + one.chars().next().map_or(0, char::len_utf8),
        };
        lines.push(&rest[..if keep { end } else { at }]);
        rest = &rest[end..];
    }
    lines.extend((!rest.is_empty()).then_some(rest));
    lines
}

/// The part of `text` from `start` to `end`, counted in characters as Python's slices are, and how
/// many characters come before it; `None` where `start` is past the end.
fn part(text: &str, start: Option<i64>, end: Option<i64>) -> Option<(&str, usize)> {
    let n = text.chars().count() as i64;
    let place = |at: i64| if at < 0 { at.saturating_add(n).max(0) } else { at };
    let (start, end) = (place(start.unwrap_or(0)), place(end.unwrap_or(n)).min(n));
    let byte = |at: i64| {
        text.char_indices().nth(usize::try_from(at).unwrap_or(0)).map_or(text.len(), |(at, _)| at)
    };
    (start <= n && start <= end).then(|| (&text[byte(start)..byte(end)], start as usize))
}

/// `str.find`, `rfind`, `index`, `rindex` and `count`, with a start and an end.
fn search(text: &str, name: &str, args: &[Value]) -> Result<Value, Error> {
    let (what, start, end): (&str, Option<i64>, Option<i64>) = from_args(args)?;
    let within = part(text, start, end);
    if name == "count" {
        return Ok(within.map_or(0, |(part, _)| part.matches(what).count()).into());
    }
    let found = within.and_then(|(part, before)| {
        let at = if name.starts_with('r') { part.rfind(what) } else { part.find(what) };
        at.map(|at| before + part[..at].chars().count())
    });
    match found {
        Some(at) => Ok(at.into()),
        None if name.ends_with("find") => Ok((-1).into()),
        None => fail(format!("{name}: there is no such part")),
    }
}

/// `str.startswith` and `endswith`: a string or a tuple of them, with a start and an end.
fn affix(text: &str, prefix: bool, args: &[Value]) -> Result<Value, Error> {
    let (what, start, end): (&Value, Option<i64>, Option<i64>) = from_args(args)?;
    let affixes: Vec<Value> = match what.kind() {
        ValueKind::String => vec![what.clone()],
        ValueKind::Seq if what.is_tuple() => what.try_iter()?.collect(),
        kind => return fail(format!("neither a string nor a tuple of them but a {kind}")),
    };
    let Some((text, _)) = part(text, start, end) else { return Ok(false.into()) };
    for affix in &affixes {
        match affix.as_str() {
            None => return fail("a tuple that is not of strings"),
            Some(affix) if prefix && text.starts_with(affix) => return Ok(true.into()),
            Some(affix) if !prefix && text.ends_with(affix) => return Ok(true.into()),
            Some(_) => (),
        }
    }
    Ok(false.into())
}

/// `str.center`, `ljust`, `rjust` and `zfill`.
fn padded(text: &str, name: &str, args: &[Value]) -> Result<Value, Error> {
    let (width, fill): (i64, Option<&str>) = from_args(args)?;
    let mut chars = fill.unwrap_or(" ").chars();
    let (Some(fill), None) = (chars.next(), chars.next()) else {
        return fail(format!("{name}: the fill is not one character"));
    };
    let width = usize::try_from(width).unwrap_or(0);
    if width > 1 << 16 {
        return fail(format!("{name}: {width} characters are too many"));
    }
    let missing = width.saturating_sub(text.chars().count());
    let pad = |c: char, n: usize| c.to_string().repeat(n);
    Ok(Value::from(match name {
        "ljust" => text.to_string() + &pad(fill, missing),
        "rjust" => pad(fill, missing) + text,
        "zfill" => {
            let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
            text[..text.len() - digits.len()].to_string() + &pad('0', missing) + digits
        }
        // CPython's: the odd one goes left where the width is odd.
        _ => {
            let left = missing / 2 + (missing & width & 1);
            pad(fill, left) + text + &pad(fill, missing - left)
        }
    }))
}

/// `str.title`, `swapcase`, `casefold` and `capitalize`.
fn cased(text: &str, name: &str) -> Result<Value, Error> {
    let mut out = String::new();
    let mut inside = false;
    for c in text.chars() {
        match name {
            "swapcase" if c.is_lowercase() => out.extend(c.to_uppercase()),
            "swapcase" => out.extend(c.to_lowercase()),
            "casefold" if !c.is_ascii() => return fail("casefold: a letter outside ASCII"),
            "casefold" => out.push(c.to_ascii_lowercase()),
            _ if inside => out.extend(c.to_lowercase()),
            _ => {
                // A letter that becomes several in capitals keeps the first of them.
                let mut capitals = c.to_uppercase();
                out.extend(capitals.next());
                out.extend(capitals.flat_map(char::to_lowercase));
            }
        }
        inside = name == "capitalize" || c.is_alphabetic();
    }
    Ok(out.into())
}

/// What a string is made of; beyond ASCII, digits of other scripts are not told apart.
fn is(text: &str, name: &str) -> Result<Value, Error> {
    let decides = text.chars().all(|c| c.is_ascii() || !c.is_numeric());
    if !decides && name != "istitle" && name != "isidentifier" {
        return fail(format!("{name}: a digit outside ASCII"));
    }
    let mut chars = text.chars();
    Ok(Value::from(match name {
        "isidentifier" => {
            chars.next().is_some_and(|c| c.is_alphabetic() || c == '_')
                && chars.all(|c| c.is_alphanumeric() || c == '_')
        }
        "istitle" => {
            let same = cased(text, "title")?.as_str() == Some(text);
            same && text.chars().any(char::is_alphabetic)
        }
        _ => !text.is_empty() && text.chars().all(|c| c.is_ascii_digit()),
    }))
}
