//! Opinions: what an op is made of ([`crate::ledger::Op::cost`]) and what that costs ([`Prices`]).

mod cost;
mod op;

use std::path::Path;

use serde::{Deserialize, Serialize};

pub use cost::{Cost, Primitives};

use crate::error::{Error, Result};

/// What each primitive costs, in FLOPs. Integers, so that totals are exact.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prices {
    /// Name in reports.
    #[serde(default)]
    pub name: String,
    /// Additions and subtractions.
    #[serde(default)]
    pub add: u64,
    /// Multiplications.
    #[serde(default)]
    pub mul: u64,
    /// Divisions.
    #[serde(default)]
    pub div: u64,
    /// Exponentials.
    #[serde(default)]
    pub exp: u64,
    /// Logarithms.
    #[serde(default)]
    pub log: u64,
    /// Square roots.
    #[serde(default)]
    pub sqrt: u64,
    /// Sines and cosines.
    #[serde(default)]
    pub trig: u64,
    /// Comparisons.
    #[serde(default)]
    pub cmp: u64,
    /// Sign changes.
    #[serde(default)]
    pub neg: u64,
    /// If given, a matmul costs this much a multiply-accumulate (b·m·k·n of them) in place of its
    /// muls and adds: 2 is the industry's convention, which rounds k − 1 adds up to k.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<u64>,
}

impl Prices {
    /// Every arithmetic primitive 1; comparisons and sign changes free.
    pub fn unit() -> Self {
        let (name, mac) = ("unit".into(), None);
        Self { name, add: 1, mul: 1, div: 1, exp: 1, log: 1, sqrt: 1, trig: 1, cmp: 0, neg: 0, mac }
    }

    /// The notebook's: add, mul, div 1; exp, log, sqrt, trig 10; comparisons and sign changes free.
    pub fn coursework() -> Self {
        Self { name: "coursework".into(), exp: 10, log: 10, sqrt: 10, trig: 10, ..Self::unit() }
    }

    /// The industry's and PyTorch's: 2·b·m·k·n a matmul, all else free.
    pub fn matmul() -> Self {
        let (name, mac) = ("matmul".into(), Some(2));
        Self { name, add: 0, mul: 0, div: 0, exp: 0, log: 0, sqrt: 0, trig: 0, cmp: 0, neg: 0, mac }
    }

    /// A preset by name, or a TOML file: `exp = 4`, a line a primitive, unnamed ones free.
    ///
    /// # Errors
    /// Neither a preset nor a readable price list; the file, line and key are named.
    pub fn named(spec: &str) -> Result<Self> {
        match spec {
            "unit" => Ok(Self::unit()),
            "coursework" => Ok(Self::coursework()),
            "matmul" => Ok(Self::matmul()),
            file if file.ends_with(".toml") => Self::from_file(Path::new(file)),
            other => {
                let why =
                    format!("`{other}` is no preset (unit, coursework, matmul) and no .toml file");
                Err(Error::flag("--prices", why).into())
            }
        }
    }

    fn from_file(file: &Path) -> Result<Self> {
        let bad = |why: String| Error::File { file: file.into(), why };
        let text = crate::input::read_text(file).map_err(|e| bad(e.to_string()))?;
        let mut prices: Self = toml::from_str(&text).map_err(|e| {
            let line =
                e.span().map_or(1, |s| 1 + text[..s.start.min(text.len())].matches('\n').count());
            bad(format!("line {line}: {}", e.message().replace('\n', " ")))
        })?;
        if prices.of_primitives().iter().all(|price| *price == 0) && prices.mac.unwrap_or(0) == 0 {
            return Err(bad("prices nothing: every primitive would be free".into()).into());
        }
        if prices.name.is_empty() {
            prices.name = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        }
        Ok(prices)
    }

    /// FLOPs of `cost` under these prices.
    ///
    /// # Errors
    /// A product or sum past 128 bits.
    pub fn flops(&self, cost: &Cost) -> Result<u128> {
        let (primitives, macs) = match self.mac {
            Some(price) => (cost.other, cost.macs.checked_mul(price.into())),
            None => (cost.primitives(), Some(0)),
        };
        let prices = self.of_primitives();
        let priced =
            primitives.named().into_iter().zip(prices).try_fold(macs, |sum, ((_, n), price)| {
                Some(Some(sum?.checked_add(n.checked_mul(price.into())?)?))
            });
        priced.flatten().ok_or_else(|| Error::Overflow("priced FLOPs".into()).into())
    }

    /// Prices of the primitives, in the order of [`Primitives::named`].
    pub const fn of_primitives(&self) -> [u64; 9] {
        let &Self { add, mul, div, exp, log, sqrt, trig, cmp, neg, .. } = self;
        [add, mul, div, exp, log, sqrt, trig, cmp, neg]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_price_lists_name_line_and_key() {
        let dir = tempfile::tempdir().unwrap();
        let read = |text: &str| {
            let file = dir.path().join("p.toml");
            std::fs::write(&file, text).unwrap();
            Prices::named(file.to_str().unwrap())
        };
        assert_eq!(read("add = 2\nmac = 3\n").unwrap().mac, Some(3));
        assert_eq!(read("add = 2").unwrap().name, "p");
        let error = read("add = 1\nfoo = 2\n").unwrap_err().to_string();
        assert!(error.contains("line 2") && error.contains("`foo`"), "{error}");
        let error = read("add = 1\nmul = 1\nexp = -2\n").unwrap_err().to_string();
        assert!(error.contains("line 3"), "{error}");
        assert!(Prices::named("cheap").unwrap_err().to_string().starts_with("--prices"));
        assert!(Prices::named("no/such.toml").unwrap_err().to_string().contains("no/such.toml"));
    }
}
