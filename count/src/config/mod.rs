//! What a model is: its widths and counts ([`ModelConfig`]) and its adapters ([`LoraConfig`]).

use std::{fmt, path::Path, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// What a dense decoder is: its widths and counts, and the choices in which families differ.
///
/// A model's forward pass, its closed form and its predicted ledger read these fields and never
/// the family's name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelConfig {
    /// The family, as `model_type` names it: which names tensors and keys have, and nothing else.
    #[serde(default, rename = "model_type")]
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
    #[serde(default)]
    pub head_dim: Option<usize>,
    /// Longest context that the model was made for, in tokens.
    pub max_position_embeddings: usize,
    /// Added to the mean square under RMSNorm's root.
    #[serde(default = "default_rms_norm_eps")]
    pub rms_norm_eps: f64,
    /// The head is the embedding, transposed.
    #[serde(default)]
    pub tie_word_embeddings: bool,
    /// Rotary positions of the layers that see the whole context.
    #[serde(default)]
    pub rope: Rope,
    /// Those of windowed layers; none: the same.
    #[serde(default)]
    pub local_rope: Option<Rope>,
    /// Layers that see the latest tokens alone; none: every layer sees the whole context.
    #[serde(default)]
    pub window: Option<Window>,
    /// Which projections have a bias.
    #[serde(default)]
    pub bias: Biases,
    /// Queries and keys are normed, head by head, before they are rotated.
    #[serde(default)]
    pub qk_norm: bool,
    /// A norm stands after attention and after the MLP as well as before each.
    #[serde(default)]
    pub sandwich_norms: bool,
    /// A norm multiplies by 1 + gain, not by gain.
    #[serde(default)]
    pub unit_offset_norms: bool,
    /// What the gate of the MLP goes through.
    #[serde(default)]
    pub activation: Activation,
    /// Embedded tokens are multiplied by √D.
    #[serde(default)]
    pub scaled_embedding: bool,
    /// Scores are divided by the root of this; of d where there is none.
    #[serde(default)]
    pub query_pre_attn_scalar: Option<f64>,
}

/// A family of dense decoders, as `model_type` names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
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
    #[serde(rename = "gemma3_text")]
    Gemma3,
}

/// Rotary positions: which angle a pair of elements is turned by at each position.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Rope {
    /// Base of the frequencies: pair i of d/2 turns by theta^(−2i/d) a position.
    pub theta: f64,
    /// What stretches them over longer contexts.
    #[serde(default)]
    pub scaling: RopeScaling,
}

impl Default for Rope {
    fn default() -> Self {
        Self { theta: 10_000.0, scaling: RopeScaling::Default }
    }
}

/// How rotary frequencies are stretched over contexts longer than the model was first trained on.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(tag = "rope_type", rename_all = "lowercase")]
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

/// Sliding-window attention.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Window {
    /// W: a query sees its own token and the W − 1 before it.
    pub width: usize,
    /// Which layers are windowed: one answer per layer.
    pub layers: Vec<bool>,
}

/// Which projections have a bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Biases {
    /// Queries, keys and values.
    pub qkv: bool,
    /// Attention's output.
    pub o: bool,
    /// Gate, up and down.
    pub mlp: bool,
}

/// What the gate of the MLP goes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// x / (1 + exp(−x)).
    #[default]
    Silu,
    /// GELU by its tanh approximation (Hendrycks and Gimpel 2016).
    GeluTanh,
}

fn default_rms_norm_eps() -> f64 {
    1e-6
}

/// One preset: name, D, F, L, H, K, V, tied head. Source: each checkpoint's published
/// `config.json` (Qwen/Qwen2.5-*-Instruct); `tiny` is for tests and first steps.
type Preset = (&'static str, usize, usize, usize, usize, usize, usize, bool);

const PRESETS: &[Preset] = &[
    ("tiny", 32, 48, 3, 4, 2, 320, true),
    ("qwen2.5-0.5b", 896, 4864, 24, 14, 2, 151_936, true),
    ("qwen2.5-1.5b", 1536, 8960, 28, 12, 2, 151_936, true),
    ("qwen2.5-3b", 2048, 11_008, 36, 16, 2, 151_936, true),
    ("qwen2.5-7b", 3584, 18_944, 28, 28, 4, 152_064, false),
    ("qwen2.5-14b", 5120, 13_824, 48, 40, 8, 152_064, false),
    ("qwen2.5-32b", 5120, 27_648, 64, 40, 8, 152_064, false),
    ("qwen2.5-72b", 8192, 29_568, 80, 64, 8, 152_064, false),
];

impl ModelConfig {
    /// The names that [`ModelConfig::preset`] knows.
    pub fn preset_names() -> impl Iterator<Item = &'static str> {
        PRESETS.iter().map(|p| p.0)
    }

    /// A published size by name, `qwen2.5-0.5b` … `qwen2.5-72b`, or `tiny`.
    ///
    /// # Errors
    /// An unknown name.
    pub fn preset(name: &str) -> Result<Self> {
        let wanted = name.to_ascii_lowercase();
        let &(_, d, f, l, h, k, v, tied) =
            PRESETS.iter().find(|p| p.0 == wanted).ok_or_else(|| {
                let known: Vec<_> = Self::preset_names().collect();
                Error::flag("--preset", format!("no preset `{name}`; known: {}", known.join(", ")))
            })?;
        Ok(Self {
            vocab_size: v,
            hidden_size: d,
            intermediate_size: f,
            num_hidden_layers: l,
            num_attention_heads: h,
            num_key_value_heads: k,
            head_dim: None,
            max_position_embeddings: 32_768,
            rope_theta: 1e6,
            rms_norm_eps: 1e-6,
            tie_word_embeddings: tied,
            use_sliding_window: false,
            hidden_act: "silu".into(),
        })
    }

    /// Reads and validates a `config.json`.
    ///
    /// # Errors
    /// An unreadable file, invalid JSON (with its line), a missing key, or a value that
    /// [`ModelConfig::validate`] refuses.
    pub fn from_file(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .map_err(|e| Error::File { file: path.into(), why: e.to_string() })?;
        Self::from_json(&text, &path.display().to_string())
    }

    /// The same as a config.json of the hub.
    pub fn to_hub(&self) -> serde_json::Value {
        let mut json = serde_json::json!(self);
        json["model_type"] = "qwen2".into();
        json["architectures"] = serde_json::json!(["Qwen2ForCausalLM"]);
        json
    }

    /// [`ModelConfig::from_file`] on text already read; `origin` names it in errors.
    ///
    /// # Errors
    /// As [`ModelConfig::from_file`].
    pub fn from_json(text: &str, origin: &str) -> Result<Self> {
        let bad = |why: String| Error::File { file: origin.into(), why };
        let mut json: serde_json::Value =
            serde_json::from_str(text).map_err(|e| bad(format!("not valid JSON: {e}")))?;
        let fail =
            |key: &str, why: String| Error::Config { origin: origin.into(), key: key.into(), why };
        if !json.is_object() {
            return Err(bad("is no JSON object".into()).into());
        }
        match json.get("model_type").and_then(|t| t.as_str()) {
            None | Some("qwen2") => {}
            Some(other) => {
                let why = format!("is `{other}`; only the qwen2 family is supported");
                return Err(fail("model_type", why).into());
            }
        }
        // transformers 5 nests theta and the scaling under rope_parameters.
        for key in ["rope_scaling", "rope_parameters"] {
            let Some(rope) = json.get(key).filter(|r| !r.is_null()) else { continue };
            let kind = rope.get("rope_type").or(rope.get("type")).and_then(|t| t.as_str());
            if let Some(kind) = kind.filter(|k| *k != "default") {
                let why = format!("asks for `{kind}` RoPE scaling, which is not supported");
                return Err(fail(key, why).into());
            }
            if let Some(theta) = rope.get("rope_theta").cloned() {
                json["rope_theta"] = theta;
            }
        }
        let config: Self = serde_path_to_error::deserialize(json).map_err(|e| {
            match e.path().to_string().as_str() {
                // A missing key is named by the message itself.
                "." => anyhow::Error::from(bad(e.inner().to_string())),
                key => fail(key, format!("is not what it should be: {}", e.inner())).into(),
            }
        })?;
        config.validate(origin)?;
        Ok(config)
    }

    /// Refuses what no model can be; `origin` names the source in the error.
    ///
    /// # Errors
    /// The first key at fault.
    pub fn validate(&self, origin: &str) -> Result<()> {
        let fail = |key: &str, why: String| -> Result<()> {
            Err(Error::Config { origin: origin.into(), key: key.into(), why }.into())
        };
        // Far above any published model, and low enough that no count below can overflow.
        const LARGEST: usize = 1 << 24;
        const MOST_LAYERS: usize = 1 << 16;
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("max_position_embeddings", self.max_position_embeddings),
            ("head_dim", self.head_dim.unwrap_or(1)),
        ];
        for (key, value) in sizes {
            if value == 0 {
                return fail(key, "is 0".into());
            }
            if value > LARGEST {
                return fail(key, format!("is {value}, above the largest supported, {LARGEST}"));
            }
        }
        let (h, k) = (self.num_attention_heads, self.num_key_value_heads);
        if !h.is_multiple_of(k) {
            return fail("num_key_value_heads", format!("is {k}, which does not divide {h} heads"));
        }
        let q_width = h.saturating_mul(self.head_dim.unwrap_or(1));
        if q_width > LARGEST {
            return fail("head_dim", format!("makes attention {q_width} wide, above {LARGEST}"));
        }
        if self.num_hidden_layers > MOST_LAYERS {
            let why = format!("is {}, above {MOST_LAYERS}", self.num_hidden_layers);
            return fail("num_hidden_layers", why);
        }
        if self.head_dim.is_none() && !self.hidden_size.is_multiple_of(h) {
            let why = format!("is {h}, which does not divide hidden_size {}", self.hidden_size);
            return fail("num_attention_heads", why);
        }
        if !self.head_dim().is_multiple_of(2) {
            return fail("head_dim", format!("is {}; RoPE rotates pairs", self.head_dim()));
        }
        if !(self.rope_theta.is_finite() && self.rope_theta > 0.0) {
            return fail("rope_theta", format!("is {}; it must be positive", self.rope_theta));
        }
        if !(self.rms_norm_eps.is_finite() && self.rms_norm_eps >= 0.0) {
            return fail(
                "rms_norm_eps",
                format!("is {}; it must not be negative", self.rms_norm_eps),
            );
        }
        if self.use_sliding_window {
            return fail(
                "use_sliding_window",
                "is true; sliding-window attention is not supported".into(),
            );
        }
        if self.hidden_act != "silu" {
            return fail(
                "hidden_act",
                format!("is `{}`; only `silu` is supported", self.hidden_act),
            );
        }
        Ok(())
    }

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
    /// Per layer: q and k/v with bias, o, three MLP matrices, two norms.
    pub fn parameters(&self) -> u128 {
        let [v, d, f, q, kv] = [
            self.vocab_size,
            self.hidden_size,
            self.intermediate_size,
            self.q_width(),
            self.kv_width(),
        ]
        .map(|n| n as u128);
        let layer = (d + 1) * (q + 2 * kv) + q * d + 3 * d * f + 2 * d;
        let heads = if self.tie_word_embeddings { 1 } else { 2 };
        heads * v * d + self.num_hidden_layers as u128 * layer + d
    }
}

/// The seven linear projections of a decoder layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Projection {
    /// Queries, D → H·d, with bias.
    QProj,
    /// Keys, D → K·d, with bias.
    KProj,
    /// Values, D → K·d, with bias.
    VProj,
    /// Attention output, H·d → D.
    OProj,
    /// MLP gate, D → F.
    GateProj,
    /// MLP up, D → F.
    UpProj,
    /// MLP down, F → D.
    DownProj,
}

impl Projection {
    /// All seven, in execution order.
    pub const ALL: [Self; 7] = [
        Self::QProj,
        Self::KProj,
        Self::VProj,
        Self::OProj,
        Self::GateProj,
        Self::UpProj,
        Self::DownProj,
    ];

    /// The checkpoint's name, as PEFT's `target_modules` spells it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::QProj => "q_proj",
            Self::KProj => "k_proj",
            Self::VProj => "v_proj",
            Self::OProj => "o_proj",
            Self::GateProj => "gate_proj",
            Self::UpProj => "up_proj",
            Self::DownProj => "down_proj",
        }
    }

    /// The module that holds it.
    pub const fn parent(self) -> &'static str {
        match self {
            Self::QProj | Self::KProj | Self::VProj | Self::OProj => "self_attn",
            Self::GateProj | Self::UpProj | Self::DownProj => "mlp",
        }
    }

    /// (input width, output width) under `config`.
    pub fn widths(self, config: &ModelConfig) -> (usize, usize) {
        let (d, f) = (config.hidden_size, config.intermediate_size);
        match self {
            Self::QProj => (d, config.q_width()),
            Self::KProj | Self::VProj => (d, config.kv_width()),
            Self::OProj => (config.q_width(), d),
            Self::GateProj | Self::UpProj => (d, f),
            Self::DownProj => (f, d),
        }
    }
}

impl fmt::Display for Projection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Projection {
    type Err = Error;

    fn from_str(s: &str) -> std::result::Result<Self, Error> {
        Self::ALL.into_iter().find(|p| p.name() == s).ok_or_else(|| {
            let known = Self::ALL.map(Self::name).join(", ");
            Error::flag("--lora-targets", format!("no projection `{s}`; known: {known}"))
        })
    }
}

/// Low-rank adapters: y += alpha/rank · B(A x) beside each target projection.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LoraConfig {
    /// r: rows of A, columns of B. 0 means no adapter.
    pub rank: usize,
    /// Numerator of the scale.
    pub alpha: f64,
    /// Adapted projections, sorted, without repeats.
    pub targets: Vec<Projection>,
}

impl LoraConfig {
    /// No adapter at all.
    pub fn none() -> Self {
        Self { rank: 0, alpha: 1.0, targets: vec![] }
    }

    /// Checks a rank and its targets against the model.
    ///
    /// # Errors
    /// A rank above a target's smaller width, no target, or an alpha that is not finite.
    pub fn new(
        config: &ModelConfig,
        rank: usize,
        alpha: f64,
        targets: &[Projection],
    ) -> Result<Self> {
        let mut targets = targets.to_vec();
        targets.sort();
        targets.dedup();
        if rank == 0 {
            return Ok(Self::none());
        }
        if targets.is_empty() {
            return Err(Error::flag("--lora-targets", "names no projection").into());
        }
        if !alpha.is_finite() {
            return Err(
                Error::flag("--lora-alpha", format!("{alpha} is not a finite number")).into()
            );
        }
        for target in &targets {
            let (k, n) = target.widths(config);
            if rank > k.min(n) {
                let why = format!("{rank} is above {}, the smaller width of {target}", k.min(n));
                return Err(Error::flag("--lora-rank", why).into());
            }
        }
        Ok(Self { rank, alpha, targets })
    }

    /// Whether `projection` carries an adapter.
    pub fn adapts(&self, projection: Projection) -> bool {
        self.rank > 0 && self.targets.contains(&projection)
    }

    /// alpha / rank, the factor on B(A x).
    pub fn scaling(&self) -> f64 {
        self.alpha / self.rank as f64
    }

    /// Trainable parameters: r·(in + out) per target and layer.
    pub fn parameters(&self, config: &ModelConfig) -> u128 {
        let per_layer: usize = self
            .targets
            .iter()
            .map(|t| {
                let (k, n) = t.widths(config);
                self.rank * (k + n)
            })
            .sum();
        (per_layer * config.num_hidden_layers) as u128
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameter_counts_equal_the_published_checkpoints() {
        // The totals that the hub reports for each Qwen/Qwen2.5-* checkpoint.
        let published: [(&str, u128); 7] = [
            ("qwen2.5-0.5b", 494_032_768),
            ("qwen2.5-1.5b", 1_543_714_304),
            ("qwen2.5-3b", 3_085_938_688),
            ("qwen2.5-7b", 7_615_616_512),
            ("qwen2.5-14b", 14_770_033_664),
            ("qwen2.5-32b", 32_763_876_352),
            ("qwen2.5-72b", 72_706_203_648),
        ];
        for (name, parameters) in published {
            let config = ModelConfig::preset(name).unwrap();
            config.validate(name).unwrap();
            assert_eq!(config.parameters(), parameters, "{name}");
        }
    }

    fn refused(change: impl Fn(&mut ModelConfig)) -> String {
        let mut config = ModelConfig::preset("tiny").unwrap();
        change(&mut config);
        config.validate("config.json").unwrap_err().to_string()
    }

    #[test]
    fn impossible_values_are_named() {
        assert_eq!(
            refused(|c| c.num_attention_heads = 0),
            "config.json: `num_attention_heads` is 0"
        );
        assert!(refused(|c| c.num_key_value_heads = 3).contains("`num_key_value_heads` is 3"));
        assert!(refused(|c| c.num_attention_heads = 6).contains("does not divide"));
        assert!(refused(|c| c.vocab_size = 1 << 40).contains("`vocab_size` is 1099511627776"));
        assert!(refused(|c| c.head_dim = Some(7)).contains("`head_dim` is 7"));
        assert!(refused(|c| c.use_sliding_window = true).contains("sliding-window"));
        assert!(refused(|c| c.rope_theta = f64::NAN).contains("`rope_theta`"));
        assert!(refused(|c| c.hidden_act = "gelu".into()).contains("`gelu`"));
    }

    #[test]
    fn lora_rank_is_bounded_by_the_narrower_side() {
        let config = ModelConfig::preset("qwen2.5-0.5b").unwrap();
        let targets = [Projection::VProj, Projection::QProj, Projection::QProj];
        let lora = LoraConfig::new(&config, 8, 16.0, &targets).unwrap();
        assert_eq!(lora.targets, [Projection::QProj, Projection::VProj]);
        assert_eq!(lora.parameters(&config), 24 * 8 * (896 + 896 + 896 + 128));
        let error = LoraConfig::new(&config, 129, 16.0, &targets).unwrap_err().to_string();
        assert!(error.contains("129 is above 128"), "{error}");
    }
}
