//! A directory in the Hugging Face layout: config.json, memory-mapped *.safetensors (one file,
//! or shards with an index), tokenizer.json and what goes with it.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

pub(super) use super::shards::Shards;
use super::{Checkpoint, Source, Weights};
use crate::{
    config::{Ignored, Matters, ModelConfig},
    error::{Error, Result},
    text::Text,
};

pub(super) const SINGLE: &str = "model.safetensors";
pub(super) const INDEX: &str = "model.safetensors.index.json";
/// A PEFT adapter.
const ADAPTER: &str = "adapter_model.safetensors";
/// Files that may lie beside a model and are no part of it.
const ASIDE: [(&str, &str, Matters); 3] = [
    // transformers applies it when it opens the folder.
    (ADAPTER, "is an adapter, which is not applied without --adapter", Matters::Always),
    ("adapter_config.json", "is an adapter's, which --adapter takes", Matters::Never),
    ("checkpoint.safetensors", "is what a training of this program resumes from", Matters::Never),
];

/// Opens a checkpoint directory; `id` is the hub's name of it, if it came from there.
pub(super) fn open(dir: &Path, id: Option<&str>) -> Result<Checkpoint> {
    let config_file = dir.join("config.json");
    if !config_file.is_file() {
        let why = "holds no config.json (and not exactly one .gguf file)".into();
        return Err(Error::Weights { file: dir.into(), why }.into());
    }
    let (mut config, mut ignored) = ModelConfig::read(&config_file)?;
    let mut shards = Shards::open_model(dir)?;
    shards.refuse_quantized()?;
    settle_head(&mut config, &mut shards, &config_file, &mut ignored)?;
    let files = shards.files();
    ignored.append(&mut shards.take_ignored());
    for (name, why, matters) in ASIDE {
        let file = dir.join(name);
        if file.is_file() {
            let entry = Ignored::new(file.display().to_string(), "*", why);
            ignored.push(entry.where_it(matters));
        }
    }
    let weights = Weights { source: Source::Safetensors(shards) };
    ignored.extend(weights.check(&config)?);
    let text = Text::from_directory(dir, config.vocab_size)?;
    let name = id.map_or_else(|| dir.display().to_string(), String::from);
    let from = if id.is_some() { " from the hub" } else { "" };
    let plural = if files == 1 { "" } else { "s" };
    let origin = format!("{name}{from} (safetensors, {files} file{plural})");
    Ok(Checkpoint { config, weights, text, name, origin, synthetic: false, ignored })
}

/// What becomes of a head where the config says that it is the embedding: saved under one name, the
/// pair is found by the other; saved as two tensors that differ, it is no pair.
fn settle_head(
    config: &mut ModelConfig,
    shards: &mut Shards,
    config_file: &Path,
    ignored: &mut Vec<Ignored>,
) -> Result<()> {
    const EMBEDDING: &str = "model.embed_tokens.weight";
    const HEAD: &str = "lm_head.weight";
    if !config.tie_word_embeddings {
        return Ok(());
    }
    match (shards.shape(EMBEDDING), shards.shape(HEAD)) {
        (_, None) => {}
        (None, Some(_)) => shards.rename(HEAD, EMBEDDING),
        (Some(one), Some(other)) if one == other && shards.same(EMBEDDING, HEAD)? => {
            let why = "is the embedding once more, which the config makes the head";
            ignored.push(Ignored::new(shards.origin(HEAD), HEAD, why));
        }
        (Some(_), Some(_)) => {
            (config.tie_word_embeddings, config.head_stored_apart) = (false, true);
            let why = "is true, but the head that is stored is not the embedding: the stored one \
                       is used";
            let file = config_file.display().to_string();
            let entry = Ignored::new(file, "tie_word_embeddings", why);
            ignored.push(entry.where_it(Matters::Always));
        }
    }
    Ok(())
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

/// The directory's files whose names end so, sorted, without those that may lie beside a model.
pub(super) fn files_ending(dir: &Path, end: &str) -> Result<Vec<PathBuf>> {
    let fail = |e: std::io::Error| Error::Weights { file: dir.into(), why: e.to_string() };
    let mut files = vec![];
    for entry in std::fs::read_dir(dir).map_err(fail)? {
        let entry = entry.map_err(fail)?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.ends_with(end) && ASIDE.iter().all(|(aside, ..)| name != *aside) {
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

/// Refuses a directory that holds no safetensors, with what it does hold.
pub(super) fn no_weights(dir: &Path) -> Result<anyhow::Error> {
    const OTHERS: [&str; 7] = [".bin", ".pth", ".pt", ".ckpt", ".h5", ".msgpack", ".onnx"];
    let weights = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        // Beside weights, a training leaves other files of that kind.
        (!name.starts_with("training_args") && !name.starts_with("optimizer")).then_some(name)
    };
    let mut found = vec![];
    for end in OTHERS {
        found.extend(files_ending(dir, end)?.iter().filter_map(weights));
    }
    let adapter = dir.join(ADAPTER).is_file();
    let why = match found.first() {
        Some(name) => format!(
            "holds `{name}`, and no safetensors; that kind of file is not read: load it with \
             transformers and save it by save_pretrained"
        ),
        None if adapter => format!("holds {ADAPTER} alone; give it by --adapter, with its base"),
        None => format!("holds no weights: no {SINGLE}, no {INDEX}, no .gguf"),
    };
    Ok(Error::Weights { file: dir.into(), why }.into())
}
