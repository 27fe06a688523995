//! `flopaudit audit`: a workload executed on random tokens, and all three countings compared.

use std::cell::RefCell;

use clap::{Args, Subcommand};
use rand::{Rng, SeedableRng, rngs::StdRng};

use super::{
    args::{
        CountingArgs, EvaluationArgs, ExecutionArgs, ForwardArgs, GenerationArgs, LoraArgs,
        ModelArgs, OutputArgs, TrainingArgs,
    },
    interrupt::Interrupt,
    memory,
    trace::{self, TraceArgs},
};
use crate::{
    analytic::Structure,
    audit::{Audit, GraphView},
    error::Result,
    generate::{Request, generate},
    ledger::{Ledger, Phase},
    meter::{Meter, Observer},
    model::{Context, Decoder, Labelled, Trained},
    ops::Ids,
    report::Report,
    train::{Hyper, Trainer, data::Batch},
    workload::{Task, Workload},
};

/// What to audit.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// One forward pass.
    Forward(Box<Run<ForwardArgs>>),
    /// A generation.
    Generate(Box<Run<GenerationArgs>>),
    /// A training: forward, backward, update.
    Train(Box<Run<TrainingArgs>>),
    /// Passes over known text with their loss.
    #[command(name = "eval", visible_alias = "evaluate")]
    Evaluate(Box<Run<EvaluationArgs>>),
}

/// A workload's dimensions and how to run it.
#[derive(Debug, Args)]
pub struct Run<T: Args> {
    #[command(flatten)]
    task: T,
    #[command(flatten)]
    model: ModelArgs,
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

/// Executes, compares, prints.
pub fn run(command: Command) -> Result<()> {
    match command {
        Command::Forward(args) => audit(&args, args.task.task()),
        Command::Generate(args) => audit(&args, args.task.task()?),
        Command::Train(args) => audit(&args, args.task.task()),
        Command::Evaluate(args) => audit(&args, args.task.task()),
    }
}

fn audit<T: Args>(args: &Run<T>, task: Task) -> Result<()> {
    let execution = &args.execution;
    execution.set_threads();
    let output = args.output.open()?;
    let ledger_file = execution.open_ledger()?;
    let prices = args.counting.prices()?;
    let trace = args.trace.open(&prices)?;
    let timed = args.trace.timed(execution);
    let device = execution.open_device()?;
    let interrupt = Interrupt::listen()?;
    let checkpoint = args.model.open()?;
    let adapters = execution.adapters(&checkpoint.config, &args.lora)?;
    let workload = Workload {
        model: checkpoint.config.clone(),
        lora: adapters.lora().clone(),
        dtype: execution.dtype(),
        task,
    };
    workload.validate()?;
    memory::check(&workload, &device)?;
    let model = execution.load(&checkpoint, &adapters, &device, &interrupt)?;
    let observers = RefCell::new((Ledger::default(), trace));
    let recording = execute(model, task, execution, timed, &observers, &interrupt)?;
    execution.fault_was_planted(recording.is_some())?;
    let (ledger, trace) = observers.into_inner();
    let workloads = vec![workload];
    let audit = Audit::new(&workloads, &ledger)?.with_graphs(recording);
    let (origin, exact) = (&checkpoint.origin, Structure::Exact);
    let mut report = Report::new("audit", origin, workloads, exact, &prices, &audit.executed)?
        .with_ignored(checkpoint.listed())
        .and_ignored(adapters.ignored())
        .ran_on(&execution.device);
    if timed {
        report = report.with_times(&ledger);
    }
    let traced = trace::finish(trace, &report);
    output.write(&report.with_audit(&audit)?, false)?;
    traced?;
    ledger_file.write("audit", &execution.device, &ledger)?;
    audit.verdict()
}

/// Runs `task` on random tokens, all ops told to `observer`; cached tokens before a forward pass are
/// zeros, which cost the same. What a GPU replayed comes back from both sides.
fn execute(
    model: Decoder,
    task: Task,
    execution: &ExecutionArgs,
    timed: bool,
    observer: &RefCell<impl Observer>,
    interrupt: &Interrupt,
) -> Result<Option<GraphView>> {
    let mut rng = StdRng::seed_from_u64(execution.seed);
    let vocab = model.config().vocab_size as u32;
    let mut tokens = |n: u64| -> Vec<u32> { (0..n).map(|_| rng.random_range(0..vocab)).collect() };
    match task {
        Task::Forward { batch, seq, past, logits } => {
            let meter = Meter::new(observer, Phase::Setup).timed(timed);
            let mut cache = model.cache(meter, batch as usize, (past + seq) as usize)?;
            cache.set_held(past as usize)?;
            let ids = tokens(batch * seq);
            let ids = Ids::Host { ids: &ids, batch: batch as usize };
            let context = Context::Cached(&mut cache);
            model.forward(meter.phase(Phase::Forward), ids, context, logits)?;
        }
        Task::Generate { batch, prompt_tokens, new_tokens, kv_cache, sampling, .. } => {
            let request = Request {
                prompts: (0..batch).map(|_| tokens(prompt_tokens)).collect(),
                max_new_tokens: new_tokens as usize,
                sampling,
                seeds: (0..batch).map(|row| execution.seed.wrapping_add(row)).collect(),
                kv_cache,
                eos: vec![],
                timed,
                how: execution.how(),
            };
            let generation = generate(&model, &request, observer, |_, _| interrupt.check())?;
            return Ok(generation.recording);
        }
        Task::Train { batch, seq, accumulate, steps, full, recompute, clip } => {
            let meter = Meter::new(observer, Phase::Setup).timed(timed);
            let trained = if full { Trained::All } else { Trained::Adapters };
            let hyper = Hyper { clip: clip.then_some(1.0), ..Hyper::DEFAULT };
            let shape = (batch as usize, seq as usize);
            let mut trainer = Trainer::new(meter, model, trained, hyper, shape.1, recompute)?;
            for _ in 0..steps {
                let rows = batch * accumulate;
                let texts = tokens(rows * (seq + 1));
                let batches = random_batches(&texts, shape, accumulate as usize);
                let texts: Vec<Labelled> = batches.iter().map(Batch::labelled).collect();
                let found = trainer.gradients(meter, &texts)?;
                trainer.update(meter, found, 1e-4)?;
                interrupt.check()?;
            }
        }
        Task::Evaluate { batch, seq, passes } => {
            let meter = Meter::new(observer, Phase::Setup).timed(timed);
            let shape = (batch as usize, seq as usize);
            let positions = model.positions(meter, shape.1)?;
            for _ in 0..passes {
                let texts = tokens(batch * (seq + 1));
                for text in random_batches(&texts, shape, 1) {
                    model.loss(meter, text.labelled(), &positions)?;
                }
                interrupt.check()?;
            }
        }
    }
    interrupt.check()?;
    Ok(None)
}

/// `batches` micro-batches of batch × seq tokens and the ones after, with weights that sum to 1.
fn random_batches(tokens: &[u32], (batch, seq): (usize, usize), batches: usize) -> Vec<Batch> {
    let weight = 1.0 / (batches * batch * seq) as f32;
    let rows: Vec<&[u32]> = tokens.chunks_exact(seq + 1).collect();
    let one = |rows: &[&[u32]]| Batch {
        ids: rows.iter().flat_map(|row| &row[..seq]).copied().collect(),
        targets: rows.iter().flat_map(|row| &row[1..]).copied().collect(),
        weights: vec![weight; batch * seq],
        rows: batch,
        seq,
    };
    rows.chunks_exact(batch).map(one).collect()
}
