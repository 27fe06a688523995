//! A sweep: one workload over a grid.

use serde_json::Value;

use super::{
    chart::{Axis, Chart, Ink, Marks, Plot, Scale, Series, Words},
    page::{Block, Cell, Figure, Section, Table, Verdict, ratio},
    read::{GridPoint, Sweep},
};
use crate::{
    error::Result,
    report::{digits, human},
};

/// The page of a sweep.
///
/// # Errors
/// None that drawing into memory gives.
pub fn section(file: &str, sweep: &Sweep) -> Result<Section> {
    let totals = || sweep.points.iter().map(|point| point.total_flops);
    let (least, most) = (totals().min().unwrap_or(0), totals().max().unwrap_or(0));
    let text = format!("{} to {} FLOPs", human(least as f64), human(most as f64));
    let points = digits(sweep.points.len() as u128);
    let mut section = Section {
        title: format!("Sweep of {}", sweep.kind),
        model: sweep.model.clone(),
        about: vec![format!(
            "{points} points over {}; counted under structure {}, prices {}",
            sweep.keys.join(" × "),
            sweep.structure,
            sweep.prices.name
        )],
        file: file.into(),
        verdicts: vec![Verdict::plain(text, "counted and not run")],
        figures: vec![Figure::exact("Least", least, "FLOPs"), Figure::exact("Most", most, "FLOPs")],
        blocks: vec![],
    };
    section.blocks.extend(curves(sweep)?.map(Block::Chart));
    section.blocks.push(Block::Table(table(sweep)));
    Ok(section)
}

fn value(point: &GridPoint, key: &str) -> String {
    match point.at.get(key) {
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
        None => String::new(),
    }
}

fn number(point: &GridPoint, key: &str) -> Option<f64> {
    point.at.get(key).and_then(Value::as_f64).filter(|x| *x > 0.0)
}

/// Total by the first numeric key of several values, a line for each combination of the others;
/// none where they would be too many to tell apart.
fn curves(sweep: &Sweep) -> Result<Option<Chart>> {
    const LINES: usize = 8;
    let several = |key: &&String| {
        let mut at: Vec<Option<f64>> = sweep.points.iter().map(|p| number(p, key)).collect();
        at.dedup();
        at.len() > 1 && at.iter().all(Option::is_some)
    };
    let Some(along) = sweep.keys.iter().find(several) else { return Ok(None) };
    let others: Vec<&String> = sweep.keys.iter().filter(|key| *key != along).collect();
    let mut lines: Vec<(String, Vec<(f64, f64)>)> = vec![];
    for point in &sweep.points {
        let (Some(x), y) = (number(point, along), point.total_flops as f64) else { continue };
        let name = others.iter().map(|key| format!("{key} {}", value(point, key)));
        let name = name.collect::<Vec<_>>().join(", ");
        match lines.iter_mut().find(|(seen, _)| *seen == name) {
            Some((_, points)) => points.push((x, y)),
            None => lines.push((name, vec![(x, y)])),
        }
        if lines.len() > LINES {
            return Ok(None);
        }
    }
    let series = lines.into_iter().enumerate().flat_map(|(i, (name, points))| {
        let ink = Ink::Series(i as u8);
        let line = Series::new(&name, ink, Marks::Line, points.clone());
        [line, Series::new("", ink, Marks::Dots, points)]
    });
    let plot = Plot {
        x: Axis { name: along.clone(), scale: Scale::Log },
        y: Axis { name: "FLOPs".into(), scale: Scale::Log },
        series: series.collect(),
    };
    let said = format!("total FLOPs by {along}, on logarithmic axes");
    Chart::plot(Words::new("Total", "FLOPs, both axes logarithmic", said), &plot).map(Some)
}

fn table(sweep: &Sweep) -> Table {
    let head = sweep.keys.iter().cloned();
    let head = head.chain(["total FLOPs", "about", "LoRA FLOPs", "LoRA share"].map(String::from));
    let mut table = Table::new("Points", 0, head);
    table.rows.extend(sweep.points.iter().map(|point| {
        let keys = sweep.keys.iter().map(|key| Cell::word(value(point, key)));
        let figures = [
            Cell::count(point.total_flops),
            Cell::short(point.total_flops),
            Cell::count(point.lora_flops),
            Cell::share(ratio(point.lora_flops, point.total_flops)),
        ];
        keys.chain(figures).collect()
    }));
    table
}
