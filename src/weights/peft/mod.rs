//! A LoRA adapter that PEFT saved: adapter_config.json and adapter_model.safetensors.

mod keys;
mod modules;
mod names;
mod options;

use std::{collections::BTreeMap, path::Path};

use candle_core::{DType, Device, Tensor};
use serde::Serialize;
use serde_json::{Value, json};

pub use self::names::adapter_name;
use self::{
    names::{Factor, factor},
    options::Options,
};
use super::{
    directory::Shards,
    place::place,
    save::{Named, save},
};
use crate::{
    config::{Ignored, LoraConfig, ModelConfig, Modules, Projection},
    error::{Error, Result},
    ledger::Lora,
    target::Target,
};

const CONFIG: &str = "adapter_config.json";
const MODEL: &str = "adapter_model.safetensors";

/// An adapter opened and checked against a model's config; its tensors are loaded on demand.
#[derive(Debug)]
pub struct PeftAdapter {
    /// Ranks, alphas and places.
    pub lora: LoraConfig,
    /// One line for reports: the directory and what it holds.
    pub origin: String,
    /// What adapter_config.json says and does not change what is computed.
    pub ignored: Vec<Ignored>,
    shards: Shards,
    /// What the file calls each factor.
    names: BTreeMap<Factor, String>,
}

impl PeftAdapter {
    /// Opens an adapter directory made for a model of `config`.
    ///
    /// # Errors
    /// A missing or malformed file, another kind of adapter, an option that changes the maths
    /// and is not supported, a tensor that is missing, misshapen, held twice or not the model's.
    pub fn open(dir: &Path, config: &ModelConfig) -> Result<Self> {
        let mut options = Options::read(&dir.join(CONFIG))?;
        let lora = options.lora(config)?;
        let model = dir.join(MODEL);
        if !model.is_file() {
            let pickled = dir.join("adapter_model.bin").is_file();
            let why = match pickled {
                true => "no such file, and adapter_model.bin is not read: a pickle may run any \
                         code; save the adapter as safetensors"
                    .into(),
                false => format!("no such file; an adapter directory holds {CONFIG} and {MODEL}"),
            };
            return Err(Error::Weights { file: model, why }.into());
        }
        let shards = Shards::open_files(dir, vec![model])?;
        let names = factors(&shards, &lora, config)?;
        Ok(Self {
            origin: format!("{} (PEFT LoRA, rank {})", dir.display(), lora.ranks()),
            lora,
            ignored: options.ignored,
            shards,
            names,
        })
    }

    /// A of one projection: (rank, in), the first factor.
    ///
    /// # Errors
    /// A projection or layer without an adapter, or a value that is not finite.
    pub fn a(&self, layer: usize, p: Projection, dtype: DType, device: &Device) -> Result<Tensor> {
        self.load((layer, p, Lora::A), dtype, device)
    }

    /// B of one projection: (out, rank), the second factor.
    ///
    /// # Errors
    /// As [`PeftAdapter::a`].
    pub fn b(&self, layer: usize, p: Projection, dtype: DType, device: &Device) -> Result<Tensor> {
        self.load((layer, p, Lora::B), dtype, device)
    }

    fn load(&self, at: Factor, dtype: DType, device: &Device) -> Result<Tensor> {
        let plain = adapter_name(at.0, at.1, at.2);
        let name = self.names.get(&at).unwrap_or(&plain);
        place(self.shards.load(name)?, &self.shards.origin(name), name, dtype, device)
    }
}

/// The names of the factors of `lora`: every expected tensor is there once, with its shape, and no
/// other.
fn factors(
    shards: &Shards,
    lora: &LoraConfig,
    config: &ModelConfig,
) -> Result<BTreeMap<Factor, String>> {
    let fail = |name: &str, why: String| Err(Error::tensor(shards.origin(name), name, why).into());
    let mut all: Vec<&str> = shards.names().collect();
    all.sort_unstable();
    let mut held: BTreeMap<Factor, &str> = BTreeMap::new();
    for &name in &all {
        let Some(at) = factor(name) else {
            return fail(name, "is neither A nor B of a projection's adapter".into());
        };
        if let Some(other) = held.insert(at, name) {
            return fail(name, format!("is the same factor as `{other}`"));
        }
    }
    let mut names = BTreeMap::new();
    for (layer, projection, site) in lora.sites(config) {
        let ((k, n), r) = (projection.widths(config), site.rank);
        for (part, shape) in [(Lora::A, [r, k]), (Lora::B, [n, r])] {
            let at = (layer, projection, part);
            let Some(name) = held.remove(&at) else {
                let why = format!("is missing; expected with shape {shape:?}");
                return fail(&adapter_name(layer, projection, part), why);
            };
            match shards.shape(name) {
                Some(found) if found == shape => {}
                found => {
                    let found = found.unwrap_or_default();
                    let why = format!("has shape {found:?}; {CONFIG} and model ask for {shape:?}");
                    return fail(name, why);
                }
            }
            names.insert(at, name.into());
        }
    }
    match held.into_values().min() {
        None => Ok(names),
        Some(extra) => {
            let layers = config.num_hidden_layers;
            let why = format!(
                "belongs to no projection that {CONFIG} targets in this model's {layers} layers"
            );
            fail(extra, why)
        }
    }
}

/// Writes an adapter of the model `base` to `dir`, as PEFT saves one: `tensors` by its names.
///
/// # Errors
/// A folder that cannot be written, or a full disk; each file is whole or as before.
pub fn save_adapter(dir: &Path, base: &str, lora: &LoraConfig, tensors: &[Named]) -> Result<()> {
    let config = json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": lora.targets.iter().map(Modules::to_string).collect::<Vec<_>>(),
        "layers_to_transform": lora.layers,
        "rank_pattern": by_name(&lora.rank_pattern),
        "alpha_pattern": by_name(&lora.alpha_pattern),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": false,
        "use_rslora": lora.use_rslora,
        "use_dora": false,
        "init_lora_weights": true,
        "inference_mode": true,
    });
    Target::open(&dir.join(CONFIG))?.write(&config)?;
    let metadata = [("format".to_string(), "pt".to_string())].into();
    save(&dir.join(MODEL), tensors, metadata)
}

/// Values by modules' names. Of a config in its one spelling no module has two, so that their order
/// says nothing.
fn by_name<T: Serialize>(pattern: &BTreeMap<Modules, T>) -> Value {
    pattern.iter().map(|(modules, value)| (modules.to_string(), json!(value))).collect()
}
