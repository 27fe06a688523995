//! Flags of new adapters.

use std::{collections::BTreeMap, fmt::Display, str::FromStr};

use clap::Args;

use crate::{
    config::{Layers, LoraConfig, ModelConfig, Modules, Projection, TargetModules},
    error::{Error, Result},
};

/// Which adapters.
#[derive(Debug, Args)]
#[command(next_help_heading = "LoRA")]
pub struct LoraArgs {
    /// Rank of the adapters; 0 is none [default: 0; of `train` 8]
    #[arg(long, value_name = "R")]
    pub lora_rank: Option<usize>,
    /// The adapters' output is scaled by alpha / rank [default: 16]
    #[arg(long, value_name = "ALPHA", allow_negative_numbers = true)]
    pub lora_alpha: Option<f64>,
    /// Adapted projections, all-linear for all seven; of one layer as layers.0.self_attn.q_proj
    /// [default: q_proj,v_proj]
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    pub lora_targets: Option<Vec<TargetModules>>,
    /// Layers that carry adapters, as 0-3,7 [default: all]
    #[arg(long, value_name = "LIST")]
    pub lora_layers: Option<Layers>,
    /// Ranks of their own: q_proj=16,layers.0.mlp.up_proj=4; one layer's goes before all layers'
    #[arg(long, value_name = "NAME=R", value_delimiter = ',', value_parser = named::<usize>)]
    pub lora_rank_pattern: Vec<(Modules, usize)>,
    /// Alphas of their own, likewise
    #[arg(long, value_name = "NAME=ALPHA", value_delimiter = ',', value_parser = named::<f64>)]
    pub lora_alpha_pattern: Vec<(Modules, f64)>,
}

/// A map of what names nothing twice.
fn once<T: Copy>(flag: &str, list: &[(Modules, T)]) -> Result<BTreeMap<Modules, T>> {
    let mut map = BTreeMap::new();
    for &(modules, value) in list {
        if map.insert(modules, value).is_some() {
            return Err(Error::flag(flag, format!("{modules} stands twice")).into());
        }
    }
    Ok(map)
}

/// Reads `NAME=VALUE`.
fn named<T: FromStr<Err: Display>>(text: &str) -> Result<(Modules, T), String> {
    let (name, value) = text.split_once('=').ok_or("write NAME=VALUE")?;
    let modules = name.trim().parse::<Modules>().map_err(|error| match error {
        Error::Flag { why, .. } => why,
        other => other.to_string(),
    })?;
    let value = value.trim();
    let parsed = value.parse().map_err(|error| format!("`{value}` of {modules}: {error}"))?;
    Ok((modules, parsed))
}

impl LoraArgs {
    /// The adapters' config, checked against the model's.
    pub fn config(&self, model: &ModelConfig) -> Result<LoraConfig> {
        let lora = self.unchecked()?;
        let given = [
            ("--lora-alpha", self.lora_alpha.is_some()),
            ("--lora-targets", self.lora_targets.is_some()),
            ("--lora-layers", self.lora_layers.is_some()),
        ];
        let without_rank = lora.rank == 0 && lora.rank_pattern.is_empty();
        match given.into_iter().find(|(_, given)| without_rank && *given) {
            Some((flag, _)) => Err(Error::flag(flag, "needs --lora-rank").into()),
            None => lora.checked(model),
        }
    }

    /// The same as the flags say it.
    pub fn unchecked(&self) -> Result<LoraConfig> {
        Ok(LoraConfig {
            rank: self.lora_rank.unwrap_or(0),
            alpha: self.lora_alpha.unwrap_or(16.0),
            targets: match &self.lora_targets {
                Some(targets) => TargetModules::modules(targets),
                None => vec![Projection::QProj.into(), Projection::VProj.into()],
            },
            layers: self.lora_layers.clone(),
            rank_pattern: once("--lora-rank-pattern", &self.lora_rank_pattern)?,
            alpha_pattern: once("--lora-alpha-pattern", &self.lora_alpha_pattern)?,
            use_rslora: false,
        })
    }
}

/// Flags of new adapters, which a trained one has no use for.
pub const ADAPTER_FLAGS: [&str; 6] = [
    "lora_rank",
    "lora_alpha",
    "lora_targets",
    "lora_layers",
    "lora_rank_pattern",
    "lora_alpha_pattern",
];
