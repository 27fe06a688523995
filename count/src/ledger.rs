//! Facts: which op ran, where, with which dimensions, how often.
//!
//! A [`Key`] names an op; a [`Ledger`] is a multiset of keys. Both the predicted and the executed
//! side of an audit are ledgers. What an op costs is an opinion and lives in [`crate::prices`].

use std::{collections::BTreeMap, fmt, time::Duration};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

use crate::config::Projection;

/// What the run was doing when the op ran.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Phase {
    /// Tables made once for a run.
    Setup,
    /// A forward pass on its own, of training or of an evaluation.
    Forward,
    /// A layer's forward pass run again for its gradients, its activations not having been kept.
    Recompute,
    /// Cross-entropy of the logits, and its gradient.
    Loss,
    /// Gradients of a forward pass, in formulas that do not say towards what.
    Backward,
    /// Gradients towards activations.
    BackwardX,
    /// Gradients of adapters' A, summed over micro-steps.
    BackwardA,
    /// Gradients of adapters' B, likewise.
    BackwardB,
    /// Gradients of base weights, likewise.
    BackwardW,
    /// The gradients' norm, and their scaling down to it.
    Clipping,
    /// Updates of the trained parameters.
    Optimizer,
    /// The pass over the prompt in a generation.
    Prefill,
    /// The passes after it, one for each further token.
    Decode,
    /// Choosing the next token.
    Sampling,
}

impl Phase {
    /// All of them, in order.
    pub const ALL: [Self; 14] = [
        Self::Setup,
        Self::Forward,
        Self::Recompute,
        Self::Loss,
        Self::Backward,
        Self::BackwardX,
        Self::BackwardA,
        Self::BackwardB,
        Self::BackwardW,
        Self::Clipping,
        Self::Optimizer,
        Self::Prefill,
        Self::Decode,
        Self::Sampling,
    ];

    /// Lower-case name for tables and JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Setup => "setup",
            Self::Forward => "forward",
            Self::Recompute => "recompute",
            Self::Loss => "loss",
            Self::Backward => "backward",
            Self::BackwardX => "backward dX",
            Self::BackwardA => "backward dA",
            Self::BackwardB => "backward dB",
            Self::BackwardW => "backward dW",
            Self::Clipping => "clipping",
            Self::Optimizer => "optimizer",
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::Sampling => "sampling",
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl Serialize for Phase {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(self.name())
    }
}

impl<'de> Deserialize<'de> for Phase {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let name = String::deserialize(d)?;
        let found = Self::ALL.into_iter().find(|phase| phase.name() == name);
        found.ok_or_else(|| D::Error::custom(format!("no phase `{name}`")))
    }
}

/// A module of the model, as checkpoints name it; inside a layer or outside all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Module {
    /// Token embedding.
    EmbedTokens,
    /// Cosine and sine tables.
    RotaryEmb,
    /// Norm before attention.
    InputLayernorm,
    /// A base projection.
    Proj(Projection),
    /// The adapter beside a projection.
    Lora(Projection, Lora),
    /// Norm of each head's queries.
    QNorm,
    /// Norm of each head's keys.
    KNorm,
    /// Attention between the projections: RoPE, cache, scores, softmax, weighted values.
    SelfAttn,
    /// Residual additions, in the layer itself.
    Residual,
    /// Norm after attention; before the MLP where a layer has two norms.
    PostAttentionLayernorm,
    /// Norm before the MLP where a layer has four norms.
    PreFeedforwardLayernorm,
    /// Activation and gate, between the MLP's projections.
    Mlp,
    /// Norm after the MLP where a layer has four norms.
    PostFeedforwardLayernorm,
    /// Final norm.
    Norm,
    /// Output head.
    LmHead,
    /// Token choice.
    Sampler,
    /// Cross-entropy.
    Loss,
    /// What an optimizer step does over all parameters at once.
    Optimizer,
}

/// Which part of an adapter: y += scale · B(A x).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Lora {
    /// A x: in → rank.
    A,
    /// B(A x): rank → out.
    B,
    /// The factor alpha / rank.
    Scale,
    /// The addition to the base projection.
    Sum,
}

/// Where an op ran: `layers.3.self_attn.q_proj.lora_a`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Scope {
    /// The decoder layer, from 0; none outside the layers.
    pub layer: Option<u32>,
    /// The module.
    pub module: Module,
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(layer) = self.layer {
            write!(f, "layers.{layer}")?;
            if self.module != Module::Residual {
                f.write_str(".")?;
            }
        }
        match self.module {
            Module::EmbedTokens => f.write_str("embed_tokens"),
            Module::RotaryEmb => f.write_str("rotary_emb"),
            Module::InputLayernorm => f.write_str("input_layernorm"),
            Module::Proj(p) => write!(f, "{}.{p}", p.parent()),
            Module::Lora(p, part) => {
                let part = match part {
                    Lora::A => "lora_a",
                    Lora::B => "lora_b",
                    Lora::Scale => "lora_scale",
                    Lora::Sum => "lora_sum",
                };
                write!(f, "{}.{p}.{part}", p.parent())
            }
            Module::QNorm => f.write_str("self_attn.q_norm"),
            Module::KNorm => f.write_str("self_attn.k_norm"),
            Module::SelfAttn => f.write_str("self_attn"),
            Module::Residual => Ok(()),
            Module::PostAttentionLayernorm => f.write_str("post_attention_layernorm"),
            Module::PreFeedforwardLayernorm => f.write_str("pre_feedforward_layernorm"),
            Module::Mlp => f.write_str("mlp"),
            Module::PostFeedforwardLayernorm => f.write_str("post_feedforward_layernorm"),
            Module::Norm => f.write_str("norm"),
            Module::LmHead => f.write_str("lm_head"),
            Module::Sampler => f.write_str("sampler"),
            Module::Loss => f.write_str("loss"),
            Module::Optimizer => f.write_str("optimizer"),
        }
    }
}

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
    },
}

impl Op {
    /// The op's name, without dimensions.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Matmul { .. } => "matmul",
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
            | Self::AdamW { n } => write!(f, "[n={n}]"),
            Self::ClipFactor { tensors } => write!(f, "[tensors={tensors}]"),
            Self::RopeTable { positions, half } => {
                write!(f, "[positions={positions} half={half}]")
            }
            Self::RopeLinear { half } | Self::RopeLlama3 { half } | Self::RopeYarn { half } => {
                write!(f, "[half={half}]")
            }
            Self::Bias { rows, width }
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
            | Self::SumRows { rows, width }
            | Self::EmbedGrad { rows, width }
            | Self::CrossEntropy { rows, width }
            | Self::CrossEntropyGrad { rows, width } => write!(f, "[rows={rows} width={width}]"),
        }
    }
}

/// Element type that an op computed in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// IEEE single.
    F32,
    /// IEEE half.
    F16,
    /// bfloat16.
    #[cfg_attr(feature = "clap", value(name = "bf16"))]
    BF16,
}

impl Dtype {
    /// Lower-case name, as flags and JSON spell it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
        }
    }

    /// Bytes of one element.
    pub const fn bytes(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }
}

/// What makes two calls the same fact.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Key {
    /// What the run was doing.
    pub phase: Phase,
    /// Where in the model.
    pub scope: Scope,
    /// Which op, with its dimensions.
    pub op: Op,
    /// In which element type.
    pub dtype: Dtype,
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {} {}", self.phase.name(), self.scope, self.op, self.dtype.name())
    }
}

/// How often a key ran and, where it was asked for, how long in all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Entry {
    /// Calls.
    pub calls: u64,
    /// Time of all calls; zero where ops were not timed.
    pub time: Duration,
}

/// The multiset {(phase, scope, op, dtype)} → calls.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Ledger(BTreeMap<Key, Entry>);

impl Serialize for Ledger {
    /// As a list of [key, calls]; times are not kept.
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_seq(self.iter().map(|(key, entry)| (key, entry.calls)))
    }
}

impl<'de> Deserialize<'de> for Ledger {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let mut ledger = Self::default();
        for (key, calls) in Vec::<(Key, u64)>::deserialize(d)? {
            ledger.add(key, calls, Duration::ZERO);
        }
        Ok(ledger)
    }
}

impl Ledger {
    /// Counts `calls` more calls of `key`.
    pub fn add(&mut self, key: Key, calls: u64, time: Duration) {
        let entry = self.0.entry(key).or_default();
        entry.calls += calls;
        entry.time += time;
    }

    /// Adds everything that `other` holds.
    pub fn extend(&mut self, other: Self) {
        for (key, entry) in other.0 {
            self.add(key, entry.calls, entry.time);
        }
    }

    /// Keys in order, with their entries.
    pub fn iter(&self) -> impl Iterator<Item = (&Key, &Entry)> {
        self.0.iter()
    }

    /// Calls of `key`; 0 if it never ran.
    pub fn calls(&self, key: &Key) -> u64 {
        self.0.get(key).map_or(0, |e| e.calls)
    }

    /// Distinct keys.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether nothing ran.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scopes_read_as_checkpoint_paths() {
        let at = |layer, module| Scope { layer, module }.to_string();
        let q = Projection::QProj;
        assert_eq!(at(Some(3), Module::Lora(q, Lora::A)), "layers.3.self_attn.q_proj.lora_a");
        assert_eq!(at(Some(0), Module::Proj(Projection::UpProj)), "layers.0.mlp.up_proj");
        assert_eq!(at(Some(7), Module::Residual), "layers.7");
        assert_eq!(at(Some(2), Module::QNorm), "layers.2.self_attn.q_norm");
        let after = Module::PostFeedforwardLayernorm;
        assert_eq!(at(Some(2), after), "layers.2.post_feedforward_layernorm");
        assert_eq!(at(None, Module::LmHead), "lm_head");
    }
}
