//! Where weights come from: the hub, a directory of safetensors, a GGUF file, or a seed.
//!
//! [`open`] turns `--model` into a [`Checkpoint`] whose tensors all exist with the shapes that
//! the config asks for; [`Weights::tensor`] then loads one, converted, placed and finite.

mod aliases;
mod directory;
mod gguf;
mod header;
mod hub;
mod peft;
mod place;
mod save;
mod shards;
mod synthetic;

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};

pub(crate) use self::gguf::Metadata;
pub use self::{
    peft::{PeftAdapter, adapter_name, save_adapter},
    save::{Named, fingerprint, read, save},
    synthetic::synthetic,
};
use crate::{
    config::{Ignored, ModelConfig, Projection},
    error::{Error, Result},
    text::Text,
};

/// The checkpoint that `--model` stands for where it is not given.
pub const DEFAULT_MODEL: &str = "Qwen/Qwen2.5-0.5B-Instruct";

/// Looked at before the hub where `--model` is not given.
const LOCAL: &str = "weights";

/// A checkpoint opened and checked: what the model is, its tensors, its text side.
#[derive(Debug)]
pub struct Checkpoint {
    /// The model's widths and counts.
    pub config: ModelConfig,
    /// Its tensors, loaded on demand.
    pub weights: Weights,
    /// Its tokenizer and chat template.
    pub text: Text,
    /// What other programs find it by: its hub id or path; `synthetic:…` for random weights.
    pub name: String,
    /// One line for reports, for example `weights/model.gguf (GGUF, …)`.
    pub origin: String,
    /// Random weights of the true shapes: the same FLOPs, meaningless text.
    pub synthetic: bool,
    /// What its files hold and a run does not use, with the reasons.
    pub ignored: Vec<Ignored>,
}

impl Checkpoint {
    /// What of its files is not used; none where there are no files.
    pub fn listed(&self) -> Option<&[Ignored]> {
        (!self.synthetic || !self.ignored.is_empty()).then_some(&self.ignored)
    }
}

/// The tensors of a checkpoint, by the names of its Hugging Face layout. Shared freely between
/// threads.
#[derive(Debug)]
pub struct Weights {
    source: Source,
}

#[derive(Debug)]
enum Source {
    Safetensors(directory::Shards),
    Gguf(gguf::Gguf),
    Synthetic(synthetic::Synthetic),
}

/// Opens what `--model` names; `None` is `./weights` if it holds any, else [`DEFAULT_MODEL`].
///
/// `spec` is a directory (config.json, *.safetensors, tokenizer.json, or one .gguf), a `.gguf`
/// file, `synthetic[:preset][:seed]`, or a hub id, `owner/name`. What exists on disk wins.
///
/// # Errors
/// No such file, an unreachable hub, a malformed file, or a tensor that is missing or misshapen.
/// Values are read, and found not finite, only by [`Weights::tensor`].
pub fn open(spec: Option<&str>) -> Result<Checkpoint> {
    open_split(spec, None)
}

/// [`open`], with the pre-tokenizer that splits text in place of the one that a GGUF file names:
/// `qwen2`, `llama-bpe` and others, as llama.cpp calls them.
///
/// # Errors
/// As [`open`]; a pre-tokenizer that is unknown, or for what brings its own: `--pretokenizer`.
pub fn open_split(spec: Option<&str>, pretokenizer: Option<&str>) -> Result<Checkpoint> {
    let path = match spec {
        Some(spec) => Path::new(spec),
        None => Path::new(LOCAL),
    };
    let local = match spec {
        Some(spec) => !is_synthetic(spec) && path.exists(),
        None => directory::holds_weights(path),
    };
    if local {
        return open_path(path, pretokenizer);
    }
    if let Some(name) = pretokenizer {
        let why = format!("{name}: is for GGUF files; this model brings its own tokenizer or none");
        return Err(Error::flag("--pretokenizer", why).into());
    }
    let Some(spec) = spec else { return open_hub(DEFAULT_MODEL) };
    if is_synthetic(spec) {
        synthetic::open(spec)
    } else if looks_like_path(spec) {
        let why = "no such file or directory".into();
        Err(Error::Weights { file: path.into(), why }.into())
    } else if is_hub_id(spec) {
        open_hub(spec)
    } else {
        let why = format!(
            "`{spec}` is neither a file nor a directory, nor a hub id (owner/name), nor \
             synthetic[:preset][:seed]"
        );
        Err(Error::flag("--model", why).into())
    }
}

/// Whether [`open`] without a spec would find a checkpoint without asking the hub.
pub fn default_is_local() -> bool {
    directory::holds_weights(Path::new(LOCAL)) || hub::cached(DEFAULT_MODEL).is_some()
}

/// Where hub checkpoints are kept; none in a build without the hub.
pub fn hub_cache() -> Option<PathBuf> {
    hub::cache()
}

fn is_synthetic(spec: &str) -> bool {
    spec == "synthetic" || spec.starts_with("synthetic:")
}

fn open_path(path: &Path, pretokenizer: Option<&str>) -> Result<Checkpoint> {
    if path.is_dir() {
        return match (directory::only_gguf(path)?, pretokenizer) {
            (Some(file), pretokenizer) => gguf::open(&file, pretokenizer),
            (None, None) => directory::open(path, None),
            (None, Some(name)) => {
                let why = format!("{name}: {} brings its own, tokenizer.json", path.display());
                Err(Error::flag("--pretokenizer", why).into())
            }
        };
    }
    match path.extension().and_then(|e| e.to_str()) {
        Some("safetensors") => {
            let why = "is one file of a checkpoint; give its directory, which also holds \
                       config.json and tokenizer.json";
            Err(Error::Weights { file: path.into(), why: why.into() }.into())
        }
        _ => gguf::open(path, pretokenizer),
    }
}

fn open_hub(id: &str) -> Result<Checkpoint> {
    let snapshot = hub::snapshot(id)?;
    directory::open(&snapshot, Some(id))
}

/// A spec that can only have been meant as a file, so that its absence is no hub failure.
fn looks_like_path(spec: &str) -> bool {
    spec.starts_with(['.', '/', '~', '\\'])
        || spec.matches('/').count() >= 2
        || spec.ends_with('/')
        || [".gguf", ".safetensors", ".json"].iter().any(|end| spec.ends_with(end))
}

fn is_hub_id(spec: &str) -> bool {
    let valid = |part: &str| {
        !part.is_empty()
            && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
    };
    spec.split_once('/').is_some_and(|(owner, name)| valid(owner) && valid(name))
}

impl Weights {
    /// The tensor `name` as a contiguous `dtype` tensor on `device`, every element finite.
    ///
    /// Names are the Hugging Face checkpoint's (`model.layers.0.self_attn.q_proj.weight`,
    /// `model.embed_tokens.weight`, `lm_head.weight`), whatever the file calls them.
    ///
    /// # Errors
    /// A tensor that is missing, of another shape than `shape`, truncated, or not finite in the
    /// file or, where narrower, in `dtype`.
    pub fn tensor(
        &self,
        name: &str,
        shape: &[usize],
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        let origin = self.origin(name);
        self.check_shape(name, shape)?;
        let tensor = match &self.source {
            Source::Safetensors(shards) => shards.load(name)?,
            Source::Gguf(gguf) => gguf.load(name)?,
            Source::Synthetic(synthetic) => synthetic.load(name, shape)?,
        };
        place::place(tensor, &origin, &self.own_name(name), dtype, device)
    }

    /// Whether the checkpoint holds a tensor of that name.
    pub fn contains(&self, name: &str) -> bool {
        self.shape(name).is_some()
    }

    /// The shape that the file declares, outermost dimension first.
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        match &self.source {
            Source::Safetensors(shards) => shards.shape(name),
            Source::Gguf(gguf) => gguf.shape(name),
            Source::Synthetic(synthetic) => synthetic.shape(name),
        }
    }

    /// The file that holds `name`, or should.
    fn origin(&self, name: &str) -> String {
        match &self.source {
            Source::Safetensors(shards) => shards.origin(name),
            Source::Gguf(gguf) => gguf.origin(),
            Source::Synthetic(_) => "synthetic".into(),
        }
    }

    /// What the file calls the tensor `name`, for errors.
    fn own_name(&self, name: &str) -> String {
        match &self.source {
            Source::Gguf(gguf) => gguf.own_name(name),
            Source::Safetensors(_) | Source::Synthetic(_) => name.into(),
        }
    }

    fn check_shape(&self, name: &str, expected: &[usize]) -> Result<()> {
        let why = match self.shape(name) {
            Some(found) if found == expected => return Ok(()),
            Some(found) => format!("has shape {found:?}; the config asks for {expected:?}"),
            None => format!("is missing; the config asks for it with shape {expected:?}"),
        };
        Err(Error::tensor(self.origin(name), self.own_name(name), why).into())
    }

    /// Names the first tensor that the config asks for and the file does not hold as such, or that
    /// the file holds and the config does not ask for: it would change what the model computes.
    /// What is left over and would not is listed.
    fn check(&self, config: &ModelConfig) -> Result<Vec<Ignored>> {
        let shapes = tensor_shapes(config);
        shapes.iter().try_for_each(|(name, shape)| self.check_shape(name, shape))?;
        let names = shapes.iter().map(|(name, _)| name.as_str());
        let mut beside: Vec<&str> = match &self.source {
            Source::Safetensors(shards) => shards.beside(names).collect(),
            Source::Gguf(gguf) => gguf.beside(names).collect(),
            Source::Synthetic(_) => vec![],
        };
        beside.sort_unstable();
        // The head is settled before: beside a tied one it is the embedding once more.
        beside.retain(|name| *name != "lm_head.weight");
        let (computed, foreign): (Vec<_>, Vec<_>) =
            beside.into_iter().partition(|name| name.ends_with("rotary_emb.inv_freq"));
        if let Some(name) = foreign.first() {
            let more = match foreign.len() {
                1 => String::new(),
                n => format!(" (nor are {} others)", n - 1),
            };
            let why = format!("is no part of the model that the config describes{more}");
            return Err(Error::tensor(self.origin(name), *name, why).into());
        }
        let listed = |name: &str| {
            Ignored::new(self.origin(name), name, "is computed from the config, not read")
        };
        Ok(computed.into_iter().map(listed).collect())
    }
}

/// Every tensor that a model of this config has: checkpoint name and shape, in file order.
///
/// A tied head is the embedding and has no tensor of its own.
pub fn tensor_shapes(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let (v, d) = (config.vocab_size, config.hidden_size);
    let mut all = vec![("model.embed_tokens.weight".to_string(), vec![v, d])];
    for layer in 0..config.num_hidden_layers {
        let layer = format!("model.layers.{layer}");
        let norm = |name: &str, width| (format!("{layer}.{name}.weight"), vec![width]);
        all.push(norm("input_layernorm", d));
        for p in Projection::ALL {
            let (k, n) = p.widths(config);
            let name = format!("{layer}.{}.{p}", p.parent());
            all.push((format!("{name}.weight"), vec![n, k]));
            if config.has_bias(p) {
                all.push((format!("{name}.bias"), vec![n]));
            }
        }
        if config.qk_norm {
            let names = ["self_attn.q_norm", "self_attn.k_norm"];
            all.extend(names.map(|name| norm(name, config.head_dim())));
        }
        all.push(norm("post_attention_layernorm", d));
        if config.sandwich_norms {
            let names = ["pre_feedforward_layernorm", "post_feedforward_layernorm"];
            all.extend(names.map(|name| norm(name, d)));
        }
    }
    all.push(("model.norm.weight".into(), vec![d]));
    if !config.tie_word_embeddings {
        all.push(("lm_head.weight".into(), vec![v, d]));
    }
    all
}

/// A backend error's own message: no path that the caller names anyway, no backtrace, one line.
fn cause(error: &candle_core::Error) -> String {
    use candle_core::Error as E;
    match error {
        E::WithPath { inner, .. } | E::WithBacktrace { inner, .. } | E::Context { inner, .. } => {
            cause(inner)
        }
        other => other.to_string().lines().next().unwrap_or_default().to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Biases;

    #[test]
    fn listed_tensors_hold_exactly_the_parameters() {
        let presets = ModelConfig::preset_names().map(|name| ModelConfig::preset(name).unwrap());
        for config in presets.chain(choices()) {
            let listed: u128 = tensor_shapes(&config)
                .iter()
                .map(|(_, shape)| shape.iter().product::<usize>() as u128)
                .sum();
            assert_eq!(listed, config.parameters(), "{config:?}");
        }
    }

    /// A small config of every choice of tensors in which families differ.
    fn choices() -> impl Iterator<Item = ModelConfig> {
        (0..1 << 6).map(|bits: u32| {
            let on = |bit: u32| bits & (1 << bit) != 0;
            ModelConfig {
                bias: Biases { qkv: on(0), o: on(1), mlp: on(2) },
                qk_norm: on(3),
                sandwich_norms: on(4),
                tie_word_embeddings: on(5),
                head_stored_apart: false,
                head_dim: Some(12),
                ..ModelConfig::preset("tiny").unwrap()
            }
        })
    }

    #[test]
    fn sandwiched_layers_have_four_norms() {
        let config = ModelConfig {
            sandwich_norms: true,
            qk_norm: true,
            num_hidden_layers: 1,
            ..ModelConfig::preset("tiny").unwrap()
        };
        let names = tensor_shapes(&config).into_iter().map(|(name, _)| name);
        let norms: Vec<_> = names.filter(|name| name.ends_with("norm.weight")).collect();
        let layer = "model.layers.0.";
        let expected = [
            "input_layernorm",
            "self_attn.q_norm",
            "self_attn.k_norm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        ]
        .map(|name| format!("{layer}{name}.weight"));
        assert_eq!(norms, [&expected[..], &["model.norm.weight".into()]].concat());
    }

    #[test]
    fn what_can_only_be_a_path_is_not_asked_of_the_hub() {
        for spec in ["./a", "/a/b", "a/b/c", "model.gguf", "a/model.gguf", "~/x", "../up", "dir/"] {
            assert!(looks_like_path(spec), "{spec}");
            let error = open(Some(spec)).unwrap_err().to_string();
            assert!(error.contains("no such file or directory"), "{error}");
        }
        assert!(!looks_like_path(DEFAULT_MODEL) && is_hub_id(DEFAULT_MODEL));
        for spec in ["gpt2", "a/b?c", "", "owner/"] {
            assert!(!is_hub_id(spec), "{spec}");
        }
        let error = open(Some("gpt2")).unwrap_err().to_string();
        assert!(error.starts_with("--model: `gpt2` is neither"), "{error}");
    }
}
