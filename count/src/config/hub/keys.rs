//! What becomes of a key of `config.json` that a family does not read: each that is known stands in
//! a table here, and one that is not known is refused.

use serde_json::Value;

use super::object::{Object, shown};
use crate::{
    config::{Family, Matters},
    error::Result,
};

/// Why a key changes nothing that is computed here.
#[derive(Clone, Copy)]
enum Idle {
    Tokens,
    Start,
    Storage,
    Execution,
    Generation,
    Classifier,
    Origin,
}

impl Idle {
    const fn reason(self) -> &'static str {
        match self {
            Self::Tokens => "names tokens; the tokenizer's own files are read",
            Self::Start => "describes the values that an untrained model starts from",
            Self::Storage => "says how the weights were saved; the tensors say so themselves",
            Self::Execution => "says how another program runs the same model",
            Self::Generation => "is a default of generation; flags decide here",
            Self::Classifier => "belongs to a classifier's head, and this model has none",
            Self::Origin => "says where the file comes from",
        }
    }
}

const IDLE: &[(Idle, &[&str])] = &[
    (
        Idle::Tokens,
        &[
            "bos_token_id",
            "eos_token_id",
            "pad_token_id",
            "sep_token_id",
            "unk_token_id",
            "decoder_start_token_id",
            "forced_bos_token_id",
            "forced_eos_token_id",
            "bos_token",
            "eos_token",
            "pad_token",
            "tokenizer_class",
            "prefix",
        ],
    ),
    (
        Idle::Start,
        &["initializer_range", "initializer_factor", "init_method", "embedding_initializer_range"],
    ),
    (
        Idle::Storage,
        &["torch_dtype", "dtype", "use_bfloat16", "transformers_version", "transformers_weights"],
    ),
    (
        Idle::Execution,
        &[
            "use_cache",
            "cache_implementation",
            "attn_implementation",
            "_attn_implementation",
            "_attn_implementation_autoset",
            "_attn_implementation_internal",
            "_flash_attn_2_enabled",
            "use_flash_attn",
            "use_flash_attention",
            "use_flash_attention_2",
            "pretraining_tp",
            "base_model_tp_plan",
            "base_model_pp_plan",
            "chunk_size_feed_forward",
            "gradient_checkpointing",
            "output_attentions",
            "output_hidden_states",
            "output_router_logits",
            "output_past",
            "return_dict",
            "use_return_dict",
            "torchscript",
            "tf_legacy_loss",
            "keys_to_ignore_at_inference",
            "transformers.js_config",
            "max_sequence_length",
            "model_max_length",
            "use_liger_kernel",
        ],
    ),
    (
        Idle::Generation,
        &[
            "max_length",
            "min_length",
            "max_new_tokens",
            "do_sample",
            "early_stopping",
            "num_beams",
            "num_beam_groups",
            "diversity_penalty",
            "temperature",
            "top_k",
            "top_p",
            "typical_p",
            "repetition_penalty",
            "length_penalty",
            "no_repeat_ngram_size",
            "encoder_no_repeat_ngram_size",
            "bad_words_ids",
            "num_return_sequences",
            "output_scores",
            "return_dict_in_generate",
            "remove_invalid_values",
            "exponential_decay_length_penalty",
            "suppress_tokens",
            "begin_suppress_tokens",
            "generation_config",
        ],
    ),
    (
        Idle::Classifier,
        &[
            "id2label",
            "label2id",
            "num_labels",
            "problem_type",
            "finetuning_task",
            "task_specific_params",
            "classifier_dropout",
        ],
    ),
    (
        Idle::Origin,
        &[
            "_comment",
            "_name_or_path",
            "model_name",
            "name_or_path",
            "_commit_hash",
            "is_llama_config",
            "unsloth_fixed",
            "unsloth_version",
            "is_decoder",
        ],
    ),
];

/// Shares that a training drops at random.
const DROPOUT: [&str; 9] = [
    "attention_dropout",
    "hidden_dropout",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "mlp_dropout",
    "attn_pdrop",
    "embd_pdrop",
    "resid_pdrop",
    "layerdrop",
];

/// The value, beside null, at which a key asks for nothing.
#[derive(Clone, Copy)]
enum Neutral {
    /// None.
    Null,
    Yes,
    No,
    Number(f64),
    /// A list or an object of nothing.
    Empty,
}

impl Neutral {
    /// Whether `value` is this one; false is too where a number asks for something.
    fn is(self, value: &Value) -> bool {
        match self {
            Self::Null => value.is_null(),
            Self::Yes => value.as_bool() == Some(true),
            Self::No => value.as_bool() == Some(false),
            Self::Number(n) => value.as_f64() == Some(n) || value.as_bool() == Some(false),
            Self::Empty => {
                value.as_array().is_some_and(Vec::is_empty)
                    || value.as_object().is_some_and(serde_json::Map::is_empty)
            }
        }
    }
}

/// Keys that change what is computed, where the family at hand does not read them.
const CHANGING: &[(&str, Neutral)] = &[
    ("is_causal", Neutral::Yes),
    ("causal", Neutral::Yes),
    ("use_causal_mask", Neutral::Yes),
    ("use_bidirectional_attention", Neutral::No),
    ("is_encoder_decoder", Neutral::No),
    ("add_cross_attention", Neutral::No),
    ("cross_attention_hidden_size", Neutral::Null),
    ("tie_encoder_decoder", Neutral::No),
    ("pruned_heads", Neutral::Empty),
    ("auto_map", Neutral::Empty),
    ("partial_rotary_factor", Neutral::Number(1.0)),
    ("rotary_pct", Neutral::Number(1.0)),
    ("rope_interleaved", Neutral::No),
    ("rope_traditional", Neutral::No),
    ("no_rope_layers", Neutral::Empty),
    ("no_rope_layer_interval", Neutral::Number(0.0)),
    ("use_mrope", Neutral::No),
    ("alibi", Neutral::No),
    ("attn_logit_softcapping", Neutral::Null),
    ("final_logit_softcapping", Neutral::Null),
    ("logit_softcapping", Neutral::Null),
    ("attention_multiplier", Neutral::Null),
    ("attention_scale", Neutral::Null),
    ("attn_scale", Neutral::Null),
    ("embedding_multiplier", Neutral::Number(1.0)),
    ("residual_multiplier", Neutral::Number(1.0)),
    ("logits_scaling", Neutral::Number(1.0)),
    ("logit_scale", Neutral::Number(1.0)),
    ("scale_emb", Neutral::Number(1.0)),
    ("scale_depth", Neutral::Null),
    ("clip_qkv", Neutral::Null),
    ("attention_chunk_size", Neutral::Null),
    ("use_qk_norm", Neutral::No),
    ("qk_layernorm", Neutral::No),
    ("qk_layer_norms", Neutral::No),
    ("parallel_attn", Neutral::No),
    ("use_parallel_residual", Neutral::No),
    ("lm_head_bias", Neutral::No),
    ("num_experts", Neutral::Number(0.0)),
    ("num_local_experts", Neutral::Number(0.0)),
    ("n_routed_experts", Neutral::Number(0.0)),
    ("num_experts_per_tok", Neutral::Number(0.0)),
    ("num_nextn_predict_layers", Neutral::Number(0.0)),
    // Those of some families, where another has them.
    ("mlp_bias", Neutral::No),
    ("query_pre_attn_scalar", Neutral::Null),
    ("rope_local_base_freq", Neutral::Null),
    ("sliding_window_pattern", Neutral::Null),
    ("_sliding_window_pattern", Neutral::Null),
];

/// Refuses a checkpoint of quantized weights, by the method that its config names.
pub(super) fn refuse_quantization(keys: &Object) -> Result<()> {
    // The last is MLX's.
    for key in ["quantization_config", "compression_config", "quantization"] {
        let Some(value) = keys.get(key) else { continue };
        let method = value.get("quant_method").and_then(Value::as_str).unwrap_or("of some method");
        let why = format!(
            "says that the weights are quantized ({method}), which is not supported; take the \
             checkpoint that they were made from, or a GGUF"
        );
        return Err(keys.refuse(key, why));
    }
    Ok(())
}

/// Decides on each key that `family` has not read: listed as ignored, or refused.
pub(super) fn settle(keys: &Object, family: Family) -> Result<()> {
    for (key, value) in keys.unread() {
        let neutral = changing(key, family);
        // Whoever reads a flag takes null for false.
        if value.is_null() && !matches!(neutral, Some(Neutral::Yes)) {
            keys.ignore(key, "is null, which asks for nothing");
        } else if let Some((idle, _)) = IDLE.iter().find(|(_, keys)| keys.contains(&key)) {
            keys.ignore(key, idle.reason());
        } else if DROPOUT.contains(&key) {
            let matters =
                if Neutral::Number(0.0).is(value) { Matters::Never } else { Matters::InTraining };
            keys.ignore_where(key, "drops at random in training; here nothing is", matters);
        } else {
            if !neutral.is_some_and(|neutral| neutral.is(value)) {
                return Err(keys.refuse(key, asked(key, value, neutral.is_some(), family)));
            }
            keys.ignore(key, "asks for nothing at this value");
        }
    }
    Ok(())
}

/// The value at which a key asks for nothing of a model of `family`; none of an unknown key.
fn changing(key: &str, family: Family) -> Option<Neutral> {
    match (key, family) {
        // The family has them whatever the file says.
        ("attention_bias" | "qkv_bias", Family::Qwen2) => Some(Neutral::Yes),
        ("attention_bias" | "qkv_bias", _) => Some(Neutral::No),
        (key, _) => CHANGING.iter().find(|(known, _)| *known == key).map(|(_, neutral)| *neutral),
    }
}

/// Why a key is refused.
fn asked(key: &str, value: &Value, known: bool, family: Family) -> String {
    let (value, name) = (shown(value), family.name());
    match (key, known) {
        ("is_causal" | "causal", true) => {
            format!("is {value}; only causal attention is supported")
        }
        ("auto_map", true) => "names code of the checkpoint's own, which is not run here".into(),
        (_, true) => format!("is {value}, which is not supported of `{name}`"),
        (_, false) => format!(
            "is {value}, and nothing is known of such a key: it may change what `{name}` \
             computes. Remove it if it does not"
        ),
    }
}
