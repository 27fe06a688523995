//! What Python and Jinja2 give a template that minijinja lacks or does otherwise.

use minijinja::{
    Error, ErrorKind, State, Value,
    value::{Kwargs, Rest, Tuple, ValueKind, ValueOrKwargs, from_args},
};
use minijinja_contrib::pycompat::unknown_method_callback;

use super::display::{self, Json, Unshown};

fn fail<T>(why: impl Into<String>) -> Result<T, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, why.into()))
}

/// Positional and keyword arguments by name, `None` where one is not given.
fn bind<const N: usize>(args: &[Value], names: [&str; N]) -> Result<[Option<Value>; N], Error> {
    let (args, options) = match args.split_last() {
        Some((last, rest)) if last.is_kwargs() => (rest, Kwargs::try_from(last.clone())?),
        _ => (args, Kwargs::from_iter::<[(&str, Value); 0]>([])),
    };
    if args.len() > N {
        return fail(format!("takes {N} arguments, not {}", args.len()));
    }
    let mut bound = names.map(|_| None);
    for (index, name) in names.into_iter().enumerate() {
        let named: Option<Value> = options.get(name)?;
        bound[index] = args.get(index).cloned().or(named);
    }
    options.assert_all_used()?;
    Ok(bound)
}

/// Whether an argument is given and true.
fn is_true(argument: Option<Value>) -> bool {
    argument.is_some_and(|value| value.is_true())
}

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
            lines(text, is_true(keep))
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
fn strip<'a>(text: &'a str, chars: Option<&str>, left: bool, right: bool) -> &'a str {
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
fn lines(text: &str, keep: bool) -> Value {
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
    lines.into_iter().map(Value::from).collect()
}

/// The part of `text` from `start` to `end`, counted in characters as Python's slices are, and how
/// many characters come before it; `None` where `start` is past the end.
fn part(text: &str, start: Option<i64>, end: Option<i64>) -> Option<(&str, usize)> {
    let n = text.chars().count() as i64;
    let place = |at: i64| if at < 0 { (at + n).max(0) } else { at };
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

/// transformers' `tojson(ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
pub(super) fn tojson(value: &Value, args: Rest<ValueOrKwargs>) -> Result<String, Error> {
    let names = ["ensure_ascii", "indent", "separators", "sort_keys"];
    let [ensure_ascii, indent, separators, sort_keys] = bind(&args.into_values(), names)?;
    let indent = indent.unwrap_or_else(|| Value::from(()));
    let separators = separators.unwrap_or_else(|| Value::from(()));
    let json = Json {
        ensure_ascii: is_true(ensure_ascii),
        indent: match (indent.kind(), indent.as_str(), indent.as_i64()) {
            (ValueKind::None, ..) => None,
            (_, Some(text), _) => Some(text.to_string()),
            (_, _, Some(n)) if n <= 64 => Some(" ".repeat(usize::try_from(n).unwrap_or(0))),
            _ => return fail("tojson: indent is neither a width nor a string"),
        },
        separators: match separators.kind() {
            ValueKind::None => None,
            _ => {
                let parts: Vec<Value> = separators.try_iter()?.collect();
                let parts: Option<Vec<&str>> = parts.iter().map(Value::as_str).collect();
                match parts.as_deref() {
                    Some([comma, colon]) => Some((comma.to_string(), colon.to_string())),
                    _ => return fail("tojson: separators are not two strings"),
                }
            }
        },
        sort_keys: is_true(sort_keys),
    };
    json.dumps(value)
}

/// Jinja2's `default(default_value='', boolean=False)`.
pub(super) fn default(value: &Value, args: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    let [other, boolean] = bind(&args.into_values(), ["default_value", "boolean"])?;
    let missing = value.is_undefined() || (is_true(boolean) && !value.is_true());
    Ok(if missing { other.unwrap_or_else(|| Value::from("")) } else { value.clone() })
}

/// Jinja2's `trim(chars=None)`.
pub(super) fn trim(value: &Value, chars: Option<&str>) -> Result<String, Error> {
    Ok(strip(&display::str(value)?, chars, true, true).to_string())
}

/// Jinja2's `dictsort(case_sensitive=False, by='key', reverse=False)`.
pub(super) fn dictsort(map: &Value, args: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    let [case_sensitive, by, reverse] =
        bind(&args.into_values(), ["case_sensitive", "by", "reverse"])?;
    let (case_sensitive, reverse) = (is_true(case_sensitive), is_true(reverse));
    let by = by.as_ref().map_or(Some("key"), Value::as_str).unwrap_or_default();
    let of = match by {
        "key" => 0,
        "value" => 1,
        other => return fail(format!("dictsort: by is `{other}`, neither `key` nor `value`")),
    };
    if map.kind() != ValueKind::Map {
        return fail("dictsort: no dict");
    }
    let mut pairs = vec![];
    for key in map.try_iter()? {
        let pair = [key.clone(), map.get_item(&key)?];
        let sorted = match pair[of].as_str().filter(|_| !case_sensitive) {
            Some(text) => Value::from(text.to_lowercase()),
            None => pair[of].clone(),
        };
        pairs.push((sorted, pair));
    }
    if pairs.windows(2).any(|two| two[0].0.kind() != two[1].0.kind()) {
        return fail(format!("dictsort: the {by}s are of several kinds"));
    }
    // Equal ones keep their order, in reverse too.
    pairs.sort_by(|(a, _), (b, _)| if reverse { b.cmp(a) } else { a.cmp(b) });
    Ok(pairs.into_iter().map(|(_, pair)| Value::from(Tuple::new(pair.to_vec()))).collect())
}

/// `dict(…)`: of a dict, of pairs, of keyword arguments.
pub(super) fn dict(first: Option<Value>, options: Kwargs) -> Result<Value, Error> {
    let mut pairs: Vec<(Value, Value)> = vec![];
    if let Some(first) = first {
        for item in first.try_iter()? {
            if first.kind() == ValueKind::Map {
                pairs.push((item.clone(), first.get_item(&item)?));
                continue;
            }
            let pair: Vec<Value> = item.try_iter()?.collect();
            let [key, value] = &pair[..] else { return fail("dict: an item is no pair") };
            pairs.push((key.clone(), value.clone()));
        }
    }
    for name in options.args() {
        pairs.push((Value::from(name), options.get(name)?));
    }
    Ok(Value::from_pairs(pairs))
}

/// `a % b`: of a string its printf formatting, of numbers what is left over, with `b`'s sign.
pub(super) fn modulo(state: &mut State, a: &Value, b: &Value) -> Result<Value, Error> {
    if a.as_str().is_some() {
        let given: Vec<Value> = match b.is_tuple() {
            true => b.try_iter()?.collect(),
            false => vec![b.clone()],
        };
        let args: Vec<Value> = [a.clone()].into_iter().chain(given).collect();
        return state.apply_filter("format", &args);
    }
    let number = |value: &Value| matches!(value.kind(), ValueKind::Number | ValueKind::Bool);
    if !number(a) || !number(b) {
        return fail(format!("% of a {} and a {}", a.kind(), b.kind()));
    }
    if let (Ok(a), Ok(b)) = (i128::try_from(a.clone()), i128::try_from(b.clone())) {
        let left = a.checked_rem(b).map(|left| if left * b < 0 { left + b } else { left });
        return left.map_or_else(|| fail("% by zero"), |left| Ok(left.into()));
    }
    let (a, b) = (f64::try_from(a.clone())?, f64::try_from(b.clone())?);
    if b == 0.0 {
        return fail("% by zero");
    }
    let left = a % b;
    Ok(Value::from(if left * b < 0.0 { left + b } else { left }))
}

/// What a loop goes over: to Python, none is nothing that can be gone over.
pub(super) fn iterable(value: Value) -> Result<Value, Error> {
    match value.kind() {
        ValueKind::None => fail("a loop over none"),
        _ => Ok(value),
    }
}

/// Jinja2's `callable` test.
pub(super) fn is_callable(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Plain | ValueKind::Undefined)
}

/// Jinja2's `sequence` test: what has a length and items.
pub(super) fn is_sequence(value: &Value) -> bool {
    matches!(
        value.kind(),
        ValueKind::String | ValueKind::Seq | ValueKind::Map | ValueKind::Undefined
    )
}

/// Jinja2's `iterable` test.
pub(super) fn is_iterable(value: &Value) -> bool {
    is_sequence(value) || value.kind() == ValueKind::Iterable
}

/// Python's `range`, which is not shown as a list is.
pub(super) fn range(args: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    let [first, second, step] = bind(&args.into_values(), ["", "", ""])?;
    let whole = |value: Option<Value>, default| value.map_or(Ok(default), i64::try_from);
    let (start, end) = match second {
        Some(second) => (whole(first, 0)?, i64::try_from(second)?),
        None => (0, whole(first, 0)?),
    };
    let step = whole(step, 1)?;
    let mut items = vec![];
    let mut at = start;
    while step != 0 && if step > 0 { at < end } else { at > end } {
        if items.len() > 100_000 {
            return fail("range: more than 100000 items");
        }
        items.push(Value::from(at));
        at += step;
    }
    if step == 0 { fail("range: a step of 0") } else { Ok(Value::from_object(Unshown(items))) }
}
