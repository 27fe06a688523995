//! What stands in for the driver in a build without CUDA.

use candle_core::{DType, Device, Result, Tensor, bail};

use super::{
    Fault, Listed,
    call::{File, Space},
    eight_bit::Scaled,
    library::Gemm,
};
use crate::{error, ops::launch::Nodes};

/// There is none.
pub(in crate::ops) enum Graph {}

impl Graph {
    pub(in crate::ops) fn record<T>(
        _: &Device,
        _: Option<Fault>,
        _: impl FnOnce() -> error::Result<T>,
    ) -> error::Result<(Self, T)> {
        anyhow::bail!("this build has no CUDA graphs")
    }

    pub(in crate::ops) fn nodes(&self) -> error::Result<Vec<Listed>> {
        match *self {}
    }

    pub(in crate::ops) fn replay(&self) -> error::Result<()> {
        match *self {}
    }
}

pub(super) unsafe fn launch<A: Copy>(
    _: &Device,
    _: &Nodes,
    _: File,
    function: String,
    _: Space,
    _: &A,
) -> Result<()> {
    bail!("this build has no CUDA kernel `{function}`")
}

pub(super) unsafe fn product(_: &Device, _: DType, _: &Nodes, _: Gemm) -> Result<()> {
    bail!("this build has no cuBLAS")
}

pub(super) unsafe fn scaled_product(_: &Device, _: &Nodes, _: Scaled) -> Result<()> {
    bail!("this build has no cuBLASLt")
}

pub(super) fn capability(_: &Device) -> Result<i32> {
    bail!("this build has no GPU")
}

pub(super) fn are_for_hopper() -> bool {
    false
}

pub(super) fn have_warpgroups() -> bool {
    false
}

pub(super) fn room(_: &Device) -> Result<[usize; 2]> {
    bail!("this build has no GPU")
}

pub(super) fn address(tensor: &Tensor) -> Result<u64> {
    bail!("this build has no GPU for {:?}", tensor.layout())
}
