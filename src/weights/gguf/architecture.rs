//! From a GGUF's metadata to a model's config: what each architecture fixes is a row of a table.

use super::{Metadata, metadata::every_but_last, rope};
use crate::{
    config::{Activation, Biases, Family, Ignored, ModelConfig, Projection, Rope, Window},
    error::{Error, Result},
};

/// What the name of an architecture says of a model, beyond what its keys do.
#[derive(Debug)]
pub(super) struct Architecture {
    /// As `general.architecture` spells it.
    name: &'static str,
    family: Family,
    activation: Activation,
    qk_norm: bool,
    sandwich_norms: bool,
    /// Norms add 1 to the checkpoint's gains; the file holds the sums.
    pub(super) unit_offset_norms: bool,
    scaled_embedding: bool,
    /// Neighbouring elements of a head are rotated together, so the file's rows of q and k are in
    /// another order than the checkpoint's.
    pub(super) interleaved: bool,
    /// It has windowed layers.
    windows: Option<Windows>,
}

/// What an architecture fixes of its windowed layers.
#[derive(Debug)]
struct Windows {
    /// The last layer of each so many sees the whole context, unless a key says otherwise.
    period: usize,
    /// Base of the windowed layers' rotary frequencies, unless a key says otherwise.
    theta: f64,
    /// The one depth at which scores are divided by the root of D / H, not of d.
    by_width: usize,
}

static ARCHITECTURES: [Architecture; 4] = [
    Architecture {
        name: "qwen2",
        family: Family::Qwen2,
        activation: Activation::Silu,
        qk_norm: false,
        sandwich_norms: false,
        unit_offset_norms: false,
        scaled_embedding: false,
        interleaved: false,
        windows: None,
    },
    Architecture {
        name: "llama",
        family: Family::Llama,
        activation: Activation::Silu,
        qk_norm: false,
        sandwich_norms: false,
        unit_offset_norms: false,
        scaled_embedding: false,
        interleaved: true,
        windows: None,
    },
    Architecture {
        name: "qwen3",
        family: Family::Qwen3,
        activation: Activation::Silu,
        qk_norm: true,
        sandwich_norms: false,
        unit_offset_norms: false,
        scaled_embedding: false,
        interleaved: false,
        windows: None,
    },
    Architecture {
        name: "gemma3",
        family: Family::Gemma3,
        activation: Activation::GeluTanh,
        qk_norm: true,
        sandwich_norms: true,
        unit_offset_norms: true,
        scaled_embedding: true,
        interleaved: false,
        windows: Some(Windows { period: 6, theta: 10_000.0, by_width: 62 }),
    },
];

/// Keys under an architecture's name that would change what is computed, and the value (true is
/// 1) at which they do not.
const UNSUPPORTED: [(&str, f64); 15] = [
    ("attention.causal", 1.0),
    ("attention.clamp_kqv", 0.0),
    ("attention.max_alibi_bias", 0.0),
    ("attention.scale", 0.0),
    ("attn_logit_softcapping", 0.0),
    ("final_logit_softcapping", 0.0),
    ("embedding_scale", 1.0),
    ("logit_scale", 1.0),
    ("residual_scale", 1.0),
    ("expert_count", 0.0),
    ("expert_used_count", 0.0),
    ("nextn_predict_layers", 0.0),
    ("pooling_type", 0.0),
    ("swin_norm", 0.0),
    ("use_parallel_residual", 0.0),
];

/// Keys under an architecture's name that change nothing that is computed.
const IDLE: [&str; 2] = ["rope.scaling.finetuned", "tensor_data_layout"];

/// What a GGUF calls the keys of a `config.json`, after the architecture's name.
const OWN_NAMES: [(&str, &str); 16] = [
    ("vocab_size", "vocab_size"),
    ("hidden_size", "embedding_length"),
    ("intermediate_size", "feed_forward_length"),
    ("num_hidden_layers", "block_count"),
    ("num_attention_heads", "attention.head_count"),
    ("num_key_value_heads", "attention.head_count_kv"),
    ("head_dim", "attention.key_length"),
    ("max_position_embeddings", "context_length"),
    ("rms_norm_eps", "attention.layer_norm_rms_epsilon"),
    ("sliding_window", "attention.sliding_window"),
    ("layer_types", "attention.sliding_window_pattern"),
    ("rope_theta", "rope.freq_base"),
    ("factor", "rope.scaling.factor"),
    ("beta_fast", "rope.scaling.yarn_beta_fast"),
    ("beta_slow", "rope.scaling.yarn_beta_slow"),
    ("original_max_position_embeddings", "rope.scaling.original_context_length"),
];

/// What the tensors say of a model, beside what the keys do.
pub(super) struct Tensors<'a> {
    /// Rows of the embedding.
    pub(super) vocab: usize,
    /// The head is the embedding.
    pub(super) tied: bool,
    /// Whether a layer's projection has a bias.
    pub(super) has_bias: &'a dyn Fn(Projection) -> bool,
    /// What rotary frequencies are divided by.
    pub(super) factors: Option<&'a [f32]>,
}

impl Architecture {
    /// The one that `general.architecture` names.
    pub(super) fn of(metadata: &Metadata) -> Result<&'static Self> {
        let key = "general.architecture";
        let name = metadata.text(key)?;
        let name = name.ok_or_else(|| metadata.bad(key, "is missing; is this a model?"))?;
        ARCHITECTURES.iter().find(|known| known.name == name).ok_or_else(|| {
            let known: Vec<&str> = ARCHITECTURES.iter().map(|known| known.name).collect();
            let why = format!("is `{name}`; supported are {}", known.join(", "));
            metadata.bad(key, why)
        })
    }

    /// The config of a file that holds `tensors`. A key that it does not honour is refused,
    /// unless it changes nothing.
    pub(super) fn config(&self, metadata: &Metadata, tensors: &Tensors) -> Result<ModelConfig> {
        if let Some(kind) = metadata.text("general.type")?.filter(|kind| *kind != "model") {
            return Err(metadata.bad("general.type", format!("is `{kind}`; this is no model")));
        }
        if metadata.integer("split.count")?.is_some_and(|n| n > 1) {
            let why = "is above 1; merge the parts into one file";
            return Err(metadata.bad("split.count", why));
        }
        let prefix = format!("{}.", self.name);
        let key = |rest: &str| format!("{prefix}{rest}");
        let integer = |rest: &str| metadata.integer(&key(rest));
        let need = |rest: &str| integer(rest)?.ok_or_else(|| metadata.missing(&key(rest)));

        let (hidden, layers) = (need("embedding_length")?, need("block_count")?);
        let heads = need("attention.head_count")?;
        let context = need("context_length")?;
        let epsilon = key("attention.layer_norm_rms_epsilon");
        let bias = |p| (tensors.has_bias)(p);
        let mut config = ModelConfig {
            family: self.family,
            vocab_size: tensors.vocab,
            hidden_size: hidden,
            intermediate_size: need("feed_forward_length")?,
            num_hidden_layers: layers,
            num_attention_heads: heads,
            num_key_value_heads: integer("attention.head_count_kv")?.unwrap_or(heads),
            head_dim: integer("attention.key_length")?,
            max_position_embeddings: context,
            rms_norm_eps: metadata.float(&epsilon)?.ok_or_else(|| metadata.missing(&epsilon))?,
            tie_word_embeddings: tensors.tied,
            head_stored_apart: false,
            rope: Rope::default(),
            local_rope: None,
            window: None,
            bias: Biases {
                qkv: bias(Projection::QProj),
                o: bias(Projection::OProj),
                mlp: bias(Projection::GateProj),
            },
            qk_norm: self.qk_norm,
            sandwich_norms: self.sandwich_norms,
            unit_offset_norms: self.unit_offset_norms,
            activation: self.activation,
            scaled_embedding: self.scaled_embedding,
            query_pre_attn_scalar: None,
        };
        let known = key("vocab_size");
        if let Some(said) = metadata.integer(&known)?.filter(|said| *said != tensors.vocab) {
            let why = format!("is {said}, and `token_embd.weight` has {} rows", tensors.vocab);
            return Err(metadata.bad(&known, why));
        }
        // Before anything is worked out from these.
        self.validate(&config, metadata)?;
        let width = config.head_dim();
        config.rope = rope::read(metadata, &prefix, width, context, tensors.factors)?;
        self.read_windows(metadata, &prefix, &mut config)?;

        for rest in ["attention.value_length", "rope.dimension_count"] {
            if let Some(other) = integer(rest)?.filter(|n| *n != width) {
                let why = format!("is {other}, and a head is {width} wide: not supported");
                return Err(metadata.bad(&key(rest), why));
            }
        }
        for (rest, harmless) in UNSUPPORTED {
            metadata.refuse_unless(&key(rest), harmless)?;
        }
        metadata.refuse_unread(&prefix, &IDLE)?;
        self.validate(&config, metadata)?;
        match config.to_hub() {
            Ok(_) => Ok(config),
            Err(_) => Err(self.inexpressible(&config, metadata)),
        }
    }

    /// Why a file holds no model of its family: the family has keys for no such thing.
    fn inexpressible(&self, config: &ModelConfig, metadata: &Metadata) -> anyhow::Error {
        let name = self.name;
        if config.window.is_some() && config.family == Family::Llama {
            let why = format!("gives layers a window, and `{name}` has none");
            return metadata.bad(&format!("{name}.attention.sliding_window_pattern"), why);
        }
        let Biases { qkv, o, mlp } = config.bias;
        let there = [("attn_q", qkv), ("attn_output", o), ("ffn_gate", mlp)];
        let there = there.into_iter().filter(|(_, there)| *there);
        let there: Vec<String> = there.map(|(name, _)| format!("blk.0.{name}.bias")).collect();
        let (tensor, why) = match &there[..] {
            [] => ("blk.0.attn_q.bias", "is missing".into()),
            [one] => (one.as_str(), format!("is a bias, and no `{name}` has it alone")),
            [one, ..] => (
                one.as_str(),
                format!("is a bias, and no `{name}` has just those of {}", there.join(", ")),
            ),
        };
        Error::tensor(metadata.origin(), tensor, why).into()
    }

    /// [`ModelConfig::validate`], its errors in the file's own words.
    fn validate(&self, config: &ModelConfig, metadata: &Metadata) -> Result<()> {
        let own = |key: &str| OWN_NAMES.iter().find(|(name, _)| *name == key).map(|(_, own)| own);
        config.validate(&metadata.origin()).map_err(|error| match error.downcast() {
            Ok(Error::Config { origin, key, why }) => {
                let key = own(&key).map_or(key, |own| format!("{}.{own}", self.name));
                let words = why.split(' ').map(|word| own(word).map_or(word, |own| *own));
                Error::Config { origin, key, why: words.collect::<Vec<_>>().join(" ") }.into()
            }
            Ok(other) => other.into(),
            Err(other) => other,
        })
    }

    /// The keys that nobody has used, by now that the text side has been too.
    pub(super) fn ignored(&self, metadata: &Metadata) -> Vec<Ignored> {
        let reason = |key: &str| match key.split('.').next().unwrap_or_default() {
            "general" | "split" => "describes the file",
            "tokenizer" => "is not read by a tokenizer of this kind",
            "quantize" | "imatrix" => "says how the file was quantized",
            own if own == self.name => "changes nothing that is computed",
            _ => "is no key of this architecture",
        };
        let listed = |key: &str| Ignored::new(metadata.origin(), key, reason(key));
        metadata.unused().into_iter().map(listed).collect()
    }

    /// Which layers are windowed, and what such layers have of their own.
    fn read_windows(
        &self,
        metadata: &Metadata,
        prefix: &str,
        config: &mut ModelConfig,
    ) -> Result<()> {
        let key = |rest: &str| format!("{prefix}{rest}");
        let layers = config.num_hidden_layers;
        let width = key("attention.sliding_window");
        let pattern = key("attention.sliding_window_pattern");
        let picked = metadata.pattern(&pattern, layers)?;
        let context = config.max_position_embeddings;
        // Where windowed layers have positions of their own, a window counts however wide it is.
        let counts = |width: &usize| *width > 0 && (self.windows.is_some() || *width < context);
        let found = metadata.integer(&width)?.filter(counts);
        let layers = match (found, picked, &self.windows) {
            (None, _, None) => {
                metadata.ignore(&width);
                metadata.ignore(&pattern);
                return Ok(());
            }
            (None, _, Some(_)) => return Err(metadata.missing(&width)),
            (Some(_), Some(picked), _) => picked,
            (Some(_), None, Some(windows)) => every_but_last(windows.period, layers),
            (Some(n), None, None) => {
                let why = format!("is {n}, and no {pattern} says which layers have that window");
                return Err(metadata.bad(&width, why));
            }
        };
        let is_windowed = layers.contains(&true);
        config.window = found.filter(|_| is_windowed).map(|width| Window { width, layers });
        if !is_windowed {
            metadata.ignore(&width);
        }
        if let Some(windows) = &self.windows {
            let theta = metadata.float(&key("rope.freq_base_swa"))?.unwrap_or(windows.theta);
            let local = Rope { theta, ..Rope::default() };
            config.local_rope = Some(local).filter(|rope| is_windowed && *rope != config.rope);
            let by_width = config.num_hidden_layers == windows.by_width;
            let (d, h) = (config.hidden_size as f64, config.num_attention_heads as f64);
            let scalar = if by_width { d / h } else { config.head_dim() as f64 };
            config.query_pre_attn_scalar = Some(scalar);
        }
        Ok(())
    }
}
