//! The analytic side: what a workload must cost, from its config alone.
//!
//! Two countings, independent of each other and of the model's code: [`closed_form`] is a
//! polynomial in the lengths, evaluated in O(1) however many tokens are generated; [`predict`]
//! lists every op. Nothing here may import `ops`, `model` or `meter`, or the audit would compare
//! a thing with itself; a test reads the imports.

mod closed_form;
mod predict;

pub use closed_form::closed_form;
pub use predict::predict;
