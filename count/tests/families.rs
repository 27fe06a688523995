//! Each family as PyTorch and transformers have it: what its `FlopCounterMode` saw of the tiny
//! models in tests/golden/families, and `config.json` files in every layout.

mod random;

use std::path::PathBuf;

use flopaudit_count::{
    analytic::{Structure, closed_form, count, predict},
    config::{Activation, Family, LoraConfig, ModelConfig, Projection, RopeScaling},
    ledger::Dtype,
    prices::Prices,
    workload::{Logits, Rows, Sampling, Task, Workload},
};
use proptest::prelude::*;
use serde_json::{Value, json};

/// Folders of a tiny model each.
fn golden() -> Vec<PathBuf> {
    let all = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/families"));
    let entries = std::fs::read_dir(all).unwrap().map(|entry| entry.unwrap().path());
    entries.filter(|path| path.join("config.json").exists()).collect()
}

/// What three countings say, which must be one.
fn flops(model: &ModelConfig, lora: &LoraConfig, task: Task) -> u128 {
    let (model, lora) = (model.clone(), lora.clone());
    let workload = Workload { model, lora, dtype: Dtype::F32, attention: Default::default(), task };
    let matmul = Prices::matmul();
    let torch = count(Structure::Torch, &workload).unwrap().sum(|_, _| true).unwrap();
    let closed = closed_form(&workload).unwrap().sum(|_, _| true).unwrap();
    let listed = predict(&workload).unwrap().cost().unwrap();
    let [torch, closed, listed] = [torch, closed, listed].map(|c| matmul.flops(&c).unwrap());
    assert_eq!([torch, closed], [listed; 2]);
    torch
}

#[test]
fn torch_saw_as_much_of_each_family() {
    let folders = golden();
    assert_eq!(folders.len(), 10);
    for folder in folders {
        let name = folder.display();
        let model = ModelConfig::from_file(&folder.join("config.json")).unwrap();
        let text = std::fs::read_to_string(folder.join("expected.json")).unwrap();
        let expected: Value = serde_json::from_str(&text).unwrap();
        let seen = &expected["flops"];
        let total = |case: &str| u128::from(seen[case]["total"].as_u64().unwrap());
        let none = LoraConfig::none();
        let (batch, seq) = (2, 12);

        let forward = Task::Forward { batch, seq, past: 0, logits: Logits::All, sequences: None };
        assert_eq!(flops(&model, &none, forward), total("forward"), "{name}");

        let step = |seq, past| {
            flops(
                &model,
                &none,
                Task::Forward { batch, seq, past, logits: Logits::Last, sequences: None },
            )
        };
        let decode = &seen["decode"];
        let mut all = u128::from(decode["prefill"].as_u64().unwrap());
        assert_eq!(step(9, 0), all, "{name}");
        for (i, one) in decode["steps"].as_array().unwrap().iter().enumerate() {
            let one = u128::from(one.as_u64().unwrap());
            assert_eq!(step(1, 9 + i as u64), one, "{name} step {i}");
            all += one;
        }
        let generate = Task::Generate {
            batch,
            prompt_tokens: 9,
            new_tokens: 9,
            max_new_tokens: 9,
            kv_cache: true,
            sampling: Sampling::GREEDY,
            past: 0,
            prompts: None,
            then: vec![],
            prefill_chunk: None,
        };
        assert_eq!(flops(&model, &none, generate), all, "{name}");

        let train = |full| Task::Train {
            batch,
            seq,
            accumulate: 1,
            steps: 1,
            full,
            recompute: false,
            clip: false,
            moments: Default::default(),
            rows: Rows::Whole,
        };
        assert_eq!(flops(&model, &none, train(true)), total("train_full"), "{name}");
        let lora = adapters(&model, &expected);
        assert_eq!(flops(&model, &lora, train(false)), total("train_lora"), "{name}");
    }
}

/// The adapters that a golden model was counted with.
fn adapters(model: &ModelConfig, expected: &Value) -> LoraConfig {
    let targets = expected["lora"]["targets"].as_array().unwrap().iter();
    let targets: Vec<Projection> =
        targets.map(|target| serde_json::from_value(target.clone()).unwrap()).collect();
    LoraConfig::new(model, 3, 6.0, &targets).unwrap()
}

#[test]
fn torch_saw_checkpointed_layers_and_fused_attention() {
    let golden_of = |path: PathBuf| -> Value {
        serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
    };
    let root = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden"));
    let seen = golden_of(root.join("torch_structures.json"));
    for folder in golden() {
        let model = ModelConfig::from_file(&folder.join("config.json")).unwrap();
        let adapted = adapters(&model, &golden_of(folder.join("expected.json")));
        let seen = &seen["models"][folder.file_name().unwrap().to_str().unwrap()];
        for (trained, lora) in [("full", LoraConfig::none()), ("lora", adapted)] {
            for (kept, recompute) in [("kept", false), ("recompute", true)] {
                let (batch, seq, accumulate, steps, clip) = (2, 12, 1, 1, false);
                let full = trained == "full";
                let task = Task::Train {
                    batch,
                    seq,
                    accumulate,
                    steps,
                    full,
                    recompute,
                    clip,
                    moments: Default::default(),
                    rows: Rows::Whole,
                };
                let (model, lora, dtype) = (model.clone(), lora.clone(), Dtype::F32);
                let workload = Workload { model, lora, dtype, attention: Default::default(), task };
                for structure in [Structure::Torch, Structure::TorchSdpa, Structure::TorchSdpaCpu] {
                    let cost = count(structure, &workload).unwrap().sum(|_, _| true).unwrap();
                    let flops = Prices::matmul().flops(&cost).unwrap();
                    let attention = structure.name().strip_prefix("torch:").unwrap();
                    let expected = seen[trained][kept][attention].as_u64().unwrap();
                    let name = folder.display();
                    assert_eq!(flops, expected.into(), "{name} {trained} {kept} {structure}");
                }
            }
        }
    }
}

fn read(json: &Value) -> Result<ModelConfig, String> {
    ModelConfig::from_json(&json.to_string(), "config.json").map_err(|e| e.to_string())
}

/// As little of a config as its family needs, and more of it.
fn with(family: Family, more: Value) -> Value {
    let mut json = json!({
        "model_type": family.name(), "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
    });
    let more = more.as_object().unwrap().clone();
    json.as_object_mut().unwrap().extend(more);
    json
}

#[test]
fn what_a_file_leaves_out_is_its_familys() {
    for family in Family::ALL {
        let config = read(&with(family, json!({}))).unwrap();
        let gemma = family == Family::Gemma3;
        assert_eq!(config.family, family);
        assert_eq!(config.tie_word_embeddings, gemma);
        assert_eq!(config.rms_norm_eps, 1e-6);
        assert_eq!(config.rope.theta, if gemma { 1e6 } else { 1e4 });
        assert_eq!(config.local_rope.map(|rope| rope.theta), gemma.then_some(1e4));
        assert_eq!(config.bias.qkv, family == Family::Qwen2);
        assert!(!config.bias.o && !config.bias.mlp);
        let (d, windows) = match family {
            Family::Qwen2 | Family::Llama => (8, None),
            // The window is as long as it is by default, and the context is shorter.
            Family::Mistral => (8, None),
            Family::Qwen3 => (128, None),
            Family::Gemma3 => (256, Some((4096, vec![true; 4]))),
        };
        assert_eq!(config.head_dim(), d);
        assert_eq!(config.window.map(|w| (w.width, w.layers)), windows);
    }
}

#[test]
fn windows_are_said_in_five_ways() {
    let windows = |family, more| read(&with(family, more)).unwrap().window.map(|w| w.layers);
    let (yes, no) = (true, false);
    for family in [Family::Qwen2, Family::Qwen3] {
        let more = json!({"use_sliding_window": true, "sliding_window": 7, "max_window_layers": 3});
        assert_eq!(windows(family, more), Some(vec![no, no, no, yes]));
        let off = json!({"use_sliding_window": false, "sliding_window": 7, "max_window_layers": 0});
        assert_eq!(windows(family, off), None);
        // None of four layers is the 28th.
        assert_eq!(windows(family, json!({"use_sliding_window": true})), None);
    }
    assert_eq!(windows(Family::Mistral, json!({"sliding_window": null})), None);
    let every_third = json!({"sliding_window": 7, "sliding_window_pattern": 3});
    assert_eq!(windows(Family::Gemma3, every_third), Some(vec![yes, yes, no, yes]));
    let (full, sliding) = ("full_attention", "sliding_attention");
    let listed = json!({"layer_types": [full, sliding, full, full], "sliding_window": 7});
    assert_eq!(windows(Family::Gemma3, listed.clone()), Some(vec![no, yes, no, no]));
    let error = read(&with(Family::Llama, listed.clone())).unwrap_err();
    assert!(error.contains("`sliding_window` is 7"), "{error}");
    let error = read(&with(Family::Mistral, listed.clone())).unwrap_err();
    assert!(error.contains("`layer_types` says otherwise"), "{error}");
    let error = read(&with(Family::Qwen2, listed)).unwrap_err();
    assert!(error.contains("`sliding_window` is off"), "{error}");
    let short = json!({"layer_types": [full], "sliding_window": 7});
    let error = read(&with(Family::Gemma3, short)).unwrap_err();
    assert!(error.contains("`layer_types` names 1 layers of 4"), "{error}");
}

#[test]
fn positions_are_read_in_both_layouts() {
    let rope = |family, more| read(&with(family, more)).unwrap().rope;
    let old = json!({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}});
    let new = json!({"rope_parameters":
        {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}});
    assert_eq!(rope(Family::Llama, old.clone()), rope(Family::Llama, new));
    let linear = rope(Family::Llama, old);
    assert_eq!((linear.theta, linear.scaling), (5e5, RopeScaling::Linear { factor: 2.0 }));

    let yarn = |more: Value| {
        let mut keys = json!({"rope_type": "yarn", "factor": 4.0});
        keys.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        match rope(Family::Qwen2, json!({"rope_scaling": keys})).scaling {
            RopeScaling::Yarn {
                beta_fast,
                beta_slow,
                original_max_position_embeddings: original,
                attention_factor,
                truncate,
                ..
            } => (beta_fast, beta_slow, original, attention_factor, truncate),
            other => panic!("{other:?}"),
        }
    };
    let of = |scale: f64| 0.1 * scale * 4f64.ln() + 1.0;
    assert_eq!(yarn(json!({})), (32.0, 1.0, 1024, of(1.0), true));
    let mscale = json!({"mscale": 2.0, "mscale_all_dim": 0.5, "truncate": false, "beta_fast": 0,
        "original_max_position_embeddings": 256});
    assert_eq!(yarn(mscale), (32.0, 1.0, 256, of(2.0) / of(0.5), false));
    assert_eq!(yarn(json!({"attention_factor": 1.5})).3, 1.5);

    let gemma = |more| read(&with(Family::Gemma3, more)).unwrap();
    let old = gemma(json!({"rope_theta": 2e6, "rope_local_base_freq": 500.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0}}));
    let new = gemma(json!({"rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 500.0}}}));
    assert_eq!(old, new);
    assert_eq!(old.ropes().len(), 2);
    // One base for both kinds of layers is one table.
    assert_eq!(gemma(json!({"rope_theta": 1e4})).ropes().len(), 1);
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    let refused = |family, more, names: &[&str]| {
        let error = read(&with(family, more)).unwrap_err();
        assert!(names.iter().all(|name| error.contains(name)), "{error}");
    };
    for family in Family::ALL {
        refused(family, json!({"partial_rotary_factor": 0.5}), &["`partial_rotary_factor` is 0.5"]);
        refused(family, json!({"final_logit_softcapping": 30}), &["`final_logit_softcapping`"]);
        refused(family, json!({"use_bidirectional_attention": true}), &["bidirectional"]);
        refused(family, json!({"attention_multiplier": 0.1}), &["`attention_multiplier`"]);
        refused(family, json!({"num_experts": 8}), &["`num_experts` is 8"]);
        refused(family, json!({"is_causal": false}), &["`is_causal`"]);
        refused(
            family,
            json!({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
            &["rope_scaling.rope_type` is `dynamic`", "llama3"],
        );
        refused(family, json!({"rope_scaling": {"type": "linear"}}), &["factor` is missing"]);
        // Nothing asked for.
        let nothing = json!({"partial_rotary_factor": 1.0, "attn_logit_softcapping": null,
            "use_bidirectional_attention": false, "num_experts": 0, "logits_scaling": 1});
        assert_eq!(read(&with(family, nothing)), read(&with(family, json!({}))));
    }
    refused(Family::Llama, json!({"hidden_act": "gelu"}), &["`hidden_act` is `gelu`"]);
    refused(Family::Gemma3, json!({"hidden_activation": "relu"}), &["`hidden_activation`"]);
    refused(Family::Mistral, json!({"attention_bias": true}), &["`attention_bias`", "mistral"]);
    refused(Family::Qwen3, json!({"mlp_bias": true}), &["`mlp_bias`", "qwen3"]);
    refused(Family::Qwen2, json!({"query_pre_attn_scalar": 9}), &["`query_pre_attn_scalar`"]);
    refused(Family::Gemma3, json!({"sliding_window_pattern": 0}), &["pattern` is 0"]);
    refused(Family::Qwen3, json!({"num_key_value_heads": "two"}), &["`num_key_value_heads`"]);
    refused(Family::Llama, json!({"model_type": "phi3"}), &["`phi3`", "qwen2, llama, mistral"]);
    refused(Family::Llama, json!({"model_type": "gemma3"}), &["images", "text_config"]);
    refused(Family::Llama, json!({"num_hidden_layers": u64::MAX}), &["`num_hidden_layers`"]);
    refused(Family::Llama, json!({"model_type": null}), &["`model_type` is missing"]);
    // Keys and values are heads of their own where a file does not say how many.
    let mut silent = with(Family::Qwen2, json!({}));
    for value in [Some(Value::Null), None] {
        let keys = silent.as_object_mut().unwrap();
        match value {
            Some(null) => keys.insert("num_key_value_heads".into(), null),
            None => keys.remove("num_key_value_heads"),
        };
        assert_eq!(read(&silent).unwrap().num_key_value_heads, 4);
    }
}

#[test]
fn documents_of_before_read_as_they_did() {
    let before = json!({"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": null, "max_position_embeddings": 32768, "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": true, "use_sliding_window": false,
        "hidden_act": "silu"});
    let model: ModelConfig = serde_json::from_value(before).unwrap();
    assert_eq!(model, ModelConfig::preset("tiny").unwrap());
}

#[test]
fn a_config_that_its_family_cannot_say_is_an_error() {
    let odd = ModelConfig { qk_norm: true, ..ModelConfig::preset("tiny").unwrap() };
    let error = odd.to_hub().unwrap_err().to_string();
    assert!(error.contains("qwen2: has no keys"), "{error}");
    assert!(serde_json::to_string(&odd).is_err());
}

#[test]
fn presets_and_golden_models_are_read_again_alike() {
    let presets = ModelConfig::preset_names().map(|name| ModelConfig::preset(name).unwrap());
    let golden = golden().into_iter().map(|f| ModelConfig::from_file(&f.join("config.json")));
    for model in presets.chain(golden.map(Result::unwrap)) {
        let written = model.to_hub().unwrap();
        assert_eq!(read(&written).unwrap(), model);
        let document = serde_json::to_string(&model).unwrap();
        assert_eq!(serde_json::from_str::<ModelConfig>(&document).unwrap(), model);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1024, ..ProptestConfig::default() })]

    #[test]
    fn whatever_a_family_can_say_is_read_again_alike(model in random::of_families(random::LARGE)) {
        let stored = ModelConfig { head_stored_apart: false, ..model.clone() };
        prop_assert_eq!(read(&model.to_hub().unwrap()).unwrap(), stored);
        let document = serde_json::to_string(&model).unwrap();
        prop_assert_eq!(&serde_json::from_str::<ModelConfig>(&document).unwrap(), &model);
        let gelu = model.activation == Activation::GeluTanh;
        prop_assert_eq!(gelu, model.to_hub().unwrap().to_string().contains("gelu_pytorch_tanh"));
    }
}
