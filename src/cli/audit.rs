//! `flopaudit audit`: a workload executed on random tokens, and all three countings compared.

use std::cell::RefCell;

use clap::{Args, Subcommand};
use rand::{Rng, SeedableRng, rngs::StdRng};

use super::{
    args::{CountingArgs, ExecutionArgs, LoraArgs, ModelArgs, OutputArgs},
    interrupt::Interrupt,
    memory,
    task::{EvaluationArgs, ForwardArgs, GenerationArgs, TrainingArgs, VerificationArgs},
    trace::{self, TraceArgs},
};
use crate::{
    analytic::Structure,
    audit::{Audit, GraphView},
    error::Result,
    generate::{Next, Request, generate},
    ledger::{Ledger, Module, Phase},
    meter::{Meter, Observer},
    model::{Context, Decoder, Labelled, Trained},
    ops::{Ids, Sampler},
    report::Report,
    train::{Hyper, Trainer, data::Batch},
    workload::{Logits, Sampling, Task, Turn},
};

/// What to audit.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// One forward pass.
    Forward(Box<Run<ForwardArgs>>),
    /// A generation.
    Generate(Box<Run<GenerationArgs>>),
    /// Rounds of verification in speculative decoding.
    Verify(Box<Run<VerificationArgs>>),
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
        Command::Generate(args) => audit(&args, args.task.task()),
        Command::Verify(args) => audit(&args, args.task.task()),
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
    let workload = execution.workload(&checkpoint.config, adapters.lora(), task);
    workload.validate()?;
    memory::check(&workload, &device)?;
    let trains = matches!(workload.task, Task::Train { .. });
    let model = execution.load(&checkpoint, &adapters, &device, &interrupt, trains)?;
    let observers = RefCell::new((Ledger::default(), trace));
    let task = &workload.task;
    let recordings = execute(model, task, execution, timed, &observers, &interrupt)?;
    execution.fault_was_planted(!recordings.is_empty())?;
    let (ledger, trace) = observers.into_inner();
    let workloads = vec![workload];
    let audit = Audit::new(&workloads, &ledger)?.with_graphs(recordings);
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

/// Runs `task` on random tokens, all ops told to `observer`; cached tokens before a pass are zeros,
/// which cost the same. What a GPU replayed comes back from both sides. All sequences are of one
/// length: text of its own lengths is what `generate`, `train` and `eval` run, and audit themselves.
fn execute(
    model: Decoder,
    task: &Task,
    execution: &ExecutionArgs,
    timed: bool,
    observer: &RefCell<impl Observer>,
    interrupt: &Interrupt,
) -> Result<Vec<GraphView>> {
    let mut rng = StdRng::seed_from_u64(execution.seed);
    let vocab = model.config().vocab_size as u32;
    let mut tokens = |n: u64| -> Vec<u32> { (0..n).map(|_| rng.random_range(0..vocab)).collect() };
    let meter = Meter::new(observer, Phase::Setup).timed(timed);
    match task {
        Task::Forward { batch, seq, past, logits, sequences: _ } => {
            let mut cache = model.cache(meter, *batch as usize, (past + seq) as usize)?;
            cache.set_held(*past as usize)?;
            let ids = tokens(batch * seq);
            let ids = Ids::Host { ids: &ids, batch: *batch as usize };
            let (forward, context) = (meter.phase(Phase::Forward), Context::Cached(&mut cache));
            match logits {
                Logits::None => model.feed(forward, ids, context)?,
                Logits::All | Logits::Last => {
                    model.forward(forward, ids, context, *logits)?;
                }
            }
        }
        Task::Generate {
            batch,
            past,
            prompt_tokens,
            prompts: _,
            new_tokens,
            then,
            prefill_chunk,
            kv_cache,
            sampling,
            max_new_tokens: _,
        } => {
            let mut of_each = |length: u64| (0..*batch).map(|_| tokens(length)).collect();
            let mut turn = |turn: &Turn| Next {
                prompts: of_each(turn.prompt_tokens),
                new_tokens: turn.new_tokens as usize,
            };
            let then = then.iter().map(&mut turn).collect();
            let request = Request {
                prompts: of_each(*prompt_tokens),
                max_new_tokens: *new_tokens as usize,
                sampling: *sampling,
                seeds: (0..*batch).map(|row| execution.seed.wrapping_add(row)).collect(),
                kv_cache: *kv_cache,
                eos: vec![],
                timed,
                how: execution.how(),
                past: *past as usize,
                prefill_chunk: prefill_chunk.map(|chunk| chunk as usize),
                then,
            };
            let generation = generate(&model, &request, observer, |_, _| interrupt.check())?;
            return Ok(generation.recordings);
        }
        Task::Verify { batch, past, drafted, accepted, rounds } => {
            let room = *past + (rounds - 1) * (accepted + 1) + drafted + 1;
            let mut cache = model.cache(meter, *batch as usize, room as usize)?;
            let mut sampler = Sampler::new(Sampling::GREEDY, &[]);
            for round in 0..*rounds {
                // What was drafted in vain is no longer held.
                cache.set_held((past + round * (accepted + 1)) as usize)?;
                let ids = tokens(batch * (drafted + 1));
                let rows: Vec<Vec<u32>> = ids.iter().map(|id| vec![*id]).collect();
                let ids = Ids::Host { ids: &ids, batch: *batch as usize };
                let context = Context::Cached(&mut cache);
                let decode = meter.phase(Phase::Decode);
                let logits = model.forward(decode, ids, context, Logits::All)?.share();
                let at = meter.phase(Phase::Sampling).at(Module::Sampler);
                sampler.next(at, &logits, &rows)?;
                interrupt.check()?;
            }
        }
        Task::Train { batch, seq, accumulate, steps, full, recompute, clip, moments, rows: _ } => {
            let trained = if *full { Trained::All } else { Trained::Adapters };
            let (clip, moments) = (clip.then_some(1.0), *moments);
            let hyper = Hyper { clip, moments, ..Hyper::DEFAULT };
            let mut trainer =
                Trainer::new(meter, model, trained, hyper, *seq as usize, *recompute)?;
            for _ in 0..*steps {
                let batches: Vec<Batch> = (0..*accumulate)
                    .map(|_| random_batch(&mut tokens, (*batch, *seq), *accumulate))
                    .collect();
                let texts: Vec<Labelled> = batches.iter().map(Batch::labelled).collect();
                let found = trainer.gradients(meter, &texts)?;
                trainer.update(meter, found, 1e-4)?;
                interrupt.check()?;
            }
        }
        Task::Evaluate { batch, seq, passes, rows: _ } => {
            let positions = model.positions(meter, *seq as usize)?;
            for _ in 0..*passes {
                let text = random_batch(&mut tokens, (*batch, *seq), 1);
                model.loss(meter, text.labelled(), &positions)?;
                interrupt.check()?;
            }
        }
    }
    interrupt.check()?;
    Ok(vec![])
}

/// Random tokens to feed and to predict, (batch, seq), whose weights sum to 1 over `batches` such.
fn random_batch(
    tokens: &mut impl FnMut(u64) -> Vec<u32>,
    (batch, seq): (u64, u64),
    batches: u64,
) -> Batch {
    let all = batch * seq;
    Batch {
        ids: tokens(all),
        targets: tokens(all),
        weights: vec![1.0 / (batches * all) as f32; all as usize],
        rows: batch as usize,
        seq: seq as usize,
        sequences: None,
    }
}
