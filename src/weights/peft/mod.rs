//! A LoRA adapter that PEFT saved: adapter_config.json and adapter_model.safetensors.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use candle_core::{DType, Device, Tensor};
use serde_json::Value;

use super::{
    directory::Shards,
    place::place,
    save::{Named, save},
};
use crate::{
    config::{LoraConfig, ModelConfig, Projection},
    error::{Error, Result},
    ledger::Lora,
    target::Target,
};

const CONFIG: &str = "adapter_config.json";
const MODEL: &str = "adapter_model.safetensors";

/// An adapter opened and checked against a model's config; its tensors are loaded on demand.
#[derive(Debug)]
pub struct PeftAdapter {
    /// Rank, alpha and targets. Under `use_rslora` alpha is multiplied by sqrt(rank), so that
    /// [`LoraConfig::scaling`] is alpha / sqrt(rank), as that option asks.
    pub lora: LoraConfig,
    /// One line for reports: the directory and what it holds.
    pub origin: String,
    shards: Shards,
    widths: Vec<(Projection, usize, usize)>,
}

/// Writes an adapter of the model `base` to `dir`, as PEFT saves one: `tensors` by its names.
///
/// # Errors
/// A folder that cannot be written, or a full disk; each file is whole or as before.
pub fn save_adapter(dir: &Path, base: &str, lora: &LoraConfig, tensors: &[Named]) -> Result<()> {
    let targets: Vec<&str> = lora.targets.iter().map(|target| target.name()).collect();
    let config = serde_json::json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": targets,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": false,
        "use_rslora": false,
        "use_dora": false,
        "init_lora_weights": true,
        "inference_mode": true,
    });
    Target::open(&dir.join(CONFIG))?.write(&config)?;
    let metadata = [("format".to_string(), "pt".to_string())].into();
    save(&dir.join(MODEL), tensors, metadata)
}

impl PeftAdapter {
    /// Opens an adapter directory made for a model of `config`.
    ///
    /// # Errors
    /// A missing or malformed file, another kind of adapter, an option that changes the maths
    /// and is not supported, a tensor that is missing, misshapen or not the model's.
    pub fn open(dir: &Path, config: &ModelConfig) -> Result<Self> {
        let file = dir.join(CONFIG);
        let options = Options::read(&file)?;
        let model = dir.join(MODEL);
        if !model.is_file() {
            let why = format!("no such file; an adapter directory holds {CONFIG} and {MODEL}");
            return Err(Error::Weights { file: model, why }.into());
        }
        let shards = Shards::open_files(dir, vec![model])?;
        let targets = match options.targets()? {
            Some(targets) => targets,
            None => projections_of(&shards),
        };
        let rank = options.rank()?;
        let lora = LoraConfig::new(config, rank, options.alpha(rank)?, &targets)
            .map_err(|e| options.fail(e.to_string()))?;
        let widths = lora.targets.iter().map(|&p| (p, p.widths(config).0, p.widths(config).1));
        let adapter = Self {
            widths: widths.collect(),
            origin: format!("{} (PEFT LoRA, rank {rank})", dir.display()),
            lora,
            shards,
        };
        adapter.check(config)?;
        Ok(adapter)
    }

    /// A of one projection: (rank, in), the first factor.
    ///
    /// # Errors
    /// A projection or layer without an adapter, or a value that is not finite.
    pub fn a(&self, layer: usize, p: Projection, dtype: DType, device: &Device) -> Result<Tensor> {
        self.load(&adapter_name(layer, p, Lora::A), dtype, device)
    }

    /// B of one projection: (out, rank), the second factor.
    ///
    /// # Errors
    /// As [`PeftAdapter::a`].
    pub fn b(&self, layer: usize, p: Projection, dtype: DType, device: &Device) -> Result<Tensor> {
        self.load(&adapter_name(layer, p, Lora::B), dtype, device)
    }

    fn load(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        place(self.shards.load(name)?, &self.shards.origin(name), name, dtype, device)
    }

    /// Every expected tensor is there with its shape, and no other.
    fn check(&self, config: &ModelConfig) -> Result<()> {
        let mut expected = BTreeSet::new();
        let rank = self.lora.rank;
        for layer in 0..config.num_hidden_layers {
            for &(p, k, n) in &self.widths {
                for (name, shape) in [
                    (adapter_name(layer, p, Lora::A), [rank, k]),
                    (adapter_name(layer, p, Lora::B), [n, rank]),
                ] {
                    let why = match self.shards.shape(&name) {
                        Some(found) if found == shape => {
                            expected.insert(name);
                            continue;
                        }
                        Some(found) => {
                            format!("has shape {found:?}; rank and model ask for {shape:?}")
                        }
                        None => format!("is missing; expected with shape {shape:?}"),
                    };
                    return Err(Error::tensor(self.shards.origin(&name), name, why).into());
                }
            }
        }
        match self.shards.names().filter(|name| !expected.contains(*name)).min() {
            None => Ok(()),
            Some(extra) => {
                let layers = config.num_hidden_layers;
                let why = format!(
                    "belongs to no projection in target_modules of this model's {layers} layers"
                );
                Err(Error::tensor(self.shards.origin(extra), extra, why).into())
            }
        }
    }
}

/// PEFT's name of one factor of an adapter; none but A and B are tensors.
pub fn adapter_name(layer: usize, p: Projection, part: Lora) -> String {
    let factor = if part == Lora::A { 'A' } else { 'B' };
    format!("base_model.model.model.layers.{layer}.{}.{p}.lora_{factor}.weight", p.parent())
}

/// The projections that an adapter file holds tensors of.
fn projections_of(shards: &Shards) -> Vec<Projection> {
    let held = |p: &Projection| shards.names().any(|n| n.contains(&format!(".{p}.lora_")));
    Projection::ALL.into_iter().filter(held).collect()
}

/// adapter_config.json, read key by key: an unknown key is no error, one that matters is.
struct Options {
    file: PathBuf,
    json: Value,
}

impl Options {
    /// Reads the file and refuses what this LoRA does not compute.
    fn read(file: &Path) -> Result<Self> {
        let fail = |why: String| Error::File { file: file.into(), why };
        let text = std::fs::read_to_string(file).map_err(|e| fail(e.to_string()))?;
        let json = serde_json::from_str(&text).map_err(|e| fail(format!("not valid JSON: {e}")))?;
        let options = Self { file: file.into(), json };
        match options.get("peft_type").and_then(Value::as_str) {
            Some("LORA") => {}
            Some(other) => return Err(options.fail(format!("`peft_type` is {other}, not LORA"))),
            None => return Err(options.fail("has no `peft_type`")),
        }
        options.refuse_other_maths()?;
        Ok(options)
    }

    fn refuse_other_maths(&self) -> Result<()> {
        // Each changes what is computed, or where. `false`, null, empty, "none" mean unused.
        const KEYS: [&str; 16] = [
            "use_dora",
            "bias",
            "lora_bias",
            "fan_in_fan_out",
            "rank_pattern",
            "alpha_pattern",
            "modules_to_save",
            "layers_to_transform",
            "layer_replication",
            "exclude_modules",
            "target_parameters",
            "trainable_token_indices",
            "use_qalora",
            "use_bdlora",
            "alora_invocation_tokens",
            "arrow_config",
        ];
        let used = |key: &&str| match self.get(key) {
            None | Some(Value::Bool(false)) => false,
            Some(Value::Object(map)) => !map.is_empty(),
            Some(Value::Array(list)) => !list.is_empty(),
            Some(Value::String(text)) => text != "none",
            Some(_) => true,
        };
        if let Some(key) = KEYS.iter().find(|key| used(key)) {
            return Err(self.fail(format!("`{key}` is {}, not supported", self.json[key])));
        }
        // These start from base weights that they have changed.
        let init = self.get("init_lora_weights").and_then(Value::as_str).unwrap_or_default();
        if ["pissa", "olora", "corda", "loftq"].iter().any(|kind| init.starts_with(kind)) {
            let why = format!("`init_lora_weights` is \"{init}\", which changes the base weights");
            return Err(self.fail(why));
        }
        Ok(())
    }

    fn fail(&self, why: impl Into<String>) -> anyhow::Error {
        Error::File { file: self.file.clone(), why: why.into() }.into()
    }

    /// A value that is present and not null.
    fn get(&self, key: &str) -> Option<&Value> {
        self.json.get(key).filter(|value| !value.is_null())
    }

    fn rank(&self) -> Result<usize> {
        let rank = self.get("r").and_then(Value::as_u64).and_then(|r| usize::try_from(r).ok());
        rank.filter(|r| *r > 0).ok_or_else(|| self.fail("`r` is not a positive integer"))
    }

    fn alpha(&self, rank: usize) -> Result<f64> {
        let alpha = self.get("lora_alpha").and_then(Value::as_f64);
        let alpha = alpha.ok_or_else(|| self.fail("`lora_alpha` is not a number"))?;
        let stabilised = self.get("use_rslora").and_then(Value::as_bool).unwrap_or(false);
        Ok(if stabilised { alpha * (rank as f64).sqrt() } else { alpha })
    }

    /// The projections named; `None` where a pattern names them, and the tensors must tell.
    fn targets(&self) -> Result<Option<Vec<Projection>>> {
        let parse = |name: &str| {
            let last = name.rsplit('.').next().unwrap_or(name);
            let unknown = format!("`target_modules` names `{name}`, no projection of a layer");
            last.parse::<Projection>().map_err(|_| self.fail(unknown))
        };
        match self.get("target_modules") {
            Some(Value::String(all)) if all == "all-linear" => Ok(Some(Projection::ALL.into())),
            Some(Value::String(text)) => Ok(text.parse().ok().map(|p| vec![p])),
            Some(Value::Array(list)) => list
                .iter()
                .map(|item| match item.as_str() {
                    Some(name) => parse(name),
                    None => Err(self.fail("`target_modules` holds what is no string")),
                })
                .collect::<Result<_>>()
                .map(Some),
            _ => Err(self.fail("`target_modules` is neither a list nor a string")),
        }
    }
}
