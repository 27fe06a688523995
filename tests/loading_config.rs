//! Checkpoints as people have them: keys, tensors and files beside the sound ones of
//! tests/cases/loading. Each gives the right loss or one line that names what is at fault.
//!
//! Losses are those of transformers 5.23 in float64 on the same files, on text of 59 tokens (of the
//! GGUF 37); where it refuses a file, on the same model said in the way that it reads.

mod program;

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
};

use candle_core::{
    DType, Device, Tensor,
    quantized::gguf_file::{self, Value as Metadatum},
};
use program::*;
use serde_json::{Value, json};

const BASE: f64 = 17.026_878;
const BASE_GGUF: f64 = 17.762_418;
/// The same, its positions stretched by 4, all alike or by YaRN from 128.
const LINEAR_GGUF: f64 = 18.834_485;
const YARN_GGUF: f64 = 17.760_804;
const EMBEDDING: &str = "model.embed_tokens.weight";

type Tensors = HashMap<String, Tensor>;

fn cases() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases/loading")
}

/// A folder with the sound checkpoint, its config and tensors changed.
fn checkpoint(config: impl Fn(&mut Value), tensors: impl Fn(&mut Tensors)) -> tempfile::TempDir {
    let (dir, base) = (tempfile::tempdir().unwrap(), cases().join("base"));
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(base.join(name), dir.path().join(name)).unwrap();
    }
    let text = fs::read_to_string(base.join("config.json")).unwrap();
    let mut json = serde_json::from_str(&text).unwrap();
    config(&mut json);
    fs::write(dir.path().join("config.json"), json.to_string()).unwrap();
    let mut all = base_tensors();
    tensors(&mut all);
    candle_core::safetensors::save(&all, dir.path().join("model.safetensors")).unwrap();
    dir
}

fn base_tensors() -> Tensors {
    let file = cases().join("base/model.safetensors");
    candle_core::safetensors::load(file, &Device::Cpu).unwrap()
}

fn with_keys(more: Value) -> tempfile::TempDir {
    let change = |json: &mut Value| {
        json.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    };
    checkpoint(change, |_| {})
}

fn with_tensors(change: impl Fn(&mut Tensors)) -> tempfile::TempDir {
    checkpoint(|_| {}, change)
}

fn zeros(shape: &[usize]) -> Tensor {
    Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap()
}

/// Half the embedding, turned round.
fn other_head(tensors: &Tensors) -> Tensor {
    tensors[EMBEDDING].affine(-0.5, 0.0).unwrap()
}

fn renamed(tensors: &mut Tensors, name: impl Fn(&str) -> String) {
    *tensors = tensors.drain().map(|(old, tensor)| (name(&old), tensor)).collect();
}

/// The report of `eval` on a checkpoint.
fn eval(model: &Path, data: &str) -> Value {
    let data = cases().join(data);
    let line =
        format!("eval --model {} --data {} --seq 512 --json", model.display(), data.display());
    let report = json(&line);
    assert_eq!(report["balanced"], true, "{}", model.display());
    report
}

#[track_caller]
fn assert_loss(report: &Value, expected: f64) {
    let loss = report["evaluation"]["loss"].as_f64().unwrap();
    assert!((loss - expected).abs() < 2e-5, "{loss}, not {expected}");
}

/// The keys under `ignored`, and their reasons.
fn ignored(report: &Value) -> HashMap<String, String> {
    let text = |entry: &Value, key: &str| entry[key].as_str().unwrap().to_string();
    let entries = report["ignored"].as_array().unwrap();
    entries.iter().map(|entry| (text(entry, "key"), text(entry, "reason"))).collect()
}

fn is_refused(model: &Path, parts: &[&str]) {
    let data = cases().join("data.txt");
    let line = format!("eval --model {} --data {} --seq 512", model.display(), data.display());
    refused(tmp().path(), &line, parts);
}

#[test]
fn keys_give_the_loss_of_the_model_that_they_describe() {
    let nested = json!({"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0,
        "original_max_position_embeddings": 128});
    for (more, loss) in [
        (json!({}), BASE),
        (json!({"rope_scaling": {"type": "linear", "factor": 1.0}}), BASE),
        (json!({"use_sliding_window": true, "sliding_window": 512, "max_window_layers": 3}), BASE),
        (json!({"use_sliding_window": true, "sliding_window": 512, "max_window_layers": 0}), BASE),
        (
            json!({"use_sliding_window": true, "sliding_window": 16, "max_window_layers": 1}),
            17.171_975,
        ),
        (json!({"rope_scaling": {"type": "linear", "factor": 4.0}}), 17.493_433),
        (json!({"rope_theta": null, "rope_parameters": {"rope_theta": 1e4}}), 16.746_136),
        // transformers does not read it so of this family: the loss is of the same without the kind.
        (json!({"rope_parameters": {"full_attention": nested}}), 16.225_371),
    ] {
        let dir = with_keys(more);
        assert_loss(&eval(dir.path(), "data.txt"), loss);
    }
}

#[test]
fn what_is_not_used_is_listed_with_its_reason() {
    let report = eval(with_keys(json!({"initializer_range": 0.02})).path(), "data.txt");
    let listed = ignored(&report);
    assert!(listed["initializer_range"].contains("untrained"), "{listed:?}");
    assert!(listed["eos_token_id"].contains("tokens"), "{listed:?}");
    let report = eval(&cases().join("gguf_qwen2/m.gguf"), "data2.txt");
    assert_loss(&report, BASE_GGUF);
    assert!(report["ignored"].is_array());
    // Of a preset there are no files.
    assert!(json("count forward --preset tiny --seq 4 --json")["ignored"].is_null());
    let config = cases().join("base/config.json");
    for command in
        ["count forward", "audit forward", "reconcile forward", "count forward --sweep batch=1,2"]
    {
        let report = json(&format!("{command} --config {} --seq 4 --json", config.display()));
        assert!(ignored(&report).contains_key("bos_token_id"), "{command}");
    }
}

#[test]
fn doctor_lists_it_too() {
    let (dir, model) = (tmp(), cases().join("base"));
    fs::create_dir(dir.path().join("weights")).unwrap();
    for entry in fs::read_dir(model).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, dir.path().join("weights").join(path.file_name().unwrap())).unwrap();
    }
    let out = flopaudit(dir.path(), "doctor --json").assert().success().get_output().stdout.clone();
    let listed = ignored(&serde_json::from_slice(&out).unwrap());
    assert!(listed.contains_key("eos_token_id"), "{listed:?}");
}

#[test]
fn keys_that_ask_for_another_model_are_refused() {
    for (more, parts) in [
        (json!({"is_causal": false}), &["config.json: `is_causal` is false"][..]),
        (
            json!({"quantization_config": {"quant_method": "awq", "bits": 4}}),
            &["`quantization_config`", "(awq)"],
        ),
        (
            json!({"architectures": ["Qwen2ForSequenceClassification"], "num_labels": 1}),
            &["`architectures`"],
        ),
        (
            json!({"rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 128}}),
            &["`rope_scaling.factor` is 4, and no"],
        ),
        (json!({"rope_scaling": []}), &["`rope_scaling` is [], not an object"]),
        // As many as query heads, which the tensors are not.
        (json!({"num_key_value_heads": null}), &["k_proj.weight` has shape [16, 32]"]),
        (
            json!({"use_sliding_window": false, "sliding_window": 8, "layer_types":
            ["sliding_attention", "full_attention", "full_attention"]}),
            &["`sliding_window` is off"],
        ),
    ] {
        is_refused(with_keys(more).path(), parts);
    }
}

#[test]
fn tensors_are_found_under_the_names_that_wrappers_give() {
    let body = |name: &str| name.trim_start_matches("model.").to_string();
    let only_head = |tensors: &mut Tensors| {
        let pair = tensors.remove(EMBEDDING).unwrap();
        tensors.insert("lm_head.weight".into(), pair);
    };
    for change in [
        &only_head as &dyn Fn(&mut Tensors),
        &|tensors| renamed(tensors, body),
        &|tensors| renamed(tensors, |name| format!("language_model.{name}")),
        &|tensors| renamed(tensors, |name| format!("model.language_model.{}", body(name))),
        &|tensors| renamed(tensors, |name| format!("_orig_mod.{name}")),
        &|tensors| renamed(tensors, |name| format!("model.{name}")),
    ] {
        assert_loss(&eval(with_tensors(change).path(), "data.txt"), BASE);
    }
}

#[test]
fn a_head_beside_a_tied_config_is_used_if_it_differs() {
    let same = with_tensors(|tensors| {
        let pair = tensors[EMBEDDING].to_dtype(DType::F64).unwrap();
        tensors.insert("lm_head.weight".into(), pair);
    });
    let report = eval(same.path(), "data.txt");
    assert_loss(&report, BASE);
    assert_eq!(report["workload"]["model"]["tie_word_embeddings"], true);
    assert!(ignored(&report)["lm_head.weight"].contains("once more"));

    let other = with_tensors(|tensors| {
        let head = other_head(tensors);
        tensors.insert("lm_head.weight".into(), head);
    });
    let report = eval(other.path(), "data.txt");
    assert_loss(&report, 9.783_943);
    assert_eq!(report["workload"]["model"]["tie_word_embeddings"], false);
    assert_eq!(report["parameters"].as_u64().unwrap(), {
        let tied = eval(&cases().join("base"), "data.txt")["parameters"].as_u64().unwrap();
        tied + 320 * 32
    });
    assert!(ignored(&report)["tie_word_embeddings"].contains("the stored one"));
    let line = format!("count forward --model {} --seq 4", other.path().display());
    let assert = flopaudit(tmp().path(), &line).assert().success();
    let said = String::from_utf8(assert.get_output().stderr.clone()).unwrap();
    assert!(said.contains("warning") && said.contains("`tie_word_embeddings`"), "{said}");
}

#[test]
fn tensors_left_over_are_refused_or_listed() {
    for (name, shape) in [
        ("model.layers.3.input_layernorm.weight", &[32][..]),
        ("model.layers.0.self_attn.q_norm.weight", &[8]),
        ("model.layers.1.self_attn.o_proj.bias", &[32]),
        ("score.weight", &[1, 32]),
        ("lm_head.bias", &[320]),
    ] {
        let dir = with_tensors(|tensors| {
            tensors.insert(name.into(), zeros(shape));
        });
        is_refused(dir.path(), &[name, "no part of the model"]);
    }
    let dir = with_tensors(|tensors| {
        tensors.insert("lm_head.weight".into(), zeros(&[7, 32]));
    });
    is_refused(dir.path(), &["lm_head.weight", "shape [7, 32]"]);
    let name = "model.layers.0.self_attn.rotary_emb.inv_freq";
    let dir = with_tensors(|tensors| {
        tensors.insert(name.into(), zeros(&[4]));
    });
    let report = eval(dir.path(), "data.txt");
    assert_loss(&report, BASE);
    assert!(ignored(&report)[name].contains("computed"));
    let dir = with_tensors(|tensors| {
        let packed = tensors.remove("model.layers.0.self_attn.q_proj.weight").unwrap();
        tensors.insert("model.layers.0.self_attn.q_proj.qweight".into(), packed);
    });
    is_refused(dir.path(), &["q_proj.qweight", "GPTQ or AWQ"]);
}

#[test]
fn one_tensor_twice_is_listed_if_equal_and_refused_if_not() {
    let norm = "model.norm.weight";
    let again = |scale: f64| {
        let norm = base_tensors()[norm].affine(scale, 0.0).unwrap();
        Tensors::from([("norm.weight".to_string(), norm)])
    };
    let dir = with_tensors(|_| {});
    let aside = dir.path().join("extra.safetensors");
    candle_core::safetensors::save(&again(1.0), &aside).unwrap();
    let report = eval(dir.path(), "data.txt");
    assert_loss(&report, BASE);
    assert!(ignored(&report)["*"].contains("not read"));
    candle_core::safetensors::save(&again(2.0), &aside).unwrap();
    is_refused(dir.path(), &["extra.safetensors", "`norm.weight`", "other values"]);

    // The same of files that make up the model together.
    fs::rename(dir.path().join("model.safetensors"), dir.path().join("a.safetensors")).unwrap();
    is_refused(dir.path(), &["extra.safetensors", "`norm.weight`", "other values"]);
    candle_core::safetensors::save(&again(1.0), &aside).unwrap();
    let report = eval(dir.path(), "data.txt");
    assert_loss(&report, BASE);
    assert!(ignored(&report)["norm.weight"].contains("the same as"));
}

/// transformers applies an adapter that lies in a model's folder; here that takes a flag.
#[test]
fn an_adapter_in_a_models_folder_is_said_aloud() {
    let dir = with_tensors(|_| {});
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        fs::copy(cases().join("ad_rankpat").join(name), dir.path().join(name)).unwrap();
    }
    let data = cases().join("data.txt");
    let line =
        format!("eval --model {} --data {} --seq 512 --json", dir.path().display(), data.display());
    let output = flopaudit(tmp().path(), &line).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("adapter_model.safetensors is an adapter, which is not"), "{said}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_loss(&report, BASE);
    let files = report["ignored"].as_array().unwrap().iter().map(|one| one["file"].to_string());
    assert_eq!(files.filter(|file| file.contains("adapter_")).count(), 2);
}

#[test]
fn folders_of_other_files_are_named_by_them() {
    let dir = with_tensors(|_| {});
    let weights = dir.path().join("model.safetensors");
    fs::rename(weights, dir.path().join("pytorch_model.bin")).unwrap();
    is_refused(dir.path(), &["`pytorch_model.bin`", "no safetensors"]);
}

/// The sound GGUF with more metadata.
fn gguf(dir: &Path, more: &[(&str, Metadatum)]) -> PathBuf {
    let mut file = fs::File::open(cases().join("gguf_qwen2/m.gguf")).unwrap();
    let content = gguf_file::Content::read(&mut file).unwrap();
    let names = content.tensor_infos.keys();
    let tensors: Vec<_> = names
        .map(|name| (name.as_str(), content.tensor(&mut file, name, &Device::Cpu).unwrap()))
        .collect();
    let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (*name, tensor)).collect();
    let mut metadata = content.metadata.clone();
    metadata.extend(more.iter().map(|(key, value)| (key.to_string(), value.clone())));
    let metadata: Vec<_> = metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
    let path = dir.join("m.gguf");
    gguf_file::write(&mut fs::File::create(&path).unwrap(), &metadata, &tensors).unwrap();
    path
}

#[test]
fn keys_of_a_gguf_are_honoured_or_refused_in_its_own_words() {
    use Metadatum::{Bool, F32, U32};
    let dir = tmp();
    let text = |text: &str| Metadatum::String(text.into());
    let factor = || ("qwen2.rope.scaling.factor", F32(4.0));
    let kind = |kind: &str| ("qwen2.rope.scaling.type", text(kind));
    let original = ("qwen2.rope.scaling.original_context_length", U32(128));
    for (more, loss) in [
        (vec![], BASE_GGUF),
        (vec![factor()], LINEAR_GGUF),
        (vec![factor(), kind("linear")], LINEAR_GGUF),
        (vec![factor(), kind("none")], BASE_GGUF),
        (vec![("qwen2.rope.scaling.factor", F32(1.0)), kind("linear")], BASE_GGUF),
        (vec![factor(), kind("yarn"), original], YARN_GGUF),
        (vec![("qwen2.attention.causal", Bool(true))], BASE_GGUF),
        (vec![("qwen2.attention.sliding_window", U32(512))], BASE_GGUF),
        (vec![("general.url", text("x"))], BASE_GGUF),
    ] {
        assert_loss(&eval(&gguf(dir.path(), &more), "data2.txt"), loss);
    }
    for (more, says) in [
        (("qwen2.attention.causal", Bool(false)), "`qwen2.attention.causal` is false"),
        (("qwen2.attention.scale", F32(0.5)), "`qwen2.attention.scale` is 0.5"),
        (("qwen2.final_logit_softcapping", F32(30.0)), "`qwen2.final_logit_softcapping` is 30"),
        (("qwen2.expert_count", U32(8)), "`qwen2.expert_count` is 8"),
        (("qwen2.vocab_size", U32(321)), "`qwen2.vocab_size` is 321, and `token_embd.weight` has"),
        (("qwen2.attention.head_count_kv", U32(3)), "`qwen2.attention.head_count_kv` is 3"),
        (("qwen2.rope.scaling.factor", F32(0.5)), "`qwen2.rope.scaling.factor` is 0.5"),
        (("qwen2.rope.freq_base", F32(0.0)), "`qwen2.rope.freq_base` is 0"),
        (("qwen2.rope.scaling.type", text("longrope")), "`qwen2.rope.scaling.type` asks"),
        (("qwen2.attention.sliding_window", U32(8)), "`qwen2.attention.sliding_window` is 8"),
        (("qwen2.something.new", U32(8)), "`qwen2.something.new` is not supported"),
    ] {
        is_refused(&gguf(dir.path(), &[more]), &["m.gguf: ", says]);
    }
    let listed = ignored(&eval(&gguf(dir.path(), &[("general.url", text("x"))]), "data2.txt"));
    assert_eq!(listed["general.url"], "describes the file");

    // What this kind of positions, or a window that no layer has, leaves unused.
    let window = || ("qwen2.attention.sliding_window", U32(8));
    let none = Metadatum::Array([false; 3].map(Bool).into());
    for (more, keys) in [
        (vec![factor(), kind("none")], &["qwen2.rope.scaling.factor"][..]),
        (
            vec![
                ("qwen2.rope.scaling.original_context_length", U32(128)),
                ("qwen2.rope.scaling.yarn_beta_fast", F32(8.0)),
            ],
            &["qwen2.rope.scaling.original_context_length", "qwen2.rope.scaling.yarn_beta_fast"],
        ),
        (vec![("qwen2.attention.sliding_window", U32(512))], &["qwen2.attention.sliding_window"]),
        (
            vec![window(), ("qwen2.attention.sliding_window_pattern", none)],
            &["qwen2.attention.sliding_window"],
        ),
        (vec![("qwen2.expert_count", U32(0))], &["qwen2.expert_count"]),
    ] {
        let report = eval(&gguf(dir.path(), &more), "data2.txt");
        assert_loss(&report, BASE_GGUF);
        let listed = ignored(&report);
        assert!(keys.iter().all(|key| listed.contains_key(*key)), "{keys:?}: {listed:?}");
    }
}

/// What no config.json of the family says cannot be written down either: refused when opened.
#[test]
fn a_gguf_with_what_its_family_has_not_is_refused() {
    let dir = tmp();
    let mut file = fs::File::open(cases().join("gguf_qwen2/m.gguf")).unwrap();
    let content = gguf_file::Content::read(&mut file).unwrap();
    let tensor = |name: &str| content.tensor(&mut &file, name, &Device::Cpu).unwrap();
    let mut tensors: Vec<_> =
        content.tensor_infos.keys().map(|name| (name.clone(), tensor(name))).collect();
    let zeros = candle_core::quantized::QTensor::quantize(
        &zeros(&[32]),
        candle_core::quantized::GgmlDType::F32,
    );
    tensors.push(("blk.0.attn_output.bias".into(), zeros.unwrap()));
    let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let metadata: Vec<_> =
        content.metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
    let path = dir.path().join("m.gguf");
    gguf_file::write(&mut fs::File::create(&path).unwrap(), &metadata, &tensors).unwrap();
    is_refused(&path, &["m.gguf: tensor `blk.0.attn_q.bias` is a bias, and no `qwen2` has just"]);

    let less: Vec<_> =
        tensors.into_iter().filter(|(name, _)| *name != "blk.1.attn_norm.weight").collect();
    let less: Vec<_> =
        less.into_iter().filter(|(name, _)| *name != "blk.0.attn_output.bias").collect();
    gguf_file::write(&mut fs::File::create(&path).unwrap(), &metadata, &less).unwrap();
    is_refused(&path, &["m.gguf: tensor `blk.1.attn_norm.weight` is missing"]);
}

#[test]
fn dropout_is_refused_in_training_alone() {
    let dir = with_keys(json!({"attention_dropout": 0.1}));
    assert_loss(&eval(dir.path(), "data.txt"), BASE);
    let line = format!(
        "train --model {} --data {} --seq 16 --steps 1 --out run",
        dir.path().display(),
        cases().join("data.txt").display()
    );
    refused(tmp().path(), &line, &["config.json: `attention_dropout` is not 0"]);
}

#[test]
fn a_full_training_of_random_weights_leaves_a_checkpoint() {
    let dir = tmp();
    let data = cases().join("data.txt");
    let line =
        "train --full --model synthetic:tiny --seq 16 --steps 1 --check-gradients 0 --out run";
    let line = format!("{line} --data {}", data.display());
    flopaudit(dir.path(), &line).assert().success();
    let of = |model: &str| {
        let line = format!("eval --model {model} --seq 16 --json --data {}", data.display());
        let out = flopaudit(dir.path(), &line).assert().success().get_output().stdout.clone();
        let report: Value = serde_json::from_slice(&out).unwrap();
        report["evaluation"]["tokens"]["scored"].as_u64().unwrap()
    };
    assert_eq!(of("run"), of("synthetic:tiny"));
}
