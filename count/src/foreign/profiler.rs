//! What DeepSpeed's FlopsProfiler and calflops print.
//!
//! Sources: `print_model_profile` in deepspeed/profiling/flops_profiler/profiler.py, 0.19.8, and
//! `print_model_pipline` in calflops/calculate_pipline.py, 0.3.2: the FLOPs of one forward pass, two
//! decimals of K, M, G or T, trailing zeros left out, six digits at most. A training is three such
//! passes a micro-step, as both take it.

use super::{Fact, Stated, Told, only};
use crate::{
    analytic::Structure,
    prices::Prices,
    workload::{Task, Workload},
};

/// Which of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    DeepSpeed,
    Calflops,
}

impl Kind {
    /// What opens a profile.
    const fn title(self) -> &'static str {
        match self {
            Self::DeepSpeed => "- DeepSpeed Flops Profiler -",
            Self::Calflops => "- Calculate Flops Results -",
        }
    }

    /// What stands before the model's FLOPs.
    const fn label(self) -> &'static str {
        match self {
            Self::DeepSpeed => "fwd flops of model = fwd flops per GPU * mp_size:",
            Self::Calflops => "fwd FLOPs:",
        }
    }

    /// Fused attention first, which transformers takes where it is asked for none.
    const fn structures(self) -> &'static [Structure] {
        match self {
            Self::DeepSpeed => &[Structure::DeepSpeedSdpa, Structure::DeepSpeed],
            Self::Calflops => &[Structure::CalflopsSdpa, Structure::DeepSpeed],
        }
    }

    /// Whose output `text` is.
    pub(super) fn of(text: &str) -> Option<Self> {
        [Self::DeepSpeed, Self::Calflops].into_iter().find(|kind| text.contains(kind.title()))
    }
}

/// A forward pass.
#[derive(Debug)]
pub(super) struct Profile {
    pub(super) kind: Kind,
    stated: Stated,
    batch: Option<u64>,
}

impl Profile {
    pub(super) fn read(kind: Kind, text: &str) -> Result<Self, String> {
        let mut found = None;
        let mut batch = None;
        for (index, line) in text.lines().enumerate() {
            let line = line.trim();
            if let Some(value) = line.strip_prefix(kind.label()) {
                let bad = || format!("line {}: `{}` is no count of FLOPs", index + 1, value.trim());
                let stated = number(value).ok_or_else(bad)?;
                if found.is_some_and(|before| before != stated) {
                    return Err("holds profiles that differ; keep one".into());
                }
                found = Some(stated);
            } else if let Some(value) = line.strip_prefix("batch size per GPU:") {
                batch = value.trim().parse().ok();
            }
        }
        let lacks = || format!("lacks the line `{}`", kind.label());
        Ok(Self { kind, stated: found.ok_or_else(lacks)?, batch })
    }

    pub(super) fn told(&self, workload: &Workload) -> Result<Told, String> {
        if let Task::Train { rows, .. } | Task::Evaluate { rows, .. } = &workload.task
            && !rows.is_whole()
        {
            return Err("is of one pass; name rows of one length".into());
        }
        let (times, batch, note) = match workload.task {
            Task::Forward { batch, .. } => (1, batch, None),
            Task::Evaluate { batch, passes, .. } => {
                (passes.into(), batch, Some(format!("its forward pass × {passes} passes")))
            }
            Task::Train { batch, accumulate, steps, .. } => {
                let micro_steps = u128::from(accumulate) * u128::from(steps);
                let note = format!("its forward pass × 3 for training × {micro_steps} micro-steps");
                (micro_steps.saturating_mul(3), batch, Some(note))
            }
            Task::Generate { .. } | Task::Verify { .. } => {
                return Err(only("forward, train or eval"));
            }
        };
        let stated = self.stated.times(times).ok_or("does not fit 126 bits, so often run")?;
        Ok(Told {
            structures: self.kind.structures(),
            prices: Prices::unit(),
            stated: Some(stated),
            seconds: None,
            facts: self
                .batch
                .map(|size| Fact::new("sequences a batch", size, batch))
                .into_iter()
                .collect(),
            notes: note.into_iter().collect(),
        })
    }
}

/// `1.71 M`, `1.6 MFLOPS`, `12 `.
fn number(text: &str) -> Option<Stated> {
    let mut words = text.split_whitespace();
    let (digits, unit) = (words.next()?, words.next().unwrap_or(""));
    let power = match unit.strip_suffix("FLOPS").unwrap_or(unit) {
        "" => 0,
        "K" => 1,
        "M" => 2,
        "G" => 3,
        "T" => 4,
        _ => return None,
    };
    let whole = digits.split('.').next()?.len();
    let decimals = 6usize.saturating_sub(whole).min(2);
    Stated::printed(digits, 1000u128.pow(power), decimals).filter(|_| words.next().is_none())
}
