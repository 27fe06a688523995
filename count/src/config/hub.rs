//! Reading and writing a `config.json`.

use std::path::Path;

use serde::Deserialize;

use super::{Activation, Biases, Family, ModelConfig, Rope, RopeScaling};
use crate::error::{Error, Result};

/// The keys of a Qwen2 `config.json`.
#[derive(Deserialize)]
struct Qwen2 {
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: usize,
    #[serde(default)]
    head_dim: Option<usize>,
    max_position_embeddings: usize,
    #[serde(default)]
    rope_theta: Option<f64>,
    #[serde(default)]
    rms_norm_eps: Option<f64>,
    #[serde(default)]
    tie_word_embeddings: bool,
    #[serde(default)]
    use_sliding_window: bool,
    #[serde(default)]
    hidden_act: Option<String>,
}

impl ModelConfig {
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
        json["rope_theta"] = self.rope.theta.into();
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
        let read: Qwen2 = serde_path_to_error::deserialize(json).map_err(|e| {
            match e.path().to_string().as_str() {
                // A missing key is named by the message itself.
                "." => anyhow::Error::from(bad(e.inner().to_string())),
                key => fail(key, format!("is not what it should be: {}", e.inner())).into(),
            }
        })?;
        if read.use_sliding_window {
            let why = "is true; sliding-window attention is not supported".into();
            return Err(fail("use_sliding_window", why).into());
        }
        if let Some(act) = read.hidden_act.filter(|act| act != "silu") {
            let why = format!("is `{act}`; only `silu` is supported");
            return Err(fail("hidden_act", why).into());
        }
        let config = Self {
            family: Family::Qwen2,
            vocab_size: read.vocab_size,
            hidden_size: read.hidden_size,
            intermediate_size: read.intermediate_size,
            num_hidden_layers: read.num_hidden_layers,
            num_attention_heads: read.num_attention_heads,
            num_key_value_heads: read.num_key_value_heads,
            head_dim: read.head_dim,
            max_position_embeddings: read.max_position_embeddings,
            rms_norm_eps: read.rms_norm_eps.unwrap_or(1e-6),
            tie_word_embeddings: read.tie_word_embeddings,
            rope: Rope {
                theta: read.rope_theta.unwrap_or(10_000.0),
                scaling: RopeScaling::Default,
            },
            local_rope: None,
            window: None,
            bias: Biases { qkv: true, o: false, mlp: false },
            qk_norm: false,
            sandwich_norms: false,
            unit_offset_norms: false,
            activation: Activation::Silu,
            scaled_embedding: false,
            query_pre_attn_scalar: None,
        };
        config.validate(origin)?;
        Ok(config)
    }
}
