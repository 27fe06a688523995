//! Benchmarks as a table, as CSV and as Markdown; ceilings and comparisons as tables.

use std::io::{IsTerminal, Write};

use super::{
    describe,
    figures::{Figures, bytes, digits, human, rate, seconds},
    table::{FAINT, GOOD, align, new_table},
};
use crate::{
    bench::{BenchReport, Ceiling, Comparison, DeviceInfo, Kind, Point, Verdict},
    error::Result,
    ledger::MomentDtype,
    workload::{AttentionMode, Task},
};

/// A column: its heading, and a point's cell.
type Column = (&'static str, fn(&Point, Figures) -> String);

/// Whether layers run again for their gradients.
fn recomputes(point: &Point) -> bool {
    matches!(point.workload.task, Task::Train { recompute: true, .. })
}

/// How a training's moments are kept; of what has none, nothing.
fn moments(point: &Point) -> &'static str {
    match point.workload.task {
        Task::Train { moments, .. } => moments.name(),
        Task::Forward { .. }
        | Task::Generate { .. }
        | Task::Verify { .. }
        | Task::Evaluate { .. } => "",
    }
}

/// The columns that `report` fills.
fn columns(report: &BenchReport) -> Vec<Column> {
    let any = |of: fn(&Point) -> bool| report.points.iter().any(of);
    let length: Column = match report.kind {
        Kind::Decode => ("context", |p, _| p.context.to_string()),
        Kind::Prefill | Kind::Train => ("seq", |p, _| p.seq.to_string()),
    };
    let mut columns: Vec<Column> = vec![("dtype", |p, _| p.workload.dtype.name().into())];
    if any(|p| p.workload.lora.rank > 0) {
        columns.push(("LoRA", |p, _| p.workload.lora.rank.to_string()));
    }
    if any(recomputes) {
        columns.push(("recompute", |p, _| if recomputes(p) { "yes" } else { "no" }.into()));
    }
    if any(|p| moments(p) == MomentDtype::BF16.name()) {
        columns.push(("moments", |p, _| moments(p).into()));
    }
    if any(|p| p.workload.attention == AttentionMode::Blocked) {
        columns.push(("attention", |p, _| p.workload.attention.to_string()));
    }
    columns
        .extend([("batch", (|p, _| p.batch.to_string()) as fn(&Point, Figures) -> String), length]);
    columns.push((
        match report.kind {
            Kind::Prefill => "first token after",
            Kind::Decode => "time per token",
            Kind::Train => "time per step",
        },
        |p, _| seconds(p.seconds.median),
    ));
    columns.push(("IQR", |p, _| share((p.seconds.p75 - p.seconds.p25) / p.seconds.median)));
    if report.kind == Kind::Decode && any(|p| p.predicted_s.is_some()) {
        columns.push(("bytes alone", |p, _| p.predicted_s.map_or("-".into(), seconds)));
    }
    columns.extend([
        ("tokens/s", (|p, _| figure(p.tokens_per_s)) as fn(&Point, Figures) -> String),
        ("FLOPs/token", |p, style| style.count(p.flops_per_token.round() as u128)),
        ("FLOP/s", |p, _| human(p.flops_per_s)),
        ("MFU", |p, _| share(p.mfu_measured)),
    ]);
    if any(|p| p.hfu_measured.is_some()) {
        columns.push(("HFU", |p, _| share(p.hfu_measured.unwrap_or(p.mfu_measured))));
    }
    if any(|p| p.mfu_datasheet.is_some()) {
        columns.push(("of datasheet", |p, _| p.mfu_datasheet.map_or("-".into(), share)));
    }
    columns.push(("B/s", |p, _| human(p.bytes_per_s)));
    if any(|p| p.bandwidth_use.is_some()) {
        columns.push(("of stream", |p, _| p.bandwidth_use.map_or("-".into(), share)));
    }
    columns.extend([
        ("FLOP/B", (|p, _| figure(p.intensity)) as fn(&Point, Figures) -> String),
        ("bound", |p, _| p.bound.name().into()),
        ("reached", |p, _| share(p.roofline_share)),
        ("tokens/s/TFLOP", |p, _| figure(p.tokens_per_s_per_tflop)),
    ]);
    if any(|p| p.energy.is_some()) {
        columns
            .push(("tokens/J", |p, _| p.energy.map_or("-".into(), |e| figure(e.tokens_per_joule))));
        columns.push(("FLOP/J", |p, _| p.energy.map_or("-".into(), |e| human(e.flop_per_joule))));
        columns.push(("W", |p, _| p.energy.map_or("-".into(), |e| figure(e.watts))));
    }
    if any(|p| p.clocks.is_some()) {
        columns.push(("SM MHz", |p, _| p.clocks.map_or("-".into(), |c| c.sm_mhz.to_string())));
    }
    columns
}

fn share(part: f64) -> String {
    format!("{:.1} %", 100.0 * part)
}

/// Three or four digits.
fn figure(x: f64) -> String {
    match x {
        x if x < 10.0 => format!("{x:.2}"),
        x if x < 1000.0 => format!("{x:.1}"),
        x => human(x),
    }
}

/// Prints `report` to standard output.
///
/// # Errors
/// A closed pipe.
pub fn print_bench(report: &BenchReport, style: Figures) -> Result<()> {
    let unicode = std::io::stdout().is_terminal();
    render_bench(&mut anstream::stdout().lock(), report, style, unicode)
}

/// Writes `report`, with ANSI colour, to `out`.
///
/// # Errors
/// What `out` reports.
pub fn render_bench(
    out: &mut impl Write,
    report: &BenchReport,
    style: Figures,
    unicode: bool,
) -> Result<()> {
    let BenchReport { kind, model, parameters, points, ceiling, device, accuracy, .. } = report;
    writeln!(out, "model     {model}, {} parameters", digits(*parameters))?;
    let points_of = if points.len() == 1 { "point" } else { "points" };
    writeln!(out, "workload  {kind}, {} {points_of}, medians", points.len())?;
    writeln!(out, "device    {}", device_line(device))?;
    ceiling_lines(out, ceiling)?;
    let columns = columns(report);
    let mut table = new_table(unicode);
    table.set_header(columns.iter().map(|(heading, _)| *heading));
    for point in points {
        table.add_row(columns.iter().map(|(_, cell)| cell(point, style)));
    }
    align(&mut table, 1);
    writeln!(out, "\n{}\n", table.trim_fmt())?;
    let yes = if unicode { "✔ " } else { "" };
    writeln!(
        out,
        "{GOOD}{yes}every point is audited{GOOD:#}: closed form = predicted = executed; FLOPs are 2mnk"
    )?;
    writeln!(
        out,
        "{FAINT}B/s and FLOP/B are of weights and cache; a roofline's bound is the largest of FLOPs, \
         bytes and ops over their ceilings{FAINT:#}"
    )?;
    if let Some(found) = accuracy {
        writeln!(out, "accuracy  {}: {}", found.dtype.name(), found.says())?;
    }
    for curve in &report.curves {
        writeln!(
            out,
            "curve     {}: step = {}, residual {}",
            curve.name,
            curve.formula(),
            share(curve.residual)
        )?;
        if curve.is_above(ceiling) {
            writeln!(
                out,
                "{FAINT}          a rate above its ceiling: that part of the time is hidden behind \
                 the rest{FAINT:#}"
            )?;
        }
    }
    Ok(())
}

/// Prints `ceiling` to standard output.
///
/// # Errors
/// A closed pipe.
pub fn print_ceiling(ceiling: &Ceiling) -> Result<()> {
    let mut out = anstream::stdout().lock();
    writeln!(out, "device    {}", device_line(&ceiling.device))?;
    ceiling_lines(&mut out, ceiling)
}

/// Prints one line to standard output.
///
/// # Errors
/// A closed pipe.
pub fn print_line(line: &str) -> Result<()> {
    Ok(writeln!(anstream::stdout().lock(), "{line}")?)
}

fn ceiling_lines(out: &mut impl Write, ceiling: &Ceiling) -> Result<()> {
    let Ceiling { date, matmul, stream, dispatch_s, datasheet, .. } = ceiling;
    writeln!(out, "ceiling   measured {date}")?;
    for found in matmul {
        let (name, flops) = (found.dtype.name(), rate(found.flops_per_s));
        let (m, k, n) = (found.m, found.k, found.n);
        writeln!(out, "matmul    {name:<4} {flops} at {m} x {k} x {n}")?;
    }
    for found in &stream.rates {
        let (name, each) = (found.dtype.name(), bytes(found.bytes_per_s));
        let size = bytes(stream.buffer_bytes as f64);
        writeln!(out, "stream    {name:<4} {each}/s reading {size}")?;
    }
    writeln!(out, "dispatch  {} an op", seconds(*dispatch_s))?;
    if let Some(sheet) = datasheet {
        let peaks: Vec<_> = sheet
            .peaks
            .iter()
            .map(|peak| format!("{} {}", peak.dtype.name(), rate(peak.flops_per_s)))
            .collect();
        let (peaks, memory) = (peaks.join(", "), bytes(sheet.bytes_per_s));
        writeln!(out, "datasheet {peaks}, {memory}/s ({})", sheet.source)?;
    }
    Ok(())
}

/// A device in one line.
pub fn device_line(device: &DeviceInfo) -> String {
    let DeviceInfo { name, kind, driver, threads, build, .. } = device;
    let driver = driver.as_ref().map_or(String::new(), |driver| format!(", driver {driver}"));
    let threads = threads.map_or(String::new(), |n| match n {
        1 => ", 1 thread".into(),
        n => format!(", {n} threads"),
    });
    format!("{name} ({kind}{threads}{driver}), {build} build")
}

/// Prints the `comparison` of `before` and `after` to standard output.
///
/// # Errors
/// A closed pipe.
pub fn print_comparison(
    before: &BenchReport,
    after: &BenchReport,
    comparison: &Comparison,
) -> Result<()> {
    let unicode = std::io::stdout().is_terminal();
    let mut out = anstream::stdout().lock();
    for (name, side) in [("before", before), ("after", after)] {
        writeln!(out, "{name:<9} {}, {}", side.date, side.model)?;
        writeln!(out, "          on {}", device_line(&side.device))?;
    }
    writeln!(out)?;
    let mut table = new_table(unicode);
    table.set_header(["workload", "before", "after", "ratio", "95 % interval", "verdict"]);
    for change in &comparison.changes {
        let (low, high) = change.interval;
        let dtype = change.workload.dtype.name();
        table.add_row([
            format!("{}, {dtype}", describe(&change.workload)),
            seconds(change.before_s),
            seconds(change.after_s),
            format!("{:.3}", change.ratio),
            format!("{low:.3} .. {high:.3}"),
            change.verdict.name().into(),
        ]);
    }
    align(&mut table, 1);
    writeln!(out, "{}\n", table.trim_fmt())?;
    for (which, workloads) in
        [("first", &comparison.only_before), ("second", &comparison.only_after)]
    {
        for workload in workloads {
            writeln!(out, "in the {which} alone: {}", describe(workload))?;
        }
    }
    let changed = comparison
        .changes
        .iter()
        .filter(|change| matches!(change.verdict, Verdict::Faster | Verdict::Slower))
        .count();
    let all = comparison.changes.len();
    let noise = share(comparison.noise);
    Ok(writeln!(out, "{changed} of {all} changed: by more than {noise}, 1 outside the interval")?)
}

/// Writes `report`'s table in GitHub's Markdown.
///
/// # Errors
/// What `out` reports.
pub fn bench_markdown(out: &mut dyn Write, report: &BenchReport) -> Result<()> {
    let columns = columns(report);
    let row = |cells: Vec<String>| format!("| {} |", cells.join(" | "));
    writeln!(out, "{}", row(columns.iter().map(|(heading, _)| heading.to_string()).collect()))?;
    let rule = columns.iter().enumerate().map(|(i, _)| if i == 0 { "---" } else { "---:" });
    writeln!(out, "{}", row(rule.map(String::from).collect()))?;
    for point in &report.points {
        writeln!(
            out,
            "{}",
            row(columns.iter().map(|(_, cell)| cell(point, Figures::Human)).collect())
        )?;
    }
    Ok(())
}

/// A field of the CSV: its name, and a point's value; empty where there is none.
type Field = (&'static str, fn(&Point) -> String);

const FIELDS: [Field; 42] = [
    ("dtype", |p| p.workload.dtype.name().into()),
    ("lora_rank", |p| p.workload.lora.rank.to_string()),
    ("batch", |p| p.batch.to_string()),
    ("seq", |p| p.seq.to_string()),
    ("context", |p| p.context.to_string()),
    ("ops", |p| p.ops.to_string()),
    ("samples", |p| p.seconds.samples.len().to_string()),
    ("median_s", |p| p.seconds.median.to_string()),
    ("min_s", |p| p.seconds.min.to_string()),
    ("max_s", |p| p.seconds.max.to_string()),
    ("p25_s", |p| p.seconds.p25.to_string()),
    ("p75_s", |p| p.seconds.p75.to_string()),
    ("tokens_per_s", |p| p.tokens_per_s.to_string()),
    ("flops", |p| p.flops.to_string()),
    ("unit_flops", |p| p.unit_flops.to_string()),
    ("flops_per_token", |p| p.flops_per_token.to_string()),
    ("flops_per_s", |p| p.flops_per_s.to_string()),
    ("mfu_measured", |p| p.mfu_measured.to_string()),
    ("mfu_datasheet", |p| optional(p.mfu_datasheet)),
    ("recomputed_flops", |p| p.recomputed_flops.to_string()),
    ("hfu_measured", |p| optional(p.hfu_measured)),
    ("hfu_datasheet", |p| optional(p.hfu_datasheet)),
    ("weights_bytes", |p| p.bytes.weights.to_string()),
    ("kv_cache_bytes", |p| p.bytes.kv_cache.to_string()),
    ("activations_bytes", |p| p.bytes.activations.to_string()),
    ("bytes_per_s", |p| p.bytes_per_s.to_string()),
    ("bandwidth_use", |p| optional(p.bandwidth_use)),
    ("intensity", |p| p.intensity.to_string()),
    ("compute_s", |p| p.limits.compute_s.to_string()),
    ("memory_s", |p| optional(p.limits.memory_s)),
    ("dispatch_s", |p| p.limits.dispatch_s.to_string()),
    ("bound", |p| p.bound.name().into()),
    ("roofline_share", |p| p.roofline_share.to_string()),
    ("tokens_per_s_per_tflop", |p| p.tokens_per_s_per_tflop.to_string()),
    ("joules", |p| optional(p.energy.map(|e| e.joules))),
    ("tokens_per_joule", |p| optional(p.energy.map(|e| e.tokens_per_joule))),
    ("flop_per_joule", |p| optional(p.energy.map(|e| e.flop_per_joule))),
    ("watts", |p| optional(p.energy.map(|e| e.watts))),
    ("sm_mhz", |p| optional(p.clocks.map(|c| c.sm_mhz.into()))),
    ("memory_mhz", |p| optional(p.clocks.map(|c| c.memory_mhz.into()))),
    ("attention", |p| p.workload.attention.to_string()),
    ("moments", |p| moments(p).into()),
];

fn optional(figure: Option<f64>) -> String {
    figure.map_or(String::new(), |figure| figure.to_string())
}

/// Writes `report` as RFC 4180's CSV: a header, then a line a point, ended by CR LF. No field holds
/// a comma, a quote or a line end, so none is quoted.
///
/// # Errors
/// What `out` reports.
pub fn bench_csv(out: &mut dyn Write, report: &BenchReport) -> Result<()> {
    write!(out, "{}\r\n", FIELDS.map(|(name, _)| name).join(","))?;
    for point in &report.points {
        let cells: Vec<_> = FIELDS.iter().map(|(_, cell)| cell(point)).collect();
        write!(out, "{}\r\n", cells.join(","))?;
    }
    Ok(())
}
