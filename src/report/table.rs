//! The report for people: aligned, with colour and Unicode on a terminal only.

use std::io::{IsTerminal, Write};

use anstyle::{AnsiColor, Style};
use comfy_table::{CellAlignment, LineStyle, Table, TableStyle};

use super::{
    AuditReport, FormulaParameters, GenerationReport, Report, TokensReport,
    figures::{Figures, bytes, digits, human, per_second, rate, seconds, three_digits},
    time::{TimeReport, threshold_lines, time_lines},
    training,
};
use crate::{
    analytic::notebook::TableRow,
    error::Result,
    ledger::{MomentDtype, Phase},
    workload::{AttentionMode, Lengths, Ragged, Rows, Task, Turn, Workload},
};

pub(super) const GOOD: Style = AnsiColor::Green.on_default().bold();
pub(super) const BAD: Style = AnsiColor::Red.on_default().bold();
pub(super) const FAINT: Style = Style::new().dimmed();

/// Prints `report` to standard output.
///
/// # Errors
/// A closed pipe.
pub fn print(report: &Report, figures: Figures) -> Result<()> {
    let unicode = std::io::stdout().is_terminal();
    render(&mut anstream::stdout().lock(), report, figures, unicode)
}

/// Writes `report`, with ANSI colour, to `out`.
///
/// # Errors
/// What `out` reports.
pub fn render(
    out: &mut impl Write,
    report: &Report,
    figures: Figures,
    unicode: bool,
) -> Result<()> {
    header(out, report, figures)?;
    if let Some(generation) = &report.generation {
        speeds(out, report, generation, unicode)?;
    }
    if let Some(training) = &report.training {
        training::training(out, training, figures, unicode)?;
    }
    if let Some(evaluation) = &report.evaluation {
        training::evaluation(out, report, evaluation)?;
    }
    let table = match &report.notebook_table {
        Some(rows) => notebook(rows, unicode),
        None => components(report, figures, unicode),
    };
    if report.notebook_table.is_none() && phases_of(report).len() > COLUMNS {
        writeln!(out, "\n{}", phases(report, figures, unicode).trim_fmt())?;
    }
    writeln!(out, "\n{}\n", table.trim_fmt())?;
    totals(out, report, figures)?;
    if let Some(TimeReport { rate, time }) = &report.time {
        time_lines(out, rate, time, report.structure)?;
    }
    if let Some(thresholds) = &report.thresholds {
        threshold_lines(out, thresholds, unicode)?;
    }
    if let Some(audit) = &report.audit {
        verdict(out, audit, unicode)?;
    }
    Ok(())
}

fn header(out: &mut impl Write, report: &Report, figures: Figures) -> Result<()> {
    let Report { model, parameters, prices, structure, memory, .. } = report;
    writeln!(out, "model     {model}, {} parameters", digits(*parameters))?;
    workloads(out, &report.workload)?;
    let dtype = report.workload.first().map_or("", |w| w.dtype.name());
    let parts = memory.parts().into_iter().filter(|(_, n)| *n > 0);
    let parts = parts.map(|(name, n)| format!("{} {name}", bytes(n as f64)));
    let parts: Vec<String> = parts.chain([dtype.into()]).collect();
    writeln!(out, "{}", list("memory    ", &parts))?;
    writeln!(out, "counted   structure {structure}, prices {}", prices.name)?;
    if let Some(FormulaParameters { n, which, head_stored_apart }) = report.formula_parameters {
        let mut parts = vec![format!("{} parameters: {which}", digits(n))];
        if head_stored_apart {
            parts.push("although the checkpoint stores two".into());
        }
        writeln!(out, "{}", list("N         ", &parts))?;
    }
    Ok(writeln!(out, "{}", list("tokens    ", &tokens(report, figures)))?)
}

/// All tokens, what each that is no padding costs, and padding.
fn tokens(report: &Report, figures: Figures) -> Vec<String> {
    let TokensReport { real, padding, .. } = report.tokens;
    let real = if padding > 0 { format!("{} real", digits(real)) } else { digits(real) };
    let each = format!("{} FLOPs each", human(report.flops_per_token));
    let new = report.flops_per_new_token;
    let new = new.map(|each| format!("{} new, {} each", digits(report.new_tokens), human(each)));
    let scores = |w: &Workload| matches!(w.task, Task::Evaluate { .. });
    let beside = report.training.is_some() && report.workload.iter().any(scores);
    let beside = beside.then(|| "evaluations and checks included".to_string());
    [real, each]
        .into_iter()
        .chain(new)
        .chain(report.tokens.of_padding(figures))
        .chain(beside)
        .collect()
}

/// `label` and `parts` with commas between them, in lines of at most 80 columns.
pub(super) fn list(label: &str, parts: &[String]) -> String {
    let comma = |(index, part): (usize, &String)| {
        if index + 1 < parts.len() { format!("{part},") } else { part.clone() }
    };
    fill(label, label.chars().count(), parts.iter().enumerate().map(comma))
}

/// `first` and `words` in lines of at most 80 columns, all but the first line indented.
pub(super) fn fill(
    first: &str,
    indent: usize,
    words: impl IntoIterator<Item = impl AsRef<str>>,
) -> String {
    let mut lines = vec![first.to_string()];
    let mut fresh = true;
    for word in words {
        let word = word.as_ref();
        let space = if fresh { "" } else { " " };
        match lines.last_mut() {
            Some(line) if fresh || line.chars().count() + word.chars().count() < 80 => {
                *line += &format!("{space}{word}");
            }
            _ => lines.push(format!("{:indent$}{word}", "")),
        }
        fresh = false;
    }
    lines.join("\n")
}

/// What ran, each once.
pub(super) fn workloads(out: &mut impl Write, all: &[Workload]) -> Result<()> {
    let mut lines: Vec<(String, usize)> = vec![];
    for line in all.iter().map(describe) {
        match lines.iter_mut().find(|(seen, _)| *seen == line) {
            Some((_, times)) => *times += 1,
            None => lines.push((line, 1)),
        }
    }
    for (line, times) in lines {
        let times = (times > 1).then(|| format!("{times} times"));
        let parts: Vec<String> = line.split(", ").map(String::from).chain(times).collect();
        writeln!(out, "{}", list("workload  ", &parts))?;
    }
    Ok(())
}

/// A workload in one line.
pub fn describe(workload: &Workload) -> String {
    let lora = match workload.lora.rank {
        0 => String::new(),
        _ => format!(", LoRA rank {} on {}", workload.lora.ranks(), workload.lora.place()),
    };
    let what = match &workload.task {
        Task::Forward { sequences: Some(Ragged::Padded(lengths)), seq, .. } => {
            format!("forward, {} padded to {seq}", spread(lengths))
        }
        Task::Forward { sequences: Some(Ragged::Packed(lengths)), seq, .. } => {
            format!("forward, {} packed, {seq} tokens", spread(lengths))
        }
        Task::Forward { batch, seq, past, .. } => {
            format!("forward, batch {batch}, {seq} tokens after {past} cached")
        }
        Task::Generate {
            batch,
            past,
            prompt_tokens,
            prompts,
            new_tokens,
            then,
            prefill_chunk,
            kv_cache,
            sampling,
            max_new_tokens: _,
        } => {
            let prompt = match prompts {
                Some(Ragged::Packed(lengths)) => between(lengths),
                Some(Ragged::Padded(lengths)) => {
                    format!("{} padded to {prompt_tokens}", between(lengths))
                }
                None => prompt_tokens.to_string(),
            };
            let past = if *past > 0 { format!(" on {past} cached") } else { String::new() };
            let turn =
                |turn: &Turn| format!(", then {} after {}", turn.new_tokens, turn.prompt_tokens);
            let turns: String = then.iter().map(turn).collect();
            let chunk = prefill_chunk.map_or(String::new(), |n| format!(", in parts of {n}"));
            let cache = if *kv_cache { "KV cache" } else { "no KV cache" };
            let choice = match sampling.temperature {
                0.0 => "greedy".into(),
                t => format!("temperature {t}"),
            };
            format!(
                "generate {new_tokens} after {prompt}{past}{turns}, batch {batch}{chunk}, {cache}, {choice}"
            )
        }
        Task::Verify { batch, past, drafted, accepted, rounds } => format!(
            "verify {rounds} x {drafted} drafted tokens, {accepted} kept, batch {batch}, after {past} cached"
        ),
        Task::Train { batch, seq, accumulate, steps, full, recompute, clip, moments, rows } => {
            format!(
                "train {}, {steps} x {accumulate} micro-steps of batch {batch}, {}{}{}{}",
                if *full { "every weight" } else { "the adapters" },
                filled(*seq, rows),
                if *recompute { ", recomputed" } else { "" },
                if *clip { "" } else { ", unclipped" },
                match moments {
                    MomentDtype::F32 => "",
                    MomentDtype::BF16 => ", moments in bf16",
                },
            )
        }
        Task::Evaluate { batch, seq, passes, rows } => {
            format!("eval {passes} x batch {batch}, {}", filled(*seq, rows))
        }
    };
    let attention = match workload.attention {
        AttentionMode::Dense => "",
        AttentionMode::Blocked => ", blocked attention",
    };
    what + &lora + attention
}

/// Tokens of a row.
fn filled(seq: u64, rows: &Rows) -> String {
    match rows {
        Rows::Whole => format!("{seq} tokens"),
        Rows::Padded { lengths, .. } => {
            format!("rows of {} tokens, padded to the longest of a pass", between(lengths))
        }
        Rows::Packed { documents, .. } => format!("{} packed", spread(documents)),
    }
}

fn spread(lengths: &Lengths) -> String {
    format!("{} sequences of {} tokens", lengths.count(), between(lengths))
}

fn between(lengths: &Lengths) -> String {
    match lengths.range() {
        Some((shortest, longest)) if shortest < longest => format!("{shortest} to {longest}"),
        Some((length, _)) => length.to_string(),
        None => "no".into(),
    }
}

/// A time; without Unicode, `us` stands for microseconds.
pub(super) fn time(s: f64, unicode: bool) -> String {
    let text = seconds(s);
    if unicode { text } else { text.replace('µ', "u") }
}

fn speeds(
    out: &mut impl Write,
    report: &Report,
    generation: &GenerationReport,
    unicode: bool,
) -> Result<()> {
    let t = &generation.timings;
    let new: usize = generation.sequences.iter().map(|s| s.token_ids.len()).sum();
    let prompt: usize = generation.sequences.iter().map(|s| s.prompt_tokens).sum();
    let name = &report.prices.name;
    let load = time(t.load_s, unicode);
    writeln!(out, "\ntokens    {prompt} in, {new} out; weights loaded in {load}")?;
    writeln!(
        out,
        "prefill   {} tokens/s, first token after {}, {} ({name})",
        per_second(t.prefill_tokens_per_s),
        time(t.time_to_first_token_s, unicode),
        rate(t.prefill_flops_per_s)
    )?;
    if let (Some(tokens), Some(flops)) = (t.decode_tokens_per_s, t.decode_flops_per_s) {
        writeln!(out, "decode    {} tokens/s, {} ({name})", per_second(tokens), rate(flops))?;
    }
    if let Some(suggested) = generation.suggested.as_ref().filter(|s| !s.shown.is_empty()) {
        let taken = if suggested.taken { "taken" } else { "not taken: --sampling checkpoint" };
        let parts = [&suggested.shown[..], &[taken.into()]].concat();
        writeln!(out, "{}", list("suggested ", &parts))?;
    }
    if let Some(traffic) = generation.bytes_per_decoded_token {
        let [weights, cache, rest] =
            [traffic.weights, traffic.kv_cache, traffic.activations].map(|n| bytes(n as f64));
        let parts = [
            format!("{weights} weights"),
            format!("{cache} KV cache"),
            format!("{rest} activations, a decoded token"),
        ];
        writeln!(out, "{}", list("traffic   ", &parts))?;
    }
    Ok(())
}

/// The notebook's own table, with its names, order, digits and blanks.
fn notebook(rows: &[TableRow], unicode: bool) -> Table {
    let mut table = new_table(unicode);
    let kinds = ["additions", "multiplications", "divisions", "exponentiations", "square roots"];
    table.set_header([""].into_iter().chain(kinds).chain(["total"]));
    for row in rows {
        let filled = if row.blank_end { kinds.len() - 1 } else { kinds.len() + 1 };
        let figures = row.flops.iter().chain([&row.total]).take(filled).map(|n| three_digits(*n));
        table.add_row([row.name.clone()].into_iter().chain(figures));
    }
    align(&mut table, 1);
    table
}

/// Phases down: where there are too many to stand beside the components.
fn phases(report: &Report, figures: Figures, unicode: bool) -> Table {
    let mut table = new_table(unicode);
    table.set_header(["phase", "calls", "FLOPs", "share"]);
    for phase in phases_of(report) {
        let rows = || report.rows.iter().filter(|r| r.phase == phase);
        let flops: u128 = rows().map(|r| r.flops).sum();
        let share = 100.0 * flops as f64 / report.total_flops.max(1) as f64;
        let calls = figures.calls(rows().map(|r| r.calls).sum());
        table.add_row([phase.to_string(), calls, figures.count(flops), format!("{share:.2} %")]);
    }
    align(&mut table, 1);
    table
}

fn phases_of(report: &Report) -> Vec<Phase> {
    let mut phases: Vec<Phase> = report.rows.iter().map(|r| r.phase).collect();
    phases.dedup();
    phases
}

/// Most phases that stand beside the components.
const COLUMNS: usize = 4;

/// Components down, phases across where they fit.
fn components(report: &Report, figures: Figures, unicode: bool) -> Table {
    let mut phases = phases_of(report);
    if phases.len() > COLUMNS {
        phases.clear();
    }
    let mut parts: Vec<_> = report.rows.iter().map(|r| r.component).collect();
    parts.sort();
    parts.dedup();
    let timed = report.rows.iter().any(|r| r.seconds.is_some());
    // Formulas list no ops.
    let listed = report.rows.iter().any(|r| r.calls > 0);

    let mut table = new_table(unicode);
    let mut head = vec!["component".to_string()];
    head.extend(listed.then(|| "calls".to_string()));
    head.extend(phases.iter().map(|p| p.to_string()));
    head.extend(["FLOPs".into(), "share".into()]);
    head.extend(timed.then(|| "time".to_string()));
    table.set_header(head);
    let mut line = |name: String, of: &dyn Fn(&&super::Row) -> bool| {
        let rows = || report.rows.iter().filter(of);
        let flops: u128 = rows().map(|r| r.flops).sum();
        let mut cells = vec![name];
        cells.extend(listed.then(|| figures.calls(rows().map(|r| r.calls).sum())));
        cells.extend(phases.iter().map(|phase| {
            let of_phase = rows().filter(|r| r.phase == *phase).map(|r| r.flops).sum::<u128>();
            if of_phase == 0 { "-".into() } else { figures.count(of_phase) }
        }));
        let share = 100.0 * flops as f64 / report.total_flops.max(1) as f64;
        cells.extend([figures.count(flops), format!("{share:.2} %")]);
        if timed {
            cells.push(time(rows().filter_map(|r| r.seconds).sum(), unicode));
        }
        table.add_row(cells);
    };
    for part in parts {
        line(part.to_string(), &|r| r.component == part);
    }
    line("total".into(), &|_| true);
    align(&mut table, 1);
    table
}

fn totals(out: &mut impl Write, report: &Report, figures: Figures) -> Result<()> {
    let share = 100.0 * report.lora_flops as f64 / report.total_flops.max(1) as f64;
    let primitives: Vec<String> = report
        .primitives
        .named()
        .into_iter()
        .filter(|(_, n)| *n > 0)
        .map(|(name, n)| format!("{name} {}", figures.count(n)))
        .collect();
    // An audit's verdict says it.
    if report.audit.is_none() {
        let total = report.total_flops;
        writeln!(out, "total       {} FLOPs, {}", digits(total), Figures::Human.flop(total))?;
    }
    writeln!(out, "{}", list("primitives  ", &primitives))?;
    if report.lora_flops > 0 {
        writeln!(
            out,
            "LoRA        {}, {share:.4} % of the total",
            figures.flop(report.lora_flops)
        )?;
    }
    Ok(())
}

fn verdict(out: &mut impl Write, audit: &AuditReport, unicode: bool) -> Result<()> {
    let (yes, no) = if unicode { ("✔ ", "✘ ") } else { ("", "") };
    let keys = digits(audit.keys_compared as u128);
    if audit.balanced {
        let flops = digits(audit.executed_flops);
        writeln!(
            out,
            "\n{GOOD}{yes}the audit balances{GOOD:#}: closed form = predicted = executed = {flops} FLOPs"
        )?;
        writeln!(
            out,
            "{FAINT}{keys} distinct ops compared by phase, scope, dimensions, dtype and calls{FAINT:#}"
        )?;
        if let (Some(nodes), Some(launches)) = (audit.graph_nodes, audit.graph_launches) {
            writeln!(
                out,
                "{FAINT}CUDA lists {nodes} nodes of the recorded step: its {launches} launches{FAINT:#}"
            )?;
        }
        return Ok(());
    }
    writeln!(out, "\n{BAD}{no}the audit does not balance{BAD:#} ({keys} distinct ops compared)")?;
    for (name, flops) in [
        ("closed form", audit.closed_form_flops),
        ("predicted", audit.predicted_flops),
        ("executed", audit.executed_flops),
    ] {
        writeln!(out, "  {name:<12}{:>28} FLOPs", digits(flops))?;
    }
    if let Some(difference) = &audit.graph_difference {
        writeln!(out, "  CUDA's list of the recorded step differs: {difference}")?;
    }
    if audit.differences.is_empty() {
        return Ok(());
    }
    let mut table = new_table(unicode);
    table.set_header(["phase", "scope", "op", "calls predicted", "executed", "FLOPs apart"]);
    const SHOWN: usize = 40;
    for d in audit.differences.iter().take(SHOWN) {
        let sign = if d.executed_flops < d.predicted_flops { "-" } else { "+" };
        table.add_row([
            d.phase.to_string(),
            d.scope.clone(),
            d.op.clone(),
            digits(d.predicted_calls),
            digits(d.executed_calls),
            format!("{sign}{}", digits(d.executed_flops.abs_diff(d.predicted_flops))),
        ]);
    }
    align(&mut table, 3);
    writeln!(out, "{}", table.trim_fmt())?;
    if audit.differences.len() > SHOWN {
        writeln!(out, "… and {} more; --json lists all", audit.differences.len() - SHOWN)?;
    }
    Ok(())
}

pub(super) fn new_table(unicode: bool) -> Table {
    let line = if unicode { '─' } else { '-' };
    let mut table = Table::new();
    table.load_style(TableStyle::new().header_separator(LineStyle::new(line, line, line, ' ')));
    table
}

/// Names in the first columns to the left, figures to the right; two spaces between them.
pub(super) fn align(table: &mut Table, names: usize) {
    table.column_iter_mut().for_each(|column| {
        column.set_padding((1, 0));
    });
    for column in table.column_iter_mut().skip(names) {
        column.set_cell_alignment(CellAlignment::Right);
    }
}
