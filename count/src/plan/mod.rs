//! What a list of experiments costs, and how much of it a budget affords.
//!
//! A plan is a TOML file ([`Plan::read`]); its experiments are priced by the closed forms, so a
//! plan of years of training is accounted in milliseconds ([`Account::new`]). What finished runs
//! spent ([`Spent`]) comes off the budget first. At most one experiment may leave its length open
//! (`steps = "max"`, `new_tokens = "max"`): it takes what all the others leave.

mod account;
mod balance;
mod budget;
mod experiments;
mod file;
mod solve;
mod spent;
mod values;

pub use account::{Account, Beside, Broken, Row, Solved};
pub use balance::{Balance, Lack, NextOver, RowBalance};
pub use budget::{Budget, Stated, Unit};
pub use experiments::{Experiment, Plan, Unknown};
pub use spent::Spent;
pub use values::Flops;
