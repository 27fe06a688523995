//! Figures of a point: what ran, how fast, and how that stands to the ceiling.

use super::{Bound, Ceiling, Energy, Kind, Limits, Measured, Point, Seconds};
use crate::{
    error::{Error, Result},
    ledger::{Dtype, Phase},
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
    recomputed_flops: u128,
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
        let Measured { workload, samples, joules, clocks, .. } = measured;
        let (units, busy) = (samples.len() as f64, samples.iter().sum::<f64>());
        let seconds = Seconds::of(samples)?;
        let time = seconds.median;

        let peak = ceiling.flops_per_s(dtype).ok_or_else(|| {
            let why = format!("has no rate for {}; run `flopaudit ceiling` for it", dtype.name());
            Error::Ceiling(why)
        })?;
        let at_rest = bytes.at_rest() as f64;
        let cached = OUT_OF_CACHE * ceiling.device.cache_bytes.unwrap_or(0);
        let read_at = |rate: f64| (at_rest > cached as f64).then_some(at_rest / rate);
        let memory_s = read_at(ceiling.stream.bytes_per_s);
        let limits = Limits {
            compute_s: unit.flops as f64 / peak,
            memory_s,
            // On a GPU one launch runs several ops, and a recorded step is launched as a whole.
            dispatch_s: match ceiling.device.kind.starts_with("cuda") {
                true => 0.0,
                false => unit.ops as f64 * ceiling.dispatch_s,
            },
        };
        let (bound, longest) = limits.longest();
        let flops_per_s = unit.flops as f64 / time;
        let sheet = ceiling.datasheet.as_ref().and_then(|sheet| sheet.flops_per_s(dtype));
        let tokens_per_s = unit.tokens as f64 / time;
        let model_flops_per_s = (unit.flops - unit.recomputed_flops) as f64 / time;
        let recomputes = |share: f64| (unit.recomputed_flops > 0).then_some(share);
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
            recomputed_flops: unit.recomputed_flops,
            unit_flops: unit.unit_flops,
            flops_per_token: unit.flops as f64 / unit.tokens as f64,
            flops_per_s,
            mfu_measured: model_flops_per_s / peak,
            mfu_datasheet: sheet.map(|peak| model_flops_per_s / peak),
            hfu_measured: recomputes(limits.compute_s / time),
            hfu_datasheet: sheet.and_then(|peak| recomputes(flops_per_s / peak)),
            bytes,
            ops: unit.ops,
            bytes_per_s: at_rest / time,
            bandwidth_use: memory_s.map(|least| least / time),
            intensity: unit.flops as f64 / at_rest,
            predicted_s: read_at(ceiling.bytes_per_s(dtype)),
            limits,
            bound,
            roofline_share: longest / time,
            tokens_per_s_per_tflop: tokens_per_s / (peak / 1e12),
            energy: joules.filter(|joules| *joules > 0.0).map(|joules| Energy {
                joules: joules / units,
                tokens_per_joule: unit.tokens as f64 * units / joules,
                flop_per_joule: unit.flops as f64 * units / joules,
                watts: joules / busy,
            }),
            clocks,
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
        let share = self.hfu_measured.unwrap_or(self.mfu_measured);
        if share > 1.0 {
            return refuse(format!("measured {name} matmul ceiling"), share, &slow);
        }
        if let Some(share) = self.bandwidth_use.filter(|share| *share > 1.0) {
            return refuse("measured memory bandwidth".into(), share, &slow);
        }
        if self.roofline_share > 1.0 {
            let share = self.roofline_share;
            return refuse("speed that the measured dispatch allows".into(), share, &slow);
        }
        match (self.hfu_datasheet.or(self.mfu_datasheet), &ceiling.datasheet) {
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
            Task::Verify { batch, past, drafted, .. } => (batch, drafted + 1, past),
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
        let again = executed.sum(|phase, _| kind.counts(phase) && phase == Phase::Recompute)?;
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
            recomputed_flops: share(Prices::matmul().flops(&again)?)?,
            unit_flops: share(Prices::unit().flops(&cost)?)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        audit::Audit,
        bench::{Datasheet, DeviceInfo, MatmulRate, Peak, SCHEMA_VERSION, Stream},
        config::{LoraConfig, ModelConfig},
        ledger::{Key, Ledger, Module, Op, Scope},
        workload::{Rows, Sampling, Workload},
    };

    /// 20,000 FLOP/s, 25,000 bytes/s, a tenth of a second an op.
    fn ceiling() -> Ceiling {
        let samples = vec![1.0];
        let rate = MatmulRate { dtype: Dtype::F32, flops_per_s: 2e4, m: 1, k: 1, n: 1, samples };
        Ceiling {
            schema_version: SCHEMA_VERSION,
            command: "ceiling".into(),
            device: DeviceInfo {
                name: "abacus".into(),
                kind: "cpu".into(),
                driver: None,
                threads: Some(1),
                cache_bytes: Some(1000),
                build: "release".into(),
            },
            date: "2026-01-31T12:00:00Z".into(),
            matmul: vec![rate],
            stream: Stream { bytes_per_s: 25e3, buffer_bytes: 1, rates: vec![] },
            dispatch_s: 0.1,
            datasheet: None,
        }
    }

    /// Two decoding steps of a second each: a product of 100 columns and 50 rows, and an addition.
    fn measured() -> Measured {
        let mut ledger = Ledger::default();
        let mut add = |phase, module, op, calls| {
            let scope = Scope { layer: None, module };
            ledger.add(Key { phase, scope, op, dtype: Dtype::F32 }, calls, Default::default());
        };
        add(Phase::Setup, Module::RotaryEmb, Op::RopeTable { positions: 9, half: 4 }, 1);
        add(Phase::Decode, Module::LmHead, Op::Matmul { b: 1, m: 1, k: 100, n: 50 }, 2);
        add(Phase::Decode, Module::Residual, Op::Add { n: 10 }, 2);
        let task = Task::Generate {
            batch: 1,
            prompt_tokens: 7,
            new_tokens: 2,
            max_new_tokens: 2,
            kv_cache: true,
            sampling: Sampling::GREEDY,
            past: 0,
            prompts: None,
            then: vec![],
            prefill_chunk: None,
        };
        let model = ModelConfig::preset("tiny").unwrap();
        let audit = Audit::compare(ledger.tally().unwrap(), &ledger, &ledger).unwrap();
        let workload = Workload {
            model,
            lora: LoraConfig::none(),
            dtype: Dtype::F32,
            attention: Default::default(),
            task,
        };
        let samples = vec![1.0, 1.0];
        Measured { workload, samples, joules: Some(4.0), clocks: None, ledger, units: 2, audit }
    }

    fn point(ceiling: &Ceiling) -> Result<Point> {
        Point::new(Kind::Decode, measured(), ceiling)
    }

    #[test]
    fn figures_by_hand() {
        let point = point(&ceiling()).unwrap();
        // 2 · 1 · 100 · 50; in units, 100 muls and 99 adds for each of 50, and 10 adds.
        assert_eq!((point.flops, point.unit_flops), (10_000, 9960));
        assert_eq!((point.tokens, point.context, point.ops), (1, 7, 2));
        // 5000 weights; 100 + 50 beside them and 30 of the addition; of 4 bytes.
        let bytes = point.bytes;
        assert_eq!((bytes.weights, bytes.kv_cache, bytes.activations), (20_000, 0, 720));
        assert_eq!((point.flops_per_s, point.bytes_per_s), (1e4, 2e4));
        assert_eq!((point.mfu_measured, point.bandwidth_use), (0.5, Some(0.8)));
        assert_eq!(point.mfu_datasheet, None);
        assert_eq!(point.intensity, 0.5);
        assert_eq!(point.predicted_s, Some(0.8));
        let Limits { compute_s, memory_s, dispatch_s } = point.limits;
        assert_eq!((compute_s, memory_s, dispatch_s), (0.5, Some(0.8), 0.2));
        assert_eq!((point.bound, point.roofline_share), (Bound::Memory, 0.8));
        // One token a second, on 2·10⁻⁸ TFLOP/s.
        assert_eq!(point.tokens_per_s_per_tflop, 5e7);
        let energy = point.energy.unwrap();
        assert_eq!((energy.joules, energy.tokens_per_joule), (2.0, 0.5));
        assert_eq!((energy.flop_per_joule, energy.watts), (5000.0, 2.0));
    }

    /// Two training steps of a second each, whose layer runs again: what the model asks for is two
    /// products of three.
    #[test]
    fn what_is_recomputed_is_of_the_hardware_and_not_of_the_model() {
        let mut ledger = Ledger::default();
        let scope = Scope { layer: Some(0), module: Module::SelfAttn };
        for phase in [Phase::Forward, Phase::Recompute, Phase::BackwardX] {
            let op = Op::Matmul { b: 1, m: 1, k: 100, n: 20 };
            ledger.add(Key { phase, scope, op, dtype: Dtype::F32 }, 2, Default::default());
        }
        let (batch, seq, accumulate, steps) = (1, 7, 1, 2);
        let (full, recompute, clip) = (true, true, false);
        let task = Task::Train {
            batch,
            seq,
            accumulate,
            steps,
            full,
            recompute,
            clip,
            moments: Default::default(),
            rows: Rows::Whole,
        };
        let audit = Audit::compare(ledger.tally().unwrap(), &ledger, &ledger).unwrap();
        let Measured { workload, .. } = measured();
        let workload = Workload { task, ..workload };
        let measured = Measured { workload, ledger, audit, ..measured() };
        let point = Point::new(Kind::Train, measured, &ceiling()).unwrap();
        assert_eq!((point.flops, point.recomputed_flops), (12_000, 4000));
        assert_eq!((point.mfu_measured, point.hfu_measured), (0.4, Some(0.6)));
        assert_eq!(point.hfu_datasheet, None);
    }

    #[test]
    fn the_bound_is_the_largest_limit() {
        let slow_ops = Ceiling { dispatch_s: 0.45, ..ceiling() };
        let found = point(&slow_ops).unwrap();
        assert_eq!((found.bound, found.roofline_share), (Bound::Dispatch, 0.9));
        // Caches that hold a quarter of the weights: they may not come from memory.
        let mut cached = ceiling();
        cached.device.cache_bytes = Some(5000);
        let found = point(&cached).unwrap();
        assert_eq!((found.limits.memory_s, found.bandwidth_use), (None, None));
        assert_eq!((found.bound, found.roofline_share), (Bound::Compute, 0.5));
    }

    fn refused(ceiling: &Ceiling, parts: &[&str]) {
        let error = point(ceiling).unwrap_err();
        assert!(matches!(error.downcast_ref(), Some(Error::Ceiling(_))));
        for part in parts {
            assert!(error.to_string().contains(part), "{error} lacks {part}");
        }
    }

    #[test]
    fn nothing_is_faster_than_its_ceiling() {
        let mut low = ceiling();
        low.matmul[0].flops_per_s = 8e3;
        refused(&low, &["125.0 %", "f32 matmul ceiling", "2026-01-31", "flopaudit ceiling"]);
        let mut low = ceiling();
        low.stream.bytes_per_s = 1e4;
        refused(&low, &["200.0 %", "memory bandwidth"]);
        refused(&Ceiling { dispatch_s: 0.6, ..ceiling() }, &["120.0 %", "dispatch"]);
        let sheet = Datasheet {
            name: "Abacus 2".into(),
            source: "a leaflet".into(),
            peaks: vec![Peak { dtype: Dtype::F32, flops_per_s: 9e3 }],
            bytes_per_s: 1.0,
        };
        let wrong = Ceiling { datasheet: Some(sheet), ..ceiling() };
        refused(&wrong, &["111.1 %", "datasheet", "`Abacus 2` (a leaflet)"]);
        let mut other = ceiling();
        other.matmul[0].dtype = Dtype::BF16;
        refused(&other, &["no rate for f32"]);
    }

    #[test]
    fn units_that_differ_are_no_benchmark() {
        let mut three = measured();
        three.units = 3;
        assert!(Point::new(Kind::Decode, three, &ceiling()).is_err());
    }
}
