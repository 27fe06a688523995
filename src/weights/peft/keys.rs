//! The keys of adapter_config.json: which are honoured, which change nothing, which are refused.

use serde_json::Value;

/// Keys that [`super::options`] reads, and honours.
const HONOURED: [&str; 11] = [
    "peft_type",
    "task_type",
    "r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
];

/// Keys that do not change what a trained adapter computes, and why.
const IDLE: [(&str, &str); 15] = [
    ("base_model_name_or_path", "is not read: --model names the base"),
    ("revision", "is not read: --model names the base"),
    ("auto_mapping", "names classes of Python"),
    ("peft_version", "says what wrote the file"),
    ("inference_mode", "says whether it was to be trained further"),
    ("runtime_config", "says how PEFT runs it"),
    ("lora_dropout", "acts in training alone, and none is applied in training here"),
    ("megatron_core", "names a module of Python"),
    ("qalora_group_size", "belongs to `use_qalora`, which is off"),
    ("loftq_config", "says how its factors began, as `init_lora_weights` does"),
    ("eva_config", "says how its factors began, as `init_lora_weights` does"),
    ("corda_config", "says how its factors began, as `init_lora_weights` does"),
    ("lora_ga_config", "says how its factors began, as `init_lora_weights` does"),
    ("ensure_weight_tying", "belongs to `modules_to_save` and adapted embeddings"),
    ("init_lora_weights", "says how its factors began; the file has what they are"),
];

/// Keys of methods and places that are not computed here. What is unknown is refused likewise; of
/// these, a value that says "unused" need not be told.
const OTHER: [&str; 17] = [
    "use_dora",
    "bias",
    "lora_bias",
    "fan_in_fan_out",
    "modules_to_save",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "megatron_config",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
    "target_modules_to_tie",
];

/// How A and B may have begun where the base's weights stayed as they were: drawn at random, or
/// from data, with B A = 0 at first. All others have moved the base, or are unknown.
const HARMLESS: [&str; 3] = ["gaussian", "orthogonal", "eva"];

/// What is to become of a key with its value.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// It is read, or says what is the case anyway.
    Honoured,
    /// It changes nothing, for this reason.
    Ignored(&'static str),
    /// It changes what is computed, in a way that this program does not know.
    Refused(String),
}

/// The fate of `key`.
pub(super) fn fate(key: &str, value: &Value) -> Fate {
    if HONOURED.contains(&key) {
        return Fate::Honoured;
    }
    let idle = IDLE.iter().find(|(idle, _)| *idle == key);
    match (key, idle) {
        ("init_lora_weights", _) if !is_harmless(value) => {
            let why = "not known to leave the base weights as they are";
            Fate::Refused(format!("`{key}` is {value}, {why}: the adapter fits others"))
        }
        (_, Some(_)) if is_unused(value) || value.as_f64() == Some(0.0) => Fate::Honoured,
        (_, Some((_, why))) => Fate::Ignored(why),
        (_, None) if !is_unused(value) => {
            Fate::Refused(format!("`{key}` is {value}, not supported"))
        }
        (_, None) if OTHER.contains(&key) => Fate::Honoured,
        (_, None) => Fate::Ignored("is unknown, with a value that says it is not used"),
    }
}

fn is_harmless(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(_) => true,
        Value::String(text) => HARMLESS.contains(&text.to_lowercase().as_str()),
        Value::Number(_) | Value::Array(_) | Value::Object(_) => false,
    }
}

/// Whether a value says that its key is not used.
fn is_unused(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Object(map) => map.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::String(text) => text.is_empty() || text == "none",
        Value::Bool(true) | Value::Number(_) => false,
    }
}
