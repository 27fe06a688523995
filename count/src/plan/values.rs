//! The values of a plan file: amounts with their unit, counts, `"max"`, grids.

use serde::Deserialize;
use toml::Value;

use crate::workload::{self, AttentionMode, Form, Key};

/// What the message of every refused amount ends with.
pub(super) const HOW: &str = "write a number and its unit, such as \"1e17 FLOP\" or \"100 PFLOP\"";

/// A number of FLOPs, at least 1, read from a string that carries its unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Value")]
pub struct Flops(pub u128);

impl Flops {
    /// Reads `1e17 FLOP`, `100 PFLOP`, `0.25 EFLOPs`, `3 PF-days`: a decimal number, then FLOP, FLOPs
    /// or a day of FLOP/s, with an SI prefix (k, M, G, T, P, E, Z, Y) or none. Exact: no floating
    /// point is involved.
    ///
    /// # Errors
    /// What is wrong, as the rest of a sentence.
    pub fn parse(text: &str) -> Result<Self, String> {
        let bad = |why: &str| format!("`{text}` {why}; {HOW}");
        let text = text.trim();
        let amount = UNITS.iter().find_map(|(units, times)| {
            units.iter().find_map(|u| Some((text.strip_suffix(u)?, times)))
        });
        let Some((number, times)) = amount else {
            let rate = ["FLOPS", "FLOP/s", "FLOPs/s"].iter().any(|unit| text.ends_with(unit));
            let word = text.ends_with(|c: char| c.is_alphabetic() || c == '$');
            let number = text.starts_with(|c: char| c.is_ascii_digit() || "+-.".contains(c));
            return Err(bad(match (rate, word) {
                (true, _) => "is a rate, not an amount",
                (false, true) if !number => "is no number with its unit",
                (false, true) => "has a unit that is none of FLOPs",
                (false, false) => "has no unit",
            }));
        };
        let prefixed = number.trim_end().char_indices().next_back();
        let prefix = prefixed.and_then(|(at, c)| Some((at, "kMGTPEZY".find(c)?)));
        let (number, thousands) = match prefix {
            Some((at, power)) => (&number[..at], power + 1),
            None => (number, 0),
        };
        let number = number.trim().replace('_', "");
        if number.starts_with('-') {
            return Err(bad("is negative"));
        }
        match decimal(&number, 3 * thousands as i64) {
            None => Err(bad("is not a number of FLOPs")),
            Some(Err(why)) => Err(bad(why)),
            Some(Ok(0)) => Err(bad("is nothing to spend")),
            Some(Ok(flops)) => match flops.checked_mul(*times) {
                Some(flops) => Ok(Self(flops)),
                None => Err(bad("does not fit 128 bits")),
            },
        }
    }
}

/// Units, which a prefix may precede, and how many FLOPs each is. A day has 86,400 seconds; OpenAI's
/// petaflop/s-day (*AI and Compute*, 2018) is such a day of 10^15 FLOP/s.
const UNITS: [(&[&str], u128); 2] = [
    (&["FLOP/s-days", "FLOP/s-day", "FLOPS-days", "FLOPS-day", "F-days", "F-day"], 86_400),
    (&["FLOPs", "FLOP"], 1),
];

/// `number` · 10^`shift`; none where it is no decimal number.
pub(super) fn decimal(number: &str, shift: i64) -> Option<Result<u128, &'static str>> {
    let (mantissa, exponent) = number.split_once(['e', 'E']).unwrap_or((number, "0"));
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let all = format!("{whole}{fraction}");
    if all.is_empty() || !all.bytes().all(|c| c.is_ascii_digit()) {
        return None;
    }
    let exponent: i64 = exponent.parse().ok()?;
    let digits = all.trim_end_matches('0');
    let dropped = (all.len() - digits.len()) as i64;
    let power = exponent.checked_add(shift)?.checked_add(dropped - fraction.len() as i64)?;
    if digits.is_empty() {
        return Some(Ok(0));
    }
    // No trailing zero is left, so a negative power leaves a fraction; 10^64 is past 128 bits.
    let Ok(power) = u32::try_from(power.clamp(-1, 64)) else {
        return Some(Err("is not a whole number of FLOPs"));
    };
    let exact = digits.parse::<u128>().ok();
    let exact = exact.and_then(|n| n.checked_mul(10u128.checked_pow(power)?));
    Some(exact.ok_or("does not fit 128 bits"))
}

impl TryFrom<Value> for Flops {
    type Error = String;

    fn try_from(value: Value) -> Result<Self, String> {
        match value {
            Value::String(text) => Self::parse(&text),
            Value::Integer(n) => Err(format!("`{n}` has no unit; {HOW}")),
            Value::Float(n) => Err(format!("`{n:e}` has no unit; {HOW}")),
            other => Err(format!("is a {}; {HOW}", other.type_str())),
        }
    }
}

/// A whole number, 0 or above.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Value")]
pub struct Natural(pub u64);

impl TryFrom<Value> for Natural {
    type Error = String;

    fn try_from(value: Value) -> Result<Self, String> {
        match value {
            Value::Integer(n) => match u64::try_from(n) {
                Ok(n) => Ok(Self(n)),
                Err(_) => Err(format!("is negative: {n}")),
            },
            other => Err(format!("is {}, not a whole number", describe(&other))),
        }
    }
}

/// A whole number, at least 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Value")]
pub struct Count(pub u64);

impl TryFrom<Value> for Count {
    type Error = String;

    fn try_from(value: Value) -> Result<Self, String> {
        match Natural::try_from(value)? {
            Natural(0) => Err("is 0; it must be at least 1".into()),
            Natural(n) => Ok(Self(n)),
        }
    }
}

impl TryFrom<Value> for AttentionMode {
    type Error = String;

    fn try_from(value: Value) -> Result<Self, String> {
        let known = Self::ALL.map(|mode| format!("\"{mode}\"")).join(" or ");
        let found = value.as_str().and_then(Self::named);
        found.ok_or_else(|| format!("is {}, not {known}", describe(&value)))
    }
}

/// A learning rate: finite, above 0.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(try_from = "Value")]
pub struct Rate(pub f64);

impl TryFrom<Value> for Rate {
    type Error = String;

    fn try_from(value: Value) -> Result<Self, String> {
        match value {
            Value::Float(rate) if rate.is_finite() && rate > 0.0 => Ok(Self(rate)),
            Value::Integer(rate) if rate > 0 => Ok(Self(rate as f64)),
            Value::Float(_) | Value::Integer(_) => {
                Err(format!("is {value}; it must be a number above 0"))
            }
            other => Err(format!("is {}, not a number", describe(&other))),
        }
    }
}

/// The values of a key of a workload: one, a list, or `"max"`, the largest that fits the budget.
///
/// # Errors
/// What is wrong, as the rest of a sentence that begins with the key.
pub fn dimension(key: Key, value: &toml::Value) -> Result<Dimension, String> {
    let one = |value: &toml::Value| match value {
        toml::Value::Integer(n) => match u64::try_from(*n) {
            Ok(n) => Ok(workload::Value::Number(n)),
            Err(_) => Err(format!("is negative: {n}")),
        },
        toml::Value::Boolean(on) => Ok(workload::Value::Switch(*on)),
        toml::Value::Float(n) => Ok(workload::Value::Real(*n)),
        toml::Value::String(text) => Ok(workload::Value::Text(text.clone())),
        other => Err(format!("is {}", describe(other))),
    };
    match value {
        toml::Value::String(text) if text == "max" => Ok(Dimension::Max),
        // Turns are a list by themselves.
        toml::Value::Array(list) if key.form() == Form::Turns => {
            list.iter().map(one).collect::<Result<_, _>>().map(Dimension::Together)
        }
        toml::Value::Array(list) if list.is_empty() => {
            Err("is an empty list, so nothing would run".into())
        }
        toml::Value::Array(list) => {
            list.iter().map(one).collect::<Result<_, _>>().map(Dimension::Each)
        }
        other => one(other).map(|one| Dimension::Each(vec![one])),
    }
}

/// What a plan says of a key.
#[derive(Debug, Clone, PartialEq)]
pub enum Dimension {
    /// Each gives experiments of its own.
    Each(Vec<workload::Value>),
    /// All of them in one workload.
    Together(Vec<workload::Value>),
    /// To be solved.
    Max,
}

/// One value, or a list of which each value gives experiments of its own.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(try_from = "Value", bound = "T: TryFrom<Value, Error = String>")]
pub struct Grid<T>(pub Vec<T>);

impl<T: TryFrom<Value, Error = String>> TryFrom<Value> for Grid<T> {
    type Error = String;

    fn try_from(value: Value) -> Result<Self, String> {
        match value {
            Value::Array(list) if list.is_empty() => {
                Err("is an empty list, so nothing would run".into())
            }
            Value::Array(list) => {
                list.into_iter().map(T::try_from).collect::<Result<_, _>>().map(Self)
            }
            one => T::try_from(one).map(|one| Self(vec![one])),
        }
    }
}

fn describe(value: &Value) -> String {
    match value {
        Value::String(_) | Value::Integer(_) | Value::Float(_) | Value::Boolean(_) => {
            format!("{value}")
        }
        Value::Datetime(_) | Value::Array(_) | Value::Table(_) => format!("a {}", value.type_str()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_exact() {
        let read = |text| Flops::parse(text).unwrap().0;
        assert_eq!(read("1e17 FLOP"), 10u128.pow(17));
        assert_eq!(read("100 PFLOP"), 10u128.pow(17));
        assert_eq!(read("100PFLOPs"), 10u128.pow(17));
        assert_eq!(read("0.1 EFLOP"), 10u128.pow(17));
        assert_eq!(read("1EFLOP"), 10u128.pow(18));
        assert_eq!(read("1.25E3 kFLOP"), 1_250_000);
        assert_eq!(read("12_345 FLOP"), 12_345);
        assert_eq!(read("0.123456789012345678 EFLOP"), 123_456_789_012_345_678);
        assert_eq!(read("340282366920938463463374607431768211455 FLOP"), u128::MAX);
        assert_eq!(read("1000e-3 FLOP"), 1);
        assert_eq!(read("1 PF-day"), 86_400 * 10u128.pow(15));
        assert_eq!(read("0.5 PFLOP/s-days"), 43_200 * 10u128.pow(15));
        assert_eq!(read("2 EF-days"), 172_800 * 10u128.pow(18));
    }

    #[test]
    fn what_is_no_amount_is_named() {
        for (text, why) in [
            ("1e17", "`1e17` has no unit"),
            ("", "has no unit"),
            ("3 GPU-hours", "a unit that is none of FLOPs"),
            ("30 $", "a unit that is none of FLOPs"),
            ("NaN", "no number with its unit"),
            ("1e17 flops", "a unit that is none of FLOPs"),
            ("1e35 PF-days", "128 bits"),
            ("FLOP", "not a number"),
            ("PFLOP", "not a number"),
            ("-3 TFLOP", "negative"),
            ("0 FLOP", "nothing to spend"),
            ("0.5 FLOP", "whole number"),
            ("1e-400000000000 FLOP", "whole number"),
            ("1e39 FLOP", "128 bits"),
            ("1e99999999999 FLOP", "128 bits"),
            ("1e99999999999999999999 FLOP", "not a number"),
            ("3 QFLOP", "not a number"),
            ("3 PFLOP/s", "rate"),
            ("3 PFLOPS", "rate"),
            ("five PFLOP", "not a number"),
        ] {
            let error = Flops::parse(text).unwrap_err();
            assert!(error.contains(why) && error.contains("\"100 PFLOP\""), "{text}: {error}");
        }
    }
}
