//! From one counting's total to another's, cause by cause.
//!
//! Each structure is a reference plus named terms ([`analytic::terms`]). So the way from A to B is
//! A's terms taken back and B's applied, equal causes merged, then B priced as B is; it sums to the
//! difference of the two totals because each of these is counted on its own.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{
    SCHEMA_VERSION,
    analytic::{self, Cause, Structure},
    error::{Error, Result},
    foreign::{Agreement, Tool},
    prices::{Cost, Prices},
    workload::Workload,
};

/// One end: a structure and the prices that it is counted under.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct End {
    /// Which operations.
    pub structure: Structure,
    /// For how much each.
    pub prices: Prices,
}

/// Whose doing a cause is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// FROM does so, and it is taken back.
    From,
    /// TO does so.
    To,
    /// Both do, to different amounts.
    Both,
}

impl Side {
    /// Lower-case name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::From => "from",
            Self::To => "to",
            Self::Both => "both",
        }
    }
}

/// One step of the way.
#[derive(Debug, Clone, Serialize)]
pub struct Step {
    /// The cause.
    pub cause: Cause,
    /// What it means, in a sentence.
    pub why: String,
    /// Whose doing it is.
    pub of: Side,
    /// What it adds on the way from FROM to TO.
    pub flops: i128,
    /// The total after it.
    pub running_total: i128,
    /// Its part of the difference; none where the ends are equal.
    pub share: Option<f64>,
}

/// The whole way.
#[derive(Debug, Clone, Serialize)]
pub struct Reconciliation {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// Always `reconcile`.
    pub command: String,
    /// Where the config came from.
    pub model: String,
    /// What is counted.
    pub workload: Vec<Workload>,
    /// Where it starts.
    pub from: Total,
    /// Where it ends.
    pub to: Total,
    /// `to` less `from`.
    pub difference_flops: i128,
    /// The steps, the largest first, prices last.
    pub steps: Vec<Step>,
}

/// An end's total.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Total {
    /// The structure.
    pub structure: Structure,
    /// The prices.
    pub prices: Prices,
    /// What the structure counts under them, or what the tool's file states.
    pub total_flops: u128,
    /// The finished run that it stands for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub run: Option<Run>,
    /// The file of another tool that it stands for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool: Option<Tool>,
}

/// A finished run's own total beside the closed form's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// Its file.
    pub file: String,
    /// What it says it spent.
    pub total_flops: u128,
    /// Whether that is what its structure counts.
    pub agrees: bool,
}

/// The way from `from` to `to` for all `workloads` together.
///
/// # Errors
/// A workload that one of them does not cover, or a sum past 127 bits.
pub fn reconcile(
    model: &str,
    workloads: &[Workload],
    from: &End,
    to: &End,
) -> Result<Reconciliation> {
    let mut causes = causes(workloads, from.structure, to.structure, &from.prices)?;
    causes.sort_by_key(|(cause, _, flops)| (std::cmp::Reverse(flops.unsigned_abs()), *cause));
    let end = cost(workloads, to.structure)?;
    let prices = price_steps(&end, &from.prices, &to.prices)?;
    causes.extend(prices.into_iter().map(|(cause, flops)| (cause, Side::To, flops)));

    let total = |end: &End| -> Result<Total> {
        let total_flops = end.prices.flops(&cost(workloads, end.structure)?)?;
        let (structure, prices) = (end.structure, end.prices.clone());
        Ok(Total { structure, prices, total_flops, run: None, tool: None })
    };
    let (start, stop) = (total(from)?, total(to)?);
    let signed = |n: u128| i128::try_from(n).map_err(|_| overflow());
    let difference_flops = signed(stop.total_flops)? - signed(start.total_flops)?;
    let mut running_total = signed(start.total_flops)?;
    let mut steps = vec![];
    for (cause, of, flops) in causes.into_iter().filter(|(_, _, flops)| *flops != 0) {
        running_total = running_total.checked_add(flops).ok_or_else(overflow)?;
        let share = share(flops, difference_flops);
        steps.push(Step { cause, why: cause.why(), of, flops, running_total, share });
    }
    // Both sides are counted on their own: anything else is a defect, never a line of its own.
    anyhow::ensure!(
        running_total == signed(stop.total_flops)?,
        "the causes from {} to {} do not sum: {running_total} for {}",
        from.structure,
        to.structure,
        stop.total_flops
    );
    Ok(Reconciliation {
        schema_version: SCHEMA_VERSION,
        command: "reconcile".into(),
        model: model.into(),
        workload: workloads.to_vec(),
        from: start,
        to: stop,
        difference_flops,
        steps,
    })
}

fn overflow() -> Error {
    Error::Overflow("the difference".into())
}

fn share(flops: i128, difference: i128) -> Option<f64> {
    (difference != 0).then(|| flops as f64 / difference as f64)
}

impl Reconciliation {
    /// The same way with `tool`'s file at its start or end: a step more where the file states another
    /// figure than is counted for it.
    ///
    /// # Errors
    /// A figure or a difference past 127 bits.
    pub fn with_tool(mut self, side: Side, tool: Tool) -> Result<Self> {
        let signed = |n: u128| i128::try_from(n).map_err(|_| overflow());
        let counted = signed(tool.counted_flops)?;
        let stated = tool.stated_flops.map_or(Ok(counted), signed)?;
        let starts = side != Side::To;
        let (end, flops, running_total) = match starts {
            true => (&mut self.from, counted - stated, counted),
            false => (&mut self.to, stated - counted, stated),
        };
        end.total_flops = stated.unsigned_abs();
        let cause = match tool.agreement {
            Agreement::Differs => Cause::Unexplained,
            Agreement::Exact | Agreement::WithinRounding | Agreement::NoFigure => Cause::Rounding,
        };
        end.tool = Some(tool);
        if flops != 0 {
            let (why, of) = (cause.why(), if starts { Side::From } else { Side::To });
            let step = Step { cause, why, of, flops, running_total, share: None };
            self.steps.insert(if starts { 0 } else { self.steps.len() }, step);
        }
        self.difference_flops = signed(self.to.total_flops)? - signed(self.from.total_flops)?;
        for step in &mut self.steps {
            step.share = share(step.flops, self.difference_flops);
        }
        Ok(self)
    }
}

impl Prices {
    /// FLOPs of `counts` less those of `instead_of`. Unlike [`Prices::flops`], it takes parts of a
    /// whole too: `outputs` without the `macs` that they belong to are adds to take away.
    ///
    /// # Errors
    /// A product or sum past 127 bits.
    pub fn difference(&self, counts: &Cost, instead_of: &Cost) -> Result<i128> {
        let parts = self.linear(counts).zip(self.linear(instead_of));
        let difference = parts.and_then(|(counts, instead)| counts.checked_sub(instead));
        difference.ok_or_else(|| Error::Overflow("priced FLOPs".into()).into())
    }

    fn linear(&self, cost: &Cost) -> Option<i128> {
        let signed = |n: u128| i128::try_from(n).ok();
        let (mac, output) = match self.mac {
            Some(mac) => (mac.into(), 0),
            None => (i128::from(self.add) + i128::from(self.mul), i128::from(self.add)),
        };
        let products = signed(cost.macs)?.checked_mul(mac)?;
        let first_adds = signed(cost.outputs)?.checked_mul(output)?;
        cost.other
            .named()
            .into_iter()
            .zip(self.of_primitives())
            .try_fold(products.checked_sub(first_adds)?, |sum, ((_, n), price)| {
                sum.checked_add(signed(n)?.checked_mul(price.into())?)
            })
    }
}

/// What `structure` counts for all workloads.
fn cost(workloads: &[Workload], structure: Structure) -> Result<Cost> {
    workloads.iter().try_fold(Cost::default(), |sum, workload| {
        let one = analytic::count(structure, workload)?.sum(|_, _| true)?;
        Ok(sum.checked_add(one).ok_or_else(overflow)?)
    })
}

/// Causes with their sides and FLOPs: `from`'s taken back, `to`'s applied.
fn causes(
    workloads: &[Workload],
    from: Structure,
    to: Structure,
    prices: &Prices,
) -> Result<Vec<(Cause, Side, i128)>> {
    let mut sums: BTreeMap<Cause, [i128; 2]> = BTreeMap::new();
    for workload in workloads {
        for (side, structure) in [from, to].into_iter().enumerate() {
            for term in analytic::terms(structure, workload)? {
                let flops = prices.difference(&term.counts, &term.instead_of)?;
                let sum = &mut sums.entry(term.cause).or_default()[side];
                *sum = sum.checked_add(flops).ok_or_else(overflow)?;
            }
        }
    }
    let merged = sums.into_iter().map(|(cause, [from, to])| {
        let side = match (from, to) {
            (_, 0) => Side::From,
            (0, _) => Side::To,
            (_, _) => Side::Both,
        };
        Ok((cause, side, to.checked_sub(from).ok_or_else(overflow)?))
    });
    merged.collect()
}

/// What `cost` is worth more under `to` than under `from`: products of matmuls as a whole, and
/// each other primitive.
fn price_steps(cost: &Cost, from: &Prices, to: &Prices) -> Result<Vec<(Cause, i128)>> {
    let nothing = Cost::default();
    let matmuls = Cost { other: nothing.other, ..*cost };
    let worth = |prices: &Prices| prices.difference(&matmuls, &nothing);
    let mut steps = vec![(Cause::Price("matmuls"), worth(to)? - worth(from)?)];
    let prices = from.of_primitives().into_iter().zip(to.of_primitives());
    for ((name, n), (from, to)) in cost.other.named().into_iter().zip(prices) {
        let flops = i128::try_from(n)
            .ok()
            .and_then(|n| n.checked_mul(i128::from(to) - i128::from(from)))
            .ok_or_else(overflow)?;
        steps.push((Cause::Price(name), flops));
    }
    Ok(steps)
}
