//! A sweep as a table and as CSV.

use std::io::{IsTerminal, Write};

use super::{
    figures::{Figures, digits, percent},
    table::{align, new_table},
};
use crate::{error::Result, sweep::Sweep};

/// Prints `sweep` to standard output.
///
/// # Errors
/// A closed pipe.
pub fn print_sweep(sweep: &Sweep, style: Figures) -> Result<()> {
    let unicode = std::io::stdout().is_terminal();
    let mut out = anstream::stdout().lock();
    let Sweep { model, kind, structure, prices, points, .. } = sweep;
    writeln!(out, "model     {model}")?;
    writeln!(out, "workload  {kind}, {} points", digits(points.len() as u128))?;
    writeln!(out, "counted   structure {structure}, prices {}", prices.name)?;
    let mut table = new_table(unicode);
    let mut head: Vec<String> = sweep.keys.iter().map(|key| key.to_string()).collect();
    head.extend(["FLOPs", "LoRA FLOPs", "LoRA share"].map(String::from));
    table.set_header(head);
    for point in points {
        let mut cells: Vec<String> = point.at.iter().map(|(_, value)| value.to_string()).collect();
        let share = point.lora_flops as f64 / point.total_flops.max(1) as f64;
        let counts = [point.total_flops, point.lora_flops].map(|flops| style.count(flops));
        cells.extend(counts);
        cells.push(percent(share));
        table.add_row(cells);
    }
    align(&mut table, 0);
    Ok(writeln!(out, "\n{}", table.trim_fmt())?)
}

/// Writes `sweep` as RFC 4180's CSV: a header, then a line a point, ended by CR LF. No field holds
/// a comma, a quote or a line end, so none is quoted.
///
/// # Errors
/// What `out` reports.
pub fn csv(out: &mut dyn Write, sweep: &Sweep) -> Result<()> {
    let primitives = sweep.points.first().map_or(vec![], |p| p.primitives.named().into());
    let mut head: Vec<&str> = sweep.keys.iter().map(|key| key.name()).collect();
    head.extend(["total_flops", "lora_flops", "matmul_macs"]);
    head.extend(primitives.iter().map(|(name, _)| *name));
    write!(out, "{}\r\n", head.join(","))?;
    for point in &sweep.points {
        for (_, value) in &point.at {
            write!(out, "{value},")?;
        }
        write!(out, "{},{},{}", point.total_flops, point.lora_flops, point.matmul_macs)?;
        for (_, n) in point.primitives.named() {
            write!(out, ",{n}")?;
        }
        write!(out, "\r\n")?;
    }
    Ok(())
}
