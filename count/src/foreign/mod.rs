//! What other tools write of a run's FLOPs, read beside what their formula counts.
//!
//! One file a format, with its source. [`read`] tells formats apart by what is in them.
//! [`Foreign::told`] is the file's figure for a workload that the user states; which of the tool's
//! structures it stands for is the first that agrees with it, else the likeliest ([`Told::settle`]).

mod llama_bench;
mod megatron;
mod profiler;
mod stated;
mod torch;
mod trainer;
mod vllm;

use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use stated::Stated;

use crate::{
    analytic::{self, Structure},
    error::Result,
    prices::Prices,
    workload::Workload,
};

/// Why `--gpus` is asked for.
const PER_GPU: &str = "counts FLOPs per GPU and does not say of how many; give --gpus";

/// What [`read`] knows.
pub const KNOWN: [&str; 7] = [
    "Hugging Face's trainer_state.json",
    "a table of PyTorch's FlopCounterMode",
    "DeepSpeed's flops profile",
    "calflops' results",
    "Megatron-LM's log",
    "vLLM's /metrics",
    "llama-bench's JSON",
];

/// A file of another tool.
#[derive(Debug)]
pub struct Foreign(Format);

#[derive(Debug)]
enum Format {
    Trainer(trainer::State),
    Torch(torch::Table),
    Profiler(profiler::Profile),
    Megatron(megatron::Log),
    Vllm(vllm::Metrics),
    LlamaBench(llama_bench::Tests),
}

/// Something that both the file and the workload state.
#[derive(Debug)]
struct Fact {
    what: &'static str,
    file: u128,
    workload: u128,
}

impl Fact {
    fn new(what: &'static str, file: u64, workload: impl Into<u128>) -> Self {
        Self { what, file: file.into(), workload: workload.into() }
    }
}

/// A file's figure for a whole workload.
#[derive(Debug)]
pub struct Told {
    /// The tool's counts, the likeliest first.
    structures: &'static [Structure],
    /// What the tool prices an operation at.
    pub prices: Prices,
    /// None where the file states no FLOPs.
    stated: Option<Stated>,
    /// The time that it took, where that is all the file states.
    seconds: Option<f64>,
    facts: Vec<Fact>,
    notes: Vec<String>,
}

/// How a file's figure stands to its formula.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Agreement {
    /// To the FLOP.
    Exact,
    /// As far as the figure was printed.
    WithinRounding,
    /// Not.
    Differs,
    /// It states no FLOPs.
    NoFigure,
}

/// A file beside what its tool counts for the workload.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Tool {
    /// The file.
    pub file: String,
    /// What it is.
    pub format: String,
    /// What it states for the workload.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stated_flops: Option<u128>,
    /// The least and the most that are printed so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bounds_flops: Option<[u128; 2]>,
    /// What the structure counts for the workload.
    pub counted_flops: u128,
    /// How they stand to each other.
    pub agreement: Agreement,
    /// The count by the time that the file states.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flops_per_second: Option<f64>,
    /// What was read, and where file and workload differ.
    pub notes: Vec<String>,
}

/// Reads what a tool wrote.
///
/// # Errors
/// What is wrong with it, as the rest of a sentence.
pub fn read(text: &str) -> Result<Foreign, String> {
    let json: Result<Vec<Value>, _> =
        serde_json::Deserializer::from_str(text).into_iter().collect();
    let objects = json.as_ref().ok().map(|values| match &values[..] {
        [Value::Array(objects)] => &objects[..],
        values => values,
    });
    let has = |key: &str| {
        objects.is_some_and(|all| !all.is_empty() && all.iter().all(|json| json.get(key).is_some()))
    };
    let format = match objects {
        Some([state]) if has("total_flos") => Format::Trainer(trainer::State::read(state)?),
        Some(tests) if has("avg_ns") => Format::LlamaBench(llama_bench::Tests::read(tests)?),
        _ if torch::is_one(text) => Format::Torch(torch::Table::read(text)?),
        _ if megatron::is_one(text) => Format::Megatron(megatron::Log::read(text)?),
        _ if vllm::is_one(text) => Format::Vllm(vllm::Metrics::read(text)?),
        _ => match (profiler::Kind::of(text), json) {
            (Some(kind), _) => Format::Profiler(profiler::Profile::read(kind, text)?),
            (None, Err(e)) if text.trim_start().starts_with(['{', '[']) => {
                return Err(format!("is no JSON: {e}"));
            }
            (None, _) => return Err(format!("is none of what is read: {}", KNOWN.join(", "))),
        },
    };
    Ok(Foreign(format))
}

/// Why another task than `tasks` is refused.
fn only(tasks: &str) -> String {
    format!("is of {tasks}; state that as the workload")
}

impl Foreign {
    /// What it is, of [`KNOWN`].
    pub fn format(&self) -> &'static str {
        let index = match &self.0 {
            Format::Trainer(_) => 0,
            Format::Torch(_) => 1,
            Format::Profiler(profile) => match profile.kind {
                profiler::Kind::DeepSpeed => 2,
                profiler::Kind::Calflops => 3,
            },
            Format::Megatron(_) => 4,
            Format::Vllm(_) => 5,
            Format::LlamaBench(_) => 6,
        };
        KNOWN[index]
    }

    /// What it says of `workload`, run on so many GPUs.
    ///
    /// # Errors
    /// A workload that it cannot be of, as the rest of a sentence.
    pub fn told(&self, workload: &Workload, gpus: Option<u64>) -> Result<Told, String> {
        if gpus.is_some() && !matches!(self.0, Format::Megatron(_) | Format::Vllm(_)) {
            return Err("counts no FLOPs per GPU; leave --gpus out".into());
        }
        match &self.0 {
            Format::Trainer(state) => state.told(workload),
            Format::Torch(table) => table.told(workload),
            Format::Profiler(profile) => profile.told(workload),
            Format::Megatron(log) => log.told(workload, gpus),
            Format::Vllm(metrics) => metrics.told(workload, gpus),
            Format::LlamaBench(tests) => tests.told(workload),
        }
    }
}

impl Told {
    /// The structure that the file counts by, and how its figure stands to it.
    ///
    /// # Errors
    /// A workload that none of the tool's structures covers, or a sum past 128 bits.
    pub fn settle(
        &self,
        file: &str,
        format: &str,
        workload: &Workload,
    ) -> Result<(Structure, Tool)> {
        let mut counted = vec![];
        for structure in self.structures {
            let cost = analytic::count(*structure, workload)?.sum(|_, _| true)?;
            counted.push((*structure, self.prices.flops(&cost)?));
        }
        let agrees = |flops: u128| self.stated.is_some_and(|stated| stated.holds(flops));
        let found = counted.iter().find(|(_, flops)| agrees(*flops)).or(counted.first());
        let (structure, flops) = *found.unwrap_or(&(Structure::Exact, 0));
        let agreement = match self.stated {
            None => Agreement::NoFigure,
            Some(stated) if stated.flops == flops => Agreement::Exact,
            Some(stated) if stated.holds(flops) => Agreement::WithinRounding,
            Some(_) => Agreement::Differs,
        };
        let mut notes = self.notes.clone();
        for (other, _) in counted.iter().filter(|(other, n)| *other != structure && agrees(*n)) {
            notes.push(format!("{other} agrees as well; by default it is {structure}"));
        }
        let unlike = self.facts.iter().filter(|fact| fact.file != fact.workload);
        notes.extend(unlike.map(|Fact { what, file, workload }| {
            format!("it has {file} {what}, the workload {workload}")
        }));
        let apart = self.stated.filter(|_| agreement == Agreement::Differs);
        let ratio = apart.and_then(|stated| stated.over(flops));
        notes.extend(ratio.map(|ratio| format!("it states {ratio} what {structure} counts")));
        let rate = self.seconds.map(|seconds| flops as f64 / seconds);
        let tool = Tool {
            file: file.into(),
            format: format.into(),
            stated_flops: self.stated.map(|stated| stated.flops),
            bounds_flops: self.stated.map(|stated| [stated.least, stated.most]),
            counted_flops: flops,
            agreement,
            flops_per_second: rate,
            notes,
        };
        Ok((structure, tool))
    }
}
