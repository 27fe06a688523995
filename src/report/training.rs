//! What a training and an evaluation found.

use std::{io::Write, path::Path};

use serde::{Deserialize, Serialize};

use super::{
    Report, TokensReport,
    figures::{Figures, digits, per_second, percent, rate},
    table::{BAD, GOOD, align, list, new_table, time},
};
use crate::{
    analytic::Structure,
    error::Result,
    train::{Budget, Check, Point, Session},
    workload::Task,
};

/// A training's account.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TrainingReport {
    /// Optimizer steps done, and asked for or affordable.
    pub steps: u64,
    /// Steps of the whole run.
    pub planned_steps: u64,
    /// Folder of adapter, metrics and checkpoint.
    pub out: String,
    /// Loss of each step, before its update.
    pub losses: Vec<Point>,
    /// Held-out losses.
    pub evaluations: Vec<Point>,
    /// Seconds of all steps, without evaluations.
    pub seconds: f64,
    /// Of each step.
    pub step_seconds: Vec<f64>,
    /// Real tokens per second: what is fed less its padding.
    pub tokens_per_s: f64,
    /// What its steps fed.
    pub tokens: TokensReport,
    /// Trained tensors.
    pub tensors: usize,
    /// Of which with a gradient other than 0 at the last step.
    pub with_gradient: usize,
    /// The smallest norm of a gradient at the last step, and whose.
    pub smallest_gradient: Option<(String, f64)>,
    /// Gradients against finite differences; absent where not asked for, or not reached.
    pub check: Option<Check>,
    /// Whether they agree.
    pub check_passed: Option<bool>,
    /// What may be spent and was, as the budget counts.
    pub budget: BudgetReport,
}

/// A budget and what was spent of it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BudgetReport {
    /// Most FLOPs; absent without a budget.
    pub flops: Option<u128>,
    /// Which operations it counts.
    pub structure: Structure,
    /// Under which prices.
    pub prices: String,
    /// Spent, all told.
    pub spent: u128,
    /// Of which by the steps, without what is set up once.
    pub steps: u128,
    /// One more step.
    pub next_step: u128,
    /// One evaluation.
    pub evaluation: u128,
}

/// An evaluation's account.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct EvaluationReport {
    /// Mean cross-entropy, in nats.
    pub loss: f64,
    /// e to the loss.
    pub perplexity: f64,
    /// Seconds of all passes.
    pub seconds: f64,
    /// What its passes fed.
    pub tokens: TokensReport,
    /// Real tokens per second: what is fed less its padding.
    pub tokens_per_s: f64,
    /// The adapter's folder, if there was one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adapter: Option<String>,
}

impl TrainingReport {
    /// Of `session`, whose outputs lie in `out`.
    ///
    /// # Errors
    /// A count past 128 bits.
    pub fn new(session: &mut Session, budget: &Budget, out: &Path) -> Result<Self> {
        let next = session.next_step();
        let (progress, settings) = (&session.progress, &session.settings);
        let mut trained = session.ran();
        trained.retain(|(workload, _)| matches!(workload.task, Task::Train { .. }));
        let ran = trained.iter().map(|(workload, times)| (workload, *times));
        let tokens = TokensReport::new(ran, Structure::Exact, &budget.prices)?;
        let tokens = TokensReport { scored: Some(progress.scored.into()), ..tokens };
        let names = session.names();
        let smallest = progress.norms.iter().zip(&names).min_by(|a, b| a.0.total_cmp(b.0));
        Ok(Self {
            steps: progress.steps,
            planned_steps: settings.schedule.steps,
            out: out.display().to_string(),
            losses: progress.losses.clone(),
            evaluations: progress.evaluations.clone(),
            seconds: progress.seconds(),
            step_seconds: progress.step_seconds.clone(),
            tokens_per_s: tokens.real as f64 / progress.seconds(),
            tokens,
            tensors: names.len(),
            with_gradient: progress.norms.iter().filter(|norm| **norm > 0.0).count(),
            smallest_gradient: smallest.map(|(norm, name)| (name.to_string(), *norm)),
            check: progress.check.clone(),
            check_passed: progress.check.as_ref().map(Check::passes),
            budget: BudgetReport {
                flops: budget.flops,
                structure: budget.structure,
                prices: budget.prices.name.clone(),
                spent: budget.cost(&session.ran())?,
                steps: budget.cost_of_steps(&trained)?,
                next_step: budget.cost_of_steps(&[(next, 1)])?,
                evaluation: budget.cost(&session.evaluation())?,
            },
        })
    }
}

/// The account for people.
pub(super) fn training(
    out: &mut impl Write,
    t: &TrainingReport,
    figures: Figures,
    unicode: bool,
) -> Result<()> {
    writeln!(out, "\ntraining  {} of {} steps, kept in {}", t.steps, t.planned_steps, t.out)?;
    if t.steps == 0 {
        return Ok(());
    }
    writeln!(
        out,
        "speed     {} tokens/s, {} a step",
        per_second(t.tokens_per_s),
        time(t.seconds / t.steps as f64, unicode)
    )?;
    writeln!(out, "{}", list("steps     ", &t.tokens.parts(figures)))?;
    let BudgetReport { flops, structure, prices, spent, steps, next_step, .. } = &t.budget;
    // Rows of different lengths make steps that cost differently.
    let alike = *steps == u128::from(t.steps) * next_step;
    let each = if alike { "a step" } else { "a step on average" };
    let mean = figures.flop(steps / u128::from(t.steps));
    let step = format!("{mean} {each} ({structure}, {prices})");
    let spent_flop = figures.flop(*spent);
    let (label, parts) = match flops {
        Some(all) => {
            let share = percent(*spent as f64 / *all as f64);
            let left = figures.flop(all.saturating_sub(*spent));
            let spent = format!("{spent_flop} of {} spent ({share})", figures.flop(*all));
            ("budget    ", vec![spent, format!("{left} left"), step])
        }
        None => ("spent     ", vec![spent_flop, step]),
    };
    writeln!(out, "{}", list(label, &parts))?;
    writeln!(out, "\n{}", curves(t, unicode))?;
    proof(out, t, unicode)
}

/// Both losses: the mean over the steps since the row before, and the held-out text's.
fn curves(t: &TrainingReport, unicode: bool) -> String {
    const ROWS: usize = 12;
    let mut marks: Vec<u64> = t.evaluations.iter().map(|point| point.step).collect();
    if marks.len() < 2 {
        // Before the first step there is a held-out loss at most.
        marks = (u64::from(marks.is_empty())..=t.steps).collect();
    }
    let stride = marks.len().div_ceil(ROWS).max(1);
    let last = marks.last().copied();
    let mut marks: Vec<u64> = marks.into_iter().step_by(stride).collect();
    if marks.last().copied() != last {
        marks.extend(last);
    }
    let held_out = !t.evaluations.is_empty();
    let mut table = new_table(unicode);
    let head = ["after step", "training loss"].into_iter();
    table.set_header(head.chain(held_out.then_some("held-out loss")));
    let mut before = 0;
    for mark in marks {
        let since = t.losses.iter().filter(|p| p.step > before && p.step <= mark);
        let since: Vec<f64> = since.map(|p| p.loss).collect();
        let mean = since.iter().sum::<f64>() / since.len() as f64;
        let figure = |x: Option<f64>| x.map_or("-".into(), |x| format!("{x:.4}"));
        let eval = t.evaluations.iter().find(|p| p.step == mark).map(|p| p.loss);
        let cells = [mark.to_string(), figure((!since.is_empty()).then_some(mean))];
        table.add_row(cells.into_iter().chain(held_out.then(|| figure(eval))));
        before = mark;
    }
    align(&mut table, 0);
    table.trim_fmt()
}

/// That what was to be trained was trained.
fn proof(out: &mut impl Write, t: &TrainingReport, unicode: bool) -> Result<()> {
    let (yes, no) = if unicode { ("✔ ", "✘ ") } else { ("", "") };
    let (all, with) = (t.tensors, t.with_gradient);
    let smallest = t.smallest_gradient.as_ref();
    let smallest = smallest
        .map_or(String::new(), |(name, norm)| format!(", the smallest {norm:.1e} at {name}"));
    // At the first step B is zero, and A has no gradient.
    match with == all || t.steps < 2 {
        true => writeln!(
            out,
            "\n{GOOD}{yes}trained{GOOD:#}: {with} of {all} tensors have a gradient{smallest}"
        )?,
        false => writeln!(
            out,
            "\n{BAD}{no}not trained{BAD:#}: {} of {all} tensors have no gradient{smallest}",
            all - with
        )?,
    }
    let (Some(check), Some(passed)) = (&t.check, t.check_passed) else { return Ok(()) };
    let worst = check.slopes.iter().map(|s| s.error()).fold(0.0, f64::max);
    let (style, mark, verb) = if passed { (GOOD, yes, "equal") } else { (BAD, no, "differ from") };
    Ok(writeln!(
        out,
        "{style}{mark}gradients {verb} finite differences{style:#}: {} tensors, {:.2} % apart at most",
        check.slopes.len(),
        100.0 * worst
    )?)
}

/// An evaluation for people.
pub(super) fn evaluation(
    out: &mut impl Write,
    report: &Report,
    e: &EvaluationReport,
) -> Result<()> {
    if let Some(adapter) = &e.adapter {
        writeln!(out, "adapter   {adapter}")?;
    }
    writeln!(out, "\nloss      {:.6} nats a token, perplexity {:.4}", e.loss, e.perplexity)?;
    let speed = rate(report.total_flops as f64 / e.seconds);
    let name = &report.prices.name;
    writeln!(out, "speed     {} tokens/s, {speed} ({name})", per_second(e.tokens_per_s))?;
    Ok(writeln!(out, "scored    {} tokens", digits(e.tokens.scored.unwrap_or_default()))?)
}
