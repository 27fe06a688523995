//! The model over metered ops: no arithmetic of its own.

mod context;
mod decoder;
mod decoding;
mod gradients;
mod load;
mod lora;
mod parameters;
mod whole;

pub use context::{Cache, Context, Positions};
pub use decoder::Decoder;
pub use decoding::{Decoding, How};
pub use gradients::{Labelled, Trained};
pub use lora::{Adapter, AdapterSource};
