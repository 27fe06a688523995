//! What stands in for the driver in a build without CUDA.

use candle_core::{Device, Result, Tensor};

use super::{Arg, File};

pub(in crate::ops) enum Graph {}

impl Graph {
    pub(in crate::ops) fn record(
        _: &Device,
        _: impl FnOnce() -> crate::error::Result<()>,
    ) -> crate::error::Result<Self> {
        anyhow::bail!("this build has no CUDA graphs")
    }

    pub(in crate::ops) fn replay(&self) -> crate::error::Result<()> {
        match *self {}
    }
}

pub(in crate::ops) fn product(
    _: &Device,
    _: (&Tensor, usize, usize),
    _: &Tensor,
    _: &Tensor,
    _: bool,
) -> Result<()> {
    candle_core::bail!("this build has no cuBLAS")
}

pub(super) fn launch(
    _: &Device,
    _: File,
    name: &str,
    _: [u64; 3],
    _: u32,
    _: &[Arg],
) -> Result<()> {
    candle_core::bail!("this build has no CUDA kernel `{name}`")
}
