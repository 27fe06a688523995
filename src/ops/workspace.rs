//! Buffers that ops of one token a sequence write to, step after step: made by the first step, so
//! that a later one can be recorded, and few enough to stay in a GPU's cache.

use std::{cell::RefCell, sync::Arc};

use candle_core::DType;

use super::{Tensor, Unshared, cuda::Kernels};
use crate::error::Result;

/// Held by every tensor that lies in a buffer.
pub(super) type Lease = Arc<()>;

/// Buffers on one device. One is free again as soon as no tensor lies in it: work is done in the
/// order in which it was launched, so whoever reads it last has been launched before.
#[derive(Debug, Default)]
pub struct Workspace {
    buffers: RefCell<Vec<(candle_core::Tensor, Lease)>>,
    counters: RefCell<Vec<candle_core::Tensor>>,
}

impl Workspace {
    /// A buffer of `shape` for tensors of `kernels`, of which every element is about to be written.
    ///
    /// # Errors
    /// The device's, out of memory among them.
    pub(super) fn take(&self, kernels: &Kernels, shape: (usize, usize)) -> Result<Unshared> {
        self.of(kernels, shape, kernels.dtype())
    }

    /// The same of f32, whatever the kernels' type.
    ///
    /// # Errors
    /// The device's, out of memory among them.
    pub(super) fn take_f32(&self, kernels: &Kernels, shape: (usize, usize)) -> Result<Unshared> {
        self.of(kernels, shape, DType::F32)
    }

    /// The same of 8 bits.
    ///
    /// # Errors
    /// The device's, out of memory among them.
    pub(super) fn take_8_bits(&self, kernels: &Kernels, shape: (usize, usize)) -> Result<Unshared> {
        self.of(kernels, shape, DType::F8E4M3)
    }

    /// Counters that are zero before and after each launch, and so may serve all of them.
    ///
    /// # Errors
    /// The device's, out of memory among them.
    pub(super) fn zeros(
        &self,
        kernels: &Kernels,
        shape: (usize, usize),
    ) -> Result<candle_core::Tensor> {
        let mut counters = self.counters.borrow_mut();
        if let Some(found) = counters.iter().find(|found| found.dims() == [shape.0, shape.1]) {
            return Ok(found.clone());
        }
        let zeros = candle_core::Tensor::zeros(shape, DType::U32, kernels.device())?;
        counters.push(zeros.clone());
        Ok(zeros)
    }

    fn of(&self, kernels: &Kernels, shape: (usize, usize), dtype: DType) -> Result<Unshared> {
        let mut buffers = self.buffers.borrow_mut();
        let fits = |(data, lease): &&(candle_core::Tensor, Lease)| {
            Arc::strong_count(lease) == 1
                && data.dims() == [shape.0, shape.1]
                && data.dtype() == dtype
        };
        if let Some((data, lease)) = buffers.iter().find(fits) {
            let tensor = Tensor { data: data.clone(), node: None, lease: Some(lease.clone()) };
            return Ok(Unshared(tensor));
        }
        let (data, lease) = (kernels.empty(shape, dtype)?, Lease::default());
        buffers.push((data.clone(), lease.clone()));
        Ok(Unshared(Tensor { data, node: None, lease: Some(lease) }))
    }
}
