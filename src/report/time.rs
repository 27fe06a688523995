//! Hours, money, energy and legal amounts, for people.

use std::io::{IsTerminal, Write};

use serde::Serialize;

use super::{
    figures::{digits, human, percent, rate},
    table::{BAD, FAINT, align, fill, new_table},
};
use crate::{
    analytic::Structure,
    error::Result,
    hardware::{Gpu, Precision},
    rate::{Basis, Published, Rate, Time, Utilization},
    threshold::Thresholds,
    workload::Workload,
};

/// What a count takes at a rate.
#[derive(Debug, Clone, Serialize)]
pub struct TimeReport {
    /// The rate.
    pub rate: Rate,
    /// What it comes to.
    #[serde(flatten)]
    pub time: Time,
}

/// Four significant digits, three below 1; none of a fraction from 1000 on.
pub(super) fn amount(x: f64) -> String {
    match x {
        0.0 => "0".into(),
        // A float holds no more digits than these.
        x if x >= 1e15 => format!("{x:.3e}"),
        x if x >= 999.95 => digits(x.round() as u128),
        x if x >= 99.995 => format!("{x:.1}"),
        x if x >= 9.9995 => format!("{x:.2}"),
        x if x >= 0.09995 => format!("{x:.3}"),
        x if x >= 0.009995 => format!("{x:.4}"),
        x if x >= 0.001 => format!("{x:.5}"),
        x => format!("{x:.3e}"),
    }
}

/// A figure as it was given, to four decimals.
fn given(x: f64) -> String {
    let text = format!("{x:.4}");
    text.trim_end_matches('0').trim_end_matches('.').to_string()
}

/// Dollars, with cents up to a thousand; of less than ten cents, four digits.
pub(super) fn dollars(x: f64) -> String {
    match x {
        x if (999.995..1e15).contains(&x) => format!("${}", digits(x.round() as u128)),
        x if (0.1..1e15).contains(&x) => format!("${x:.2}"),
        x => format!("${}", amount(x)),
    }
}

/// Time, cost and energy of `time`, a line each, and which FLOPs were divided by which rate.
pub(super) fn time_lines(
    out: &mut impl Write,
    rate: &Rate,
    time: &Time,
    structure: Structure,
) -> Result<()> {
    let hours = [amount(time.hours), amount(time.gpu_hours)];
    let name = match &rate.basis {
        Basis::Datasheet { gpu, .. } => format!("{} x {gpu}", rate.gpus),
        Basis::Measured(bench) => bench.device.clone(),
    };
    writeln!(
        out,
        "time        {} hours on {name}, {} {}",
        hours[0],
        hours[1],
        rate.device_hours()
    )?;
    let why = divided(rate, time, structure);
    writeln!(out, "{FAINT}{}{FAINT:#}", fill("            ", 12, why.split(' ')))?;
    if let Basis::Datasheet { source, year, .. } = &rate.basis {
        let stated = stated(source, *year);
        writeln!(out, "{FAINT}{}{FAINT:#}", fill("            ", 12, stated.split(' ')))?;
    }
    let of = rate.device_hours().trim_end_matches("-hours");
    if let (Some(price), Some(cost)) = (rate.price_per_gpu_hour, time.dollars) {
        writeln!(out, "cost        {} at {} a {of}-hour", dollars(cost), dollars(price))?;
    }
    if let (Some(watts), Some(kwh)) = (rate.watts, time.kwh) {
        writeln!(out, "energy      {} kWh at {} W a {of}", amount(kwh), given(watts))?;
    }
    Ok(())
}

/// Who states a peak, and when.
fn stated(source: &str, year: u16) -> String {
    format!("peak: {source} ({year})")
}

/// A figure with so many decimals; below 1 with three digits, so that none is rounded away.
fn decimals(x: f64, decimals: usize) -> String {
    match x {
        x if x >= 1.0 || x == 0.0 => format!("{x:.decimals$}"),
        x if x >= 1e-4 => format!("{x:.*}", (2.0 - x.log10().floor()) as usize),
        x => format!("{x:.2e}"),
    }
}

/// Which FLOPs were divided by which rate.
pub(super) fn divided(rate: &Rate, time: &Time, structure: Structure) -> String {
    match &rate.basis {
        Basis::Datasheet { peak, peak_flops_per_s, utilization, of, .. } => {
            let flops = time.flops.map_or("its".into(), |flops| super::Figures::Human.flop(flops));
            let which = match of {
                Utilization::Mfu => "recomputed ones left out",
                Utilization::Hfu => "recomputed ones included",
            };
            format!(
                "{flops} of matrix products ({structure}, 2mnk, {which}) at {} % {} of {} x {} \
                 (dense {})",
                given(100.0 * utilization),
                of.name(),
                rate.gpus,
                super::rate(*peak_flops_per_s),
                peak.name(),
            )
        }
        Basis::Measured(bench) => {
            format!("the median of this very workload in {}", bench.file.display())
        }
    }
}

/// A training beside the amounts that laws name.
pub(super) fn threshold_lines(
    out: &mut impl Write,
    thresholds: &Thresholds,
    unicode: bool,
) -> Result<()> {
    let mut table = new_table(unicode);
    table.set_header(["threshold", "FLOP", "counted", "share", ""]);
    for line in &thresholds.lines {
        let name = format!("{}\n  {}", line.name, line.source);
        let [limit, flops] = [line.limit_flops, line.flops as f64].map(|n| format!("{n:.3e}"));
        let share = match line.share {
            share if share < 1e-6 => format!("{:.2e}", share),
            share => percent(share),
        };
        let passed = if line.passed { "passed" } else { "" };
        table.add_row([name, limit, flops, share, passed.into()]);
    }
    align(&mut table, 1);
    writeln!(out, "\n{}\n", table.trim_fmt())?;
    let note = "Counted is every operation of this training, each once, without recomputed \
                activations; thresholds are passed by more than them. Numbers are points of the \
                Commission's guidelines of 18 July 2025. Information, not legal advice: see \
                docs/thresholds.md.";
    Ok(writeln!(out, "{FAINT}{}{FAINT:#}", fill("", 0, note.split(' ')))?)
}

/// Prints what a speed comes to by each convention.
///
/// # Errors
/// A closed pipe.
pub fn print_mfu(
    origin: &str,
    workloads: &[Workload],
    published: &Published,
    style: super::Figures,
) -> Result<()> {
    let unicode = std::io::stdout().is_terminal();
    let out = &mut anstream::stdout().lock();
    let Published { tokens_per_s, tokens, step_s, peak, rows, uncounted } = published;
    let parameters = workloads.first().map_or(0, |workload| workload.model.parameters());
    writeln!(out, "model     {origin}, {} parameters", digits(parameters))?;
    super::table::workloads(out, workloads)?;
    let speed = format!(
        "speed     {} tokens/s, {} of",
        amount(*tokens_per_s),
        amount(tokens_per_s / peak.gpus as f64)
    );
    let each = format!("{} tokens in {}", digits(*tokens), super::seconds(*step_s));
    writeln!(out, "{speed} each GPU; {}", if unicode { each } else { each.replace('µ', "u") })?;
    let (name, stated) = (&peak.gpu, rate(peak.peak_flops_per_s));
    writeln!(out, "peak      {} x {name}, {stated} each (dense {})", peak.gpus, peak.peak.name())?;
    let source = format!("{} ({})", peak.source, peak.year);
    writeln!(out, "{FAINT}{}{FAINT:#}", fill("          ", 10, source.split(' ')))?;
    let mut table = new_table(unicode);
    table.set_header(["convention", "", "FLOPs/token", "TFLOP/s/GPU", "of peak", "of exact"]);
    for row in rows {
        let per_token = match style {
            super::Figures::Human => human(row.flops_per_token),
            super::Figures::Exact => digits(row.flops_per_token.round() as u128),
        };
        let utilization = format!("{} %", decimals(100.0 * row.utilization, 2));
        table.add_row([
            row.structure.to_string(),
            row.of.name().into(),
            per_token,
            decimals(row.flops_per_s_per_gpu / 1e12, 1),
            if row.utilization > 1.0 { format!("{BAD}{utilization}{BAD:#}") } else { utilization },
            format!("{:.1} %", 100.0 * row.of_exact),
        ]);
    }
    align(&mut table, 2);
    writeln!(out, "\n{}\n", table.trim_fmt())?;
    for why in uncounted {
        writeln!(out, "{FAINT}{why}{FAINT:#}")?;
    }
    Ok(())
}

/// Prints the listed devices, and who states their figures.
///
/// # Errors
/// A closed pipe.
pub fn print_gpus(gpus: &[Gpu]) -> Result<()> {
    let unicode = std::io::stdout().is_terminal();
    let out = &mut anstream::stdout().lock();
    writeln!(out, "dense TFLOP/s as stated, general cores in f32; GB and GB/s of memory; W\n")?;
    let mut table = new_table(unicode);
    let peaks = Precision::ALL.map(Precision::name);
    table.set_header(["--gpu"].into_iter().chain(peaks).chain(["GB", "GB/s", "W"]));
    let figure = |x: Option<f64>, unit: f64| {
        x.map_or("-".into(), |x| format!("{:.1}", x / unit).trim_end_matches(".0").to_string())
    };
    for gpu in gpus {
        let peaks = Precision::ALL.map(|precision| figure(gpu.peak(precision), 1e12));
        let rest = [
            figure(gpu.memory_bytes, 1e9),
            figure(Some(gpu.bytes_per_s), 1e9),
            figure(gpu.watts, 1.0),
        ];
        table.add_row([gpu.name.clone()].into_iter().chain(peaks).chain(rest));
    }
    align(&mut table, 1);
    writeln!(out, "{}\n", table.trim_fmt())?;
    let width = gpus.iter().map(|gpu| gpu.name.len()).max().unwrap_or(0);
    for gpu in gpus {
        let first = format!("{FAINT}{:<width$}  ", gpu.name);
        let words = format!("{}. {} ({})", gpu.product, gpu.source, gpu.year);
        let text = fill(&" ".repeat(width + 2), width + 2, words.split(' '));
        writeln!(out, "{first}{}{FAINT:#}", text.trim_start())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_for_people() {
        for (x, text) in [
            (12345.6, "12,346"),
            (999.96, "1,000"),
            (123.45, "123.5"),
            (12.345, "12.35"),
            (1.2345, "1.234"),
            (0.5, "0.500"),
            (0.0123, "0.0123"),
            (0.001068, "0.00107"),
            (1.2345e-5, "1.234e-5"),
        ] {
            assert_eq!(amount(x), text);
        }
        assert_eq!((dollars(51.357), dollars(12345.6)), ("$51.36".into(), "$12,346".into()));
        assert_eq!(dollars(0.0123), "$0.0123");
        for (x, text) in
            [(307.81, "307.8"), (0.5, "0.500"), (0.00123, "0.00123"), (2e-7, "2.00e-7")]
        {
            assert_eq!(decimals(x, 1), text);
        }
    }
}
