//! Every key of a `config.json` is honoured, refused by name, or listed as ignored: files shaped as
//! the public ones load, whatever asks for another model does not, and a no-op changes nothing.

use flopaudit_count::config::{Family, Ignored, Matters, ModelConfig, RopeScaling};
use proptest::prelude::*;
use serde_json::{Map, Value, json};

fn read(json: &Value) -> Result<(ModelConfig, Vec<Ignored>), String> {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("config.json");
    std::fs::write(&file, json.to_string()).unwrap();
    ModelConfig::read(&file).map_err(|e| e.to_string())
}

/// `base` with the keys of `more`, one of null taking a key away.
fn with(base: &Value, more: &Value) -> Value {
    let mut keys = base.as_object().unwrap().clone();
    keys.extend(more.as_object().unwrap().clone());
    Value::Object(keys)
}

fn plain(family: Family) -> Value {
    json!({
        "model_type": family.name(), "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 1024, "head_dim": 8,
    })
}

/// The keys of files on the hub, by the model that they are of. Values that no test needs are small.
fn public() -> Vec<(&'static str, Value)> {
    let llama = json!({
        "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "bos_token_id": 1, "eos_token_id": [1, 2], "hidden_act": "silu", "hidden_size": 64,
        "initializer_range": 0.02, "intermediate_size": 96, "max_position_embeddings": 131072,
        "mlp_bias": false, "model_type": "llama", "num_attention_heads": 4, "num_hidden_layers": 2,
        "num_key_value_heads": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-5, "rope_theta": 5e5,
        "tie_word_embeddings": true, "torch_dtype": "bfloat16", "transformers_version": "4.45.0",
        "use_cache": true, "vocab_size": 320, "head_dim": 64,
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    });
    let qwen = json!({
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 64, "initializer_range": 0.02,
        "intermediate_size": 96, "max_position_embeddings": 32768, "max_window_layers": 21,
        "model_type": "qwen2", "num_attention_heads": 4, "num_hidden_layers": 2,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "sliding_window": 32768, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
        "transformers_version": "4.43.1", "use_cache": true, "use_sliding_window": false,
        "vocab_size": 320,
    });
    let gemma = json!({
        "architectures": ["Gemma3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "attn_logit_softcapping": null, "bos_token_id": 2, "cache_implementation": "hybrid",
        "eos_token_id": [1, 106], "final_logit_softcapping": null, "head_dim": 16,
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 64, "initializer_range": 0.02,
        "intermediate_size": 96, "max_position_embeddings": 32768, "model_type": "gemma3_text",
        "num_attention_heads": 4, "num_hidden_layers": 6, "num_key_value_heads": 1,
        "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6,
        "rope_local_base_freq": 10000, "rope_scaling": null, "rope_theta": 1000000,
        "sliding_window": 512, "sliding_window_pattern": 6, "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0", "use_cache": true, "vocab_size": 320,
    });
    let kinds = [vec!["sliding_attention"; 5], vec!["full_attention"]].concat();
    let mut gemma_270m = with(
        &gemma,
        &json!({
            "_sliding_window_pattern": 6, "layer_types": kinds, "use_bidirectional_attention": false,
        }),
    );
    gemma_270m.as_object_mut().unwrap().remove("sliding_window_pattern");
    vec![
        ("Qwen2.5-0.5B-Instruct", qwen.clone()),
        ("Qwen2.5-7B", with(&qwen, &json!({"use_mrope": false, "sliding_window": 131072}))),
        ("DeepSeek-R1-Distill-Qwen", with(&qwen, &json!({"sliding_window": 4096}))),
        (
            "Qwen2.5 by Unsloth",
            with(
                &qwen,
                &json!({
                    "unsloth_fixed": true, "unsloth_version": "2025.1", "pad_token_id": 3,
                    "rope_scaling": null, "layer_types": ["full_attention", "full_attention"],
                    "_name_or_path": "x", "_attn_implementation_autoset": true,
                }),
            ),
        ),
        ("Llama-3.2-1B", llama.clone()),
        (
            "TinyLlama",
            with(
                &llama,
                &json!({"rope_scaling": null, "_name_or_path": "x",
            "num_key_value_heads": 4}),
            ),
        ),
        (
            "SmolLM2-135M-Instruct",
            with(
                &llama,
                &json!({
                    "is_llama_config": true, "rope_interleaved": false, "rope_scaling": null,
                    "pad_token_id": 2, "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
                }),
            ),
        ),
        (
            "Mistral-7B-v0.1",
            json!({
                "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
                "hidden_act": "silu", "hidden_size": 64, "initializer_range": 0.02,
                "intermediate_size": 96, "max_position_embeddings": 32768, "model_type": "mistral",
                "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2,
                "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "sliding_window": 4096,
                "tie_word_embeddings": false, "torch_dtype": "bfloat16",
                "transformers_version": "4.34.0.dev0", "use_cache": true, "vocab_size": 320,
                "attention_dropout": 0.0,
            }),
        ),
        (
            "Qwen3-0.6B",
            with(
                &qwen,
                &json!({
                    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 128,
                    "attention_bias": false, "rope_scaling": null, "sliding_window": null,
                    "max_window_layers": 28,
                }),
            ),
        ),
        ("gemma-3-1b-it", gemma),
        ("gemma-3-270m", gemma_270m),
        // What transformers 5 writes, defaults and all.
        (
            "transformers 5",
            with(
                &qwen,
                &json!({
                    "dtype": null, "chunk_size_feed_forward": 0, "id2label": {"0": "LABEL_0"},
                    "label2id": {"LABEL_0": 0}, "is_encoder_decoder": false, "output_attentions": false,
                    "output_hidden_states": false, "problem_type": null, "return_dict": true,
                    "_name_or_path": "", "rope_theta": null, "pad_token_id": null, "torch_dtype": null,
                    "layer_types": ["full_attention", "full_attention"], "max_window_layers": 28,
                    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
                }),
            ),
        ),
    ]
}

#[test]
fn files_shaped_as_the_public_ones_load() {
    for (name, json) in public() {
        let (model, ignored) = read(&json).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(model.vocab_size, 320, "{name}");
        let keys: Vec<&str> = ignored.iter().map(|entry| entry.key.as_str()).collect();
        for key in ["initializer_range", "use_cache", "eos_token_id", "transformers_version"] {
            assert!(keys.contains(&key), "{name}: {key} is not among {keys:?}");
        }
        let used = ["vocab_size", "rope_theta", "hidden_act", "architectures", "layer_types"];
        assert!(used.iter().all(|key| !keys.contains(key)), "{name}: {keys:?}");
        let mut once = keys.clone();
        once.sort_unstable();
        once.dedup();
        assert_eq!(once.len(), keys.len(), "{name}: {keys:?}");
        assert!(ignored.iter().all(|entry| entry.matters == Matters::Never), "{name}");
    }
}

/// What a file says more than the plain one of its family, and what is then said of it.
#[test]
fn a_key_that_asks_for_another_model_is_refused_by_name() {
    use Family::{Gemma3, Llama, Mistral, Qwen2, Qwen3};
    let full = ["full_attention"; 4];
    let half = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"];
    let cases = [
        (Qwen2, json!({"is_causal": false}), "`is_causal` is false; only causal"),
        (Qwen2, json!({"quantization_config": {"quant_method": "gptq"}}), "quantized (gptq)"),
        (Llama, json!({"quantization_config": {"quant_method": "fp8"}}), "quantized (fp8)"),
        (Llama, json!({"quantization_config": {}}), "quantized (of some method)"),
        (
            Qwen3,
            json!({"architectures": ["Qwen3ForSequenceClassification"]}),
            "only Qwen3ForCausalLM",
        ),
        (Qwen3, json!({"architectures": ["Qwen3Model"]}), "`architectures` names `Qwen3Model`"),
        (
            Qwen3,
            json!({"architectures": ["LlamaForCausalLM"]}),
            "names `LlamaForCausalLM`; of `qwen3`",
        ),
        (Qwen3, json!({"architectures": "Qwen3ForCausalLM"}), "not a list of strings"),
        (Qwen2, json!({"auto_map": {"AutoModel": "m.M"}}), "code of the checkpoint's own"),
        (Qwen2, json!({"attention_bias": false}), "`attention_bias` is false"),
        (Qwen2, json!({"hidden_size_multiplier": 2}), "nothing is known of such a key"),
        (Qwen2, json!({"scale_attn_weights": false}), "nothing is known of such a key"),
        (Gemma3, json!({"final_logit_softcapping": 30.0}), "`final_logit_softcapping` is 30"),
        (Gemma3, json!({"hidden_act": "silu"}), "`hidden_act` is another function"),
        (Llama, json!({"hidden_activation": "gelu_new"}), "`hidden_activation` is another"),
        (Llama, json!({"rope_scaling": []}), "`rope_scaling` is [], not an object"),
        (Llama, json!({"vocab_size": "many"}), "`vocab_size` is `many`, not a count"),
        (Llama, json!({"vocab_size": -3}), "`vocab_size` is -3, not a count"),
        (
            Llama,
            json!({"rope_scaling": {"factor": 4.0}}),
            "`rope_scaling.factor` is 4, and no `rope_type`",
        ),
        (
            Llama,
            json!({"rope_scaling": {"type": "default", "factor": 4.0}}),
            "`default` stretches nothing",
        ),
        (
            Llama,
            json!({"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2}}),
            "`rope_type` is `yarn`",
        ),
        (
            Llama,
            json!({"rope_scaling": {"type": "linear", "factor": 2, "beta_fast": 3}}),
            "`linear` reads no such key",
        ),
        (
            Llama,
            json!({"rope_scaling": {"type": "linear", "factor": 0.5}}),
            "`rope_scaling.factor` is 0.5; it must be 1",
        ),
        (
            Llama,
            json!({"rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": 1, "beta_slow": 2}}),
            "must be below `beta_fast`",
        ),
        (
            Llama,
            json!({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}),
            "`rope_theta` is 10000, and `rope_parameters.rope_theta` is 1000000",
        ),
        (
            Llama,
            json!({"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}}),
            "partial_rotary_factor` is 0.5",
        ),
        (
            Llama,
            json!({"rope_parameters": {"rope_type": "linear", "factor": 2}, "rope_scaling": {"type": "linear", "factor": 4}}),
            "not the same",
        ),
        (
            Gemma3,
            json!({"rope_local_base_freq": 1e4, "rope_parameters": {"sliding_attention": {"rope_theta": 2e4}}}),
            "`rope_local_base_freq` is 10000, and",
        ),
        (
            Gemma3,
            json!({"rope_parameters": {"full_attention": {}, "rope_theta": 1e6}}),
            "`rope_parameters.rope_theta` must stand under",
        ),
        (
            Qwen2,
            json!({"rope_parameters": {"sliding_attention": {"rope_theta": 1e6}}}),
            "full_attention` is missing",
        ),
        (
            Gemma3,
            json!({"sliding_window_pattern": 2, "layer_types": full}),
            "`layer_types` says otherwise than `sliding_window_pattern`",
        ),
        (
            Qwen2,
            json!({"use_sliding_window": false, "layer_types": half}),
            "`sliding_window` is off",
        ),
        (
            Qwen2,
            json!({"use_sliding_window": true, "sliding_window": 7, "max_window_layers": 1, "layer_types": half}),
            "than `max_window_layers`",
        ),
        (
            Mistral,
            json!({"sliding_window": 7, "use_sliding_window": false}),
            "`use_sliding_window` says otherwise",
        ),
        (Llama, json!({"use_sliding_window": true}), "`llama` has no windows"),
        (Qwen3, json!({"layer_types": vec!["linear_attention"; 4]}), "names `linear_attention`"),
        (Qwen3, json!({"model_type": null}), "`model_type` is missing"),
        // Null is a value that nobody names, and no silence.
        (Qwen2, json!({"is_causal": null}), "`is_causal` is null"),
        (Qwen2, json!({"rope_theta": null}), "`rope_theta` is null"),
        (
            Qwen3,
            json!({"rope_parameters": {"rope_theta": null}}),
            "rope_parameters.rope_theta` is null",
        ),
        (Gemma3, json!({"rope_local_base_freq": null}), "`rope_local_base_freq` is null"),
        (Gemma3, json!({"query_pre_attn_scalar": null}), "`query_pre_attn_scalar` is null"),
        (Mistral, json!({"rms_norm_eps": null}), "`rms_norm_eps` is null"),
        (Llama, json!({"hidden_act": null}), "`hidden_act` is null"),
        (Gemma3, json!({"tie_word_embeddings": null}), "`tie_word_embeddings` is null"),
        (Llama, json!({"sliding_window": 1023}), "`llama` has no windows"),
        (Gemma3, json!({"_sliding_window_pattern": 3}), "`_sliding_window_pattern` is 3, and"),
    ];
    for (family, more, says) in cases {
        let error = read(&with(&plain(family), &more)).unwrap_err();
        assert!(error.contains(says), "{more}: `{says}` is not in: {error}");
        assert!(error.contains("config.json: `") && !error.contains('\n'), "{error}");
    }
}

#[test]
fn a_family_is_known_by_its_class_too() {
    let named = with(&plain(Family::Qwen3), &json!({"architectures": ["Qwen3ForCausalLM"]}));
    let mut silent = named.clone();
    silent.as_object_mut().unwrap().remove("model_type");
    assert_eq!(read(&silent).unwrap().0, read(&named).unwrap().0);
}

#[test]
fn positions_by_kind_of_layer_are_honoured_where_there_is_one_kind() {
    let yarn = json!({"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0});
    let flat = with(&plain(Family::Qwen2), &json!({"rope_parameters": yarn}));
    let nested = json!({"rope_parameters": {"full_attention": yarn}});
    let nested = read(&with(&plain(Family::Qwen2), &nested)).unwrap().0;
    assert_eq!(nested, read(&flat).unwrap().0);
    assert_eq!(nested.rope.theta, 1e6);
    assert!(matches!(nested.rope.scaling, RopeScaling::Yarn { factor: 4.0, .. }));
}

#[test]
fn what_asks_for_nothing_is_listed() {
    for (family, more, key) in [
        (Family::Llama, json!({"rope_interleaved": false}), "rope_interleaved"),
        (Family::Qwen2, json!({"use_mrope": false}), "use_mrope"),
        (Family::Qwen2, json!({"num_experts": 0}), "num_experts"),
        (Family::Qwen2, json!({"final_logit_softcapping": null}), "final_logit_softcapping"),
        (Family::Llama, json!({"sliding_window": 4096}), "sliding_window"),
        (
            Family::Qwen2,
            json!({"use_sliding_window": true, "sliding_window": 7, "max_window_layers": 4}),
            "sliding_window",
        ),
    ] {
        let ignored = read(&with(&plain(family), &more)).unwrap().1;
        assert!(ignored.iter().any(|entry| entry.key == key), "{more}: {ignored:?}");
    }
}

#[test]
fn dropout_matters_in_training_alone() {
    let found = |share: f64| {
        let more = json!({"attention_dropout": share});
        let ignored = read(&with(&plain(Family::Qwen2), &more)).unwrap().1;
        ignored.into_iter().find(|entry| entry.key == "attention_dropout").unwrap().matters
    };
    assert_eq!(found(0.0), Matters::Never);
    assert_eq!(found(0.1), Matters::InTraining);
}

/// Ways to ask for nothing.
fn no_ops(family: Family) -> Vec<Value> {
    let mut all = vec![
        json!({"is_causal": true}),
        json!({"rope_scaling": null}),
        json!({"rope_scaling": {}}),
        json!({"rope_parameters": null}),
        json!({"rope_scaling": {"type": "linear", "factor": 1}}),
        json!({"rope_scaling": {"rope_type": "default", "type": "default"}}),
        json!({"rope_scaling": {"factor": 1.0, "original_max_position_embeddings": 9}}),
        json!({"rope_scaling": {"rope_type": "yarn", "factor": 1.0}}),
        json!({"rope_scaling": {"rope_type": "llama3", "factor": 1.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0}}),
        json!({"partial_rotary_factor": 1.0}),
        json!({"num_experts": 0}),
        json!({"logit_scale": 1}),
        json!({"mlp_bias": false}),
        json!({"final_logit_softcapping": null}),
        json!({"quantization_config": null}),
        json!({"architectures": null}),
        json!({"architectures": []}),
        json!({"something_new": null}),
        json!({"auto_map": {}}),
        json!({"use_cache": false}),
        json!({"temperature": 0.7}),
    ];
    all.extend(match family {
        Family::Qwen2 => vec![
            json!({"attention_bias": true}),
            json!({"use_sliding_window": true, "sliding_window": 1024, "max_window_layers": 0}),
            json!({"use_sliding_window": true, "sliding_window": 7, "max_window_layers": 4}),
            json!({"use_sliding_window": false, "sliding_window": 7, "max_window_layers": 0}),
            json!({"layer_types": vec!["full_attention"; 4]}),
        ],
        Family::Qwen3 => vec![
            json!({"attention_bias": false}),
            json!({"use_sliding_window": true, "sliding_window": 5000, "max_window_layers": 0}),
        ],
        Family::Llama => vec![
            json!({"sliding_window": null}),
            json!({"attention_bias": false}),
            json!({"use_sliding_window": false, "max_window_layers": 3}),
            json!({"use_sliding_window": false, "sliding_window": 7}),
            json!({"use_sliding_window": true, "sliding_window": 1024}),
            json!({"sliding_window": 4096}),
        ],
        // The plain file is silent, and the family's own window is wider than its context.
        Family::Mistral => vec![
            json!({"sliding_window": null}),
            json!({"sliding_window": 1024}),
            json!({"sliding_window": 4096, "use_sliding_window": false}),
            json!({"sliding_window": 4096, "layer_types": vec!["full_attention"; 4]}),
        ],
        Family::Gemma3 => vec![
            json!({"sliding_window_pattern": 6}),
            json!({"_sliding_window_pattern": 6}),
            json!({"rope_local_base_freq": 10000}),
            json!({"rope_parameters": {"full_attention": {"rope_type": "default"},
                "sliding_attention": {"rope_theta": 10000}}}),
        ],
    });
    all
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn no_ops_change_nothing(
        family in prop::sample::select(Family::ALL.to_vec()),
        picks in prop::collection::vec(any::<prop::sample::Index>(), 1..6),
    ) {
        let ways = no_ops(family);
        let mut more = Map::new();
        for pick in picks {
            // No key twice, and windows and positions said in one way each.
            let keys = pick.get(&ways).as_object().unwrap().clone();
            let topic = |key: &str| {
                [&["window", "layer_types"][..], &["rope_"], &["archi"]]
                    .into_iter()
                    .position(|words| words.iter().any(|word| key.contains(word)))
            };
            let taken = |key: &String| more.contains_key(key)
                || topic(key).is_some_and(|t| more.keys().any(|k: &String| topic(k) == Some(t)));
            if !keys.keys().any(taken) {
                more.extend(keys);
            }
        }
        let plain = plain(family);
        let plainly = read(&plain).unwrap().0;
        prop_assert_eq!(read(&with(&plain, &Value::Object(more))).unwrap().0, plainly);
    }

    /// Whatever JSON stands under a key: a model or one line, never a panic.
    #[test]
    fn no_value_of_a_key_panics(
        key in prop::sample::select(vec!["rope_scaling", "rope_parameters", "layer_types",
            "sliding_window", "sliding_window_pattern", "architectures", "num_hidden_layers",
            "quantization_config", "head_dim", "max_window_layers", "rope_theta"]),
        value in prop::sample::select(vec![json!(null), json!([]), json!({}), json!(0), json!(-1),
            json!(1e308), json!("x"), json!(true), json!({"full_attention": []}),
            json!({"full_attention": {}}), json!({"rope_type": 3}), json!([null]), json!(u64::MAX)]),
        family in prop::sample::select(Family::ALL.to_vec()),
    ) {
        if let Err(error) = read(&with(&plain(family), &json!({key: value}))) {
            prop_assert!(error.contains(key) && !error.contains('\n'), "{}", error);
        }
    }
}
