//! `%` and the filter `format`: printf's conversions, within bounds, and Python's remainders.

use std::{iter::Peekable, str::Chars};

use minijinja::{
    Error, State, Value,
    value::{Rest, ValueKind, ValueOrKwargs},
};

use super::python::fail;

/// minijinja's own filter, behind the one that checks what it is given.
pub(super) const FORMAT: &str = "format__";
/// The most characters that one conversion may be wide, or have behind the point: more is no text
/// that anybody means, and would be allocated at once.
const MOST: i64 = 1 << 12;

/// Jinja2's `format`: the error is a conversion that is too wide, or a value without a place.
pub(super) fn format(
    state: &mut State,
    text: &Value,
    args: Rest<ValueOrKwargs>,
) -> Result<Value, Error> {
    formatted(state, text, args.into_values())
}

fn formatted(state: &mut State, text: &Value, mut given: Vec<Value>) -> Result<Value, Error> {
    let places = places(text.as_str().unwrap_or_default(), &given)?;
    if places.is_some_and(|places| places < given.len()) && !given.iter().any(Value::is_kwargs) {
        return fail("%: there are more values than places for them in the string");
    }
    given.insert(0, text.clone());
    state.apply_filter(FORMAT, &given)
}

/// How many values a format takes; `None` where it takes them by name.
fn places(text: &str, given: &[Value]) -> Result<Option<usize>, Error> {
    let (mut chars, mut places, mut by_name) = (text.chars().peekable(), 0, false);
    while let Some(c) = chars.next() {
        if c != '%' || chars.next_if_eq(&'%').is_some() {
            continue;
        }
        if chars.next_if_eq(&'(').is_some() {
            by_name = true;
            chars.by_ref().find(|c| *c == ')');
        }
        while chars.next_if(|c| "#0- +".contains(*c)).is_some() {}
        bounded(&mut chars, given, &mut places)?;
        if chars.next_if_eq(&'.').is_some() {
            bounded(&mut chars, given, &mut places)?;
        }
        while chars.next_if(|c| "hlL".contains(*c)).is_some() {}
        places += usize::from(chars.next().is_some_and(|kind| kind != '%'));
    }
    Ok((!by_name).then_some(places))
}

/// Passes a width or a precision, in digits or as a value of its own.
fn bounded(chars: &mut Peekable<Chars>, given: &[Value], places: &mut usize) -> Result<(), Error> {
    let mut number = 0_i64;
    if chars.next_if_eq(&'*').is_some() {
        number = given.get(*places).and_then(Value::as_i64).unwrap_or(0).saturating_abs();
        *places += 1;
    }
    while let Some(digit) = chars.next_if(char::is_ascii_digit) {
        let digit = i64::from(digit.to_digit(10).unwrap_or(0));
        number = number.saturating_mul(10).saturating_add(digit);
    }
    if number > MOST {
        return fail(format!("%: a width or precision of {number} is more than {MOST}"));
    }
    Ok(())
}

/// `a % b`: of a string its printf formatting, of numbers what is left over, with `b`'s sign.
pub(super) fn modulo(state: &mut State, a: &Value, b: &Value) -> Result<Value, Error> {
    if let Some(text) = a.as_str() {
        let given: Vec<Value> = match b.kind() {
            _ if b.is_tuple() => b.try_iter()?.collect(),
            // To Python a list or a dict is a mapping, of which nothing need be taken.
            ValueKind::Seq | ValueKind::Map if places(text, &[])? == Some(0) => vec![],
            _ => vec![b.clone()],
        };
        return formatted(state, a, given);
    }
    let number = |value: &Value| matches!(value.kind(), ValueKind::Number | ValueKind::Bool);
    if !number(a) || !number(b) {
        return fail(format!("% of a {} and a {}", a.kind(), b.kind()));
    }
    let whole = |value: &Value| value.is_integer() || value.kind() == ValueKind::Bool;
    if whole(a) && whole(b) {
        let (Ok(a), Ok(b)) = (i128::try_from(a.clone()), i128::try_from(b.clone())) else {
            return fail("% of a number of more than 127 bits");
        };
        if b == 0 {
            return fail("% by zero");
        }
        // Of different signs, the two cannot overflow when they are added.
        let left = a.wrapping_rem(b);
        return Ok(Value::from(if left != 0 && (left < 0) != (b < 0) { left + b } else { left }));
    }
    let (a, b) = (f64::try_from(a.clone())?, f64::try_from(b.clone())?);
    if b == 0.0 {
        return fail("% by zero");
    }
    let left = a % b;
    Ok(Value::from(if left != 0.0 && (left < 0.0) != (b < 0.0) { left + b } else { left }))
}
