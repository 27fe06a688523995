//! Reading and writing a `config.json` as the hub has it: in the layouts of transformers 4 and 5,
//! with each family's own defaults where a key is missing.
//!
//! A key that changes what is computed is honoured or refused by name; all others are not read.

mod keys;
mod rope;
mod window;

use std::path::Path;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _, ser::Error as _};
use serde_json::{Value, json};

use super::{Activation, Biases, Family, ModelConfig};
use crate::error::{Error, Result};
use keys::Keys;

impl Family {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Qwen2, Self::Llama, Self::Mistral, Self::Qwen3, Self::Gemma3];

    /// Its name under `model_type`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Qwen2 => "qwen2",
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen3 => "qwen3",
            Self::Gemma3 => "gemma3_text",
        }
    }

    /// The class of transformers that runs it.
    const fn architecture(self) -> &'static str {
        match self {
            Self::Qwen2 => "Qwen2ForCausalLM",
            Self::Llama => "LlamaForCausalLM",
            Self::Mistral => "MistralForCausalLM",
            Self::Qwen3 => "Qwen3ForCausalLM",
            Self::Gemma3 => "Gemma3ForCausalLM",
        }
    }

    /// The family that a `model_type` names, or why there is none.
    fn named(name: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|family| family.name() == name).ok_or_else(|| {
            let known = Self::ALL.map(Self::name).join(", ");
            match name {
                "gemma3" => "is `gemma3`, with images; its text side is a model of its own, \
                             `gemma3_text`, whose keys stand under `text_config`"
                    .into(),
                name => format!("is `{name}`; supported are {known}"),
            }
        })
    }
}

/// Where a config came from, to name it in errors.
#[derive(Clone, Copy)]
struct Origin<'a>(&'a str);

impl Origin<'_> {
    /// The value of `key` is at fault.
    fn refuse(&self, key: &str, why: impl Into<String>) -> anyhow::Error {
        Error::Config { origin: self.0.into(), key: key.into(), why: why.into() }.into()
    }

    /// The whole is.
    fn bad(&self, why: String) -> anyhow::Error {
        Error::File { file: self.0.into(), why }.into()
    }
}

impl ModelConfig {
    /// Reads and validates a `config.json`.
    ///
    /// # Errors
    /// An unreadable file, invalid JSON (with its line), a missing key, a value that
    /// [`ModelConfig::validate`] refuses, or a key that asks for what is not supported.
    pub fn from_file(path: &Path) -> Result<Self> {
        let text = crate::input::read_text(path)
            .map_err(|e| Error::File { file: path.into(), why: e.to_string() })?;
        Self::from_json(&text, &path.display().to_string())
    }

    /// [`ModelConfig::from_file`] on text already read; `origin` names it in errors.
    ///
    /// # Errors
    /// As [`ModelConfig::from_file`].
    pub fn from_json(text: &str, origin: &str) -> Result<Self> {
        let origin = Origin(origin);
        let json = serde_json::from_str(text);
        Self::from_value(json.map_err(|e| origin.bad(format!("not valid JSON: {e}")))?, origin)
    }

    fn from_value(json: Value, origin: Origin) -> Result<Self> {
        if !json.is_object() {
            return Err(origin.bad("is no JSON object".into()));
        }
        let family = match json.get("model_type") {
            // What this program wrote before it knew of other families.
            None => Family::Qwen2,
            Some(Value::String(name)) => {
                Family::named(name).map_err(|why| origin.refuse("model_type", why))?
            }
            Some(other) => return Err(origin.refuse("model_type", format!("is {other}"))),
        };
        keys::refuse(&json, family, origin)?;
        let keys: Keys = serde_path_to_error::deserialize(json).map_err(|e| {
            match e.path().to_string().as_str() {
                // A missing key is named by the message itself.
                "." => origin.bad(e.inner().to_string()),
                key => origin.refuse(key, format!("is not what it should be: {}", e.inner())),
            }
        })?;
        keys.config(family, origin)
    }

    /// The same as a `config.json` of the hub, which transformers 4 and 5 and this program read
    /// alike.
    ///
    /// # Errors
    /// A config that its family has no keys for.
    pub fn to_hub(&self) -> Result<Value> {
        let mut json = json!({
            "architectures": [self.family.architecture()],
            "model_type": self.family.name(),
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "tie_word_embeddings": self.tie_word_embeddings,
        });
        let activation = match self.activation {
            Activation::Silu => "silu",
            Activation::GeluTanh => "gelu_pytorch_tanh",
        };
        let mut set = |key: &str, value: Value| json[key] = value;
        if let Some(d) = self.head_dim {
            set("head_dim", d.into());
        }
        match self.family {
            Family::Qwen2 | Family::Mistral => {}
            Family::Llama => {
                set("attention_bias", self.bias.qkv.into());
                set("mlp_bias", self.bias.mlp.into());
            }
            Family::Qwen3 => set("attention_bias", self.bias.qkv.into()),
            Family::Gemma3 => {
                set("attention_bias", self.bias.qkv.into());
                set("query_pre_attn_scalar", number(self.query_pre_attn_scalar));
            }
        }
        set(keys::activation_key(self.family), activation.into());
        window::write(self, &mut json);
        rope::write(self, &mut json);
        let origin = Origin(self.family.name());
        match Self::from_value(json.clone(), origin)? == *self {
            true => Ok(json),
            false => Err(origin.bad("has no keys for what this model is".into())),
        }
    }
}

/// A number as the file would have it: without a fraction where it has none.
fn number(value: Option<f64>) -> Value {
    match value {
        Some(n) if n.fract() == 0.0 && n.abs() < 2f64.powi(53) => json!(n as i64),
        value => json!(value),
    }
}

impl Serialize for ModelConfig {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        self.to_hub().map_err(S::Error::custom)?.serialize(s)
    }
}

impl<'de> Deserialize<'de> for ModelConfig {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        Self::from_value(Value::deserialize(d)?, Origin("model")).map_err(D::Error::custom)
    }
}

impl Keys {
    /// The model that a family makes of its keys.
    fn config(self, family: Family, origin: Origin) -> Result<ModelConfig> {
        let (heads, attention_bias) = (self.num_attention_heads, self.attention_bias == Some(true));
        let config = ModelConfig {
            family,
            vocab_size: self.vocab_size,
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            num_hidden_layers: self.num_hidden_layers,
            num_attention_heads: heads,
            num_key_value_heads: self.key_value_heads(family, origin)?,
            head_dim: self.head_dim(family),
            max_position_embeddings: self.max_position_embeddings,
            rms_norm_eps: self.rms_norm_eps.unwrap_or(1e-6),
            tie_word_embeddings: self.tie_word_embeddings.unwrap_or(match family {
                Family::Qwen2 | Family::Llama | Family::Mistral | Family::Qwen3 => false,
                Family::Gemma3 => true,
            }),
            rope: rope::global(&self, family, origin)?,
            local_rope: None,
            window: None,
            bias: match family {
                Family::Qwen2 => Biases { qkv: true, o: false, mlp: false },
                Family::Mistral => Biases::default(),
                Family::Llama | Family::Qwen3 | Family::Gemma3 => {
                    let mlp = self.mlp_bias == Some(true);
                    Biases { qkv: attention_bias, o: attention_bias, mlp }
                }
            },
            qk_norm: matches!(family, Family::Qwen3 | Family::Gemma3),
            sandwich_norms: family == Family::Gemma3,
            unit_offset_norms: family == Family::Gemma3,
            activation: self.activation(family, origin)?,
            scaled_embedding: family == Family::Gemma3,
            query_pre_attn_scalar: match family {
                Family::Gemma3 => Some(self.query_pre_attn_scalar.unwrap_or(256.0)),
                Family::Qwen2 | Family::Llama | Family::Mistral | Family::Qwen3 => None,
            },
        };
        // Before anything is made of a size, it must be one.
        config.validate(origin.0)?;
        let window = window::of(&self, family, origin)?;
        let local_rope = match window {
            Some(_) => rope::local(&self, family, origin)?.filter(|rope| *rope != config.rope),
            None => None,
        };
        let config = ModelConfig { window, local_rope, ..config };
        config.validate(origin.0)?;
        Ok(config)
    }
}
