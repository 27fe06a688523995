//! Which layers are windowed, as each family says it.

use serde_json::{Value, json};

use super::{Origin, keys::Keys};
use crate::{
    config::{Family, ModelConfig, Window},
    error::Result,
};

/// W where a family has windows and its file does not say how wide they are.
const WIDTH: usize = 4096;
const FULL: &str = "full_attention";
const WINDOWED: &str = "sliding_attention";

/// The windows of a model; none where no layer has one. Its number of layers is a valid one.
pub(super) fn of(keys: &Keys, family: Family, origin: Origin) -> Result<Option<Window>> {
    let layers = keys.num_hidden_layers;
    let width = keys.sliding_window.unwrap_or(Some(WIDTH));
    let listed =
        keys.layer_types.as_ref().map(|types| listed(types, layers, origin)).transpose()?;
    let (width, by_family) = match family {
        Family::Llama => {
            if let Some(width) = keys.sliding_window.flatten() {
                let why = format!("is {width}; `llama` has no windows");
                return Err(origin.refuse("sliding_window", why));
            }
            (None, vec![false; layers])
        }
        Family::Mistral => (width, vec![width.is_some(); layers]),
        Family::Qwen2 | Family::Qwen3 => {
            let width = width.filter(|_| keys.use_sliding_window == Some(true));
            let first = keys.max_window_layers.unwrap_or(28);
            (width, (0..layers).map(|layer| width.is_some() && layer >= first).collect())
        }
        Family::Gemma3 => {
            let every = keys.sliding_window_pattern.unwrap_or(6);
            if every == 0 {
                return Err(origin.refuse("sliding_window_pattern", "is 0"));
            }
            (width, (1..=layers).map(|layer| layer % every != 0).collect())
        }
    };
    let windowed = match (listed, family) {
        (None, _) => by_family,
        // Those two have one kind of layer, whatever a list says.
        (Some(listed), Family::Llama | Family::Mistral) if listed != by_family => {
            let why = format!("says otherwise than `{}` does", family.name());
            return Err(origin.refuse("layer_types", why));
        }
        (Some(listed), _) => listed,
    };
    match (windowed.contains(&true), width) {
        (false, _) => Ok(None),
        (true, Some(width)) => Ok(Some(Window { width, layers: windowed })),
        (true, None) => {
            Err(origin.refuse("sliding_window", "is off, and some layers are windowed"))
        }
    }
}

/// `layer_types`, one by one.
fn listed(types: &[String], layers: usize, origin: Origin) -> Result<Vec<bool>> {
    let refuse = |why| origin.refuse("layer_types", why);
    if types.len() != layers {
        return Err(refuse(format!("names {} layers of {layers}", types.len())));
    }
    let one = |kind: &String| match kind.as_str() {
        FULL => Ok(false),
        WINDOWED => Ok(true),
        other => Err(refuse(format!("names `{other}`; supported are {FULL} and {WINDOWED}"))),
    };
    types.iter().map(one).collect()
}

/// Writes a model's windows.
pub(super) fn write(model: &ModelConfig, json: &mut Value) {
    let width = model.window.as_ref().map(|window| window.width);
    let types = || -> Vec<_> {
        let windowed = (0..model.num_hidden_layers).map(|layer| model.window_of(layer).is_some());
        windowed.map(|windowed| if windowed { WINDOWED } else { FULL }).collect()
    };
    match model.family {
        Family::Llama => {}
        Family::Mistral => json["sliding_window"] = json!(width),
        Family::Qwen2 | Family::Qwen3 => {
            json["use_sliding_window"] = width.is_some().into();
            if width.is_some() {
                json["sliding_window"] = json!(width);
                json["layer_types"] = json!(types());
            }
        }
        Family::Gemma3 => {
            json["sliding_window"] = json!(width.unwrap_or(WIDTH));
            json["layer_types"] = json!(types());
        }
    }
}
