//! A run of training: steps, evaluations, and what a later process needs to go on.

use std::cell::RefCell;

use serde::{Deserialize, Serialize};

use super::{
    budget::Budget,
    check::{self, Check},
    data::{Batch, Dataset, Order},
    evaluate::{self, evaluate},
    optimizer::Hyper,
    schedule::Schedule,
    step::{Step, Trainer},
};
use crate::{
    config::{LoraConfig, ModelConfig},
    error::Result,
    ledger::{Dtype, Ledger, Phase},
    meter::{Meter, Observer},
    model::{Decoder, Labelled, Trained},
    weights::Named,
    workload::{Task, Workload},
};

/// Everything that decides what a run does. A run that goes on must have the same.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// Fingerprint of the training rows.
    pub data: u64,
    /// Fingerprint of the held-out rows; none without.
    pub held_out: Option<u64>,
    /// The adapters.
    pub lora: LoraConfig,
    /// Every weight is trained, not the adapters alone.
    pub full: bool,
    /// Element type of weights and activations.
    pub dtype: Dtype,
    /// Tokens of a row.
    pub seq: usize,
    /// Rows of a micro-step.
    pub batch: usize,
    /// Micro-steps of a step.
    pub accumulate: usize,
    /// Layers run forward again for their gradients.
    pub recompute: bool,
    /// Learning rates, and steps in all.
    pub schedule: Schedule,
    /// The optimizer's.
    pub hyper: Hyper,
    /// Seed of the rows' order and of the adapters.
    pub seed: u64,
    /// Steps from one evaluation to the next.
    pub eval_every: u64,
    /// Tensors whose gradients are held against finite differences.
    pub checks: usize,
}

/// A figure at a step; step 0 is before the first.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// Steps done.
    pub step: u64,
    /// The figure.
    pub loss: f64,
}

/// What has been done so far.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Steps done.
    pub steps: u64,
    /// What ran and will not go on, and how often.
    pub finished: Vec<(Workload, u64)>,
    /// Loss of each step, before its update.
    pub losses: Vec<Point>,
    /// Held-out losses.
    pub evaluations: Vec<Point>,
    /// Norm of each trained tensor's gradient at the latest step.
    pub norms: Vec<f64>,
    /// Finite differences, once taken.
    pub check: Option<Check>,
    /// Seconds of each step, without what else is done between them.
    pub step_seconds: Vec<f64>,
}

/// A run in this process.
pub struct Session<'a> {
    /// What it does.
    pub settings: Settings,
    /// What it did.
    pub progress: Progress,
    trainer: Trainer,
    data: &'a Dataset,
    held_out: Option<&'a Dataset>,
    order: Order,
    ledger: RefCell<Ledger>,
    /// Sees every op beside the ledger.
    beside: &'a RefCell<dyn Observer + 'a>,
    timed: bool,
    /// Fingerprint of the weights and adapters that the run began from.
    pub(super) weights: u64,
    /// Rotary tables that no step has used yet.
    tables: Ledger,
    /// Steps that earlier processes did.
    began: u64,
}

impl<'a> Session<'a> {
    /// Prepares `model`, which carries the adapters of `settings`. `beside` sees every op that this
    /// process runs; `timed` has each timed.
    ///
    /// # Errors
    /// A model without anything to train, or a device out of memory.
    pub fn new(
        settings: Settings,
        mut model: Decoder,
        data: &'a Dataset,
        held_out: Option<&'a Dataset>,
        beside: &'a RefCell<dyn Observer + 'a>,
        timed: bool,
    ) -> Result<Self> {
        let tables = RefCell::new((Ledger::default(), beside));
        let meter = Meter::new(&tables, Phase::Setup).timed(timed);
        let trained = if settings.full { Trained::All } else { Trained::Adapters };
        let weights = model.fingerprint()?;
        let trainer =
            Trainer::new(meter, model, trained, settings.hyper, settings.seq, settings.recompute)?;
        let order = Order::new(data.rows(), settings.seed);
        let checks = settings.checks.min(trainer.optimizer.names().count());
        let settings = Settings { checks, ..settings };
        Ok(Self {
            settings,
            progress: Progress::default(),
            trainer,
            data,
            held_out,
            order,
            ledger: RefCell::default(),
            beside,
            timed,
            weights,
            tables: tables.into_inner().0,
            began: 0,
        })
    }

    /// Goes on from `progress`, after which `ledger` had been executed.
    ///
    /// # Errors
    /// As [`super::Optimizer::restore`].
    pub fn resume(
        &mut self,
        progress: Progress,
        ledger: Ledger,
        find: impl Fn(&str) -> Result<Vec<f32>>,
    ) -> Result<()> {
        self.began = progress.steps;
        let Trainer { model, optimizer, .. } = &mut self.trainer;
        optimizer.restore(model, progress.steps, find)?;
        self.progress = progress;
        self.ledger.borrow_mut().extend(ledger);
        Ok(())
    }

    /// The trained tensors at their latest update.
    ///
    /// # Errors
    /// The device's.
    pub fn trained(&mut self) -> Result<Vec<Named>> {
        let Trainer { model, optimizer, .. } = &mut self.trainer;
        optimizer.masters(model)
    }

    /// The trained tensors with their moments, as [`super::Optimizer::state`].
    ///
    /// # Errors
    /// The device's.
    pub fn state(&self) -> Result<Vec<(&str, Vec<f32>)>> {
        self.trainer.optimizer.state()
    }

    /// Names of the trained tensors, in the order of [`Progress::norms`].
    pub fn names(&self) -> Vec<&str> {
        self.trainer.optimizer.names().collect()
    }

    /// Everything executed so far, by this process and those before.
    pub fn ledger(&self) -> Ledger {
        self.ledger.borrow().clone()
    }

    /// What has run so far, and how often.
    pub fn ran(&self) -> Vec<(Workload, u64)> {
        let steps = self.progress.steps - self.began;
        let going_on = (steps > 0).then(|| (self.training(steps), 1));
        self.progress.finished.iter().cloned().chain(going_on).collect()
    }

    /// The same, one after another.
    pub fn workloads(&self) -> Vec<Workload> {
        let times = |(workload, times)| std::iter::repeat_n(workload, times as usize);
        self.ran().into_iter().flat_map(times).collect()
    }

    /// Steps that earlier processes did.
    pub fn began(&self) -> u64 {
        self.began
    }

    /// So many steps of it.
    pub fn training(&self, steps: u64) -> Workload {
        self.settings.training(self.trainer.model.config(), steps)
    }

    /// One evaluation of it.
    pub fn evaluation(&self) -> Vec<(Workload, u64)> {
        let tasks = self.settings.evaluation(self.trainer.model.config(), self.held_out);
        tasks.into_iter().map(|workload| (workload, 1)).collect()
    }

    /// Whether `budget` pays for one more step, and for the evaluation that must follow the last.
    ///
    /// # Errors
    /// As [`Budget::cost`].
    pub fn affords_a_step(&self, budget: &Budget) -> Result<bool> {
        let (settings, model) = (&self.settings, self.trainer.model.config());
        let steps = self.progress.steps - self.began + 1;
        let mut all = self.progress.finished.clone();
        all.push((settings.training(model, steps), 1));
        all.extend(self.evaluation());
        if self.progress.steps + 1 == settings.check_at() {
            all.extend(settings.check(model).map(|w| (w, 1)));
        }
        budget.covers(&all)
    }

    /// One optimizer step.
    ///
    /// # Errors
    /// As [`Trainer::gradients`] and [`Trainer::update`].
    pub fn step(&mut self) -> Result<Step> {
        let start = std::time::Instant::now();
        self.ledger.borrow_mut().extend(std::mem::take(&mut self.tables));
        let rate = self.settings.schedule.rate(self.progress.steps);
        let batches = self.batches();
        let texts: Vec<Labelled> = batches.iter().map(Batch::labelled).collect();
        let observers = RefCell::new((&self.ledger, self.beside));
        let meter = Meter::new(&observers, Phase::Forward).timed(self.timed);
        let found = self.trainer.gradients(meter, &texts)?;
        let taken = start.elapsed();
        if self.progress.steps + 1 == self.settings.check_at() {
            let (checks, seed) = (self.settings.checks, self.settings.seed);
            let check = check::run(meter, &mut self.trainer, &found, &texts, checks, seed)?;
            let ran = Settings { checks: check.slopes.len(), ..self.settings.clone() };
            self.progress.finish(ran.check(self.trainer.model.config()));
            self.progress.check = Some(check).filter(|check| !check.slopes.is_empty());
        }
        let start = std::time::Instant::now();
        let step = self.trainer.update(meter, found, rate)?;
        self.progress.steps += 1;
        self.progress.step_seconds.push((taken + start.elapsed()).as_secs_f64());
        self.progress.losses.push(Point { step: self.progress.steps, loss: step.loss });
        self.progress.norms.clone_from(&step.norms);
        Ok(step)
    }

    /// The micro-batches of the next step, with weights that sum to 1 over all of them.
    fn batches(&mut self) -> Vec<Batch> {
        let Settings { batch, accumulate, .. } = self.settings;
        let mut position = self.progress.steps * (batch * accumulate) as u64;
        let mut batches: Vec<Batch> = (0..accumulate)
            .map(|_| {
                let rows: Vec<usize> =
                    (position..position + batch as u64).map(|p| self.order.index(p)).collect();
                position += batch as u64;
                self.data.batch(&rows)
            })
            .collect();
        let counted: f32 = batches.iter().flat_map(|b| &b.weights).sum();
        for weight in batches.iter_mut().flat_map(|b| &mut b.weights) {
            *weight /= counted;
        }
        batches
    }

    /// The held-out loss, where there is held-out text.
    ///
    /// # Errors
    /// As [`evaluate`].
    pub fn evaluate(&mut self, progress: impl FnMut(usize) -> Result<()>) -> Result<Option<f64>> {
        let Some(data) = self.held_out else { return Ok(None) };
        // An interrupted evaluation leaves no trace: its ops belong to no workload.
        let observers = RefCell::new((Ledger::default(), self.beside));
        let meter = Meter::new(&observers, Phase::Forward).timed(self.timed);
        let found = evaluate(meter, &self.trainer.model, data, self.settings.batch, progress)?;
        self.ledger.borrow_mut().extend(observers.into_inner().0);
        self.progress.finish(found.workloads);
        self.progress.evaluations.push(Point { step: self.progress.steps, loss: found.loss });
        Ok(Some(found.loss))
    }

    /// Whether an evaluation is due before the next step, or after the last.
    pub fn evaluation_is_due(&self, last: bool) -> bool {
        let steps = self.progress.steps;
        let latest = self.progress.evaluations.last().map(|point| point.step);
        let due = last || steps.is_multiple_of(self.settings.eval_every);
        self.held_out.is_some() && due && latest != Some(steps)
    }
}

impl Progress {
    /// Keeps what ran and will not go on; the same workload again is only counted.
    fn finish(&mut self, workloads: impl IntoIterator<Item = Workload>) {
        for workload in workloads {
            match self.finished.iter_mut().find(|(known, _)| *known == workload) {
                Some((_, times)) => *times += 1,
                None => self.finished.push((workload, 1)),
            }
        }
    }

    /// Seconds of all steps.
    pub fn seconds(&self) -> f64 {
        self.step_seconds.iter().sum()
    }
}

impl Settings {
    /// The step whose gradients are checked: the second, when B has left zero; 0 for none.
    fn check_at(&self) -> u64 {
        match self.checks {
            0 => 0,
            _ => self.schedule.steps.min(2),
        }
    }

    fn workload(&self, model: &ModelConfig, task: Task) -> Workload {
        let (model, lora, dtype) = (model.clone(), self.lora.clone(), self.dtype);
        Workload { model, lora, dtype, task }
    }

    /// So many steps.
    pub fn training(&self, model: &ModelConfig, steps: u64) -> Workload {
        let task = Task::Train {
            batch: self.batch as u64,
            seq: self.seq as u64,
            accumulate: self.accumulate as u64,
            steps,
            full: self.full,
            recompute: self.recompute,
            clip: self.hyper.clip.is_some(),
        };
        self.workload(model, task)
    }

    /// One evaluation.
    pub fn evaluation(&self, model: &ModelConfig, held_out: Option<&Dataset>) -> Vec<Workload> {
        let tasks = held_out.map(|data| evaluate::tasks(data.rows(), data.seq(), self.batch));
        tasks.into_iter().flatten().map(|task| self.workload(model, task)).collect()
    }

    /// The passes of the gradients' check; none where there is none.
    pub fn check(&self, model: &ModelConfig) -> Option<Workload> {
        let passes = 2 * (self.checks * self.accumulate) as u64;
        let (batch, seq) = (self.batch as u64, self.seq as u64);
        (passes > 0).then(|| self.workload(model, Task::Evaluate { batch, seq, passes }))
    }

    /// Tokens of a step.
    pub fn tokens(&self) -> u64 {
        (self.seq * self.batch * self.accumulate) as u64
    }

    /// A whole run of so many steps, evaluated before, between and after.
    pub fn run(
        &self,
        model: &ModelConfig,
        held_out: Option<&Dataset>,
        steps: u64,
    ) -> Vec<(Workload, u64)> {
        let evaluations = 1 + steps.div_ceil(self.eval_every);
        let mut all = vec![(self.training(model, steps), 1)];
        all.extend(self.evaluation(model, held_out).into_iter().map(|w| (w, evaluations)));
        all.extend(self.check(model).map(|w| (w, 1)));
        all
    }
}
