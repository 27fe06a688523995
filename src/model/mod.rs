//! The model over metered ops: no arithmetic of its own.

mod cache;
mod lora;
mod qwen2;

pub use cache::KvCache;
pub use lora::{Adapter, AdapterSource};
pub use qwen2::Qwen2;
