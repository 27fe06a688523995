//! The metered tensor: it has no arithmetic except the functions of this module, each of which
//! executes launches and so reports what it ran, with the dimensions of the tensors
//! that it was given.
//!
//! An op's file holds its shapes, its report and its gradient. Kernels are in `cpu`, in `cuda` and,
//! for devices and element types that have none of ours, in `portable`, of candle's own; which of
//! them runs is decided in one place, `backend`. What a model says in one breath (a norm and the
//! projections that read it, attention, a gated MLP) is a function too, in `block` and `attend`: op
//! by op, or, in decoding on a GPU, several ops in one launch.
//!
//! Reshapes, transposes, slices and copies do no arithmetic and are not reported; writing to the
//! KV cache is, since it moves bytes that last.
//!
//! A tensor of candle's is none of these, so arithmetic on one never gets in:
//!
//! ```compile_fail
//! use flopaudit::ops::Tensor;
//! let raw = candle_core::Tensor::zeros(3, candle_core::DType::F32, &candle_core::Device::Cpu)?;
//! let unmetered = (&raw + &raw)?;
//! let smuggled: Tensor = unmetered.into(); // the conversion is private
//! # anyhow::Ok(())
//! ```
//!
//! Nor does one get out, or have arithmetic of its own:
//!
//! ```compile_fail
//! use flopaudit::{ledger::Dtype, ops::Tensor};
//! let x = Tensor::zeros(3, Dtype::F32, &candle_core::Device::Cpu)?;
//! let smuggled = &x + &x; // no operator
//! # anyhow::Ok(())
//! ```
//!
//! A tensor that an op overwrites cannot be shared:
//!
//! ```compile_fail
//! use flopaudit::{ledger::Dtype, ops::Tensor};
//! let x = Tensor::zeros((2, 3), Dtype::F32, &candle_core::Device::Cpu)?;
//! let scores = x.copied()?;
//! let again = scores.clone(); // `Unshared` is not `Clone`
//! # anyhow::Ok(())
//! ```
//!
//! This is what the three have in common, and it compiles:
//!
//! ```
//! use flopaudit::{ledger::Dtype, ops::Tensor};
//! let x = Tensor::zeros((2, 3), Dtype::F32, &candle_core::Device::Cpu)?;
//! let scores = x.copied()?;
//! assert_eq!(scores.share().dims(), [2, 3]);
//! # anyhow::Ok(())
//! ```

mod launch;
mod backend;
mod tape;
mod workspace;

mod attend;
mod attention;
mod beside;
mod block;
mod blocks;
mod cache;
mod choose;
mod eight_bit;
mod elementwise;
mod embed;
mod linear;
mod loss;
mod low_rank;
mod mask;
mod moments;
mod norm;
mod optimize;
mod product_into;
mod recording;
mod rope;
mod rope_table;
mod rounding;
mod sample;
mod scores;
mod softmax;

mod cpu;
mod cuda;
mod portable;

pub use attend::{Attention, Masks, Sequences, Span, attend};
pub use attention::{attention, is_one_kernel};
pub use block::{
    Norm, Product, WholeLayer, WholeModel, WholeStep, add_product, decodes, gated_products,
    normed_product, normed_products,
};
pub use blocks::{Blocks, KeyBlock, QueryBlock, blocked_attention};
pub use cache::KvCache;
pub use choose::Choosing;
pub use eight_bit::{EightBit, NarrowProduct, check_8_bits, narrowed};
pub use elementwise::{add, gated, gelu, mul, scale, silu};
pub use embed::{Ids, embed};
#[cfg(test)]
pub(crate) use launch::Reported;
pub(crate) use launch::{Kernel, Launched, Nodes, Ops};
pub use linear::{bias, linear, matmul};
pub use loss::{Losses, cross_entropy, cross_entropy_with_gradient};
pub use low_rank::LowRank;
pub use mask::CausalMask;
pub use moments::Moments;
pub use norm::{rms_norm, shifted_rms_norm};
pub use optimize::{AdamW, Update, clip_factor, sums_of_squares};
pub use product_into::Factor;
pub use recording::{Fault, Recording};
pub use rope::{merge_heads, rope, rotated_heads, split_heads};
pub use rope_table::RopeTable;
pub use rounding::Draws;
pub use sample::Sampler;
pub use softmax::{masked_softmax, softmax};
pub use tape::{Gradients, backward};
pub use workspace::Workspace;

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
    /// The buffer of a workspace that it lies in: in use for as long.
    lease: Option<workspace::Lease>,
}

/// A tensor that nobody else holds, so that an op may overwrite it: it cannot be cloned.
#[derive(Debug)]
pub struct Unshared(Tensor);

impl Unshared {
    /// The same tensor to be read by many; from now on no op overwrites it.
    pub fn share(self) -> Tensor {
        self.0
    }

    /// Lengths of all dimensions.
    pub fn dims(&self) -> &[usize] {
        self.0.dims()
    }

    /// The same elements under another shape.
    ///
    /// # Errors
    /// Another number of elements.
    pub fn reshape(self, shape: impl Into<Shape>) -> Result<Self> {
        Ok(Self(self.0.reshape(shape)?))
    }

    /// `length` entries of `dim` from `start`; the others are given up.
    ///
    /// # Errors
    /// A range past the end.
    pub fn narrow(self, dim: usize, start: usize, length: usize) -> Result<Self> {
        Ok(Self(self.0.narrow(dim, start, length)?))
    }
}

/// candle's name for `dtype`.
pub fn candle_dtype(dtype: Dtype) -> DType {
    match dtype {
        Dtype::F32 => DType::F32,
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::BF16,
        Dtype::Fp8 => DType::F8E4M3,
    }
}

/// The element type of `tensor`, where metered ops compute in it.
pub(crate) fn dtype_of(tensor: &candle_core::Tensor) -> Result<Dtype> {
    match tensor.dtype() {
        DType::F32 => Ok(Dtype::F32),
        DType::F16 => Ok(Dtype::F16),
        DType::BF16 => Ok(Dtype::BF16),
        DType::F8E4M3 => Ok(Dtype::Fp8),
        other => anyhow::bail!("no metered op computes in {other:?}"),
    }
}

impl Tensor {
    /// candle's tensor as a metered one: where weights come in, and what kernels give.
    pub(crate) fn of(data: candle_core::Tensor) -> Self {
        Self { data, node: None, lease: None }
    }

    /// A copy of its elements that nobody else holds.
    ///
    /// # Errors
    /// The device's.
    pub fn copied(&self) -> Result<Unshared> {
        Ok(Unshared(self.laid_out(self.data.copy()?, |dy| Ok(dy.clone()))))
    }

    /// A tensor of zeros.
    ///
    /// # Errors
    /// The device's, out of memory among them.
    pub fn zeros(shape: impl Into<Shape>, dtype: Dtype, device: &Device) -> Result<Self> {
        Ok(Self::of(candle_core::Tensor::zeros(shape, candle_dtype(dtype), device)?))
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
        Ok(Self::of(tensor.to_dtype(candle_dtype(dtype))?.to_device(device)?))
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

    /// Parts of `dim` of these lengths, one after another, as views. Their gradients are put side by
    /// side again, which takes no arithmetic.
    ///
    /// # Errors
    /// Lengths that are not `dim`'s.
    pub fn split(&self, dim: usize, lengths: &[usize]) -> Result<Vec<Self>> {
        let (all, sum) = (self.data.dim(dim)?, lengths.iter().sum::<usize>());
        anyhow::ensure!(sum == all, "parts of {sum} of {all}");
        let graph = self.parts_of(dim);
        let mut start = 0;
        let parts = lengths.iter().map(|&length| {
            let data = self.data.narrow(dim, start, length)?;
            let node = graph.as_ref().map(|graph| graph.part(start));
            start += length;
            Ok(Self { data, node, lease: self.lease.clone() })
        });
        parts.collect()
    }

    /// Matrices of one width as the rows of one matrix, without a graph; `none` if there are none.
    ///
    /// # Errors
    /// Widths that differ.
    pub fn stacked(parts: &[Self], none: &Self) -> Result<Self> {
        let parts: Vec<_> = parts.iter().map(|part| &part.data).collect();
        match parts.as_slice() {
            [] => Ok(none.detach()),
            [one] => Ok(Self::of((*one).clone())),
            many => Ok(Self::of(candle_core::Tensor::cat(many, 0)?)),
        }
    }

    /// Copies `source`, of the same shape, into this tensor's place: every tensor that shares it sees
    /// the new elements.
    ///
    /// # Errors
    /// Shapes that differ, or a layout that is not dense.
    pub fn overwrite(&self, source: &Self) -> Result<()> {
        Ok(self.data.slice_set(&source.data, 0, 0)?)
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
