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
    config::{Family, ModelConfig},
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
    fs::write(dir.join("config.json"), config.to_hub().unwrap().to_string()).unwrap();
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
    let count = |n: usize| Value::U32(n as u32);
    let float = |x: f64| Value::F32(x as f32);
    let architecture = match config.family {
        Family::Qwen2 => "qwen2",
        Family::Llama | Family::Mistral => "llama",
        Family::Qwen3 => "qwen3",
        Family::Gemma3 => "gemma3",
    };
    let mut keys = vec![
        ("embedding_length", count(config.hidden_size)),
        ("block_count", count(config.num_hidden_layers)),
        ("feed_forward_length", count(config.intermediate_size)),
        ("attention.head_count", count(config.num_attention_heads)),
        ("attention.head_count_kv", count(config.num_key_value_heads)),
        ("context_length", count(config.max_position_embeddings)),
        ("rope.freq_base", float(config.rope.theta)),
        ("attention.layer_norm_rms_epsilon", float(config.rms_norm_eps)),
    ];
    if let Some(width) = config.head_dim {
        let lengths = ["attention.key_length", "attention.value_length", "rope.dimension_count"];
        keys.extend(lengths.map(|key| (key, count(width))));
    }
    if let Some(window) = &config.window {
        let layers = window.layers.iter().copied().map(Value::Bool).collect();
        keys.push(("attention.sliding_window", count(window.width)));
        keys.push(("attention.sliding_window_pattern", Value::Array(layers)));
    }
    if let Some(rope) = &config.local_rope {
        keys.push(("rope.freq_base_swa", float(rope.theta)));
    }
    let keys = keys.into_iter().map(|(key, value)| (format!("{architecture}.{key}"), value));
    let named = ("general.architecture".to_string(), Value::String(architecture.into()));
    keys.chain([named]).chain(text_metadata()).collect()
}

/// The tokenizer and chat template of [`write_text_side`], and two tokens more.
fn text_metadata() -> Metadata {
    let mut tokens = alphabet();
    let added = ["<|im_start|>", "<|im_end|>", "<tool_call>", "[PAD259]"];
    let types = [vec![1; 256], vec![3, 3, 4, 5]].concat();
    tokens.extend(added.map(String::from));
    let strings = |list: Vec<String>| Value::Array(list.into_iter().map(Value::String).collect());
    let text = |s: &str| Value::String(s.into());
    [
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

/// The Hugging Face name of a tensor, as llama.cpp renames it in a model of `architecture`.
fn gguf_name(name: &str, architecture: &str) -> String {
    let after_attention = if architecture == "gemma3" { "post_attention_norm" } else { "ffn_norm" };
    let pairs = [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("model.layers", "blk"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", after_attention),
        ("pre_feedforward_layernorm", "ffn_norm"),
        ("post_feedforward_layernorm", "post_ffw_norm"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.", "attn_"),
        ("mlp.", "ffn_"),
        ("_proj", ""),
    ];
    pairs.iter().fold(name.to_string(), |name, (from, to)| name.replace(from, to))
}

/// A tensor as llama.cpp stores it: Llama's rows of q and k with the halves of a head in turn,
/// Gemma's gains plus 1.
fn stored(name: &str, tensor: &Tensor, metadata: &Metadata, architecture: &str) -> Tensor {
    let of_heads = [("q_proj.", "head_count"), ("k_proj.", "head_count_kv")];
    let of_heads = of_heads.into_iter().find(|(projection, _)| name.contains(projection));
    match (architecture, of_heads) {
        ("llama", Some((_, key))) => {
            let heads = metadata[&format!("llama.attention.{key}")].to_u32().unwrap() as usize;
            let rows = tensor.dims()[0];
            let halves = tensor.reshape((heads, 2, rows / heads / 2, ())).unwrap();
            halves.transpose(1, 2).unwrap().contiguous().unwrap().reshape(tensor.shape()).unwrap()
        }
        ("gemma3", _) if name.ends_with("norm.weight") => (tensor + 1.0).unwrap(),
        _ => tensor.clone(),
    }
}

pub fn write_gguf(file: &Path, metadata: &Metadata, tensors: &Tensors, dtype: GgmlDType) {
    let architecture = match metadata.get("general.architecture") {
        Some(Value::String(name)) => name,
        _ => "",
    };
    let mut quantized: Vec<(String, QTensor)> = tensors
        .iter()
        .map(|(name, tensor)| {
            let tensor = stored(name, tensor, metadata, architecture);
            let whole = tensor.dims().last().is_some_and(|n| n % dtype.block_size() == 0);
            let dtype = if tensor.rank() == 2 && whole { dtype } else { GgmlDType::F32 };
            (gguf_name(name, architecture), QTensor::quantize(&tensor, dtype).unwrap())
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
