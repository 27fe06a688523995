//! The few costs that closed forms are put together from.

use crate::{
    error::{Error, Result},
    prices::{Cost, Primitives},
};

/// `rows` rows of k by k × n: rows·n·k muls for rows·n outputs.
pub(super) fn product(rows: u128, k: u128, n: u128) -> Cost {
    Cost { macs: rows * k * n, outputs: rows * n, ..Cost::default() }
}

/// Multiply-accumulates as formulas state them: a mul and an add each.
pub(super) fn macs(macs: u128) -> Cost {
    Cost { macs, ..Cost::default() }
}

/// No matmul.
pub(super) fn only(other: Primitives) -> Cost {
    Cost { other, ..Cost::default() }
}

/// Nothing.
pub(super) fn zero() -> Primitives {
    Primitives::default()
}

/// `n` times `cost`.
pub(super) fn times(n: u128, cost: Cost) -> Result<Cost> {
    cost.checked_mul(n).ok_or_else(|| Error::Overflow("this workload's operations".into()).into())
}
