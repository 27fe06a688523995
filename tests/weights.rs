//! Checkpoints as files: each layout opens to the same tensors, each defect is one clear line.

mod checkpoints;

use std::{fs, path::Path};

use candle_core::{DType, Device, Tensor, quantized::GgmlDType, quantized::gguf_file::Value};
use checkpoints::*;
use flopaudit::{
    config::{Activation, Biases, Family, ModelConfig, Rope, RopeScaling, Window},
    weights,
};

#[track_caller]
fn assert_says(error: &str, parts: &[&str]) {
    for part in parts {
        assert!(error.contains(part), "`{part}` is not in: {error}");
    }
}

fn load(path: &Path, name: &str, shape: &[usize], dtype: DType) -> anyhow::Result<Tensor> {
    open(path).unwrap().weights.tensor(name, shape, dtype, &Device::Cpu)
}

#[test]
fn one_file_shards_and_gguf_hold_the_same_tensors() {
    for tied in [true, false] {
        let config = ModelConfig { tie_word_embeddings: tied, ..tiny() };
        let tensors = tensors(&config);
        let (one, two) = (directory(&config, &tensors), sharded(&config, &tensors));
        let gguf = tempfile::tempdir().unwrap();
        write_gguf(&gguf.path().join("m.gguf"), &metadata(&config), &tensors, GgmlDType::F32);
        for path in [one.path(), two.path(), gguf.path(), &gguf.path().join("m.gguf")] {
            let checkpoint = open(path).unwrap();
            // Models of this family and width tie theirs: a GGUF without a tie has stored it apart.
            let gguf = path.starts_with(gguf.path());
            let found = ModelConfig { head_stored_apart: gguf && !tied, ..config.clone() };
            assert_eq!(checkpoint.config, found, "{}", checkpoint.origin);
            assert_eq!(checkpoint.weights.contains("lm_head.weight"), !tied);
            for (name, tensor) in &tensors {
                let found = checkpoint
                    .weights
                    .tensor(name, tensor.dims(), DType::F32, &Device::Cpu)
                    .unwrap();
                assert_eq!(values(&found), values(tensor), "{name} of {}", checkpoint.origin);
            }
        }
    }
}

#[test]
fn tensors_come_in_the_dtype_asked_for() {
    let (config, tensors) = (tiny(), tensors(&tiny()));
    let narrow = tensors.iter().map(|(n, t)| (n.clone(), t.to_dtype(DType::BF16).unwrap()));
    let dir = directory(&config, &narrow.collect());
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let found = load(dir.path(), EMBEDDING, &[320, 32], dtype).unwrap();
        assert_eq!(found.dtype(), dtype);
        let exact = values(&tensors[EMBEDDING].to_dtype(DType::BF16).unwrap());
        // f16 is narrower than bf16 in range: the smallest values round.
        let near = values(&found).iter().zip(&exact).all(|(a, b)| (a - b).abs() < 1e-6);
        assert!(near, "{dtype:?}");
    }
}

#[test]
fn quantized_tensors_are_dequantized() {
    let (config, tensors) = (tiny(), tensors(&tiny()));
    let dir = tempfile::tempdir().unwrap();
    for dtype in [GgmlDType::Q8_0, GgmlDType::Q5_0, GgmlDType::F16, GgmlDType::BF16] {
        let file = dir.path().join("m.gguf");
        write_gguf(&file, &metadata(&config), &tensors, dtype);
        let found = values(&load(&file, EMBEDDING, &[320, 32], DType::F32).unwrap());
        let worst = found
            .iter()
            .zip(values(&tensors[EMBEDDING]))
            .fold(0f32, |worst, (a, b)| worst.max((a - b).abs()));
        assert!(worst > 0.0 && worst < 5e-3, "{dtype:?}: {worst}");
    }
}

#[test]
fn missing_and_misshapen_tensors_are_named() {
    let name = "model.layers.2.mlp.up_proj.weight";
    let mut broken = tensors(&tiny());
    broken.remove(name);
    let dir = directory(&tiny(), &broken);
    let why = "is missing; the config asks for it with shape [48, 32]";
    assert_says(&error(dir.path()), &["model.safetensors: tensor", name, why]);

    broken.insert(name.into(), Tensor::zeros((32, 48), DType::F32, &Device::Cpu).unwrap());
    let dir = directory(&tiny(), &broken);
    let why = "has shape [32, 48]; the config asks for [48, 32]";
    assert_says(&error(dir.path()), &["model.safetensors: tensor", name, why]);

    let file = dir.path().join("m.gguf");
    write_gguf(&file, &metadata(&tiny()), &broken, GgmlDType::F32);
    // In the file's own words.
    assert_says(&error(&file), &["m.gguf: tensor", "`blk.2.ffn_up.weight`", why]);
}

#[test]
fn values_that_are_not_finite_are_located() {
    for (dtype, bad) in
        [(DType::F32, f32::NAN), (DType::F16, f32::INFINITY), (DType::BF16, f32::NAN)]
    {
        let mut tensors = tensors(&tiny());
        let mut data = values(&tensors[EMBEDDING]);
        (data[77], data[9000]) = (bad, f32::NAN);
        let data = Tensor::from_vec(data, (320, 32), &Device::Cpu).unwrap();
        tensors.insert(EMBEDDING.into(), data.to_dtype(dtype).unwrap());
        let dir = directory(&tiny(), &tensors);
        let error = one_line(&load(dir.path(), EMBEDDING, &[320, 32], DType::F32).unwrap_err());
        let why = "holds 2 NaN or infinite values, the first at flat index 77";
        assert_says(&error, &["model.safetensors", EMBEDDING, why]);
    }
    let mut tensors = tensors(&tiny());
    tensors.insert(EMBEDDING.into(), Tensor::zeros((320, 32), DType::U8, &Device::Cpu).unwrap());
    let dir = directory(&tiny(), &tensors);
    let error = one_line(&load(dir.path(), EMBEDDING, &[320, 32], DType::F32).unwrap_err());
    assert_says(&error, &[EMBEDDING, "holds u8; weights are f32"]);
}

#[test]
fn broken_safetensors_are_named() {
    let dir = directory(&tiny(), &tensors(&tiny()));
    let file = dir.path().join("model.safetensors");
    let whole = fs::read(&file).unwrap();
    for length in [0, 4, 8, 100, whole.len() / 2, whole.len() - 1] {
        fs::write(&file, &whole[..length]).unwrap();
        assert_says(&error(dir.path()), &["model.safetensors: truncated or not a safetensors"]);
    }
    fs::write(&file, "version https://git-lfs.github.com/spec/v1\noid sha256:0\n").unwrap();
    assert_says(&error(dir.path()), &["model.safetensors: is a Git LFS pointer"]);
    fs::remove_file(&file).unwrap();
    assert_says(&error(dir.path()), &["holds no weights: no model.safetensors"]);
    fs::remove_file(dir.path().join("config.json")).unwrap();
    assert_says(&error(dir.path()), &["holds no config.json"]);
    let error = error(&file);
    assert_says(&error, &["model.safetensors: no such file or directory"]);
}

#[test]
fn broken_shards_are_named() {
    let fresh = || sharded(&tiny(), &tensors(&tiny()));
    let (first, index) = ("model-1-of-00002.safetensors", "model.safetensors.index.json");

    let dir = fresh();
    fs::remove_file(dir.path().join(first)).unwrap();
    assert_says(&error(dir.path()), &[first, "missing, though", index, "names it"]);
    fs::write(dir.path().join(first), "garbage, and more than eight bytes of it").unwrap();
    assert_says(&error(dir.path()), &[first, "truncated or not a safetensors file"]);
    fs::copy(dir.path().join("model-2-of-00002.safetensors"), dir.path().join(first)).unwrap();
    assert_says(&error(dir.path()), &[first, "tensor `", "is missing, though", "places it there"]);

    let dir = fresh();
    for (text, why) in [
        ("{", "not a valid shard index: EOF while parsing"),
        ("{\"weight_map\": 3}", "not a valid shard index: invalid type"),
        ("{\"weight_map\": {\"a\": \"../b\"}}", "names the shard `../b`"),
    ] {
        fs::write(dir.path().join(index), text).unwrap();
        assert_says(&error(dir.path()), &[index, why]);
    }
    fs::write(dir.path().join(index), r#"{"weight_map": {}}"#).unwrap();
    assert_says(&error(dir.path()), &[EMBEDDING, "is missing"]);
}

#[test]
fn broken_gguf_files_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("m.gguf");
    fs::write(&file, "").unwrap();
    assert_says(&error(&file), &["m.gguf: is empty"]);
    fs::write(&file, "no weights at all").unwrap();
    assert_says(&error(&file), &["m.gguf: is not a GGUF file"]);

    write_gguf(&file, &metadata(&tiny()), &tensors(&tiny()), GgmlDType::F32);
    let whole = fs::read(&file).unwrap();
    fs::write(&file, &whole[..300]).unwrap();
    assert_says(&error(&file), &["m.gguf: truncated or malformed GGUF header"]);
    fs::write(&file, &whole[..whole.len() - 1000]).unwrap();
    assert_says(&error(&file), &["m.gguf: tensor `", "reaches past the file's end", "truncated?"]);

    fs::write(dir.path().join("second.gguf"), "").unwrap();
    assert_says(&error(dir.path()), &["holds 2 .gguf files"]);
    let error = one_line(&weights::open(Some("no/such/model.gguf")).unwrap_err());
    assert_eq!(error, "no/such/model.gguf: no such file or directory");
}

#[test]
fn gguf_metadata_is_checked() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("m.gguf");
    let tensors = tensors(&tiny());
    let heads = "qwen2.attention.head_count";
    let text = |s: &str| Some(Value::String(s.into()));
    let cases = [
        (
            "general.architecture",
            text("bert"),
            "is `bert`; supported are qwen2, llama, qwen3, gemma3",
        ),
        ("general.architecture", None, "is missing"),
        (heads, None, "is missing"),
        (heads, text("4"), "is not a count"),
        (heads, Some(Value::I32(-4)), "is not a count"),
        (heads, Some(Value::U32(0)), "`qwen2.attention.head_count` is 0"),
        (heads, Some(Value::U32(3)), "does not divide 3 heads"),
        ("qwen2.embedding_length", Some(Value::U64(u64::MAX)), "`qwen2.embedding_length` is"),
        ("qwen2.block_count", Some(Value::U32(4)), "`blk.3.attn_norm.weight` is"),
        ("qwen2.rope.freq_base", text("x"), "is not a float"),
        ("qwen2.rope.scaling.type", text("longrope"), "`longrope` RoPE scaling"),
        (
            "qwen2.attention.sliding_window",
            Some(Value::U32(128)),
            "says which layers have that window",
        ),
        ("split.count", Some(Value::U16(2)), "merge the parts"),
        ("general.alignment", Some(Value::U32(0)), "`general.alignment` is 0"),
        (
            "tokenizer.ggml.model",
            text("bert"),
            "`tokenizer.ggml.model` is `bert`; supported are gpt2 and llama",
        ),
        ("tokenizer.ggml.tokens", None, "`tokenizer.ggml.tokens` is missing"),
        ("tokenizer.ggml.merges", Some(Value::Array(vec![Value::String("a".into())])), "merge"),
        ("tokenizer.ggml.pre", None, "`tokenizer.ggml.pre` is missing"),
        (
            "tokenizer.ggml.pre",
            text("viking"),
            "is `viking`; supported are qwen2, qwen35, deepseek",
        ),
        ("tokenizer.ggml.token_type", None, "`tokenizer.ggml.token_type` is missing"),
        ("tokenizer.ggml.add_sep_token", Some(Value::Bool(true)), "is true, which is not"),
        ("tokenizer.ggml.add_bos_token", Some(Value::Bool(true)), "bos_token_id` is missing, and"),
        ("general.type", text("adapter"), "is `adapter`; this is no model"),
        ("qwen2.attention.causal", Some(Value::Bool(false)), "is false, which is not supported"),
        ("qwen2.final_logit_softcapping", Some(Value::F32(30.0)), "is 30, which is not supported"),
        ("qwen2.expert_count", Some(Value::U32(8)), "is 8, which is not supported"),
        ("qwen2.rope.dimension_count", Some(Value::U32(4)), "is 4, and a head is 8 wide"),
        ("qwen2.attention.value_length", Some(Value::U32(4)), "is 4, and a head is 8 wide"),
        ("qwen2.attention.head_count_kv", Some(Value::Array(vec![])), "is not a count"),
        ("qwen2.new_key", Some(Value::U32(0)), "`qwen2.new_key` is not supported, and may change"),
    ];
    for (key, value, why) in cases {
        let mut metadata = metadata(&tiny());
        match value {
            Some(value) => metadata.insert(key.into(), value),
            None => metadata.remove(key),
        };
        write_gguf(&file, &metadata, &tensors, GgmlDType::F32);
        assert_says(&error(&file), &["m.gguf", why]);
    }
    let long = ModelConfig { vocab_size: 200, ..tiny() };
    write_gguf(&file, &metadata(&long), &checkpoints::tensors(&long), GgmlDType::F32);
    assert_says(&error(&file), &["m.gguf: has 260 tokens, the model only 200"]);
}

/// A config of each architecture, with what is particular to it.
fn families() -> [ModelConfig; 4] {
    let biases = |qkv, o, mlp| Biases { qkv, o, mlp };
    let wide = ModelConfig { head_dim: Some(12), bias: biases(false, false, false), ..tiny() };
    let layers = vec![true, true, true, true, true, false, true];
    [
        ModelConfig { head_dim: Some(10), ..tiny() },
        ModelConfig { family: Family::Llama, bias: biases(true, true, true), ..wide.clone() },
        ModelConfig {
            family: Family::Qwen3,
            qk_norm: true,
            window: Some(Window { width: 9, layers: vec![false, true, true] }),
            ..wide.clone()
        },
        ModelConfig {
            family: Family::Gemma3,
            num_hidden_layers: 7,
            qk_norm: true,
            sandwich_norms: true,
            unit_offset_norms: true,
            scaled_embedding: true,
            activation: Activation::GeluTanh,
            window: Some(Window { width: 6, layers }),
            local_rope: Some(Rope { theta: 10_000.0, scaling: RopeScaling::Default }),
            query_pre_attn_scalar: Some(12.0),
            ..wide
        },
    ]
}

#[test]
fn a_gguf_of_every_architecture_holds_the_same_tensors() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("m.gguf");
    for config in families() {
        let tensors = tensors(&config);
        let mut metadata = metadata(&config);
        if config.family == Family::Gemma3 {
            // These are what the architecture means without a key.
            metadata.remove("gemma3.rope.freq_base_swa");
            metadata.remove("gemma3.attention.sliding_window_pattern");
        }
        write_gguf(&file, &metadata, &tensors, GgmlDType::F32);
        let checkpoint = open(&file).unwrap();
        assert_eq!(checkpoint.config, config);
        for (name, tensor) in &tensors {
            let load = checkpoint.weights.tensor(name, tensor.dims(), DType::F32, &Device::Cpu);
            // Gains here are 0 or 1, which survive the 1 that a file may add.
            assert_eq!(values(&load.unwrap()), values(tensor), "{name} of {:?}", config.family);
        }
    }
}

#[test]
fn a_windowed_architecture_needs_its_window() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("m.gguf");
    let [.., gemma] = families();
    let mut metadata = metadata(&gemma);
    metadata.remove("gemma3.attention.sliding_window");
    write_gguf(&file, &metadata, &tensors(&gemma), GgmlDType::F32);
    assert_says(&error(&file), &["m.gguf: `gemma3.attention.sliding_window` is missing"]);
}

#[test]
fn tensors_of_no_part_of_the_model_are_named() {
    let name = "model.layers.1.self_attn.o_proj.bias";
    let mut more = tensors(&tiny());
    more.insert(name.into(), Tensor::zeros(32, DType::F32, &Device::Cpu).unwrap());
    let why = "is no part of the model that the config describes";
    let dir = directory(&tiny(), &more);
    assert_says(&error(dir.path()), &["model.safetensors: tensor", name, why]);
    let file = dir.path().join("m.gguf");
    write_gguf(&file, &metadata(&tiny()), &more, GgmlDType::F32);
    assert_says(&error(&file), &["m.gguf: tensor `blk.1.attn_output.bias`", why]);

    // Old checkpoints hold what is computed.
    let mut old = tensors(&tiny());
    let frequencies = Tensor::zeros(4, DType::F32, &Device::Cpu).unwrap();
    old.insert("model.layers.0.self_attn.rotary_emb.inv_freq".into(), frequencies);
    open(directory(&tiny(), &old).path()).unwrap();
}

#[test]
fn no_corruption_of_a_gguf_header_panics() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("m.gguf");
    let config = ModelConfig { num_hidden_layers: 1, ..tiny() };
    write_gguf(&file, &metadata(&config), &tensors(&config), GgmlDType::F32);
    let whole = fs::read(&file).unwrap();
    let name = b"token_embd.weight";
    let infos = whole.windows(name.len()).position(|window| window == name).unwrap();
    // The counts at the start, then one tensor's dimensions, type and offset.
    for at in (4..48).chain(infos - 8..infos + 56) {
        for byte in [0x00, 0x7f, 0x80, 0xff] {
            let mut bad = whole.clone();
            bad[at] = byte;
            fs::write(&file, &bad).unwrap();
            if let Err(error) = open(&file) {
                one_line(&error);
            }
        }
    }
}

#[test]
fn an_invalid_config_is_named() {
    let dir = directory(&tiny(), &tensors(&tiny()));
    let file = dir.path().join("config.json");
    fs::write(&file, "{ not json").unwrap();
    assert_says(&error(dir.path()), &["config.json: not valid JSON", "line 1"]);
    let mut config = tiny().to_hub().unwrap();
    config["num_attention_heads"] = 0.into();
    fs::write(&file, config.to_string()).unwrap();
    assert_says(&error(dir.path()), &["config.json: `num_attention_heads` is 0"]);
}

#[test]
fn synthetic_takes_a_config_file_too() {
    let dir = tempfile::tempdir().unwrap();
    write_text_side(dir.path(), &tiny());
    let spec = format!("synthetic:{}:5", dir.path().join("config.json").display());
    let checkpoint = weights::open(Some(&spec)).unwrap();
    assert_eq!(checkpoint.config, tiny());
    assert!(checkpoint.synthetic && checkpoint.origin.contains(":5 (random weights"));
}

#[cfg(not(feature = "hub"))]
#[test]
fn a_build_without_the_hub_says_so() {
    let error = one_line(&weights::open(Some("owner/name")).unwrap_err());
    assert_says(&error, &["owner/name: this build has no hub support", "--model synthetic"]);
}

/// Runs this test again in a process of its own, where the environment can be set.
#[cfg(feature = "hub")]
fn child(test: &str, dir: &Path, env: &[(&str, &Path)]) -> String {
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env("FLOPAUDIT_TEST_CHILD", "1")
        .env("HF_HUB_OFFLINE", "1")
        .env_remove("HF_HUB_CACHE")
        .env_remove("HUGGINGFACE_HUB_CACHE")
        .envs(env.iter().copied())
        .current_dir(dir)
        .output()
        .unwrap();
    String::from_utf8(output.stdout).unwrap()
}

#[test]
#[cfg(feature = "hub")]
fn without_a_spec_comes_what_lies_in_weights_then_the_hub_cache() {
    if std::env::var_os("FLOPAUDIT_TEST_CHILD").is_some() {
        match weights::open(None) {
            Ok(checkpoint) => println!("origin: {}", checkpoint.origin),
            Err(error) => println!("{error}"),
        }
        return;
    }
    let name = "without_a_spec_comes_what_lies_in_weights_then_the_hub_cache";
    let (home, work) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let run = || child(name, work.path(), &[("HF_HOME", home.path())]);
    assert_says(&run(), &["Qwen/Qwen2.5-0.5B-Instruct: not cached", "--model synthetic"]);

    let commit = "0123456789abcdef0123456789abcdef01234567";
    let repo = home.path().join("hub/models--Qwen--Qwen2.5-0.5B-Instruct");
    let snapshot = repo.join("snapshots").join(commit);
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir_all(repo.join("refs")).unwrap();
    fs::write(repo.join("refs/main"), commit).unwrap();
    write_text_side(&snapshot, &tiny());
    write_single(&snapshot, &tensors(&tiny()));
    assert_says(&run(), &["origin: Qwen/Qwen2.5-0.5B-Instruct from the hub (safetensors, 1 file)"]);

    fs::create_dir(work.path().join("weights")).unwrap();
    assert_says(&run(), &["origin: Qwen/"]);
    let file = work.path().join("weights/model.gguf");
    write_gguf(&file, &metadata(&tiny()), &tensors(&tiny()), GgmlDType::Q8_0);
    assert_says(&run(), &["origin: weights/model.gguf (GGUF, F32/Q8_0)", "F32/Q8_0)"]);
}
