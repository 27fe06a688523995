//! The same of weights in 8 bits: what they read is put into 8 bits once, then multiplied by a library.

use super::{
    super::{
        EightBit, Tensor,
        eight_bit::{Multiply, Narrow, Quantize},
    },
    Product, first_in_8_bits,
    fused::Fused,
    launches::BiasInto,
};
use crate::error::Result;

/// Whether weights of `products` are in 8 bits: of projections of one input, all are or none.
pub(super) fn are_narrow(products: &[Product]) -> bool {
    first_in_8_bits(products).is_some()
}

impl Fused<'_> {
    /// `products` of x (B, k) with their biases, each into its `outs` (B, n), which may be columns of a
    /// wider matrix.
    pub(super) fn narrow_products(
        &self,
        outs: &[candle_core::Tensor],
        x: &candle_core::Tensor,
        products: &[Product],
    ) -> Result<()> {
        let Some(first) = products.first() else { return Ok(()) };
        let (rows, width) = x.dims2()?;
        let (kernels, workspace) = (&self.kernels, self.workspace);
        let codes = workspace.take_8_bits(kernels, (rows, width))?;
        let scales = workspace.take_f32(kernels, (1, rows))?;
        let into = Narrow { codes: codes.0.data.clone(), scales: scales.0.data.reshape(rows)? };
        let narrow = first.at.launch(&Quantize { x, into: Some(into) })?;
        for (product, out) in products.iter().zip(outs) {
            let Product { at, weight, eight_bit: Some(EightBit { scales, .. }), bias, .. } =
                product
            else {
                anyhow::bail!("a weight that is not in 8 bits among such as are");
            };
            let weight = Narrow { codes: weight.data.clone(), scales: scales.data.clone() };
            at.launch(&Multiply { x: &narrow, weight: &weight, like: x, into: Some(out) })?;
            if let Some(bias) = bias {
                at.launch(&BiasInto { kernels, out, bias })?;
            }
        }
        Ok(())
    }

    /// Two products of x (B, k) with their adapters, each (B, 1, n).
    pub(super) fn two_narrow(
        &self,
        x: &candle_core::Tensor,
        products: [Product; 2],
    ) -> Result<[Tensor; 2]> {
        let [first, second] = products.each_ref().map(|product| product.weight.dims()[0]);
        let (first, second) = (self.take(first)?, self.take(second)?);
        let outs = [first.0.data.clone(), second.0.data.clone()];
        self.narrow_products(&outs, x, &products)?;
        let shape = |n: usize| (self.rows(), 1, n);
        let (n, m) = (first.dims()[1], second.dims()[1]);
        let both = [first.reshape(shape(n))?.share(), second.reshape(shape(m))?.share()];
        self.adapt(x, &products, &both)?;
        Ok(both)
    }
}
