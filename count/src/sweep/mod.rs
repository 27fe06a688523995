//! One workload over a grid of its dimensions: `seq=128..4096:*2`, `lora-rank=1,2,4,8`.

mod axis;

pub use axis::{Axis, Swept, numbers};

use std::collections::BTreeMap;

use serde::{Serialize, Serializer};

use crate::{
    SCHEMA_VERSION,
    analytic::{self, Structure},
    config::{LoraConfig, ModelConfig},
    error::{Error, Result},
    ledger::Dtype,
    prices::{Prices, Primitives},
    tally::{Component, Tally},
    workload::{AttentionMode, Layout, Task, Value, Workload, tasks_of},
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
    /// Element type of weights and activations.
    pub dtype: Dtype,
    /// Which scores attention computes.
    pub attention: AttentionMode,
    /// What is run.
    pub task: Task,
    /// Lengths of its sequences, where they are listed.
    pub lengths: Option<Vec<u64>>,
    /// How these lie in a pass, where it is said.
    pub layout: Option<Layout>,
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
    pub keys: Vec<Swept>,
    /// All points of the grid.
    pub points: Vec<Point>,
}

/// One point of the grid.
#[derive(Debug, Clone, Serialize)]
pub struct Point {
    /// A value for each key.
    #[serde(serialize_with = "by_name")]
    pub at: Vec<(Swept, Value)>,
    /// FLOPs under the sweep's prices.
    pub total_flops: u128,
    /// Tokens fed.
    pub tokens: u128,
    /// FLOPs for each of them.
    pub flops_per_token: f64,
    /// Bytes that the workload needs at least, as [`Workload::bytes`] sums them.
    pub memory_bytes: u128,
    /// Of which in adapters.
    pub lora_flops: u128,
    /// Multiply-accumulates of matmuls.
    pub matmul_macs: u128,
    /// Primitive operations.
    pub primitives: Primitives,
}

fn by_name<S: Serializer>(at: &[(Swept, Value)], s: S) -> std::result::Result<S::Ok, S::Error> {
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
            let workloads = workloads(base, &presets, &at);
            let counted = workloads.and_then(|all| count(&all, structure, prices, &at));
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
        let name = base.task.name();
        let why = match (key, &base.lengths) {
            (Swept::Preset | Swept::LoraRank | Swept::Dtype | Swept::Attention, _)
            | (Swept::Layout, Some(_)) => None,
            (Swept::Layout, None) => Some("`layout` needs --lengths".into()),
            (Swept::Task(key), _) if !key.is_of(&base.task) => {
                Some(format!("`{key}` is no dimension of {name}"))
            }
            (Swept::Task(key), Some(_)) if base.task.kind().listed().contains(&key) => {
                Some(format!("`{key}` of {name} follows from --lengths"))
            }
            (Swept::Task(_), _) => None,
        };
        if let Some(why) = why {
            return Err(Error::flag("--sweep", why).into());
        }
        for value in &axis.values {
            if let (Swept::Preset, Value::Text(name)) = (key, value) {
                presets.insert(name.clone(), ModelConfig::preset(name)?);
            }
        }
    }
    Ok(presets)
}

/// Point `index` of the product, the last axis fastest.
fn point(axes: &[Axis], mut index: usize) -> Vec<(Swept, Value)> {
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

/// All that one point runs: of listed lengths, an evaluation's last pass is a workload of its own.
fn workloads(
    base: &Base,
    presets: &BTreeMap<String, ModelConfig>,
    at: &[(Swept, Value)],
) -> Result<Vec<Workload>> {
    let (mut model, mut rank, mut dtype) = (&base.model, base.lora.rank, base.dtype);
    let (mut attention, mut layout) = (base.attention, base.layout);
    let mut task = base.task.clone();
    for (key, value) in at {
        let fail = |why: String| Error::flag(format!("--{key}"), why);
        match (key, value) {
            (Swept::Task(key), value) => key.set(&mut task, value).map_err(fail)?,
            (Swept::Preset, Value::Text(name)) => model = presets.get(name).unwrap_or(model),
            (Swept::Dtype, Value::Text(name)) => {
                let known = || fail(format!("has `{name}`; known: f32, f16, bf16, fp8"));
                dtype = Dtype::named(name).ok_or_else(known)?;
            }
            (Swept::Attention, Value::Text(name)) => {
                let known = || fail(format!("has `{name}`; known: dense, blocked"));
                attention = AttentionMode::named(name).ok_or_else(known)?;
            }
            (Swept::Layout, Value::Text(name)) => {
                let known = || fail(format!("has `{name}`; known: padded, bucketed, packed"));
                layout = Some(Layout::named(name).ok_or_else(known)?);
            }
            (Swept::LoraRank, Value::Number(n)) => rank = usize::try_from(*n).unwrap_or(usize::MAX),
            (
                Swept::Preset | Swept::Dtype | Swept::Attention | Swept::Layout | Swept::LoraRank,
                value,
            ) => return Err(fail(format!("has {value}, which it cannot be")).into()),
        }
    }
    let lora = LoraConfig { rank, ..base.lora.clone() }.checked(model)?;
    let tasks = match &base.lengths {
        Some(lengths) => tasks_of(lengths, layout, task)?,
        None => vec![task],
    };
    let workload =
        |task| Workload { model: model.clone(), lora: lora.clone(), dtype, attention, task };
    Ok(tasks.into_iter().map(workload).collect())
}

fn count(
    workloads: &[Workload],
    structure: Structure,
    prices: &Prices,
    at: &[(Swept, Value)],
) -> Result<Point> {
    let mut tally = Tally::default();
    for workload in workloads {
        tally.extend(analytic::count(structure, workload)?)?;
    }
    let total = tally.sum(|_, _| true)?;
    let lora = tally.sum(|_, component| matches!(component, Component::Lora(_)))?;
    let total_flops = prices.flops(&total)?;
    let tokens: u128 = workloads.iter().map(|w| w.task.tokens().real).sum();
    Ok(Point {
        at: at.to_vec(),
        total_flops,
        tokens,
        flops_per_token: total_flops as f64 / tokens as f64,
        memory_bytes: workloads.iter().map(Workload::bytes).max().unwrap_or(0),
        lora_flops: prices.flops(&lora)?,
        matmul_macs: total.macs,
        primitives: total.primitives(),
    })
}

/// The error, with the point that caused it.
fn placed(error: anyhow::Error, at: &[(Swept, Value)]) -> anyhow::Error {
    let at: Vec<_> = at.iter().map(|(key, value)| format!("{key}={value}")).collect();
    match error.downcast_ref() {
        Some(Error::Flag { flag, why }) => {
            Error::flag(flag.clone(), format!("{why} (at {})", at.join(", "))).into()
        }
        _ => error,
    }
}
