//! Budgets: what there is to spend, and in which unit.

use serde::{Deserialize, Serialize, Serializer, ser::SerializeMap};
use toml::Value;

use super::values::{Flops, HOW, decimal};
use crate::{
    analytic::Structure,
    error::{Error, Result},
    rate::Rate,
    workload::Workload,
};

/// A budget as a file states it.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(try_from = "Value")]
pub enum Stated {
    /// FLOPs, under the plan's structure and prices.
    Flops(u128),
    /// Tokens that the experiments feed, padding aside ([`crate::workload::Tokens::real`]).
    Tokens(u128),
    /// Hours of one GPU.
    GpuHours(f64),
    /// Dollars, for GPU-hours at their price.
    Dollars(f64),
}

/// Units that are no FLOPs, longest first.
const UNITS: [(&str, Unit); 10] = [
    ("GPU-hours", Unit::GpuHours),
    ("GPU-hour", Unit::GpuHours),
    ("GPU hours", Unit::GpuHours),
    ("GPU hour", Unit::GpuHours),
    ("dollars", Unit::Dollars),
    ("tokens", Unit::Tokens),
    ("token", Unit::Tokens),
    ("USD", Unit::Dollars),
    ("GPUh", Unit::GpuHours),
    ("$", Unit::Dollars),
];

const HOW_ANY: &str = "write a number and its unit, such as \"1e17 FLOP\", \"100 PFLOP\", \
                       \"500 GPU-hours\", \"2000 $\" or \"1e9 tokens\"";

impl Stated {
    /// Reads what [`Flops::parse`] reads, `500 GPU-hours`, `2000 $` (or USD) or `1e9 tokens`.
    ///
    /// # Errors
    /// What is wrong, as the rest of a sentence.
    pub fn parse(text: &str) -> Result<Self, String> {
        let bad = |why: &str| format!("`{text}` {why}; {HOW_ANY}");
        let found = UNITS.iter().find_map(|(name, unit)| {
            Some((text.trim().strip_suffix(name)?.trim().replace('_', ""), *unit))
        });
        let Some((number, unit)) = found else {
            return match Flops::parse(text) {
                Ok(Flops(flops)) => Ok(Self::Flops(flops)),
                Err(why) => Err(why.replace("none of FLOPs", "not known").replace(HOW, HOW_ANY)),
            };
        };
        let real = || match number.parse::<f64>() {
            Ok(x) if x > 0.0 && x.is_finite() => Ok(x),
            Ok(x) if x < 0.0 => Err(bad("is negative")),
            Ok(0.0) => Err(bad("is nothing to spend")),
            _ => Err(bad("is not a number")),
        };
        match unit {
            Unit::Flops => Flops::parse(text).map(|Flops(flops)| Self::Flops(flops)),
            Unit::GpuHours => real().map(Self::GpuHours),
            Unit::Dollars => real().map(Self::Dollars),
            Unit::Tokens if number.starts_with('-') => Err(bad("is negative")),
            Unit::Tokens => match decimal(&number, 0) {
                Some(Ok(0)) => Err(bad("is nothing to spend")),
                Some(Ok(tokens)) => Ok(Self::Tokens(tokens)),
                Some(Err(why)) => Err(bad(&why.replace("FLOPs", "tokens"))),
                None => Err(bad("is not a number of tokens")),
            },
        }
    }
}

impl TryFrom<Value> for Stated {
    type Error = String;

    fn try_from(value: Value) -> Result<Self, String> {
        match value {
            Value::String(text) => Self::parse(&text),
            Value::Integer(n) => Err(format!("`{n}` has no unit; {HOW_ANY}")),
            Value::Float(n) => Err(format!("`{n:e}` has no unit; {HOW_ANY}")),
            other => Err(format!("is a {}; {HOW_ANY}", other.type_str())),
        }
    }
}

/// What a budget is stated in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// FLOPs.
    Flops,
    /// Tokens.
    Tokens,
    /// Hours of one GPU.
    GpuHours,
    /// Dollars.
    Dollars,
}

impl Unit {
    /// As sentences have it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Flops => "FLOPs",
            Self::Tokens => "tokens",
            Self::GpuHours => "GPU-hours",
            Self::Dollars => "$",
        }
    }

    /// What keys of JSON end in.
    const fn key(self) -> &'static str {
        match self {
            Self::Flops => "flops",
            Self::Tokens => "tokens",
            Self::GpuHours => "gpu_hours",
            Self::Dollars => "dollars",
        }
    }
}

/// Picoseconds of an hour: GPU time is kept in whole ones, so that sums and comparisons are exact.
const HOUR: f64 = 3.6e15;

/// The nearest whole number, where 128 bits hold it with room for sums.
fn whole(x: f64) -> Option<u128> {
    (x < 2f64.powi(120)).then(|| x.round() as u128)
}

/// What there is to spend. Amounts of it are whole numbers: FLOPs, tokens, or picoseconds of one
/// GPU, which hours and dollars are made of.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Budget {
    /// All of it.
    pub amount: u128,
    /// What it was stated in.
    pub unit: Unit,
    /// One of that unit.
    one: f64,
}

impl Budget {
    /// What `stated` comes to at `rate`.
    ///
    /// # Errors
    /// What the budget needs beside it, as the rest of a sentence.
    pub(super) fn new(stated: Stated, rate: Option<&Rate>) -> Result<Self, String> {
        let of = |unit, number: f64, one: f64| match whole(number * one) {
            Some(0) => Err("is less than a picosecond of a GPU".to_string()),
            Some(amount) => Ok(Self { amount, unit, one }),
            None => Err("is more picoseconds of a GPU than fit 128 bits".to_string()),
        };
        let needs = "needs `gpu` with `mfu` (or `hfu`), or `from_bench`";
        match (stated, rate) {
            (Stated::Flops(amount), _) => Ok(Self { amount, unit: Unit::Flops, one: 1.0 }),
            (Stated::Tokens(amount), _) => Ok(Self { amount, unit: Unit::Tokens, one: 1.0 }),
            (Stated::GpuHours(hours), Some(_)) => of(Unit::GpuHours, hours, HOUR),
            (Stated::GpuHours(_), None) => Err(format!("in GPU-hours {needs}")),
            (Stated::Dollars(dollars), Some(rate)) => match rate.price_per_gpu_hour {
                Some(price) => of(Unit::Dollars, dollars, HOUR / price),
                None => Err("in dollars needs `price_per_gpu_hour`".into()),
            },
            (Stated::Dollars(_), None) => {
                Err(format!("in dollars {needs}, and `price_per_gpu_hour`"))
            }
        }
    }

    /// What workloads that run so often take of it: of FLOPs, `flops`.
    ///
    /// # Errors
    /// A workload without a time, or an amount past 128 bits.
    pub(super) fn cost(
        &self,
        flops: u128,
        runs: &[(Workload, u128)],
        rate: Option<&Rate>,
        structure: Structure,
    ) -> Result<u128> {
        let mut all = 0u128;
        for (workload, times) in runs {
            let cost = match (self.unit, rate) {
                (Unit::Tokens, _) => workload.task.tokens().real.checked_mul(*times),
                (Unit::GpuHours | Unit::Dollars, Some(rate)) => {
                    let time = rate.time(structure, workload, *times)?;
                    whole(time.gpu_hours * HOUR)
                }
                (Unit::Flops, _) | (_, None) => return Ok(flops),
            };
            let sum = cost.and_then(|cost| all.checked_add(cost));
            all = sum.ok_or_else(|| Error::Overflow("all runs".into()))?;
        }
        Ok(all)
    }

    /// `amount` in the unit.
    pub fn shown(&self, amount: u128) -> f64 {
        amount as f64 / self.one
    }

    /// `amount` as a number of the unit: every digit of FLOPs and tokens.
    pub fn number(&self, amount: u128) -> String {
        match self.unit {
            Unit::Flops | Unit::Tokens => amount.to_string(),
            Unit::GpuHours => format!("{:.3}", self.shown(amount)),
            Unit::Dollars => format!("{:.2}", self.shown(amount)),
        }
    }

    /// The same with the unit.
    pub fn say(&self, amount: u128) -> String {
        format!("{} {}", self.number(amount), self.unit.name())
    }
}

/// Named amounts of a budget: `left` is written `left_flops`, `left_gpu_hours` …
pub(super) struct Amounts(pub Budget, pub Vec<(&'static str, Option<u128>)>);

impl Amounts {
    /// The same, and `flops` beside them.
    pub(super) fn with<S: Serializer>(
        &self,
        flops: [(&'static str, u128); 2],
        s: S,
    ) -> std::result::Result<S::Ok, S::Error> {
        let mut map = s.serialize_map(None)?;
        self.entries(&mut map)?;
        flops.iter().try_for_each(|(key, flops)| map.serialize_entry(key, flops))?;
        map.end()
    }

    fn entries<M: SerializeMap>(&self, map: &mut M) -> std::result::Result<(), M::Error> {
        let Self(budget, amounts) = self;
        amounts.iter().try_for_each(|(name, amount)| {
            let key = format!("{name}_{}", budget.unit.key());
            match budget.unit {
                Unit::Flops | Unit::Tokens => map.serialize_entry(&key, amount),
                Unit::GpuHours | Unit::Dollars => {
                    map.serialize_entry(&key, &amount.map(|amount| budget.shown(amount)))
                }
            }
        })
    }
}

impl Serialize for Amounts {
    fn serialize<S: Serializer>(&self, s: S) -> std::result::Result<S::Ok, S::Error> {
        let mut map = s.serialize_map(None)?;
        self.entries(&mut map)?;
        map.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budgets_have_units() {
        for (text, stated) in [
            ("1e17 FLOP", Stated::Flops(10u128.pow(17))),
            ("0.5 PF-days", Stated::Flops(43_200 * 10u128.pow(15))),
            ("500 GPU-hours", Stated::GpuHours(500.0)),
            ("1 GPU hour", Stated::GpuHours(1.0)),
            ("1_500.5 $", Stated::Dollars(1500.5)),
            ("2000USD", Stated::Dollars(2000.0)),
            ("1e9 tokens", Stated::Tokens(10u128.pow(9))),
        ] {
            assert_eq!(Stated::parse(text), Ok(stated), "{text}");
        }
        for (text, why) in [
            ("1e17", "no unit"),
            ("30 euros", "a unit that is not known"),
            ("-3 $", "negative"),
            ("-3 tokens", "negative"),
            ("0 GPU-hours", "nothing to spend"),
            ("0 tokens", "nothing to spend"),
            ("x $", "not a number"),
            ("inf $", "not a number"),
            ("1.5 tokens", "whole number of tokens"),
            ("3 PFLOP/s", "rate"),
        ] {
            let error = Stated::parse(text).unwrap_err();
            assert!(error.contains(why) && error.contains("\"2000 $\""), "{text}: {error}");
        }
    }
}
