//! `flopaudit eval`: the loss over known text, audited.

use std::{cell::RefCell, path::PathBuf, time::Instant};

use super::{
    args::{
        CountingArgs, DataArgs, ExecutionArgs, LoraArgs, ModelArgs, OutputArgs, TemplateArg, bar,
        warn_of_noise,
    },
    interrupt::Interrupt,
    memory,
    trace::{self, TraceArgs},
};
use crate::{
    analytic::Structure,
    audit::Audit,
    error::Result,
    ledger::{Ledger, Phase},
    meter::Meter,
    report::{EvaluationReport, Report, TokensReport},
    train::{data::Passes, evaluate, evaluation_tasks},
};

/// Flags of `eval`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Text to score: .jsonl or .json with `text`, `messages` or another form of record, or plain text
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    #[command(flatten)]
    rows: DataArgs,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    template: TemplateArg,
    #[command(flatten)]
    lora: LoraArgs,
    #[command(flatten)]
    execution: ExecutionArgs,
    #[command(flatten)]
    counting: CountingArgs,
    #[command(flatten)]
    trace: TraceArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// Scores, reports, audits.
pub fn run(args: Args) -> Result<()> {
    let execution = &args.execution;
    execution.set_threads();
    let output = args.output.open()?;
    let ledger_file = execution.open_ledger()?;
    let prices = args.counting.prices()?;
    let trace = args.trace.open(&prices)?;
    execution.fault_was_planted(false)?;
    let device = execution.open_device()?;
    let interrupt = Interrupt::listen()?;
    let mut checkpoint = args.model.open()?;
    args.template.choose(&mut checkpoint)?;
    let adapters = execution.adapters(&checkpoint.config, &args.lora)?;
    let data = args.rows.load(&args.data, &checkpoint)?;
    let batch = args.rows.batch;
    let passes = Passes::new(&data, args.rows.layout(), batch, false)?;
    for task in evaluation_tasks(&passes, batch) {
        let workload = execution.workload(&checkpoint.config, adapters.lora(), task);
        workload.validate()?;
        memory::check(&workload, &device)?;
    }
    warn_of_noise(&checkpoint);
    let model = execution.load(&checkpoint, &adapters, &device, &interrupt, false)?;

    let bar = bar(data.rows() as u64, "{bar:24} {pos}/{len} rows  {eta} left");
    let progress = |rows: usize| {
        bar.set_position(rows as u64);
        interrupt.check()
    };
    let timed = args.trace.timed(execution);
    let observers = RefCell::new((Ledger::default(), trace));
    let meter = Meter::new(&observers, Phase::Forward).timed(timed);
    let start = Instant::now();
    let found = evaluate(meter, &model, &passes, batch, progress)?;
    let seconds = start.elapsed().as_secs_f64();
    bar.finish_and_clear();

    let (ledger, trace) = observers.into_inner();
    let audit = Audit::new(&found.workloads, &ledger)?;
    let (origin, exact) = (&checkpoint.origin, Structure::Exact);
    let workloads = found.workloads.clone();
    let mut report = Report::new("eval", origin, workloads, exact, &prices, &audit.executed)?
        .with_ignored(checkpoint.listed())
        .and_ignored(adapters.ignored())
        .with_data([data.notes()])
        .ran_on(&execution.device);
    if timed {
        report = report.with_times(&ledger);
    }
    let tokens = TokensReport { scored: Some(found.tokens as u128), ..report.tokens };
    report.evaluation = Some(EvaluationReport {
        loss: found.loss,
        perplexity: found.perplexity(),
        seconds,
        tokens_per_s: tokens.real as f64 / seconds,
        tokens,
        adapter: execution.adapter.as_ref().map(|dir| dir.display().to_string()),
    });
    let traced = trace::finish(trace, &report);
    output.write(&report.with_audit(&audit)?, false)?;
    traced?;
    ledger_file.write("eval", &execution.device, &ledger)?;
    audit.verdict()
}
