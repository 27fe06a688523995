//! Which kernels run: the one place where that is decided.

use candle_core::{DType, Tensor};

use super::cuda::Kernels;

/// Whose kernels take a launch's tensors.
pub(super) enum Backend {
    /// Ours on the CPU: dense f32.
    Cpu,
    /// Ours on a GPU: dense f32 or bf16.
    Cuda(Kernels),
    /// candle's own: other element types, layouts and devices.
    Portable,
}

impl Backend {
    /// Those for all of `tensors`.
    pub fn of(tensors: &[&Tensor]) -> Self {
        if tensors.iter().all(|t| is_dense_f32_on_cpu(t)) {
            return Self::Cpu;
        }
        Kernels::of(tensors).map_or(Self::Portable, Self::Cuda)
    }

    /// The same where the CPU's kernels widen any type to f32 themselves.
    pub fn wide(tensors: &[&Tensor]) -> Self {
        match tensors.iter().all(|t| t.device().is_cpu()) {
            true => Self::Cpu,
            false => Self::of(tensors),
        }
    }

    /// The same where a GPU's kernels take the first tensor row by row, along its last dimension.
    pub fn by_row(tensors: &[&Tensor]) -> Self {
        let width = tensors.first().and_then(|t| t.dims().last()).copied().unwrap_or(0);
        match Self::wide(tensors) {
            Self::Cuda(_) if !Kernels::takes_rows_of(width) => Self::Portable,
            other => other,
        }
    }
}

/// Whether the CPU's own f32 kernels can take it.
fn is_dense_f32_on_cpu(t: &Tensor) -> bool {
    t.device().is_cpu() && t.dtype() == DType::F32 && t.is_contiguous()
}
