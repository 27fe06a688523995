//! Which operations are counted: ours, the notebook's, or a formula that people quote.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

use super::{
    closed_form, formulas, notebook,
    torch::{self, Attention},
};
use crate::{error::Result, tally::Tally, workload::Workload};

/// A list of operations. What each of the formulas leaves out is written at its function.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
pub enum Structure {
    /// As executed by this program.
    Exact,
    /// The notebook's formulas: multi-head attention, dense RoPE, no cache, backward 2 × forward.
    Notebook,
    /// Kaplan et al. 2020: 2N a token forward, 6N in training; N with embeddings.
    #[cfg_attr(feature = "clap", value(name = "6nd"))]
    SixNd,
    /// The same with N without embeddings and head.
    #[cfg_attr(feature = "clap", value(name = "6nd-no-embedding"))]
    SixNdNoEmbedding,
    /// PaLM (Chowdhery et al. 2022) and nanoGPT: 6N + 12·L·H·Q·T a token in training.
    Palm,
    /// Megatron-LM: every matmul three times in training; all attention scores.
    Megatron,
    /// The same with half of the attention scores.
    MegatronCausal,
    /// Hugging Face Trainer's floating_point_ops: 6 · tokens · non-embedding parameters.
    HfTrainer,
    /// PyTorch's FlopCounterMode: 2·m·n·k of each matmul dispatched, attention product by product.
    #[cfg_attr(feature = "clap", value(name = "torch:eager", alias = "torch"))]
    Torch,
    /// The same with fused attention: five products backward.
    #[cfg_attr(feature = "clap", value(name = "torch:sdpa"))]
    TorchSdpa,
    /// The same by a release without a formula for the CPU's fused attention, which counts none.
    #[cfg_attr(feature = "clap", value(name = "torch:sdpa-cpu"))]
    TorchSdpaCpu,
}

impl Structure {
    /// All of them, in the order of the help text.
    pub const ALL: [Self; 11] = [
        Self::Exact,
        Self::Notebook,
        Self::SixNd,
        Self::SixNdNoEmbedding,
        Self::Palm,
        Self::Megatron,
        Self::MegatronCausal,
        Self::HfTrainer,
        Self::Torch,
        Self::TorchSdpa,
        Self::TorchSdpaCpu,
    ];

    /// The one of this name; `torch` is what `torch:eager` was called while it was alone.
    pub fn named(name: &str) -> Option<Self> {
        let name = if name == "torch" { Self::Torch.name() } else { name };
        Self::ALL.into_iter().find(|structure| structure.name() == name)
    }

    /// The name on the command line and in JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::Notebook => "notebook",
            Self::SixNd => "6nd",
            Self::SixNdNoEmbedding => "6nd-no-embedding",
            Self::Palm => "palm",
            Self::Megatron => "megatron",
            Self::MegatronCausal => "megatron-causal",
            Self::HfTrainer => "hf-trainer",
            Self::Torch => "torch:eager",
            Self::TorchSdpa => "torch:sdpa",
            Self::TorchSdpaCpu => "torch:sdpa-cpu",
        }
    }
}

impl std::fmt::Display for Structure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

impl Serialize for Structure {
    fn serialize<S: Serializer>(&self, s: S) -> std::result::Result<S::Ok, S::Error> {
        s.serialize_str(self.name())
    }
}

impl<'de> Deserialize<'de> for Structure {
    fn deserialize<D: Deserializer<'de>>(d: D) -> std::result::Result<Self, D::Error> {
        let name = String::deserialize(d)?;
        Self::named(&name).ok_or_else(|| D::Error::custom(format!("no structure `{name}`")))
    }
}

/// What `structure` counts for `workload`, by phase and component, in time independent of its
/// lengths and steps. Formulas that state multiply-accumulates have no `outputs` in their costs:
/// they count a mul and an add for each.
///
/// # Errors
/// A workload that [`Workload::validate`] refuses or that the structure does not cover, or a sum
/// past 128 bits.
pub fn count(structure: Structure, workload: &Workload) -> Result<Tally> {
    workload.validate()?;
    match structure {
        Structure::Exact => closed_form(workload),
        Structure::Notebook => notebook::count(workload),
        Structure::SixNd => formulas::six_nd(workload),
        Structure::SixNdNoEmbedding => formulas::six_nd_no_embedding(workload),
        Structure::Palm => formulas::palm(workload),
        Structure::Megatron => formulas::megatron(workload),
        Structure::MegatronCausal => formulas::megatron_causal(workload),
        Structure::HfTrainer => formulas::hf_trainer(workload),
        Structure::Torch => torch::count(workload, Attention::Eager),
        Structure::TorchSdpa => torch::count(workload, Attention::Sdpa),
        Structure::TorchSdpaCpu => torch::count(workload, Attention::Unseen),
    }
}
