//! `flopaudit ceiling`: what this device can do at most, measured and kept.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use candle_core::Device;
use indicatif::ProgressBar;

use super::{
    args::{OutputArgs, set_threads, warn},
    device,
    interrupt::Interrupt,
    memory,
};
use crate::{
    bench::{Ceiling, DeviceInfo, Probe},
    error::{Error, Result},
    ledger::Dtype,
    report,
};

/// Flags of `ceiling`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// cpu, cuda[:N] or metal
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Element types [default: f32 and bf16, on cuda f16 too]
    #[arg(long, value_enum, value_name = "LIST", value_delimiter = ',')]
    dtype: Vec<Dtype>,
    /// CPU threads [default: all cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Repetitions of each size, of which the fastest counts
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..))]
    repetitions: u16,
    #[command(flatten)]
    output: OutputArgs,
}

/// Measures, keeps, prints.
pub fn run(args: Args) -> Result<()> {
    set_threads(args.threads);
    let output = args.output.open()?;
    let opened = device::open(&args.device)?;
    let interrupt = Interrupt::listen()?;
    let info = DeviceInfo::of(&opened, &args.device);
    let dtypes = if args.dtype.is_empty() { defaults(&args.device) } else { args.dtype };
    let before = Ceiling::kept(&info);
    let ceiling = measure(&opened, info, &dtypes, args.repetitions.into(), &interrupt)?;
    before.iter().for_each(|before| warn_of_a_fall(before, &ceiling));
    let kept = keep(&ceiling);
    output.write_with(&ceiling, || {
        report::print_ceiling(&ceiling)?;
        match kept {
            Some(file) => report::print_line(&format!("kept      {}", file.display())),
            None => Ok(()),
        }
    })
}

/// The ceiling in `file`; else the one kept of this device; else a new one, kept for later.
///
/// # Errors
/// A file that is of another device, or lacks one of `dtypes`.
pub fn obtain(
    file: Option<&Path>,
    (opened, device): (&Device, &str),
    dtypes: &[Dtype],
    interrupt: &Interrupt,
) -> Result<Ceiling> {
    let info = DeviceInfo::of(opened, device);
    if let Some(file) = file {
        let ceiling = Ceiling::read(file)?;
        let bad = |why: String| Err(Error::File { file: file.into(), why }.into());
        // Another driver is worth a try; all else makes another ceiling.
        let comparable = DeviceInfo { driver: info.driver.clone(), ..ceiling.device.clone() };
        if comparable != info {
            let [theirs, ours] = [&ceiling.device, &info].map(report::device_line);
            return bad(format!("is of {theirs}; this is {ours}"));
        }
        return match dtypes.iter().find(|&&dtype| ceiling.flops_per_s(dtype).is_none()) {
            Some(dtype) => bad(format!("has no rate for {}", dtype.name())),
            None => Ok(ceiling),
        };
    }
    let kept = Ceiling::kept(&info);
    if let Some(kept) = kept.as_ref().filter(|kept| kept.covers(dtypes)) {
        warn_of_noise(kept);
        return Ok(kept.clone());
    }
    let known = kept.map_or_else(Vec::new, |kept| kept.matmul.iter().map(|r| r.dtype).collect());
    let mut all = [defaults(device), known, dtypes.to_vec()].concat();
    all.sort();
    all.dedup();
    let ceiling = measure(opened, info, &all, 10, interrupt)?;
    keep(&ceiling);
    Ok(ceiling)
}

/// Keeps it where that is possible; what was measured counts all the same.
fn keep(ceiling: &Ceiling) -> Option<PathBuf> {
    ceiling.keep().unwrap_or_else(|error| {
        warn(&format!("the ceiling cannot be kept: {error:#}"));
        None
    })
}

fn defaults(device: &str) -> Vec<Dtype> {
    match device {
        cuda if cuda.starts_with("cuda") => vec![Dtype::F32, Dtype::F16, Dtype::BF16],
        _ => vec![Dtype::F32, Dtype::BF16],
    }
}

/// `ceiling` with the streams of `dtypes` read anew: what memory a shared host lends changes from
/// minute to minute, and decoding is held against it.
///
/// # Errors
/// As [`Probe::measure`].
pub fn read_anew(
    mut ceiling: Ceiling,
    device: &Device,
    dtypes: &[Dtype],
    interrupt: &Interrupt,
) -> Result<Ceiling> {
    probe(device, 3, interrupt, |probe| probe.read_anew(&mut ceiling, dtypes))?;
    Ok(ceiling)
}

fn measure(
    device: &Device,
    info: DeviceInfo,
    dtypes: &[Dtype],
    repetitions: usize,
    interrupt: &Interrupt,
) -> Result<Ceiling> {
    let ceiling = probe(device, repetitions, interrupt, |probe| probe.measure(info, dtypes))?;
    warn_of_noise(&ceiling);
    Ok(ceiling)
}

/// What `work` measures, behind a spinner.
fn probe<T>(
    device: &Device,
    repetitions: usize,
    interrupt: &Interrupt,
    work: impl FnOnce(Probe) -> Result<T>,
) -> Result<T> {
    let spinner = ProgressBar::new_spinner();
    spinner.enable_steady_tick(Duration::from_millis(100));
    let tick = |what: &str| {
        if !what.is_empty() {
            spinner.set_message(format!("measuring the ceiling: {what}"));
        }
        interrupt.check()
    };
    let free = memory::free(device);
    let done = work(Probe { device, repetitions, free, tick: &tick });
    spinner.finish_and_clear();
    done
}

/// Repetitions that differ by more say that something else ran.
const BUSY: f64 = 0.15;

fn warn_of_noise(ceiling: &Ceiling) {
    let spread = ceiling.spread();
    if spread > BUSY {
        warn(&format!(
            "repetitions of the ceiling differ by {:.0} %: the machine was busy and can do more; \
             run `flopaudit ceiling` again with nothing beside it",
            100.0 * spread
        ));
    }
}

/// What was once reached can be reached again: much less says that something else ran throughout.
fn warn_of_a_fall(before: &Ceiling, now: &Ceiling) {
    let rates = now.matmul.iter().filter_map(|rate| {
        Some((rate.dtype.name(), rate.flops_per_s / before.flops_per_s(rate.dtype)?))
    });
    let stream = ("the stream", now.stream.bytes_per_s / before.stream.bytes_per_s);
    for (what, share) in rates.chain([stream]).filter(|(_, share)| *share < 1.0 - BUSY) {
        warn(&format!(
            "{what} reached {:.0} % of what it did on {}: is the machine busy?",
            100.0 * share,
            before.date
        ));
    }
}
