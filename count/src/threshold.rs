//! Training compute beside the amounts that laws and guidelines name. Information, not legal advice.
//!
//! Sources: Regulation (EU) 2024/1689 (AI Act), Article 51(2); European Commission, *Guidelines on the
//! scope of the obligations for general-purpose AI models*, C(2025) 5045 final, 18 July 2025, points
//! (17), (63), (64) and Annex A. The text adopted on 19 November 2025, C(2025) 7719 final, has the
//! latter two as (60) and (61).

use serde::Serialize;

use crate::{
    error::{Error, Result},
    ledger::Phase,
    prices::Prices,
    tally::Tally,
};

/// Whose amounts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
#[serde(rename_all = "lowercase")]
pub enum Regime {
    /// The European Union's AI Act and the Commission's guidelines on it.
    Eu,
}

/// Above it, a model is indicated to be a general-purpose AI model: point (17).
const GENERAL_PURPOSE: u128 = 10u128.pow(23);
/// Above it, a model is presumed to have high-impact capabilities: Article 51(2).
const SYSTEMIC_RISK: u128 = 10u128.pow(25);

/// A training beside every amount of a regime.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Thresholds {
    /// Whose amounts.
    pub regime: Regime,
    /// Operations of the training, each counted once, without what runs again to save memory.
    pub flops: u128,
    /// Training compute of the model that was trained further, where it is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base_flops: Option<u128>,
    /// One amount each.
    pub lines: Vec<Line>,
}

/// One amount and what is held against it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Line {
    /// What passing it means.
    pub name: &'static str,
    /// Where it is stated.
    pub source: &'static str,
    /// The amount.
    pub limit_flops: f64,
    /// What is held against it.
    pub flops: u128,
    /// One over the other, 1 being the amount itself.
    pub share: f64,
    /// Whether it is greater, as all of them are worded.
    pub passed: bool,
}

impl Line {
    /// `flops` against `limit` / `parts`.
    fn new(
        name: &'static str,
        source: &'static str,
        flops: u128,
        limit: u128,
        parts: u128,
    ) -> Self {
        let limit_flops = limit as f64 / parts as f64;
        let passed = flops.checked_mul(parts).is_none_or(|flops| flops > limit);
        Self { name, source, limit_flops, flops, share: flops as f64 / limit_flops, passed }
    }
}

impl Thresholds {
    /// Of a training whose operations are `tally`, of a model that `base_flops` trained.
    ///
    /// Every operation counts once, whatever its kind or precision (Annex A.2), so the prices are
    /// [`Prices::unit`]; activations that are computed again to save memory need not be included
    /// (Annex A.1).
    ///
    /// # Errors
    /// A sum past 128 bits.
    pub fn new(regime: Regime, tally: &Tally, base_flops: Option<u128>) -> Result<Self> {
        let flops = Prices::unit().flops(&tally.sum(|phase, _| phase != Phase::Recompute)?)?;
        let lines = match regime {
            Regime::Eu => eu(flops, base_flops)?,
        };
        Ok(Self { regime, flops, base_flops, lines })
    }
}

fn eu(flops: u128, base: Option<u128>) -> Result<Vec<Line>> {
    let general = "general-purpose AI model";
    let mut lines = vec![
        Line::new(general, "guidelines (17)", flops, GENERAL_PURPOSE, 1),
        Line::new("systemic risk", "AI Act, Article 51(2)", flops, SYSTEMIC_RISK, 1),
    ];
    match base {
        Some(base) => {
            let sum = flops.checked_add(base);
            let sum = sum.ok_or_else(|| Error::Overflow("this training and the base's".into()))?;
            let (article, point) = ("AI Act, Article 51(2); Annex A.1", "guidelines (63)");
            lines.extend([
                Line::new("systemic risk, with the base's compute", article, sum, SYSTEMIC_RISK, 1),
                Line::new("modifier: a third of the base's compute", point, flops, base, 3),
            ]);
        }
        None => {
            let unknown = "guidelines (64), base unknown";
            let risky = "guidelines (64), of systemic risk";
            lines.extend([
                Line::new("modifier: a third of 10^23", unknown, flops, GENERAL_PURPOSE, 3),
                Line::new("modifier: a third of 10^25", risky, flops, SYSTEMIC_RISK, 3),
            ]);
        }
    }
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        analytic::{Structure, count},
        config::{LoraConfig, ModelConfig},
        ledger::Dtype,
        workload::{Rows, Task, Workload},
    };

    #[test]
    fn amounts_are_passed_when_they_are_exceeded() {
        let of = |flops, base| eu(flops, base).unwrap();
        let lines = of(10u128.pow(23), None);
        let passed: Vec<_> = lines.iter().map(|line| line.passed).collect();
        assert_eq!(passed, [false, false, true, false]);
        assert_eq!((lines[0].share, lines[2].share), (1.0, 3.0));
        assert!((lines[1].share - 0.01).abs() < 1e-15);
        assert!(of(10u128.pow(23) + 1, None)[0].passed);
        // A third of 3e24 is 1e24, of which 1e24 is not more.
        let base = 3 * 10u128.pow(24);
        let lines = of(10u128.pow(24), Some(base));
        assert_eq!((lines[3].limit_flops, lines[3].share, lines[3].passed), (1e24, 1.0, false));
        assert_eq!((lines[2].flops, lines[2].passed), (4 * 10u128.pow(24), false));
        assert!(of(10u128.pow(24) + 1, Some(base))[3].passed);
        assert!(of(7 * 10u128.pow(24) + 1, Some(base))[2].passed);
        assert!(eu(1, Some(u128::MAX)).is_err());
    }

    #[test]
    fn what_runs_again_is_not_counted_and_nothing_has_another_price() {
        let model = ModelConfig::preset("tiny").unwrap();
        let n = model.parameters();
        let flops = |structure, recompute| {
            let (batch, seq, accumulate, steps) = (2, 5, 1, 3);
            let (full, clip, rows) = (true, true, Rows::Whole);
            let task = Task::Train {
                batch,
                seq,
                accumulate,
                steps,
                full,
                recompute,
                clip,
                moments: Default::default(),
                rows,
            };
            let (model, lora) = (model.clone(), LoraConfig::none());
            let workload =
                Workload { model, lora, dtype: Dtype::F32, attention: Default::default(), task };
            let tally = count(structure, &workload).unwrap();
            Thresholds::new(Regime::Eu, &tally, None).unwrap().flops
        };
        assert_eq!(flops(Structure::Exact, true), flops(Structure::Exact, false));
        // 6ND: N parameters, 30 tokens.
        assert_eq!(flops(Structure::SixNd, true), 6 * n * 30);
    }
}
