//! The axes of a grid, as `--sweep` spells them.

use std::{fmt, str::FromStr};

use serde::{Serialize, Serializer};

use super::MOST_POINTS;
use crate::{
    error::{Error, Result},
    workload::{Form, Key, Value},
};

/// What every refused `--sweep` is told.
const FORMS: &str = "write key=a,b,c, key=a..b:*k or key=a..b:+k";

/// What varies over an axis, named as its flag is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Swept {
    /// The model, by the name of a preset.
    Preset,
    /// Rank of the adapters.
    LoraRank,
    /// Element type of weights and activations.
    Dtype,
    /// Which scores attention computes.
    Attention,
    /// How sequences of listed lengths lie in a pass.
    Layout,
    /// A dimension of the workload.
    Task(Key),
}

impl Swept {
    /// The flag's name, without its dashes.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Preset => "preset",
            Self::LoraRank => "lora-rank",
            Self::Dtype => "dtype",
            Self::Attention => "attention",
            Self::Layout => "layout",
            Self::Task(key) => key.name(),
        }
    }

    /// All that any kind of workload has.
    fn all() -> impl Iterator<Item = Self> {
        let of_task = Key::ALL.into_iter().filter(|key| key.form() != Form::Turns);
        [Self::Preset, Self::LoraRank, Self::Dtype, Self::Attention, Self::Layout]
            .into_iter()
            .chain(of_task.map(Self::Task))
    }
}

impl fmt::Display for Swept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl Serialize for Swept {
    fn serialize<S: Serializer>(&self, s: S) -> std::result::Result<S::Ok, S::Error> {
        s.serialize_str(self.name())
    }
}

/// One `--sweep`: a key and its values.
#[derive(Debug, Clone, PartialEq)]
pub struct Axis {
    /// What varies.
    pub key: Swept,
    /// Over what.
    pub values: Vec<Value>,
}

impl FromStr for Axis {
    type Err = Error;

    /// Reads `key=a,b,c`, `key=a..b:*k` or `key=a..b:+k`; a range holds its end where a step
    /// meets it.
    fn from_str(text: &str) -> Result<Self, Error> {
        let fail = |why: String| Error::flag("--sweep", format!("`{text}`: {why}"));
        let Some((name, values)) = text.split_once('=') else {
            return Err(fail(format!("has no `=`; {FORMS}")));
        };
        let name = name.trim();
        let key = Swept::all().find(|key| key.name() == name).ok_or_else(|| {
            let known: Vec<_> = Swept::all().map(Swept::name).collect();
            fail(format!("no key `{name}`; known: {}", known.join(", ")))
        })?;
        let form = match key {
            Swept::Preset | Swept::Dtype | Swept::Attention | Swept::Layout => None,
            Swept::LoraRank => Some(Form::Natural),
            Swept::Task(key) => Some(key.form()),
        };
        let values = match form {
            None => values.split(',').map(|v| Ok(Value::Text(v.trim().into()))).collect(),
            Some(Form::Count | Form::Natural) => {
                numbers(values).map(|numbers| numbers.into_iter().map(Value::Number).collect())
            }
            Some(form) => values.split(',').map(|value| form.parse(value)).collect(),
        };
        let values: Result<Vec<Value>, String> = values;
        let values = values.map_err(|why| fail(format!("{key} {why}; {FORMS}")))?;
        Ok(Self { key, values })
    }
}

/// Reads `a,b,c`, `a..b:*k` or `a..b:+k`; a range holds its end where a step meets it.
///
/// # Errors
/// What is wrong, as the rest of a sentence that starts with the key.
pub fn numbers(text: &str) -> Result<Vec<u64>, String> {
    match text.split_once("..") {
        Some((from, rest)) => range(from, rest),
        None => text.split(',').map(number).collect(),
    }
}

fn number(text: &str) -> Result<u64, String> {
    text.trim().parse().map_err(|_| format!("has `{}`, which is no whole number", text.trim()))
}

/// `from`, then `rest` = `b:*k` or `b:+k`.
fn range(from: &str, rest: &str) -> Result<Vec<u64>, String> {
    let (to, step) = rest.split_once(':').ok_or("lacks its step, `:*k` or `:+k`")?;
    let (from, to) = (number(from)?, number(to)?);
    let (times, by) = match (step.strip_prefix('*'), step.strip_prefix('+')) {
        (Some(k), _) => (true, number(k)?),
        (_, Some(k)) => (false, number(k)?),
        _ => return Err(format!("has the step `{step}`, neither *k nor +k")),
    };
    if from > to {
        return Err(format!("runs backwards, from {from} to {to}"));
    }
    if by < 1 + u64::from(times) || (times && from == 0) {
        return Err(format!("never arrives: from {from} in steps of {step}"));
    }
    let next = |n: &u64| match times {
        true => n.checked_mul(by),
        false => n.checked_add(by),
    };
    let values = std::iter::successors(Some(from), next).take_while(|n| *n <= to);
    // One above the most, so that a grid that is too large is seen and not cut.
    Ok(values.take(MOST_POINTS + 1).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Vec<u64> {
        let axis: Axis = text.parse().unwrap();
        let number = |value| match value {
            Value::Number(n) => n,
            other => panic!("{other}"),
        };
        axis.values.into_iter().map(number).collect()
    }

    #[test]
    fn axes_have_three_forms() {
        assert_eq!(of("seq=128..4096:*2"), [128, 256, 512, 1024, 2048, 4096]);
        assert_eq!(of("seq=1..10:*3"), [1, 3, 9]);
        assert_eq!(of("batch=1..7:+3"), [1, 4, 7]);
        assert_eq!(of("past=0..0:+1"), [0]);
        assert_eq!(of("lora-rank=8, 1,2"), [8, 1, 2]);
        let last = u64::MAX;
        assert_eq!(of(&format!("seq={}..{last}:*2", last / 2)), [last / 2, last - 1]);
        let presets: Axis = "preset=tiny,qwen2.5-7b".parse().unwrap();
        assert_eq!(presets.values[1], Value::Text("qwen2.5-7b".into()));
    }

    #[test]
    fn bad_axes_name_the_key_and_the_forms() {
        for (text, part) in [
            ("seq", "no `=`"),
            ("seq=", "`seq=`: seq has ``"),
            ("sequence=4", "no key `sequence`; known: preset, lora-rank, dtype, attention, layout"),
            ("seq=a", "seq has `a`"),
            ("seq=-4", "`-4`"),
            ("seq=1..8", "seq lacks its step"),
            ("seq=1..8:2", "neither *k nor +k"),
            ("seq=8..1:*2", "backwards"),
            ("seq=1..8:*1", "never arrives"),
            ("seq=0..8:*2", "never arrives"),
            ("seq=1..8:+0", "never arrives"),
        ] {
            let error = text.parse::<Axis>().unwrap_err().to_string();
            assert!(error.starts_with("--sweep: ") && error.contains(part), "{text}: {error}");
            assert!(error.contains("a..b:*k") || error.contains("known:"), "{text}: {error}");
        }
    }
}
