//! Reading and writing a `config.json` as the hub has it: in the layouts of transformers 4 and 5,
//! with each family's own defaults where a key is missing.
//!
//! A key that changes what is computed is honoured or refused by name; all others are listed as
//! ignored.

mod keys;
mod object;
mod rope;
mod window;

use std::{cell::RefCell, path::Path};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _, ser::Error as _};
use serde_json::{Value, json};

use super::{Activation, Biases, Family, Ignored, ModelConfig};
use crate::error::{Error, Result};
use object::Object;
use rope::Kinds;

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

impl ModelConfig {
    /// Reads and validates a `config.json`; beside the model, what of the file is not used.
    ///
    /// # Errors
    /// An unreadable file, invalid JSON (with its line), a missing key, a value that
    /// [`ModelConfig::validate`] refuses, or a key that asks for what is not supported or that
    /// nothing is known of.
    pub fn read(path: &Path) -> Result<(Self, Vec<Ignored>)> {
        let text = crate::input::read_text(path)
            .map_err(|e| Error::File { file: path.into(), why: e.to_string() })?;
        Self::parse(&text, &path.display().to_string())
    }

    /// The model alone of [`ModelConfig::read`].
    ///
    /// # Errors
    /// As [`ModelConfig::read`].
    pub fn from_file(path: &Path) -> Result<Self> {
        Ok(Self::read(path)?.0)
    }

    /// [`ModelConfig::from_file`] on text already read; `origin` names it in errors.
    ///
    /// # Errors
    /// As [`ModelConfig::read`].
    pub fn from_json(text: &str, origin: &str) -> Result<Self> {
        Ok(Self::parse(text, origin)?.0)
    }

    fn parse(text: &str, origin: &str) -> Result<(Self, Vec<Ignored>)> {
        // A mark at the start of a text file is no part of it.
        let json = serde_json::from_str(text.trim_start_matches('\u{feff}'))
            .map_err(|e| bad(origin, format!("not valid JSON: {e}")))?;
        Self::from_value(&json, origin, None)
    }

    /// `silent` is the family where the file names none.
    fn from_value(
        json: &Value,
        origin: &str,
        silent: Option<Family>,
    ) -> Result<(Self, Vec<Ignored>)> {
        let values = json.as_object().ok_or_else(|| bad(origin, "is no JSON object".into()))?;
        let ignored = RefCell::default();
        let keys = Object::new(origin, values, &ignored);
        let family = family(&keys, silent)?;
        keys::refuse_quantization(&keys)?;
        let config = config(&keys, family)?;
        keys::settle(&keys, family)?;
        drop(keys);
        Ok((config, ignored.into_inner()))
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
        set(activation_key(self.family), activation.into());
        window::write(self, &mut json);
        rope::write(self, &mut json);
        let origin = self.family.name();
        // Where a head is stored, no config.json says.
        let stored = Self { head_stored_apart: false, ..self.clone() };
        match Self::from_value(&json, origin, None)?.0 == stored {
            true => Ok(json),
            false => Err(bad(origin, "has no keys for what this model is".into())),
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

/// What a `config.json` has no key for, in the JSON of a model beside its keys.
const STORED_APART: &str = "head_stored_apart";

impl Serialize for ModelConfig {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let mut json = self.to_hub().map_err(S::Error::custom)?;
        if self.head_stored_apart {
            json[STORED_APART] = true.into();
        }
        json.serialize(s)
    }
}

impl<'de> Deserialize<'de> for ModelConfig {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        // What this program wrote before it knew of other families names none.
        let mut json = Value::deserialize(d)?;
        let apart = json.as_object_mut().and_then(|keys| keys.remove(STORED_APART));
        let read = Self::from_value(&json, "model", Some(Family::Qwen2));
        let config = read.map_err(D::Error::custom)?.0;
        let head_stored_apart = apart == Some(Value::Bool(true));
        Ok(Self { head_stored_apart, ..config })
    }
}

/// The file as a whole is at fault.
fn bad(origin: &str, why: String) -> anyhow::Error {
    Error::File { file: origin.into(), why }.into()
}

/// The family that `model_type` names, and no other name contradicts.
fn family(keys: &Object, silent: Option<Family>) -> Result<Family> {
    let classes = keys.texts("architectures")?.unwrap_or_default();
    let named = keys.text("model_type")?;
    let of_class = || Family::ALL.into_iter().find(|f| classes.contains(&f.architecture()));
    let family = match named {
        Some(name) => Family::named(name).map_err(|why| keys.refuse("model_type", why))?,
        None => of_class().or(silent).ok_or_else(|| {
            let known = Family::ALL.map(Family::name).join(", ");
            keys.refuse("model_type", format!("is missing; supported are {known}"))
        })?,
    };
    match classes.iter().find(|class| **class != family.architecture()) {
        None => Ok(family),
        Some(class) => {
            let (own, name) = (family.architecture(), family.name());
            let why = format!("names `{class}`; of `{name}`, only {own} is supported");
            Err(keys.refuse("architectures", why))
        }
    }
}

/// The model that a family makes of its keys.
fn config(keys: &Object, family: Family) -> Result<ModelConfig> {
    let heads = keys.need("num_attention_heads")?;
    let config = ModelConfig {
        family,
        vocab_size: keys.need("vocab_size")?,
        hidden_size: keys.need("hidden_size")?,
        intermediate_size: keys.need("intermediate_size")?,
        num_hidden_layers: keys.need("num_hidden_layers")?,
        num_attention_heads: heads,
        num_key_value_heads: keys.count("num_key_value_heads")?.unwrap_or(heads),
        head_dim: keys.count("head_dim")?.or(head_dim(family)),
        max_position_embeddings: keys.need("max_position_embeddings")?,
        rms_norm_eps: keys.or_silent("rms_norm_eps", keys.number("rms_norm_eps")?, 1e-6)?,
        tie_word_embeddings: keys.or_silent(
            "tie_word_embeddings",
            keys.flag("tie_word_embeddings")?,
            family == Family::Gemma3,
        )?,
        head_stored_apart: false,
        rope: Default::default(),
        local_rope: None,
        window: None,
        bias: biases(keys, family)?,
        qk_norm: matches!(family, Family::Qwen3 | Family::Gemma3),
        sandwich_norms: family == Family::Gemma3,
        unit_offset_norms: family == Family::Gemma3,
        activation: activation(keys, family)?,
        scaled_embedding: family == Family::Gemma3,
        query_pre_attn_scalar: match family {
            Family::Gemma3 => {
                let key = "query_pre_attn_scalar";
                Some(keys.or_silent(key, keys.number(key)?, 256.0)?)
            }
            Family::Qwen2 | Family::Llama | Family::Mistral | Family::Qwen3 => None,
        },
    };
    // Before anything is made of a size, it must be one.
    config.validate(keys.origin())?;
    let (layers, context) = (config.num_hidden_layers, config.max_position_embeddings);
    let window = window::of(keys, family, layers, context)?;
    let is_windowed = |layer: usize| window.as_ref().is_some_and(|window| window.layers[layer]);
    let windowed = (0..layers).filter(|layer| is_windowed(*layer)).count();
    let kinds = Kinds { full: windowed < layers, windowed: windowed > 0 };
    let (rope, local_rope) = rope::of(keys, family, context, kinds)?;
    let local_rope = local_rope.filter(|local| kinds.windowed && *local != rope);
    let config = ModelConfig { window, rope, local_rope, ..config };
    config.validate(keys.origin())?;
    Ok(config)
}

/// d where a file is silent; none: D / H.
const fn head_dim(family: Family) -> Option<usize> {
    match family {
        Family::Qwen2 | Family::Llama | Family::Mistral => None,
        Family::Qwen3 => Some(128),
        Family::Gemma3 => Some(256),
    }
}

fn biases(keys: &Object, family: Family) -> Result<Biases> {
    let flag = |key: &str| -> Result<bool> { Ok(keys.flag(key)? == Some(true)) };
    Ok(match family {
        Family::Qwen2 => Biases { qkv: true, o: false, mlp: false },
        Family::Mistral => Biases::default(),
        Family::Llama | Family::Qwen3 | Family::Gemma3 => {
            let attention = flag("attention_bias")?;
            let mlp = family == Family::Llama && flag("mlp_bias")?;
            Biases { qkv: attention, o: attention, mlp }
        }
    })
}

/// The key under which a family says what the gate goes through.
const fn activation_key(family: Family) -> &'static str {
    match family {
        Family::Qwen2 | Family::Llama | Family::Mistral | Family::Qwen3 => "hidden_act",
        Family::Gemma3 => "hidden_activation",
    }
}

/// What the gate goes through; another family's key for it must say the same.
fn activation(keys: &Object, family: Family) -> Result<Activation> {
    let silent = match family {
        Family::Qwen2 | Family::Llama | Family::Mistral | Family::Qwen3 => Activation::Silu,
        Family::Gemma3 => Activation::GeluTanh,
    };
    let named = |key: &str| match keys.text(key)? {
        None => Ok(None),
        Some("silu" | "swish") => Ok(Some(Activation::Silu)),
        // Two names of one formula.
        Some("gelu_pytorch_tanh" | "gelu_new") => Ok(Some(Activation::GeluTanh)),
        Some(other) => {
            let why = format!("is `{other}`; supported are silu and gelu_pytorch_tanh");
            Err(keys.refuse(key, why))
        }
    };
    let own = activation_key(family);
    let found = keys.or_silent(own, named(own)?, silent)?;
    for key in ["hidden_act", "hidden_activation"] {
        if named(key)?.is_some_and(|other| other != found) {
            let name = family.name();
            let why = format!("is another function than `{name}` has by `{own}`");
            return Err(keys.refuse(key, why));
        }
    }
    Ok(found)
}
