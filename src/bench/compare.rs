//! What changed between two benchmarks, beyond the noise.

use rand::{Rng, SeedableRng, rngs::StdRng};
use serde::{Deserialize, Serialize};

use super::{
    BenchReport, Point, SCHEMA_VERSION,
    point::{Kind, quantile},
};
use crate::{
    error::{Error, Result},
    workload::Workload,
};

/// Draws of the bootstrap.
const DRAWS: usize = 2000;

/// Fewest samples on either side that a change is judged from.
const FEWEST: usize = 3;

/// Two benchmarks, point by point.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// `bench compare`.
    pub command: String,
    /// What both measured.
    pub kind: Kind,
    /// Changes of less than this share are noise, whatever the samples say.
    pub noise: f64,
    /// Points of both, in the order of the second.
    pub changes: Vec<Change>,
    /// Workloads of the first alone.
    pub only_before: Vec<Workload>,
    /// Workloads of the second alone.
    pub only_after: Vec<Workload>,
}

/// One workload, before and after.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Change {
    /// What ran.
    pub workload: Workload,
    /// Median seconds before.
    pub before_s: f64,
    /// And after.
    pub after_s: f64,
    /// After over before: below 1 is faster.
    pub ratio: f64,
    /// Where 95 of 100 such ratios lie, by a percentile bootstrap of both medians.
    pub interval: (f64, f64),
    /// What that means.
    pub verdict: Verdict,
}

/// Whether a change is one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Beyond the noise.
    Faster,
    /// Beyond the noise.
    Slower,
    /// The interval holds 1, or the change is below the noise asked for.
    Same,
    /// Fewer than three samples on one side.
    Unknown,
}

impl Verdict {
    /// As tables say it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Faster => "faster",
            Self::Slower => "slower",
            Self::Same => "same",
            Self::Unknown => "too few samples",
        }
    }
}

impl Comparison {
    /// Compares `after` with `before`, whose points are matched by their whole workload.
    ///
    /// # Errors
    /// Benchmarks of different kinds, or without a workload in common.
    pub fn new(before: &BenchReport, after: &BenchReport, noise: f64) -> Result<Self> {
        if before.kind != after.kind {
            let why = format!("one is of {}, the other of {}", before.kind, after.kind);
            return Err(Error::Usage(why).into());
        }
        let of = |points: &'_ [Point], workload: &Workload| {
            points.iter().position(|point| point.workload == *workload)
        };
        if !after.points.iter().any(|point| of(&before.points, &point.workload).is_some()) {
            return Err(Error::Usage("no workload is in both results".into()).into());
        }
        let changes = after.points.iter().filter_map(|point| {
            let earlier = &before.points[of(&before.points, &point.workload)?];
            Some(Change::new(earlier, point, noise))
        });
        let alone = |these: &[Point], others: &[Point]| {
            let workloads = these.iter().map(|point| &point.workload);
            workloads.filter(|w| of(others, w).is_none()).cloned().collect()
        };
        Ok(Self {
            schema_version: SCHEMA_VERSION,
            command: "bench compare".into(),
            kind: after.kind,
            noise,
            changes: changes.collect(),
            only_before: alone(&before.points, &after.points),
            only_after: alone(&after.points, &before.points),
        })
    }
}

impl Change {
    fn new(before: &Point, after: &Point, noise: f64) -> Self {
        let ratio = after.seconds.median / before.seconds.median;
        let (b, a) = (&before.seconds.samples, &after.seconds.samples);
        let interval = bootstrap(b, a);
        let verdict = match interval {
            _ if b.len() < FEWEST || a.len() < FEWEST => Verdict::Unknown,
            (_, high) if high < 1.0 && ratio < 1.0 - noise => Verdict::Faster,
            (low, _) if low > 1.0 && ratio > 1.0 + noise => Verdict::Slower,
            (_, _) => Verdict::Same,
        };
        Self {
            workload: after.workload.clone(),
            before_s: before.seconds.median,
            after_s: after.seconds.median,
            ratio,
            interval,
            verdict,
        }
    }
}

/// Where 95 of 100 ratios of medians lie, of samples drawn anew, with replacement, from either
/// side's. The draws are the same in every run.
fn bootstrap(before: &[f64], after: &[f64]) -> (f64, f64) {
    let mut rng = StdRng::seed_from_u64(0);
    let mut median = |samples: &[f64]| {
        let mut drawn: Vec<f64> =
            samples.iter().map(|_| samples[rng.random_range(0..samples.len())]).collect();
        drawn.sort_by(f64::total_cmp);
        quantile(&drawn, 0.5)
    };
    let mut ratios: Vec<f64> = (0..DRAWS).map(|_| median(after) / median(before)).collect();
    ratios.sort_by(f64::total_cmp);
    (quantile(&ratios, 0.025), quantile(&ratios, 0.975))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_is_as_wide_as_the_samples() {
        let steady = [1.0, 1.01, 0.99, 1.0, 1.02, 0.98, 1.0];
        let half = steady.map(|s| s / 2.0);
        let (low, high) = bootstrap(&steady, &half);
        assert!(low > 0.48 && high < 0.53 && low < 0.5 + 1e-9 && high > 0.5 - 1e-9);
        let noisy = [0.5, 1.6, 0.9, 1.0, 1.4, 0.7, 1.1];
        let (low, high) = bootstrap(&noisy, &noisy);
        assert!(low < 0.8 && high > 1.2, "{low} {high}");
        assert_eq!(bootstrap(&[1.0], &[2.0]), (2.0, 2.0));
    }
}
