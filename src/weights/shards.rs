//! Memory-mapped safetensors files, and which of them holds each tensor under which name.

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

use candle_core::{DType, Device, Tensor, safetensors::MmapedSafetensors};

use super::{
    aliases::canonical,
    cause,
    directory::{INDEX, SINGLE, files_ending, no_weights, read_index},
};
use crate::{
    config::Ignored,
    error::{Error, Result},
};

/// How the names of tensors end that hold a quantized weight, and of what scheme they are.
const QUANTIZED: [(&str, &str); 10] = [
    (".qweight", "GPTQ or AWQ"),
    (".qzeros", "GPTQ or AWQ"),
    (".scales", "MLX, GPTQ or AWQ"),
    (".weight_packed", "compressed-tensors"),
    (".weight_scale", "fp8 or int8"),
    (".weight_scale_inv", "fp8"),
    (".weight.absmax", "bitsandbytes"),
    (".weight.quant_map", "bitsandbytes"),
    (".SCB", "bitsandbytes"),
    (".weight_blocks", "MXFP4"),
];

/// Memory-mapped safetensors files and which of them holds each tensor.
pub(super) struct Shards {
    dir: PathBuf,
    files: Vec<(PathBuf, MmapedSafetensors)>,
    holder: HashMap<String, Held>,
    ignored: Vec<Ignored>,
}

/// Where a tensor is.
struct Held {
    file: usize,
    /// What the file calls it.
    name: String,
}

impl std::fmt::Debug for Shards {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let files: Vec<_> = self.files.iter().map(|(path, _)| path).collect();
        f.debug_struct("Shards").field("files", &files).finish_non_exhaustive()
    }
}

impl Shards {
    /// A model's files: the single one, the index's shards, or all safetensors that are there.
    pub(super) fn open_model(dir: &Path) -> Result<Self> {
        let (single, index) = (dir.join(SINGLE), dir.join(INDEX));
        let all = files_ending(dir, ".safetensors")?;
        let mut shards = match (single.is_file(), index.is_file()) {
            (true, _) => Self::open_as(dir, vec![single], canonical)?,
            (false, true) => Self::open_index(dir, &index)?,
            (false, false) if all.is_empty() => return Err(no_weights(dir)?),
            (false, false) => Self::open_as(dir, all.clone(), canonical)?,
        };
        let opened = |path: &PathBuf| shards.files.iter().any(|(file, _)| file == path);
        let aside: Vec<PathBuf> = all.into_iter().filter(|path| !opened(path)).collect();
        aside.into_iter().try_for_each(|path| shards.set_aside(path))?;
        Ok(shards)
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
        let paths = names.iter().map(|name| dir.join(name)).collect();
        let shards = Self::open_as(dir, paths, canonical)?;
        let mut tensors: Vec<_> = map.iter().collect();
        tensors.sort();
        for (tensor, shard) in tensors {
            let path = dir.join(shard);
            let file = shards.files.iter().find(|(file, _)| *file == path);
            if file.is_none_or(|(_, file)| file.get(tensor).is_err()) {
                let why = format!("is missing, though {INDEX} places it there");
                return Err(Error::tensor(path.display().to_string(), tensor, why).into());
            }
        }
        Ok(shards)
    }

    /// Maps each file and reads its header; tensors are known by the names that the files use.
    pub(super) fn open_files(dir: &Path, paths: Vec<PathBuf>) -> Result<Self> {
        Self::open_as(dir, paths, str::to_string)
    }

    /// The same, each tensor known by what `known_as` makes of its name.
    fn open_as(dir: &Path, paths: Vec<PathBuf>, known_as: fn(&str) -> String) -> Result<Self> {
        let (files, holder) = (Vec::with_capacity(paths.len()), HashMap::new());
        let mut shards = Self { dir: dir.into(), files, holder, ignored: vec![] };
        for path in paths {
            let mapped = map(&path)?;
            let mut names: Vec<String> =
                mapped.tensors().into_iter().map(|(name, _)| name).collect();
            names.sort();
            let file = shards.files.len();
            shards.files.push((path, mapped));
            for name in names {
                let known = known_as(&name);
                match shards.holder.get(&known) {
                    Some(_) => shards.hold_twice(&known, file, &name)?,
                    None => {
                        shards.holder.insert(known, Held { file, name });
                    }
                }
            }
        }
        Ok(shards)
    }

    /// A tensor that is held already is found once more, in `file` as `name`: the same is listed,
    /// another is refused.
    fn hold_twice(&mut self, known: &str, file: usize, name: &str) -> Result<()> {
        let (path, again) = &self.files[file];
        let first = &self.holder[known];
        let (path, first_path) = (path.display().to_string(), self.origin(known));
        if !same_tensor(&self.files[first.file].1, &first.name, again, name)? {
            let why = format!("is `{}` of {first_path} too, with other values", first.name);
            return Err(Error::tensor(path, name, why).into());
        }
        let why = format!("is the same as `{}` of {first_path}", first.name);
        self.ignored.push(Ignored::new(path, name, why));
        Ok(())
    }

    /// A file beside those that make up the model: listed, unless it holds one of their tensors
    /// with other values.
    fn set_aside(&mut self, path: PathBuf) -> Result<()> {
        let mapped = map(&path)?;
        let file = path.display().to_string();
        for (name, _) in mapped.tensors() {
            let Some(held) = self.holder.get(&canonical(&name)) else { continue };
            if !same_tensor(&self.files[held.file].1, &held.name, &mapped, &name)? {
                let other = self.files[held.file].0.display();
                let why = format!("is in {other} too, with other values; keep one of the files");
                return Err(Error::tensor(file, name, why).into());
            }
        }
        let why =
            "is not read: the model is in other files, and this holds none of it that differs";
        self.ignored.push(Ignored::new(file, "*", why));
        Ok(())
    }

    /// How many files there are.
    pub(super) fn files(&self) -> usize {
        self.files.len()
    }

    /// What was found on opening and is not used; empty from then on.
    pub(super) fn take_ignored(&mut self) -> Vec<Ignored> {
        std::mem::take(&mut self.ignored)
    }

    /// Every tensor's name, in no order.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.holder.keys().map(String::as_str)
    }

    /// The names of the tensors that are none of `names`.
    pub(super) fn beside<'a>(
        &'a self,
        names: impl Iterator<Item = &'a str>,
    ) -> impl Iterator<Item = &'a str> {
        let used: HashSet<&str> = names.collect();
        self.names().filter(move |name| !used.contains(name))
    }

    /// Names the first tensor of a weight that is quantized.
    pub(super) fn refuse_quantized(&self) -> Result<()> {
        let scheme = |name: &str| QUANTIZED.iter().find(|(end, _)| name.ends_with(end));
        let first = self.names().filter_map(|name| Some((name, scheme(name)?.1))).min();
        let Some((name, scheme)) = first else { return Ok(()) };
        let why = format!(
            "is of a quantized weight ({scheme}), which is not supported; take the checkpoint \
             that it was made from, or a GGUF"
        );
        Err(Error::tensor(self.origin(name), name, why).into())
    }

    /// Makes the tensor `from` known as `to`.
    pub(super) fn rename(&mut self, from: &str, to: &str) {
        if let Some(held) = self.holder.remove(from) {
            self.holder.insert(to.into(), held);
        }
    }

    /// Whether two tensors that are held are one, element by element.
    pub(super) fn same(&self, one: &str, other: &str) -> Result<bool> {
        match (self.holder.get(one), self.holder.get(other)) {
            (Some(a), Some(b)) => {
                same_tensor(&self.files[a.file].1, &a.name, &self.files[b.file].1, &b.name)
            }
            (None, _) | (_, None) => Ok(false),
        }
    }

    /// The shape that the header declares.
    pub(super) fn shape(&self, name: &str) -> Option<Vec<usize>> {
        let held = self.holder.get(name)?;
        self.files[held.file].1.get(&held.name).ok().map(|view| view.shape().to_vec())
    }

    /// The file that holds `name`; the only file, or the directory, where none does.
    pub(super) fn origin(&self, name: &str) -> String {
        let file = match (self.holder.get(name), self.files.as_slice()) {
            (Some(held), files) => &files[held.file].0,
            (None, [(only, _)]) => only,
            _ => &self.dir,
        };
        file.display().to_string()
    }

    /// The tensor on the CPU, in the file's dtype.
    pub(super) fn load(&self, name: &str) -> Result<Tensor> {
        let missing = || Error::tensor(self.origin(name), name, "is missing");
        let held = self.holder.get(name).ok_or_else(missing)?;
        let loaded = self.files[held.file].1.load(&held.name, &Device::Cpu);
        loaded.map_err(|e| Error::tensor(self.origin(name), name, cause(&e)).into())
    }
}

/// Whether two files hold the same values, in whatever type each keeps them.
fn same_tensor(
    file: &MmapedSafetensors,
    name: &str,
    other_file: &MmapedSafetensors,
    other: &str,
) -> Result<bool> {
    let (one, two) = (file.get(name)?, other_file.get(other)?);
    if one.shape() != two.shape() {
        return Ok(false);
    }
    if one.dtype() == two.dtype() {
        return Ok(one.data() == two.data());
    }
    let values = |file: &MmapedSafetensors, name: &str| {
        let tensor = file.load(name, &Device::Cpu)?.to_dtype(DType::F32)?;
        tensor.flatten_all()?.to_vec1::<f32>()
    };
    Ok(values(file, name)? == values(other_file, other)?)
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
