//! Rotary positions: `rope_theta` and `rope_scaling` of transformers 4, `rope_parameters` of
//! transformers 5, there also by kind of layer.

use serde::Deserialize;
use serde_json::{Value, json};

use super::{Origin, keys::Keys};
use crate::{
    config::{Family, ModelConfig, Rope, RopeScaling},
    error::Result,
};

/// The keys of one kind of positions; or of two, by kind of layer.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
pub(super) struct RopeKeys {
    rope_type: Option<String>,
    /// The same in older files.
    #[serde(rename = "type")]
    kind: Option<String>,
    rope_theta: Option<f64>,
    partial_rotary_factor: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<usize>,
    attention_factor: Option<f64>,
    beta_fast: Option<f64>,
    beta_slow: Option<f64>,
    mscale: Option<f64>,
    mscale_all_dim: Option<f64>,
    truncate: Option<bool>,
    full_attention: Option<Box<RopeKeys>>,
    sliding_attention: Option<Box<RopeKeys>>,
}

/// One table of positions in the making: its keys, where they stand, and what holds where they are
/// silent.
struct Table<'a> {
    keys: &'a RopeKeys,
    at: &'static str,
    theta: f64,
    /// The context of the whole model.
    context: usize,
    /// The family has a table for each kind of layers.
    by_layers: bool,
    origin: Origin<'a>,
}

/// Positions of layers that see the whole context.
pub(super) fn global(keys: &Keys, family: Family, origin: Origin) -> Result<Rope> {
    let none = RopeKeys::default();
    let by_layers = family == Family::Gemma3;
    let (at, table) = match (&keys.rope_scaling, &keys.rope_parameters) {
        (Some(old), Some(new)) if by_layers || old != new => {
            let why = "stands beside `rope_parameters`, and they are not the same";
            return Err(origin.refuse("rope_scaling", why));
        }
        (Some(old), _) => ("rope_scaling", old),
        (None, Some(new)) if by_layers => {
            new.only_by_layers(origin)?;
            ("rope_parameters.full_attention", new.full_attention.as_deref().unwrap_or(&none))
        }
        (None, Some(new)) => ("rope_parameters", new),
        (None, None) => ("rope_parameters", &none),
    };
    let theta = keys.rope_theta.unwrap_or(if by_layers { 1e6 } else { 10_000.0 });
    Table { keys: table, at, theta, context: keys.max_position_embeddings, by_layers, origin }
        .rope()
}

/// Those of windowed layers, where the family has them.
pub(super) fn local(keys: &Keys, family: Family, origin: Origin) -> Result<Option<Rope>> {
    match family {
        Family::Qwen2 | Family::Llama | Family::Mistral | Family::Qwen3 => return Ok(None),
        Family::Gemma3 => {}
    }
    let none = RopeKeys::default();
    let by_layers = keys.rope_parameters.as_ref();
    let table = by_layers.and_then(|r| r.sliding_attention.as_deref()).unwrap_or(&none);
    let (at, theta) =
        ("rope_parameters.sliding_attention", keys.rope_local_base_freq.unwrap_or(10_000.0));
    let context = keys.max_position_embeddings;
    Table { keys: table, at, theta, context, by_layers: true, origin }.rope().map(Some)
}

impl RopeKeys {
    /// Refuses keys that stand beside the two kinds of layers and would be lost.
    fn only_by_layers(&self, origin: Origin) -> Result<()> {
        let rest = Self { full_attention: None, sliding_attention: None, ..self.clone() };
        match rest == Self::default() {
            true => Ok(()),
            false => {
                let why = "must stand under `full_attention` and `sliding_attention`";
                Err(origin.refuse("rope_parameters", why))
            }
        }
    }
}

impl Table<'_> {
    fn refuse(&self, key: &str, why: impl Into<String>) -> anyhow::Error {
        self.origin.refuse(&format!("{}.{key}", self.at), why)
    }

    fn required(&self, key: &str, value: Option<f64>) -> Result<f64> {
        value.ok_or_else(|| self.refuse(key, "is missing"))
    }

    fn rope(&self) -> Result<Rope> {
        let keys = self.keys;
        if keys.full_attention.is_some() || keys.sliding_attention.is_some() {
            let why = "is by kind of layer, which this family is not";
            return Err(self.origin.refuse(self.at, why));
        }
        if let Some(part) = keys.partial_rotary_factor.filter(|part| *part != 1.0) {
            let why = format!("is {part}; that is not supported");
            return Err(self.refuse("partial_rotary_factor", why));
        }
        let kind = keys.rope_type.as_deref().or(keys.kind.as_deref()).unwrap_or("default");
        let scaling = match kind {
            "default" => RopeScaling::Default,
            "linear" => RopeScaling::Linear { factor: self.required("factor", keys.factor)? },
            "llama3" => RopeScaling::Llama3 {
                factor: self.required("factor", keys.factor)?,
                low_freq_factor: self.required("low_freq_factor", keys.low_freq_factor)?,
                high_freq_factor: self.required("high_freq_factor", keys.high_freq_factor)?,
                original_max_position_embeddings: self.original(),
            },
            "yarn" => self.yarn()?,
            other => {
                let why = format!("is `{other}`; supported are default, linear, llama3 and yarn");
                return Err(self.refuse("rope_type", why));
            }
        };
        Ok(Rope { theta: keys.rope_theta.unwrap_or(self.theta), scaling })
    }

    /// The context before it was stretched.
    fn original(&self) -> usize {
        self.keys.original_max_position_embeddings.unwrap_or(self.context)
    }

    /// YaRN, its factors resolved as transformers does: a 0 there is silence too.
    fn yarn(&self) -> Result<RopeScaling> {
        let keys = self.keys;
        let given = |value: Option<f64>| value.filter(|value| *value != 0.0);
        let factor = self.required("factor", keys.factor)?;
        let magnitude = |scale: f64| match factor <= 1.0 {
            true => 1.0,
            false => 0.1 * scale * factor.ln() + 1.0,
        };
        let by_formula = match (given(keys.mscale), given(keys.mscale_all_dim)) {
            (Some(scale), Some(of_all)) => magnitude(scale) / magnitude(of_all),
            (Some(_), None) | (None, Some(_)) | (None, None) => magnitude(1.0),
        };
        let truncate = keys.truncate.unwrap_or(true);
        if !truncate && self.by_layers {
            let why =
                "is false, which transformers does not read where positions are by kind of layer";
            return Err(self.refuse("truncate", why));
        }
        Ok(RopeScaling::Yarn {
            factor,
            beta_fast: given(keys.beta_fast).unwrap_or(32.0),
            beta_slow: given(keys.beta_slow).unwrap_or(1.0),
            original_max_position_embeddings: self.original(),
            attention_factor: keys.attention_factor.unwrap_or(by_formula),
            truncate,
        })
    }
}

/// Writes a model's positions: in the older layout, which both versions of transformers read, where
/// it has words for them.
pub(super) fn write(model: &ModelConfig, json: &mut Value) {
    let global = model.rope;
    let local = model.local_rope.unwrap_or(global);
    json["rope_theta"] = json!(global.theta);
    if global.scaling != RopeScaling::Default {
        json["rope_scaling"] = table(global.scaling);
    }
    if model.family == Family::Gemma3 {
        json["rope_local_base_freq"] = json!(local.theta);
        if model.window.is_some() && local.scaling != RopeScaling::Default {
            let both = [("full_attention", global), ("sliding_attention", local)];
            let nested = both.map(|(kind, rope)| {
                let mut keys = table(rope.scaling);
                keys["rope_theta"] = json!(rope.theta);
                (kind.to_string(), keys)
            });
            json["rope_parameters"] = Value::Object(nested.into_iter().collect());
            if let Some(keys) = json.as_object_mut() {
                keys.remove("rope_scaling");
            }
        }
    }
}

/// The keys of one kind of stretching.
fn table(scaling: RopeScaling) -> Value {
    match scaling {
        RopeScaling::Default => json!({ "rope_type": "default" }),
        RopeScaling::Linear { factor } => json!({ "rope_type": "linear", "factor": factor }),
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor,
            "original_max_position_embeddings": original_max_position_embeddings,
        }),
        RopeScaling::Yarn {
            factor,
            beta_fast,
            beta_slow,
            original_max_position_embeddings,
            attention_factor,
            truncate,
        } => json!({
            "rope_type": "yarn",
            "factor": factor,
            "beta_fast": beta_fast,
            "beta_slow": beta_slow,
            "original_max_position_embeddings": original_max_position_embeddings,
            "attention_factor": attention_factor,
            "truncate": truncate,
        }),
    }
}
