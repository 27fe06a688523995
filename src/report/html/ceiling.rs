//! A device's ceilings, and the roof that they make.

use super::{
    chart::{Axis, Chart, Ink, Marks, Plot, Scale, Series, Words},
    page::{Block, Cell, Figure, Section, Table, Verdict},
};
use crate::{
    bench::{Ceiling, DeviceInfo, MatmulRate},
    error::Result,
    ledger::Dtype,
    report::{bytes, human, rate, seconds},
};

/// The page of a ceiling.
///
/// # Errors
/// None that drawing into memory gives.
pub fn section(file: &str, ceiling: &Ceiling) -> Result<Section> {
    let fastest = ceiling.matmul.iter().max_by(|a, b| a.flops_per_s.total_cmp(&b.flops_per_s));
    let matmul = fastest.map_or("no matmul".into(), |found| {
        format!("{} in {}", rate(found.flops_per_s), found.dtype.name())
    });
    let text = format!("{matmul}, {}/s", bytes(ceiling.stream.bytes_per_s));
    let reading = bytes(ceiling.stream.buffer_bytes as f64);
    let detail = format!("the fastest matmul measured here, and memory while reading {reading}");
    Ok(Section {
        title: "Ceilings".into(),
        model: ceiling.device.name.clone(),
        about: vec![device(&ceiling.device), format!("measured {}", ceiling.date)],
        file: file.into(),
        verdicts: vec![Verdict::plain(text, detail)],
        figures: figures(ceiling),
        blocks: vec![Block::Chart(roofline(ceiling, &[])?), Block::Table(table(ceiling))],
    })
}

/// A device in words, without its name.
pub fn device(device: &DeviceInfo) -> String {
    let DeviceInfo { kind, driver, threads, build, .. } = device;
    let driver = driver.as_ref().map_or(String::new(), |driver| format!(", driver {driver}"));
    let threads = threads.map_or(String::new(), |n| format!(", {n} threads"));
    format!("{kind}{threads}{driver}, {build} build")
}

fn figures(ceiling: &Ceiling) -> Vec<Figure> {
    let matmul = ceiling.matmul.iter().map(|found| {
        let note = format!("{} × {} × {}", found.m, found.k, found.n);
        let name = format!("Matmul, {}", found.dtype.name());
        Figure::large(&name, found.flops_per_s, "FLOP/s", note)
    });
    let stream = ceiling.stream.rates.iter().map(|found| {
        let note = format!("reading {}", bytes(ceiling.stream.buffer_bytes as f64));
        let name = format!("Memory, {}", found.dtype.name());
        Figure::large(&name, found.bytes_per_s, "B/s", note)
    });
    let dispatch = seconds(ceiling.dispatch_s);
    let (value, unit) = dispatch.split_once(' ').unwrap_or((&dispatch, ""));
    let dispatch = Figure::new("Dispatch", value, unit, "the smallest op, one after another");
    matmul.chain(stream).chain([dispatch]).collect()
}

/// A measured point under the roof.
pub struct Placed {
    /// Its number in the table.
    pub label: String,
    /// FLOPs a byte.
    pub intensity: f64,
    /// FLOPs a second.
    pub flops_per_s: f64,
    /// Under which roof.
    pub dtype: Dtype,
    /// Whether the chip's caches may hold what it reads, so that memory is no roof to it.
    pub cached: bool,
}

/// Most points that are named in the roofline: of more, dots and names could not be told apart.
const NAMED: usize = 10;

/// The least of memory's and arithmetic's rate at each intensity, and `points` under it: the roofs
/// of their element types, or all where there is no point. Rings are points that memory's roof does
/// not hold, for their weights and cache fit the chip's caches.
///
/// # Errors
/// None that drawing into memory gives.
pub fn roofline(ceiling: &Ceiling, points: &[Placed]) -> Result<Chart> {
    let ridge = |found: &MatmulRate| found.flops_per_s / ceiling.bytes_per_s(found.dtype);
    let drawn = |x: f64| x.is_finite() && x > 0.0;
    let points: Vec<&Placed> =
        points.iter().filter(|p| drawn(p.intensity) && drawn(p.flops_per_s)).collect();
    let used = |found: &&MatmulRate| {
        drawn(found.flops_per_s)
            && drawn(ridge(found))
            && (points.is_empty() || points.iter().any(|p| p.dtype == found.dtype))
    };
    let roofs: Vec<&MatmulRate> = ceiling.matmul.iter().filter(used).collect();
    let ridges = roofs.iter().map(|found| ridge(found));
    let all = ridges.chain(points.iter().map(|p| p.intensity)).filter(|x| drawn(*x));
    let (least, most) = all.fold((1.0f64, 1.0f64), |(a, b), x| (a.min(x), b.max(x)));
    let (least, most) = (least / 4.0, most * 4.0);
    let mut series = vec![];
    for (i, found) in roofs.iter().enumerate() {
        let (peak, stream) = (found.flops_per_s, ceiling.bytes_per_s(found.dtype));
        let roof = [(least, least * stream), (ridge(found), peak), (most, peak)];
        let name = format!("roof, {}", found.dtype.name());
        series.push(Series::new(&name, Ink::Series((2 * i % 8) as u8), Marks::Line, roof));
    }
    for (name, marks, cached) in
        [("measured", Marks::Dots, false), ("measured, in cache", Marks::Rings, true)]
    {
        let of_kind: Vec<_> = points.iter().filter(|p| p.cached == cached).collect();
        if of_kind.is_empty() {
            continue;
        }
        let at = of_kind.iter().map(|p| (p.intensity, p.flops_per_s));
        let labels = of_kind.iter().map(|p| p.label.clone());
        let labels = if points.len() <= NAMED { labels.collect() } else { vec![] };
        series.push(Series::new(name, Ink::Series(1), marks, at).labelled(labels));
    }
    let ridges = roofs
        .iter()
        .map(|found| format!("{} below {:.1} FLOP/B", found.dtype.name(), ridge(found)));
    let mut said = format!("memory is the bound of {}", ridges.collect::<Vec<_>>().join(", "));
    for p in &points {
        let cached = if p.cached { ", in cache" } else { "" };
        let speed = rate(p.flops_per_s);
        said += &format!("; {}: {:.2} FLOP/B, {speed}{cached}", p.label, p.intensity);
    }
    let plot = Plot {
        x: Axis { name: "FLOP/B".into(), scale: Scale::Log },
        y: Axis { name: "FLOP/s".into(), scale: Scale::Log },
        series,
    };
    let mut units = "FLOP/s by arithmetic intensity in FLOP/B, both axes logarithmic".to_string();
    let cached = points.iter().filter(|p| p.cached).count();
    if cached > 0 {
        let all = points.len();
        units += &format!(
            "; weights and cache of {cached} of {all} points fit the chip's caches, where memory's roof \
             does not hold"
        );
    }
    Chart::plot(Words::new("Roofline", &units, said), &plot)
}

/// What was measured beside what the maker states.
pub fn table(ceiling: &Ceiling) -> Table {
    let sheet = ceiling.datasheet.as_ref();
    let head = ["ceiling", "measured", "slowest repetition"];
    let of_sheet = sheet.map(|_| ["datasheet", "reached"]).into_iter().flatten();
    let mut table = Table::new("Ceilings", 1, head.into_iter().chain(of_sheet));
    let mut row = |name: String, found: f64, samples: &[f64], stated: Option<f64>, unit: &str| {
        let figure = |x: f64| Cell::figure(x, format!("{}{unit}", spaced(x)), unit);
        // Seconds of the fastest are those of the rate.
        let ends = samples.iter().fold((f64::MAX, 0.0f64), |(a, b), x| (a.min(*x), b.max(*x)));
        let slowest = match ends {
            (fastest, slowest) if slowest > 0.0 => figure(found * fastest / slowest),
            _ => Cell::none(),
        };
        let mut cells = vec![Cell::word(name), figure(found), slowest];
        if sheet.is_some() {
            cells.push(stated.map_or(Cell::none(), figure));
            cells.push(stated.map_or(Cell::none(), |stated| Cell::share(found / stated)));
        }
        table.rows.push(cells);
    };
    for found in &ceiling.matmul {
        let stated = sheet.and_then(|s| s.peaks.iter().find(|peak| peak.dtype == found.dtype));
        let name = format!("matmul, {}", found.dtype.name());
        let stated = stated.map(|peak| peak.flops_per_s);
        row(name, found.flops_per_s, &found.samples, stated, "FLOP/s");
    }
    for found in &ceiling.stream.rates {
        let name = format!("memory, {}", found.dtype.name());
        row(name, found.bytes_per_s, &found.samples, sheet.map(|s| s.bytes_per_s), "B/s");
    }
    let dispatch = Cell::figure(ceiling.dispatch_s, seconds(ceiling.dispatch_s), "s");
    let mut cells = vec![Cell::word("dispatch, an op"), dispatch];
    cells.resize(table.head.len(), Cell::none());
    table.rows.push(cells);
    table
}

/// A figure with its SI prefix, ready for a unit.
fn spaced(x: f64) -> String {
    let text = human(x);
    if text.contains(' ') { text } else { text + " " }
}
