//! What a model is: its widths and counts ([`ModelConfig`]) and its adapters ([`LoraConfig`]).

mod hub;
mod ignored;
mod lora;
mod modules;
mod presets;
mod projection;
mod validate;

pub use ignored::{Ignored, Matters};
pub use lora::{Adapted, LoraConfig, Site};
pub use modules::{Layers, Modules, TargetModules};
pub use projection::Projection;

/// What a dense decoder is: its widths and counts, and the choices in which families differ.
///
/// A model's forward pass, its closed form and its predicted ledger read these fields and never
/// the family's name.
///
/// In a document it is the family's own `config.json`.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// The family, as `model_type` names it: which names tensors and keys have, and nothing else.
    pub family: Family,
    /// V: rows of the embedding and of the head.
    pub vocab_size: usize,
    /// D: width of the residual stream.
    pub hidden_size: usize,
    /// F: width between gate/up and down.
    pub intermediate_size: usize,
    /// L: decoder layers.
    pub num_hidden_layers: usize,
    /// H: query heads.
    pub num_attention_heads: usize,
    /// K: key/value heads; H / K query heads share one (grouped-query attention).
    pub num_key_value_heads: usize,
    /// d: width of a head; D / H where the file is silent.
    pub head_dim: Option<usize>,
    /// Longest context that the model was made for, in tokens.
    pub max_position_embeddings: usize,
    /// Added to the mean square under RMSNorm's root.
    pub rms_norm_eps: f64,
    /// The head is the embedding, transposed.
    pub tie_word_embeddings: bool,
    /// It is not, for the checkpoint stores two tensors, but the config ties them, or that of the
    /// published model of this size does: formulas that go by parameters take one of the two.
    pub head_stored_apart: bool,
    /// Rotary positions of the layers that see the whole context.
    pub rope: Rope,
    /// Those of windowed layers; none: the same.
    pub local_rope: Option<Rope>,
    /// Layers that see the latest tokens alone; none: every layer sees the whole context.
    pub window: Option<Window>,
    /// Which projections have a bias.
    pub bias: Biases,
    /// Queries and keys are normed, head by head, before they are rotated.
    pub qk_norm: bool,
    /// A norm stands after attention and after the MLP as well as before each.
    pub sandwich_norms: bool,
    /// A norm multiplies by 1 + gain, not by gain.
    pub unit_offset_norms: bool,
    /// What the gate of the MLP goes through.
    pub activation: Activation,
    /// Embedded tokens are multiplied by √D.
    pub scaled_embedding: bool,
    /// Scores are divided by the root of this; of d where there is none.
    pub query_pre_attn_scalar: Option<f64>,
}

/// A family of dense decoders, as `model_type` names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Family {
    /// Qwen2 and Qwen2.5: biases on q, k and v.
    #[default]
    Qwen2,
    /// Llama 3, SmolLM2 and others of its shape.
    Llama,
    /// Mistral: Llama with windows.
    Mistral,
    /// Qwen3, dense: norms on q and k.
    Qwen3,
    /// Gemma 3, text.
    Gemma3,
}

/// Rotary positions: which angle a pair of elements is turned by at each position.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rope {
    /// Base of the frequencies: pair i of d/2 turns by theta^(−2i/d) a position.
    pub theta: f64,
    /// What stretches them over longer contexts.
    pub scaling: RopeScaling,
}

impl Default for Rope {
    fn default() -> Self {
        Self { theta: 10_000.0, scaling: RopeScaling::Default }
    }
}

/// How rotary frequencies are stretched over contexts longer than the model was first trained on.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum RopeScaling {
    /// Not at all.
    #[default]
    Default,
    /// All of them by one factor (Chen et al. 2023).
    Linear {
        /// Frequencies are divided by it.
        factor: f64,
    },
    /// Llama 3.1's: long wavelengths by a factor, short ones not, those between in proportion.
    Llama3 {
        /// Frequencies of long wavelengths are divided by it.
        factor: f64,
        /// Wavelengths above the original context over this are long.
        low_freq_factor: f64,
        /// Wavelengths below the original context over this are short.
        high_freq_factor: f64,
        /// The original context, in tokens.
        original_max_position_embeddings: usize,
    },
    /// YaRN (Peng et al. 2023): the same by a ramp over pairs, and all angles' cosines and sines
    /// times one factor.
    Yarn {
        /// Frequencies past the ramp are divided by it.
        factor: f64,
        /// Turns over the original context where the ramp begins.
        beta_fast: f64,
        /// Turns over the original context where it ends.
        beta_slow: f64,
        /// The original context, in tokens.
        original_max_position_embeddings: usize,
        /// Factor of cosines and sines, resolved where a file leaves it to a formula.
        attention_factor: f64,
        /// The ramp's ends are rounded to whole pairs.
        truncate: bool,
    },
}

impl RopeScaling {
    /// The same without a scaling that scales by 1: one name for what is one model.
    #[must_use]
    pub fn simplified(self) -> Self {
        match self {
            Self::Linear { factor: 1.0 }
            | Self::Llama3 { factor: 1.0, .. }
            | Self::Yarn { factor: 1.0, attention_factor: 1.0, .. } => Self::Default,
            Self::Default | Self::Linear { .. } | Self::Llama3 { .. } | Self::Yarn { .. } => self,
        }
    }
}

/// Sliding-window attention.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Window {
    /// W: a query sees its own token and the W − 1 before it.
    pub width: usize,
    /// Which layers are windowed: one answer per layer.
    pub layers: Vec<bool>,
}

/// Which projections have a bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Biases {
    /// Queries, keys and values.
    pub qkv: bool,
    /// Attention's output.
    pub o: bool,
    /// Gate, up and down.
    pub mlp: bool,
}

/// What the gate of the MLP goes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Activation {
    /// x / (1 + exp(−x)).
    #[default]
    Silu,
    /// GELU by its tanh approximation (Hendrycks and Gimpel 2016).
    GeluTanh,
}

impl ModelConfig {
    /// d: width of one head.
    pub fn head_dim(&self) -> usize {
        self.head_dim.unwrap_or(self.hidden_size / self.num_attention_heads)
    }

    /// Whether `projection` has a bias.
    pub fn has_bias(&self, projection: Projection) -> bool {
        match projection {
            Projection::QProj | Projection::KProj | Projection::VProj => self.bias.qkv,
            Projection::OProj => self.bias.o,
            Projection::GateProj | Projection::UpProj | Projection::DownProj => self.bias.mlp,
        }
    }

    /// W of a windowed layer; none where `layer` sees the whole context.
    pub fn window_of(&self, layer: usize) -> Option<usize> {
        let window = self.window.as_ref()?;
        window.layers.get(layer).copied().unwrap_or(false).then_some(window.width)
    }

    /// How many layers are windowed.
    pub fn windowed_layers(&self) -> usize {
        (0..self.num_hidden_layers).filter(|layer| self.window_of(*layer).is_some()).count()
    }

    /// The rotary tables that a run makes: the global one, and that of windowed layers where it
    /// differs.
    pub fn ropes(&self) -> Vec<Rope> {
        std::iter::once(self.rope).chain(self.local_rope).collect()
    }

    /// Which of [`ModelConfig::ropes`] `layer` reads.
    pub fn rope_of(&self, layer: usize) -> usize {
        usize::from(self.local_rope.is_some() && self.window_of(layer).is_some())
    }

    /// The factor on queries: 1/√d, or 1/√`query_pre_attn_scalar`.
    pub fn attention_scale(&self) -> f64 {
        self.query_pre_attn_scalar.unwrap_or(self.head_dim() as f64).sqrt().recip()
    }

    /// The factor on embedded tokens, √D, where there is one.
    pub fn embedding_scale(&self) -> Option<f64> {
        self.scaled_embedding.then(|| (self.hidden_size as f64).sqrt())
    }

    /// H·d: width of all query heads together.
    pub fn q_width(&self) -> usize {
        self.num_attention_heads * self.head_dim()
    }

    /// K·d: width of all key (or value) heads together.
    pub fn kv_width(&self) -> usize {
        self.num_key_value_heads * self.head_dim()
    }

    /// Parameters of the base model: embedding, layers, final norm and, if untied, the head.
    ///
    /// Per layer: seven matrices, the biases that there are, two or four norms D wide, and where
    /// queries and keys are normed two d wide.
    pub fn parameters(&self) -> u128 {
        let [v, d] = [self.vocab_size, self.hidden_size].map(|n| n as u128);
        let projections: u128 = Projection::ALL
            .into_iter()
            .map(|projection| {
                let (k, n) = projection.widths(self);
                (k as u128 + u128::from(self.has_bias(projection))) * n as u128
            })
            .sum();
        let norms = if self.sandwich_norms { 4 } else { 2 };
        let head_norms = if self.qk_norm { 2 * self.head_dim() as u128 } else { 0 };
        let layer = projections + norms * d + head_norms;
        let tables = if self.tie_word_embeddings { 1 } else { 2 };
        tables * v * d + self.num_hidden_layers as u128 * layer + d
    }

    /// N of formulas that go by parameters: [`parameters`](Self::parameters) with one table for
    /// embedding and head where the config ties them, though the checkpoint may store two.
    pub fn nominal_parameters(&self) -> u128 {
        let apart = !self.tie_word_embeddings && self.head_stored_apart;
        self.parameters() - if apart { self.table() } else { 0 }
    }

    /// Whether embedding and head are one table in N of formulas.
    pub fn nominally_tied(&self) -> bool {
        self.tie_word_embeddings || self.head_stored_apart
    }

    /// Parameters of the embedding: V·D.
    pub fn table(&self) -> u128 {
        self.vocab_size as u128 * self.hidden_size as u128
    }
}
