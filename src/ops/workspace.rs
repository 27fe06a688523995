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
pub struct Workspace(RefCell<Vec<(candle_core::Tensor, Lease)>>);

impl Workspace {
    /// A buffer of `shape` for tensors of `kernels`, of which every element is about to be written.
    ///
    /// # Errors
    /// The device's, out of memory among them.
    pub(super) fn take(&self, kernels: &Kernels, shape: (usize, usize)) -> Result<Unshared> {
        self.of(kernels, shape, kernels.dtype())
    }

    fn of(&self, kernels: &Kernels, shape: (usize, usize), dtype: DType) -> Result<Unshared> {
        let mut buffers = self.0.borrow_mut();
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
