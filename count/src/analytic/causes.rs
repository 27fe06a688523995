//! Why one structure's total is not another's: what it counts in place of what.

use serde::{Serialize, Serializer};

use crate::prices::{Cost, Primitives};

/// Something that a structure does differently from what is executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Cause {
    /// Each step feeds its whole context.
    NoCache,
    /// Logits of every position.
    AllLogits,
    /// Keys and values as wide as the hidden state.
    MultiHead,
    /// Queries as wide as the hidden state.
    QueryWidth,
    /// RoPE as a dense product.
    DenseRope,
    /// Scores scaled, not queries.
    ScaledScores,
    /// Softmax without its maximum.
    SoftmaxMax,
    /// SiLU's sign change.
    SiluSign,
    /// RMSNorm's epsilon.
    Epsilon,
    /// A bias on the head.
    HeadBias,
    /// Biases on q, k and v that there are not.
    AssumedBiases,
    /// SiLU where there is GELU.
    Gelu,
    /// Adapters elsewhere than they are.
    LoraTargets,
    /// The value adapter as wide as the hidden state.
    LoraWidth,
    /// Choosing tokens.
    Sampling,
    /// A mul and an add for each product of a sum.
    FirstAdd,
    /// Gains and biases in N.
    Vectors,
    /// The embedding in N.
    Embedding,
    /// No head in N.
    Head,
    /// No attention scores.
    Scores,
    /// Half of the attention scores.
    MaskedHalf,
    /// Windowed layers as if they saw everything.
    Windows,
    /// Windowed layers as far as a window shows.
    WithinWindows,
    /// No logits before the last position.
    LastLogits,
    /// One operation an element of softmax and activation.
    OneEach,
    /// No adapters.
    LoraProducts,
    /// No scales of 8-bit products.
    Scales,
    /// No bias adds.
    Biases,
    /// No scaling of the embedding.
    EmbeddingScale,
    /// No norms before attention, the MLP and the head.
    Norms,
    /// No norms after attention and the MLP.
    OuterNorms,
    /// No norms of q and k.
    HeadNorms,
    /// No 1 added to norms' gains.
    GainOffset,
    /// No rotation.
    Rotation,
    /// No cosines and sines.
    RotaryTables,
    /// No scaling of the queries.
    ScaledQueries,
    /// No mask.
    Mask,
    /// No softmax.
    Softmax,
    /// No activation and gate.
    Glu,
    /// No residual additions.
    Residuals,
    /// No scaling and adding of adapters.
    LoraSums,
    /// No weight gradients of frozen weights.
    FrozenWeights,
    /// No gradients below the first adapter.
    BelowAdapters,
    /// Cross-entropy and its gradient.
    Loss,
    /// Gradient norm, clipping, update.
    Optimizer,
    /// Layers run forward again.
    Recompute,
    /// Rows as wide as the longest of their pass.
    Padding,
    /// No scores of blocks that a mask hides wholly.
    SkippedBlocks,
    /// Scores computed again for their gradients.
    ScoresAgain,
    /// Softmax's gradient by the rows of attention's output.
    OutputDots,
    /// The backward pass of fused attention.
    FusedBackward,
    /// Gradients' products sum over lengths of their own.
    ShorterSums,
    /// Derivatives of what is no product.
    Derivatives,
    /// Sums of gradients of what is read more than once.
    SumsOfReaders,
    /// Sums of gradients over micro-steps.
    Accumulation,
    /// A file's figure has fewer digits than what its tool counts.
    Rounding,
    /// A file's figure is not what its tool counts.
    Unexplained,
    /// Another price of a primitive, or of a matmul.
    Price(&'static str),
}

impl Cause {
    /// A few words, as the table names it.
    pub fn name(self) -> String {
        match self {
            Self::NoCache => "no KV cache",
            Self::AllLogits => "logits of every position",
            Self::MultiHead => "multi-head k and v, not grouped",
            Self::QueryWidth => "q and o as wide as the model",
            Self::DenseRope => "dense RoPE product",
            Self::ScaledScores => "scores scaled, not queries",
            Self::SoftmaxMax => "softmax without its maximum",
            Self::SiluSign => "SiLU without its sign change",
            Self::Epsilon => "RMSNorm without epsilon",
            Self::HeadBias => "a bias on the head",
            Self::AssumedBiases => "biases assumed on q, k and v",
            Self::Gelu => "SiLU in place of GELU",
            Self::LoraTargets => "LoRA on q and v whatever is adapted",
            Self::LoraWidth => "LoRA on v as wide as the model",
            Self::Sampling => "choice of tokens",
            Self::FirstAdd => "an add for each product of a sum",
            Self::Vectors => "gains and biases in N",
            Self::Embedding => "embedding in N",
            Self::Head => "head not in N",
            Self::Scores => "attention scores left out",
            Self::MaskedHalf => "masked half of attention left out",
            Self::Windows => "whole context, not windows",
            Self::WithinWindows => "scores within windows alone",
            Self::LastLogits => "logits of last positions alone",
            Self::OneEach => "one operation an element",
            Self::LoraProducts => "LoRA left out",
            Self::Scales => "scales of 8-bit products left out",
            Self::Biases => "bias adds left out",
            Self::EmbeddingScale => "scaling of the embedding left out",
            Self::Norms => "norms left out",
            Self::OuterNorms => "norms after attention and MLP left out",
            Self::HeadNorms => "norms of q and k left out",
            Self::GainOffset => "1 added to gains left out",
            Self::Rotation => "RoPE left out",
            Self::RotaryTables => "rotary tables left out",
            Self::ScaledQueries => "scaling of queries left out",
            Self::Mask => "causal mask left out",
            Self::Softmax => "softmax left out",
            Self::Glu => "activation and gate left out",
            Self::Residuals => "residual adds left out",
            Self::LoraSums => "LoRA's scale and sum left out",
            Self::FrozenWeights => "no gradients of frozen weights",
            Self::BelowAdapters => "no gradients below the first adapters",
            Self::Loss => "loss",
            Self::Optimizer => "optimizer",
            Self::Recompute => "recomputed layers",
            Self::Padding => "padding",
            Self::SkippedBlocks => "blocks of scores skipped",
            Self::ScoresAgain => "scores computed again",
            Self::OutputDots => "softmax's gradient from attention's output",
            Self::FusedBackward => "backward of fused attention",
            Self::ShorterSums => "lengths of the sums in gradients",
            Self::Derivatives => "derivatives of what is no matmul",
            Self::SumsOfReaders => "gradients summed where they meet",
            Self::Accumulation => "gradients summed over micro-steps",
            Self::Rounding => "rounding of the printed figure",
            Self::Unexplained => "unexplained by the stated workload",
            Self::Price(what) => return format!("price of {what}"),
        }
        .into()
    }

    /// One sentence: what is counted in place of what.
    pub fn why(self) -> String {
        match self {
            Self::NoCache => "each pass runs over its whole context; a cache feeds new tokens only",
            Self::AllLogits => "final norm and head over all positions; only the last was asked for",
            Self::MultiHead => "k and v projections D wide; grouped heads make them K*d wide",
            Self::QueryWidth => "q and o taken D wide; this config's heads make them H*d wide",
            Self::DenseRope => {
                "a D x D rotation matrix, zeros included, for q and for k; a rotation of pairs takes 2 muls and 1 add an element"
            }
            Self::ScaledScores => {
                "each of T x T scores divided by a root taken in every layer; the executed model multiplies each query once"
            }
            Self::SoftmaxMax => "exp(x) / sum; executed is exp(x - max), a cmp and a sub a score",
            Self::SiluSign => "x / (1 + exp(-x)) without negating x",
            Self::Epsilon => "no add of epsilon under each root",
            Self::HeadBias => "an add a logit; the head has no bias",
            Self::AssumedBiases => "an add for each element of q, k and v; this model has none there",
            Self::Gelu => "x / (1 + exp(-x)) without its sign change; GELU takes a cubic of x for -x",
            Self::LoraTargets => "adapters of one rank counted on q and v of every layer; others are adapted",
            Self::LoraWidth => "v's adapter D wide in its output; it is K*d wide",
            Self::Sampling => {
                "nothing, or a plain softmax; executed are comparisons, temperature, penalties, top-p and the draw"
            }
            Self::FirstAdd => "a sum of k products as k muls and k adds; it takes k - 1 adds",
            Self::Vectors => "gains and biases multiplied by every token as matrices are",
            Self::Embedding => "the embedding multiplied by every token; it is looked up",
            Self::Head => "the head goes with the embeddings; it is a product of D x V",
            Self::Scores => "no q*k and no weighted values, which grow with the context",
            Self::MaskedHalf => "half of the T x T scores; kernels without causal skipping compute all",
            Self::Windows => {
                "every layer scores all of its context; windowed layers read the latest keys alone"
            }
            Self::WithinWindows => {
                "windowed layers score what a window shows; executed are all keys of tokens fed together"
            }
            Self::LastLogits => "the head over the last position of each sequence; all were asked for",
            Self::OneEach => "each element of softmax, and of SiLU, as a single operation",
            Self::LoraProducts => "no A and B products",
            Self::Scales => "no quantizing of the projections' inputs, and no scaling of their products",
            Self::Biases => "no adds of the projections' biases",
            Self::EmbeddingScale => "no factor sqrt(D) on embedded tokens",
            Self::Norms => "no squares, roots, divisions and gains of RMSNorm",
            Self::OuterNorms => "two norms a layer; this model has four",
            Self::HeadNorms => "no RMSNorm of each head's queries and keys",
            Self::GainOffset => "gains as they are stored; norms multiply by 1 + gain",
            Self::Rotation => "no rotation of q and k",
            Self::RotaryTables => "no cosines and sines of the positions, computed once",
            Self::ScaledQueries => "no factor 1/sqrt(d)",
            Self::Mask => "no add of 0 or -inf to each score",
            Self::Softmax => "no exponentials, sums and divisions of the scores",
            Self::Glu => "no activation and gate of the MLP",
            Self::Residuals => "no adds to the residual stream",
            Self::LoraSums => "no scale and no sum beside the adapted projections",
            Self::FrozenWeights => {
                "backward is not 2 x forward: weights that are not trained get no gradient"
            }
            Self::BelowAdapters => {
                "backward is not 2 x forward: nothing is computed towards what lies before every trained weight"
            }
            Self::Loss => "cross-entropy of every position, and its gradient",
            Self::Optimizer => "norm of the gradients, clipping and AdamW, once a step",
            Self::Recompute => "each layer runs forward again when its gradients are computed",
            Self::Padding => {
                "tokens and scores that fill rows up to the longest of their pass are executed"
            }
            Self::SkippedBlocks => {
                "no products, mask and softmax of blocks of scores that the mask hides wholly"
            }
            Self::ScoresAgain => {
                "scores and their softmax are not kept, but computed once more for their gradients"
            }
            Self::OutputDots => {
                "softmax's gradient takes off a row's output times its gradient, d products; else weights times theirs, one a score"
            }
            Self::FusedBackward => {
                "five products: the scores once more, and four gradients whoever needs them"
            }
            Self::ShorterSums => {
                "a sum of k products takes k - 1 adds, and gradients sum over rows or outputs"
            }
            Self::Derivatives => {
                "norms, softmax, SiLU and the rest have derivatives of their own, not twice the op"
            }
            Self::SumsOfReaders => "a tensor that several ops read gets the sum of their gradients",
            Self::Accumulation => "each further micro-step adds its gradients to the sum",
            Self::Rounding => "the file was printed with fewer digits, and the count is within them",
            Self::Unexplained => {
                "the file states another figure than its tool's formula gives for this workload"
            }
            Self::Price(_) => "the two price lists differ",
        }
        .into()
    }
}

impl Serialize for Cause {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&self.name())
    }
}

/// One cause's size: what a structure counts, in place of what is executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Term {
    /// The cause.
    pub cause: Cause,
    /// What the structure counts.
    pub counts: Cost,
    /// What it stands for.
    pub instead_of: Cost,
}

impl Term {
    /// `counts` in place of `instead_of`.
    pub(super) fn swap(cause: Cause, counts: Cost, instead_of: Cost) -> Self {
        Self { cause, counts, instead_of }
    }

    /// Counted, and not executed.
    pub(super) fn more(cause: Cause, counts: Cost) -> Self {
        Self::swap(cause, counts, Cost::default())
    }

    /// Executed, and not counted.
    pub(super) fn less(cause: Cause, instead_of: Cost) -> Self {
        Self::swap(cause, Cost::default(), instead_of)
    }

    /// Executed primitives that are not counted.
    pub(super) fn none_of(cause: Cause, other: Primitives) -> Self {
        Self::less(cause, Cost { other, ..Cost::default() })
    }

    /// `n` such terms; none past 128 bits.
    pub(super) fn checked_mul(self, n: u128) -> Option<Self> {
        let (counts, instead_of) = (self.counts.checked_mul(n)?, self.instead_of.checked_mul(n)?);
        Some(Self { counts, instead_of, ..self })
    }
}
