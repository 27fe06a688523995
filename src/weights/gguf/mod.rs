//! A GGUF file of one of the supported architectures: memory-mapped, dequantized tensor by tensor;
//! config, tokenizer and chat template from its metadata.

mod architecture;
mod metadata;
mod names;
mod rope;

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    fs::File,
    io::Cursor,
    path::{Path, PathBuf},
};

use candle_core::{
    CpuStorage, Device, Storage, Tensor,
    quantized::{
        ggml_file::qtensor_from_ggml,
        gguf_file::{Content, TensorInfo},
    },
};
use memmap2::Mmap;
use rayon::prelude::*;

pub(crate) use self::metadata::Metadata;
use self::{
    architecture::{Architecture, Tensors},
    names::gguf_name,
};
use super::{Checkpoint, Source, Weights, cause, header};
use crate::{
    config::{Ignored, ModelConfig, Projection},
    error::{Error, Result},
    text::Text,
};

/// Elements that one thread dequantizes at a time; a multiple of every block size.
const CHUNK: usize = 1 << 16;

/// What rotary frequencies are divided by: no tensor of the checkpoint, but a part of its config.
const FREQUENCY_FACTORS: &str = "rope_freqs.weight";

/// Opens a GGUF file and checks every tensor's shape and extent; values are read later.
pub(super) fn open(path: &Path, pretokenizer: Option<&str>) -> Result<Checkpoint> {
    let (file, content) = Mapped::open(path)?;
    let metadata = Metadata::new(path, &content.metadata);
    let architecture = Architecture::of(&metadata)?;
    let factors = file.infos.get(FREQUENCY_FACTORS);
    let factors = factors.map(|info| file.values(FREQUENCY_FACTORS, info)).transpose()?;
    let tensors = Tensors {
        vocab: file.rows("token_embd.weight")?,
        tied: !file.infos.contains_key("output.weight"),
        has_bias: &|projection| {
            let name = format!("model.layers.0.{}.{projection}.bias", projection.parent());
            gguf_name(&name, false).is_some_and(|name| file.infos.contains_key(&name))
        },
        factors: factors.as_deref(),
    };
    let mut config = architecture.config(&metadata, &tensors)?;
    // A GGUF does not say whether its model ties the two; that of the published model does.
    config.head_stored_apart = !tensors.tied && config.published_ties() == Some(true);
    let text = Text::from_gguf(&metadata, pretokenizer, config.vocab_size)?;
    let name = path.display().to_string();
    let split = pretokenizer.map_or_else(String::new, |name| format!(", text split as {name}"));
    let origin = format!("{name} (GGUF, {}{split})", file.types().join("/"));
    let weights = Weights { source: Source::Gguf(Gguf::new(file, architecture, &config)) };
    let mut ignored = architecture.ignored(&metadata);
    if factors.is_some_and(|factors| factors.iter().all(|factor| *factor == 1.0)) {
        let entry = Ignored::new(metadata.origin(), FREQUENCY_FACTORS, "divides by 1");
        ignored.push(entry);
    }
    ignored.extend(weights.check(&config)?);
    Ok(Checkpoint { config, weights, text, name, origin, synthetic: false, ignored })
}

/// The tensors of a file, by the names and in the form of a Hugging Face checkpoint.
#[derive(Debug)]
pub(super) struct Gguf {
    file: Mapped,
    architecture: &'static Architecture,
    sandwich_norms: bool,
    /// Heads of q and of k.
    heads: [usize; 2],
}

impl Gguf {
    fn new(file: Mapped, architecture: &'static Architecture, config: &ModelConfig) -> Self {
        let heads = [config.num_attention_heads, config.num_key_value_heads];
        Self { file, architecture, sandwich_norms: config.sandwich_norms, heads }
    }

    pub(super) fn origin(&self) -> String {
        self.file.origin()
    }

    /// What the file calls the tensor `name`, or would.
    pub(super) fn own_name(&self, name: &str) -> String {
        gguf_name(name, self.sandwich_norms).unwrap_or_else(|| name.into())
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.file.infos.get(&gguf_name(name, self.sandwich_norms)?)
    }

    pub(super) fn shape(&self, name: &str) -> Option<Vec<usize>> {
        Some(self.info(name)?.shape.dims().to_vec())
    }

    /// The tensors, as the file calls them, that stand for none of `names`.
    pub(super) fn beside<'a>(
        &'a self,
        names: impl Iterator<Item = &'a str>,
    ) -> impl Iterator<Item = &'a str> {
        let mut used: HashSet<String> =
            names.filter_map(|name| gguf_name(name, self.sandwich_norms)).collect();
        used.insert(FREQUENCY_FACTORS.into());
        self.file.infos.keys().map(String::as_str).filter(move |name| !used.contains(*name))
    }

    /// The tensor on the CPU, in f32.
    pub(super) fn load(&self, name: &str) -> Result<Tensor> {
        let own = self.own_name(name);
        let missing = || Error::tensor(self.origin(), &own, "is missing");
        let info = self.info(name).ok_or_else(missing)?;
        let mut values = self.file.values(&own, info)?;
        if let Some(heads) = self.interleaved_heads(name) {
            values = halves_of_heads(&values, heads, info.shape.dims().get(1).map_or(1, |n| *n));
        }
        if self.architecture.unit_offset_norms && name.ends_with("norm.weight") {
            values.iter_mut().for_each(|gain| *gain -= 1.0);
        }
        Ok(Tensor::from_vec(values, info.shape.clone(), &Device::Cpu)?)
    }

    /// How many heads' rows the file holds in another order than the checkpoint; none: as it does.
    fn interleaved_heads(&self, name: &str) -> Option<usize> {
        let of = |projection: Projection| name.contains(&format!(".{projection}."));
        let [q, k] = self.heads;
        let heads =
            if of(Projection::QProj) { Some(q) } else { of(Projection::KProj).then_some(k) };
        heads.filter(|_| self.architecture.interleaved)
    }
}

/// Rows of `width` values in the checkpoint's order: of each head the first half, then the second.
///
/// Where neighbours are rotated together, the file has the rows of the two halves in turn.
fn halves_of_heads(values: &[f32], heads: usize, width: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(values.len());
    for head in values.chunks_exact((values.len() / heads).max(1)) {
        for half in 0..2 {
            head.chunks_exact(width).skip(half).step_by(2).for_each(|row| out.extend(row));
        }
    }
    out
}

/// A mapped file and where its tensors lie.
struct Mapped {
    path: PathBuf,
    map: Mmap,
    infos: HashMap<String, TensorInfo>,
    /// Where the tensors' bytes begin.
    start: u64,
}

impl std::fmt::Debug for Mapped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mapped").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Mapped {
    /// Maps a file and reads its header; each tensor lies within the file.
    fn open(path: &Path) -> Result<(Self, Content)> {
        let fail = |why: String| Error::Weights { file: path.into(), why };
        let file = File::open(path).map_err(|e| fail(e.to_string()))?;
        // SAFETY: the map is only read. A file that another process shortens meanwhile would end
        // this one, as it would any reader of a memory map.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| fail(e.to_string()))?;
        header::check(&map).map_err(fail)?;
        let mut content = Content::read(&mut Cursor::new(&map[..]))
            .map_err(|e| fail(format!("truncated or malformed GGUF header: {}", cause(&e))))?;
        let infos = std::mem::take(&mut content.tensor_infos);
        let mapped = Self { path: path.into(), map, infos, start: content.tensor_data_offset };
        mapped.check_extents()?;
        Ok((mapped, content))
    }

    fn origin(&self) -> String {
        self.path.display().to_string()
    }

    /// The tensor types that occur, for the origin line.
    fn types(&self) -> Vec<String> {
        let types = self.infos.values().map(|info| format!("{:?}", info.ggml_dtype));
        types.collect::<BTreeSet<_>>().into_iter().collect()
    }

    fn rows(&self, tensor: &str) -> Result<usize> {
        let missing = || Error::tensor(self.origin(), tensor, "is missing");
        let info = self.infos.get(tensor).ok_or_else(missing)?;
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
        let mut infos: Vec<_> = self.infos.iter().collect();
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
        let start = self.start.checked_add(info.offset);
        let start = start.and_then(|start| usize::try_from(start).ok());
        let range = start.zip(length).and_then(|(a, n)| Some(a..a.checked_add(n)?));
        range.and_then(|range| self.map.get(range)).ok_or_else(|| {
            let size = self.map.len();
            format!("of shape {dims:?} reaches past the file's end at {size} bytes: truncated?")
        })
    }

    /// A tensor's values, dequantized to f32, on all threads; `name` is for errors.
    fn values(&self, name: &str, info: &TensorInfo) -> Result<Vec<f32>> {
        let fail = |why: String| Error::tensor(self.origin(), name, why);
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
        Ok(values)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_in_turn_become_halves() {
        let (heads, half, width) = (3, 4, 2);
        let row = |head: usize, side: usize, i: usize| {
            [0, 1].map(|column| (100 * head + 10 * side + 2 * i + column) as f32)
        };
        let mut file = vec![];
        let mut checkpoint = vec![];
        for head in 0..heads {
            file.extend((0..half).flat_map(|i| [row(head, 0, i), row(head, 1, i)]).flatten());
            let sides = (0..2).flat_map(|side| (0..half).map(move |i| (side, i)));
            checkpoint.extend(sides.flat_map(|(side, i)| row(head, side, i)));
        }
        assert_eq!(halves_of_heads(&file, heads, width), checkpoint);
        assert_eq!(halves_of_heads(&[0.0, 2.0, 1.0, 3.0], 1, 1), [0.0, 1.0, 2.0, 3.0]);
    }
}
