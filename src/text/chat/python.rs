//! What Jinja2 gives a template that minijinja lacks or does otherwise: filters, functions, tests.

use minijinja::{
    Error, ErrorKind, Value,
    value::{Kwargs, Rest, Tuple, ValueKind, ValueOrKwargs},
};

use super::{
    display::{self, Group, Json, Unshown},
    methods::{split_lines, strip},
};

pub(super) fn fail<T>(why: impl Into<String>) -> Result<T, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, why.into()))
}

/// Positional and keyword arguments by name, `None` where one is not given.
pub(super) fn bind<const N: usize>(
    args: &[Value],
    names: [&str; N],
) -> Result<[Option<Value>; N], Error> {
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
pub(super) fn is_true(argument: Option<Value>) -> bool {
    argument.is_some_and(|value| value.is_true())
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

/// What a loop goes over: to Python, none is nothing that can be gone over. A string is its
/// characters, in a list: minijinja does not know how many there are, and the loop's variables need
/// that.
pub(super) fn iterable(value: Value) -> Result<Value, Error> {
    match (value.kind(), value.as_str()) {
        (ValueKind::None, _) => fail("a loop over none"),
        (_, Some(text)) => Ok(text.chars().map(Value::from).collect()),
        (_, None) => Ok(value),
    }
}

/// Jinja2's `indent(width=4, first=False, blank=False)`; a width may be the text itself.
pub(super) fn indent(value: &Value, args: Rest<ValueOrKwargs>) -> Result<String, Error> {
    const MOST: usize = 1 << 10;
    let [width, first, blank] = bind(&args.into_values(), ["width", "first", "blank"])?;
    let width = width.unwrap_or_else(|| Value::from(4));
    let by = match (width.as_str(), width.as_i64()) {
        (Some(text), _) => text.to_string(),
        (_, Some(n)) => match usize::try_from(n).unwrap_or(0) {
            n if n > MOST => return fail(format!("indent: a width of {n} is more than {MOST}")),
            n => " ".repeat(n),
        },
        _ => return fail("indent: the width is neither a number nor a string"),
    };
    let Some(text) = value.as_str() else { return fail("indent: no string") };
    // As Jinja2 does: a newline at the end is then one line more.
    let text = format!("{text}\n");
    let blank = is_true(blank);
    let mut out = if is_true(first) { by.clone() } else { String::new() };
    for (index, line) in split_lines(&text, false).into_iter().enumerate() {
        if index > 0 {
            out.push('\n');
            out += if blank || !line.is_empty() { &by } else { "" };
        }
        out += line;
    }
    Ok(out)
}

/// Jinja2's `batch` and `slice` make as many items as they are told to.
pub(super) fn few(count: usize) -> Result<usize, Error> {
    const MOST: usize = 100_000;
    match count {
        0..=MOST => Ok(count),
        _ => fail(format!("{count} items are more than {MOST}")),
    }
}

/// Jinja2's `groupby`, of which each group is a pair.
pub(super) fn groupby(
    value: Value,
    attribute: Option<&str>,
    options: Kwargs,
) -> Result<Value, Error> {
    let group = |group: Value| {
        let list: Value = group.get_item(&Value::from(1))?.try_iter()?.collect();
        Ok(Value::from_object(Group([group.get_item(&Value::from(0))?, list])))
    };
    let groups = minijinja::filters::groupby(value, attribute, options)?;
    groups.try_iter()?.map(group).collect::<Result<Value, Error>>()
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
        // What is past the largest number is past the end too.
        let Some(next) = at.checked_add(step) else { break };
        at = next;
    }
    if step == 0 { fail("range: a step of 0") } else { Ok(Value::from_object(Unshown(items))) }
}
