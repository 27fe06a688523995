//! Opinions: what an op is made of ([`Op::cost`]) and what that costs ([`Prices`]).

use std::{ops::AddAssign, path::Path};

use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    ledger::{Ledger, Op},
};

/// Integer counts of the primitive operations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Primitives {
    /// Additions and subtractions.
    pub add: u128,
    /// Multiplications.
    pub mul: u128,
    /// Divisions.
    pub div: u128,
    /// Exponentials.
    pub exp: u128,
    /// Logarithms.
    pub log: u128,
    /// Square roots.
    pub sqrt: u128,
    /// Sines and cosines.
    pub trig: u128,
    /// Comparisons.
    pub cmp: u128,
    /// Sign changes.
    pub neg: u128,
}

impl Primitives {
    /// The counts by name, in the order that every table uses.
    pub const fn named(&self) -> [(&'static str, u128); 9] {
        [
            ("add", self.add),
            ("mul", self.mul),
            ("div", self.div),
            ("exp", self.exp),
            ("log", self.log),
            ("sqrt", self.sqrt),
            ("trig", self.trig),
            ("cmp", self.cmp),
            ("neg", self.neg),
        ]
    }

    fn map(self, other: Self, f: impl Fn(u128, u128) -> Option<u128>) -> Option<Self> {
        Some(Self {
            add: f(self.add, other.add)?,
            mul: f(self.mul, other.mul)?,
            div: f(self.div, other.div)?,
            exp: f(self.exp, other.exp)?,
            log: f(self.log, other.log)?,
            sqrt: f(self.sqrt, other.sqrt)?,
            trig: f(self.trig, other.trig)?,
            cmp: f(self.cmp, other.cmp)?,
            neg: f(self.neg, other.neg)?,
        })
    }
}

/// What work is made of: multiply-accumulates of matmuls apart from all else, because the
/// industry's convention prices nothing but them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cost {
    /// Σ b·m·k·n over matmuls: as many muls.
    pub macs: u128,
    /// Σ b·m·n over matmuls: a sum of k products takes k − 1 adds, so the matmuls' adds are
    /// `macs − outputs`.
    pub outputs: u128,
    /// Everything that is not a matmul.
    pub other: Primitives,
}

impl Cost {
    /// The cost whose primitives are `all`, `macs` and `outputs` being of matmuls; none where
    /// `all` cannot hold them.
    pub fn of(all: Primitives, macs: u128, outputs: u128) -> Option<Self> {
        let add = all.add.checked_sub(macs.checked_sub(outputs)?)?;
        let mul = all.mul.checked_sub(macs)?;
        Some(Self { macs, outputs, other: Primitives { add, mul, ..all } })
    }

    /// All primitives, the matmuls' among them.
    pub fn primitives(&self) -> Primitives {
        let matmul =
            Primitives { mul: self.macs, add: self.macs - self.outputs, ..Default::default() };
        let mut all = self.other;
        all.add += matmul.add;
        all.mul += matmul.mul;
        all
    }

    /// Sum, or none where it does not fit 128 bits.
    pub fn checked_add(self, rhs: Self) -> Option<Self> {
        Some(Self {
            macs: self.macs.checked_add(rhs.macs)?,
            outputs: self.outputs.checked_add(rhs.outputs)?,
            other: self.other.map(rhs.other, u128::checked_add)?,
        })
    }

    /// `times` such pieces of work, or none where that does not fit 128 bits.
    pub fn checked_mul(self, times: u128) -> Option<Self> {
        Some(Self {
            macs: self.macs.checked_mul(times)?,
            outputs: self.outputs.checked_mul(times)?,
            other: self.other.map(Primitives::default(), |n, _| n.checked_mul(times))?,
        })
    }
}

impl AddAssign for Primitives {
    fn add_assign(&mut self, rhs: Self) {
        self.add += rhs.add;
        self.mul += rhs.mul;
        self.div += rhs.div;
        self.exp += rhs.exp;
        self.log += rhs.log;
        self.sqrt += rhs.sqrt;
        self.trig += rhs.trig;
        self.cmp += rhs.cmp;
        self.neg += rhs.neg;
    }
}

impl Op {
    /// What the op is made of, as its kernel executes it.
    ///
    /// | op | derivation |
    /// |---|---|
    /// | matmul | each of b·m·n outputs: k muls, k − 1 adds |
    /// | bias, add, mask | one add an element |
    /// | mul, scale | one mul an element |
    /// | silu | x / (1 + exp(−x)): neg, exp, add, div an element |
    /// | gelu | x / (1 + exp(x · (a + b·x²))), a = −2√(2/π), b = 0.044715·a, which is x/2 · (1 + tanh(√(2/π)·(x + 0.044715·x³))) as tanh(y) = 2/(1 + exp(−2y)) − 1: 3 muls (x·x, b·x², x·sum), 2 adds, exp, div an element |
    /// | shift | one add an element |
    /// | rms_norm | a row: w squares, w − 1 adds, 1 div (mean), 1 add (eps), 1 sqrt, w divs, w muls (gain) |
    /// | rope | a pair: 4 muls, 1 add, 1 sub |
    /// | rope_table | a frequency theta^(−i/d): i/d, log, mul, exp, reciprocal; a position and frequency: mul, cos, sin |
    /// | rope_linear | a frequency f: 1 div |
    /// | rope_llama3 | a frequency f: wavelength 2π/f (div), 2 cmps, f/factor (div), smooth = (original/wavelength − low)/(high − low) (div, sub, div), (1 − smooth)·scaled + smooth·f (sub, 2 muls, add); all of it whichever of the three is kept |
    /// | rope_yarn | a frequency f of index i: f/factor (div), ramp (i − low)/(high − low) (sub, div) clamped to 0 … 1 (2 cmps), ramp·interpolated + (1 − ramp)·f (sub, 2 muls, add) |
    /// | cache_write | copies only |
    /// | softmax | a row: w − 1 cmps (max), w subs, w exps, w − 1 adds, w divs |
    /// | embed | copies only |
    /// | argmax | a row: w − 1 cmps |
    /// | repeat_penalty | an element: cmp (sign), mul by the factor, which is 1 for unseen tokens |
    /// | nucleus | a row: w − 1 adds, 1 mul (top-p × sum), w cmps; sorting before it is data-dependent and not counted |
    /// | draw | a row: w − 1 adds, 1 mul (uniform × sum), w cmps |
    /// | silu_grad | s = 1 / (1 + exp(−x)), dy · s · (1 + x · (1 − s)): neg, exp, div, 3 adds, 3 muls an element |
    /// | gelu_grad | s = 1 / (1 + exp(x·(a + b·x²))) with gelu's a and b, dy·s·(1 + x·(1 − s)·(−a − 3b·x²)): 8 muls (x·x, b·x², x·sum, 3b·x², x·(1 − s), that·bracket, dy·s, that·sum), 5 adds, exp, div an element |
    /// | rms_norm_grad | a row, with h = gain · dy: w muls (h), 2w muls and 2(w − 1) adds (Σ x², Σ h·x), 1 div (mean), 1 add (eps), 1 sqrt, 1 div (inverse), 2 muls and 1 div (c = inverse² · Σ h·x / w), then inverse · (h − c · x): 2w muls, w adds |
    /// | gain_grad | a row: the inverse as above (w muls, w adds, 2 divs, 1 sqrt), dy · x · inverse: 2w muls; summed over rows: (rows − 1)·w adds |
    /// | softmax_grad | a row: y · (dy − Σ y·dy): 2w muls, w − 1 adds, w subs |
    /// | sum_rows | (rows − 1)·w adds |
    /// | embed_grad | one add an element |
    /// | cross_entropy | a row: w − 1 cmps (max), w subs, w exps, w − 1 adds, 1 log, 1 sub (target's logit), 1 mul (weight), 1 add (into the sum) |
    /// | cross_entropy_grad | a row: 1 div (weight over sum), w muls, 1 sub (at the target) |
    /// | sum_squares | n muls, n − 1 adds |
    /// | clip_factor | tensors − 1 adds, 1 sqrt, 1 add (1e-6), 1 div, 1 cmp |
    /// | adamw | an element: decay 1 mul; m: 2 muls, 1 add; v: 3 muls, 1 add; √v / c + eps: sqrt, div, add; p − rate · m / that: mul, div, sub |
    pub fn cost(&self) -> Cost {
        let other = |other| Cost { other, ..Cost::default() };
        let p = Primitives::default();
        match *self {
            Self::Matmul { b, m, k, n } => {
                let outputs = u128::from(b) * u128::from(m) * u128::from(n);
                Cost { macs: outputs * u128::from(k), outputs, other: p }
            }
            Self::Bias { rows, width } | Self::Mask { rows, width } => {
                other(Primitives { add: u128::from(rows) * u128::from(width), ..p })
            }
            Self::Add { n } => other(Primitives { add: n.into(), ..p }),
            Self::Mul { n } | Self::Scale { n } => other(Primitives { mul: n.into(), ..p }),
            Self::Silu { n } => {
                let n = n.into();
                other(Primitives { neg: n, exp: n, add: n, div: n, ..p })
            }
            Self::Gelu { n } => {
                let n = u128::from(n);
                other(Primitives { mul: 3 * n, add: 2 * n, exp: n, div: n, ..p })
            }
            Self::Shift { n } => other(Primitives { add: n.into(), ..p }),
            Self::RmsNorm { rows, width } => {
                let (r, w) = (u128::from(rows), u128::from(width));
                let (mul, add, div) = (2 * r * w, r * w, r * (w + 1));
                other(Primitives { mul, add, div, sqrt: r, ..p })
            }
            Self::Rope { n } => other(Primitives { mul: 2 * u128::from(n), add: n.into(), ..p }),
            Self::RopeTable { positions, half } => {
                let (t, h) = (u128::from(positions), u128::from(half));
                let (div, mul, trig) = (2 * h, h + t * h, 2 * t * h);
                other(Primitives { div, mul, trig, log: h, exp: h, ..p })
            }
            Self::RopeLinear { half } => other(Primitives { div: half.into(), ..p }),
            Self::RopeLlama3 { half } => {
                let h = u128::from(half);
                other(Primitives { div: 4 * h, add: 3 * h, mul: 2 * h, cmp: 2 * h, ..p })
            }
            Self::RopeYarn { half } => {
                let h = u128::from(half);
                other(Primitives { div: 2 * h, add: 3 * h, mul: 2 * h, cmp: 2 * h, ..p })
            }
            Self::Softmax { rows, width } => {
                let (r, w) = (u128::from(rows), u128::from(width));
                let (cmp, add) = (r * (w - 1), r * (2 * w - 1));
                other(Primitives { cmp, add, exp: r * w, div: r * w, ..p })
            }
            Self::Embed { .. } | Self::CacheWrite { .. } => Cost::default(),
            Self::Argmax { rows, width } => {
                other(Primitives { cmp: u128::from(rows) * (u128::from(width) - 1), ..p })
            }
            Self::RepeatPenalty { rows, width } => {
                let n = u128::from(rows) * u128::from(width);
                other(Primitives { cmp: n, mul: n, ..p })
            }
            Self::Nucleus { rows, width } | Self::Draw { rows, width } => {
                let (r, w) = (u128::from(rows), u128::from(width));
                other(Primitives { add: r * (w - 1), mul: r, cmp: r * w, ..p })
            }
            Self::SiluGrad { n } => {
                let n = u128::from(n);
                other(Primitives { neg: n, exp: n, div: n, add: 3 * n, mul: 3 * n, ..p })
            }
            Self::GeluGrad { n } => {
                let n = u128::from(n);
                other(Primitives { mul: 8 * n, add: 5 * n, exp: n, div: n, ..p })
            }
            Self::RmsNormGrad { rows, width } => {
                let (r, w) = (u128::from(rows), u128::from(width));
                let (mul, add) = (r * (5 * w + 2), r * (3 * w - 1));
                other(Primitives { mul, add, div: 3 * r, sqrt: r, ..p })
            }
            Self::GainGrad { rows, width } => {
                let (r, w) = (u128::from(rows), u128::from(width));
                let (mul, add) = (3 * r * w, r * w + (r - 1) * w);
                other(Primitives { mul, add, div: 2 * r, sqrt: r, ..p })
            }
            Self::SoftmaxGrad { rows, width } => {
                let (r, w) = (u128::from(rows), u128::from(width));
                other(Primitives { mul: 2 * r * w, add: r * (2 * w - 1), ..p })
            }
            Self::SumRows { rows, width } => {
                other(Primitives { add: (u128::from(rows) - 1) * u128::from(width), ..p })
            }
            Self::EmbedGrad { rows, width } => {
                other(Primitives { add: u128::from(rows) * u128::from(width), ..p })
            }
            Self::CrossEntropy { rows, width } => {
                let (r, w) = (u128::from(rows), u128::from(width));
                let (cmp, add) = (r * (w - 1), r * (2 * w + 1));
                other(Primitives { cmp, add, exp: r * w, log: r, mul: r, ..p })
            }
            Self::CrossEntropyGrad { rows, width } => {
                let r = u128::from(rows);
                other(Primitives { div: r, mul: r * u128::from(width), add: r, ..p })
            }
            Self::SumSquares { n } => {
                let n = u128::from(n);
                other(Primitives { mul: n, add: n - 1, ..p })
            }
            Self::ClipFactor { tensors } => {
                other(Primitives { add: tensors.into(), sqrt: 1, div: 1, cmp: 1, ..p })
            }
            Self::AdamW { n } => {
                let n = u128::from(n);
                other(Primitives { mul: 7 * n, add: 4 * n, div: 2 * n, sqrt: n, ..p })
            }
        }
    }
}

impl Ledger {
    /// What the whole ledger is made of.
    ///
    /// # Errors
    /// A sum past 128 bits.
    pub fn cost(&self) -> Result<Cost> {
        self.iter().try_fold(Cost::default(), |sum, (key, entry)| {
            key.op
                .cost()
                .checked_mul(entry.calls.into())
                .and_then(|cost| sum.checked_add(cost))
                .ok_or_else(|| Error::Overflow("the ledger".into()).into())
        })
    }
}

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
        let text = std::fs::read_to_string(file).map_err(|e| bad(e.to_string()))?;
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

    fn priced(prices: &Prices, op: Op) -> u128 {
        prices.flops(&op.cost()).unwrap()
    }

    #[test]
    fn hand_computed_costs() {
        // A 2×3 · 3×4 product: 8 outputs of 3 muls and 2 adds.
        let matmul = Op::Matmul { b: 1, m: 2, k: 3, n: 4 };
        assert_eq!(priced(&Prices::unit(), matmul), 24 + 16);
        assert_eq!(priced(&Prices::matmul(), matmul), 48);
        // A row of 4: 4 squares + 4 gains, 3 adds + 1 eps, 4 + 1 divs, 1 root.
        let norm = Op::RmsNorm { rows: 1, width: 4 };
        assert_eq!(priced(&Prices::unit(), norm), 8 + 4 + 5 + 1);
        assert_eq!(priced(&Prices::coursework(), norm), 8 + 4 + 5 + 10);
        assert_eq!(priced(&Prices::matmul(), norm), 0);
        // Rows of 3: 2 cmps, 3 subs + 2 adds, 3 exps, 3 divs.
        let softmax = Op::Softmax { rows: 2, width: 3 };
        assert_eq!(softmax.cost().other.cmp, 4);
        assert_eq!(priced(&Prices::coursework(), softmax), 2 * (5 + 30 + 3));
        assert_eq!(priced(&Prices::unit(), Op::Rope { n: 4 }), 12);
        assert_eq!(priced(&Prices::coursework(), Op::Silu { n: 5 }), 5 * 12);
        // 2 frequencies: 2·2 divs, 2 logs, 2 exps, 2 muls; 3 positions: 6 muls, 12 trigs.
        let table = Op::RopeTable { positions: 3, half: 2 };
        assert_eq!(priced(&Prices::unit(), table), 4 + 2 + 2 + 2 + 6 + 12);
        // 2 frequencies: of Llama 3's 4 divs, 3 adds and 2 muls each, of YaRN's 2, 3 and 2.
        assert_eq!(priced(&Prices::unit(), Op::RopeLinear { half: 2 }), 2);
        assert_eq!(priced(&Prices::unit(), Op::RopeLlama3 { half: 2 }), 2 * 9);
        assert_eq!(priced(&Prices::unit(), Op::RopeYarn { half: 2 }), 2 * 7);
        // 3 muls, 2 adds, exp, div; of the gradient 8, 5, 1 and 1.
        assert_eq!(priced(&Prices::coursework(), Op::Gelu { n: 5 }), 5 * 16);
        assert_eq!(priced(&Prices::coursework(), Op::GeluGrad { n: 5 }), 5 * 24);
        assert_eq!(priced(&Prices::unit(), Op::Shift { n: 5 }), 5);
        assert_eq!(Op::CacheWrite { rows: 3, width: 8 }.cost(), Cost::default());
        assert_eq!(priced(&Prices::unit(), Op::Draw { rows: 2, width: 5 }), 2 * (4 + 1));
    }

    #[test]
    fn sums_past_128_bits_are_errors() {
        let huge = Op::Matmul { b: u64::MAX, m: 1 << 32, k: 1 << 31, n: 1 };
        let mut ledger = Ledger::default();
        let key = crate::ledger::Key {
            phase: crate::ledger::Phase::Forward,
            scope: crate::ledger::Scope { layer: None, module: crate::ledger::Module::LmHead },
            op: huge,
            dtype: crate::ledger::Dtype::F32,
        };
        ledger.add(key, 3, Default::default());
        assert!(ledger.cost().unwrap_err().to_string().contains("128 bits"));
    }

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
