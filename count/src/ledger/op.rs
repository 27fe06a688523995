//! The ops: what can run, with which dimensions.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::MomentDtype;

/// One executed tensor operation, with the dimensions it ran with. What each costs, and why, is
/// derived at [`Op::cost`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Op {
    /// `b` products (m×k)·(k×n).
    Matmul {
        /// Batches.
        b: u64,
        /// Rows of the left side.
        m: u64,
        /// Summed dimension.
        k: u64,
        /// Columns of the right side.
        n: u64,
    },
    /// Rows in 8 bits: each divided by a scale of its own, that of its largest magnitude.
    Quantize {
        /// Rows.
        rows: u64,
        /// Elements in a row.
        width: u64,
    },
    /// A product of 8-bit rows times the scales of both sides.
    Dequantize {
        /// Rows.
        rows: u64,
        /// Elements in a row.
        width: u64,
    },
    /// One bias vector added to each row.
    Bias {
        /// Rows.
        rows: u64,
        /// Elements in a row.
        width: u64,
    },
    /// Element-wise sum of two tensors of `n` elements.
    Add {
        /// Elements.
        n: u64,
    },
    /// Element-wise product of two tensors of `n` elements.
    Mul {
        /// Elements.
        n: u64,
    },
    /// `n` elements times one factor.
    Scale {
        /// Elements.
        n: u64,
    },
    /// x · sigmoid(x).
    Silu {
        /// Elements.
        n: u64,
    },
    /// x · Φ(x), Φ by its tanh approximation.
    Gelu {
        /// Elements.
        n: u64,
    },
    /// 1 + gain: what a norm multiplies by where its gain is stored less 1.
    Shift {
        /// Elements of the gain.
        n: u64,
    },
    /// x / sqrt(mean(x²) + eps) · gain.
    RmsNorm {
        /// Rows.
        rows: u64,
        /// Elements in a row.
        width: u64,
    },
    /// Rotation of pairs by position.
    Rope {
        /// Elements.
        n: u64,
    },
    /// Cosines and sines of every position and frequency.
    RopeTable {
        /// Positions.
        positions: u64,
        /// Frequencies: half a head.
        half: u64,
    },
    /// Rotary frequencies divided by one factor.
    RopeLinear {
        /// Frequencies: half a head.
        half: u64,
    },
    /// Rotary frequencies stretched as Llama 3.1's.
    RopeLlama3 {
        /// Frequencies: half a head.
        half: u64,
    },
    /// Rotary frequencies stretched as YaRN's.
    RopeYarn {
        /// Frequencies: half a head.
        half: u64,
    },
    /// Rows of keys or values copied into the cache.
    CacheWrite {
        /// Rows.
        rows: u64,
        /// Elements in a row: all heads together.
        width: u64,
    },
    /// The mask (0 or −∞), causal or of a window too, added to attention scores.
    Mask {
        /// Rows of scores.
        rows: u64,
        /// Scores in a row.
        width: u64,
    },
    /// exp(x − max) / sum, row by row.
    Softmax {
        /// Rows.
        rows: u64,
        /// Elements in a row.
        width: u64,
    },
    /// Rows copied out of a table.
    Embed {
        /// Rows.
        rows: u64,
        /// Elements in a row.
        width: u64,
    },
    /// Index of each row's largest element.
    Argmax {
        /// Rows.
        rows: u64,
        /// Elements in a row.
        width: u64,
    },
    /// Logits of tokens already seen pushed towards zero probability.
    RepeatPenalty {
        /// Rows.
        rows: u64,
        /// Elements in a row.
        width: u64,
    },
    /// Running sum of sorted probabilities against top-p.
    Nucleus {
        /// Rows.
        rows: u64,
        /// Candidates in a row.
        width: u64,
    },
    /// One index drawn from each row of weights by inverting the running sum.
    Draw {
        /// Rows.
        rows: u64,
        /// Candidates in a row.
        width: u64,
    },
    /// Gradient of [`Op::Silu`].
    SiluGrad {
        /// Elements.
        n: u64,
    },
    /// Gradient of [`Op::Gelu`].
    GeluGrad {
        /// Elements.
        n: u64,
    },
    /// Gradient of [`Op::RmsNorm`] towards its input.
    RmsNormGrad {
        /// Rows.
        rows: u64,
        /// Elements in a row.
        width: u64,
    },
    /// Gradient of [`Op::RmsNorm`] towards its gain.
    GainGrad {
        /// Rows.
        rows: u64,
        /// Elements in a row.
        width: u64,
    },
    /// Gradient of [`Op::Softmax`].
    SoftmaxGrad {
        /// Rows.
        rows: u64,
        /// Elements in a row.
        width: u64,
    },
    /// exp(x − max) / sum once more, row by row, from the maxima and sums that [`Op::Softmax`] left.
    SoftmaxAgain {
        /// Rows.
        rows: u64,
        /// Elements in a row.
        width: u64,
    },
    /// Each row of one tensor times the same row of another: of attention's output and its gradient,
    /// what [`Op::ScoresGrad`] takes off.
    RowDot {
        /// Rows.
        rows: u64,
        /// Elements in a row.
        width: u64,
    },
    /// Gradient of [`Op::Softmax`] where the sum of each row, Σ y·dy, is known.
    ScoresGrad {
        /// Rows.
        rows: u64,
        /// Elements in a row.
        width: u64,
    },
    /// Rows summed into one: the gradient of [`Op::Bias`] towards the bias.
    SumRows {
        /// Rows.
        rows: u64,
        /// Elements in a row.
        width: u64,
    },
    /// Rows added into a table: the gradient of [`Op::Embed`].
    EmbedGrad {
        /// Rows.
        rows: u64,
        /// Elements in a row.
        width: u64,
    },
    /// −log softmax of each row's target, weighted and summed.
    CrossEntropy {
        /// Rows.
        rows: u64,
        /// Classes.
        width: u64,
    },
    /// Its gradient, from the exponentials and sums that it leaves.
    CrossEntropyGrad {
        /// Rows.
        rows: u64,
        /// Classes.
        width: u64,
    },
    /// Sum of the squares of one tensor.
    SumSquares {
        /// Elements.
        n: u64,
    },
    /// Norm of all gradients from their sums of squares, and the factor that clips it.
    ClipFactor {
        /// Sums.
        tensors: u64,
    },
    /// One AdamW update.
    AdamW {
        /// Elements.
        n: u64,
        /// How both moments are kept.
        #[serde(default, skip_serializing_if = "MomentDtype::is_f32")]
        moments: MomentDtype,
    },
}

impl Op {
    /// The op's name, without dimensions.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Matmul { .. } => "matmul",
            Self::Quantize { .. } => "quantize",
            Self::Dequantize { .. } => "dequantize",
            Self::Bias { .. } => "bias",
            Self::Add { .. } => "add",
            Self::Mul { .. } => "mul",
            Self::Scale { .. } => "scale",
            Self::Silu { .. } => "silu",
            Self::Gelu { .. } => "gelu",
            Self::Shift { .. } => "shift",
            Self::RmsNorm { .. } => "rms_norm",
            Self::Rope { .. } => "rope",
            Self::RopeTable { .. } => "rope_table",
            Self::RopeLinear { .. } => "rope_linear",
            Self::RopeLlama3 { .. } => "rope_llama3",
            Self::RopeYarn { .. } => "rope_yarn",
            Self::CacheWrite { .. } => "cache_write",
            Self::Mask { .. } => "mask",
            Self::Softmax { .. } => "softmax",
            Self::Embed { .. } => "embed",
            Self::Argmax { .. } => "argmax",
            Self::RepeatPenalty { .. } => "repeat_penalty",
            Self::Nucleus { .. } => "nucleus",
            Self::Draw { .. } => "draw",
            Self::SiluGrad { .. } => "silu_grad",
            Self::GeluGrad { .. } => "gelu_grad",
            Self::RmsNormGrad { .. } => "rms_norm_grad",
            Self::GainGrad { .. } => "gain_grad",
            Self::SoftmaxGrad { .. } => "softmax_grad",
            Self::SoftmaxAgain { .. } => "softmax_again",
            Self::RowDot { .. } => "row_dot",
            Self::ScoresGrad { .. } => "scores_grad",
            Self::SumRows { .. } => "sum_rows",
            Self::EmbedGrad { .. } => "embed_grad",
            Self::CrossEntropy { .. } => "cross_entropy",
            Self::CrossEntropyGrad { .. } => "cross_entropy_grad",
            Self::SumSquares { .. } => "sum_squares",
            Self::ClipFactor { .. } => "clip_factor",
            Self::AdamW { .. } => "adamw",
        }
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())?;
        match *self {
            Self::Matmul { b, m, k, n } => write!(f, "[b={b} m={m} k={k} n={n}]"),
            Self::Add { n }
            | Self::Mul { n }
            | Self::Scale { n }
            | Self::Silu { n }
            | Self::SiluGrad { n }
            | Self::Gelu { n }
            | Self::GeluGrad { n }
            | Self::Shift { n }
            | Self::Rope { n }
            | Self::SumSquares { n }
            | Self::AdamW { n, moments: MomentDtype::F32 } => write!(f, "[n={n}]"),
            Self::AdamW { n, moments } => write!(f, "[n={n} moments={}]", moments.name()),
            Self::ClipFactor { tensors } => write!(f, "[tensors={tensors}]"),
            Self::RopeTable { positions, half } => {
                write!(f, "[positions={positions} half={half}]")
            }
            Self::RopeLinear { half } | Self::RopeLlama3 { half } | Self::RopeYarn { half } => {
                write!(f, "[half={half}]")
            }
            Self::Quantize { rows, width }
            | Self::Dequantize { rows, width }
            | Self::Bias { rows, width }
            | Self::CacheWrite { rows, width }
            | Self::Mask { rows, width }
            | Self::RmsNorm { rows, width }
            | Self::Softmax { rows, width }
            | Self::Embed { rows, width }
            | Self::Argmax { rows, width }
            | Self::RepeatPenalty { rows, width }
            | Self::Nucleus { rows, width }
            | Self::Draw { rows, width }
            | Self::RmsNormGrad { rows, width }
            | Self::GainGrad { rows, width }
            | Self::SoftmaxGrad { rows, width }
            | Self::SoftmaxAgain { rows, width }
            | Self::RowDot { rows, width }
            | Self::ScoresGrad { rows, width }
            | Self::SumRows { rows, width }
            | Self::EmbedGrad { rows, width }
            | Self::CrossEntropy { rows, width }
            | Self::CrossEntropyGrad { rows, width } => write!(f, "[rows={rows} width={width}]"),
        }
    }
}
