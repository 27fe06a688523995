//! One value that every command fills and every format prints.

mod bench;
mod figures;
pub mod html;
mod memory;
mod plan;
mod sweep;
mod table;
mod time;
mod tokens;
mod trace;
mod training;
mod waterfall;

pub use bench::{
    bench_csv, bench_markdown, device_line, print_bench, print_ceiling, print_comparison,
    print_line, render_bench,
};
pub use figures::{Figures, bytes, digits, human, percent, rate, seconds, signed, three_digits};
pub(crate) use flopaudit_count::run::write_one_or_many as one_or_many;
pub use flopaudit_count::{
    SCHEMA_VERSION,
    run::{self, FinishedRun},
};
pub use memory::Memory;
pub use plan::print_plan;
pub use sweep::{csv, print_sweep};
pub use table::{describe, print, render};
pub use time::{TimeReport, print_gpus, print_mfu};
pub use tokens::TokensReport;
pub use trace::{TRACE_SCHEMA_VERSION, Trace};
pub use training::{BudgetReport, EvaluationReport, TrainingReport};
pub use waterfall::{print_way, render_way};

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{
    analytic::{
        Structure,
        notebook::{self, TableRow},
        parameters_taken,
    },
    audit::Audit,
    config::Ignored,
    error::Result,
    ledger::{Key, Ledger, Phase},
    prices::{Prices, Primitives},
    rate::new_tokens,
    tally::{Component, Tally},
    threshold::Thresholds,
    traffic::Traffic,
    train::data::Notes,
    workload::Workload,
};

/// What a command found out. Counts are exact integers, some past 64 bits.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// The subcommand.
    pub command: String,
    /// Where config and weights came from.
    pub model: String,
    /// What the model's files hold and was not used; absent where there were no files.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ignored: Option<Vec<Ignored>>,
    /// Parameters of the base model.
    pub parameters: u128,
    /// Where it ran; absent where it was only counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// What was run or counted: one object, or a list where several ran in turn.
    #[serde(serialize_with = "one_or_many")]
    pub workload: Vec<Workload>,
    /// Which operations were counted.
    pub structure: Structure,
    /// What each primitive costs.
    pub prices: Prices,
    /// N of a structure that goes by parameters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub formula_parameters: Option<FormulaParameters>,
    /// FLOPs under these prices.
    pub total_flops: u128,
    /// What all of it feeds.
    pub tokens: TokensReport,
    /// FLOPs for each token that is no padding.
    pub flops_per_token: f64,
    /// Tokens that it chooses, or gains in verification; 0 where none are.
    pub new_tokens: u128,
    /// FLOPs for each of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flops_per_new_token: Option<f64>,
    /// Of which in adapters.
    pub lora_flops: u128,
    /// Primitive operations.
    pub primitives: Primitives,
    /// Multiply-accumulates of matmuls; their muls are among the primitives.
    pub matmul_macs: u128,
    /// Outputs of matmuls; with the field above, the report can be priced anew under any list.
    pub matmul_outputs: u128,
    /// FLOPs by phase and component.
    pub rows: Vec<Row>,
    /// The notebook's own rows, where its structure counted a forward pass.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub notebook_table: Option<Vec<TableRow>>,
    /// Bytes that the workload needs at least.
    pub memory: Memory,
    /// The three countings, where the workload was executed and audited.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub audit: Option<AuditReport>,
    /// Text and timings, where text was generated.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub generation: Option<GenerationReport>,
    /// Losses, budget and checks, where something was trained.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub training: Option<TrainingReport>,
    /// Loss, where text was scored.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub evaluation: Option<EvaluationReport>,
    /// Hours, money and energy, where a rate was given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub time: Option<TimeReport>,
    /// The amounts that laws name, where they were asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub thresholds: Option<Thresholds>,
    /// What a reader may not expect, a line each.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// N of a formula that goes by parameters.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct FormulaParameters {
    /// How many they are, adapters aside.
    pub n: u128,
    /// Which they are.
    pub which: &'static str,
    /// Whether the checkpoint stores embedding and head as two tensors, of which N has one.
    pub head_stored_apart: bool,
}

/// One component in one phase.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// The phase.
    pub phase: Phase,
    /// The component.
    pub component: Component,
    /// Executed ops.
    pub calls: u128,
    /// FLOPs under the report's prices.
    pub flops: u128,
    /// Time of these ops, where they were timed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds: Option<f64>,
}

/// The audit's outcome.
#[derive(Debug, Clone, Serialize)]
pub struct AuditReport {
    /// Whether all three countings agree.
    pub balanced: bool,
    /// The closed form's total.
    pub closed_form_flops: u128,
    /// The predicted ledger's total.
    pub predicted_flops: u128,
    /// The executed ledger's total.
    pub executed_flops: u128,
    /// Distinct (phase, scope, op, dtype) on either side.
    pub keys_compared: usize,
    /// Nodes of recorded CUDA graphs as CUDA lists them, where steps were replayed from any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub graph_nodes: Option<usize>,
    /// Launches that went into them: a product by cuBLAS may be several nodes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub graph_launches: Option<usize>,
    /// Where CUDA's list is not what was launched.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub graph_difference: Option<String>,
    /// Every disagreement.
    pub differences: Vec<Difference>,
}

/// One disagreement: an op that ran another number of times than predicted, or a component whose
/// closed form is not what ran.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Difference {
    /// The phase.
    pub phase: Phase,
    /// Scope of the op, or the component.
    pub scope: String,
    /// The op with its dimensions, or `closed form`.
    pub op: String,
    /// Predicted calls.
    pub predicted_calls: u128,
    /// Executed calls.
    pub executed_calls: u128,
    /// Predicted, or closed form's, FLOPs.
    pub predicted_flops: u128,
    /// Executed FLOPs.
    pub executed_flops: u128,
}

/// What was generated and how fast.
#[derive(Debug, Clone, Serialize)]
pub struct GenerationReport {
    /// New text of the first sequence, special tokens left out.
    pub text: String,
    /// New tokens of the first sequence.
    pub token_ids: Vec<u32>,
    /// All sequences, in the order of the prompts.
    pub sequences: Vec<SequenceReport>,
    /// Where the time went and what was achieved.
    pub timings: Timings,
    /// Bytes touched per decoded token of one sequence, on average.
    pub bytes_per_decoded_token: Option<Traffic>,
    /// What the checkpoint suggests for choosing tokens, where it does.
    #[serde(default, rename = "checkpoint_sampling", skip_serializing_if = "Option::is_none")]
    pub suggested: Option<SuggestedReport>,
}

/// What a checkpoint suggests for choosing tokens.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SuggestedReport {
    /// The file that suggests it.
    pub file: String,
    /// Its keys and values, as they are there.
    pub values: serde_json::Map<String, serde_json::Value>,
    /// Those that choose tokens, or might: `temperature 0.7`.
    pub shown: Vec<String>,
    /// Whether this run chose by them.
    pub taken: bool,
}

/// One generated sequence.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SequenceReport {
    /// Tokens of the prompt, its template included.
    pub prompt_tokens: usize,
    /// New text, special tokens left out.
    pub text: String,
    /// New tokens.
    pub token_ids: Vec<u32>,
    /// Whether an ending token ended it, rather than the limit.
    pub stopped: bool,
}

/// Seconds and rates. Rates are absent where nothing of the kind ran.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Timings {
    /// Opening and loading the weights.
    pub load_s: f64,
    /// From the start of the run to the first token.
    pub time_to_first_token_s: f64,
    /// All later steps.
    pub decode_s: f64,
    /// Prompt tokens per second, over all sequences.
    pub prefill_tokens_per_s: f64,
    /// New tokens per second after the first, over all sequences.
    pub decode_tokens_per_s: Option<f64>,
    /// FLOPs of the prefill and its choice over its time.
    pub prefill_flops_per_s: f64,
    /// FLOPs of all later steps over their time.
    pub decode_flops_per_s: Option<f64>,
}

impl Report {
    /// A report of `workload`, whose sums are `tally` as `structure` counts them.
    ///
    /// # Errors
    /// Totals past 128 bits.
    pub fn new(
        command: &str,
        model: &str,
        workload: Vec<Workload>,
        structure: Structure,
        prices: &Prices,
        tally: &Tally,
    ) -> Result<Self> {
        let rows = tally.iter().map(|(phase, component, sum)| {
            Ok(Row {
                phase,
                component,
                calls: sum.calls,
                flops: prices.flops(&sum.cost)?,
                seconds: None,
            })
        });
        let notebook_table = match (structure, workload.as_slice()) {
            (Structure::Notebook, [workload]) => notebook::table(workload, prices)?,
            (_, _) => None,
        };
        let total = tally.sum(|_, _| true)?;
        let lora = tally.sum(|_, component| matches!(component, Component::Lora(_)))?;
        let total_flops = prices.flops(&total)?;
        let each = workload.iter().map(|workload| (workload, 1));
        let tokens = TokensReport::new(each, structure, prices)?;
        let new_tokens: u128 = workload.iter().map(|workload| new_tokens(&workload.task)).sum();
        let formula_parameters = workload.first().and_then(|workload| {
            let head_stored_apart = workload.model.head_stored_apart;
            let (n, which) = parameters_taken(structure, &workload.model)?;
            Some(FormulaParameters { n, which, head_stored_apart })
        });
        Ok(Self {
            schema_version: SCHEMA_VERSION,
            command: command.into(),
            model: model.into(),
            ignored: None,
            device: None,
            parameters: workload.first().map_or(0, |w| w.model.parameters()),
            memory: Memory::of(&workload, false),
            workload,
            structure,
            prices: prices.clone(),
            formula_parameters,
            total_flops,
            tokens,
            flops_per_token: total_flops as f64 / tokens.real as f64,
            new_tokens,
            flops_per_new_token: (new_tokens > 0).then(|| total_flops as f64 / new_tokens as f64),
            lora_flops: prices.flops(&lora)?,
            primitives: total.primitives(),
            matmul_macs: total.macs,
            matmul_outputs: total.outputs,
            rows: rows.collect::<Result<_>>()?,
            notebook_table,
            audit: None,
            generation: None,
            training: None,
            evaluation: None,
            time: None,
            thresholds: None,
            notes: vec![],
        })
    }

    /// Lists what of the model's files was not used, where it came from files.
    pub fn with_ignored(self, ignored: Option<&[Ignored]>) -> Self {
        Self { ignored: ignored.map(<[Ignored]>::to_vec), ..self }
    }

    /// Lists what of other files was not used besides: an adapter's, or data's.
    pub fn and_ignored(mut self, more: Option<&[Ignored]>) -> Self {
        if let Some(more) = more {
            self.ignored.get_or_insert_default().extend_from_slice(more);
        }
        self
    }

    /// Counts the bytes that are needed on `device`, as `--device` spells it; without, a CPU's.
    pub fn sized_for(mut self, device: &str) -> Self {
        self.memory = Memory::of(&self.workload, device.starts_with("cuda"));
        self
    }

    /// Says that it ran on `device`.
    pub fn ran_on(self, device: &str) -> Self {
        Self { device: Some(device.into()), ..self.sized_for(device) }
    }

    /// The same with what a reader may not expect.
    pub fn with_notes(mut self, notes: impl IntoIterator<Item = String>) -> Self {
        self.notes.extend(notes);
        self
    }

    /// The same with how data was read, and what of it was not.
    pub fn with_data<'a>(mut self, notes: impl IntoIterator<Item = &'a Notes>) -> Self {
        for Notes { form, ignored } in notes {
            self.notes.extend(form.clone());
            self = self.and_ignored((!ignored.is_empty()).then_some(ignored));
        }
        self
    }

    /// Adds the time of each row, from a ledger of timed ops.
    pub fn with_times(mut self, ledger: &Ledger) -> Self {
        for row in &mut self.rows {
            let of_row = |key: &Key| {
                key.phase == row.phase && Component::from(key.scope.module) == row.component
            };
            let entries = ledger.iter().filter(|(key, _)| of_row(key));
            let time: Duration = entries.map(|(_, entry)| entry.time).sum();
            row.seconds = Some(time.as_secs_f64());
        }
        self
    }

    /// Adds the outcome of an audit.
    ///
    /// # Errors
    /// Totals past 128 bits.
    pub fn with_audit(mut self, audit: &Audit) -> Result<Self> {
        let [closed_form_flops, predicted_flops, executed_flops] = audit.totals(&self.prices)?;
        let keys = audit.key_differences.iter().map(|d| {
            let one = self.prices.flops(&d.key.op.cost())?;
            let (predicted, executed) = (u128::from(d.predicted), u128::from(d.executed));
            Ok(Difference {
                phase: d.key.phase,
                scope: d.key.scope.to_string(),
                op: format!("{} {}", d.key.op, d.key.dtype.name()),
                predicted_calls: predicted,
                executed_calls: executed,
                predicted_flops: one * predicted,
                executed_flops: one * executed,
            })
        });
        let sums = audit.sum_differences.iter().map(|d| {
            Ok(Difference {
                phase: d.phase,
                scope: d.component.to_string(),
                op: "closed form".into(),
                predicted_calls: d.closed_form.calls,
                executed_calls: d.executed.calls,
                predicted_flops: self.prices.flops(&d.closed_form.cost)?,
                executed_flops: self.prices.flops(&d.executed.cost)?,
            })
        });
        self.audit = Some(AuditReport {
            balanced: audit.balanced(),
            closed_form_flops,
            predicted_flops,
            executed_flops,
            keys_compared: audit.keys_compared,
            graph_nodes: audit.graph.as_ref().map(|graph| graph.nodes),
            graph_launches: audit.graph.as_ref().map(|graph| graph.launches),
            graph_difference: audit.graph.as_ref().and_then(|graph| graph.difference.clone()),
            differences: keys.chain(sums).collect::<Result<_>>()?,
        });
        Ok(self)
    }
}
