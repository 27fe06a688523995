//! The equality: predicted ledger = executed ledger, key by key, and closed form = their sums.

use crate::{
    analytic,
    error::{Error, Result},
    ledger::{Key, Ledger, Phase},
    prices::Prices,
    tally::{Component, Sum, Tally},
    workload::Workload,
};

/// A key that ran a different number of times than predicted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeyDifference {
    /// The op, where and with which dimensions.
    pub key: Key,
    /// Calls that the prediction lists; 0: it ran and was not predicted.
    pub predicted: u64,
    /// Calls that ran; 0: it was predicted and did not run.
    pub executed: u64,
}

/// A component whose closed form is not the sum of what ran.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SumDifference {
    /// Phase of the component.
    pub phase: Phase,
    /// The component.
    pub component: Component,
    /// What the closed form states.
    pub closed_form: Sum,
    /// What ran.
    pub executed: Sum,
}

/// A graph of launches that a device recorded and replayed, from both sides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GraphView {
    /// Nodes of the graph, as the device's driver lists them.
    pub nodes: usize,
    /// Launches that went into it.
    pub launches: usize,
    /// Where the two differ.
    pub difference: Option<String>,
}

impl GraphView {
    /// Of two graphs, all nodes and launches, and the first difference.
    pub fn and(self, other: Self) -> Self {
        Self {
            nodes: self.nodes + other.nodes,
            launches: self.launches + other.launches,
            difference: self.difference.or(other.difference),
        }
    }
}

/// Both sides of one workload, compared.
#[derive(Debug, Clone)]
pub struct Audit {
    /// The closed form's sums.
    pub closed_form: Tally,
    /// The predicted ledger's sums.
    pub predicted: Tally,
    /// The executed ledger's sums.
    pub executed: Tally,
    /// Distinct keys on either side.
    pub keys_compared: usize,
    /// Where the ledgers differ, in order of phase and scope.
    pub key_differences: Vec<KeyDifference>,
    /// Where the closed form differs from what ran.
    pub sum_differences: Vec<SumDifference>,
    /// What was replayed from a recording, seen from both sides.
    pub graph: Option<GraphView>,
}

impl Audit {
    /// Compares what ran with what `workloads`, one after another, must run.
    ///
    /// # Errors
    /// A workload that cannot be counted.
    pub fn new(workloads: &[Workload], executed: &Ledger) -> Result<Self> {
        let (mut predicted, mut closed_form) = (Ledger::default(), Tally::default());
        for workload in workloads {
            predicted.extend(analytic::predict(workload)?);
            closed_form.extend(analytic::closed_form(workload)?)?;
        }
        Self::compare(closed_form, &predicted, executed)
    }

    /// Compares two ledgers and a closed form.
    ///
    /// # Errors
    /// Sums past 128 bits.
    pub fn compare(closed_form: Tally, predicted: &Ledger, executed: &Ledger) -> Result<Self> {
        let mut keys: Vec<Key> = predicted.iter().chain(executed.iter()).map(|(k, _)| *k).collect();
        keys.sort();
        keys.dedup();
        let key_differences = keys
            .iter()
            .map(|key| KeyDifference {
                key: *key,
                predicted: predicted.calls(key),
                executed: executed.calls(key),
            })
            .filter(|d| d.predicted != d.executed)
            .collect();
        let executed = executed.tally()?;
        let mut rows: Vec<_> =
            closed_form.iter().chain(executed.iter()).map(|(p, c, _)| (p, c)).collect();
        rows.sort();
        rows.dedup();
        let sum_differences = rows
            .into_iter()
            .map(|(phase, component)| SumDifference {
                phase,
                component,
                closed_form: closed_form.get(phase, component),
                executed: executed.get(phase, component),
            })
            .filter(|d| d.closed_form != d.executed)
            .collect();
        let (predicted, keys_compared) = (predicted.tally()?, keys.len());
        Ok(Self {
            closed_form,
            predicted,
            executed,
            keys_compared,
            key_differences,
            sum_differences,
            graph: None,
        })
    }

    /// The same with what was replayed, which balances only where the device's own list of it is
    /// what was launched.
    pub fn with_graphs(self, graphs: impl IntoIterator<Item = GraphView>) -> Self {
        Self { graph: graphs.into_iter().reduce(GraphView::and), ..self }
    }

    fn graph_difference(&self) -> Option<&str> {
        self.graph.as_ref()?.difference.as_deref()
    }

    /// Whether all three countings agree, and recordings with what was launched.
    pub fn balanced(&self) -> bool {
        self.key_differences.is_empty()
            && self.sum_differences.is_empty()
            && self.graph_difference().is_none()
    }

    /// (closed form, predicted, executed) totals under `prices`, in FLOPs.
    ///
    /// # Errors
    /// Totals past 128 bits.
    pub fn totals(&self, prices: &Prices) -> Result<[u128; 3]> {
        let total = |tally: &Tally| prices.flops(&tally.sum(|_, _| true)?);
        Ok([total(&self.closed_form)?, total(&self.predicted)?, total(&self.executed)?])
    }

    /// Nothing where the audit balances.
    ///
    /// # Errors
    /// [`Error::Unbalanced`], with the number of differences and the first of them.
    pub fn verdict(&self) -> Result<()> {
        if self.balanced() {
            return Ok(());
        }
        let (keys, sums) = (self.key_differences.len(), self.sum_differences.len());
        if let (0, 0, Some(difference)) = (keys, sums, self.graph_difference()) {
            let why = format!("the device's list of the recorded graph differs: {difference}");
            return Err(Error::Unbalanced(why).into());
        }
        let first = match (self.key_differences.first(), self.sum_differences.first()) {
            (Some(d), _) => {
                format!("{}: {} predicted, {} executed", d.key, d.predicted, d.executed)
            }
            (None, Some(d)) => format!("{} {}: closed form", d.phase.name(), d.component),
            (None, None) => String::new(),
        };
        let why = format!("{keys} keys and {sums} components differ, first {first}");
        Err(Error::Unbalanced(why).into())
    }
}
