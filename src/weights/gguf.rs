//! A GGUF file of the qwen2 architecture: memory-mapped, dequantized tensor by tensor; config,
//! tokenizer and chat template from its metadata.

use std::{
    collections::BTreeSet,
    fs::File,
    io::Cursor,
    path::{Path, PathBuf},
};

use candle_core::{
    CpuStorage, Device, Storage, Tensor,
    quantized::{
        ggml_file::qtensor_from_ggml,
        gguf_file::{Content, TensorInfo, Value},
    },
};
use memmap2::Mmap;
use rayon::prelude::*;

use super::{Checkpoint, Source, Weights, cause, header};
use crate::{
    config::ModelConfig,
    error::{Error, Result},
    text::Text,
};

/// Elements that one thread dequantizes at a time; a multiple of every block size.
const CHUNK: usize = 1 << 16;

/// A mapped file and its header.
pub(super) struct Gguf {
    path: PathBuf,
    map: Mmap,
    content: Content,
}

impl std::fmt::Debug for Gguf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gguf").field("path", &self.path).finish_non_exhaustive()
    }
}

/// Opens a GGUF file and checks every tensor's shape and extent; values are read later.
pub(super) fn open(path: &Path) -> Result<Checkpoint> {
    let mut gguf = Gguf::map(path)?;
    let config = gguf.config()?;
    gguf.check_extents()?;
    let text = Text::from_gguf(&mut gguf.content, path, config.vocab_size)?;
    let name = path.display().to_string();
    let origin = format!("{name} (GGUF, {})", gguf.types().join("/"));
    let weights = Weights { source: Source::Gguf(gguf) };
    weights.check(&config)?;
    Ok(Checkpoint { config, weights, text, name, origin, synthetic: false })
}

impl Gguf {
    fn map(path: &Path) -> Result<Self> {
        let fail = |why: String| Error::Weights { file: path.into(), why };
        let file = File::open(path).map_err(|e| fail(e.to_string()))?;
        // SAFETY: the map is only read. A file that another process shortens meanwhile would end
        // this one, as it would any reader of a memory map.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| fail(e.to_string()))?;
        header::check(&map).map_err(fail)?;
        let content = Content::read(&mut Cursor::new(&map[..]))
            .map_err(|e| fail(format!("truncated or malformed GGUF header: {}", cause(&e))))?;
        Ok(Self { path: path.into(), map, content })
    }

    pub(super) fn origin(&self) -> String {
        self.path.display().to_string()
    }

    /// The tensor types that occur, for the origin line.
    fn types(&self) -> Vec<String> {
        let types = self.content.tensor_infos.values().map(|i| format!("{:?}", i.ggml_dtype));
        types.collect::<BTreeSet<_>>().into_iter().collect()
    }

    fn bad_key(&self, key: &str, why: impl Into<String>) -> anyhow::Error {
        Error::Config { origin: self.origin(), key: key.into(), why: why.into() }.into()
    }

    /// The model config that the `qwen2.*` metadata describes.
    fn config(&self) -> Result<ModelConfig> {
        let metadata = &self.content.metadata;
        let key = "general.architecture";
        match metadata.get(key) {
            Some(Value::String(name)) if name == "qwen2" => {}
            Some(Value::String(name)) => {
                let why = format!("is `{name}`; only qwen2 models are supported");
                return Err(self.bad_key(key, why));
            }
            _ => return Err(self.bad_key(key, "is missing; is this a model?")),
        }
        if self.integer("split.count")?.is_some_and(|n| n > 1) {
            return Err(self.bad_key("split.count", "is above 1; merge the parts into one file"));
        }
        if let Some(Value::String(kind)) = metadata.get("qwen2.rope.scaling.type")
            && kind != "none"
        {
            let why = format!("asks for `{kind}` RoPE scaling, which is not supported");
            return Err(self.bad_key("qwen2.rope.scaling.type", why));
        }
        const EPSILON: &str = "qwen2.attention.layer_norm_rms_epsilon";
        let need = |key: &str| -> Result<usize> {
            self.integer(key)?.ok_or_else(|| self.bad_key(key, "is missing"))
        };
        let config = ModelConfig {
            vocab_size: self.rows("token_embd.weight")?,
            hidden_size: need("qwen2.embedding_length")?,
            intermediate_size: need("qwen2.feed_forward_length")?,
            num_hidden_layers: need("qwen2.block_count")?,
            num_attention_heads: need("qwen2.attention.head_count")?,
            num_key_value_heads: need("qwen2.attention.head_count_kv")?,
            head_dim: self.integer("qwen2.attention.key_length")?,
            max_position_embeddings: need("qwen2.context_length")?,
            rope_theta: self.float("qwen2.rope.freq_base")?.unwrap_or(10_000.0),
            rms_norm_eps: self
                .float(EPSILON)?
                .ok_or_else(|| self.bad_key(EPSILON, "is missing"))?,
            tie_word_embeddings: !self.content.tensor_infos.contains_key("output.weight"),
            use_sliding_window: self
                .integer("qwen2.attention.sliding_window")?
                .is_some_and(|window| window > 0),
            hidden_act: "silu".into(),
        };
        config.validate(&self.origin())?;
        Ok(config)
    }

    fn integer(&self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.content.metadata.get(key) else { return Ok(None) };
        let number = match *value {
            Value::I8(n) => usize::try_from(n).ok(),
            Value::I16(n) => usize::try_from(n).ok(),
            Value::I32(n) => usize::try_from(n).ok(),
            Value::I64(n) => usize::try_from(n).ok(),
            _ => value.to_u64().ok().and_then(|n| usize::try_from(n).ok()),
        };
        number.map(Some).ok_or_else(|| self.bad_key(key, "is not a count"))
    }

    fn float(&self, key: &str) -> Result<Option<f64>> {
        match self.content.metadata.get(key) {
            None => Ok(None),
            Some(Value::F64(x)) => Ok(Some(*x)),
            // Through the shortest decimal: the f32 nearest to 1e-6 was meant as 1e-6.
            Some(Value::F32(x)) => Ok(x.to_string().parse().ok()),
            Some(_) => Err(self.bad_key(key, "is not a float")),
        }
    }

    fn rows(&self, tensor: &str) -> Result<usize> {
        let missing = || Error::tensor(self.origin(), tensor, "is missing");
        let info = self.content.tensor_infos.get(tensor).ok_or_else(missing)?;
        match info.shape.dims() {
            [rows, _] => Ok(*rows),
            dims => {
                let why = format!("has shape {dims:?}; an embedding has two dimensions");
                Err(Error::tensor(self.origin(), tensor, why).into())
            }
        }
    }

    /// Names the first tensor whose bytes do not lie within the file.
    fn check_extents(&self) -> Result<()> {
        let mut infos: Vec<_> = self.content.tensor_infos.iter().collect();
        infos.sort_by_key(|(name, info)| (info.offset, *name));
        for (name, info) in infos {
            self.bytes(info).map_err(|why| Error::tensor(self.origin(), name, why))?;
        }
        Ok(())
    }

    /// The bytes of a tensor, none of whose header fields is trusted.
    fn bytes(&self, info: &TensorInfo) -> Result<&[u8], String> {
        let dims = info.shape.dims();
        let (block, width) = (info.ggml_dtype.block_size(), info.ggml_dtype.type_size());
        if !dims.last().is_some_and(|n| n.is_multiple_of(block)) {
            let dtype = info.ggml_dtype;
            return Err(format!("has shape {dims:?}, not whole {dtype:?} blocks of {block}"));
        }
        let elements = dims.iter().try_fold(1usize, |n, &dim| n.checked_mul(dim));
        let length = elements.and_then(|n| (n / block).checked_mul(width));
        let start = self.content.tensor_data_offset.checked_add(info.offset);
        let start = start.and_then(|start| usize::try_from(start).ok());
        let range = start.zip(length).and_then(|(a, n)| Some(a..a.checked_add(n)?));
        range.and_then(|range| self.map.get(range)).ok_or_else(|| {
            let size = self.map.len();
            format!("of shape {dims:?} reaches past the file's end at {size} bytes: truncated?")
        })
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.content.tensor_infos.get(&gguf_name(name)?)
    }

    pub(super) fn shape(&self, name: &str) -> Option<Vec<usize>> {
        Some(self.info(name)?.shape.dims().to_vec())
    }

    /// The tensor on the CPU, dequantized to f32, on all threads.
    pub(super) fn load(&self, name: &str) -> Result<Tensor> {
        let fail = |why: String| Error::tensor(self.origin(), name, why);
        let info = self.info(name).ok_or_else(|| fail("is missing".into()))?;
        let bytes = self.bytes(info).map_err(fail)?;
        let dtype = info.ggml_dtype;
        let stride = CHUNK / dtype.block_size() * dtype.type_size();
        let mut values = vec![0f32; info.shape.elem_count()];
        values.par_chunks_mut(CHUNK).zip(bytes.par_chunks(stride)).try_for_each(|(out, raw)| {
            // A copy, for candle reads whole blocks through a pointer that must be aligned.
            let raw = raw.to_vec();
            qtensor_from_ggml(dtype, &raw, vec![out.len()], &Device::Cpu)
                .and_then(|blocks| blocks.dequantize(&Device::Cpu))
                .and_then(|tensor| copy_f32(&tensor, out))
                .map_err(|e| fail(cause(&e)))
        })?;
        Ok(Tensor::from_vec(values, info.shape.clone(), &Device::Cpu)?)
    }
}

fn copy_f32(tensor: &Tensor, out: &mut [f32]) -> candle_core::Result<()> {
    let (storage, _) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(CpuStorage::F32(values)) if values.len() == out.len() => {
            out.copy_from_slice(values);
            Ok(())
        }
        _ => candle_core::bail!("did not dequantize to f32"),
    }
}

/// The GGUF's name of a tensor that the Hugging Face layout calls `name`.
fn gguf_name(name: &str) -> Option<String> {
    match name {
        "model.embed_tokens.weight" => return Some("token_embd.weight".into()),
        "model.norm.weight" => return Some("output_norm.weight".into()),
        "lm_head.weight" => return Some("output.weight".into()),
        _ => {}
    }
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let (module, kind) = rest.rsplit_once('.')?;
    let module = match module {
        "input_layernorm" => "attn_norm",
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "self_attn.o_proj" => "attn_output",
        "post_attention_layernorm" => "ffn_norm",
        "mlp.gate_proj" => "ffn_gate",
        "mlp.up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        _ => return None,
    };
    Some(format!("blk.{layer}.{module}.{kind}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_map_to_those_of_llama_cpp() {
        for (ours, theirs) in [
            ("model.embed_tokens.weight", Some("token_embd.weight")),
            ("lm_head.weight", Some("output.weight")),
            ("model.layers.11.self_attn.q_proj.bias", Some("blk.11.attn_q.bias")),
            ("model.layers.0.mlp.down_proj.weight", Some("blk.0.ffn_down.weight")),
            ("model.layers.0.post_attention_layernorm.weight", Some("blk.0.ffn_norm.weight")),
            ("model.layers.0.self_attn.q_norm.weight", None),
            ("model.layers", None),
        ] {
            assert_eq!(gguf_name(ours).as_deref(), theirs);
        }
    }
}
