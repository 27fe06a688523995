//! The trained weights, and the figures of independent programs.

// Each test file uses its own part of these.
#![allow(dead_code)]

use std::{collections::HashMap, path::PathBuf};

use candle_core::Device;
use flopaudit::{
    config::Projection,
    ledger::Dtype,
    model::{AdapterSource, Decoder},
    weights::{self, Checkpoint, PeftAdapter},
};
use serde_json::Value;

/// Qwen2.5-Coder-0.5B-Instruct.
pub fn checkpoint() -> Checkpoint {
    open("FLOPAUDIT_WEIGHTS", "weights/model.gguf", "")
}

/// SmolLM2-135M-Instruct.
pub fn smollm2() -> Checkpoint {
    open("FLOPAUDIT_SMOLLM2", "target/weights/smollm2/smollm2.gguf", " --smollm2")
}

fn open(variable: &str, default: &str, flag: &str) -> Checkpoint {
    let default = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(default);
    let path = std::env::var_os(variable).map_or_else(default, PathBuf::from);
    assert!(path.exists(), "{} is missing: run scripts/fetch-weights.sh{flag}", path.display());
    weights::open(path.to_str()).unwrap()
}

pub fn load(checkpoint: &Checkpoint, adapters: &AdapterSource) -> Decoder {
    let Checkpoint { config, weights, .. } = checkpoint;
    Decoder::load(config, weights, adapters, Dtype::F32, &Device::Cpu, |_| Ok(())).unwrap()
}

pub fn golden(name: &str) -> Value {
    let path = format!("{}/tests/golden/{name}", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// The adapter of golden/lora_grads.json: A = 0.01 cos(i), B = 0.01 sin(i), written as PEFT does.
pub fn golden_adapter(checkpoint: &Checkpoint) -> AdapterSource {
    let dir = tempfile::tempdir().unwrap();
    let config = &checkpoint.config;
    let mut tensors = HashMap::new();
    for layer in 0..config.num_hidden_layers {
        for projection in [Projection::QProj, Projection::VProj] {
            let (input, output) = projection.widths(config);
            let wave = |rows, columns, f: fn(f64) -> f64| {
                let values: Vec<f32> =
                    (0..rows * columns).map(|i| (0.01 * f(i as f64)) as f32).collect();
                candle_core::Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap()
            };
            let name = format!("base_model.model.model.layers.{layer}.self_attn.{projection}");
            tensors.insert(format!("{name}.lora_A.weight"), wave(4, input, f64::cos));
            tensors.insert(format!("{name}.lora_B.weight"), wave(output, 4, f64::sin));
        }
    }
    candle_core::safetensors::save(&tensors, dir.path().join("adapter_model.safetensors")).unwrap();
    let peft = r#"{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["v_proj", "q_proj"],
        "bias": "none", "task_type": "CAUSAL_LM", "lora_dropout": 0.0, "fan_in_fan_out": false}"#;
    std::fs::write(dir.path().join("adapter_config.json"), peft).unwrap();
    AdapterSource::Peft(PeftAdapter::open(dir.path(), config).unwrap())
}
