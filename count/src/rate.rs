//! FLOPs to time, money and energy: how long a workload takes at a rate that somebody states or
//! measured.
//!
//! MFU is the FLOPs of the model over what the hardware could do in the same time: matrix products at
//! 2·m·k·n, as peaks are stated, without what only saves memory by running again (Chowdhery et al.
//! 2022, *PaLM*, arXiv 2204.02311, appendix B; Korthikanti et al. 2022, arXiv 2205.05198, section
//! 5). HFU counts what is run again too. So
//!
//! ```text
//! time = FLOPs of matrix products (MFU: less recomputed ones) / (utilization × peak × GPUs)
//! ```
//!
//! whatever the count itself is priced with.

mod bench;
mod published;

use serde::{Deserialize, Serialize};

pub use bench::{Bench, SCHEMA_VERSION as BENCH_SCHEMA_VERSION};
pub use published::{CONVENTIONS, Peak, Published, Row, Speed};

use crate::{
    analytic::{self, Structure},
    error::{Error, Result},
    hardware::{Gpu, Precision},
    ledger::Phase,
    prices::Prices,
    tally::Tally,
    workload::{Task, Workload},
};

/// What flags or a plan file say of a rate; each may be missing.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RateSpec {
    /// A name of [`Gpu::named`].
    pub gpu: Option<String>,
    /// How many of them.
    pub gpus: Option<u64>,
    /// Model FLOPs utilization.
    pub mfu: Option<Share>,
    /// Hardware FLOPs utilization.
    pub hfu: Option<Share>,
    /// Of which peak.
    pub peak: Option<Precision>,
    /// A file of `bench --json FILE`.
    pub from_bench: Option<std::path::PathBuf>,
    /// Dollars for an hour of one GPU.
    pub price_per_gpu_hour: Option<Amount>,
    /// Watts that one GPU draws.
    pub watts: Option<Amount>,
}

/// Least share, and least amount: below it there is no device, and figures derived from it would
/// leave the range of numbers.
const LEAST: f64 = 1e-9;

/// Most of an amount, likewise.
const MOST: f64 = 1e15;

/// A part of a whole, from 1e-9 to 1.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "toml::Value")]
pub struct Share(pub f64);

/// A number from 1e-9 to 1e15.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "toml::Value")]
pub struct Amount(pub f64);

impl std::str::FromStr for Share {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("`{text}` is no share of a peak, 1e-9 to 1: write 0.42 or 42%");
        let (number, whole) = match text.trim().strip_suffix('%') {
            Some(number) => (number.trim_end(), 100.0),
            None => (text.trim(), 1.0),
        };
        let share = number.parse::<f64>().map_err(|_| bad())? / whole;
        if (LEAST..=1.0).contains(&share) { Ok(Self(share)) } else { Err(bad()) }
    }
}

impl std::str::FromStr for Amount {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.trim().parse::<f64>() {
            Ok(amount) if (LEAST..=MOST).contains(&amount) => Ok(Self(amount)),
            _ => Err(format!("`{text}` is not a number above 0 (1e-9 to 1e15)")),
        }
    }
}

/// A number, or a string that says one, as text.
fn written(value: toml::Value) -> Result<String, String> {
    match value {
        toml::Value::Integer(_) | toml::Value::Float(_) => Ok(value.to_string()),
        toml::Value::String(text) => Ok(text),
        toml::Value::Boolean(_)
        | toml::Value::Datetime(_)
        | toml::Value::Array(_)
        | toml::Value::Table(_) => Err(format!("is a {}, not a number", value.type_str())),
    }
}

impl TryFrom<toml::Value> for Share {
    type Error = String;

    fn try_from(value: toml::Value) -> Result<Self, String> {
        written(value)?.parse()
    }
}

impl TryFrom<toml::Value> for Amount {
    type Error = String;

    fn try_from(value: toml::Value) -> Result<Self, String> {
        written(value)?.parse()
    }
}

/// How fast work is done, and what an hour of it costs and draws.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Rate {
    /// Where the rate is from.
    #[serde(flatten)]
    pub basis: Basis,
    /// Devices that work at once.
    pub gpus: u64,
    /// Dollars for an hour of one device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub price_per_gpu_hour: Option<f64>,
    /// Watts that one device draws.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub watts: Option<f64>,
}

/// Where a rate is from.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Basis {
    /// A share of a stated peak.
    Datasheet {
        /// The device's name in the list.
        gpu: String,
        /// The document that states the peak.
        source: String,
        /// The document's year.
        year: u16,
        /// Element type of the peak.
        peak: Precision,
        /// FLOP/s of one device.
        peak_flops_per_s: f64,
        /// The share of it that is reached.
        utilization: f64,
        /// Which FLOPs the share is of.
        of: Utilization,
    },
    /// The seconds that this very workload took.
    Measured(Bench),
}

/// Which FLOPs a utilization is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Utilization {
    /// Those that the model asks for.
    Mfu,
    /// Those that the hardware works through, recomputed ones among them.
    Hfu,
}

impl Utilization {
    /// As it is written.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Mfu => "MFU",
            Self::Hfu => "HFU",
        }
    }
}

impl RateSpec {
    /// Its own, and `other`'s where it says nothing. A rate is taken whole from one of them: a
    /// benchmark here leaves no utilization from there, nor the reverse.
    pub fn or(self, other: Self) -> Self {
        let states = self.gpu.is_some() || self.mfu.is_some() || self.hfu.is_some();
        let measured = self.from_bench.is_some();
        let share = self.mfu.is_some() || self.hfu.is_some();
        Self {
            gpu: self.gpu.or(other.gpu.filter(|_| !measured)),
            gpus: self.gpus.or(other.gpus.filter(|_| !measured)),
            mfu: self.mfu.or(other.mfu.filter(|_| !measured && !share)),
            hfu: self.hfu.or(other.hfu.filter(|_| !measured && !share)),
            peak: self.peak.or(other.peak.filter(|_| !measured)),
            from_bench: self.from_bench.or(other.from_bench.filter(|_| !states)),
            price_per_gpu_hour: self.price_per_gpu_hour.or(other.price_per_gpu_hour),
            watts: self.watts.or(other.watts),
        }
    }

    /// Whether anything is said.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// The rate, in `default`'s precision where no peak is named; none where nothing is said.
    ///
    /// # Errors
    /// The flag at fault: one that lacks another, contradicts it, or names what is not listed.
    pub fn resolve(&self, default: Precision) -> Result<Option<Rate>> {
        if self.is_empty() {
            return Ok(None);
        }
        let fail = |flag: &str, why: &str| Err(Error::flag(flag, why).into());
        let gpus = self.gpus.unwrap_or(1);
        let basis = match (&self.from_bench, &self.gpu, self.mfu, self.hfu) {
            (Some(_), Some(_), _, _) => {
                return fail("--from-bench", "is a measured rate; --gpu states another");
            }
            (Some(_), None, Some(_), _) | (Some(_), None, None, Some(_)) => {
                return fail("--from-bench", "is a measured rate; --mfu and --hfu state another");
            }
            (Some(_), None, None, None) if self.peak.is_some() => {
                return fail("--peak", "needs --gpu: a measured rate is of no peak");
            }
            (Some(_), None, None, None) if gpus != 1 => {
                let why = "must be 1 with --from-bench: what was measured ran on one device";
                return fail("--gpus", why);
            }
            (Some(file), None, None, None) => Basis::Measured(Bench::read(file)?),
            (None, Some(_), Some(_), Some(_)) => {
                return fail("--hfu", "is given beside --mfu: choose one");
            }
            (None, Some(_), None, None) => {
                return fail(
                    "--gpu",
                    "needs --mfu or --hfu: the share of its peak that is reached",
                );
            }
            (None, Some(gpu), Some(Share(share)), None) => {
                self.datasheet(gpu, default, (share, Utilization::Mfu))?
            }
            (None, Some(gpu), None, Some(Share(share))) => {
                self.datasheet(gpu, default, (share, Utilization::Hfu))?
            }
            (None, None, _, _) => {
                let flag = self.first().unwrap_or("--gpu");
                let why = "needs a rate: --gpu with --mfu or --hfu, or --from-bench";
                return fail(flag, why);
            }
        };
        let [price_per_gpu_hour, watts] =
            [self.price_per_gpu_hour, self.watts].map(|amount| amount.map(|Amount(x)| x));
        if gpus == 0 {
            return fail("--gpus", "must be at least 1");
        }
        Ok(Some(Rate { basis, gpus, price_per_gpu_hour, watts }))
    }

    fn datasheet(
        &self,
        gpu: &str,
        default: Precision,
        (utilization, of): (f64, Utilization),
    ) -> Result<Basis> {
        let found = Gpu::named(gpu)?;
        let peak = self.peak.unwrap_or(default);
        let peak_flops_per_s = stated_peak(&found, peak)?;
        let Gpu { name: gpu, source, year, .. } = found;
        Ok(Basis::Datasheet { gpu, source, year, peak, peak_flops_per_s, utilization, of })
    }

    /// The first flag that is given, of those that need a rate.
    fn first(&self) -> Option<&'static str> {
        [
            (self.mfu.is_some(), "--mfu"),
            (self.hfu.is_some(), "--hfu"),
            (self.gpus.is_some(), "--gpus"),
            (self.peak.is_some(), "--peak"),
            (self.price_per_gpu_hour.is_some(), "--price-per-gpu-hour"),
            (self.watts.is_some(), "--watts"),
        ]
        .into_iter()
        .find_map(|(given, flag)| given.then_some(flag))
    }
}

/// `gpu`'s stated peak, in FLOP/s.
///
/// # Errors
/// An element type for which none is stated: the flag, and those that are.
pub fn stated_peak(gpu: &Gpu, peak: Precision) -> Result<f64> {
    gpu.peak(peak).ok_or_else(|| {
        let stated = Precision::ALL.into_iter().filter(|p| gpu.peak(*p).is_some());
        let stated: Vec<_> = stated.map(Precision::name).collect();
        let why = format!(
            "no {} figure is stated for {}; stated are {}",
            peak.name(),
            gpu.name,
            stated.join(", ")
        );
        Error::flag("--peak", why).into()
    })
}

/// FLOPs of matrix products at 2·m·k·n: what utilizations are of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Products {
    /// Those that the model asks for.
    pub model: u128,
    /// Those that run layers again for their gradients.
    pub recomputed: u128,
}

impl Products {
    /// Of `tally`.
    ///
    /// # Errors
    /// Sums past 128 bits.
    pub fn of(tally: &Tally) -> Result<Self> {
        let matmul = Prices::matmul();
        Ok(Self {
            model: matmul.flops(&tally.sum(|phase, _| phase != Phase::Recompute)?)?,
            recomputed: matmul.flops(&tally.sum(|phase, _| phase == Phase::Recompute)?)?,
        })
    }

    /// Those that `of` is of.
    ///
    /// # Errors
    /// A sum past 128 bits.
    pub fn counted(&self, of: Utilization) -> Result<u128> {
        match of {
            Utilization::Mfu => Ok(self.model),
            Utilization::Hfu => {
                let all = self.model.checked_add(self.recomputed);
                all.ok_or_else(|| Error::Overflow("the products".into()).into())
            }
        }
    }
}

/// What a workload takes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Time {
    /// FLOPs that were divided by the rate; none where the time itself was measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flops: Option<u128>,
    /// From start to end, all devices working.
    pub hours: f64,
    /// Hours × devices.
    pub gpu_hours: f64,
    /// Dollars, where an hour's price is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dollars: Option<f64>,
    /// Kilowatt-hours of the devices alone, where their draw is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kwh: Option<f64>,
}

impl Rate {
    /// FLOP/s of all devices together; none where seconds were measured.
    pub fn flops_per_s(&self) -> Option<f64> {
        match &self.basis {
            Basis::Datasheet { peak_flops_per_s, utilization, .. } => {
                Some(utilization * peak_flops_per_s * self.gpus as f64)
            }
            Basis::Measured(_) => None,
        }
    }

    /// What one device is called in sentences.
    pub fn device_hours(&self) -> &'static str {
        match &self.basis {
            Basis::Measured(bench) if !bench.is_gpu() => "device-hours",
            Basis::Datasheet { .. } | Basis::Measured(_) => "GPU-hours",
        }
    }

    /// What `times` runs of `workload` take, its products counted under `structure`.
    ///
    /// # Errors
    /// A workload that `structure` does not count, or that was not measured.
    pub fn time(&self, structure: Structure, workload: &Workload, times: u128) -> Result<Time> {
        let (flops, seconds) = match &self.basis {
            Basis::Datasheet { of, peak_flops_per_s, utilization, .. } => {
                let products = Products::of(&analytic::count(structure, workload)?)?;
                if *of == Utilization::Hfu && products.recomputed == 0 {
                    knows_recompute(structure, &workload.task)?;
                }
                let flops = products.counted(*of)?.checked_mul(times);
                let flops = flops.ok_or_else(|| Error::Overflow("all runs".into()))?;
                let rate = utilization * peak_flops_per_s * self.gpus as f64;
                (Some(flops), flops as f64 / rate)
            }
            Basis::Measured(bench) => (None, bench.seconds(workload)? * times as f64),
        };
        Ok(self.of_seconds(seconds, flops))
    }

    /// What `seconds` of all devices come to.
    fn of_seconds(&self, seconds: f64, flops: Option<u128>) -> Time {
        let hours = seconds / 3600.0;
        let gpu_hours = hours * self.gpus as f64;
        Time {
            flops,
            hours,
            gpu_hours,
            dollars: self.price_per_gpu_hour.map(|price| price * gpu_hours),
            kwh: self.watts.map(|watts| watts * gpu_hours / 1e3),
        }
    }

    /// What several times come to.
    pub fn sum(&self, times: impl IntoIterator<Item = Time>) -> Time {
        let (mut hours, mut flops) = (0.0, Some(0u128));
        for time in times {
            hours += time.hours;
            flops = flops.zip(time.flops).and_then(|(a, b)| a.checked_add(b));
        }
        self.of_seconds(hours * 3600.0, flops)
    }
}

/// Refuses recomputed layers of a structure that leaves them out.
fn knows_recompute(structure: Structure, task: &Task) -> Result<()> {
    let counts = match structure {
        Structure::Exact
        | Structure::Unpadded
        | Structure::ExactDense
        | Structure::Torch
        | Structure::TorchSdpa
        | Structure::TorchSdpaCpu => true,
        Structure::Notebook
        | Structure::SixNd
        | Structure::SixNdNoEmbedding
        | Structure::Palm
        | Structure::Megatron
        | Structure::MegatronCausal
        | Structure::HfTrainer
        | Structure::DeepSpeed
        | Structure::DeepSpeedSdpa
        | Structure::CalflopsSdpa
        | Structure::Ptflops
        | Structure::Torchtitan
        | Structure::MaxText
        | Structure::NemoLora
        | Structure::Vllm => false,
    };
    match task {
        Task::Train { recompute: true, .. } if !counts => {
            let why = format!("needs another --structure: {structure} counts nothing run again");
            Err(Error::flag("--hfu", why).into())
        }
        _ => Ok(()),
    }
}

/// Tokens that a generation chooses, or a verification keeps; 0 of what chooses none.
pub fn new_tokens(task: &Task) -> u128 {
    let wide = |n: u64| u128::from(n);
    match task {
        Task::Forward { .. } | Task::Train { .. } | Task::Evaluate { .. } => 0,
        Task::Verify { batch, accepted, rounds, .. } => {
            wide(*batch) * wide(*rounds) * (1 + wide(*accepted))
        }
        Task::Generate { batch, new_tokens, then, .. } => {
            let later: u128 = then.iter().map(|turn| wide(turn.new_tokens)).sum();
            wide(*batch) * (wide(*new_tokens) + later)
        }
    }
}

#[cfg(test)]
mod tests;
