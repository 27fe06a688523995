//! Reading back what `--json` wrote: of each kind of report, exactly what the page shows. What can be
//! read as it was written is; else fields are named and explained in the types that wrote them.

use std::path::Path;

use serde::{Deserialize, de::DeserializeOwned};

use crate::{
    analytic::Structure,
    bench::{self, BenchReport, Ceiling},
    error::{Error, Result},
    foreign,
    ledger::Phase,
    prices::Primitives,
    reconcile,
    report::{
        Difference, EvaluationReport, Memory, SCHEMA_VERSION, SequenceReport, Timings,
        TokensReport, TrainingReport, run::one_or_many,
    },
    traffic::Traffic,
    workload::Workload,
};

/// One file and what it holds.
#[derive(Debug)]
pub struct Input {
    /// Its name, as given.
    pub file: String,
    /// Its report.
    pub content: Content,
}

/// The kinds of report.
#[derive(Debug)]
pub enum Content {
    /// Of `generate`, `audit`, `count`, `eval` or `train`.
    Run(Box<Run>),
    /// Of `count --sweep`.
    Sweep(Sweep),
    /// Of `plan`.
    Plan(Plan),
    /// Of `reconcile`.
    Reconciliation(Box<Reconciliation>),
    /// Of `bench`.
    Bench(Box<BenchReport>),
    /// Of `ceiling`.
    Ceiling(Ceiling),
}

impl Input {
    /// Reads `file`.
    ///
    /// # Errors
    /// A file that cannot be read, is no report of this program, or is one of another schema; with
    /// the key at fault.
    pub fn read(file: &Path) -> Result<Self> {
        let bad = |why: String| Error::File { file: file.into(), why };
        let text = crate::input::read_text(file).map_err(|e| bad(e.to_string()))?;
        let content = Content::parse(&text).map_err(bad)?;
        Ok(Self { file: file.display().to_string(), content })
    }
}

impl Content {
    /// Reads one report.
    ///
    /// # Errors
    /// What is wrong with `text`, as the rest of a sentence.
    pub fn parse(text: &str) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Head {
            schema_version: Option<u32>,
            command: Option<String>,
        }
        let head: Head = typed(text)?;
        let (Some(version), Some(command)) = (head.schema_version, head.command) else {
            return Err("is no report: it lacks `schema_version` or `command`".into());
        };
        let known = match command.as_str() {
            "bench" | "ceiling" => bench::SCHEMA_VERSION,
            _ => SCHEMA_VERSION,
        };
        if version != known {
            return Err(format!("has schema {version}; this reads {known}"));
        }
        Ok(match command.as_str() {
            "generate" | "audit" | "count" | "eval" | "train" => Self::Run(typed(text)?),
            "sweep" => Self::Sweep(typed(text)?),
            "plan" => Self::Plan(plan(text)?),
            "reconcile" => Self::Reconciliation(typed(text)?),
            "bench" => {
                let report: Box<BenchReport> = typed(text)?;
                report.check()?;
                Self::Bench(report)
            }
            "ceiling" => {
                let ceiling: Ceiling = typed(text)?;
                ceiling.check()?;
                Self::Ceiling(ceiling)
            }
            other => return Err(format!("`command`: there is no page for `{other}`")),
        })
    }
}

/// A plan, whose budget must be in FLOPs.
fn plan(text: &str) -> Result<Plan, String> {
    #[derive(Deserialize)]
    struct Units {
        #[serde(flatten)]
        keys: std::collections::BTreeMap<String, serde::de::IgnoredAny>,
    }
    let Units { keys } = typed(text)?;
    let other = ["budget_gpu_hours", "budget_dollars", "budget_tokens"];
    match other.into_iter().find(|key| keys.contains_key(*key)) {
        Some(key) => Err(format!("`{key}`: there are pages of budgets in FLOPs alone")),
        None => typed(text),
    }
}

/// `text` as a `T`, or the key at fault.
fn typed<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    let mut json = serde_json::Deserializer::from_str(text);
    let value = serde_path_to_error::deserialize(&mut json).map_err(|e| {
        let (key, why) = (e.path().to_string(), e.inner());
        match key.as_str() {
            "." => format!("is no report: {why}"),
            key => format!("is no report: `{key}`: {why}"),
        }
    })?;
    json.end().map_err(|e| format!("is no report: {e}"))?;
    Ok(value)
}

/// A price list, of which the page shows the name.
#[derive(Debug, Deserialize)]
pub struct PriceList {
    /// Its name.
    pub name: String,
}

/// What `generate`, `audit`, `count`, `eval` and `train` write; see [`crate::report::Report`].
#[derive(Debug, Deserialize)]
pub struct Run {
    pub command: String,
    pub model: String,
    pub parameters: u128,
    pub device: Option<String>,
    #[serde(deserialize_with = "one_or_many")]
    pub workload: Vec<Workload>,
    pub structure: Structure,
    pub prices: PriceList,
    pub total_flops: u128,
    pub lora_flops: u128,
    pub tokens: Option<TokensReport>,
    pub flops_per_token: Option<f64>,
    pub primitives: Primitives,
    pub rows: Vec<Row>,
    pub notebook_table: Option<Vec<NotebookRow>>,
    pub memory: Memory,
    // An audit's fields stand among the others: a nested struct would lose its 128 bits.
    pub balanced: Option<bool>,
    pub closed_form_flops: Option<u128>,
    pub predicted_flops: Option<u128>,
    pub executed_flops: Option<u128>,
    pub keys_compared: Option<u64>,
    pub graph_difference: Option<String>,
    #[serde(default)]
    pub differences: Vec<Difference>,
    // And a generation's.
    #[serde(default)]
    pub sequences: Vec<SequenceReport>,
    pub timings: Option<Timings>,
    pub bytes_per_decoded_token: Option<Traffic>,
    pub training: Option<TrainingReport>,
    pub evaluation: Option<EvaluationReport>,
    // And a count's.
    pub time: Option<Time>,
    pub thresholds: Option<Thresholds>,
}

/// Hours, money and energy; see [`crate::rate::Time`].
#[derive(Debug, Deserialize)]
pub struct Time {
    pub hours: f64,
    pub gpu_hours: f64,
    pub dollars: Option<f64>,
    pub kwh: Option<f64>,
}

/// Amounts that laws name; see [`crate::threshold::Thresholds`].
#[derive(Debug, Deserialize)]
pub struct Thresholds {
    pub lines: Vec<Threshold>,
}

/// One amount.
#[derive(Debug, Deserialize)]
pub struct Threshold {
    pub name: String,
    pub source: String,
    pub limit_flops: f64,
    pub flops: u128,
    pub share: f64,
    pub passed: bool,
}

/// One component in one phase; see [`crate::report::Row`].
#[derive(Debug, Deserialize)]
pub struct Row {
    pub phase: Phase,
    pub component: String,
    pub calls: u128,
    pub flops: u128,
    pub seconds: Option<f64>,
}

/// A row of the notebook's table; see [`crate::analytic::notebook::TableRow`].
#[derive(Debug, Deserialize)]
pub struct NotebookRow {
    pub name: String,
    pub flops: [u128; 5],
    pub total: u128,
}

/// What `count --sweep` writes; see [`crate::sweep::Sweep`].
#[derive(Debug, Deserialize)]
pub struct Sweep {
    pub model: String,
    pub kind: String,
    pub structure: Structure,
    pub prices: PriceList,
    pub keys: Vec<String>,
    pub points: Vec<GridPoint>,
}

/// One point of its grid.
#[derive(Debug, Deserialize)]
pub struct GridPoint {
    pub at: serde_json::Map<String, serde_json::Value>,
    pub total_flops: u128,
    pub lora_flops: u128,
}

/// What `plan` writes; see [`crate::plan::Account`].
#[derive(Debug, Deserialize)]
pub struct Plan {
    pub file: String,
    pub model: String,
    pub parameters: u128,
    pub structure: Structure,
    pub prices: PriceList,
    pub budget_flops: u128,
    pub spent: Vec<Spent>,
    pub experiments: Vec<Experiment>,
    pub left_flops: u128,
    pub over_flops: u128,
    pub solved: Option<Solved>,
    pub beside: Option<Beside>,
    pub over_budget: Option<Broken>,
}

/// A finished run.
#[derive(Debug, Deserialize)]
pub struct Spent {
    pub file: String,
    pub flops: u128,
    pub audited: bool,
}

/// One row of the plan.
#[derive(Debug, Deserialize)]
pub struct Experiment {
    pub name: String,
    #[serde(deserialize_with = "one_or_many")]
    pub workload: Vec<Workload>,
    pub runs: u128,
    pub flops: u128,
    pub share: f64,
    pub running_flops: u128,
    pub left_flops: u128,
    pub beside_flops: Option<u128>,
}

/// The largest number that fits.
#[derive(Debug, Deserialize)]
pub struct Solved {
    pub experiment: String,
    pub key: String,
    pub value: u64,
    pub next_over_flops: Option<u128>,
    pub beside_value: Option<u64>,
}

/// Another structure's view.
#[derive(Debug, Deserialize)]
pub struct Beside {
    pub structure: Structure,
    pub total_flops: Option<u128>,
    pub uncounted: Vec<String>,
}

/// The first item that the budget does not cover.
#[derive(Debug, Deserialize)]
pub struct Broken {
    pub name: String,
    pub needed_flops: u128,
    pub left_flops: u128,
}

/// What `reconcile` writes; see [`crate::reconcile::Reconciliation`].
#[derive(Debug, Deserialize)]
pub struct Reconciliation {
    pub model: String,
    pub workload: Vec<Workload>,
    pub from: Total,
    pub to: Total,
    pub difference_flops: i128,
    pub steps: Vec<Step>,
}

/// An end's total.
#[derive(Debug, Deserialize)]
pub struct Total {
    pub structure: Structure,
    pub prices: PriceList,
    pub total_flops: u128,
    pub run: Option<reconcile::Run>,
    pub tool: Option<foreign::Tool>,
}

/// One step of the way.
#[derive(Debug, Deserialize)]
pub struct Step {
    pub cause: String,
    pub why: String,
    pub of: String,
    pub flops: i128,
    pub running_total: i128,
    pub share: Option<f64>,
}
