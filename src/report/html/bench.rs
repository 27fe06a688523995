//! A benchmark: its points against the device's ceilings.

use super::{
    ceiling::{self, Placed},
    chart::{Axis, Bar, Bars, Chart, Ink, Marks, Plot, Scale, Series, Words},
    page::{Block, Cell, Figure, Notes, Section, Table, Verdict},
};
use crate::{
    bench::{BenchReport, Bound, Curve, CurvePoint, Kind, Point},
    error::Result,
    report::{bytes, digits, figures::per_second, human, seconds},
    workload::AttentionMode,
};

/// The page of a benchmark.
///
/// # Errors
/// None that drawing into memory gives.
pub fn section(file: &str, report: &BenchReport) -> Result<Section> {
    let BenchReport { kind, model, parameters, device, date, ceiling, points, .. } = report;
    let placed: Vec<Placed> = points
        .iter()
        .enumerate()
        .map(|(i, p)| Placed {
            label: (i + 1).to_string(),
            intensity: p.intensity,
            flops_per_s: p.flops_per_s,
            dtype: p.workload.dtype,
            cached: p.limits.memory_s.is_none(),
        })
        .collect();
    let mut section = Section {
        title: format!("Benchmark of {kind}"),
        model: format!("{model}, {} parameters", digits(*parameters)),
        about: vec![
            format!("{}: {}", device.name, ceiling::device(device)),
            format!("{date}; {} points, medians; FLOPs are 2·m·k·n of each matmul", points.len()),
        ],
        file: file.into(),
        verdicts: verdicts(report),
        figures: figures(report),
        blocks: vec![],
    };
    if !points.is_empty() {
        section.blocks.push(Block::Chart(speeds(report)?));
        section.blocks.push(Block::Chart(ceiling::roofline(ceiling, &placed)?));
    }
    let curves = report.curves.iter().filter(|curve| !curve.points.is_empty());
    for curve in curves.clone() {
        section.blocks.push(Block::Chart(decode_curve(curve)?));
    }
    section.blocks.push(Block::Table(speed_table(report)));
    section.blocks.push(Block::Table(use_table(report)));
    section.blocks.push(Block::Table(ceiling::table(ceiling)));
    let fits: Vec<_> = curves
        .map(|curve| {
            let text = format!("step = {}; residual {}", curve.formula(), share(curve.residual));
            (curve.name.clone(), text)
        })
        .collect();
    if let Some(found) = &report.accuracy {
        let notes = vec![(found.dtype.name().into(), found.says())];
        section.blocks.push(Block::Notes(Notes { title: "Accuracy".into(), notes }));
    }
    if !fits.is_empty() {
        section.blocks.push(Block::Notes(Notes { title: "Fits".into(), notes: fits }));
    }
    Ok(section)
}

fn share(part: f64) -> String {
    format!("{:.1} %", 100.0 * part)
}

fn verdicts(report: &BenchReport) -> Vec<Verdict> {
    let BenchReport { kind, points, .. } = report;
    let Some(best) = fastest(points) else {
        return vec![Verdict::plain("Nothing was measured", "")];
    };
    let what = match best.bound {
        Bound::Compute => "the measured matmul rate",
        Bound::Memory => "the measured memory bandwidth",
        Bound::Dispatch => "the measured dispatch rate",
    };
    let text = format!(
        "{} tokens/s, {} of the roofline",
        per_second(best.tokens_per_s),
        share(best.roofline_share)
    );
    let detail = format!("{kind}, {}; bound by {what}", name(report, best));
    let unbalanced = points.iter().filter(|p| !p.balanced).count();
    let audit = match unbalanced {
        0 => Verdict::of(
            true,
            "Every point is audited",
            "closed form = predicted = executed, for each of them",
        ),
        n => Verdict::of(
            false,
            "Not every audit balances",
            format!("{n} of {} points", points.len()),
        ),
    };
    vec![Verdict::plain(text, detail), audit]
}

fn fastest(points: &[Point]) -> Option<&Point> {
    points.iter().max_by(|a, b| a.tokens_per_s.total_cmp(&b.tokens_per_s))
}

/// What tells a point from the others.
fn name(report: &BenchReport, p: &Point) -> String {
    let length = match report.kind {
        Kind::Decode => format!("context {}", p.context),
        Kind::Prefill | Kind::Train => format!("{} tokens", p.seq),
    };
    let lora = match p.workload.lora.rank {
        0 => String::new(),
        rank => format!(", LoRA rank {rank}"),
    };
    let attention = if blocked(p) { ", blocked attention" } else { "" };
    format!("{}, batch {}, {length}{lora}{attention}", p.workload.dtype.name(), p.batch)
}

fn figures(report: &BenchReport) -> Vec<Figure> {
    let points = &report.points;
    let most = |of: fn(&Point) -> Option<f64>| {
        let with = points.iter().filter_map(|p| Some((p, of(p)?)));
        with.max_by(|a, b| a.1.total_cmp(&b.1))
    };
    let mut figures = vec![];
    if let Some(p) = fastest(points) {
        let speed = per_second(p.tokens_per_s);
        figures.push(Figure::new("Fastest", speed, "tokens/s", name(report, p)));
    }
    let shortest = points.iter().min_by(|a, b| a.seconds.median.total_cmp(&b.seconds.median));
    if let Some(p) = shortest {
        let time = seconds(p.seconds.median);
        let (value, unit) = time.split_once(' ').unwrap_or((&time, ""));
        let what = match report.kind {
            Kind::Prefill => "First token after",
            Kind::Decode => "Time per token",
            Kind::Train => "Time per step",
        };
        figures.push(Figure::new(what, value, unit, name(report, p)));
    }
    if let Some((p, mfu)) = most(|p| Some(p.mfu_measured)) {
        let note = format!("of the measured matmul rate; {}", name(report, p));
        figures.push(Figure::new("Highest MFU", format!("{:.1}", 100.0 * mfu), "%", note));
    }
    if let Some((p, mfu)) = most(|p| p.mfu_datasheet) {
        let note = format!("of the maker's figure; {}", name(report, p));
        figures.push(Figure::new("Highest MFU", format!("{:.1}", 100.0 * mfu), "%", note));
    }
    if let Some((p, part)) = most(|p| p.bandwidth_use) {
        let note = format!("{}/s; {}", bytes(p.bytes_per_s), name(report, p));
        figures.push(Figure::new("Most bandwidth", format!("{:.1}", 100.0 * part), "%", note));
    }
    if let Some((p, tokens)) = most(|p| p.energy.map(|e| e.tokens_per_joule)) {
        figures.push(Figure::new("Energy", format!("{tokens:.3}"), "tokens/J", name(report, p)));
    }
    figures
}

/// A bar a point.
fn speeds(report: &BenchReport) -> Result<Chart> {
    let bars = report.points.iter().enumerate().map(|(i, p)| {
        let name = format!("{}. {}", i + 1, name(report, p));
        let value = format!("{} · {}", per_second(p.tokens_per_s), share(p.roofline_share));
        Bar::stacked(name, value, [(p.tokens_per_s, Ink::Series(0))])
    });
    let bars = Bars { bars: bars.collect(), linked: false };
    let said = bars.bars.iter().map(|bar| format!("{}: {}", bar.name, bar.value));
    let said = said.collect::<Vec<_>>().join("; ");
    let units = "tokens/s and share of the roofline, by point";
    Chart::bars(Words::new("Speed", units, said), vec![], &bars)
}

/// Time per step by context, measured and fitted, a colour a batch.
fn decode_curve(curve: &Curve) -> Result<Chart> {
    let mut batches: Vec<u64> = curve.points.iter().map(|p| p.batch).collect();
    batches.sort_unstable();
    batches.dedup();
    let mut series = vec![];
    for (i, batch) in batches.iter().enumerate() {
        let mut points: Vec<&CurvePoint> =
            curve.points.iter().filter(|p| p.batch == *batch).collect();
        points.sort_by_key(|point| point.context);
        let ms = |of: fn(&CurvePoint) -> f64| {
            points.iter().map(|p| (p.context as f64, 1e3 * of(p))).collect::<Vec<_>>()
        };
        let ink = Ink::Series(i as u8);
        series.push(Series::new("", ink, Marks::Dashed, ms(|p| p.fitted_s)));
        let name = format!("batch {batch}");
        series.push(Series::new(&name, ink, Marks::Dots, ms(|p| p.measured_s)));
    }
    let said = curve.points.iter().map(|p| {
        let (measured, fitted) = (seconds(p.measured_s), seconds(p.fitted_s));
        format!("batch {}, context {}: {measured}, fitted {fitted}", p.batch, p.context)
    });
    let said = said.collect::<Vec<_>>().join("; ");
    let (fit, residual) = (curve.formula(), share(curve.residual));
    let said = format!("step = {fit}; residual {residual}; {said}");
    let plot = Plot {
        x: Axis { name: "tokens in the cache".into(), scale: Scale::Zero },
        y: Axis { name: "ms a step".into(), scale: Scale::Zero },
        series,
    };
    let title = format!("Decode curve, {}", curve.name);
    let units = "milliseconds a step by context; dots are measured, dashes the fit";
    Chart::plot(Words::new(&title, units, said), &plot)
}

fn blocked(p: &Point) -> bool {
    p.workload.attention == AttentionMode::Blocked
}

/// Whether any point has adapters.
fn adapted(report: &BenchReport) -> bool {
    report.points.iter().any(|p| p.workload.lora.rank > 0)
}

/// The point's number and what tells it from the others.
fn identity(report: &BenchReport, i: usize, p: &Point) -> Vec<Cell> {
    let length = match report.kind {
        Kind::Decode => p.context,
        Kind::Prefill | Kind::Train => p.seq,
    };
    let mut cells = vec![Cell::count(i as u128 + 1), Cell::word(p.workload.dtype.name())];
    cells.extend(adapted(report).then(|| Cell::count(p.workload.lora.rank as u128)));
    let mode = Cell::word(p.workload.attention.name());
    cells.extend(report.points.iter().any(blocked).then_some(mode));
    cells.extend([p.batch, length].map(|n| Cell::count(n.into())));
    cells
}

/// The columns of [`identity`].
fn heads(report: &BenchReport) -> Vec<&'static str> {
    let length = match report.kind {
        Kind::Decode => "context",
        Kind::Prefill | Kind::Train => "tokens",
    };
    let rank = adapted(report).then_some("rank");
    let mode = report.points.iter().any(blocked).then_some("attention");
    ["point", "dtype"].into_iter().chain(rank).chain(mode).chain(["batch", length]).collect()
}

/// A column: its heading, and a point's cell.
type Column = (&'static str, fn(&Point) -> Cell);

/// A table of the points.
fn table(title: &str, report: &BenchReport, columns: &[Column]) -> Table {
    let head = heads(report).into_iter().chain(columns.iter().map(|(heading, _)| *heading));
    let mut table = Table::new(title, 0, head);
    table.rows.extend(report.points.iter().enumerate().map(|(i, p)| {
        let figures = columns.iter().map(|(_, cell)| cell(p));
        identity(report, i, p).into_iter().chain(figures).collect()
    }));
    table
}

fn time(s: f64) -> Cell {
    Cell::figure(s, seconds(s), "s")
}

fn large(x: f64, unit: &str) -> Cell {
    Cell::figure(x, human(x), unit)
}

fn optional<T>(figure: Option<T>, cell: impl FnOnce(T) -> Cell) -> Cell {
    figure.map_or(Cell::none(), cell)
}

/// How fast, and how far the repetitions lie apart.
fn speed_table(report: &BenchReport) -> Table {
    let any = |of: fn(&Point) -> bool| report.points.iter().any(of);
    let mut columns: Vec<Column> = vec![
        ("median", |p| time(p.seconds.median)),
        ("fastest", |p| time(p.seconds.min)),
        ("slowest", |p| time(p.seconds.max)),
        ("IQR", |p| Cell::share((p.seconds.p75 - p.seconds.p25) / p.seconds.median)),
    ];
    if report.kind == Kind::Decode && any(|p| p.predicted_s.is_some()) {
        columns.push(("bytes alone", |p| optional(p.predicted_s, time)));
    }
    columns.extend::<[Column; 4]>([
        ("tokens/s", |p| Cell::figure(p.tokens_per_s, per_second(p.tokens_per_s), "tokens/s")),
        ("FLOPs a token", |p| large(p.flops_per_token, "FLOPs")),
        ("FLOP/s", |p| large(p.flops_per_s, "FLOP/s")),
        ("MFU", |p| Cell::share(p.mfu_measured)),
    ]);
    if any(|p| p.hfu_measured.is_some()) {
        columns.push(("HFU", |p| Cell::share(p.hfu_measured.unwrap_or(p.mfu_measured))));
    }
    if any(|p| p.mfu_datasheet.is_some()) {
        columns.push(("of datasheet", |p| optional(p.mfu_datasheet, Cell::share)));
    }
    columns.push(("tokens/s/TFLOP", |p| {
        let rate = p.tokens_per_s_per_tflop;
        Cell::figure(rate, per_second(rate), "tokens/s for each TFLOP/s of the matmul ceiling")
    }));
    table("Speed", report, &columns)
}

/// What the device was used for.
fn use_table(report: &BenchReport) -> Table {
    let mut columns: Vec<Column> = vec![
        ("FLOPs", |p| Cell::short(p.flops)),
        ("weights", |p| Cell::bytes(p.bytes.weights)),
        ("cache", |p| Cell::bytes(p.bytes.kv_cache)),
        ("activations", |p| Cell::bytes(p.bytes.activations)),
        ("B/s", |p| large(p.bytes_per_s, "B/s")),
        ("of stream", |p| optional(p.bandwidth_use, Cell::share)),
        ("FLOP/B", |p| Cell::figure(p.intensity, format!("{:.2}", p.intensity), "FLOP/B")),
        ("bound", |p| Cell::word(p.bound.name())),
        ("reached", |p| Cell::share(p.roofline_share)),
    ];
    if report.points.iter().any(|p| p.energy.is_some()) {
        columns.extend::<[Column; 2]>([
            ("tokens/J", |p| {
                let tokens = p.energy.map(|e| e.tokens_per_joule);
                optional(tokens, |x| Cell::figure(x, format!("{x:.3}"), "tokens/J"))
            }),
            ("FLOP/J", |p| optional(p.energy, |e| large(e.flop_per_joule, "FLOP/J"))),
        ]);
    }
    table("Use of the device", report, &columns)
}
