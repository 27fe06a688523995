//! The model over metered ops: no arithmetic of its own.

mod cache;
mod decode;
mod gradients;
mod lora;
mod qwen2;

pub use cache::KvCache;
pub use decode::Decoder;
pub use gradients::{Labelled, Trained};
pub use lora::{Adapter, AdapterSource};
pub use qwen2::Qwen2;
