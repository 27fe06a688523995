//! What `flopaudit bench` measured: the part of its report that a time needs.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    error::{Error, Result},
    workload::{Task, Workload},
};

/// Version of the JSON of ceilings and benchmarks; raised when a field changes its meaning.
pub const SCHEMA_VERSION: u32 = 1;

/// A benchmark's points.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Bench {
    /// The report.
    pub file: PathBuf,
    /// The device, by its product's name.
    pub device: String,
    #[serde(skip)]
    kind: String,
    #[serde(skip)]
    on: String,
    #[serde(skip)]
    points: Vec<Point>,
}

/// One workload and the seconds of its unit.
#[derive(Debug, Clone, PartialEq, Deserialize)]
struct Point {
    workload: Workload,
    seconds: Seconds,
    balanced: bool,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
struct Seconds {
    median: f64,
}

#[derive(Deserialize)]
struct File {
    schema_version: u32,
    command: String,
    kind: String,
    device: Device,
    points: Vec<Point>,
}

#[derive(Deserialize)]
struct Device {
    name: String,
    kind: String,
}

impl Bench {
    /// Reads what `bench train --json FILE` or `bench prefill --json FILE` wrote.
    ///
    /// # Errors
    /// A file that is none, of another schema, of decoding steps, or with times that nothing has.
    pub fn read(file: &Path) -> Result<Self> {
        let bad = |why: String| Error::File { file: file.into(), why };
        let text = crate::input::read_text(file).map_err(|e| bad(e.to_string()))?;
        let none = |why: String| bad(format!("is no benchmark: {why}"));
        let mut json = serde_json::Deserializer::from_str(&text);
        let found: File =
            serde_path_to_error::deserialize(&mut json).map_err(|e| none(e.to_string()))?;
        json.end().map_err(|e| none(e.to_string()))?;
        let File { schema_version, command, kind, device, points } = found;
        if schema_version != SCHEMA_VERSION || command != "bench" {
            let why = format!(
                "is `{command}` of schema {schema_version}, not `bench` of {SCHEMA_VERSION}"
            );
            return Err(bad(why).into());
        }
        if kind == "decode" {
            let why = "measures single decoding steps, and no workload is made of one; \
                       take `bench train` or `bench prefill`";
            return Err(bad(why.into()).into());
        }
        for (index, point) in points.iter().enumerate() {
            if !(point.seconds.median > 0.0 && point.seconds.median.is_finite()) {
                return Err(bad(format!("`points[{index}].seconds.median` is no time")).into());
            }
            if !point.balanced {
                return Err(bad(format!("`points[{index}]`: its audit does not balance")).into());
            }
        }
        let (device, on) = (device.name, device.kind);
        Ok(Self { file: file.into(), device, kind, on, points })
    }

    /// Whether it ran on a GPU.
    pub fn is_gpu(&self) -> bool {
        self.on != "cpu"
    }

    /// What a unit is.
    pub fn kind(&self) -> &str {
        &self.kind
    }

    /// Seconds of `workload`: the median of the point that ran it, for each of its steps.
    ///
    /// # Errors
    /// No such point: what the nearest has otherwise, by name.
    pub fn seconds(&self, workload: &Workload) -> Result<f64> {
        let (unit, units) = unit(workload);
        let same = |point: &&Point| point.workload == unit;
        match self.points.iter().find(same) {
            Some(point) => Ok(point.seconds.median * units as f64),
            None => Err(self.missing(&unit)),
        }
    }

    fn missing(&self, unit: &Workload) -> anyhow::Error {
        let wanted = serde_json::to_value(unit).unwrap_or_default();
        let differences = self.points.iter().map(|point| {
            let found = serde_json::to_value(&point.workload).unwrap_or_default();
            let mut differences = vec![];
            differ("", &found, &wanted, &mut differences);
            differences
        });
        let why = match differences.min_by_key(Vec::len) {
            None => "holds no points".into(),
            Some(nearest) => format!(
                "has no point of this workload, and no other's rate is taken: the nearest has {}",
                nearest.join(", ")
            ),
        };
        Error::File { file: self.file.clone(), why }.into()
    }
}

/// What a benchmark measures of `workload`, and how many of it there are: a training's steps.
fn unit(workload: &Workload) -> (Workload, u64) {
    let mut unit = workload.clone();
    let units = match &mut unit.task {
        Task::Train { steps, .. } => std::mem::replace(steps, 1),
        Task::Forward { .. }
        | Task::Generate { .. }
        | Task::Verify { .. }
        | Task::Evaluate { .. } => 1,
    };
    (unit, units)
}

/// Every key in which two values differ: `batch 8, not 4`.
fn differ(key: &str, found: &Value, wanted: &Value, out: &mut Vec<String>) {
    match (found, wanted) {
        (Value::Object(found), Value::Object(wanted)) => {
            let mut keys: Vec<&String> = found.keys().chain(wanted.keys()).collect();
            keys.sort();
            keys.dedup();
            for inner in keys {
                let path = if key.is_empty() { inner.clone() } else { format!("{key}.{inner}") };
                let of = |map: &serde_json::Map<String, Value>| {
                    map.get(inner).cloned().unwrap_or_default()
                };
                differ(&path, &of(found), &of(wanted), out);
            }
        }
        _ if found == wanted => {}
        _ => out.push(format!("{key} {found}, not {wanted}")),
    }
}
