//! What each op is made of.

use super::{Cost, Primitives};
use crate::{
    error::{Error, Result},
    ledger::{Ledger, Op},
};

impl Op {
    /// What the op is made of, as its kernel executes it.
    ///
    /// | op | derivation |
    /// |---|---|
    /// | matmul | each of b·m·n outputs: k muls, k − 1 adds |
    /// | quantize | a row: w cmps (largest magnitude, and the smallest that it is taken for), 2 divs (scale = that / 448, and its reciprocal), w muls; taking off a sign and rounding to 8 bits are free, as rounding to bf16 is |
    /// | dequantize | an element: 2 muls, by its row's scale and its column's |
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
    /// | softmax_again | a row whose maximum and sum are known: w subs, w exps, w divs |
    /// | row_dot | a row: w muls, w − 1 adds |
    /// | scores_grad | a row whose s = Σ y·dy is known: y · (dy − s): w subs, w muls |
    /// | sum_rows | (rows − 1)·w adds |
    /// | embed_grad | one add an element |
    /// | cross_entropy | a row: w − 1 cmps (max), w subs, w exps, w − 1 adds, 1 log, 1 sub (target's logit), 1 mul (weight), 1 add (into the sum) |
    /// | cross_entropy_grad | a row: 1 div (weight over sum), w muls, 1 sub (at the target) |
    /// | sum_squares | n muls, n − 1 adds |
    /// | clip_factor | tensors − 1 adds, 1 sqrt, 1 add (1e-6), 1 div, 1 cmp |
    /// | adamw | an element: decay 1 mul; m: 2 muls, 1 add; v: 3 muls, 1 add; √v / c + eps: sqrt, div, add; p − rate · m / that: mul, div, sub; moments that are kept in bf16 are converted, by whole numbers |
    pub fn cost(&self) -> Cost {
        let other = |other| Cost { other, ..Cost::default() };
        let p = Primitives::default();
        match *self {
            Self::Matmul { b, m, k, n } => {
                let outputs = u128::from(b) * u128::from(m) * u128::from(n);
                Cost { macs: outputs * u128::from(k), outputs, other: p }
            }
            Self::Quantize { rows, width } => {
                let (r, n) = (u128::from(rows), u128::from(rows) * u128::from(width));
                other(Primitives { cmp: n, div: 2 * r, mul: n, ..p })
            }
            Self::Dequantize { rows, width } => {
                other(Primitives { mul: 2 * u128::from(rows) * u128::from(width), ..p })
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
            Self::SoftmaxAgain { rows, width } => {
                let n = u128::from(rows) * u128::from(width);
                other(Primitives { add: n, exp: n, div: n, ..p })
            }
            Self::RowDot { rows, width } => {
                let (r, w) = (u128::from(rows), u128::from(width));
                other(Primitives { mul: r * w, add: r * (w - 1), ..p })
            }
            Self::ScoresGrad { rows, width } => {
                let n = u128::from(rows) * u128::from(width);
                other(Primitives { add: n, mul: n, ..p })
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
            Self::AdamW { n, moments: _ } => {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prices::Prices;

    fn priced(prices: &Prices, op: Op) -> u128 {
        prices.flops(&op.cost()).unwrap()
    }

    #[test]
    fn hand_computed_costs() {
        // A 2×3 · 3×4 product: 8 outputs of 3 muls and 2 adds.
        let matmul = Op::Matmul { b: 1, m: 2, k: 3, n: 4 };
        assert_eq!(priced(&Prices::unit(), matmul), 24 + 16);
        assert_eq!(priced(&Prices::matmul(), matmul), 48);
        // Rows of 3: 3 cmps, 2 divs and 3 muls each; 2 muls an element.
        let quantize = Op::Quantize { rows: 2, width: 3 };
        assert_eq!(quantize.cost().other.cmp, 2 * 3);
        assert_eq!(priced(&Prices::unit(), quantize), 2 * (2 + 3));
        assert_eq!(priced(&Prices::unit(), Op::Dequantize { rows: 2, width: 3 }), 2 * 6);
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
        // Rows of 3: subs, exps and divs; 3 muls and 2 adds; subs and muls.
        let (rows, width) = (2, 3);
        assert_eq!(
            priced(&Prices::coursework(), Op::SoftmaxAgain { rows, width }),
            2 * (3 + 30 + 3)
        );
        assert_eq!(priced(&Prices::unit(), Op::RowDot { rows, width }), 2 * 5);
        assert_eq!(priced(&Prices::unit(), Op::ScoresGrad { rows, width }), 2 * 6);
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
}
