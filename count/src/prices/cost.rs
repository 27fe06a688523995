//! What work is made of.

use std::ops::AddAssign;

use serde::{Deserialize, Serialize};

/// Integer counts of the primitive operations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Primitives {
    /// Additions and subtractions.
    pub add: u128,
    /// Multiplications.
    pub mul: u128,
    /// Divisions.
    pub div: u128,
    /// Exponentials.
    pub exp: u128,
    /// Logarithms.
    pub log: u128,
    /// Square roots.
    pub sqrt: u128,
    /// Sines and cosines.
    pub trig: u128,
    /// Comparisons.
    pub cmp: u128,
    /// Sign changes.
    pub neg: u128,
}

impl Primitives {
    /// The counts by name, in the order that every table uses.
    pub const fn named(&self) -> [(&'static str, u128); 9] {
        [
            ("add", self.add),
            ("mul", self.mul),
            ("div", self.div),
            ("exp", self.exp),
            ("log", self.log),
            ("sqrt", self.sqrt),
            ("trig", self.trig),
            ("cmp", self.cmp),
            ("neg", self.neg),
        ]
    }

    fn map(self, other: Self, f: impl Fn(u128, u128) -> Option<u128>) -> Option<Self> {
        Some(Self {
            add: f(self.add, other.add)?,
            mul: f(self.mul, other.mul)?,
            div: f(self.div, other.div)?,
            exp: f(self.exp, other.exp)?,
            log: f(self.log, other.log)?,
            sqrt: f(self.sqrt, other.sqrt)?,
            trig: f(self.trig, other.trig)?,
            cmp: f(self.cmp, other.cmp)?,
            neg: f(self.neg, other.neg)?,
        })
    }
}

/// What work is made of: multiply-accumulates of matmuls apart from all else, because the
/// industry's convention prices nothing but them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cost {
    /// Σ b·m·k·n over matmuls: as many muls.
    pub macs: u128,
    /// Σ b·m·n over matmuls: a sum of k products takes k − 1 adds, so the matmuls' adds are
    /// `macs − outputs`.
    pub outputs: u128,
    /// Everything that is not a matmul.
    pub other: Primitives,
}

impl Cost {
    /// The cost whose primitives are `all`, `macs` and `outputs` being of matmuls; none where
    /// `all` cannot hold them.
    pub fn of(all: Primitives, macs: u128, outputs: u128) -> Option<Self> {
        let add = all.add.checked_sub(macs.checked_sub(outputs)?)?;
        let mul = all.mul.checked_sub(macs)?;
        Some(Self { macs, outputs, other: Primitives { add, mul, ..all } })
    }

    /// All primitives, the matmuls' among them.
    pub fn primitives(&self) -> Primitives {
        let matmul =
            Primitives { mul: self.macs, add: self.macs - self.outputs, ..Default::default() };
        let mut all = self.other;
        all.add += matmul.add;
        all.mul += matmul.mul;
        all
    }

    /// Sum, or none where it does not fit 128 bits.
    pub fn checked_add(self, rhs: Self) -> Option<Self> {
        Some(Self {
            macs: self.macs.checked_add(rhs.macs)?,
            outputs: self.outputs.checked_add(rhs.outputs)?,
            other: self.other.map(rhs.other, u128::checked_add)?,
        })
    }

    /// `times` such pieces of work, or none where that does not fit 128 bits.
    pub fn checked_mul(self, times: u128) -> Option<Self> {
        Some(Self {
            macs: self.macs.checked_mul(times)?,
            outputs: self.outputs.checked_mul(times)?,
            other: self.other.map(Primitives::default(), |n, _| n.checked_mul(times))?,
        })
    }
}

impl AddAssign for Primitives {
    fn add_assign(&mut self, rhs: Self) {
        self.add += rhs.add;
        self.mul += rhs.mul;
        self.div += rhs.div;
        self.exp += rhs.exp;
        self.log += rhs.log;
        self.sqrt += rhs.sqrt;
        self.trig += rhs.trig;
        self.cmp += rhs.cmp;
        self.neg += rhs.neg;
    }
}
