//! What a training adds: its losses, its budget, and that what was to be trained was.

use super::{
    chart::{Axis, Chart, Ink, Marks, Plot, Scale, Series, Words},
    page::{Block, Cell, Figure, Section, Table, Verdict, ratio},
    read::Run,
};
use crate::{
    error::Result,
    report::{BudgetReport, TrainingReport, digits, figures::per_second, human, percent},
    train::{Point, Slope},
};

/// Adds verdicts, figures and curves to `section`.
///
/// # Errors
/// None that drawing into memory gives.
pub fn add(section: &mut Section, run: &Run, t: &TrainingReport) -> Result<()> {
    section.verdicts.extend(verdicts(t));
    section.figures.extend(figures(run, t));
    if t.losses.is_empty() {
        return Ok(());
    }
    section.blocks.push(Block::Chart(losses(t)?));
    section.blocks.push(Block::Chart(spending(t)?));
    section.blocks.push(Block::Table(table(t)));
    section.blocks.extend(slopes(t));
    Ok(())
}

fn verdicts(t: &TrainingReport) -> Vec<Verdict> {
    let mut verdicts = vec![];
    if let Some(all) = t.budget.flops {
        let BudgetReport { spent, next_step, structure, prices, .. } = &t.budget;
        let within = *spent <= all;
        let detail = format!(
            "{} of {} FLOPs spent ({}); one more step takes {} ({structure}, {prices})",
            digits(*spent),
            digits(all),
            percent(ratio(*spent, all)),
            digits(*next_step)
        );
        let text = if within { "Within the budget" } else { "Over the budget" };
        verdicts.push(Verdict::of(within, text, detail));
    }
    if t.steps > 0 {
        // At the first step B is zero, and A has no gradient.
        let trained = t.with_gradient == t.tensors || t.steps < 2;
        let smallest = t.smallest_gradient.as_ref();
        let smallest = smallest
            .map_or(String::new(), |(name, norm)| format!("; the smallest {norm:.1e} at {name}"));
        verdicts.push(Verdict::of(
            trained,
            if trained { "Every tensor learns" } else { "Some tensors do not learn" },
            format!("{} of {} tensors have a gradient{smallest}", t.with_gradient, t.tensors),
        ));
    }
    if let Some((check, passed)) = t.check.as_ref().zip(t.check_passed) {
        let verb = if passed { "equal" } else { "differ from" };
        let worst = check.slopes.iter().map(Slope::error).fold(0.0, f64::max);
        let tensors = check.slopes.len();
        verdicts.push(Verdict::of(
            passed,
            format!("Gradients {verb} finite differences"),
            format!("{tensors} tensors, {:.2} % apart at most", 100.0 * worst),
        ));
    }
    verdicts
}

fn figures(run: &Run, t: &TrainingReport) -> Vec<Figure> {
    let mut figures = vec![];
    let fell = |points: &[Point], name: &str| {
        let (first, last) = (points.first()?, points.last()?);
        let note = format!("nats a token; {:.4} at first", first.loss);
        Some(Figure::new(name, format!("{:.4}", last.loss), "", note))
    };
    figures.extend(fell(&t.evaluations, "Held-out loss"));
    figures.extend(fell(&t.losses, "Training loss"));
    let steps = format!("of {} planned", digits(t.planned_steps.into()));
    figures.push(Figure::new("Steps", digits(t.steps.into()), "", steps));
    if t.steps > 0 {
        let rate = t.tokens_per_s;
        let note = format!("{:.3} s a step", t.seconds / t.steps as f64);
        figures.push(Figure::new("Speed", per_second(rate), "tokens/s", note));
    }
    let trained = t.budget.steps;
    if t.seconds > 0.0 && trained > 0 && run.prices.name == t.budget.prices {
        let note = format!("steps alone; prices {}", t.budget.prices);
        figures.push(Figure::large("Rate", trained as f64 / t.seconds, "FLOP/s", note));
    }
    figures
}

/// Most points of a curve: more cannot be told apart.
const POINTS: usize = 400;

/// Both losses by step.
fn losses(t: &TrainingReport) -> Result<Chart> {
    let curve = |points: &[Point]| -> Vec<(f64, f64)> {
        points.iter().map(|p| (p.step as f64, p.loss)).collect()
    };
    let each = means(&curve(&t.losses), t.losses.len().div_ceil(POINTS).max(1));
    let window = each.len().div_ceil(30).max(1);
    let mut series = vec![];
    if window > 1 {
        let smooth = running_mean(&each, window * 2);
        series.push(Series::new("training, each step", Ink::Pale(0), Marks::Thin, each));
        series.push(Series::new("training, smoothed", Ink::Series(0), Marks::Line, smooth));
    } else {
        series.push(Series::new("training", Ink::Series(0), Marks::Line, each));
    }
    let held_out = curve(&t.evaluations);
    if !held_out.is_empty() {
        series.push(Series::new("held-out", Ink::Series(1), Marks::Line, held_out.clone()));
        series.push(Series::new("", Ink::Series(1), Marks::Dots, held_out));
    }
    let said = [("training", &t.losses), ("held-out", &t.evaluations)];
    let said = said.into_iter().filter_map(|(name, points)| {
        let (first, last) = (points.first()?, points.last()?);
        Some(format!(
            "{name} loss from {:.4} at step {} to {:.4} at step {}",
            first.loss, first.step, last.loss, last.step
        ))
    });
    let said = said.collect::<Vec<_>>().join("; ");
    let plot = Plot {
        x: Axis { name: "step".into(), scale: Scale::Zero },
        y: Axis { name: "nats a token".into(), scale: Scale::Linear },
        series,
    };
    Chart::plot(Words::new("Loss", "mean cross-entropy in nats a token", said), &plot)
}

/// Of each `size` neighbours the mean of both coordinates.
fn means(points: &[(f64, f64)], size: usize) -> Vec<(f64, f64)> {
    let mean = |chunk: &[(f64, f64)]| {
        let n = chunk.len() as f64;
        (chunk.iter().map(|p| p.0).sum::<f64>() / n, chunk.iter().map(|p| p.1).sum::<f64>() / n)
    };
    points.chunks(size).map(mean).collect()
}

/// Each value's mean with its neighbours, up to `window / 2` on each side and as many on both.
fn running_mean(points: &[(f64, f64)], window: usize) -> Vec<(f64, f64)> {
    let smooth = |i: usize| {
        let side = (window / 2).min(i).min(points.len() - 1 - i);
        let near = &points[i - side..=i + side];
        (points[i].0, near.iter().map(|p| p.1).sum::<f64>() / near.len() as f64)
    };
    (0..points.len()).map(smooth).collect()
}

/// FLOPs spent by step, and the budget.
fn spending(t: &TrainingReport) -> Result<Chart> {
    let spent = spent_by_step(t);
    let last = spent.last().map_or(0.0, |point| point.0);
    let mut series = vec![Series::new("spent", Ink::Series(0), Marks::Line, spent)];
    let budget = match t.budget.flops {
        Some(flops) => {
            let line = [(0.0, flops as f64), (last, flops as f64)];
            series.push(Series::new("budget", Ink::Series(1), Marks::Dashed, line));
            format!(" of a budget of {}", digits(flops))
        }
        None => String::new(),
    };
    let BudgetReport { spent, structure, prices, .. } = &t.budget;
    let said = format!(
        "{} FLOPs{budget} after {} steps; each evaluation is a jump of {}",
        digits(*spent),
        t.steps,
        human(t.budget.evaluation as f64)
    );
    let plot = Plot {
        x: Axis { name: "step".into(), scale: Scale::Zero },
        y: Axis { name: "FLOPs".into(), scale: Scale::Zero },
        series,
    };
    let units = format!("FLOPs, structure {structure}, prices {prices}, evaluations included");
    Chart::plot(Words::new("Spent", &units, said), &plot)
}

/// What was spent after each step, before and after its evaluation. Each step is drawn at what all
/// cost on average; what is beyond steps and evaluations is the check of gradients, at the second.
fn spent_by_step(t: &TrainingReport) -> Vec<(f64, f64)> {
    let BudgetReport { spent, steps: trained, evaluation, .. } = t.budget;
    let evaluations = t.evaluations.len() as u128;
    let known = trained.saturating_add(evaluations.saturating_mul(evaluation));
    let mean = trained as f64 / t.steps.max(1) as f64;
    let check = (2, spent.saturating_sub(known));
    let marks = t.evaluations.iter().map(|point| point.step);
    let mut steps: Vec<u64> = marks.chain([0, 1, 2.min(t.steps), t.steps]).collect();
    steps.sort_unstable();
    steps.dedup();
    let mut points = vec![];
    for step in steps {
        let evaluated = |past: bool| {
            t.evaluations.iter().filter(|p| p.step < step || (past && p.step == step)).count()
        };
        for past in [false, true] {
            let steps = step as f64 * mean;
            let evaluations = evaluated(past) as f64 * evaluation as f64;
            let check = if step >= check.0 { check.1 as f64 } else { 0.0 };
            points.push((step as f64, steps + evaluations + check));
        }
    }
    points.dedup();
    points
}

/// Held-out losses with the training loss since the one before; or every step's.
fn table(t: &TrainingReport) -> Table {
    let held_out = t.evaluations.len() > 1;
    let marks: Vec<u64> = match held_out {
        true => t.evaluations.iter().map(|p| p.step).collect(),
        false => {
            let stride = t.losses.len().div_ceil(50).max(1);
            let every = t.losses.iter().rev().step_by(stride).map(|p| p.step);
            every.collect::<Vec<_>>().into_iter().rev().collect()
        }
    };
    let head = ["after step", "training loss, mean since the row before"];
    let mut table =
        Table::new("Losses", 0, head.into_iter().chain(held_out.then_some("held-out loss")));
    let figure =
        |x: Option<f64>| x.map_or(Cell::none(), |x| Cell::figure(x, format!("{x:.4}"), ""));
    let mut before = 0;
    for mark in marks {
        let since = t.losses.iter().filter(|p| p.step > before && p.step <= mark);
        let since: Vec<f64> = since.map(|p| p.loss).collect();
        let mean = (!since.is_empty()).then(|| since.iter().sum::<f64>() / since.len() as f64);
        let eval = t.evaluations.iter().find(|p| p.step == mark).map(|p| p.loss);
        let mut cells = vec![Cell::count(mark.into()), figure(mean)];
        cells.extend(held_out.then(|| figure(eval)));
        table.rows.push(cells);
        before = mark;
    }
    table
}

/// The gradients that were checked.
fn slopes(t: &TrainingReport) -> Option<Block> {
    let check = t.check.as_ref().filter(|check| !check.slopes.is_empty())?;
    let head = ["tensor", "norm of its gradient", "slope of the loss along it", "apart"];
    let mut table = Table::new("Gradients and finite differences", 1, head);
    table.rows.extend(check.slopes.iter().map(|s| {
        vec![
            Cell::word(&s.name),
            Cell::figure(s.norm, format!("{:.6e}", s.norm), ""),
            Cell::figure(s.slope, format!("{:.6e}", s.slope), ""),
            Cell::share(s.error()),
        ]
    }));
    Some(Block::Table(table))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{analytic::Structure, report::TokensReport};

    fn run_of_four_steps() -> TrainingReport {
        let at = |step| Point { step, loss: 2.0 };
        TrainingReport {
            steps: 4,
            planned_steps: 4,
            losses: (1..=4).map(at).collect(),
            evaluations: vec![at(0), at(4)],
            seconds: 1.0,
            tokens_per_s: 1.0,
            tokens: TokensReport {
                scored: Some(1),
                fed: 1,
                real: 1,
                padding: 0,
                padding_flops: Some(0),
            },
            out: "run".into(),
            step_seconds: vec![0.25; 4],
            tensors: 1,
            with_gradient: 1,
            smallest_gradient: None,
            check: None,
            check_passed: None,
            budget: BudgetReport {
                flops: Some(1000),
                structure: Structure::Exact,
                prices: "unit".into(),
                // Four steps, two evaluations, and a check of 7.
                spent: 4 * 10 + 2 * 100 + 7,
                steps: 4 * 10,
                next_step: 12,
                evaluation: 100,
            },
        }
    }

    #[test]
    fn spending_ends_at_what_was_spent() {
        let points = spent_by_step(&run_of_four_steps());
        let expected =
            [(0.0, 0.0), (0.0, 100.0), (1.0, 110.0), (2.0, 127.0), (4.0, 147.0), (4.0, 247.0)];
        assert_eq!(points, expected);
    }

    #[test]
    fn means_and_running_means() {
        let points = [(1.0, 1.0), (2.0, 3.0), (3.0, 8.0)];
        assert_eq!(means(&points, 2), [(1.5, 2.0), (3.0, 8.0)]);
        assert_eq!(running_mean(&points, 2), [(1.0, 1.0), (2.0, 4.0), (3.0, 8.0)]);
    }
}
