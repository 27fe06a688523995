//! One workload over a grid of its dimensions: `seq=128..4096:*2`, `lora-rank=1,2,4,8`.

mod axis;

pub use axis::{Axis, Key, Value, numbers};

use std::collections::BTreeMap;

use serde::{Serialize, Serializer};

use crate::{
    SCHEMA_VERSION,
    analytic::{self, Structure},
    config::{LoraConfig, ModelConfig},
    error::{Error, Result},
    ledger::Dtype,
    prices::{Prices, Primitives},
    tally::Component,
    workload::{Task, Workload},
};

/// Most points of a grid.
pub const MOST_POINTS: usize = 1_000_000;

/// What stays the same in all points, or is replaced by an axis.
#[derive(Debug, Clone)]
pub struct Base {
    /// The model.
    pub model: ModelConfig,
    /// Its adapters, unchecked.
    pub lora: LoraConfig,
    /// What is run.
    pub task: Task,
}

/// The product of some axes, counted. FLOPs are exact.
#[derive(Debug, Clone, Serialize)]
pub struct Sweep {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// `sweep`.
    pub command: &'static str,
    /// Where the config came from that no axis replaces.
    pub model: String,
    /// The kind of workload.
    pub kind: &'static str,
    /// Which operations were counted.
    pub structure: Structure,
    /// What each primitive costs.
    pub prices: Prices,
    /// What varies, the last fastest.
    pub keys: Vec<Key>,
    /// All points of the grid.
    pub points: Vec<Point>,
}

/// One point of the grid.
#[derive(Debug, Clone, Serialize)]
pub struct Point {
    /// A value for each key.
    #[serde(serialize_with = "by_name")]
    pub at: Vec<(Key, Value)>,
    /// FLOPs under the sweep's prices.
    pub total_flops: u128,
    /// Of which in adapters.
    pub lora_flops: u128,
    /// Multiply-accumulates of matmuls.
    pub matmul_macs: u128,
    /// Primitive operations.
    pub primitives: Primitives,
}

fn by_name<S: Serializer>(at: &[(Key, Value)], s: S) -> std::result::Result<S::Ok, S::Error> {
    s.collect_map(at.iter().map(|(key, value)| (key, value)))
}

impl Sweep {
    /// Counts every point of the axes' product.
    ///
    /// # Errors
    /// An axis given twice or that the task does not have, a grid of more than [`MOST_POINTS`]
    /// points, or a point that cannot be counted.
    pub fn new(
        base: &Base,
        origin: &str,
        axes: &[Axis],
        structure: Structure,
        prices: &Prices,
    ) -> Result<Self> {
        let presets = check(base, axes)?;
        let size = axes.iter().try_fold(1usize, |n, axis| n.checked_mul(axis.values.len()));
        let Some(size) = size.filter(|n| *n <= MOST_POINTS) else {
            let why = format!("the grid has more than {MOST_POINTS} points");
            return Err(Error::flag("--sweep", why).into());
        };
        let points = (0..size).map(|index| {
            let at = point(axes, index);
            let workload = workload(base, &presets, &at);
            let counted = workload.and_then(|w| count(&w, structure, prices, &at));
            counted.map_err(|e| placed(e, &at))
        });
        Ok(Self {
            schema_version: SCHEMA_VERSION,
            command: "sweep",
            model: origin.into(),
            kind: base.task.name(),
            structure,
            prices: prices.clone(),
            keys: axes.iter().map(|axis| axis.key).collect(),
            points: points.collect::<Result<_>>()?,
        })
    }
}

/// The configs of all presets that occur; each is made once.
fn check(base: &Base, axes: &[Axis]) -> Result<BTreeMap<String, ModelConfig>> {
    let mut presets = BTreeMap::new();
    for (index, axis) in axes.iter().enumerate() {
        let key = axis.key;
        if axes[..index].iter().any(|earlier| earlier.key == key) {
            return Err(Error::flag("--sweep", format!("`{key}` is given twice")).into());
        }
        let found =
            matches!(key, Key::Preset | Key::LoraRank) || key.of(&mut base.task.clone()).is_some();
        if !found {
            let why = format!("`{key}` is no dimension of {}", base.task.name());
            return Err(Error::flag("--sweep", why).into());
        }
        for value in &axis.values {
            if let Value::Preset(name) = value {
                presets.insert(name.clone(), ModelConfig::preset(name)?);
            }
        }
    }
    Ok(presets)
}

/// Point `index` of the product, the last axis fastest.
fn point(axes: &[Axis], mut index: usize) -> Vec<(Key, Value)> {
    let mut at: Vec<_> = axes
        .iter()
        .rev()
        .map(|axis| {
            let value = axis.values[index % axis.values.len()].clone();
            index /= axis.values.len();
            (axis.key, value)
        })
        .collect();
    at.reverse();
    at
}

fn workload(
    base: &Base,
    presets: &BTreeMap<String, ModelConfig>,
    at: &[(Key, Value)],
) -> Result<Workload> {
    let (mut model, mut rank, mut task) = (&base.model, base.lora.rank, base.task);
    for (key, value) in at {
        match value {
            Value::Preset(name) => model = presets.get(name).unwrap_or(model),
            Value::Number(n) if *key == Key::LoraRank => {
                rank = usize::try_from(*n).unwrap_or(usize::MAX);
            }
            Value::Number(n) => {
                if let Some(place) = key.of(&mut task) {
                    *place = *n;
                }
            }
        }
    }
    // Nothing that is counted by itself ends early.
    if let Task::Generate { new_tokens, max_new_tokens, .. } = &mut task {
        *max_new_tokens = *new_tokens;
    }
    let lora = LoraConfig { rank, ..base.lora.clone() }.checked(model)?;
    Ok(Workload { model: model.clone(), lora, dtype: Dtype::F32, task })
}

fn count(
    workload: &Workload,
    structure: Structure,
    prices: &Prices,
    at: &[(Key, Value)],
) -> Result<Point> {
    let tally = analytic::count(structure, workload)?;
    let total = tally.sum(|_, _| true)?;
    let lora = tally.sum(|_, component| matches!(component, Component::Lora(_)))?;
    Ok(Point {
        at: at.to_vec(),
        total_flops: prices.flops(&total)?,
        lora_flops: prices.flops(&lora)?,
        matmul_macs: total.macs,
        primitives: total.primitives(),
    })
}

/// The error, with the point that caused it.
fn placed(error: anyhow::Error, at: &[(Key, Value)]) -> anyhow::Error {
    let at: Vec<_> = at.iter().map(|(key, value)| format!("{key}={value}")).collect();
    match error.downcast_ref() {
        Some(Error::Flag { flag, why }) => {
            Error::flag(flag.clone(), format!("{why} (at {})", at.join(", "))).into()
        }
        _ => error,
    }
}
