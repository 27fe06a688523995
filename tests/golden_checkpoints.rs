//! The checkpoints of golden/families, which transformers and llama.cpp's converter wrote: they
//! open, and a GGUF is the same model as the safetensors.

mod checkpoints;

use std::{
    fs,
    path::{Path, PathBuf},
};

use candle_core::{DType, Device, Tensor};
use checkpoints::*;
use flopaudit::{
    config::{ModelConfig, Projection},
    weights::{Checkpoint, PeftAdapter, tensor_shapes},
};
use serde::Deserialize;

const FAMILIES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/families");

/// The golden directories that hold `file`, in order.
fn holding(file: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(FAMILIES).unwrap().map(|entry| entry.unwrap().path());
    let mut found: Vec<_> = entries.filter(|dir| dir.join(file).is_file()).collect();
    found.sort();
    found
}

/// The directory opened, with a tokenizer of one token put beside what it holds.
fn opened(golden: &Path) -> Checkpoint {
    let dir = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(golden.join(file), dir.path().join(file)).unwrap();
    }
    let tokenizer = r#"{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}"#;
    fs::write(dir.path().join("tokenizer.json"), tokenizer).unwrap();
    open(dir.path()).unwrap()
}

fn tensor(checkpoint: &Checkpoint, name: &str, shape: &[usize]) -> Tensor {
    checkpoint.weights.tensor(name, shape, DType::F32, &Device::Cpu).unwrap()
}

#[test]
fn every_checkpoint_opens_with_all_its_tensors() {
    let all = holding("model.safetensors");
    assert_eq!(all.len(), 10);
    for golden in all {
        let checkpoint = opened(&golden);
        let shapes = tensor_shapes(&checkpoint.config);
        for (name, shape) in &shapes {
            tensor(&checkpoint, name, shape);
        }
        let held: usize = shapes.iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
        assert_eq!(held as u128, checkpoint.config.parameters(), "{}", golden.display());
    }
}

#[test]
fn a_gguf_is_the_same_model() {
    let all = holding("model.gguf");
    assert_eq!(all.len(), 3);
    for golden in all {
        let gguf = open(&golden.join("model.gguf")).unwrap();
        let config = ModelConfig::from_file(&golden.join("config.json")).unwrap();
        assert_eq!(gguf.config, config, "{}", golden.display());
        let file = golden.join("model.safetensors");
        for (name, expected) in candle_core::safetensors::load(file, &Device::Cpu).unwrap() {
            let mut expected_values = values(&expected);
            if config.unit_offset_norms && name.ends_with("norm.weight") {
                // The file holds the sum, rounded.
                expected_values.iter_mut().for_each(|gain| *gain = (*gain + 1.0) - 1.0);
            }
            let found = values(&tensor(&gguf, &name, expected.dims()));
            assert_eq!(found, expected_values, "{name} of {}", golden.display());
        }
    }
}

#[derive(Deserialize)]
struct Texts {
    texts: Vec<Encoded>,
}

#[derive(Deserialize)]
struct Encoded {
    text: String,
    ids: Vec<u32>,
}

#[test]
fn a_gguf_tokenizes_as_it_should() {
    for golden in holding("model.gguf") {
        let text = open(&golden.join("model.gguf")).unwrap().text;
        let expected = fs::read_to_string(golden.join("expected.json")).unwrap();
        let expected: serde_json::Value = serde_json::from_str(&expected).unwrap();
        let expected: Texts = serde_json::from_value(expected["gguf_tokenizer"].clone()).unwrap();
        assert!(!expected.texts.is_empty());
        for Encoded { text: spoken, ids } in expected.texts {
            assert_eq!(text.encode(&spoken).unwrap(), ids, "{spoken:?} of {}", golden.display());
            assert_eq!(text.decode(&ids, false).unwrap(), spoken);
        }
    }
}

#[test]
fn the_adapters_of_every_family_open() {
    let all = holding("adapter/adapter_config.json");
    assert_eq!(all.len(), 10);
    for golden in all {
        let config = ModelConfig::from_file(&golden.join("config.json")).unwrap();
        let adapter = PeftAdapter::open(&golden.join("adapter"), &config).unwrap();
        let targets = if golden.to_string_lossy().ends_with("-a") { 7 } else { 2 };
        assert_eq!((adapter.lora.rank, adapter.lora.targets.len()), (3, targets));
        let (k, n) = Projection::QProj.widths(&config);
        let a = adapter.a(0, Projection::QProj, DType::F32, &Device::Cpu).unwrap();
        let b = adapter.b(0, Projection::QProj, DType::F32, &Device::Cpu).unwrap();
        assert_eq!((a.dims(), b.dims()), (&[3, k][..], &[n, 3][..]));
    }
}
