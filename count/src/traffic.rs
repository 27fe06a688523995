//! Bytes that ops read and write, from the ledger's dimensions.

use std::ops::Add;

use serde::{Deserialize, Serialize};

use crate::ledger::{Dtype, Key, Ledger, Module, Op, Phase};

/// Bytes touched, each tensor once a call. Copies and changes of layout are no ops and not here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Traffic {
    /// Parameters read: matrices, biases, gains, embedding rows; in an update, read and written
    /// with their moments.
    pub weights: u128,
    /// Keys and values read by attention, and written for it.
    pub kv_cache: u128,
    /// All else: what ops take from one another and give, gradients among it.
    pub activations: u128,
}

impl Traffic {
    /// Bytes of parameters and cache: what lies in memory before the op, whatever the caches of
    /// the chip hold of its neighbours' results.
    pub fn at_rest(&self) -> u128 {
        self.weights + self.kv_cache
    }

    /// The same, in units of so many bytes or calls.
    fn times(self, n: u64) -> Self {
        let n = u128::from(n);
        Self {
            weights: self.weights * n,
            kv_cache: self.kv_cache * n,
            activations: self.activations * n,
        }
    }

    /// The share of one of `n` equal parts, rounded down.
    pub fn per(self, n: u64) -> Self {
        let n = u128::from(n.max(1));
        Self {
            weights: self.weights / n,
            kv_cache: self.kv_cache / n,
            activations: self.activations / n,
        }
    }
}

impl Add for Traffic {
    type Output = Self;

    fn add(self, rhs: Self) -> Self {
        Self {
            weights: self.weights + rhs.weights,
            kv_cache: self.kv_cache + rhs.kv_cache,
            activations: self.activations + rhs.activations,
        }
    }
}

/// What the right side of a product is.
enum Right {
    Weight,
    KeysOrValues,
    Activation,
}

impl Key {
    /// Bytes that one call touches: its inputs read once, its output written once.
    ///
    /// | op | elements |
    /// |---|---|
    /// | matmul | left b·m·k and output b·m·n are activations; right b·k·n is a weight, keys or values, or, in gradients of weights and of attention, an activation |
    /// | in 8 bits | as many elements; the output in the type that it is scaled to |
    /// | quantize | rows in, as many out in 8 bits; a scale a row, in f32 |
    /// | dequantize | one in, one out; a scale a row, and a column's, which is a weight |
    /// | bias | the vector; rows in and out |
    /// | shift | the gain; as much out |
    /// | cache_write | rows in; the cache's out |
    /// | rms_norm | the gain; rows in and out. Its gradient: the gain, two in, one out |
    /// | embed | rows read from the table, and given. Its gradient: rows read, table's rows read and written |
    /// | add, mul, gradients of silu, gelu and softmax | two in, one out |
    /// | softmax_again | one in, one out; a maximum and a sum a row |
    /// | row_dot | two in; one element a row out |
    /// | scores_grad | two in, one out; one element a row |
    /// | scale, silu, gelu, rope, mask, softmax, repeat_penalty, nucleus, cross_entropy and its gradient | one in, one out; factors, tables and the mask are small and shared |
    /// | rope_table | cosines and sines out |
    /// | rope_linear, rope_llama3, rope_yarn | frequencies in and out |
    /// | argmax, draw, sum_squares | one in |
    /// | sum_rows; gradient of a gain | rows in (two), one row out |
    /// | clip_factor | the sums |
    /// | adamw | the gradient; parameter and both moments, of their own type, read and written |
    pub fn traffic(&self) -> Traffic {
        let area = |rows: u64, width: u64| u128::from(rows) * u128::from(width);
        let activations = |n: u128| Traffic { activations: n, ..Traffic::default() };
        // Of an element, and of a scale; and of an element of what 8 bits are scaled to.
        let (bytes, scale) = (u128::from(self.dtype.bytes()), u128::from(Dtype::F32.bytes()));
        let scaled = u128::from(self.dtype.base().bytes());
        let elements = match self.op {
            Op::Matmul { b, m, k, n } => {
                let (b, right) = (u128::from(b), u128::from(b) * area(k, n) * bytes);
                let rest = b * (area(m, k) * bytes + area(m, n) * scaled);
                return match self.right() {
                    Right::Weight => {
                        Traffic { weights: right, activations: rest, ..Traffic::default() }
                    }
                    Right::KeysOrValues => {
                        Traffic { kv_cache: right, activations: rest, ..Traffic::default() }
                    }
                    Right::Activation => activations(right + rest),
                };
            }
            Op::Quantize { rows, width } => {
                let narrow = u128::from(Dtype::Fp8.bytes());
                return activations(
                    area(rows, width) * (bytes + narrow) + scale * u128::from(rows),
                );
            }
            Op::Dequantize { rows, width } => {
                let weights = scale * u128::from(width);
                let activations = 2 * area(rows, width) * bytes + scale * u128::from(rows);
                return Traffic { weights, activations, ..Traffic::default() };
            }
            Op::Bias { rows, width } | Op::RmsNorm { rows, width } => Traffic {
                weights: width.into(),
                activations: 2 * area(rows, width),
                ..Traffic::default()
            },
            Op::RmsNormGrad { rows, width } => Traffic {
                weights: width.into(),
                activations: 3 * area(rows, width),
                ..Traffic::default()
            },
            Op::Shift { n } => {
                Traffic { weights: n.into(), activations: n.into(), ..Traffic::default() }
            }
            Op::CacheWrite { rows, width } => {
                let n = area(rows, width);
                Traffic { kv_cache: n, activations: n, ..Traffic::default() }
            }
            Op::Embed { rows, width } => {
                let n = area(rows, width);
                Traffic { weights: n, activations: n, ..Traffic::default() }
            }
            Op::EmbedGrad { rows, width } => activations(3 * area(rows, width)),
            Op::Add { n } | Op::Mul { n } | Op::SiluGrad { n } | Op::GeluGrad { n } => {
                activations(3 * u128::from(n))
            }
            Op::SoftmaxGrad { rows, width } => activations(3 * area(rows, width)),
            Op::SoftmaxAgain { rows, width } => {
                activations(2 * area(rows, width) + 2 * u128::from(rows))
            }
            Op::RowDot { rows, width } => activations(2 * area(rows, width) + u128::from(rows)),
            Op::ScoresGrad { rows, width } => activations(3 * area(rows, width) + u128::from(rows)),
            Op::Scale { n } | Op::Silu { n } | Op::Gelu { n } | Op::Rope { n } => {
                activations(2 * u128::from(n))
            }
            Op::Mask { rows, width }
            | Op::Softmax { rows, width }
            | Op::RepeatPenalty { rows, width }
            | Op::Nucleus { rows, width }
            | Op::CrossEntropy { rows, width }
            | Op::CrossEntropyGrad { rows, width } => activations(2 * area(rows, width)),
            Op::RopeTable { positions, half } => activations(2 * area(positions, half)),
            Op::RopeLinear { half } | Op::RopeLlama3 { half } | Op::RopeYarn { half } => {
                activations(2 * u128::from(half))
            }
            Op::Argmax { rows, width } | Op::Draw { rows, width } => activations(area(rows, width)),
            Op::SumRows { rows, width } => activations(area(rows, width) + u128::from(width)),
            Op::GainGrad { rows, width } => activations(2 * area(rows, width) + u128::from(width)),
            Op::SumSquares { n } | Op::ClipFactor { tensors: n } => activations(n.into()),
            // The parameter and its moments may be of different types.
            Op::AdamW { n, moments } => {
                let (n, own) = (u128::from(n), u128::from(self.dtype.bytes()));
                let weights = 2 * n * (own + 2 * u128::from(moments.bytes()));
                return Traffic { weights, activations: own * n, ..Traffic::default() };
            }
        };
        elements.times(self.dtype.bytes())
    }

    fn right(&self) -> Right {
        match (self.phase, self.scope.module) {
            (Phase::BackwardA | Phase::BackwardB | Phase::BackwardW, _) => Right::Activation,
            (_, Module::Proj(_) | Module::Lora(..) | Module::LmHead) => Right::Weight,
            (
                Phase::Forward | Phase::Recompute | Phase::Prefill | Phase::Decode,
                Module::SelfAttn,
            ) => Right::KeysOrValues,
            (_, _) => Right::Activation,
        }
    }
}

impl Ledger {
    /// Bytes touched in the phases that `counted` picks.
    pub fn traffic(&self, counted: impl Fn(Phase) -> bool) -> Traffic {
        let of_phases = self.iter().filter(|(key, _)| counted(key.phase));
        let bytes = of_phases.map(|(key, entry)| key.traffic().times(entry.calls));
        bytes.fold(Traffic::default(), Add::add)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::Projection,
        ledger::{Lora, MomentDtype, Scope},
    };

    /// (weights, cache, activations) in elements.
    fn elements(phase: Phase, module: Module, op: Op) -> [u128; 3] {
        let scope = Scope { layer: None, module };
        let one = |dtype: Dtype| {
            let Traffic { weights, kv_cache, activations } =
                Key { phase, scope, op, dtype }.traffic();
            [weights, kv_cache, activations].map(|n| n / u128::from(dtype.bytes()))
        };
        assert_eq!(one(Dtype::F32), one(Dtype::BF16));
        one(Dtype::F32)
    }

    #[test]
    fn products_tell_weights_from_keys_and_gradients() {
        let op = Op::Matmul { b: 2, m: 3, k: 5, n: 7 };
        // Left 2·3·5 and output 2·3·7 make 72; right 2·5·7 makes 70.
        let q = Projection::QProj;
        let of = |phase, module| elements(phase, module, op);
        assert_eq!(of(Phase::Decode, Module::Proj(q)), [70, 0, 72]);
        assert_eq!(of(Phase::BackwardX, Module::Proj(q)), [70, 0, 72]);
        assert_eq!(of(Phase::BackwardX, Module::Lora(q, Lora::A)), [70, 0, 72]);
        assert_eq!(of(Phase::BackwardA, Module::Lora(q, Lora::A)), [0, 0, 142]);
        assert_eq!(of(Phase::BackwardW, Module::LmHead), [0, 0, 142]);
        assert_eq!(of(Phase::Decode, Module::SelfAttn), [0, 70, 72]);
        assert_eq!(of(Phase::BackwardX, Module::SelfAttn), [0, 0, 142]);
    }

    #[test]
    fn what_is_in_8_bits_is_told_by_bytes() {
        let of = |module, op, dtype| {
            let scope = Scope { layer: Some(0), module };
            let Traffic { weights, kv_cache, activations } =
                Key { phase: Phase::Prefill, scope, op, dtype }.traffic();
            [weights, kv_cache, activations]
        };
        let k = Module::Proj(Projection::KProj);
        // 3·5 and 5·7 in bytes, 3·7 in bf16.
        let product = Op::Matmul { b: 1, m: 3, k: 5, n: 7 };
        assert_eq!(of(k, product, Dtype::Fp8), [35, 0, 15 + 42]);
        assert_eq!(of(k, product, Dtype::BF16), [70, 0, 30 + 42]);
        // 24 elements of 2 bytes become bytes, with 3 scales.
        let (rows, width) = (3, 8);
        assert_eq!(of(k, Op::Quantize { rows, width }, Dtype::BF16), [0, 0, 48 + 24 + 12]);
        assert_eq!(of(k, Op::Dequantize { rows, width }, Dtype::BF16), [32, 0, 96 + 12]);
    }

    #[test]
    fn other_ops_read_their_inputs_and_write_their_output_once() {
        let of = |module, op| elements(Phase::Decode, module, op);
        let (rows, width) = (3, 8);
        let k = Module::Proj(Projection::KProj);
        assert_eq!(of(k, Op::Bias { rows, width }), [8, 0, 48]);
        assert_eq!(of(Module::SelfAttn, Op::CacheWrite { rows, width }), [0, 24, 24]);
        assert_eq!(of(Module::Norm, Op::Shift { n: 8 }), [8, 0, 8]);
        assert_eq!(of(Module::Norm, Op::RmsNorm { rows, width }), [8, 0, 48]);
        assert_eq!(of(Module::EmbedTokens, Op::Embed { rows, width }), [24, 0, 24]);
        assert_eq!(of(Module::Residual, Op::Add { n: 5 }), [0, 0, 15]);
        assert_eq!(of(Module::SelfAttn, Op::Softmax { rows, width }), [0, 0, 48]);
        assert_eq!(of(Module::SelfAttn, Op::SoftmaxAgain { rows, width }), [0, 0, 48 + 6]);
        assert_eq!(of(Module::SelfAttn, Op::RowDot { rows, width }), [0, 0, 48 + 3]);
        assert_eq!(of(Module::SelfAttn, Op::ScoresGrad { rows, width }), [0, 0, 72 + 3]);
        assert_eq!(of(Module::Sampler, Op::Argmax { rows, width }), [0, 0, 24]);
    }

    #[test]
    fn moments_are_read_and_written_in_their_own_type() {
        let scope = Scope { layer: None, module: Module::Optimizer };
        let of = |moments| {
            let op = Op::AdamW { n: 5, moments };
            Key { phase: Phase::Optimizer, scope, op, dtype: Dtype::F32 }.traffic()
        };
        let bytes = |weights| Traffic { weights, activations: 20, ..Traffic::default() };
        assert_eq!(of(MomentDtype::F32), bytes(5 * 24));
        assert_eq!(of(MomentDtype::BF16), bytes(5 * 16));
    }

    #[test]
    fn a_ledger_sums_calls_of_the_phases_asked_for() {
        let scope = Scope { layer: Some(0), module: Module::Residual };
        let key = |phase| Key { phase, scope, op: Op::Add { n: 10 }, dtype: Dtype::BF16 };
        let mut ledger = Ledger::default();
        ledger.add(key(Phase::Prefill), 1, Default::default());
        ledger.add(key(Phase::Decode), 4, Default::default());
        // Four times 30 elements of 2 bytes.
        let decode = ledger.traffic(|phase| phase == Phase::Decode);
        assert_eq!(decode, Traffic { activations: 240, ..Traffic::default() });
        assert_eq!(decode.per(4).activations, 60);
        assert_eq!(ledger.traffic(|_| true).activations, 300);
    }
}
