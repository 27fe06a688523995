//! What becomes of a budget, in its own unit: in JSON, the keys end in that.

use serde::{Serialize, Serializer};

use super::{Budget, Unit, budget::Amounts};

/// Of the whole plan.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Balance {
    /// What there was to spend at first.
    pub budget: Budget,
    /// What finished runs spent together.
    pub spent: u128,
    /// The same in FLOPs under the plan's prices, whatever the budget's unit.
    pub spent_flops: u128,
    /// What the experiments cost together.
    pub total: u128,
    /// The same in FLOPs under the plan's prices, whatever the budget's unit.
    pub total_flops: u128,
    /// Budget that remains after all.
    pub left: u128,
    /// What is missing, if the budget does not suffice.
    pub over: u128,
}

impl Serialize for Balance {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let Self { budget, spent, spent_flops, total, total_flops, left, over } = *self;
        let amounts = Amounts(
            budget,
            vec![
                ("budget", Some(budget.amount)),
                ("spent", Some(spent)),
                ("total", Some(total)),
                ("left", Some(left)),
                ("over", Some(over)),
            ],
        );
        match budget.unit {
            Unit::Flops => amounts.serialize(s),
            Unit::Tokens | Unit::GpuHours | Unit::Dollars => {
                amounts.with([("spent_flops", spent_flops), ("total_flops", total_flops)], s)
            }
        }
    }
}

/// After one row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RowBalance {
    /// What there was to spend at first.
    pub budget: Budget,
    /// What the row costs.
    pub cost: u128,
    /// What is spent after it, finished runs included.
    pub running: u128,
    /// What remains after it.
    pub left: u128,
}

impl Serialize for RowBalance {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let Self { budget, cost, running, left } = *self;
        let mut amounts = vec![("running", Some(running)), ("left", Some(left))];
        // Of FLOPs, the row has its own.
        if budget.unit != Unit::Flops {
            amounts.insert(0, ("cost", Some(cost)));
        }
        Amounts(budget, amounts).serialize(s)
    }
}

/// By how much one more of what is solved would pass the budget, where that can be counted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NextOver(pub Budget, pub Option<u128>);

impl Serialize for NextOver {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        Amounts(self.0, vec![("next_over", self.1)]).serialize(s)
    }
}

/// What an item needs and what was left for it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Lack {
    /// What there was to spend at first.
    pub budget: Budget,
    /// What it needs.
    pub needed: u128,
    /// What was left for it.
    pub left: u128,
}

impl Serialize for Lack {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let Self { budget, needed, left } = *self;
        Amounts(budget, vec![("needed", Some(needed)), ("left", Some(left))]).serialize(s)
    }
}
