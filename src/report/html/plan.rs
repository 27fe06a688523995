//! A plan: what its experiments cost, against a budget.

use super::{
    chart::{Bar, Bars, Chart, Ink, Words},
    page::{Block, Cell, Figure, Notes, Section, Table, Verdict, ratio, total},
    read::{Plan, Solved},
};
use crate::{
    error::Result,
    report::{describe, digits, human, percent},
    workload::Workload,
};

/// The page of a plan.
///
/// # Errors
/// None that drawing into memory gives.
pub fn section(file: &str, plan: &Plan) -> Result<Section> {
    let mut section = Section {
        title: "Plan".into(),
        model: format!("{}, {} parameters", plan.model, digits(plan.parameters)),
        about: vec![
            plan.file.clone(),
            format!("counted under structure {}, prices {}", plan.structure, plan.prices.name),
        ],
        file: file.into(),
        verdicts: vec![verdict(plan)],
        figures: figures(plan),
        blocks: vec![],
    };
    section.verdicts.extend(plan.solved.as_ref().map(|solved| solution(solved, plan)));
    section.blocks.push(Block::Chart(shares(plan)?));
    section.blocks.push(Block::Table(costs(plan)));
    let notes: Vec<_> =
        plan.experiments.iter().map(|e| (e.name.clone(), described(&e.workload))).collect();
    section.blocks.push(Block::Notes(Notes { title: "What each runs".into(), notes }));
    let notes = notes_of(plan);
    if !notes.is_empty() {
        section.blocks.push(Block::Notes(Notes { title: "Notes".into(), notes }));
    }
    Ok(section)
}

fn described(workloads: &[Workload]) -> String {
    workloads.iter().map(describe).collect::<Vec<_>>().join(", and ")
}

fn verdict(plan: &Plan) -> Verdict {
    match &plan.over_budget {
        None => {
            let detail = format!("{} FLOPs left", digits(plan.left_flops));
            Verdict::of(true, "Within the budget", detail)
        }
        Some(broken) => {
            let missing = broken.needed_flops.saturating_sub(broken.left_flops);
            let detail = format!("`{}` lacks {} FLOPs", broken.name, digits(missing));
            Verdict::of(false, "Over the budget", detail)
        }
    }
}

fn solution(solved: &Solved, plan: &Plan) -> Verdict {
    let value = digits(solved.value.into());
    let next = match solved.next_over_flops {
        Some(over) => {
            let next = digits(u128::from(solved.value) + 1);
            format!("{next} would be {} FLOPs over", digits(over))
        }
        None => "the largest that can be counted".into(),
    };
    let beside = match (&plan.beside, solved.beside_value) {
        (Some(beside), Some(n)) => format!("; under {} {}", beside.structure, digits(n.into())),
        _ => String::new(),
    };
    Verdict::plain(format!("{}: {} = {value} fits", solved.experiment, solved.key), next + &beside)
}

/// Finished runs and experiments together.
fn spending(plan: &Plan) -> u128 {
    total(plan.spent.iter().map(|s| s.flops).chain(plan.experiments.iter().map(|e| e.flops)))
}

fn figures(plan: &Plan) -> Vec<Figure> {
    let all = spending(plan);
    let mut figures = vec![
        Figure::exact("Budget", plan.budget_flops, "FLOPs"),
        Figure::exact("Planned", all, "FLOPs"),
        Figure::new("Of the budget", percent(ratio(all, plan.budget_flops)), "", ""),
    ];
    figures.push(match plan.over_flops {
        0 => Figure::exact("Left", plan.left_flops, "FLOPs"),
        over => Figure::exact("Over", over, "FLOPs"),
    });
    if let Some((beside, flops)) = plan.beside.as_ref().and_then(|b| Some((b, b.total_flops?))) {
        figures.push(Figure::exact(&format!("Under {}", beside.structure), flops, "FLOPs"));
    }
    figures
}

/// A bar for each part, and for what is left.
fn shares(plan: &Plan) -> Result<Chart> {
    let value = |flops: u128| {
        format!("{} · {:.2} %", human(flops as f64), 100.0 * ratio(flops, plan.budget_flops))
    };
    let bar =
        |name: String, flops: u128, ink| Bar::stacked(name, value(flops), [(flops as f64, ink)]);
    let spent =
        plan.spent.iter().map(|s| bar(format!("spent: {}", s.file), s.flops, Ink::Series(2)));
    let planned = plan.experiments.iter().map(|e| bar(e.name.clone(), e.flops, Ink::Series(0)));
    let rest = match plan.over_flops {
        0 => bar("left".into(), plan.left_flops, Ink::Pale(0)),
        over => bar("over".into(), over, Ink::Series(1)),
    };
    let bars = Bars { bars: spent.chain(planned).chain([rest]).collect(), linked: false };
    let said = bars.bars.iter().map(|bar| format!("{} {}", bar.name, bar.value));
    let said = said.collect::<Vec<_>>().join("; ");
    let words = Words::new("Where the budget goes", "FLOPs and share of the budget", said);
    Chart::bars(words, vec![], &bars)
}

fn costs(plan: &Plan) -> Table {
    let head = ["experiment", "runs", "FLOPs", "share", "running total", "left"];
    let beside = plan.beside.as_ref().map(|b| format!("under {}", b.structure));
    let mut table = Table::new("Costs", 1, head.into_iter().map(String::from).chain(beside));
    let other =
        |flops: Option<u128>| plan.beside.as_ref().map(|_| flops.map_or(Cell::none(), Cell::count));
    let mut running: u128 = 0;
    for run in &plan.spent {
        running = running.saturating_add(run.flops);
        let mut cells = vec![
            Cell::word(format!("spent: {}", run.file)),
            Cell::count(1),
            Cell::count(run.flops),
            Cell::share(ratio(run.flops, plan.budget_flops)),
            Cell::short(running),
            Cell::short(plan.budget_flops.saturating_sub(running)),
        ];
        cells.extend(other(None));
        table.rows.push(cells);
    }
    for row in &plan.experiments {
        let mut cells = vec![
            Cell::word(&row.name),
            Cell::count(row.runs),
            Cell::count(row.flops),
            Cell::share(row.share),
            Cell::short(row.running_flops),
            Cell::short(row.left_flops),
        ];
        cells.extend(other(row.beside_flops));
        table.rows.push(cells);
    }
    let all = spending(plan);
    let runs = total(plan.experiments.iter().map(|e| e.runs).chain([plan.spent.len() as u128]));
    let mut foot = vec![
        Cell::word("total"),
        Cell::count(runs),
        Cell::count(all),
        Cell::share(ratio(all, plan.budget_flops)),
        Cell::short(all),
        Cell::short(plan.left_flops),
    ];
    foot.extend(other(plan.beside.as_ref().and_then(|b| b.total_flops)));
    table.foot = Some(foot);
    table
}

fn notes_of(plan: &Plan) -> Vec<(String, String)> {
    let unaudited = plan.spent.iter().filter(|run| !run.audited);
    let unaudited = unaudited.map(|run| (run.file.clone(), "was not audited".into()));
    let uncounted = plan.beside.iter().flat_map(|beside| {
        let name = format!("under {}", beside.structure);
        beside.uncounted.iter().map(move |why| (name.clone(), why.clone()))
    });
    unaudited.chain(uncounted).collect()
}
