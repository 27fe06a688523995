//! Adapters that PEFT saved: what loads, and what is refused by name.

mod checkpoints;

use std::{collections::HashMap, fs, path::Path};

use candle_core::{DType, Device, Tensor};
use checkpoints::*;
use flopaudit::{
    config::{Modules, Projection},
    weights::PeftAdapter,
};
use serde_json::{Value, json};

const RANK: usize = 4;

fn options() -> Value {
    json!({
        "peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": ["v_proj", "q_proj"],
        "bias": "none", "use_dora": false, "use_rslora": false, "rank_pattern": {},
        "alpha_pattern": {}, "modules_to_save": null, "layers_to_transform": null,
        "fan_in_fan_out": false, "lora_dropout": 0.05, "init_lora_weights": true,
        "base_model_name_or_path": "Qwen/Qwen2.5-0.5B-Instruct", "megatron_core": "megatron.core"
    })
}

fn name(layer: usize, p: Projection, factor: char) -> String {
    format!("base_model.model.model.layers.{layer}.{}.{p}.lora_{factor}.weight", p.parent())
}

fn filled(shape: (usize, usize), value: f32) -> Tensor {
    Tensor::full(value, shape, &Device::Cpu).unwrap()
}

/// Adapters on these projections of all of tiny's layers; A is filled with the layer's number.
fn tensors(projections: &[Projection]) -> Tensors {
    let config = tiny();
    let mut all = HashMap::new();
    for layer in 0..config.num_hidden_layers {
        for &p in projections {
            let (k, n) = p.widths(&config);
            all.insert(name(layer, p, 'A'), filled((RANK, k), layer as f32));
            all.insert(name(layer, p, 'B'), filled((n, RANK), 0.5));
        }
    }
    all
}

fn write(dir: &Path, options: &Value, tensors: &Tensors) {
    fs::write(dir.join("adapter_config.json"), options.to_string()).unwrap();
    candle_core::safetensors::save(tensors, dir.join("adapter_model.safetensors")).unwrap();
}

fn open(options: &Value, tensors: &Tensors) -> anyhow::Result<PeftAdapter> {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), options, tensors);
    PeftAdapter::open(dir.path(), &tiny())
}

#[track_caller]
fn assert_refused(options: &Value, tensors: &Tensors, parts: &[&str]) {
    let error = one_line(&open(options, tensors).unwrap_err());
    for part in parts {
        assert!(error.contains(part), "`{part}` is not in: {error}");
    }
}

const QV: [Projection; 2] = [Projection::QProj, Projection::VProj];

#[test]
fn an_adapter_loads_with_its_factors() {
    let adapter = open(&options(), &tensors(&QV)).unwrap();
    let site = adapter.lora.at(1, Projection::VProj).unwrap();
    assert_eq!((site.rank, adapter.lora.scaling(site)), (RANK, 2.0));
    assert_eq!(adapter.lora.targets, QV.map(Modules::from));
    let a = adapter.a(2, Projection::VProj, DType::F32, &Device::Cpu).unwrap();
    let b = adapter.b(2, Projection::VProj, DType::BF16, &Device::Cpu).unwrap();
    assert_eq!((a.dims(), b.dims()), ([RANK, 32].as_slice(), [16, RANK].as_slice()));
    assert!(values(&a).iter().all(|x| *x == 2.0) && values(&b).iter().all(|x| *x == 0.5));
    let error = adapter.a(0, Projection::KProj, DType::F32, &Device::Cpu).unwrap_err();
    assert!(one_line(&error).contains("k_proj.lora_A.weight` is missing"));
}

#[test]
fn targets_may_be_a_list_all_or_a_pattern() {
    let mut options = options();
    for (target_modules, expected) in [
        (json!(["self_attn.q_proj", "v_proj"]), &QV[..]),
        (json!("all-linear"), &Projection::ALL[..]),
        (json!(r".*\.(q_proj|v_proj)$"), &QV[..]),
    ] {
        options["target_modules"] = target_modules;
        let adapter = open(&options, &tensors(expected)).unwrap();
        let expected: Vec<_> = expected.iter().copied().map(Modules::from).collect();
        assert_eq!(adapter.lora.targets, expected);
    }
}

#[test]
fn rank_stabilised_scaling_is_alpha_over_the_root() {
    let mut options = options();
    options["use_rslora"] = json!(true);
    let lora = open(&options, &tensors(&QV)).unwrap().lora;
    let scaling = lora.scaling(lora.at(0, Projection::QProj).unwrap());
    assert!((scaling - 8.0 / (RANK as f64).sqrt()).abs() < 1e-12);
}

#[test]
fn options_that_change_the_maths_are_refused() {
    for (key, value) in [
        ("use_dora", json!(true)),
        ("bias", json!("lora_only")),
        ("modules_to_save", json!(["lm_head"])),
        ("layers_to_transform", json!(["0"])),
        ("fan_in_fan_out", json!(true)),
        ("layer_replication", json!([[0, 2]])),
        ("init_lora_weights", json!("pissa_niter_4")),
        ("peft_type", json!("ADALORA")),
        ("r", json!(0)),
        ("r", json!(-1)),
        ("lora_alpha", json!("x")),
        ("target_modules", json!(["lm_head"])),
        ("target_modules", json!(7)),
    ] {
        let mut options = options();
        options[key] = value;
        assert_refused(&options, &tensors(&QV), &["adapter_config.json: ", key]);
    }
    let mut wide = options();
    wide["r"] = json!(17);
    assert_refused(&wide, &tensors(&QV), &["adapter_config.json: ", "17 is above 16"]);
    assert_refused(&json!({}), &tensors(&QV), &["has no `peft_type`"]);
}

#[test]
fn tensors_that_do_not_fit_are_named() {
    let q = name(1, Projection::QProj, 'B');
    let mut broken = tensors(&QV);
    broken.remove(&q);
    assert_refused(&options(), &broken, &[&q, "is missing; expected with shape [32, 4]"]);
    broken.insert(q.clone(), filled((32, 5), 0.0));
    assert_refused(&options(), &broken, &[&q, "has shape [32, 5]", "[32, 4]"]);

    let extra = name(3, Projection::QProj, 'A');
    let mut deeper = tensors(&QV);
    deeper.insert(extra.clone(), filled((RANK, 32), 0.0));
    assert_refused(&options(), &deeper, &[&extra, "belongs to no projection", "3 layers"]);

    let mut infinite = tensors(&QV);
    infinite.insert(q.clone(), filled((32, RANK), f32::INFINITY));
    let adapter = open(&options(), &infinite).unwrap();
    let error = adapter.b(1, Projection::QProj, DType::F32, &Device::Cpu).unwrap_err();
    assert!(one_line(&error).contains("holds 128 NaN or infinite values"));
}

#[test]
fn broken_adapter_files_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let error = || one_line(&PeftAdapter::open(dir.path(), &tiny()).unwrap_err());
    assert!(error().contains("adapter_config.json: No such file"), "{}", error());
    write(dir.path(), &options(), &tensors(&QV));
    let file = dir.path().join("adapter_model.safetensors");
    let whole = fs::read(&file).unwrap();
    fs::write(&file, &whole[..whole.len() / 2]).unwrap();
    assert!(error().contains("adapter_model.safetensors: truncated"), "{}", error());
    fs::remove_file(&file).unwrap();
    assert!(error().contains("adapter_model.safetensors: no such file"), "{}", error());
    fs::write(dir.path().join("adapter_config.json"), "{").unwrap();
    assert!(error().contains("adapter_config.json: not valid JSON"), "{}", error());
}
