//! The metered tensor: it has no arithmetic except the functions of this module, and each of them
//! reports what it ran, with the dimensions of the tensors that it was given.
//!
//! Reshapes, transposes, slices and copies do no arithmetic and are not reported.

mod attention;
mod by_row;
mod choose;
mod cuda;
mod decode;
mod elementwise;
mod embed;
mod exp;
mod gemv;
mod linear;
mod loss;
mod norm;
mod optimize;
mod product;
mod rope;
mod sample;
mod softmax;
mod tape;

pub use attention::{attention, is_one_kernel};
pub use decode::{Decoding, LowRank, Norm, Product, Sizes};
pub use elementwise::{add, gated, mul, scale, silu};
pub use embed::embed;
pub use linear::{bias, linear, matmul};
pub use loss::{CrossEntropy, Losses};
pub use norm::rms_norm;
pub use optimize::{AdamW, Moments, clip_factor, sums_of_squares};
pub use rope::{RopeTable, merge_heads, rope, rotated_heads, split_heads};
pub use sample::Sampler;
pub use softmax::{CausalMask, masked_softmax, softmax};
pub use tape::{Gradients, backward};

use std::sync::Arc;

use candle_core::{DType, Device, Shape};

use crate::{error::Result, ledger::Dtype};

/// A dense tensor on a device. No operator is implemented on it: arithmetic goes through
/// [`crate::ops`], which meters it.
#[derive(Debug, Clone)]
pub struct Tensor {
    data: candle_core::Tensor,
    /// How it was made, where a gradient of it is needed.
    node: Option<Arc<tape::Node>>,
}

impl From<candle_core::Tensor> for Tensor {
    fn from(data: candle_core::Tensor) -> Self {
        Self { data, node: None }
    }
}

/// candle's name for `dtype`.
pub fn candle_dtype(dtype: Dtype) -> DType {
    match dtype {
        Dtype::F32 => DType::F32,
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::BF16,
    }
}

/// The element type of `tensor`, where metered ops compute in it.
fn dtype_of(tensor: &candle_core::Tensor) -> Result<Dtype> {
    match tensor.dtype() {
        DType::F32 => Ok(Dtype::F32),
        DType::F16 => Ok(Dtype::F16),
        DType::BF16 => Ok(Dtype::BF16),
        other => anyhow::bail!("no metered op computes in {other:?}"),
    }
}

impl Tensor {
    /// A tensor of zeros.
    ///
    /// # Errors
    /// The device's, out of memory among them.
    pub fn zeros(shape: impl Into<Shape>, dtype: Dtype, device: &Device) -> Result<Self> {
        Ok(candle_core::Tensor::zeros(shape, candle_dtype(dtype), device)?.into())
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
        Ok(tensor.to_dtype(candle_dtype(dtype))?.to_device(device)?.into())
    }

    /// Lengths of all dimensions.
    pub fn dims(&self) -> &[usize] {
        self.data.dims()
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.data.elem_count()
    }

    /// The element type.
    ///
    /// # Errors
    /// A type that no metered op computes in.
    pub fn dtype(&self) -> Result<Dtype> {
        dtype_of(&self.data)
    }

    /// The device it lives on.
    pub fn device(&self) -> &Device {
        self.data.device()
    }

    /// The same elements under another shape; copies only where the layout asks for it.
    ///
    /// # Errors
    /// Another number of elements.
    pub fn reshape(&self, shape: impl Into<Shape>) -> Result<Self> {
        let was = self.data.shape().clone();
        Ok(self.laid_out(self.data.reshape(shape.into())?, move |dy| dy.reshape(was)))
    }

    /// Two dimensions swapped, and the result laid out densely.
    ///
    /// # Errors
    /// A dimension that does not exist.
    pub fn transpose(&self, a: usize, b: usize) -> Result<Self> {
        let swapped = self.data.transpose(a, b)?.contiguous()?;
        Ok(self.laid_out(swapped, move |dy| dy.transpose(a, b)?.contiguous()))
    }

    /// The last two dimensions swapped, as a view.
    ///
    /// # Errors
    /// Fewer than two dimensions.
    pub fn t(&self) -> Result<Self> {
        Ok(self.laid_out(self.data.t()?, |dy| dy.t()))
    }

    /// `length` entries of `dim` from `start`, as a view.
    ///
    /// # Errors
    /// A range past the end.
    pub fn narrow(&self, dim: usize, start: usize, length: usize) -> Result<Self> {
        let after = self.data.dim(dim)?.saturating_sub(start + length);
        let narrowed = self.data.narrow(dim, start, length)?;
        Ok(self.laid_out(narrowed, move |dy| dy.pad_with_zeros(dim, start, after)))
    }

    /// The same elements, laid out densely.
    ///
    /// # Errors
    /// The device's.
    pub fn contiguous(&self) -> Result<Self> {
        Ok(self.laid_out(self.data.contiguous()?, |dy| Ok(dy.clone())))
    }

    /// The same values in another element type.
    ///
    /// # Errors
    /// The device's.
    pub fn to_dtype(&self, dtype: Dtype) -> Result<Self> {
        let was = self.data.dtype();
        Ok(self.laid_out(self.data.to_dtype(candle_dtype(dtype))?, move |dy| dy.to_dtype(was)))
    }

    /// Matrices of one width as the rows of one matrix, without a graph; `none` if there are none.
    ///
    /// # Errors
    /// Widths that differ.
    pub fn stacked(parts: &[Self], none: &Self) -> Result<Self> {
        let parts: Vec<_> = parts.iter().map(|part| &part.data).collect();
        match parts.as_slice() {
            [] => Ok(none.detach()),
            [one] => Ok((*one).clone().into()),
            many => Ok(candle_core::Tensor::cat(many, 0)?.into()),
        }
    }

    /// Copies `source` into `dim` from `offset` on, in place.
    ///
    /// # Errors
    /// Shapes that do not fit, or a layout that is not dense.
    pub fn write(&self, source: &Self, dim: usize, offset: usize) -> Result<()> {
        Ok(self.data.slice_set(&source.data, dim, offset)?)
    }

    /// All elements on the host as f32, row-major.
    ///
    /// # Errors
    /// The device's.
    pub fn to_vec(&self) -> Result<Vec<f32>> {
        Ok(self.data.flatten_all()?.to_dtype(DType::F32)?.to_vec1()?)
    }

    /// (rows, width) of the tensor seen as rows along its last dimension.
    fn rows_width(&self) -> Result<(u64, u64)> {
        let width = *self.dims().last().ok_or_else(|| anyhow::anyhow!("a scalar has no rows"))?;
        Ok(((self.elements() / width.max(1)) as u64, width as u64))
    }
}
