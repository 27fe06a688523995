//! `flopaudit train`: gradient steps on text, within a budget, audited.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::Context;

use super::{
    args::{
        CountingArgs, DataArgs, ExecutionArgs, LoraArgs, ModelArgs, OutputArgs, StructureArg, bar,
        warn_of_noise,
    },
    interrupt::Interrupt,
    memory,
};
use crate::{
    analytic::Structure,
    audit::Audit,
    error::{Error, Result},
    report::{Report, Target, TrainingReport, human},
    train::{Budget, Hyper, Progress, Saved, Schedule, Session, Settings, Shape, data::Dataset},
    weights::{Checkpoint, save, save_adapter},
};

/// Flags of `train`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Text to learn from: .jsonl with `text` or chat `messages` a line, or any plain text
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
    lora: LoraArgs,
    #[command(flatten)]
    execution: ExecutionArgs,
    #[command(flatten)]
    structure: StructureArg,
    #[command(flatten)]
    counting: CountingArgs,
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
    #[arg(long, value_name = "N", default_value_t = 2)]
    check_gradients: usize,
}

const CHECKPOINT: &str = "checkpoint.safetensors";
const METRICS: &str = "metrics.jsonl";

/// Trains, saves, reports, audits.
pub fn run(mut args: Args) -> Result<()> {
    args.execution.set_threads();
    args.steps.validate()?;
    if !args.steps.full && args.execution.adapter.is_none() && args.lora.lora_rank == 0 {
        args.lora.lora_rank = 8;
    }
    let output = args.output.open()?;
    let ledger_file = args.execution.open_ledger()?;
    let budget = args.budget()?;
    let device = args.execution.open_device()?;
    let saved = args.open_out()?;
    let interrupt = Interrupt::listen()?;

    let checkpoint = args.model.open()?;
    let adapters = args.execution.adapters(&checkpoint.config, &args.lora)?;
    let data = args.rows.load(&args.data, &checkpoint)?;
    let held_out = args.eval_data.as_ref().map(|f| args.rows.load(f, &checkpoint)).transpose()?;
    let settings = args.settings(&checkpoint, adapters.lora(), &data, held_out.as_ref());
    let one = settings.training(&checkpoint.config, 1);
    one.validate()?;
    memory::check(&one, &device)?;
    let settings = args.with_steps(settings, &checkpoint, &data, held_out.as_ref(), &budget)?;
    saved.iter().try_for_each(|saved| saved.check(&settings))?;

    warn_of_noise(&checkpoint);
    let model = args.execution.load(&checkpoint, &adapters, &device, &interrupt)?;
    let mut session = Session::new(settings, model, &data, held_out.as_ref())?;
    if let Some(saved) = saved {
        saved.restore(&mut session)?;
    }
    let ended = args.train(&mut session, &checkpoint, &budget, &interrupt);
    let interrupted = ended.as_ref().is_err_and(is_interrupt);
    if !interrupted {
        ended?;
    }
    args.save(&mut session, &checkpoint)?;
    let report = args.report(&mut session, &checkpoint, &budget)?;
    Target::open(&args.out.join("run.json"))?.write(&report.0)?;
    ledger_file.write("train", &args.execution.device, &session.ledger())?;
    output.write(&report.0, false)?;
    report.1.verdict()?;
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
            return fail("--weight-decay", format!("{} is not in [0, 1 / lr)", self.weight_decay));
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

    /// The output folder, made where it is missing, and the checkpoint to go on from.
    fn open_out(&self) -> Result<Option<Saved>> {
        let bad = |why: String| Error::File { file: self.out.clone(), why };
        fs::create_dir_all(&self.out).map_err(|e| bad(format!("cannot be made: {e}")))?;
        // Fails now rather than after hours.
        drop(Target::open(&self.out.join("run.json"))?);
        let file = self.out.join(CHECKPOINT);
        match (self.resume, file.exists()) {
            (true, true) => Saved::read(&file).map(Some),
            (true, false) => Err(bad(format!("holds no {CHECKPOINT} to resume")).into()),
            (false, true) => {
                Err(bad("holds a run: --resume goes on with it, another --out keeps it".into())
                    .into())
            }
            (false, false) => Ok(None),
        }
    }

    fn settings(
        &self,
        checkpoint: &Checkpoint,
        lora: &crate::config::LoraConfig,
        data: &Dataset,
        held_out: Option<&Dataset>,
    ) -> Settings {
        let args = &self.steps;
        let clip = (args.clip > 0.0).then_some(args.clip);
        Settings {
            model: checkpoint.origin.clone(),
            data: data.fingerprint(),
            held_out: held_out.map(Dataset::fingerprint),
            lora: lora.clone(),
            full: args.full,
            dtype: self.execution.dtype(),
            seq: self.rows.seq,
            batch: self.rows.batch,
            accumulate: args.accumulate as usize,
            recompute: args.recompute,
            schedule: Schedule {
                peak: args.lr,
                warmup: args.warmup,
                shape: args.schedule,
                steps: 1,
            },
            hyper: Hyper { weight_decay: args.weight_decay, clip, ..Hyper::DEFAULT },
            seed: self.execution.seed,
            eval_every: args.eval_every,
            checks: match self.execution.dtype() {
                crate::ledger::Dtype::F32 => args.check_gradients,
                _ => 0,
            },
        }
    }

    /// The steps asked for, or as many of them as the budget pays for.
    fn with_steps(
        &self,
        mut settings: Settings,
        checkpoint: &Checkpoint,
        data: &Dataset,
        held_out: Option<&Dataset>,
        budget: &Budget,
    ) -> Result<Settings> {
        let rows = (settings.batch * settings.accumulate) as f64;
        let epochs = |epochs: f64| (epochs * data.rows() as f64 / rows).ceil().max(1.0) as u64;
        let asked = self.steps.steps.or(self.steps.epochs.map(epochs)).unwrap_or(1 << 32);
        let run = |steps| settings.run(&checkpoint.config, held_out, steps);
        let Some(steps) = budget.steps(asked, run)? else {
            let first = settings.run(&checkpoint.config, held_out, 1);
            return Err(Error::OverBudget {
                item: "the first step, with its evaluations".into(),
                needed: budget.cost(&first)?,
                left: budget.flops.unwrap_or_default(),
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
        let mut metrics = Metrics::open(&self.out.join(METRICS), &session.progress)?;
        let template = "{bar:24} {pos}/{len} steps  {msg}  {eta} left";
        let bar = bar(session.settings.schedule.steps, template);
        let began = (Instant::now(), session.progress.steps);
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
            let tokens = (session.progress.steps - began.1) * session.settings.tokens();
            let speed = tokens as f64 / began.0.elapsed().as_secs_f64();
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
            Target::open(&self.out.join("config.json"))?.write(&checkpoint.config.to_hub())?;
            checkpoint.text.save(&self.out)?;
        } else {
            save_adapter(&self.out, &checkpoint.name, &session.settings.lora, &trained)?;
        }
        session.save(&self.out.join(CHECKPOINT))
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
        let mut report = Report::new("train", origin, workloads, exact, prices, &audit.executed)?;
        report.device = Some(self.execution.device.clone());
        report.training = Some(TrainingReport::new(session, budget, &self.out)?);
        Ok((report.with_audit(&audit)?, audit))
    }
}

/// FLOPs of all that has run, as the budget counts.
fn spent(session: &Session, budget: &Budget) -> Result<u128> {
    let workloads: Vec<_> = session.workloads().into_iter().map(|w| (w, 1)).collect();
    budget.cost(&workloads)
}

/// metrics.jsonl: a line a step and a line an evaluation.
struct Metrics(fs::File, PathBuf);

impl Metrics {
    /// Opens `file`, with the lines kept of what `progress` holds.
    fn open(file: &Path, progress: &Progress) -> Result<Self> {
        let name = || file.display().to_string();
        let text = fs::read_to_string(file).unwrap_or_default();
        let known = |line: &&str| {
            let line: serde_json::Value = serde_json::from_str(line).unwrap_or_default();
            let points = match line.get("eval_loss") {
                Some(_) => &progress.evaluations,
                None => &progress.losses,
            };
            line["step"].as_u64().is_some_and(|step| points.iter().any(|p| p.step == step))
        };
        let kept: String = text.lines().filter(known).flat_map(|line| [line, "\n"]).collect();
        Target::open(file)?.write_with(|out| Ok(out.write_all(kept.as_bytes())?))?;
        let opened = fs::OpenOptions::new().append(true).open(file).with_context(name)?;
        Ok(Self(opened, file.into()))
    }

    fn write(&mut self, line: &serde_json::Value) -> Result<()> {
        writeln!(self.0, "{line}").with_context(|| self.1.display().to_string())
    }
}
