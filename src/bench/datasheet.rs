//! What makers state of their devices.

use serde::{Deserialize, Serialize};

use crate::ledger::Dtype;

/// A device's stated peaks, dense: without structured sparsity.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Datasheet {
    /// The product.
    pub name: String,
    /// The document that states it.
    pub source: String,
    /// FLOP/s of matrix products, by element type.
    pub peaks: Vec<Peak>,
    /// Bytes a second between memory and chip.
    pub bytes_per_s: f64,
}

/// The peak of one element type.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Peak {
    /// Element type of both sides.
    pub dtype: Dtype,
    /// Multiplications and additions a second.
    pub flops_per_s: f64,
}
