//! `flopaudit train`: gradient steps on text, within a budget, audited.

use std::{cell::RefCell, fs, path::PathBuf};

use super::{
    args::{
        CountingArgs, DataArgs, ExecutionArgs, LoraArgs, ModelArgs, OutputArgs, StructureArg,
        TemplateArg, bar, warn_of_noise,
    },
    folder::{self, Metrics},
    interrupt::Interrupt,
    memory,
    trace::{self, TraceArgs},
};
use crate::{
    analytic::Structure,
    audit::Audit,
    config::{Ignored, Matters},
    error::{Error, Result},
    ledger::{Dtype, MomentDtype},
    report::{Report, TrainingReport, human},
    target::Target,
    train::{
        Budget, Hyper, Schedule, Session, Settings, Shape,
        data::{Dataset, Passes},
    },
    weights::{Checkpoint, save, save_adapter},
    workload::{Checks, Rows},
};

/// Flags of `train`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Text to learn from: .jsonl or .json with `text`, `messages` or another form of record, or plain text
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Held-out text, scored before, during and after
    #[arg(long, value_name = "FILE")]
    eval_data: Option<PathBuf>,
    /// Folder of the adapter, metrics.jsonl, run.json and the checkpoint
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Go on with the run in --out
    #[arg(long)]
    resume: bool,
    #[command(flatten)]
    rows: DataArgs,
    #[command(flatten)]
    steps: StepArgs,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    template: TemplateArg,
    #[command(flatten)]
    lora: LoraArgs,
    #[command(flatten)]
    execution: ExecutionArgs,
    #[command(flatten)]
    structure: StructureArg,
    #[command(flatten)]
    counting: CountingArgs,
    #[command(flatten)]
    trace: TraceArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// How long and how fast to learn.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Training")]
struct StepArgs {
    /// Optimizer steps
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    steps: Option<u64>,
    /// Rounds over the data
    #[arg(long, value_name = "N", conflicts_with = "steps", allow_negative_numbers = true)]
    epochs: Option<f64>,
    /// Most FLOPs to spend, 1e17 for example, as --structure and --prices count them
    #[arg(long, value_name = "FLOPS", allow_negative_numbers = true)]
    budget: Option<f64>,
    /// Micro-steps whose gradients are summed into one step
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    accumulate: u32,
    /// Highest learning rate
    #[arg(long, value_name = "RATE", default_value_t = 2e-4, allow_negative_numbers = true)]
    lr: f64,
    /// Steps of linear warm-up
    #[arg(long, value_name = "N", default_value_t = 0)]
    warmup: u64,
    /// Learning rate after the warm-up
    #[arg(long, value_enum, default_value_t = Shape::Constant)]
    schedule: Shape,
    /// AdamW's decoupled weight decay
    #[arg(long, value_name = "DECAY", default_value_t = 0.01, allow_negative_numbers = true)]
    weight_decay: f64,
    /// Most norm of all gradients together; 0 does not clip
    #[arg(long, value_name = "NORM", default_value_t = 1.0, allow_negative_numbers = true)]
    clip: f64,
    /// Element type that AdamW's moments are kept in; bf16 halves their memory
    #[arg(long, value_enum, value_name = "DTYPE", default_value_t)]
    moments: MomentDtype,
    /// Train every weight, not the adapters alone
    #[arg(long)]
    full: bool,
    /// Keep only each layer's input, and run it forward again for its gradients
    #[arg(long)]
    recompute: bool,
    /// Steps from one evaluation to the next
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..))]
    eval_every: u64,
    /// Steps from one checkpoint to the next
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..))]
    save_every: u64,
    /// Tensors whose gradient is held against a finite difference, at the second step
    /// [default: 2; 0 in half precision, which rounds the difference away]
    #[arg(long, value_name = "N")]
    check_gradients: Option<usize>,
}

/// Trains; a folder made for nothing is taken away again.
pub fn run(args: Args) -> Result<()> {
    let (out, was_there) = (args.out.clone(), args.out.exists());
    let done = train(args);
    if done.is_err() && !was_there {
        // Fails where anything was saved.
        let _ = fs::remove_dir(out);
    }
    done
}

/// Trains, saves, reports, audits.
fn train(mut args: Args) -> Result<()> {
    args.execution.set_threads();
    args.validate()?;
    if !args.steps.full && args.execution.adapter.is_none() {
        args.lora.lora_rank.get_or_insert(8);
    }
    let output = args.output.open()?;
    let ledger_file = args.execution.open_ledger()?;
    let budget = args.budget()?;
    let trace = RefCell::new(args.trace.open(&budget.prices)?);
    args.execution.fault_was_planted(false)?;
    let device = args.execution.open_device()?;
    let saved = folder::open(&args.out, args.resume)?;
    let interrupt = Interrupt::listen()?;

    let mut checkpoint = args.model.open()?;
    refuse_dropout(&checkpoint)?;
    args.template.choose(&mut checkpoint)?;
    // What the end will save must have a config.json: its family may have no keys for it.
    if args.steps.full {
        checkpoint.config.to_hub()?;
    }
    let adapters = args.execution.adapters(&checkpoint.config, &args.lora)?;
    let data = args.rows.load(&args.data, &checkpoint)?;
    let held_out = args.eval_data.as_ref().map(|f| args.rows.load(f, &checkpoint)).transpose()?;
    let settings = args.settings(adapters.lora(), &data, held_out.as_ref());
    let one = settings.training(&checkpoint.config, 1, Rows::Whole);
    one.validate()?;
    memory::check(&one, &device)?;
    let (layout, batch) = (settings.layout, settings.batch);
    let passes = Passes::new(&data, layout, batch, true)?;
    let held = held_out.as_ref().map(|data| Passes::new(data, layout, batch, false)).transpose()?;
    let settings = args.with_steps(settings, &checkpoint, &passes, held.as_ref(), &budget)?;
    saved.iter().try_for_each(|saved| saved.check(&settings))?;

    warn_of_noise(&checkpoint);
    let model = args.execution.load(&checkpoint, &adapters, &device, &interrupt, true)?;
    let mut session =
        Session::new(settings, model, passes, held, &trace, args.trace.timed(&args.execution))?;
    if let Some(saved) = saved {
        saved.restore(&mut session)?;
    }
    let ended = args.train(&mut session, &checkpoint, &budget, &interrupt);
    let interrupted = ended.as_ref().is_err_and(is_interrupt);
    if !interrupted {
        ended.map_err(|e| args.with_what_is_kept(e, &session))?;
    }
    if session.progress.steps == 0 {
        anstream::eprintln!("stopped before the first step; nothing is saved");
        return Err(Error::Interrupted.into());
    }
    args.save(&mut session, &checkpoint)?;
    let (report, audit) = args.report(&mut session, &checkpoint, &budget)?;
    let read = [&data].into_iter().chain(&held_out).map(Dataset::notes);
    let report = report.and_ignored(adapters.ignored()).with_data(read);
    Target::open(&args.out.join("run.json"))?.write(&report)?;
    let traced = trace::finish(trace.borrow_mut().take(), &report);
    output.write(&report, false)?;
    traced?;
    ledger_file.write("train", &args.execution.device, &session.ledger())?;
    audit.verdict()?;
    if interrupted {
        let (done, all) = (session.progress.steps, session.settings.schedule.steps);
        anstream::eprintln!(
            "stopped after step {done} of {all}; the same command with --resume goes on"
        );
        return Err(Error::Interrupted.into());
    }
    Ok(())
}

fn is_interrupt(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(Error::Interrupted))
}

impl Args {
    fn validate(&self) -> Result<()> {
        let fail = |flag: &str, why: &str| Err(Error::flag(flag, why).into());
        let adapted =
            self.execution.adapter.is_some() || self.lora.lora_rank.is_some_and(|rank| rank > 0);
        if self.steps.full && adapted {
            return fail(
                "--full",
                "trains and saves the model's own weights; adapters beside it have no place",
            );
        }
        if self.checks() > 0 && self.execution.dtype() != Dtype::F32 {
            return fail("--check-gradients", "needs --dtype f32: less rounds the difference away");
        }
        let (eval_every, gradients) = (self.steps.eval_every, self.checks() as u64);
        Checks { eval_rows: 0, eval_every, gradients }.validate(self.steps.accumulate.into())?;
        self.steps.validate()
    }

    /// Tensors whose gradients are to be checked.
    fn checks(&self) -> usize {
        let default = if self.execution.dtype() == Dtype::F32 { 2 } else { 0 };
        self.steps.check_gradients.unwrap_or(default)
    }

    /// A divergence, with what is left of the run.
    fn with_what_is_kept(&self, error: anyhow::Error, session: &Session) -> anyhow::Error {
        let Some(Error::Diverged(why)) = error.downcast_ref() else { return error };
        let every = self.steps.save_every;
        let kept = (session.progress.steps / every * every).max(session.began());
        let left = match kept {
            0 => "nothing was saved yet".into(),
            step => format!("{} holds step {step}", self.out.display()),
        };
        Error::Diverged(format!("{why}; {left}")).into()
    }
}

impl StepArgs {
    fn validate(&self) -> Result<()> {
        let fail = |flag: &str, why: String| Err(Error::flag(flag, why).into());
        if self.steps.is_none() && self.epochs.is_none() && self.budget.is_none() {
            return fail("--steps", "give --steps, --epochs or --budget: when to stop".into());
        }
        if !(self.lr > 0.0 && self.lr.is_finite()) {
            return fail("--lr", format!("{} is not a positive number", self.lr));
        }
        let decays = self.weight_decay >= 0.0 && self.weight_decay * self.lr < 1.0;
        if !decays {
            let (decay, rate) = (self.weight_decay, self.lr);
            let why = format!("{decay} is not from 0 to below 1 / lr, which is {}", 1.0 / rate);
            return fail("--weight-decay, --lr", why);
        }
        if !(self.clip >= 0.0 && self.clip.is_finite()) {
            return fail("--clip", format!("{} is neither 0 nor a positive number", self.clip));
        }
        if let Some(epochs) = self.epochs.filter(|e| !(*e > 0.0 && *e < 1e9)) {
            return fail("--epochs", format!("{epochs} is not a positive number"));
        }
        match self.budget {
            Some(flops) if !(1.0..=1e30).contains(&flops) => {
                fail("--budget", format!("{flops} is not from 1 to 1e30"))
            }
            _ => Ok(()),
        }
    }
}

impl Args {
    fn budget(&self) -> Result<Budget> {
        Ok(Budget {
            flops: self.steps.budget.map(|flops| flops as u128),
            structure: self.structure.structure,
            prices: self.counting.prices()?,
        })
    }

    fn settings(
        &self,
        lora: &crate::config::LoraConfig,
        data: &Dataset,
        held_out: Option<&Dataset>,
    ) -> Settings {
        let args = &self.steps;
        let clip = (args.clip > 0.0).then_some(args.clip);
        Settings {
            data: data.fingerprint(),
            held_out: held_out.map(Dataset::fingerprint),
            lora: lora.clone(),
            full: args.full,
            dtype: self.execution.dtype(),
            attention: self.execution.attention.mode(),
            seq: self.rows.seq,
            layout: self.rows.layout(),
            batch: self.rows.batch,
            accumulate: args.accumulate as usize,
            recompute: args.recompute,
            schedule: Schedule {
                peak: args.lr,
                warmup: args.warmup,
                shape: args.schedule,
                steps: 1,
            },
            hyper: Hyper {
                weight_decay: args.weight_decay,
                clip,
                moments: args.moments,
                ..Hyper::DEFAULT
            },
            seed: self.execution.seed,
            eval_every: args.eval_every,
            checks: self.checks(),
        }
    }

    /// The steps asked for, or as many of them as the budget pays for.
    fn with_steps(
        &self,
        mut settings: Settings,
        checkpoint: &Checkpoint,
        data: &Passes,
        held_out: Option<&Passes>,
        budget: &Budget,
    ) -> Result<Settings> {
        let groups = data.groups().per_pass as f64 * settings.accumulate as f64;
        let epochs = |epochs: f64| (epochs * data.len() as f64 / groups).ceil().max(1.0) as u64;
        let asked = self.steps.steps.or(self.steps.epochs.map(epochs));
        settings.training(&checkpoint.config, asked.unwrap_or(1), Rows::Whole).validate()?;
        let asked = asked.unwrap_or(1 << 32);
        let run = |steps| settings.run(&checkpoint.config, (data, held_out), steps);
        let Some(steps) = budget.steps(asked, run)? else {
            let first = settings.run(&checkpoint.config, (data, held_out), 1);
            return Err(Error::OverBudget {
                item: "the first step, with its evaluations".into(),
                needed: format!("{} FLOPs", budget.cost(&first)?),
                left: budget.flops.unwrap_or_default().to_string(),
            }
            .into());
        };
        settings.schedule.steps = steps;
        Ok(settings)
    }

    /// Steps until the last, evaluating and saving between them.
    fn train(
        &self,
        session: &mut Session,
        checkpoint: &Checkpoint,
        budget: &Budget,
        interrupt: &Interrupt,
    ) -> Result<()> {
        let mut metrics = Metrics::open(&self.out, &session.progress)?;
        let template = "{bar:12} {pos}/{len}  {wide_msg}  {eta} left";
        let bar = bar(session.settings.schedule.steps, template);
        loop {
            let done = session.progress.steps;
            bar.set_position(done);
            let last =
                done >= session.settings.schedule.steps || !session.affords_a_step(budget)?;
            if session.evaluation_is_due(last) {
                let rows = |rows: usize| {
                    bar.set_message(format!("evaluating, {rows} rows"));
                    interrupt.check()
                };
                if let Some(loss) = session.evaluate(rows)? {
                    metrics.write(&serde_json::json!({
                        "step": done, "eval_loss": loss, "perplexity": loss.exp(),
                        "flops": spent(session, budget)?,
                    }))?;
                }
            }
            if last {
                break;
            }
            interrupt.check()?;
            let rate = session.settings.schedule.rate(done);
            let step = session.step()?;
            let flops = spent(session, budget)?;
            metrics.write(&serde_json::json!({
                "step": done + 1, "loss": step.loss, "lr": rate,
                "gradient_norm": step.gradient_norm, "flops": flops,
                "seconds": session.progress.step_seconds.last(),
            }))?;
            let speed = session.tokens().real as f64 / session.progress.seconds();
            let share = budget.flops.map_or_else(String::new, |all| {
                format!(" ({:.1} %)", 100.0 * flops as f64 / all as f64)
            });
            bar.set_message(format!(
                "loss {:.4}  {speed:.0} tokens/s  {} FLOPs{share}",
                step.loss,
                human(flops as f64)
            ));
            if session.progress.steps.is_multiple_of(self.steps.save_every) {
                self.save(session, checkpoint)?;
            }
        }
        bar.finish_and_clear();
        Ok(())
    }

    /// Adapter (or weights) and checkpoint.
    fn save(&self, session: &mut Session, checkpoint: &Checkpoint) -> Result<()> {
        let trained = session.trained()?;
        if session.settings.full {
            let format = [("format".to_string(), "pt".to_string())].into();
            save(&self.out.join("model.safetensors"), &trained, format)?;
            Target::open(&self.out.join("config.json"))?.write(&checkpoint.config.to_hub()?)?;
            checkpoint.text.save(&self.out)?;
        } else {
            save_adapter(&self.out, &checkpoint.name, &session.settings.lora, &trained)?;
        }
        session.save(&self.out.join(folder::CHECKPOINT))
    }

    fn report(
        &self,
        session: &mut Session,
        checkpoint: &Checkpoint,
        budget: &Budget,
    ) -> Result<(Report, Audit)> {
        let (workloads, ledger) = (session.workloads(), session.ledger());
        let audit = Audit::new(&workloads, &ledger)?;
        let (origin, exact, prices) = (&checkpoint.origin, Structure::Exact, &budget.prices);
        let mut report = Report::new("train", origin, workloads, exact, prices, &audit.executed)?
            .with_ignored(checkpoint.listed())
            .ran_on(&self.execution.device);
        if self.trace.timed(&self.execution) {
            report = report.with_times(&ledger);
        }
        report.training = Some(TrainingReport::new(session, budget, &self.out)?);
        Ok((report.with_audit(&audit)?, audit))
    }
}

/// Refuses a checkpoint that is to be trained with dropout, which this training has not.
fn refuse_dropout(checkpoint: &Checkpoint) -> Result<()> {
    let missed = |entry: &&Ignored| entry.matters == Matters::InTraining;
    let Some(Ignored { file, key, .. }) = checkpoint.ignored.iter().find(missed) else {
        return Ok(());
    };
    let why = "is not 0, and this program trains without dropout; write 0 to train so";
    Err(Error::Config { origin: file.clone(), key: key.clone(), why: why.into() }.into())
}

/// FLOPs of all that has run, as the budget counts.
fn spent(session: &Session, budget: &Budget) -> Result<u128> {
    budget.cost(&session.ran())
}
