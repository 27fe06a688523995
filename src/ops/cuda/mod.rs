//! Our own CUDA kernels: where candle has none, or needs many launches for one op.
//!
//! A kernel computes in f32 on tensors of f32 or bf16 and runs on the device's one stream. The
//! functions here take tensors, and take from them every dimension that a kernel is told: what does
//! not fit is refused by the kernel's name, so none can be started over other dimensions than its
//! tensors'. Each writes to [`Nodes`](super::launch::Nodes) what it started; what a kernel contains
//! is reported by whoever calls it.
//!
//! Two files are read by `build.rs` too, which makes a header for the kernels of them: `tiles.rs`,
//! numbers that both sides go by, and `args.rs`, what each kernel is given.

/// Numbers that both sides go by (see `header.rs` for what the kernels see).
macro_rules! tiles {
    ($($(#[$doc:meta])* $name:ident: $kind:ty = $value:expr;)*) => {
        $($(#[$doc])* pub(super) const $name: $kind = $value;)*
    };
}

/// What kernels are given (see `header.rs` for what the kernels see).
macro_rules! arguments {
    ($($(#[$doc:meta])* struct $name:ident {
        $($(#[$field_doc:meta])* $field:ident: $kind:ty,)*
    })*) => {
        $(
            $(#[$doc])*
            #[repr(C)]
            #[derive(Debug, Clone, Copy)]
            pub(in crate::ops) struct $name {
                $($(#[$field_doc])* pub(in crate::ops) $field: $kind,)*
            }
        )*
    };
}

mod args;
mod attention;
mod call;
mod choose;
mod decode;
mod eight_bit;
mod elements;
mod library;
mod optimizer;
mod products;
mod rows;
mod step;
mod sums;
mod tiles;
mod witness;

#[cfg(feature = "cuda")]
#[path = "driver.rs"]
mod backend;
#[cfg(not(feature = "cuda"))]
#[path = "absent.rs"]
mod backend;
#[cfg(feature = "cuda")]
mod graph;
#[cfg(feature = "cuda")]
mod light;
#[cfg(not(feature = "cuda"))]
use backend as light;
#[cfg(all(test, feature = "cuda"))]
mod tests;

use candle_core::{DType, Device, Result, Shape, Tensor};

pub(in crate::ops) use args::AdamWFactors;
pub(in crate::ops) use choose::{Choose, How};
pub(in crate::ops) use decode::{Attend, attend_space};
pub(in crate::ops) use eight_bit::NEEDS_FOR_8_BITS;
pub(in crate::ops) use elements::{Gate, Map, Turn};
pub(in crate::ops) use optimizer::{TENSORS, Updated};
pub(in crate::ops) use products::{Adapt, Out, Project};
pub(in crate::ops) use rows::{Causal, Norm};
pub(in crate::ops) use step::{Layer as StepLayer, Model as StepModel, Plan as StepPlan};
pub use witness::Fault;
pub(in crate::ops) use witness::{Listed, witness};

#[cfg(not(feature = "cuda"))]
pub(in crate::ops) use backend::Graph;
#[cfg(feature = "cuda")]
pub(in crate::ops) use graph::Graph;

// What `args` is written in.
use call::{Bf16, E4m3, Element, Read, Write};

/// Kernels for tensors of one element type on one device.
#[derive(Debug, Clone)]
pub(in crate::ops) struct Kernels {
    device: Device,
    dtype: DType,
}

impl Kernels {
    /// Those that take all of `tensors`; none where another device, another type or a layout that
    /// they do not read is among them.
    pub(in crate::ops) fn of(tensors: &[&Tensor]) -> Option<Self> {
        let first = tensors.first()?;
        let kernels = Self::on(first.device(), first.dtype())?;
        let fits = |t: &&Tensor| {
            let start = t.layout().start_offset() * t.dtype().size_in_bytes();
            kernels.serves(t) && t.is_contiguous() && start.is_multiple_of(16)
        };
        tensors.iter().all(fits).then_some(kernels)
    }

    /// Those for `dtype` on `device`, where there are any.
    pub(in crate::ops) fn on(device: &Device, dtype: DType) -> Option<Self> {
        let known = matches!(dtype, DType::F32 | DType::BF16);
        let built = cfg!(feature = "cuda") && device.is_cuda() && known;
        built.then(|| Self { device: device.clone(), dtype })
    }

    /// Where their tensors are.
    pub(in crate::ops) fn device(&self) -> &Device {
        &self.device
    }

    /// The type of their tensors.
    pub(in crate::ops) fn dtype(&self) -> DType {
        self.dtype
    }

    /// A tensor whose elements a kernel is about to write, all of them.
    pub(in crate::ops) fn output(&self, like: &Tensor) -> Result<Tensor> {
        self.empty(like.shape(), self.dtype)
    }

    /// The same, of any shape and type.
    pub(in crate::ops) fn empty(&self, shape: impl Into<Shape>, dtype: DType) -> Result<Tensor> {
        // SAFETY: whoever asks for it has every element written before one is read.
        unsafe { Tensor::empty(shape, dtype, &self.device) }
    }

    /// Whether `tensor` is where theirs are, and of their type.
    fn serves(&self, tensor: &Tensor) -> bool {
        tensor.dtype() == self.dtype && tensor.device().same_device(&self.device)
    }

    /// The type as kernels' names end in it.
    fn suffix(&self) -> &'static str {
        if self.dtype == DType::BF16 { "bf16" } else { "f32" }
    }
}
