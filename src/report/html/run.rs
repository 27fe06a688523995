//! What every run and count has: its audit, its FLOPs by phase and component, its primitives.

use super::{
    chart::{Bar, Bars, Chart, Entry, Ink, Words},
    evaluation, generation,
    page::{Block, Cell, Figure, Section, Table, Verdict, ratio, total},
    read::{Row, Run, Thresholds, Time},
    training,
};
use crate::{
    error::Result,
    ledger::Phase,
    report::{
        Memory, describe, digits, human, percent,
        time::{amount, dollars},
    },
};

/// The page of a run, or of a count.
///
/// # Errors
/// None that drawing into memory gives.
pub fn section(file: &str, run: &Run) -> Result<Section> {
    let mut section = Section {
        title: title(run),
        model: format!("{}, {} parameters", run.model, digits(run.parameters)),
        about: about(run),
        file: file.into(),
        verdicts: vec![verdict(run)],
        figures: vec![Figure::exact("Total", run.total_flops, "FLOPs")],
        blocks: vec![],
    };
    section.figures.extend(tokens(run));
    section.figures.extend(run.time.iter().flat_map(time));
    if let Some(timings) = &run.timings {
        generation::add(&mut section, run, timings);
    }
    if let Some(evaluation) = &run.evaluation {
        evaluation::add(&mut section, run, evaluation);
    }
    if let Some(training) = &run.training {
        training::add(&mut section, run, training)?;
    }
    if run.timings.is_none() && run.training.is_none() && run.evaluation.is_none() {
        section.figures.extend(sizes(&run.memory));
    }
    if run.lora_flops > 0 {
        section.figures.push(Figure::exact("In adapters", run.lora_flops, "FLOPs"));
    }
    section.blocks.extend(differences(run));
    if run.total_flops > 0 {
        section.blocks.extend([by_phase(run)?, by_component(run)?].into_iter().flatten());
    }
    section.blocks.extend(seconds(run)?);
    section.blocks.extend(generation::texts(run));
    match &run.notebook_table {
        Some(_) => section.blocks.extend(notebook(run)),
        None => section.blocks.push(components(run)),
    }
    section.blocks.extend(run.timings.as_ref().map(generation::times));
    section.blocks.extend(run.thresholds.as_ref().map(thresholds));
    section.blocks.push(primitives(run));
    section.blocks.push(memory(run));
    Ok(section)
}

fn title(run: &Run) -> String {
    let task = run.workload.first().map_or("", |w| w.task.name());
    match run.command.as_str() {
        "generate" => "Generation".into(),
        "train" => "Training".into(),
        "eval" => "Evaluation".into(),
        "audit" => format!("Audit of {task}"),
        _ => format!("Count of {task}"),
    }
}

/// What ran, each kind once, and how it is counted.
fn about(run: &Run) -> Vec<String> {
    let mut lines: Vec<(String, u128)> = vec![];
    for line in run.workload.iter().map(describe) {
        match lines.iter_mut().find(|(seen, _)| *seen == line) {
            Some((_, times)) => *times += 1,
            None => lines.push((line, 1)),
        }
    }
    let lines = lines.into_iter().map(|(line, times)| match times {
        1 => line,
        times => format!("{line}, {times} times"),
    });
    let dtype = run.workload.first().map_or("", |w| w.dtype.name());
    let place = run.device.as_ref().map_or(String::new(), |device| format!(" on {device}"));
    let counted = format!(
        "{dtype}{place}; counted under structure {}, prices {}",
        run.structure, run.prices.name
    );
    lines.chain([counted]).collect()
}

fn verdict(run: &Run) -> Verdict {
    let keys = digits(run.keys_compared.unwrap_or_default().into());
    match (run.balanced, run.executed_flops) {
        (Some(true), Some(flops)) => Verdict::of(
            true,
            "The audit balances",
            format!(
                "closed form = predicted = executed = {} FLOPs; {keys} distinct ops compared by \
                 phase, scope, dimensions, dtype and calls",
                digits(flops)
            ),
        ),
        (Some(_), _) => {
            let sides = [
                ("closed form", run.closed_form_flops),
                ("predicted", run.predicted_flops),
                ("executed", run.executed_flops),
            ];
            let sides: Vec<String> = sides
                .iter()
                .filter_map(|(name, flops)| Some(format!("{name} {}", digits((*flops)?))))
                .collect();
            let graph = run.graph_difference.as_ref();
            let graph = graph.map_or(String::new(), |why| format!("; the recorded step: {why}"));
            let sides = sides.join(", ");
            let detail = format!("{sides} FLOPs; {keys} distinct ops compared{graph}");
            Verdict::of(false, "The audit does not balance", detail)
        }
        (None, _) => Verdict::plain(
            format!("{} FLOPs", human(run.total_flops as f64)),
            format!("exactly {}, counted and not run", digits(run.total_flops)),
        ),
    }
}

/// Tokens with what each costs, and padding where there is any.
fn tokens(run: &Run) -> Vec<Figure> {
    let Some(tokens) = run.tokens else { return vec![] };
    let each = run.flops_per_token.map_or(String::new(), |n| format!("{} FLOPs each", human(n)));
    let mut figures = vec![Figure::new("Tokens", digits(tokens.real), "", each)];
    if tokens.padding > 0 {
        let cost = tokens.padding_flops.map(|n| format!(", {} FLOPs", human(n as f64)));
        let share = percent(ratio(tokens.padding, tokens.fed));
        let note = format!("{share} of what is fed{}", cost.unwrap_or_default());
        figures.push(Figure::new("Padding", digits(tokens.padding), "tokens", note));
    }
    figures
}

/// Hours, money and energy.
fn time(time: &Time) -> Vec<Figure> {
    let hours = format!("{} hours times devices", amount(time.gpu_hours));
    let mut figures = vec![Figure::new("Time", amount(time.hours), "hours", hours)];
    figures.extend(time.dollars.map(|cost| Figure::new("Cost", dollars(cost), "", "")));
    let kwh = time.kwh.map(|kwh| Figure::new("Energy", amount(kwh), "kWh", "devices alone"));
    figures.extend(kwh);
    figures
}

/// The amounts that laws name.
fn thresholds(all: &Thresholds) -> Block {
    let mut table =
        Table::new("Thresholds", 2, ["amount", "stated in", "FLOP", "counted", "share", "passed"]);
    table.rows.extend(all.lines.iter().map(|line| {
        vec![
            Cell::word(&line.name),
            Cell::word(&line.source),
            Cell::figure(line.limit_flops, format!("{:.3e}", line.limit_flops), ""),
            Cell::count(line.flops),
            Cell::share(line.share),
            Cell::word(if line.passed { "passed" } else { "" }),
        ]
    }));
    Block::Table(table)
}

fn sizes(memory: &Memory) -> Vec<Figure> {
    let sizes = [
        ("Weights", memory.weights_bytes),
        ("KV cache", memory.kv_cache_bytes),
        ("Activations, about", memory.activations_bytes),
        ("Gradients and moments", memory.training_bytes),
    ];
    let sizes = sizes.into_iter().filter(|(_, n)| *n > 0);
    sizes.map(|(name, n)| Figure::large(name, n as f64, "B", "")).collect()
}

/// Every disagreement of the audit.
fn differences(run: &Run) -> Option<Block> {
    let head = ["phase", "scope", "op", "predicted calls", "executed calls", "FLOPs off"];
    let mut table = Table::new("Where the countings differ", 3, head);
    table.rows.extend(run.differences.iter().map(|d| {
        let off = d.executed_flops.abs_diff(d.predicted_flops);
        let off = i128::try_from(off).unwrap_or(i128::MAX);
        let off = if d.executed_flops < d.predicted_flops { -off } else { off };
        vec![
            Cell::word(d.phase.name()),
            Cell::word(&d.scope),
            Cell::word(&d.op),
            Cell::count(d.predicted_calls),
            Cell::count(d.executed_calls),
            Cell::signed(off),
        ]
    }));
    (!table.rows.is_empty()).then_some(Block::Table(table))
}

/// Phases that share a colour, and its name.
fn group(phase: Phase) -> (&'static str, Ink) {
    match phase {
        Phase::Setup => ("setup", Ink::Series(3)),
        Phase::Forward => ("forward", Ink::Series(0)),
        Phase::Prefill => ("prefill", Ink::Series(0)),
        Phase::Decode => ("decode", Ink::Series(1)),
        Phase::Recompute => ("recompute", Ink::Series(6)),
        Phase::Loss => ("loss", Ink::Series(4)),
        Phase::Backward
        | Phase::BackwardX
        | Phase::BackwardA
        | Phase::BackwardB
        | Phase::BackwardW => ("backward", Ink::Series(1)),
        Phase::Clipping | Phase::Optimizer => ("optimizer", Ink::Series(2)),
        Phase::Sampling => ("sampling", Ink::Series(2)),
    }
}

/// The distinct values of `of`, in order of appearance.
fn distinct<T: PartialEq>(rows: &[Row], of: impl Fn(&Row) -> T) -> Vec<T> {
    let mut all = vec![];
    for value in rows.iter().map(of) {
        if !all.contains(&value) {
            all.push(value);
        }
    }
    all
}

fn flops(rows: &[Row], of: impl Fn(&&Row) -> bool) -> u128 {
    total(rows.iter().filter(of).map(|row| row.flops))
}

fn short_share(part: u128, whole: u128) -> String {
    let share = 100.0 * ratio(part, whole);
    let share = if share < 0.05 { "<0.1".into() } else { format!("{share:.1}") };
    format!("{} · {share} %", human(part as f64))
}

/// A bar a phase; none where there is one.
fn by_phase(run: &Run) -> Result<Option<Block>> {
    let phases = distinct(&run.rows, |row| row.phase);
    let phases: Vec<(Phase, u128)> = phases
        .into_iter()
        .map(|phase| (phase, flops(&run.rows, |row| row.phase == phase)))
        .filter(|(_, flops)| *flops > 0)
        .collect();
    if phases.len() < 2 {
        return Ok(None);
    }
    let bars = phases.iter().map(|(phase, flops)| {
        let value = short_share(*flops, run.total_flops);
        Bar::stacked(phase.name(), value, [(*flops as f64, group(*phase).1)])
    });
    let said = phases
        .iter()
        .map(|(phase, flops)| format!("{phase} {}", short_share(*flops, run.total_flops)));
    let said: Vec<String> = said.collect();
    let words = Words::new("FLOPs by phase", "FLOPs and share of the total", said.join("; "));
    let bars = Bars { bars: bars.collect(), linked: false };
    Ok(Some(Block::Chart(Chart::bars(words, vec![], &bars)?)))
}

/// A bar a component, the largest first, made of its phases.
fn by_component(run: &Run) -> Result<Option<Block>> {
    let groups = distinct(&run.rows, |row| group(row.phase));
    let groups: Vec<_> =
        groups.into_iter().filter(|g| flops(&run.rows, |row| group(row.phase) == *g) > 0).collect();
    let mut parts: Vec<(String, u128)> = distinct(&run.rows, |row| row.component.clone())
        .into_iter()
        .map(|name| {
            let flops = flops(&run.rows, |row| row.component == name);
            (name, flops)
        })
        .filter(|(_, flops)| *flops > 0)
        .collect();
    parts.sort_by_key(|(_, flops)| std::cmp::Reverse(*flops));
    if parts.len() < 2 {
        return Ok(None);
    }
    let bars = parts.iter().map(|(name, all)| {
        let of_group = |g: &(&'static str, Ink)| {
            let of = |row: &&Row| row.component == *name && group(row.phase) == *g;
            (flops(&run.rows, of) as f64, g.1)
        };
        Bar::stacked(name, short_share(*all, run.total_flops), groups.iter().map(of_group))
    });
    let said = parts.iter().take(5);
    let said = said.map(|(name, n)| format!("{name} {}", short_share(*n, run.total_flops)));
    let said = format!("The largest: {}", said.collect::<Vec<_>>().join("; "));
    let words = Words::new("FLOPs by component", "FLOPs and share of the total, all layers", said);
    let legend = groups.iter().map(|(name, ink)| Entry::area(*name, *ink));
    let legend = if groups.len() > 1 { legend.collect() } else { vec![] };
    let bars = Bars { bars: bars.collect(), linked: false };
    Ok(Some(Block::Chart(Chart::bars(words, legend, &bars)?)))
}

/// A bar a component of its time, where ops were timed.
fn seconds(run: &Run) -> Result<Option<Block>> {
    let of = |name: &str| -> f64 {
        let rows = run.rows.iter().filter(|row| row.component == name);
        rows.filter_map(|row| row.seconds).sum()
    };
    let names = distinct(&run.rows, |row| row.component.clone());
    let mut parts: Vec<(String, f64)> =
        names.into_iter().map(|name| (of(&name), name)).map(|(s, name)| (name, s)).collect();
    parts.retain(|(_, seconds)| *seconds > 0.0);
    parts.sort_by(|a, b| b.1.total_cmp(&a.1));
    let all: f64 = parts.iter().map(|(_, seconds)| seconds).sum();
    if parts.is_empty() || !all.is_finite() {
        return Ok(None);
    }
    let value = |s: f64| format!("{:.1} ms · {:.1} %", 1e3 * s, 100.0 * s / all);
    let bars = parts
        .iter()
        .map(|(name, s)| Bar::stacked(name, value(*s), [(*s, Ink::Series(0))]))
        .collect();
    let said: Vec<String> =
        parts.iter().take(5).map(|(name, s)| format!("{name} {}", value(*s))).collect();
    let words = Words::new(
        "Time by component",
        "milliseconds and share of the timed ops",
        format!("The largest: {}", said.join("; ")),
    );
    let bars = Bars { bars, linked: false };
    Ok(Some(Block::Chart(Chart::bars(words, vec![], &bars)?)))
}

/// Components down, phases across.
fn components(run: &Run) -> Block {
    let phases = distinct(&run.rows, |row| row.phase);
    let phases: Vec<Phase> = phases
        .into_iter()
        .filter(|phase| flops(&run.rows, |row| row.phase == *phase) > 0)
        .collect();
    let phases = if phases.len() > 1 { phases } else { vec![] };
    // Formulas list no ops.
    let listed = run.rows.iter().any(|row| row.calls > 0);
    let timed = run.rows.iter().any(|row| row.seconds.is_some());
    let mut head = vec!["component".to_string()];
    head.extend(["total FLOPs".into(), "share".into()]);
    head.extend(phases.iter().map(|phase| phase.to_string()));
    head.extend(listed.then(|| "calls".to_string()));
    head.extend(timed.then(|| "ms".to_string()));
    let mut table = Table::new("Components", 1, head);
    let line = |name: &str, of: &dyn Fn(&&Row) -> bool| {
        let rows = || run.rows.iter().filter(of);
        let all = total(rows().map(|row| row.flops));
        let mut cells = vec![Cell::word(name), Cell::count(all)];
        cells.push(Cell::share(ratio(all, run.total_flops)));
        cells.extend(phases.iter().map(|phase| {
            match total(rows().filter(|row| row.phase == *phase).map(|row| row.flops)) {
                0 => Cell::none(),
                n => Cell::short(n),
            }
        }));
        cells.extend(listed.then(|| Cell::count(total(rows().map(|row| row.calls)))));
        cells.extend(timed.then(|| {
            let ms = 1e3 * rows().filter_map(|row| row.seconds).sum::<f64>();
            Cell::figure(ms, format!("{ms:.1}"), "ms")
        }));
        cells
    };
    for name in distinct(&run.rows, |row| row.component.clone()) {
        table.rows.push(line(&name, &|row| row.component == name));
    }
    table.foot = Some(line("total", &|_| true));
    Block::Table(table)
}

/// The notebook's own table.
fn notebook(run: &Run) -> Option<Block> {
    let head = ["", "additions", "multiplications", "divisions", "exponentiations", "square roots"];
    let mut table = Table::new("The notebook's table", 1, head.into_iter().chain(["total"]));
    table.rows.extend(run.notebook_table.iter().flatten().map(|row| {
        let figures = row.flops.iter().chain([&row.total]).map(|n| Cell::short(*n));
        [Cell::word(&row.name)].into_iter().chain(figures).collect()
    }));
    (!table.rows.is_empty()).then_some(Block::Table(table))
}

fn primitives(run: &Run) -> Block {
    let mut table = Table::new("Primitive operations", 1, ["primitive", "count", "about"]);
    let named = run.primitives.named().into_iter().filter(|(_, n)| *n > 0);
    table
        .rows
        .extend(named.map(|(name, n)| vec![Cell::word(name), Cell::count(n), Cell::short(n)]));
    Block::Table(table)
}

fn memory(run: &Run) -> Block {
    let mut table = Table::new("Memory at least", 1, ["what", "bytes", "about"]);
    let parts = run.memory.parts().into_iter().filter(|(_, n)| *n > 0);
    table
        .rows
        .extend(parts.map(|(name, n)| vec![Cell::word(name), Cell::count(n), Cell::bytes(n)]));
    Block::Table(table)
}
