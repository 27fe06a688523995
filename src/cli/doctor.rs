//! `flopaudit doctor`: what a run would find on this machine, without running anything.

use std::{
    env,
    io::{IsTerminal, Write},
    path::{Path, PathBuf},
};

use anstyle::{AnsiColor, Style};
use candle_core::Device;
use serde::Serialize;

use super::{args::OutputArgs, device, memory};
use crate::{
    bench::{Ceiling, DeviceInfo},
    config::{Ignored, ModelConfig},
    error::{Error, Result},
    ledger::Dtype,
    report::bytes,
    weights::{self, Checkpoint},
};

/// Version of the JSON; raised when a field changes its meaning.
const SCHEMA_VERSION: u32 = 1;

/// Flags of `doctor`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Exits with 1 if something is missing that a run without flags needs.")]
pub struct Args {
    #[command(flatten)]
    output: OutputArgs,
}

/// All that was found.
#[derive(Debug, Serialize)]
struct Diagnosis {
    schema_version: u32,
    version: &'static str,
    features: Vec<&'static str>,
    cpu: DeviceInfo,
    threads: usize,
    instruction_sets: Vec<&'static str>,
    memory_free_bytes: Option<u128>,
    gpus: Vec<device::Gpu>,
    hub_cache: Option<PathBuf>,
    ceiling_cache: Option<PathBuf>,
    /// What a run without `--model` takes; absent where there is nothing to take.
    default_model: Option<String>,
    /// What of its files is not used, with the reasons.
    ignored: Vec<Ignored>,
    /// Whether nothing is missing.
    ready: bool,
    findings: Vec<Finding>,
}

/// One thing looked at.
#[derive(Debug, Serialize)]
struct Finding {
    subject: &'static str,
    status: Status,
    found: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    Ok,
    /// Runs, but slower or with less than there could be.
    Warning,
    /// A run without flags needs it.
    Missing,
}

impl Status {
    /// For people: the word, in its colour.
    const fn shown(self) -> (&'static str, Style) {
        match self {
            Self::Ok => ("ok", AnsiColor::Green.on_default()),
            Self::Warning => ("warning", AnsiColor::Yellow.on_default().bold()),
            Self::Missing => ("missing", AnsiColor::Red.on_default().bold()),
        }
    }
}

impl Finding {
    fn ok(subject: &'static str, found: impl Into<String>) -> Self {
        Self { subject, status: Status::Ok, found: found.into(), hint: None }
    }

    fn warning(subject: &'static str, found: impl Into<String>, hint: impl Into<String>) -> Self {
        let (found, hint) = (found.into(), Some(hint.into()));
        Self { subject, status: Status::Warning, found, hint }
    }

    fn missing(subject: &'static str, found: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { status: Status::Missing, ..Self::warning(subject, found, hint) }
    }
}

/// Looks, prints; missing weights are an error after that.
pub fn run(args: &Args) -> Result<()> {
    let output = args.output.open()?;
    let diagnosis = Diagnosis::new()?;
    output.write_with(&diagnosis, || print(&diagnosis))?;
    let missing = diagnosis.findings.iter().find(|f| f.status == Status::Missing);
    missing.map_or(Ok(()), |f| Err(Error::Missing(format!("{}, {}", f.subject, f.found)).into()))
}

impl Diagnosis {
    fn new() -> Result<Self> {
        let features = features();
        let threads = rayon::current_num_threads();
        let device = DeviceInfo::of(&Device::Cpu, "cpu");
        let instruction_sets = instruction_sets();
        let memory_free_bytes = memory::available();
        let gpus = device::gpus();
        let hub_cache = weights::hub_cache();
        let (default, weights) = weights_findings();
        let (default_model, ignored) = default.map(|c| (c.origin, c.ignored)).unzip();
        let ignored = ignored.unwrap_or_default();
        let mut findings = vec![
            build(&features),
            cpu(&device.name, threads, &instruction_sets),
            free(memory_free_bytes)?,
            gpu(&gpus),
        ];
        findings.extend(weights);
        findings.extend(ignored_finding(&ignored));
        findings.extend([cache(hub_cache.as_deref()), ceiling(&device)]);
        findings.extend(environment());
        Ok(Self {
            schema_version: SCHEMA_VERSION,
            version: env!("CARGO_PKG_VERSION"),
            features,
            cpu: device,
            threads,
            instruction_sets,
            memory_free_bytes,
            gpus: gpus.unwrap_or_default(),
            hub_cache,
            ceiling_cache: Ceiling::cache(),
            default_model,
            ignored,
            ready: findings.iter().all(|f| f.status != Status::Missing),
            findings,
        })
    }
}

fn features() -> Vec<&'static str> {
    let all = [
        ("hub", cfg!(feature = "hub")),
        ("cuda", cfg!(feature = "cuda")),
        ("cudnn", cfg!(feature = "cudnn")),
        ("nccl", cfg!(feature = "nccl")),
        ("metal", cfg!(feature = "metal")),
        ("mkl", cfg!(feature = "mkl")),
        ("accelerate", cfg!(feature = "accelerate")),
    ];
    all.into_iter().filter_map(|(name, built)| built.then_some(name)).collect()
}

/// Those that the CPU kernels are made for.
fn instruction_sets() -> Vec<&'static str> {
    #[cfg(target_arch = "x86_64")]
    let all = [
        ("avx2", is_x86_feature_detected!("avx2")),
        ("fma", is_x86_feature_detected!("fma")),
        ("avx512f", is_x86_feature_detected!("avx512f")),
    ];
    #[cfg(target_arch = "aarch64")]
    let all = [("neon", true)];
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let all: [(&str, bool); 0] = [];
    all.into_iter().filter_map(|(name, has)| has.then_some(name)).collect()
}

fn build(features: &[&str]) -> Finding {
    let features = match features {
        [] => "no features".into(),
        some => format!("features {}", some.join(", ")),
    };
    let version = env!("CARGO_PKG_VERSION");
    match cfg!(debug_assertions) {
        false => Finding::ok("build", format!("{version}, optimised; {features}")),
        true => Finding::warning(
            "build",
            format!("{version}, a debug build; {features}"),
            "it is slow: build with --release",
        ),
    }
}

fn cpu(name: &str, threads: usize, sets: &[&str]) -> Finding {
    let plural = if threads == 1 { "" } else { "s" };
    let sets_found = named(sets, "no vector instructions known");
    let found = format!("{threads} thread{plural}, {name}; {sets_found}");
    let fast = !cfg!(target_arch = "x86_64") || ["avx2", "fma"].iter().all(|s| sets.contains(s));
    match fast {
        true => Finding::ok("cpu", found),
        false => Finding::warning("cpu", found, "without avx2 and fma, products are slow"),
    }
}

fn named(list: &[&str], none: &str) -> String {
    if list.is_empty() { none.into() } else { list.join(", ") }
}

/// Memory, against what the default model's weights take.
fn free(free: Option<u128>) -> Result<Finding> {
    let needed = ModelConfig::preset("qwen2.5-0.5b")?.parameters() * u128::from(Dtype::F32.bytes());
    let needs = format!("the default model's weights take {} in f32", bytes(needed as f64));
    Ok(match free {
        None => Finding::ok("memory", "the system does not tell what is free"),
        Some(free) if free < needed => {
            let found = format!("{} free; {needs}", bytes(free as f64));
            Finding::warning("memory", found, "--dtype bf16 takes half, a smaller model less")
        }
        Some(free) => Finding::ok("memory", format!("{} free; {needs}", bytes(free as f64))),
    })
}

fn gpu(found: &Result<Vec<device::Gpu>, String>) -> Finding {
    let driver = nvidia_driver();
    let version = driver.as_deref().map_or(String::new(), |v| format!(", driver {v}"));
    match found {
        Ok(gpus) if !gpus.is_empty() => {
            let one = |gpu: &device::Gpu| {
                let (free, all) = (bytes(gpu.free_bytes as f64), bytes(gpu.memory_bytes as f64));
                format!("{} {}, {free} free of {all}", gpu.device, gpu.name)
            };
            let all: Vec<String> = gpus.iter().map(one).collect();
            Finding::ok("gpu", format!("{}{version}", all.join("; ")))
        }
        Err(why) => Finding::warning("gpu", why, "runs on the CPU; see nvidia-smi"),
        Ok(_) if driver.is_some() && !cfg!(feature = "cuda") => Finding::warning(
            "gpu",
            format!("an NVIDIA GPU{version}, which this build cannot use"),
            "build with --features cuda, or scripts/build-cuda.sh",
        ),
        Ok(_) => Finding::ok("gpu", "none that this build can use; runs on the CPU"),
    }
}

/// The version of the NVIDIA driver that Linux runs.
fn nvidia_driver() -> Option<String> {
    let text = std::fs::read_to_string("/proc/driver/nvidia/version").ok()?;
    let version =
        |word: &&str| word.contains('.') && word.starts_with(|c: char| c.is_ascii_digit());
    text.lines().next()?.split_whitespace().find(version).map(String::from)
}

/// The checkpoint that a run without `--model` takes: its files are there and fit its config; and
/// how it would choose tokens.
fn weights_findings() -> (Option<Checkpoint>, Vec<Finding>) {
    if !weights::default_is_local() {
        let later = if cfg!(feature = "hub") { "; a run asks the hub" } else { "" };
        let found = format!("no ./weights, {} not cached{later}", weights::DEFAULT_MODEL);
        let hint = "scripts/fetch-weights.sh; or --model DIR, FILE.gguf or synthetic";
        return (None, vec![Finding::missing("weights", found, hint)]);
    }
    match weights::open(None) {
        Ok(checkpoint) => {
            let found = format!("{}; a run without --model takes them", checkpoint.origin);
            let sampling = sampling(&checkpoint);
            (Some(checkpoint), vec![Finding::ok("weights", found), sampling])
        }
        Err(e) => {
            let hint = "fetch it anew (scripts/fetch-weights.sh), or name another with --model";
            (None, vec![Finding::missing("weights", format!("{e:#}"), hint)])
        }
    }
}

/// How the checkpoint suggests to choose tokens, and whether that can be done.
fn sampling(checkpoint: &Checkpoint) -> Finding {
    const SUBJECT: &str = "sampling";
    let Some(suggested) = checkpoint.text.suggested() else {
        return Finding::ok(SUBJECT, "the checkpoint suggests none");
    };
    let values = match suggested.shown() {
        none if none.is_empty() => "nothing but tokens that end a text".into(),
        values => values.join(", "),
    };
    let found = format!("the checkpoint suggests {values}");
    match suggested.sampling() {
        Ok(_) => Finding::ok(SUBJECT, format!("{found}; --sampling checkpoint takes it")),
        Err(why) => {
            Finding::warning(SUBJECT, found, format!("--sampling checkpoint refuses: {why:#}"))
        }
    }
}

/// What of the default model's files is not used; none where all is.
fn ignored_finding(ignored: &[Ignored]) -> Option<Finding> {
    if ignored.is_empty() {
        return None;
    }
    let keys: Vec<&str> = ignored.iter().map(|entry| entry.key.as_str()).collect();
    let found = format!("{} (--json gives the reasons)", keys.join(", "));
    Some(Finding::ok("ignored", found))
}

fn cache(dir: Option<&Path>) -> Finding {
    let Some(dir) = dir else { return Finding::ok("hub cache", "this build asks no hub") };
    let models = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let models = models.filter(|e| e.file_name().to_string_lossy().starts_with("models--")).count();
    let plural = if models == 1 { "" } else { "s" };
    Finding::ok("hub cache", format!("{}, {models} model{plural}", dir.display()))
}

/// The CPU's ceilings, where `ceiling` measured them before.
fn ceiling(device: &DeviceInfo) -> Finding {
    let dir = Ceiling::cache().map_or("no cache directory".into(), |dir| dir.display().to_string());
    match Ceiling::kept(device) {
        Some(kept) => Finding::ok("ceilings", format!("{dir}, cpu measured {}", kept.date)),
        None => Finding::ok("ceilings", format!("{dir}, none of this cpu: `bench` measures them")),
    }
}

/// Variables that change what a run does.
fn environment() -> Vec<Finding> {
    const SHOWN: [&str; 6] = [
        "HF_HOME",
        "HF_HUB_CACHE",
        "HF_ENDPOINT",
        "HF_HUB_OFFLINE",
        "NO_COLOR",
        "CUDA_VISIBLE_DEVICES",
    ];
    let shown = SHOWN.into_iter().map(|name| match env::var_os(name) {
        None => Finding::ok(name, "not set"),
        Some(value) => Finding::ok(name, without_password(&value.to_string_lossy())),
    });
    let token = match env::var_os("HF_TOKEN") {
        Some(value) if !value.is_empty() => "set; its value is not shown",
        _ => "not set",
    };
    shown.chain([Finding::ok("HF_TOKEN", token), threads()]).collect()
}

/// An address without the user and password that it may carry.
fn without_password(value: &str) -> String {
    match (value.split_once("://"), value.rsplit_once('@')) {
        (Some((scheme, _)), Some((_, host))) => format!("{scheme}://…@{host}"),
        _ => value.into(),
    }
}

fn threads() -> Finding {
    const NAME: &str = "RAYON_NUM_THREADS";
    match env::var(NAME) {
        Err(_) => Finding::ok(NAME, "not set"),
        Ok(n) if n.parse::<usize>().is_ok() => Finding::ok(NAME, n),
        Ok(other) => Finding::warning(NAME, format!("`{other}` is no number"), "it is ignored"),
    }
}

fn print(diagnosis: &Diagnosis) -> Result<()> {
    let unicode = std::io::stdout().is_terminal();
    let faint = Style::new().dimmed();
    let arrow = if unicode { "→" } else { "->" };
    let mut out = anstream::stdout().lock();
    let widest = diagnosis.findings.iter().map(|f| f.subject.len()).max().unwrap_or(0);
    for Finding { subject, status, found, hint } in &diagnosis.findings {
        let (word, style) = status.shown();
        writeln!(out, "{style}{word:<7}{style:#}  {subject:<widest$}  {found}")?;
        if let Some(hint) = hint {
            writeln!(out, "{:<9}{:<widest$}  {faint}{arrow} {hint}{faint:#}", "", "")?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_shows_no_password() {
        assert_eq!(without_password("https://me:secret@mirror.org/x"), "https://…@mirror.org/x");
        assert_eq!(without_password("https://mirror.org"), "https://mirror.org");
        assert_eq!(without_password("/data/hf"), "/data/hf");
    }

    #[test]
    fn slow_cpus_and_small_memories_are_warned_of() {
        assert_eq!(free(Some(1 << 20)).unwrap().status, Status::Warning);
        assert_eq!(free(Some(1 << 40)).unwrap().status, Status::Ok);
        let slow = if cfg!(target_arch = "x86_64") { Status::Warning } else { Status::Ok };
        assert_eq!(cpu("A CPU", 2, &["fma"]).status, slow);
        assert_eq!(cpu("A CPU", 2, &["avx2", "fma"]).status, Status::Ok);
        assert_eq!(gpu(&Err("no driver".into())).status, Status::Warning);
    }
}
