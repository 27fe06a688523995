//! Figures of a point: what ran, how fast, and how that stands to the ceiling.

use super::{Bound, Ceiling, Energy, Kind, Limits, Measured, Point, Seconds};
use crate::{
    error::{Error, Result},
    ledger::Dtype,
    prices::Prices,
    workload::Task,
};

/// Bytes of weights and cache are thought to come from memory where they are so many times what
/// the chip's last cache holds.
const OUT_OF_CACHE: u64 = 4;

/// What one unit is made of.
struct Unit {
    batch: u64,
    seq: u64,
    context: u64,
    tokens: u64,
    ops: u64,
    flops: u128,
    unit_flops: u128,
}

impl Point {
    /// Figures of `measured` against `ceiling`.
    ///
    /// # Errors
    /// [`Error::Unbalanced`] where the countings differ; [`Error::Ceiling`] for a rate above the
    /// ceiling, or a ceiling without its element type.
    pub fn new(kind: Kind, measured: Measured, ceiling: &Ceiling) -> Result<Self> {
        measured.audit.verdict()?;
        let unit = Unit::of(kind, &measured)?;
        let dtype = measured.workload.dtype;
        let bytes = measured.ledger.traffic(|phase| kind.counts(phase)).per(measured.units);
        let Measured { workload, samples, joules, .. } = measured;
        let units = samples.len() as f64;
        let seconds = Seconds::of(samples)?;
        let time = seconds.median;

        let peak = ceiling.flops_per_s(dtype).ok_or_else(|| {
            let why = format!("has no rate for {}; run `flopaudit ceiling` for it", dtype.name());
            Error::Ceiling(why)
        })?;
        let at_rest = bytes.at_rest() as f64;
        let cached = OUT_OF_CACHE * ceiling.device.cache_bytes.unwrap_or(0);
        let memory_s = (at_rest > cached as f64).then_some(at_rest / ceiling.stream.bytes_per_s);
        let limits = Limits {
            compute_s: unit.flops as f64 / peak,
            memory_s,
            dispatch_s: unit.ops as f64 * ceiling.dispatch_s,
        };
        let (bound, longest) = limits.longest();
        let flops_per_s = unit.flops as f64 / time;
        let sheet = ceiling.datasheet.as_ref().and_then(|sheet| sheet.flops_per_s(dtype));
        let tokens_per_s = unit.tokens as f64 / time;
        let point = Self {
            workload,
            batch: unit.batch,
            seq: unit.seq,
            context: unit.context,
            tokens: unit.tokens,
            tokens_per_s,
            time_to_first_token_s: (kind == Kind::Prefill).then_some(time),
            time_per_token_s: (kind == Kind::Decode).then_some(time),
            flops: unit.flops,
            unit_flops: unit.unit_flops,
            flops_per_token: unit.flops as f64 / unit.tokens as f64,
            flops_per_s,
            mfu_measured: limits.compute_s / time,
            mfu_datasheet: sheet.map(|peak| flops_per_s / peak),
            bytes,
            ops: unit.ops,
            bytes_per_s: at_rest / time,
            bandwidth_use: memory_s.map(|least| least / time),
            intensity: unit.flops as f64 / at_rest,
            limits,
            bound,
            roofline_share: longest / time,
            tokens_per_s_per_tflop: tokens_per_s / (peak / 1e12),
            energy: joules.filter(|joules| *joules > 0.0).map(|joules| Energy {
                joules: joules / units,
                tokens_per_joule: unit.tokens as f64 * units / joules,
                flop_per_joule: unit.flops as f64 * units / joules,
            }),
            seconds,
            balanced: true,
        };
        point.plausible(dtype, ceiling)?;
        Ok(point)
    }

    /// Refuses what no device can have done.
    fn plausible(&self, dtype: Dtype, ceiling: &Ceiling) -> Result<()> {
        let (measured, name) = (&ceiling.date, dtype.name());
        let again = "run `flopaudit ceiling` with nothing beside it, then this again";
        let slow = format!(
            "it was measured on {measured} while the machine was busy, or clocked lower; {again}"
        );
        let refuse = |what: String, share: f64, why: &str| {
            let percent = 100.0 * share;
            Err(Error::Ceiling(format!("{percent:.1} % of the {what} cannot be: {why}")).into())
        };
        if self.mfu_measured > 1.0 {
            return refuse(format!("measured {name} matmul ceiling"), self.mfu_measured, &slow);
        }
        if let Some(share) = self.bandwidth_use.filter(|share| *share > 1.0) {
            return refuse("measured memory bandwidth".into(), share, &slow);
        }
        if self.roofline_share > 1.0 {
            let share = self.roofline_share;
            return refuse("speed that the measured dispatch allows".into(), share, &slow);
        }
        match (self.mfu_datasheet, &ceiling.datasheet) {
            (Some(share), Some(sheet)) if share > 1.0 => {
                let why = format!(
                    "the entry `{}` ({}) is not of this device, or clocked lower",
                    sheet.name, sheet.source
                );
                refuse(format!("datasheet's {name} peak"), share, &why)
            }
            (_, _) => Ok(()),
        }
    }
}

impl Limits {
    /// The largest of the three, and its seconds.
    fn longest(&self) -> (Bound, f64) {
        let all = [
            (Bound::Compute, self.compute_s),
            (Bound::Memory, self.memory_s.unwrap_or(0.0)),
            (Bound::Dispatch, self.dispatch_s),
        ];
        all.into_iter().fold(all[0], |most, one| if one.1 > most.1 { one } else { most })
    }
}

impl Unit {
    /// A unit's share of everything that ran: all units are alike.
    fn of(kind: Kind, measured: &Measured) -> Result<Self> {
        let (batch, seq, context) = match measured.workload.task {
            Task::Forward { batch, seq, past, .. } => (batch, seq, past),
            Task::Generate { batch, prompt_tokens, .. } if kind == Kind::Decode => {
                (batch, 1, prompt_tokens)
            }
            Task::Generate { batch, prompt_tokens, .. } => (batch, prompt_tokens, 0),
            Task::Train { batch, seq, .. } | Task::Evaluate { batch, seq, .. } => (batch, seq, 0),
        };
        let executed = &measured.audit.executed;
        let of_unit = executed.iter().filter(|(phase, ..)| kind.counts(*phase));
        let calls: u128 = of_unit.map(|(_, _, sum)| sum.calls).sum();
        let cost = executed.sum(|phase, _| kind.counts(phase))?;
        let share = |total: u128| {
            let units = u128::from(measured.units);
            anyhow::ensure!(total.is_multiple_of(units), "units of one benchmark differ");
            Ok(total / units)
        };
        Ok(Self {
            batch,
            seq,
            context,
            tokens: batch * seq,
            ops: u64::try_from(share(calls)?)?,
            flops: share(Prices::matmul().flops(&cost)?)?,
            unit_flops: share(Prices::unit().flops(&cost)?)?,
        })
    }
}
