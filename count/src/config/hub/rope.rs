//! Rotary positions: `rope_theta` and `rope_scaling` of transformers 4, `rope_parameters` of
//! transformers 5, there also by kind of layer.

use serde_json::{Value, json};

use super::object::{NULL, Object, shown};
use crate::{
    config::{Family, ModelConfig, Rope, RopeScaling},
    error::{Error, Result},
};

const FULL: &str = "full_attention";
const WINDOWED: &str = "sliding_attention";

/// What holds where a table of positions is silent.
#[derive(Clone, Copy)]
struct Beside {
    /// The key outside the table that has the base.
    key: &'static str,
    theta: Option<f64>,
    /// That key is there, and null.
    is_null: bool,
    /// The base where neither has it.
    silent: f64,
    /// The context of the whole model.
    context: usize,
    /// The family has a table for each kind of layers.
    by_layers: bool,
}

impl Beside {
    /// The base: the table's or the one beside it, which must be one.
    fn theta(self, keys: &Object, inside: Option<f64>) -> Result<f64> {
        match (self.theta, inside) {
            (Some(a), Some(b)) if a != b => {
                let why = format!("is {a}, and `{}` is {b}", keys.full("rope_theta"));
                Err(Error::Config { origin: keys.origin().into(), key: self.key.into(), why }
                    .into())
            }
            (beside, inside) => match inside.or(beside) {
                Some(theta) => Ok(theta),
                None if self.is_null => Err(self.no_base(keys)),
                None => keys.or_silent("rope_theta", None, self.silent),
            },
        }
    }

    /// Positions where there is no table.
    fn alone(self, keys: &Object) -> Result<Rope> {
        match self.theta {
            None if self.is_null => Err(self.no_base(keys)),
            theta => {
                Ok(Rope { theta: theta.unwrap_or(self.silent), scaling: RopeScaling::Default })
            }
        }
    }

    /// The key outside the table asks for a base that nobody names.
    fn no_base(self, keys: &Object) -> anyhow::Error {
        let why = NULL.into();
        Error::Config { origin: keys.origin().into(), key: self.key.into(), why }.into()
    }
}

/// Positions of the layers that see the whole context; beside them, those of windowed layers in the
/// family that has such.
pub(super) fn of(
    keys: &Object,
    family: Family,
    context: usize,
    kinds: Kinds,
) -> Result<(Rope, Option<Rope>)> {
    let by_layers = family == Family::Gemma3;
    let silent = if by_layers { 1e6 } else { 10_000.0 };
    let (key, theta) = ("rope_theta", keys.number("rope_theta")?);
    let is_null = keys.is_null(key);
    let global = Beside { key, theta, is_null, silent, context, by_layers };
    let key = "rope_local_base_freq";
    let theta = if by_layers { keys.number(key)? } else { None };
    let is_null = by_layers && keys.is_null(key);
    let local = Beside { key, theta, is_null, silent: 10_000.0, context, by_layers };
    let alone = |local: Beside| by_layers.then(|| local.alone(keys)).transpose();
    let read = |key: &str| -> Result<_> {
        let Some(table) = keys.object(key)? else { return Ok(None) };
        pair(&table, family, global, local, kinds).map(Some)
    };
    match (read("rope_scaling")?, read("rope_parameters")?) {
        (Some(old), Some(new)) if old != new => {
            let why = "stands beside `rope_parameters`, and they are not the same";
            Err(keys.refuse("rope_scaling", why))
        }
        (Some(both), _) | (None, Some(both)) => Ok(both),
        (None, None) => Ok((global.alone(keys)?, alone(local)?)),
    }
}

/// Which kinds of layers a model has.
#[derive(Clone, Copy)]
pub(super) struct Kinds {
    pub full: bool,
    pub windowed: bool,
}

/// Both kinds' positions from one table, or from a table for each kind.
fn pair(
    table: &Object,
    family: Family,
    global: Beside,
    local: Beside,
    kinds: Kinds,
) -> Result<(Rope, Option<Rope>)> {
    let [full, windowed] = [table.object(FULL)?, table.object(WINDOWED)?];
    let by_layers = global.by_layers;
    if full.is_none() && windowed.is_none() {
        // The older layout: windowed layers are never stretched.
        let local = by_layers.then(|| local.alone(table)).transpose()?;
        return Ok((rope(table, global)?, local));
    }
    // What stands beside the two kinds would be lost.
    if let Some((key, _)) = table.unread().into_iter().find(|(_, value)| !value.is_null()) {
        let why = format!("must stand under `{FULL}` and `{WINDOWED}`");
        return Err(table.refuse(key, why));
    }
    let full = full.map(|keys| rope(&keys, global)).transpose()?;
    if by_layers {
        let windowed = windowed.map(|keys| rope(&keys, local)).transpose()?;
        let full = full.map_or_else(|| global.alone(table), Ok)?;
        return Ok((full, Some(windowed.map_or_else(|| local.alone(table), Ok)?)));
    }
    let windowed = windowed.map(|keys| rope(&keys, global)).transpose()?;
    for (kind, there, needed) in [(FULL, &full, kinds.full), (WINDOWED, &windowed, kinds.windowed)]
    {
        if needed && there.is_none() {
            return Err(table.refuse(kind, "is missing, and there are such layers"));
        }
    }
    match (full, windowed) {
        (Some(a), Some(b)) if a != b && kinds.full && kinds.windowed => {
            let why = format!("is not as `{FULL}`, and `{}` has one for all", family.name());
            Err(table.refuse(WINDOWED, why))
        }
        (Some(one), None) | (None, Some(one)) => Ok((one, None)),
        (Some(full), Some(windowed)) => Ok((if kinds.full { full } else { windowed }, None)),
        (None, None) => Err(table.refuse(FULL, "is missing")),
    }
}

/// Positions from one table.
fn rope(keys: &Object, beside: Beside) -> Result<Rope> {
    let theta = beside.theta(keys, keys.number("rope_theta")?)?;
    let [new, old] = [keys.text("rope_type")?, keys.text("type")?];
    if let (Some(a), Some(b)) = (new, old)
        && a != b
    {
        return Err(keys.refuse("type", format!("is `{b}`, and `rope_type` is `{a}`")));
    }
    let factor = keys.number("factor")?;
    let need = |key: &str| keys.number(key)?.ok_or_else(|| keys.refuse(key, "is missing"));
    let original = keys.count("original_max_position_embeddings")?;
    let kind = new.or(old);
    let scaling = match kind.unwrap_or("default") {
        "default" => {
            if let Some(factor) = factor.filter(|factor| *factor != 1.0) {
                let why = match kind {
                    Some(kind) => format!("is {factor}, and `{kind}` stretches nothing"),
                    None => format!("is {factor}, and no `rope_type` says what it is of"),
                };
                return Err(keys.refuse("factor", why));
            }
            RopeScaling::Default
        }
        "linear" => RopeScaling::Linear { factor: need("factor")? },
        "llama3" => RopeScaling::Llama3 {
            factor: need("factor")?,
            low_freq_factor: need("low_freq_factor")?,
            high_freq_factor: need("high_freq_factor")?,
            original_max_position_embeddings: original.unwrap_or(beside.context),
        },
        "yarn" => yarn(keys, need("factor")?, original.unwrap_or(beside.context), beside)?,
        other => {
            let why = format!("is `{other}`; supported are default, linear, llama3 and yarn");
            return Err(keys.refuse(if new.is_some() { "rope_type" } else { "type" }, why));
        }
    };
    match scaling {
        RopeScaling::Default | RopeScaling::Linear { .. } => {
            keys.ignore("original_max_position_embeddings", "is not read by this kind of scaling")
        }
        RopeScaling::Llama3 { .. } | RopeScaling::Yarn { .. } => {}
    }
    settle(keys, kind)?;
    let rope = Rope { theta, scaling };
    match rope.fault() {
        Some((key, why)) => Err(keys.refuse(key, why)),
        None => Ok(Rope { scaling: scaling.simplified(), ..rope }),
    }
}

/// Decides on the keys that the kind of scaling does not read.
fn settle(keys: &Object, kind: Option<&str>) -> Result<()> {
    const NEUTRAL: [&str; 5] = [
        "partial_rotary_factor",
        "attention_factor",
        "attn_factor",
        "extrapolation_factor",
        "mscale",
    ];
    for (key, value) in keys.unread() {
        if value.is_null() || key == "finetuned" {
            keys.ignore(key, "asks for nothing");
        } else if !(NEUTRAL.contains(&key) && value.as_f64() == Some(1.0)) {
            let value = shown(value);
            return Err(keys.refuse(
                key,
                match (key, kind) {
                    ("partial_rotary_factor", _) => format!("is {value}; that is not supported"),
                    (_, Some(kind)) => format!("is {value}, and `{kind}` reads no such key"),
                    (_, None) => format!("is {value}, and no `rope_type` says what it is of"),
                },
            ));
        }
    }
    Ok(())
}

/// YaRN, its factors resolved as transformers does: a 0 there is silence too.
fn yarn(keys: &Object, factor: f64, original: usize, beside: Beside) -> Result<RopeScaling> {
    let given = |key: &str| -> Result<_> { Ok(keys.number(key)?.filter(|value| *value != 0.0)) };
    let magnitude = |scale: f64| match factor <= 1.0 {
        true => 1.0,
        false => 0.1 * scale * factor.ln() + 1.0,
    };
    let by_formula = match (given("mscale")?, given("mscale_all_dim")?) {
        (Some(scale), Some(of_all)) => magnitude(scale) / magnitude(of_all),
        (Some(_), None) | (None, Some(_)) | (None, None) => magnitude(1.0),
    };
    let truncate = keys.flag("truncate")?.unwrap_or(true);
    if !truncate && beside.by_layers {
        let why = "is false, which transformers does not read where positions are by kind of layer";
        return Err(keys.refuse("truncate", why));
    }
    Ok(RopeScaling::Yarn {
        factor,
        beta_fast: given("beta_fast")?.unwrap_or(32.0),
        beta_slow: given("beta_slow")?.unwrap_or(1.0),
        original_max_position_embeddings: original,
        attention_factor: keys.number("attention_factor")?.unwrap_or(by_formula),
        truncate,
    })
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
