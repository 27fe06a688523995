//! Sums by phase and component: what tables show and what closed forms state.

use std::{collections::BTreeMap, fmt};

use crate::{
    config::Projection,
    error::{Error, Result},
    ledger::{Ledger, Module, Phase},
    prices::Cost,
};

/// A kind of module, over all layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Component {
    /// Token embedding: copies.
    Embedding,
    /// Cosine and sine tables.
    RotaryTables,
    /// RMSNorm around attention and the MLP, of queries and keys, and after the last layer.
    Norm,
    /// A base projection with its bias.
    Proj(Projection),
    /// The adapter beside a projection.
    Lora(Projection),
    /// RoPE, scaling, cache, scores, mask, softmax, weighted values.
    Attention,
    /// Activation and gate of the MLP: a gated linear unit.
    Glu,
    /// Residual additions.
    Residual,
    /// Output head.
    LmHead,
    /// Token choice.
    Sampling,
    /// Cross-entropy.
    Loss,
    /// What an optimizer step does over all parameters at once.
    Optimizer,
    /// All parameters at once, in formulas that count by their number.
    Parameters,
}

impl fmt::Display for Component {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Embedding => f.pad("embedding"),
            Self::RotaryTables => f.pad("rotary tables"),
            Self::Norm => f.pad("norms"),
            Self::Proj(p) => f.pad(p.name()),
            Self::Lora(p) => f.pad(&format!("{p} LoRA")),
            Self::Attention => f.pad("attention"),
            Self::Glu => f.pad("GLU"),
            Self::Residual => f.pad("residuals"),
            Self::LmHead => f.pad("lm_head"),
            Self::Sampling => f.pad("sampling"),
            Self::Loss => f.pad("loss"),
            Self::Optimizer => f.pad("optimizer"),
            Self::Parameters => f.pad("parameters"),
        }
    }
}

impl serde::Serialize for Component {
    fn serialize<S: serde::Serializer>(&self, s: S) -> std::result::Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl From<Module> for Component {
    fn from(module: Module) -> Self {
        match module {
            Module::EmbedTokens => Self::Embedding,
            Module::RotaryEmb => Self::RotaryTables,
            Module::InputLayernorm
            | Module::QNorm
            | Module::KNorm
            | Module::PostAttentionLayernorm
            | Module::PreFeedforwardLayernorm
            | Module::PostFeedforwardLayernorm
            | Module::Norm => Self::Norm,
            Module::Proj(p) => Self::Proj(p),
            Module::Lora(p, _) => Self::Lora(p),
            Module::SelfAttn => Self::Attention,
            Module::Residual => Self::Residual,
            Module::Mlp => Self::Glu,
            Module::LmHead => Self::LmHead,
            Module::Sampler => Self::Sampling,
            Module::Loss => Self::Loss,
            Module::Optimizer => Self::Optimizer,
        }
    }
}

/// Calls and cost of one component in one phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sum {
    /// Executed ops; 0 in formulas, which list none.
    pub calls: u128,
    /// What they are made of.
    pub cost: Cost,
}

/// Sums by phase and component.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Tally(BTreeMap<(Phase, Component), Sum>);

impl Tally {
    /// Adds to a row.
    ///
    /// # Errors
    /// A sum past 128 bits.
    pub fn add(&mut self, phase: Phase, component: Component, sum: Sum) -> Result<()> {
        let row = self.0.entry((phase, component)).or_default();
        let overflow = || Error::Overflow(component.to_string());
        row.calls = row.calls.checked_add(sum.calls).ok_or_else(overflow)?;
        row.cost = row.cost.checked_add(sum.cost).ok_or_else(overflow)?;
        Ok(())
    }

    /// Adds every row of `other`.
    ///
    /// # Errors
    /// A sum past 128 bits.
    pub fn extend(&mut self, other: Self) -> Result<()> {
        self.extend_times(1, &other)
    }

    /// Adds every row of `other` so many times.
    ///
    /// # Errors
    /// A sum past 128 bits.
    pub fn extend_times(&mut self, times: u128, other: &Self) -> Result<()> {
        for (phase, component, row) in other.iter().filter(|_| times > 0) {
            let overflow = || Error::Overflow(component.to_string());
            let calls = row.calls.checked_mul(times).ok_or_else(overflow)?;
            let cost = row.cost.checked_mul(times).ok_or_else(overflow)?;
            self.add(phase, component, Sum { calls, cost })?;
        }
        Ok(())
    }

    /// Rows in order of phase and component.
    pub fn iter(&self) -> impl Iterator<Item = (Phase, Component, &Sum)> {
        self.0.iter().map(|(&(phase, component), sum)| (phase, component, sum))
    }

    /// The row of a phase and component; zero if there is none.
    pub fn get(&self, phase: Phase, component: Component) -> Sum {
        self.0.get(&(phase, component)).copied().unwrap_or_default()
    }

    /// The sum of the rows that `keep` accepts.
    ///
    /// # Errors
    /// A sum past 128 bits.
    pub fn sum(&self, keep: impl Fn(Phase, Component) -> bool) -> Result<Cost> {
        self.iter().filter(|(phase, component, _)| keep(*phase, *component)).try_fold(
            Cost::default(),
            |total, (_, _, row)| {
                let sum = total.checked_add(row.cost);
                sum.ok_or_else(|| Error::Overflow("the total".into()).into())
            },
        )
    }
}

impl Ledger {
    /// The ledger's sums by phase and component.
    ///
    /// # Errors
    /// A sum past 128 bits.
    pub fn tally(&self) -> Result<Tally> {
        let mut tally = Tally::default();
        for (key, entry) in self.iter() {
            let component = key.scope.module.into();
            let calls = u128::from(entry.calls);
            let cost = key.op.cost().checked_mul(calls);
            let cost = cost.ok_or_else(|| Error::Overflow(key.to_string()))?;
            tally.add(key.phase, component, Sum { calls, cost })?;
        }
        Ok(tally)
    }
}
