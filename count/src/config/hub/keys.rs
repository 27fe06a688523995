//! The keys of a `config.json` that are read, and those that are refused.

use serde::{Deserialize, Deserializer};
use serde_json::Value;

use super::{Origin, rope::RopeKeys};
use crate::{
    config::{Activation, Family},
    error::Result,
};

/// Every key that any family reads. What is missing, or null, is the family's default.
#[derive(Debug, Deserialize)]
pub(super) struct Keys {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    #[serde(default, deserialize_with = "present")]
    num_key_value_heads: Option<Option<usize>>,
    head_dim: Option<usize>,
    pub max_position_embeddings: usize,
    pub rms_norm_eps: Option<f64>,
    pub tie_word_embeddings: Option<bool>,
    hidden_act: Option<String>,
    hidden_activation: Option<String>,
    pub attention_bias: Option<bool>,
    pub mlp_bias: Option<bool>,
    pub query_pre_attn_scalar: Option<f64>,
    pub use_sliding_window: Option<bool>,
    #[serde(default, deserialize_with = "present")]
    pub sliding_window: Option<Option<usize>>,
    pub sliding_window_pattern: Option<usize>,
    pub max_window_layers: Option<usize>,
    pub layer_types: Option<Vec<String>>,
    pub rope_theta: Option<f64>,
    pub rope_local_base_freq: Option<f64>,
    pub rope_scaling: Option<RopeKeys>,
    pub rope_parameters: Option<RopeKeys>,
}

/// A key that is there, if only as null.
fn present<'de, D: Deserializer<'de>>(d: D) -> Result<Option<Option<usize>>, D::Error> {
    Option::deserialize(d).map(Some)
}

/// Keys that change what is computed and are not supported, with the number that asks for
/// nothing; null and, where none stands here, false ask for nothing too.
const REFUSED: [(&str, Option<f64>); 13] = [
    ("partial_rotary_factor", Some(1.0)),
    ("attn_logit_softcapping", None),
    ("final_logit_softcapping", None),
    ("use_bidirectional_attention", None),
    ("attention_multiplier", None),
    ("embedding_multiplier", Some(1.0)),
    ("residual_multiplier", Some(1.0)),
    ("logits_scaling", Some(1.0)),
    ("logit_scale", Some(1.0)),
    ("clip_qkv", None),
    ("num_experts", Some(0.0)),
    ("num_local_experts", Some(0.0)),
    ("rope_interleaved", None),
];

/// Keys that some families read, and that ask for something where others have them.
const OF_FAMILIES: [(&str, &[Family]); 5] = [
    ("attention_bias", &[Family::Qwen2, Family::Llama, Family::Qwen3, Family::Gemma3]),
    ("mlp_bias", &[Family::Llama]),
    ("query_pre_attn_scalar", &[Family::Gemma3]),
    ("rope_local_base_freq", &[Family::Gemma3]),
    ("sliding_window_pattern", &[Family::Gemma3]),
];

/// Refuses what is asked for and not supported.
pub(super) fn refuse(json: &Value, family: Family, origin: Origin) -> Result<()> {
    let asks = |key: &str, neutral: Option<f64>| {
        let value = json.get(key).filter(|value| !value.is_null())?;
        let nothing = *value == Value::Bool(false) || neutral.is_some_and(|n| *value == n);
        (!nothing).then(|| format!("is {value}"))
    };
    for (key, neutral) in REFUSED {
        if let Some(value) = asks(key, neutral) {
            return Err(origin.refuse(key, format!("{value}; that is not supported")));
        }
    }
    for (key, _) in OF_FAMILIES.iter().filter(|(_, readers)| !readers.contains(&family)) {
        if let Some(value) = asks(key, None) {
            let why = format!("{value}; `{}` has no such key", family.name());
            return Err(origin.refuse(key, why));
        }
    }
    if json.get("is_causal") == Some(&Value::Bool(false)) {
        return Err(origin.refuse("is_causal", "is false; only causal attention is supported"));
    }
    Ok(())
}

/// The key under which a family says what the gate goes through.
pub(super) const fn activation_key(family: Family) -> &'static str {
    match family {
        Family::Qwen2 | Family::Llama | Family::Mistral | Family::Qwen3 => "hidden_act",
        Family::Gemma3 => "hidden_activation",
    }
}

impl Keys {
    /// K; as many as H where the file says null, and in the llama family where it is silent.
    pub fn key_value_heads(&self, family: Family, origin: Origin) -> Result<usize> {
        match (self.num_key_value_heads, family) {
            (Some(Some(heads)), _) => Ok(heads),
            (Some(None), _) | (None, Family::Llama) => Ok(self.num_attention_heads),
            (None, Family::Qwen2 | Family::Mistral | Family::Qwen3 | Family::Gemma3) => {
                Err(origin.refuse("num_key_value_heads", "is missing"))
            }
        }
    }

    /// d; D / H where a file is silent, in the families that have no width of their own.
    pub fn head_dim(&self, family: Family) -> Option<usize> {
        self.head_dim.or(match family {
            Family::Qwen2 | Family::Llama | Family::Mistral => None,
            Family::Qwen3 => Some(128),
            Family::Gemma3 => Some(256),
        })
    }

    /// What the gate goes through.
    pub fn activation(&self, family: Family, origin: Origin) -> Result<Activation> {
        let key = activation_key(family);
        let (named, silent) = match family {
            Family::Qwen2 | Family::Llama | Family::Mistral | Family::Qwen3 => {
                (&self.hidden_act, Activation::Silu)
            }
            Family::Gemma3 => (&self.hidden_activation, Activation::GeluTanh),
        };
        match named.as_deref() {
            None => Ok(silent),
            Some("silu" | "swish") => Ok(Activation::Silu),
            // Two names of one formula.
            Some("gelu_pytorch_tanh" | "gelu_new") => Ok(Activation::GeluTanh),
            Some(other) => {
                let why = format!("is `{other}`; supported are silu and gelu_pytorch_tanh");
                Err(origin.refuse(key, why))
            }
        }
    }
}
