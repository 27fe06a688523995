//! A run of training: steps, evaluations, and what a later process needs to go on.

use std::cell::RefCell;

use serde::{Deserialize, Serialize};

use super::{
    budget::Budget,
    check::{self, Check},
    data::{Batch, Order, Passes},
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
    workload::{AttentionMode, Checks, Filling, Layout, Rows, Task, Tokens, Workload},
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
    /// Which scores attention computes.
    #[serde(default)]
    pub attention: AttentionMode,
    /// Most tokens of a row.
    pub seq: usize,
    /// How rows lie in a pass.
    #[serde(default)]
    pub layout: Layout,
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
    /// Seed of the rows' order, of the adapters and of how moments in bf16 are rounded.
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
    /// Tokens whose prediction the losses of these steps count.
    #[serde(default)]
    pub scored: u64,
}

/// A run in this process.
pub struct Session<'a> {
    /// What it does.
    pub settings: Settings,
    /// What it did.
    pub progress: Progress,
    trainer: Trainer,
    data: Passes<'a>,
    held_out: Option<Passes<'a>>,
    order: Order,
    /// What the steps of this process have fed.
    fed: Filling,
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
        data: Passes<'a>,
        held_out: Option<Passes<'a>>,
        beside: &'a RefCell<dyn Observer + 'a>,
        timed: bool,
    ) -> Result<Self> {
        let tables = RefCell::new((Ledger::default(), beside));
        let meter = Meter::new(&tables, Phase::Setup).timed(timed);
        let trained = if settings.full { Trained::All } else { Trained::Adapters };
        let weights = model.fingerprint()?;
        let trainer =
            Trainer::new(meter, model, trained, settings.hyper, settings.seq, settings.recompute)?
                .seeded(settings.seed);
        let order = Order::new(data.len(), settings.seed);
        let fed = Filling::new(settings.layout);
        let checks = settings.checks.min(trainer.optimizer.names().count());
        let settings = Settings { checks, ..settings };
        Ok(Self {
            settings,
            progress: Progress::default(),
            trainer,
            data,
            held_out,
            order,
            fed,
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
        let going_on = (steps > 0).then(|| (self.training(steps, &self.fed), 1));
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

    /// So many steps of it, which fed as much.
    fn training(&self, steps: u64, fed: &Filling) -> Workload {
        let rows = fed.rows(self.settings.seq as u64);
        self.settings.training(self.trainer.model.config(), steps, rows)
    }

    /// One evaluation of it.
    pub fn evaluation(&self) -> Vec<(Workload, u64)> {
        let model = self.trainer.model.config();
        let tasks = self.settings.evaluation(model, self.held_out.as_ref());
        tasks.into_iter().map(|workload| (workload, 1)).collect()
    }

    /// The next step, as a training of its own.
    pub fn next_step(&mut self) -> Workload {
        let mut fed = Filling::new(self.settings.layout);
        let step = self.progress.steps;
        let next = self.data.feeds(&mut self.order, self.settings.accumulate, step);
        next.iter().for_each(|lengths| fed.add(lengths, 1));
        self.training(1, &fed)
    }

    /// Tokens that its steps have fed, and those of them that the loss counts.
    pub fn tokens(&self) -> Tokens {
        let trained = self.ran().into_iter().filter(|(w, _)| matches!(w.task, Task::Train { .. }));
        let none = Tokens { fed: 0, real: 0 };
        trained.map(|(workload, times)| (workload.task.tokens(), u128::from(times))).fold(
            none,
            |sum, (Tokens { fed, real }, times)| Tokens {
                fed: sum.fed + times * fed,
                real: sum.real + times * real,
            },
        )
    }

    /// Whether `budget` pays for one more step, and for the evaluation that must follow the last.
    ///
    /// # Errors
    /// As [`Budget::cost`].
    pub fn affords_a_step(&mut self, budget: &Budget) -> Result<bool> {
        let step = self.progress.steps;
        let steps = step - self.began + 1;
        let next = self.data.feeds(&mut self.order, self.settings.accumulate, step);
        let mut fed = self.fed.clone();
        next.iter().for_each(|lengths| fed.add(lengths, 1));
        let mut all = self.progress.finished.clone();
        all.push((self.training(steps, &fed), 1));
        all.extend(self.evaluation());
        if step + 1 == self.settings.check_at() {
            let check = self.settings.check(self.trainer.model.config(), &next);
            all.extend(check.map(|w| (w, 1)));
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
        let (batches, fed) = self.batches();
        let texts: Vec<Labelled> = batches.iter().map(Batch::labelled).collect();
        let observers = RefCell::new((&self.ledger, self.beside));
        let meter = Meter::new(&observers, Phase::Forward).timed(self.timed);
        let found = self.trainer.gradients(meter, &texts)?;
        let taken = start.elapsed();
        if self.progress.steps + 1 == self.settings.check_at() {
            let (checks, seed) = (self.settings.checks, self.settings.seed);
            let texts = (&texts[..], self.settings.seq);
            let check = check::run(meter, &mut self.trainer, &found, texts, checks, seed)?;
            let ran = Settings { checks: check.slopes.len(), ..self.settings.clone() };
            self.progress.finish(ran.check(self.trainer.model.config(), &fed));
            self.progress.check = Some(check).filter(|check| !check.slopes.is_empty());
        }
        let start = std::time::Instant::now();
        let step = self.trainer.update(meter, found, rate)?;
        self.progress.steps += 1;
        fed.iter().for_each(|lengths| self.fed.add(lengths, 1));
        let weights = batches.iter().flat_map(|batch| &batch.weights);
        self.progress.scored += weights.filter(|weight| **weight > 0.0).count() as u64;
        self.progress.step_seconds.push((taken + start.elapsed()).as_secs_f64());
        self.progress.losses.push(Point { step: self.progress.steps, loss: step.loss });
        self.progress.norms.clone_from(&step.norms);
        Ok(step)
    }

    /// The micro-batches of the next step, with weights that sum to 1 over all of them, and the
    /// lengths of the rows in each.
    fn batches(&mut self) -> (Vec<Batch>, Vec<Vec<u64>>) {
        let groups = self.data.step(&mut self.order, self.settings.accumulate, self.progress.steps);
        let of = |groups: &Vec<usize>| self.data.batch(groups.iter().copied());
        let mut batches: Vec<Batch> = groups.iter().map(of).collect();
        let counted: f32 = batches.iter().flat_map(|b| &b.weights).sum();
        for weight in batches.iter_mut().flat_map(|b| &mut b.weights) {
            *weight /= counted;
        }
        let lengths = groups.into_iter().map(|groups| self.data.lengths_of(groups)).collect();
        (batches, lengths)
    }

    /// The held-out loss, where there is held-out text.
    ///
    /// # Errors
    /// As [`evaluate`].
    pub fn evaluate(&mut self, progress: impl FnMut(usize) -> Result<()>) -> Result<Option<f64>> {
        let Some(data) = &self.held_out else { return Ok(None) };
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
        let &Self { dtype, attention, .. } = self;
        Workload { model: model.clone(), lora: self.lora.clone(), dtype, attention, task }
    }

    /// So many steps, whose rows are filled so.
    pub fn training(&self, model: &ModelConfig, steps: u64, rows: Rows) -> Workload {
        let task = Task::Train {
            batch: self.batch as u64,
            seq: self.seq as u64,
            accumulate: self.accumulate as u64,
            steps,
            full: self.full,
            recompute: self.recompute,
            clip: self.hyper.clip.is_some(),
            moments: self.hyper.moments,
            rows,
        };
        self.workload(model, task)
    }

    /// One evaluation.
    pub fn evaluation(&self, model: &ModelConfig, held_out: Option<&Passes>) -> Vec<Workload> {
        let tasks = held_out.map(|passes| evaluate::tasks(passes, self.batch));
        tasks.into_iter().flatten().map(|task| self.workload(model, task)).collect()
    }

    /// The passes of the gradients' check over micro-steps that feed rows of these lengths; none
    /// where there is none.
    pub fn check(&self, model: &ModelConfig, feeds: &[Vec<u64>]) -> Option<Workload> {
        let passes = 2 * (self.checks * self.accumulate) as u64;
        let (batch, seq) = (self.batch as u64, self.seq as u64);
        let mut fed = Filling::new(self.layout);
        feeds.iter().for_each(|lengths| fed.add(lengths, 2 * self.checks as u64));
        let task = Task::Evaluate { batch, seq, passes, rows: fed.rows(seq) };
        (passes > 0).then(|| self.workload(model, task))
    }

    /// A whole run of so many steps, evaluated before, between and after.
    pub fn run(
        &self,
        model: &ModelConfig,
        (data, held_out): (&Passes, Option<&Passes>),
        steps: u64,
    ) -> Vec<(Workload, u64)> {
        let checks = Checks { eval_rows: 0, eval_every: self.eval_every, gradients: 0 };
        let evaluations = checks.evaluations(steps);
        let mut order = Order::new(data.len(), self.seed);
        let rows = data.rows(&mut order, self.accumulate, steps);
        let mut all = vec![(self.training(model, steps, rows), 1)];
        all.extend(self.evaluation(model, held_out).into_iter().map(|w| (w, evaluations)));
        if let Some(before) = self.check_at().checked_sub(1) {
            let feeds = data.feeds(&mut order, self.accumulate, before);
            all.extend(self.check(model, &feeds).map(|w| (w, 1)));
        }
        all
    }
}
