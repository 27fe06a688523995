//! The analytic side: what a workload must cost, from its config alone.
//!
//! Two countings of what is executed, independent of each other and of the model's code:
//! [`closed_form`] is a polynomial in the lengths, evaluated in O(1) however many tokens are
//! generated; [`predict`] lists every op. Beside them, the countings of others: [`count`] takes
//! any [`Structure`], and [`terms`] says why it differs. What executes is in another crate, and the
//! two countings share no derivation, or the audit would compare a thing with itself: a test reads
//! their imports.

mod blocked;
mod moments;
mod pieces;

mod closed_form;
mod training;
mod predict;

mod formulas;
pub mod notebook;
mod profilers;
mod structure;
mod torch;

mod causes;
mod terms;

pub use causes::{Cause, Term};
pub use closed_form::closed_form;
pub use formulas::parameters_taken;
pub use predict::predict;
pub use structure::{Structure, count};
pub use terms::{reference, terms};
