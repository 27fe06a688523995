//! Small checkpoints on disk, in each layout, all with the tensors of `synthetic:tiny`.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    path::{Path, PathBuf},
};

use candle_core::{
    DType, Device, Tensor,
    quantized::{
        GgmlDType, QTensor,
        gguf_file::{self, Value},
    },
};
use flopaudit::{
    config::ModelConfig,
    weights::{self, Checkpoint},
};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

pub const EMBEDDING: &str = "model.embed_tokens.weight";
pub const CHAT: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n\
                        {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

pub type Tensors = HashMap<String, Tensor>;

pub fn tiny() -> ModelConfig {
    ModelConfig::preset("tiny").unwrap()
}

/// Every tensor of `config`, random.
pub fn tensors(config: &ModelConfig) -> Tensors {
    let random = weights::synthetic(config.clone(), 1).unwrap().weights;
    let load = |(name, shape): (String, Vec<usize>)| {
        let tensor = random.tensor(&name, &shape, DType::F32, &Device::Cpu).unwrap();
        (name, tensor)
    };
    weights::tensor_shapes(config).into_iter().map(load).collect()
}

pub fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// config.json and a byte-level tokenizer.json with two special tokens.
pub fn write_text_side(dir: &Path, config: &ModelConfig) {
    fs::write(dir.join("config.json"), serde_json::to_string(config).unwrap()).unwrap();
    let vocab: BTreeMap<String, usize> = alphabet().into_iter().zip(0..).collect();
    let special = |id, content| {
        serde_json::json!({
            "id": id, "content": content, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true
        })
    };
    let byte_level = serde_json::json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false
    });
    let tokenizer = serde_json::json!({
        "version": "1.0",
        "added_tokens": [special(256, "<|im_start|>"), special(257, "<|im_end|>")],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []}
    });
    fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).unwrap();
}

/// The 256 characters that stand for bytes, in some fixed order.
pub fn alphabet() -> Vec<String> {
    let mut all: Vec<String> = ByteLevel::alphabet().into_iter().map(String::from).collect();
    all.sort();
    all
}

pub fn write_single(dir: &Path, tensors: &Tensors) -> PathBuf {
    let file = dir.join("model.safetensors");
    candle_core::safetensors::save(tensors, &file).unwrap();
    file
}

/// A directory with config, tokenizer and one safetensors file.
pub fn directory(config: &ModelConfig, tensors: &Tensors) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    write_text_side(dir.path(), config);
    write_single(dir.path(), tensors);
    dir
}

/// The same in two shards and their index.
pub fn sharded(config: &ModelConfig, tensors: &Tensors) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    write_text_side(dir.path(), config);
    let mut names: Vec<&String> = tensors.keys().collect();
    names.sort();
    let mut map = BTreeMap::new();
    for (part, names) in names.chunks(names.len().div_ceil(2)).enumerate() {
        let file = format!("model-{}-of-00002.safetensors", part + 1);
        let shard: Tensors =
            names.iter().map(|name| ((*name).clone(), tensors[*name].clone())).collect();
        candle_core::safetensors::save(&shard, dir.path().join(&file)).unwrap();
        map.extend(names.iter().map(|name| ((*name).clone(), file.clone())));
    }
    let index = serde_json::json!({"metadata": {}, "weight_map": map});
    fs::write(dir.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
    dir
}

pub type Metadata = BTreeMap<String, Value>;

/// What llama.cpp writes for a model of `config`, with a byte-level tokenizer.
pub fn metadata(config: &ModelConfig) -> Metadata {
    let mut tokens = alphabet();
    let added = ["<|im_start|>", "<|im_end|>", "<tool_call>", "[PAD259]"];
    let types = [vec![1; 256], vec![3, 3, 4, 5]].concat();
    tokens.extend(added.map(String::from));
    let count = |n: usize| Value::U32(n as u32);
    let strings = |list: Vec<String>| Value::Array(list.into_iter().map(Value::String).collect());
    let text = |s: &str| Value::String(s.into());
    [
        ("general.architecture", text("qwen2")),
        ("qwen2.embedding_length", count(config.hidden_size)),
        ("qwen2.block_count", count(config.num_hidden_layers)),
        ("qwen2.feed_forward_length", count(config.intermediate_size)),
        ("qwen2.attention.head_count", count(config.num_attention_heads)),
        ("qwen2.attention.head_count_kv", count(config.num_key_value_heads)),
        ("qwen2.context_length", count(config.max_position_embeddings)),
        ("qwen2.rope.freq_base", Value::F32(config.rope_theta as f32)),
        ("qwen2.attention.layer_norm_rms_epsilon", Value::F32(config.rms_norm_eps as f32)),
        ("tokenizer.ggml.model", text("gpt2")),
        ("tokenizer.ggml.pre", text("qwen2")),
        ("tokenizer.ggml.tokens", strings(tokens)),
        ("tokenizer.ggml.token_type", Value::Array(types.into_iter().map(Value::I32).collect())),
        ("tokenizer.ggml.merges", Value::Array(vec![])),
        ("tokenizer.ggml.eos_token_id", Value::U32(257)),
        ("tokenizer.chat_template", text(CHAT)),
    ]
    .map(|(key, value)| (key.to_string(), value))
    .into()
}

/// The Hugging Face name of a tensor, as llama.cpp renames it.
fn gguf_name(name: &str) -> String {
    let pairs = [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("model.layers", "blk"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.", "attn_"),
        ("mlp.", "ffn_"),
        ("_proj", ""),
    ];
    pairs.iter().fold(name.to_string(), |name, (from, to)| name.replace(from, to))
}

pub fn write_gguf(file: &Path, metadata: &Metadata, tensors: &Tensors, dtype: GgmlDType) {
    let mut quantized: Vec<(String, QTensor)> = tensors
        .iter()
        .map(|(name, tensor)| {
            let whole = tensor.dims().last().is_some_and(|n| n % dtype.block_size() == 0);
            let dtype = if tensor.rank() == 2 && whole { dtype } else { GgmlDType::F32 };
            (gguf_name(name), QTensor::quantize(tensor, dtype).unwrap())
        })
        .collect();
    quantized.sort_by(|a, b| a.0.cmp(&b.0));
    let tensors: Vec<_> = quantized.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let metadata: Vec<_> = metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
    gguf_file::write(&mut fs::File::create(file).unwrap(), &metadata, &tensors).unwrap();
}

pub fn open(path: &Path) -> anyhow::Result<Checkpoint> {
    weights::open(path.to_str())
}

/// The one line that opening gives.
pub fn error(path: &Path) -> String {
    one_line(&open(path).unwrap_err())
}

pub fn one_line(error: &anyhow::Error) -> String {
    assert_eq!(flopaudit::error::Error::exit_code(error), 2);
    let typed = error.downcast_ref::<flopaudit::error::Error>();
    assert!(typed.is_some(), "not an error of the user's making: {error:#}");
    let text = error.to_string();
    assert!(!text.contains('\n'), "{text}");
    text
}
