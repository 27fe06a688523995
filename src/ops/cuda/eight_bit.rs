//! Products in 8 bits (e4m3): rows and their scales by a kernel of our own, products by cuBLASLt,
//! which multiplies what it sums by both scales.

use candle_core::{DType, Device, Result, Tensor, bail};

use super::{
    Kernels, args, backend,
    call::{E4m3, File},
    light,
};
use crate::ops::launch::Nodes;

/// What a device without them lacks, after the name of the type.
pub(in crate::ops) const NEEDS_FOR_8_BITS: &str = "needs the CPU, or a build for CUDA and a GPU of compute capability 9.0 or later, for which its \
     kernels were built (CUDA_COMPUTE_CAP)";

/// What cuBLASLt is told of a product in 8 bits: out (m, n) = x (m, k) · weightᵀ (n, k), each element
/// times the scales of its row of x and of its row of the weight.
#[derive(Debug, Clone, Copy)]
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
pub(super) struct Scaled {
    /// bf16.
    pub out: u64,
    /// Elements from one row of it to the next.
    pub stride: usize,
    pub x: [u64; 2],
    pub weight: [u64; 2],
    /// m, k and n.
    pub sizes: [usize; 3],
}

impl Kernels {
    /// Whether `device` is a GPU that multiplies in 8 bits, with kernels built for such.
    ///
    /// # Errors
    /// The driver's.
    pub(in crate::ops) fn multiply_8_bits(device: &Device) -> Result<bool> {
        let built = Self::on(device, DType::BF16).is_some() && backend::are_for_hopper();
        Ok(built && backend::capability(device)? >= 90)
    }

    /// Places for rows in 8 bits, and for their scales.
    ///
    /// # Errors
    /// The device's, out of memory among them.
    pub(in crate::ops) fn empty_8_bits(
        &self,
        (rows, width): (usize, usize),
    ) -> Result<crate::ops::eight_bit::Narrow> {
        let codes = self.empty((rows, width), DType::F8E4M3)?;
        Ok(crate::ops::eight_bit::Narrow { codes, scales: self.empty(rows, DType::F32)? })
    }

    /// The rows of x (rows, width) in 8 bits, each divided by its scale.
    ///
    /// # Errors
    /// Rows that are too wide, or places that are not as large; the device's.
    pub(in crate::ops) fn quantize(
        &self,
        nodes: &Nodes,
        x: &Tensor,
        [codes, scales]: [&Tensor; 2],
    ) -> Result<()> {
        let call = self.call(nodes, File::Rows, "quantize");
        let all = call.rows(x)?;
        let fits = codes.dims() == x.dims() && scales.elem_count() == all.rows;
        call.check(fits, &[x, codes, scales])?;
        let args = args::Quantize {
            codes: call.writes::<E4m3>(codes)?,
            scales: call.writes(scales)?,
            x: call.reads(x)?,
            rows: all.rows as u64,
            width: all.width,
        };
        // SAFETY: x and the codes have these rows, and the scales one for each.
        unsafe { all.start(&call, &args) }
    }

    /// out (m, n), which may be columns of a wider matrix, = x (m, k) · weightᵀ (n, k), times the
    /// scales of the rows of both.
    ///
    /// # Errors
    /// Shapes that do not multiply, or widths that cuBLASLt does not take; the device's.
    pub(in crate::ops) fn eight_bit_product(
        &self,
        nodes: &Nodes,
        out: &Tensor,
        x: [&Tensor; 2],
        weight: [&Tensor; 2],
    ) -> Result<()> {
        let call = self.call(nodes, File::Rows, "of cuBLASLt");
        let [rows, columns, stride] = call.columns(out)?;
        let ([m, k], [n, of_weight]) = (call.dims(x[0])?, call.dims(weight[0])?);
        let scaled = [x[1].elem_count(), weight[1].elem_count()] == [m, n];
        let fits = [rows, columns] == [m, n] && of_weight == k && scaled;
        call.check(fits && k > 0, &[out, x[0], x[1], weight[0], weight[1]])?;
        if self.dtype != DType::BF16 || ![k, n, stride].iter().all(|n| n.is_multiple_of(16)) {
            bail!(
                "cuBLASLt gives fp8 products of {k} and {n} columns no place in {:?}",
                self.dtype
            );
        }
        if out.elem_count() == 0 {
            return Ok(());
        }
        let read = |[codes, scales]: [&Tensor; 2]| -> Result<[u64; 2]> {
            let (codes, scales) = (call.reads::<E4m3>(codes)?, call.reads::<f32>(scales)?);
            Ok([codes.address(), scales.address()])
        };
        let (x, weight) = (read(x)?, read(weight)?);
        let out = call.writes_from::<super::Element>(out)?.address();
        let stride = if m == 1 { n } else { stride };
        let scaled = Scaled { out, stride, x, weight, sizes: [m, k, n] };
        // SAFETY: all are of these sizes and types, and live until the product is done, since one
        // stream alone is used; no two elements of `out` are in one place.
        unsafe { light::scaled_product(&self.device, nodes, scaled) }
    }
}
