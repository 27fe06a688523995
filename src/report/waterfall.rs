//! A reconciliation for people: one signed line a cause, and the total after each.

use std::io::{IsTerminal, Write};

use super::{
    figures::{Figures, digits, signed},
    table::{FAINT, align, fill, new_table, workloads},
};
use crate::{
    analytic::Cause,
    error::Result,
    foreign::{Agreement, Tool},
    reconcile::{Reconciliation, Run, Total},
};

/// Prints `way` to standard output.
///
/// # Errors
/// A closed pipe.
pub fn print_way(way: &Reconciliation, style: Figures) -> Result<()> {
    let unicode = std::io::stdout().is_terminal();
    render_way(&mut anstream::stdout().lock(), way, style, unicode)
}

/// Writes `way`, with ANSI colour, to `out`.
///
/// # Errors
/// What `out` reports.
pub fn render_way(
    out: &mut impl Write,
    way: &Reconciliation,
    style: Figures,
    unicode: bool,
) -> Result<()> {
    writeln!(out, "model     {}", way.model)?;
    workloads(out, &way.workload)?;
    let mut table = new_table(unicode);
    table.set_header(["cause", "by", "FLOPs", "share", "total"]);
    table.add_row([name(&way.from), "from".into(), style.count(way.from.total_flops)]);
    for step in &way.steps {
        let share = step.share.map_or("-".into(), |share| format!("{:.2} %", 100.0 * share));
        let by = step.of.name().into();
        let total = style.signed(step.running_total);
        let total = total.trim_start_matches('+').to_string();
        table.add_row([step.cause.name(), by, style.signed(step.flops), share, total]);
    }
    table.add_row([name(&way.to), "to".into(), style.count(way.to.total_flops)]);
    align(&mut table, 2);
    writeln!(out, "\n{}\n", table.trim_fmt())?;
    let [from, to] = [&way.from, &way.to].map(|end| digits(end.total_flops));
    let difference = signed(way.difference_flops);
    writeln!(out, "difference  {to} - {from} = {difference} FLOPs{}", ratio(way))?;
    for end in [&way.from, &way.to] {
        if let Some(Run { file, total_flops, agrees }) = &end.run {
            let verdict = if *agrees { "agrees with" } else { "DIFFERS from" };
            let (spent, structure) = (digits(*total_flops), end.structure);
            writeln!(out, "run         {file}: {spent} FLOPs, which {verdict} {structure}")?;
        }
        if let Some(tool) = &end.tool {
            file(out, tool, end)?;
        }
    }
    if way.steps.iter().any(|step| !matches!(step.cause, Cause::Price(_))) {
        writeln!(out)?;
    }
    for step in way.steps.iter().filter(|step| !matches!(step.cause, Cause::Price(_))) {
        let name = format!("{}: ", step.cause.name());
        let text = fill(&name, 2, step.why.split(' '));
        writeln!(out, "{FAINT}{text}{FAINT:#}")?;
    }
    Ok(())
}

/// A tool's file: what it states, how that stands to what its structure counts, and its notes.
fn file(out: &mut impl Write, tool: &Tool, end: &Total) -> Result<()> {
    let mut lines = vec![format!("{}: {}", tool.file, tool.format), agreement(tool, end)];
    let rate = tool.flops_per_second.map(|rate| format!("{} of these", super::rate(rate)));
    lines.extend(rate);
    lines.extend(tool.notes.iter().cloned());
    for (index, line) in lines.iter().enumerate() {
        writeln!(out, "{:<12}{line}", if index == 0 { "file" } else { "" })?;
    }
    Ok(())
}

/// A tool's figure beside the count, in words.
pub(super) fn agreement(tool: &Tool, end: &Total) -> String {
    let counted = format!("{} counts {}", end.structure, digits(tool.counted_flops));
    let stated = digits(tool.stated_flops.unwrap_or_default());
    match (tool.agreement, tool.bounds_flops) {
        (Agreement::Exact, _) => format!("{stated} FLOPs, and {counted}: the same"),
        (Agreement::WithinRounding, Some([least, most])) => format!(
            "{stated} FLOPs as printed, {} to {} before rounding; {counted}: within them",
            digits(least),
            digits(most)
        ),
        (Agreement::WithinRounding | Agreement::Differs, _) => {
            format!("{stated} FLOPs, which DIFFERS: {counted}")
        }
        (Agreement::NoFigure, _) => format!("no FLOPs; {counted}"),
    }
}

fn name(end: &Total) -> String {
    if let Some(Tool { file, stated_flops: Some(_), .. }) = &end.tool {
        return file.clone();
    }
    format!("{} under {}", end.structure, end.prices.name)
}

/// One end's total over the other's.
fn ratio(way: &Reconciliation) -> String {
    let Total { structure: to, total_flops, .. } = &way.to;
    match total_flops {
        _ if way.from.structure == *to || way.from.tool.is_some() => String::new(),
        0 => String::new(),
        n => {
            let times = way.from.total_flops as f64 / *n as f64;
            format!("\nratio       {} counts {times:.6} times what {to} does", way.from.structure)
        }
    }
}
