//! Which layers are windowed, as each family says it.

use serde_json::{Value, json};

use super::object::Object;
use crate::{
    config::{Family, ModelConfig, Window},
    error::Result,
};

/// W where a family has windows and its file does not say how wide they are.
const WIDTH: usize = 4096;
const FULL: &str = "full_attention";
const WINDOWED: &str = "sliding_attention";

/// What the keys of a family say without a list of layers.
struct Said {
    width: Option<usize>,
    layers: Vec<bool>,
    /// The key that says which layers, where one does: a list must say the same.
    by: Option<&'static str>,
}

/// The windows of a model of a valid number of `layers`; none where no layer has one, or where they
/// reach over the whole `context`.
pub(super) fn of(
    keys: &Object,
    family: Family,
    layers: usize,
    context: usize,
) -> Result<Option<Window>> {
    let said = match family {
        Family::Llama => without(keys, layers, context)?,
        Family::Mistral => everywhere(keys, layers, context)?,
        Family::Qwen2 | Family::Qwen3 => above(keys, layers)?,
        Family::Gemma3 => but_each(keys, layers)?,
    };
    let listed = listed(keys, layers)?;
    // Whichever layers have such a window, it hides nothing; but windowed layers of one family have
    // rotary positions of their own, however wide it is.
    if said.width.is_some_and(|width| width >= context) && family != Family::Gemma3 {
        keys.ignore("sliding_window", "is no shorter than the context");
        return Ok(None);
    }
    let windowed = match listed {
        None => said.layers,
        Some(listed) => match said.by.filter(|_| listed != said.layers) {
            Some(by) => {
                let why = format!("says otherwise than {by}");
                return Err(keys.refuse("layer_types", why));
            }
            None => listed,
        },
    };
    let Some(width) = said.width else {
        return match windowed.contains(&true) {
            true => Err(keys.refuse("sliding_window", "is off, and some layers are windowed")),
            false => Ok(None),
        };
    };
    if !windowed.contains(&true) {
        keys.ignore("sliding_window", "is of windows, and no layer has one");
        return Ok(None);
    }
    Ok(Some(Window { width, layers: windowed }))
}

/// W: a family's own where the file is silent, none where it says null.
fn width(keys: &Object) -> Result<Option<usize>> {
    match (keys.count("sliding_window")?, keys.is_null("sliding_window")) {
        (Some(width), _) => Ok(Some(width)),
        (None, true) => Ok(None),
        (None, false) => Ok(Some(WIDTH)),
    }
}

/// A family without windows.
fn without(keys: &Object, layers: usize, context: usize) -> Result<Said> {
    let width = keys.count("sliding_window")?;
    let on = keys.flag("use_sliding_window")?;
    match (on, width) {
        (Some(false), Some(_)) => {
            keys.ignore("sliding_window", "is of windows, and `use_sliding_window` is off");
        }
        (None, Some(width)) if width < context => {
            let why = format!("is {width}; `llama` has no windows");
            return Err(keys.refuse("sliding_window", why));
        }
        (Some(true), width) if width.is_none_or(|width| width < context) => {
            return Err(keys.refuse("use_sliding_window", "is true; `llama` has no windows"));
        }
        (None | Some(_), None | Some(_)) => {}
    }
    keys.ignore("max_window_layers", "is of windows, and there are none");
    let width = width.filter(|_| on != Some(false));
    Ok(Said { width, layers: vec![false; layers], by: Some("`llama` does") })
}

/// A family whose layers all have the window.
fn everywhere(keys: &Object, layers: usize, context: usize) -> Result<Said> {
    let width = width(keys)?;
    let hides = width.is_some_and(|width| width < context);
    let contradicts = |on| if on { width.is_none() } else { hides };
    if keys.flag("use_sliding_window")?.is_some_and(contradicts) {
        let why = "says otherwise than `sliding_window`, which `mistral` goes by";
        return Err(keys.refuse("use_sliding_window", why));
    }
    let layers = vec![width.is_some(); layers];
    Ok(Said { width, layers, by: Some("`mistral` does") })
}

/// A family where, if a flag says so, the layers above the first few have it.
fn above(keys: &Object, layers: usize) -> Result<Said> {
    const FIRST: usize = 28;
    let on = keys.flag("use_sliding_window")?.unwrap_or(false);
    let width = width(keys)?.filter(|_| on);
    let first = keys.count("max_window_layers")?;
    if !on {
        for key in ["sliding_window", "max_window_layers"] {
            keys.ignore(key, "is of windows, and `use_sliding_window` is not on");
        }
    }
    let layers: Vec<bool> =
        (0..layers).map(|layer| width.is_some() && layer >= first.unwrap_or(FIRST)).collect();
    // The number is written into every file, and a list is what goes beside it.
    let by = first.filter(|first| on && *first != FIRST).map(|_| "`max_window_layers` does");
    Ok(Said { width, layers, by })
}

/// A family where all but each so-many-th layer has it.
fn but_each(keys: &Object, layers: usize) -> Result<Said> {
    const EACH: usize = 6;
    let (key, by) = ("sliding_window_pattern", "`sliding_window_pattern` does");
    let said = keys.count(key)?;
    // transformers writes this one into every file, and goes by a list of layers that is there.
    let written = "_sliding_window_pattern";
    let or = keys.count(written)?;
    if keys.get("layer_types").is_some() {
        keys.ignore(written, "stands beside `layer_types`, which says it");
    } else if let Some(b) = or.filter(|b| *b != said.unwrap_or(EACH)) {
        // Alone it is not read, and what wrote it meant something.
        let a = said.unwrap_or(EACH);
        return Err(keys.refuse(written, format!("is {b}, and `{key}` is {a}, given or not")));
    }
    let each = said.unwrap_or(EACH);
    if each == 0 {
        return Err(keys.refuse(key, "is 0"));
    }
    if keys.flag("use_sliding_window")? == Some(false) {
        return Err(keys.refuse("use_sliding_window", "is false; `gemma3_text` has windows"));
    }
    keys.ignore("max_window_layers", "is no key of `gemma3_text`, which has a pattern");
    let windowed = (1..=layers).map(|layer| layer % each != 0).collect();
    Ok(Said { width: width(keys)?, layers: windowed, by: said.map(|_| by) })
}

/// `layer_types`, one by one.
fn listed(keys: &Object, layers: usize) -> Result<Option<Vec<bool>>> {
    let refuse = |why| keys.refuse("layer_types", why);
    let Some(types) = keys.texts("layer_types")? else { return Ok(None) };
    if types.len() != layers {
        return Err(refuse(format!("names {} layers of {layers}", types.len())));
    }
    let one = |kind: &str| match kind {
        FULL => Ok(false),
        WINDOWED => Ok(true),
        other => Err(refuse(format!("names `{other}`; supported are {FULL} and {WINDOWED}"))),
    };
    types.into_iter().map(one).collect::<Result<_>>().map(Some)
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
