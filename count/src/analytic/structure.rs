//! Which operations are counted: ours, the notebook's, or a formula that people quote.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

use super::{
    closed_form::{closed_form, unpadded},
    formulas, notebook,
    profilers::{self, Profiler},
    torch::{self, Attention},
};
use crate::{
    error::{Error, Result},
    tally::Tally,
    workload::{Task, Workload},
};

/// A list of operations. What each of the formulas leaves out is written at its function.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
pub enum Structure {
    /// As executed by this program.
    Exact,
    /// The same without what is executed for padding.
    #[cfg_attr(feature = "clap", value(name = "exact:unpadded", alias = "unpadded"))]
    Unpadded,
    /// As executed, but with every score of attention computed, and kept in training.
    #[cfg_attr(feature = "clap", value(name = "exact:dense"))]
    ExactDense,
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
    /// DeepSpeed's FlopsProfiler and calflops with attention product by product; 3 × in training.
    #[cfg_attr(
        feature = "clap",
        value(name = "deepspeed:eager", aliases = ["deepspeed", "calflops:eager", "calflops"])
    )]
    DeepSpeed,
    /// DeepSpeed's FlopsProfiler with fused attention.
    #[cfg_attr(feature = "clap", value(name = "deepspeed:sdpa"))]
    DeepSpeedSdpa,
    /// calflops with fused attention, of which it counts none.
    #[cfg_attr(feature = "clap", value(name = "calflops:sdpa"))]
    CalflopsSdpa,
    /// ptflops' default engine with attention product by product; forward passes alone.
    Ptflops,
    /// torchtitan: 6N + 12·L·H·Q·T a token in training, N with the head and without an embedding of
    /// its own.
    Torchtitan,
    /// MaxText's calculate_tflops_training_per_device: half of the scores, or of Gemma 3's windows.
    #[cfg_attr(feature = "clap", value(name = "maxtext"))]
    MaxText,
    /// NeMo's LoRA formula: frozen matmuls twice in training, not three times; no adapters.
    NemoLora,
    /// vLLM's estimated_flops_per_gpu: every matmul of serving, logits of last positions alone.
    Vllm,
}

impl Structure {
    /// All of them, in the order of the help text.
    pub const ALL: [Self; 21] = [
        Self::Exact,
        Self::Unpadded,
        Self::ExactDense,
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
        Self::DeepSpeed,
        Self::DeepSpeedSdpa,
        Self::CalflopsSdpa,
        Self::Ptflops,
        Self::Torchtitan,
        Self::MaxText,
        Self::NemoLora,
        Self::Vllm,
    ];

    /// The one of this name. A tool's name alone is its count of attention product by product, and
    /// calflops counts that as DeepSpeed does.
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "torch" => Some(Self::Torch),
            "unpadded" => Some(Self::Unpadded),
            "deepspeed" | "calflops" | "calflops:eager" => Some(Self::DeepSpeed),
            name => Self::ALL.into_iter().find(|structure| structure.name() == name),
        }
    }

    /// Refuses what the tool or its formula has no count of.
    ///
    /// # Errors
    /// The flag at fault.
    pub fn covers(self, task: &Task) -> Result<()> {
        let whole = match task {
            Task::Train { rows, .. } | Task::Evaluate { rows, .. } => rows.is_whole(),
            Task::Forward { .. } | Task::Generate { .. } | Task::Verify { .. } => true,
        };
        let (trains, all_weights, cached) = match *task {
            Task::Train { full, .. } => (true, full, true),
            Task::Generate { kv_cache, .. } => (false, false, kv_cache),
            Task::Forward { .. } | Task::Verify { .. } | Task::Evaluate { .. } => {
                (false, false, true)
            }
        };
        let refused = match self {
            Self::Ptflops if trains => Some(("train", "counts forward passes and no training")),
            Self::Vllm if trains => Some(("train", "counts serving and no training")),
            Self::Vllm if !cached => Some(("--no-kv-cache", "always keeps a cache")),
            Self::MaxText if !trains => Some((task.name(), "counts training alone")),
            Self::MaxText if !whole => Some(("rows", "counts rows of one length")),
            Self::NemoLora if all_weights => {
                Some(("--full", "counts a frozen base; megatron-causal counts a trained one"))
            }
            Self::Exact
            | Self::Unpadded
            | Self::ExactDense
            | Self::Notebook
            | Self::SixNd
            | Self::SixNdNoEmbedding
            | Self::Palm
            | Self::Megatron
            | Self::MegatronCausal
            | Self::HfTrainer
            | Self::Torch
            | Self::TorchSdpa
            | Self::TorchSdpaCpu
            | Self::DeepSpeed
            | Self::DeepSpeedSdpa
            | Self::CalflopsSdpa
            | Self::Ptflops
            | Self::Torchtitan
            | Self::MaxText
            | Self::NemoLora
            | Self::Vllm => None,
        };
        match refused {
            Some((flag, why)) => Err(Error::flag(flag, format!("{self} {why}")).into()),
            None => Ok(()),
        }
    }

    /// The name on the command line and in JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::Unpadded => "exact:unpadded",
            Self::ExactDense => "exact:dense",
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
            Self::DeepSpeed => "deepspeed:eager",
            Self::DeepSpeedSdpa => "deepspeed:sdpa",
            Self::CalflopsSdpa => "calflops:sdpa",
            Self::Ptflops => "ptflops",
            Self::Torchtitan => "torchtitan",
            Self::MaxText => "maxtext",
            Self::NemoLora => "nemo-lora",
            Self::Vllm => "vllm",
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
    structure.covers(&workload.task)?;
    match structure {
        Structure::Exact => closed_form(workload),
        Structure::Unpadded => unpadded(workload),
        Structure::ExactDense => closed_form(&workload.dense()),
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
        Structure::DeepSpeed => profilers::count(workload, Profiler::DeepSpeed),
        Structure::DeepSpeedSdpa => profilers::count(workload, Profiler::DeepSpeedSdpa),
        Structure::CalflopsSdpa => profilers::count(workload, Profiler::CalflopsSdpa),
        Structure::Ptflops => profilers::count(workload, Profiler::Ptflops),
        Structure::Torchtitan => formulas::torchtitan(workload),
        Structure::MaxText => formulas::maxtext(workload),
        Structure::NemoLora => formulas::nemo_lora(workload),
        Structure::Vllm => formulas::vllm(workload),
    }
}
