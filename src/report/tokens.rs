//! What passes fed: tokens that are real, padding, and what padding cost.

use serde::{Deserialize, Serialize};

use super::figures::{Figures, digits, percent};
use crate::{
    analytic::{self, Structure},
    error::Result,
    prices::Prices,
    workload::Workload,
};

/// What passes fed, and what of it counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokensReport {
    /// Tokens whose prediction a loss counts, where that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scored: Option<u128>,
    /// Rows that the layers were fed, padding among them.
    pub fed: u128,
    /// Tokens that are no padding.
    pub real: u128,
    /// Padding.
    pub padding: u128,
    /// FLOPs of the count that padding takes; absent of a formula, which takes it for tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub padding_flops: Option<u128>,
}

impl TokensReport {
    /// Of workloads, each so many times, as `structure` counts them.
    ///
    /// # Errors
    /// A count past 128 bits.
    pub fn new<'a>(
        workloads: impl IntoIterator<Item = (&'a Workload, u64)>,
        structure: Structure,
        prices: &Prices,
    ) -> Result<Self> {
        let counts = [Structure::Exact, Structure::Unpadded, Structure::ExactDense];
        let counts = counts.contains(&structure);
        let (mut fed, mut real, mut flops) = (0u128, 0u128, 0u128);
        for (workload, times) in workloads {
            let (tokens, times) = (workload.task.tokens(), u128::from(times));
            fed = fed.saturating_add(tokens.fed.saturating_mul(times));
            real = real.saturating_add(tokens.real.saturating_mul(times));
            if counts && tokens.fed > tokens.real {
                let padding = padding_flops(workload, structure, prices)?;
                flops = flops.saturating_add(padding.saturating_mul(times));
            }
        }
        let padding_flops = counts.then_some(flops);
        Ok(Self { scored: None, fed, real, padding: fed - real, padding_flops })
    }

    /// The account for people: of tokens, and of what padding cost.
    pub(super) fn parts(&self, figures: Figures) -> Vec<String> {
        let scored = self.scored.map(|scored| format!("{} scored", digits(scored)));
        scored
            .into_iter()
            .chain([format!("{} real", digits(self.real))])
            .chain(self.of_padding(figures))
            .collect()
    }

    /// How much is padding and what it cost, where there is any.
    pub(super) fn of_padding(&self, figures: Figures) -> Option<String> {
        let share = percent(self.padding as f64 / self.fed as f64);
        let cost = self.padding_flops.map_or(String::new(), |n| format!(", {}", figures.flop(n)));
        let padding = digits(self.padding);
        (self.padding > 0).then(|| format!("{padding} of padding ({share} of all){cost}"))
    }
}

/// What the padding of `workload` costs: what it costs more than the same sequences without it.
fn padding_flops(workload: &Workload, structure: Structure, prices: &Prices) -> Result<u128> {
    let dense = workload.dense();
    let workload = if structure == Structure::ExactDense { &dense } else { workload };
    let total = |structure| prices.flops(&analytic::count(structure, workload)?.sum(|_, _| true)?);
    Ok(total(structure)? - total(Structure::Unpadded)?)
}
