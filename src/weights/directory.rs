//! A directory in the Hugging Face layout: config.json, memory-mapped *.safetensors (one file,
//! or shards with an index), tokenizer.json and what goes with it.

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

use candle_core::{Device, Tensor, safetensors::MmapedSafetensors};

use super::{Checkpoint, Source, Weights, cause};
use crate::{
    config::ModelConfig,
    error::{Error, Result},
    text::Text,
};

const SINGLE: &str = "model.safetensors";
pub(super) const INDEX: &str = "model.safetensors.index.json";
/// A PEFT adapter: beside a model it is no part of it.
const ADAPTER: &str = "adapter_model.safetensors";

/// Opens a checkpoint directory; `id` is the hub's name of it, if it came from there.
pub(super) fn open(dir: &Path, id: Option<&str>) -> Result<Checkpoint> {
    let config_file = dir.join("config.json");
    if !config_file.is_file() {
        let why = "holds no config.json (and not exactly one .gguf file)".into();
        return Err(Error::Weights { file: dir.into(), why }.into());
    }
    let config = ModelConfig::from_file(&config_file)?;
    let shards = Shards::open_model(dir)?;
    let files = shards.files.len();
    let weights = Weights { source: Source::Safetensors(shards) };
    weights.check(&config)?;
    let text = Text::from_directory(dir, config.vocab_size)?;
    let name = id.map_or_else(|| dir.display().to_string(), String::from);
    let from = if id.is_some() { " from the hub" } else { "" };
    let plural = if files == 1 { "" } else { "s" };
    let origin = format!("{name}{from} (safetensors, {files} file{plural})");
    Ok(Checkpoint { config, weights, text, name, origin, synthetic: false })
}

/// Whether a directory holds any model file at all.
pub(super) fn holds_weights(dir: &Path) -> bool {
    let has = |end| files_ending(dir, end).is_ok_and(|files| !files.is_empty());
    dir.join(INDEX).is_file() || has(".safetensors") || has(".gguf")
}

/// Whether everything that [`open`] needs is there, every shard of an index included.
#[cfg_attr(not(feature = "hub"), expect(dead_code, reason = "asked of hub snapshots alone"))]
pub(super) fn complete(dir: &Path) -> bool {
    let has = |name: &str| dir.join(name).is_file();
    let shards =
        || read_index(&dir.join(INDEX)).is_ok_and(|index| index.values().all(|shard| has(shard)));
    has("config.json") && has("tokenizer.json") && (has(SINGLE) || (has(INDEX) && shards()))
}

/// The GGUF file that a directory without safetensors stands for, if there is exactly one.
pub(super) fn only_gguf(dir: &Path) -> Result<Option<PathBuf>> {
    if dir.join(INDEX).is_file() || !files_ending(dir, ".safetensors")?.is_empty() {
        return Ok(None);
    }
    let mut files = files_ending(dir, ".gguf")?;
    match files.len() {
        0 => Ok(None),
        1 => Ok(files.pop()),
        n => {
            let why = format!("holds {n} .gguf files; name the one to open");
            Err(Error::Weights { file: dir.into(), why }.into())
        }
    }
}

/// The directory's files whose names end so, sorted; a PEFT adapter's are left out.
fn files_ending(dir: &Path, end: &str) -> Result<Vec<PathBuf>> {
    let fail = |e: std::io::Error| Error::Weights { file: dir.into(), why: e.to_string() };
    let mut files = vec![];
    for entry in std::fs::read_dir(dir).map_err(fail)? {
        let entry = entry.map_err(fail)?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.ends_with(end) && name != ADAPTER {
            files.push(entry.path());
        }
    }
    files.sort();
    Ok(files)
}

/// The `weight_map` of an index: tensor name to shard file name.
pub(super) fn read_index(file: &Path) -> Result<HashMap<String, String>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: HashMap<String, String>,
    }
    let fail = |why: String| Error::Weights { file: file.into(), why };
    let text = crate::input::read_text(file).map_err(|e| fail(e.to_string()))?;
    let index: Index =
        serde_json::from_str(&text).map_err(|e| fail(format!("not a valid shard index: {e}")))?;
    let mut seen: Vec<_> = index.weight_map.values().collect();
    seen.sort();
    seen.dedup();
    // A shard lies beside its index: nothing else on the disk is the index's to name.
    if let Some(shard) = seen.into_iter().find(|s| Path::new(s).file_name() != Some(s.as_ref())) {
        return Err(fail(format!("names the shard `{shard}`, which is no plain file name")).into());
    }
    Ok(index.weight_map)
}

/// Memory-mapped safetensors files and which of them holds each tensor.
pub(super) struct Shards {
    dir: PathBuf,
    files: Vec<(PathBuf, MmapedSafetensors)>,
    holder: HashMap<String, usize>,
}

impl std::fmt::Debug for Shards {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let files: Vec<_> = self.files.iter().map(|(path, _)| path).collect();
        f.debug_struct("Shards").field("files", &files).finish_non_exhaustive()
    }
}

impl Shards {
    /// A model's files: the single one, the index's shards, or all safetensors that are there.
    fn open_model(dir: &Path) -> Result<Self> {
        let single = dir.join(SINGLE);
        if single.is_file() {
            return Self::open_files(dir, vec![single]);
        }
        let index = dir.join(INDEX);
        if index.is_file() {
            return Self::open_index(dir, &index);
        }
        let files = files_ending(dir, ".safetensors")?;
        if files.is_empty() {
            let why = format!("holds no weights: no {SINGLE}, no {INDEX}, no .gguf");
            return Err(Error::Weights { file: dir.into(), why }.into());
        }
        Self::open_files(dir, files)
    }

    fn open_index(dir: &Path, index: &Path) -> Result<Self> {
        let map = read_index(index)?;
        let mut names: Vec<&String> = map.values().collect();
        names.sort();
        names.dedup();
        for name in &names {
            if !dir.join(name).is_file() {
                let why = format!("missing, though {INDEX} names it");
                return Err(Error::Weights { file: dir.join(name), why }.into());
            }
        }
        let shards = Self::open_files(dir, names.iter().map(|name| dir.join(name)).collect())?;
        let mut tensors: Vec<_> = map.iter().collect();
        tensors.sort();
        for (tensor, shard) in tensors {
            let held = shards.holder.get(tensor).map(|&i| &shards.files[i].0);
            if held != Some(&dir.join(shard)) {
                let origin = dir.join(shard).display().to_string();
                let why = format!("is missing, though {INDEX} places it there");
                return Err(Error::tensor(origin, tensor, why).into());
            }
        }
        Ok(shards)
    }

    /// Maps each file and reads its header.
    pub(super) fn open_files(dir: &Path, paths: Vec<PathBuf>) -> Result<Self> {
        let mut files = Vec::with_capacity(paths.len());
        let mut holder = HashMap::new();
        for path in paths {
            let mapped = map(&path)?;
            for (name, _) in mapped.tensors() {
                holder.insert(name, files.len());
            }
            files.push((path, mapped));
        }
        Ok(Self { dir: dir.into(), files, holder })
    }

    /// Every tensor's name, in no order.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.holder.keys().map(String::as_str)
    }

    /// The names of the tensors that are none of `names` and of consequence.
    pub(super) fn beside<'a>(
        &'a self,
        names: impl Iterator<Item = &'a str>,
    ) -> impl Iterator<Item = &'a str> {
        // A head of its own beside a tied one is never read; frequencies are computed.
        let idle = |name: &str| name == "lm_head.weight" || name.ends_with("rotary_emb.inv_freq");
        let used: HashSet<&str> = names.collect();
        self.names().filter(move |name| !used.contains(name) && !idle(name))
    }

    /// The shape that the header declares.
    pub(super) fn shape(&self, name: &str) -> Option<Vec<usize>> {
        let file = &self.files[*self.holder.get(name)?].1;
        file.get(name).ok().map(|view| view.shape().to_vec())
    }

    /// The file that holds `name`; the only file, or the directory, where none does.
    pub(super) fn origin(&self, name: &str) -> String {
        let file = match (self.holder.get(name), self.files.as_slice()) {
            (Some(&index), files) => &files[index].0,
            (None, [(only, _)]) => only,
            _ => &self.dir,
        };
        file.display().to_string()
    }

    /// The tensor on the CPU, in the file's dtype.
    pub(super) fn load(&self, name: &str) -> Result<Tensor> {
        let missing = || Error::tensor(self.origin(name), name, "is missing");
        let &index = self.holder.get(name).ok_or_else(missing)?;
        self.files[index]
            .1
            .load(name, &Device::Cpu)
            .map_err(|e| Error::tensor(self.origin(name), name, cause(&e)).into())
    }
}

fn map(path: &Path) -> Result<MmapedSafetensors> {
    // SAFETY: the map is only read. A file that another process shortens meanwhile would end
    // this one, as it would any reader of a memory map.
    unsafe { MmapedSafetensors::new(path) }.map_err(|e| {
        let why = if is_lfs_pointer(path) {
            "is a Git LFS pointer, not the weights; run `git lfs pull`".into()
        } else {
            format!("truncated or not a safetensors file: {}", cause(&e))
        };
        Error::Weights { file: path.into(), why }.into()
    })
}

/// What a clone without Git LFS leaves in a file's place.
fn is_lfs_pointer(path: &Path) -> bool {
    const START: &[u8] = b"version https://git-lfs";
    let mut head = vec![];
    let read = File::open(path).and_then(|f| f.take(START.len() as u64).read_to_end(&mut head));
    read.is_ok() && head == START
}
