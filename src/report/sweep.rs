//! A sweep as a table and as CSV.

use std::io::{IsTerminal, Write};

use super::{
    figures::{Figures, bytes, digits, human, percent},
    table::{align, new_table},
};
use crate::{
    error::Result,
    sweep::{Point, Sweep, Swept},
};

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
    head.extend(["FLOPs", "FLOPs/token", "LoRA FLOPs", "LoRA share"].map(String::from));
    // Bytes go by the element type; FLOPs do not.
    let memory = sweep.keys.contains(&Swept::Dtype);
    head.extend(memory.then(|| "memory".to_string()));
    table.set_header(head);
    for point in points {
        let mut cells: Vec<String> = point.at.iter().map(|(_, value)| value.to_string()).collect();
        let share = point.lora_flops as f64 / point.total_flops.max(1) as f64;
        cells.push(style.count(point.total_flops));
        cells.push(human(point.flops_per_token));
        cells.push(style.count(point.lora_flops));
        cells.push(percent(share));
        cells.extend(memory.then(|| bytes(point.memory_bytes as f64)));
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
    head.extend([
        "total_flops",
        "tokens",
        "flops_per_token",
        "memory_bytes",
        "lora_flops",
        "matmul_macs",
    ]);
    head.extend(primitives.iter().map(|(name, _)| *name));
    write!(out, "{}\r\n", head.join(","))?;
    for point in &sweep.points {
        for (_, value) in &point.at {
            write!(out, "{value},")?;
        }
        let Point { total_flops, tokens, flops_per_token, memory_bytes, .. } = point;
        write!(out, "{total_flops},{tokens},{flops_per_token},{memory_bytes}")?;
        write!(out, ",{},{}", point.lora_flops, point.matmul_macs)?;
        for (_, n) in point.primitives.named() {
            write!(out, ",{n}")?;
        }
        write!(out, "\r\n")?;
    }
    Ok(())
}
