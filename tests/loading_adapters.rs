//! Adapters as people have them: each loads with the loss that PEFT gives it, or is refused in one
//! line that names the key or tensor at fault.
//!
//! The losses are PEFT 0.21.2's on `base`, in float32, over the 59 tokens of `data.txt`. The factors
//! are those of `ad_rankpat`: rank 4 and alpha 8 on q and v of three layers.

#[path = "program/mod.rs"]
mod program;

use std::{collections::HashMap, fs, path::Path};

use candle_core::{Device, Tensor, safetensors};
use program::*;
use serde_json::{Value, json};

const CASES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/cases/loading");
const PREFIX: &str = "base_model.model.model.";

type Tensors = HashMap<String, Tensor>;

/// What becomes of an adapter.
enum Answer {
    /// This loss, and these keys listed as without effect.
    Loss(f64, &'static [&'static str]),
    /// Refused, with these words.
    Refused(&'static [&'static str]),
}
use Answer::{Loss, Refused};

/// The loss of the adapter as it is; without any, 17.026878.
const PLAIN: Answer = Loss(15.980059, &[]);

fn factors() -> Tensors {
    let file = format!("{CASES}/ad_rankpat/adapter_model.safetensors");
    safetensors::load(file, &Device::Cpu).unwrap()
}

/// The factors under other names; those that get none are left out.
fn renamed(name: impl Fn(&str) -> Option<String>) -> Tensors {
    factors().into_iter().filter_map(|(old, tensor)| Some((name(&old)?, tensor))).collect()
}

/// Those of these layers.
fn of_layers(layers: &[usize]) -> Tensors {
    let held = |name: &str| layers.iter().any(|l| name.contains(&format!("layers.{l}.")));
    renamed(|name| held(name).then(|| name.into()))
}

/// q's of rank 2: the first two rows of A, columns of B.
fn narrower() -> Tensors {
    let narrow = |(name, tensor): (String, Tensor)| {
        let axis = usize::from(name.contains("lora_B"));
        let tensor = match name.contains("q_proj") {
            true => tensor.narrow(axis, 0, 2).unwrap().contiguous().unwrap(),
            false => tensor,
        };
        (name, tensor)
    };
    factors().into_iter().map(narrow).collect()
}

fn with(mut tensors: Tensors, name: &str) -> Tensors {
    tensors.insert(name.into(), Tensor::zeros(4, candle_core::DType::F32, &Device::Cpu).unwrap());
    tensors
}

/// (what is changed in adapter_config.json, the tensors, what becomes of it)
fn cases() -> Vec<(Value, Tensors, Answer)> {
    let plain = |change, answer| (change, factors(), answer);
    let other = |tensors, answer| (json!({}), tensors, answer);
    vec![
        plain(json!({}), PLAIN),
        // Scales.
        plain(json!({"use_rslora": true}), Loss(16.746434, &[])),
        plain(json!({"alpha_pattern": {"v_proj": 40}}), Loss(16.686642, &[])),
        plain(
            json!({"alpha_pattern": {r"layers\.(0|2)\.self_attn.q_proj": 1, "q_proj": 3}}),
            Loss(16.145230, &[]),
        ),
        plain(json!({"alpha_pattern": {"k_proj": 3}}), Loss(15.980059, &["alpha_pattern.k_proj"])),
        // Ranks.
        (json!({"rank_pattern": {"q_proj": 2}}), narrower(), Loss(17.153230, &[])),
        (json!({}), narrower(), Refused(&["q_proj.lora_A", "[2, 32]", "[4, 32]"])),
        plain(json!({"rank_pattern": {"q_proj": 0}}), Refused(&["`rank_pattern.q_proj`"])),
        plain(
            json!({"rank_pattern": {"q_proj": 33}}),
            Refused(&["`rank_pattern`", "33 is above 32"]),
        ),
        plain(json!({"rank_pattern": {"(": 2}}), Refused(&["`rank_pattern`", "`(` is no pattern"])),
        plain(json!({"rank_pattern": 3}), Refused(&["`rank_pattern`"])),
        // Layers.
        (json!({"layers_to_transform": [1, 2]}), of_layers(&[1, 2]), Loss(15.277906, &[])),
        (
            json!({"layers_to_transform": 1, "layers_pattern": "layers"}),
            of_layers(&[1]),
            Loss(15.565614, &[]),
        ),
        (
            json!({"target_modules": r".*layers\.[12]\..*(q|v)_proj"}),
            of_layers(&[1, 2]),
            Loss(15.277906, &[]),
        ),
        (
            json!({"target_modules": ["1.self_attn.q_proj", "layers.1.self_attn.v_proj"]}),
            of_layers(&[1]),
            Loss(15.565614, &[]),
        ),
        (
            json!({"layers_to_transform": [1]}),
            factors(),
            Refused(&["layers.0.self_attn.q_proj.lora_A", "belongs to no projection"]),
        ),
        other(of_layers(&[1, 2]), Refused(&["layers.0.self_attn.q_proj.lora_A", "is missing"])),
        plain(
            json!({"layers_to_transform": [0, 1, 2, 9]}),
            Loss(15.980059, &["layers_to_transform.9"]),
        ),
        plain(
            json!({"layers_to_transform": [0], "target_modules": "all-linear"}),
            Refused(&["`layers_to_transform`"]),
        ),
        plain(json!({"layers_pattern": "layers"}), Refused(&["`layers_pattern`"])),
        (
            json!({"layers_to_transform": [1], "layers_pattern": "h"}),
            of_layers(&[1]),
            Refused(&["`target_modules` takes in no"]),
        ),
        // Targets.
        plain(json!({"target_modules": r".*\.(q|v)_proj"}), PLAIN),
        plain(
            json!({"target_modules": ["q_proj", "v_proj", "k_proj"], "exclude_modules": ["k_proj"]}),
            PLAIN,
        ),
        plain(
            json!({"target_modules": ["q_proj", "v_proj", "c_attn"]}),
            Loss(15.980059, &["target_modules.c_attn"]),
        ),
        plain(json!({"target_modules": "q_proj"}), Refused(&["`target_modules` takes in no"])),
        plain(json!({"target_modules": "all-linear"}), Refused(&["k_proj.lora_A", "is missing"])),
        plain(json!({"target_modules": ["q_proj", "v_proj", "lm_head"]}), Refused(&["`lm_head`"])),
        plain(json!({"target_modules": ".*"}), Refused(&["`target_modules`", "no projection"])),
        plain(json!({"target_modules": null}), Refused(&["`target_modules` is missing"])),
        // Names of tensors.
        other(renamed(|n| Some(n.replace(".weight", ".default.weight"))), PLAIN),
        other(renamed(|n| n.strip_prefix(PREFIX).map(Into::into)), PLAIN),
        other(renamed(|n| n.strip_prefix("base_model.model.").map(Into::into)), PLAIN),
        other(
            renamed(|n| Some(n.replace(".weight", ".other.weight"))),
            Refused(&["other.weight", "neither A nor B"]),
        ),
        other(
            with(factors(), "model.layers.0.self_attn.q_proj.lora_A.weight"),
            Refused(&["model.layers.0.self_attn.q_proj.lora_A.weight", "is the same factor as"]),
        ),
        other(
            with(factors(), &format!("{PREFIX}layers.0.self_attn.q_proj.lora_magnitude_vector")),
            Refused(&["lora_magnitude_vector", "neither A nor B"]),
        ),
        // How the factors began.
        plain(json!({"init_lora_weights": "gaussian"}), Loss(15.980059, &["init_lora_weights"])),
        plain(
            json!({"init_lora_weights": "eva", "eva_config": {"rho": 2.0}}),
            Loss(15.980059, &["eva_config", "init_lora_weights"]),
        ),
        plain(
            json!({"init_lora_weights": "pissa_niter_4"}),
            Refused(&["`init_lora_weights`", "pissa_niter_4"]),
        ),
        plain(json!({"init_lora_weights": "olora"}), Refused(&["`init_lora_weights`"])),
        plain(json!({"init_lora_weights": "corda"}), Refused(&["`init_lora_weights`"])),
        plain(json!({"init_lora_weights": "loftq"}), Refused(&["`init_lora_weights`"])),
        plain(json!({"init_lora_weights": "new_one"}), Refused(&["`init_lora_weights`"])),
        // Other methods, and what is unknown.
        plain(json!({"use_dora": true}), Refused(&["`use_dora`"])),
        plain(json!({"bias": "all"}), Refused(&["`bias`"])),
        plain(json!({"lora_bias": true}), Refused(&["`lora_bias`"])),
        plain(json!({"modules_to_save": ["lm_head"]}), Refused(&["`modules_to_save`"])),
        plain(json!({"layer_replication": [[0, 2], [1, 3]]}), Refused(&["`layer_replication`"])),
        plain(json!({"trainable_token_indices": [1]}), Refused(&["`trainable_token_indices`"])),
        plain(json!({"target_parameters": ["x"]}), Refused(&["`target_parameters`"])),
        plain(json!({"alora_invocation_tokens": [5]}), Refused(&["`alora_invocation_tokens`"])),
        plain(json!({"megatron_config": {"a": 1}}), Refused(&["`megatron_config`"])),
        plain(json!({"peft_type": "VERA"}), Refused(&["`peft_type`"])),
        plain(json!({"task_type": "SEQ_CLS"}), Refused(&["`task_type`"])),
        plain(json!({"use_something": true}), Refused(&["`use_something`"])),
        plain(
            json!({"use_something": null, "more": {}}),
            Loss(15.980059, &["more", "use_something"]),
        ),
        plain(
            json!({"base_model_name_or_path": "somewhere", "lora_dropout": 0.1}),
            Loss(15.980059, &["base_model_name_or_path", "lora_dropout"]),
        ),
    ]
}

/// Options of PEFT's kind, changed.
fn write(dir: &Path, change: &Value, tensors: &Tensors) {
    let mut options = json!({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "bias": "none",
        "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0,
    });
    options.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
    fs::create_dir(dir).unwrap();
    fs::write(dir.join("adapter_config.json"), options.to_string()).unwrap();
    safetensors::save(tensors, dir.join("adapter_model.safetensors")).unwrap();
}

#[test]
fn adapters_load_with_pefts_loss_or_are_refused() {
    let dir = tmp();
    for (i, (change, tensors, answer)) in cases().into_iter().enumerate() {
        let adapter = dir.path().join(format!("adapter{i}"));
        write(&adapter, &change, &tensors);
        let line = format!(
            "eval --model {CASES}/base --adapter adapter{i} --data {CASES}/data.txt --seq 512 --json"
        );
        match answer {
            Refused(parts) => refused(dir.path(), &line, parts),
            Loss(expected, listed) => {
                let out = flopaudit(dir.path(), &line).output().unwrap();
                let message = String::from_utf8(out.stderr).unwrap();
                assert!(out.status.success(), "{change}: {message}");
                let report: Value = serde_json::from_slice(&out.stdout).unwrap();
                let loss = report["evaluation"]["loss"].as_f64().unwrap();
                assert!((loss - expected).abs() < 2e-5, "{change}: {loss}");
                let ignored = report["ignored"].as_array().unwrap();
                let of_adapter = |one: &&Value| one["file"].as_str().unwrap().contains("adapter");
                let listed_keys = ignored.iter().filter(of_adapter);
                let keys: Vec<_> = listed_keys.map(|one| one["key"].as_str().unwrap()).collect();
                assert_eq!(keys, listed, "{change}");
            }
        }
    }
}
