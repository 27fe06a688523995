//! A reconciliation: the way from one counting's total to another's.

use super::{
    chart::{Bar, Bars, Chart, Entry, Ink, Words},
    page::{Block, Cell, Figure, Notes, Section, Table, Verdict},
    read::{Reconciliation, Step, Total},
};
use crate::{
    error::Result,
    foreign::{Agreement, Tool},
    report::{describe, digits, human, signed},
};

/// The page of a reconciliation.
///
/// # Errors
/// None that drawing into memory gives.
pub fn section(file: &str, way: &Reconciliation) -> Result<Section> {
    let mut section = Section {
        title: "Reconciliation".into(),
        model: way.model.clone(),
        about: way.workload.iter().map(describe).collect(),
        file: file.into(),
        verdicts: verdicts(way),
        figures: vec![
            Figure::exact(&name(&way.from), way.from.total_flops, "FLOPs"),
            Figure::exact(&name(&way.to), way.to.total_flops, "FLOPs"),
            difference(way),
        ],
        blocks: vec![Block::Chart(waterfall(way)?), Block::Table(table(way))],
    };
    section.about.dedup();
    let mut notes: Vec<(String, String)> = vec![];
    for step in way.steps.iter().filter(|step| !step.why.is_empty()) {
        notes.push((step.cause.clone(), step.why.clone()));
    }
    if !notes.is_empty() {
        section.blocks.push(Block::Notes(Notes { title: "Causes".into(), notes }));
    }
    Ok(section)
}

fn name(end: &Total) -> String {
    if let Some(Tool { file, stated_flops: Some(_), .. }) = &end.tool {
        return file.clone();
    }
    format!("{} under {}", end.structure, end.prices.name)
}

fn difference(way: &Reconciliation) -> Figure {
    let sign = if way.difference_flops < 0 { "−" } else { "+" };
    let figure = Figure::exact("Difference", way.difference_flops.unsigned_abs(), "FLOPs");
    let note =
        if figure.note.is_empty() { String::new() } else { format!("{sign}{}", figure.note) };
    Figure { value: format!("{sign}{}", figure.value), note, ..figure }
}

fn verdicts(way: &Reconciliation) -> Vec<Verdict> {
    let (from, to) = (&way.from, &way.to);
    let exact = format!(
        "{} FLOPs in {} steps, summed exactly",
        signed(way.difference_flops).replace('-', "−"),
        way.steps.len()
    );
    let text = match (way.difference_flops, to.total_flops) {
        (0, _) => format!("{} counts what {} does", name(from), name(to)),
        (_, 0) => format!("{} counts nothing", name(to)),
        (_, n) => {
            let times = from.total_flops as f64 / n as f64;
            format!("{} counts {times:.4} times what {} does", name(from), name(to))
        }
    };
    let runs = [from, to].into_iter().filter_map(|end| {
        let run = end.run.as_ref()?;
        let verb = if run.agrees { "agrees with" } else { "differs from" };
        let text = format!("The run {verb} {}", end.structure);
        let detail = format!("{} states {} FLOPs", run.file, digits(run.total_flops));
        Some(Verdict::of(run.agrees, text, detail))
    });
    let tools = [from, to].into_iter().filter_map(|end| {
        let tool = end.tool.as_ref()?;
        let (agrees, verb) = match tool.agreement {
            Agreement::Exact => (true, "states what its formula counts"),
            Agreement::WithinRounding => (true, "states what its formula counts, rounded"),
            Agreement::NoFigure => return None,
            Agreement::Differs => (false, "differs from what its formula counts"),
        };
        let counted = digits(tool.counted_flops);
        let (file, stated) = (&tool.file, digits(end.total_flops));
        let detail = format!("{file}: {stated} FLOPs, {counted} by {}", end.structure);
        Some(Verdict::of(agrees, format!("{} {verb}", tool.format), detail))
    });
    [Verdict::plain(text, exact)].into_iter().chain(runs).chain(tools).collect()
}

fn waterfall(way: &Reconciliation) -> Result<Chart> {
    const MORE: Ink = Ink::Series(1);
    const LESS: Ink = Ink::Series(2);
    let end = |total: &Total| {
        let flops = total.total_flops as f64;
        Bar::stacked(name(total), human(flops), [(flops, Ink::Series(0))])
    };
    let step = |step: &Step| {
        let after = step.running_total as f64;
        let before = step.running_total.saturating_sub(step.flops) as f64;
        let ink = if step.flops < 0 { LESS } else { MORE };
        let sign = if step.flops < 0 { "−" } else { "+" };
        Bar {
            name: step.cause.clone(),
            value: format!("{sign}{}", human(step.flops.unsigned_abs() as f64)),
            spans: vec![(before, after, ink)],
        }
    };
    let ends = (end(&way.from), end(&way.to));
    let bars = [ends.0].into_iter().chain(way.steps.iter().map(step)).chain([ends.1]);
    let bars = Bars { bars: bars.collect(), linked: true };
    let said = bars.bars.iter().map(|bar| format!("{} {}", bar.name, bar.value));
    let said = said.collect::<Vec<_>>().join("; ");
    let words = Words::new("From one total to the other", "FLOPs, cause by cause", said);
    let legend = [("total", Ink::Series(0)), ("adds", MORE), ("takes away", LESS)];
    let legend = legend.map(|(name, ink)| Entry::area(name, ink)).into();
    Chart::bars(words, legend, &bars)
}

fn table(way: &Reconciliation) -> Table {
    let head = ["cause", "by", "FLOPs", "share", "running total"];
    let mut table = Table::new("Steps", 2, head);
    let end = |total: &Total, side: &str| {
        let flops = Cell::count(total.total_flops);
        vec![Cell::word(name(total)), Cell::word(side), flops.clone(), Cell::none(), flops]
    };
    table.rows.push(end(&way.from, "from"));
    table.rows.extend(way.steps.iter().map(|step| {
        vec![
            Cell::word(&step.cause),
            Cell::word(&step.of),
            Cell::signed(step.flops),
            step.share.map_or(Cell::none(), Cell::share),
            Cell::total(step.running_total),
        ]
    }));
    table.foot = Some(end(&way.to, "to"));
    table
}
