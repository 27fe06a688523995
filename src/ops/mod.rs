//! The metered tensor: it has no arithmetic except the functions of this module, and each of them
//! reports what it ran, with the dimensions of the tensors that it was given.
//!
//! Reshapes, transposes, slices and copies do no arithmetic and are not reported.

mod elementwise;
mod embed;
mod exp;
mod gemv;
mod linear;
mod norm;
mod rope;
mod sample;
mod softmax;

pub use elementwise::{add, mul, scale, silu};
pub use embed::embed;
pub use linear::{bias, linear, matmul};
pub use norm::rms_norm;
pub use rope::{RopeTable, rope};
pub use sample::{Sampler, argmax};
pub use softmax::{causal_mask, mask, softmax};

use candle_core::{DType, Device, Shape};

use crate::{error::Result, ledger::Dtype};

/// A dense tensor on a device. No operator is implemented on it: arithmetic goes through
/// [`crate::ops`], which meters it.
#[derive(Debug, Clone)]
pub struct Tensor(candle_core::Tensor);

impl From<candle_core::Tensor> for Tensor {
    fn from(tensor: candle_core::Tensor) -> Self {
        Self(tensor)
    }
}

impl Dtype {
    /// candle's name for it.
    pub fn to_candle(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::BF16 => DType::BF16,
        }
    }

    fn of(tensor: &candle_core::Tensor) -> Result<Self> {
        match tensor.dtype() {
            DType::F32 => Ok(Self::F32),
            DType::F16 => Ok(Self::F16),
            DType::BF16 => Ok(Self::BF16),
            other => anyhow::bail!("no metered op computes in {other:?}"),
        }
    }
}

impl Tensor {
    /// A tensor of zeros.
    ///
    /// # Errors
    /// The device's, out of memory among them.
    pub fn zeros(shape: impl Into<Shape>, dtype: Dtype, device: &Device) -> Result<Self> {
        Ok(Self(candle_core::Tensor::zeros(shape, dtype.to_candle(), device)?))
    }

    /// Host values as a tensor of `dtype`.
    ///
    /// # Errors
    /// A shape that does not hold `values`.
    pub fn from_vec(
        values: Vec<f32>,
        shape: impl Into<Shape>,
        dtype: Dtype,
        device: &Device,
    ) -> Result<Self> {
        // Converted on the host, so that the device needs no cast kernel.
        let tensor = candle_core::Tensor::from_vec(values, shape.into(), &Device::Cpu)?;
        Ok(Self(tensor.to_dtype(dtype.to_candle())?.to_device(device)?))
    }

    /// Lengths of all dimensions.
    pub fn dims(&self) -> &[usize] {
        self.0.dims()
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.0.elem_count()
    }

    /// The element type.
    ///
    /// # Errors
    /// A type that no metered op computes in.
    pub fn dtype(&self) -> Result<Dtype> {
        Dtype::of(&self.0)
    }

    /// The device it lives on.
    pub fn device(&self) -> &Device {
        self.0.device()
    }

    /// The same elements under another shape; copies only where the layout asks for it.
    ///
    /// # Errors
    /// Another number of elements.
    pub fn reshape(&self, shape: impl Into<Shape>) -> Result<Self> {
        Ok(Self(self.0.reshape(shape.into())?))
    }

    /// Two dimensions swapped, and the result laid out densely.
    ///
    /// # Errors
    /// A dimension that does not exist.
    pub fn transpose(&self, a: usize, b: usize) -> Result<Self> {
        Ok(Self(self.0.transpose(a, b)?.contiguous()?))
    }

    /// The last two dimensions swapped, as a view.
    ///
    /// # Errors
    /// Fewer than two dimensions.
    pub fn t(&self) -> Result<Self> {
        Ok(Self(self.0.t()?))
    }

    /// `length` entries of `dim` from `start`, as a view.
    ///
    /// # Errors
    /// A range past the end.
    pub fn narrow(&self, dim: usize, start: usize, length: usize) -> Result<Self> {
        Ok(Self(self.0.narrow(dim, start, length)?))
    }

    /// The same elements, laid out densely.
    ///
    /// # Errors
    /// The device's.
    pub fn contiguous(&self) -> Result<Self> {
        Ok(Self(self.0.contiguous()?))
    }

    /// Copies `source` into `dim` from `offset` on, in place.
    ///
    /// # Errors
    /// Shapes that do not fit, or a layout that is not dense.
    pub fn write(&self, source: &Self, dim: usize, offset: usize) -> Result<()> {
        Ok(self.0.slice_set(&source.0, dim, offset)?)
    }

    /// All elements on the host as f32, row-major.
    ///
    /// # Errors
    /// The device's.
    pub fn to_vec(&self) -> Result<Vec<f32>> {
        Ok(self.0.flatten_all()?.to_dtype(DType::F32)?.to_vec1()?)
    }

    /// Whether the CPU's own f32 kernels can take it.
    fn is_dense_f32_on_cpu(&self) -> bool {
        self.device().is_cpu() && self.0.dtype() == DType::F32 && self.0.is_contiguous()
    }

    /// (rows, width) of the tensor seen as rows along its last dimension.
    fn rows_width(&self) -> Result<(u64, u64)> {
        let width = *self.dims().last().ok_or_else(|| anyhow::anyhow!("a scalar has no rows"))?;
        Ok(((self.elements() / width.max(1)) as u64, width as u64))
    }
}
