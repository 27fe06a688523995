//! What an optimizer keeps of a parameter from step to step.

use std::iter;

use candle_core::DType;

use super::{
    Tensor,
    rounding::{packed, unpacked},
};
use crate::{error::Result, ledger::MomentDtype};

/// A parameter's f32 master and the running moments of its gradient.
#[derive(Debug)]
pub struct Moments {
    /// In f32 (3, n): all three. In bf16 (2, n): the master, and of each element one word of both
    /// moments, whose lower half is the first.
    pub(super) state: candle_core::Tensor,
    /// How the moments are kept.
    pub(super) dtype: MomentDtype,
}

impl Moments {
    /// `parameter`, of any shape, with moments of zero that are kept in `dtype`.
    ///
    /// # Errors
    /// The device's, out of memory among them.
    pub fn new(parameter: &Tensor, dtype: MomentDtype) -> Result<Self> {
        let n = parameter.elements();
        let master = parameter.data.reshape((1, n))?.to_dtype(DType::F32)?;
        let zeros = candle_core::Tensor::zeros((rows(dtype) - 1, n), DType::F32, master.device())?;
        Ok(Self { state: candle_core::Tensor::cat(&[&master, &zeros], 0)?, dtype })
    }

    /// Parameter, first and second moment, n each, one after another.
    ///
    /// # Errors
    /// The device's.
    pub fn to_vec(&self) -> Result<Vec<f32>> {
        let mut values: Vec<f32> = self.state.flatten_all()?.to_vec1()?;
        match self.dtype {
            MomentDtype::F32 => Ok(values),
            MomentDtype::BF16 => {
                let words = values.split_off(values.len() / 2);
                let moments = words.into_iter().map(|word| unpacked(word.to_bits()));
                let (first, second): (Vec<_>, Vec<_>) = moments.map(<(f32, f32)>::from).unzip();
                Ok([values, first, second].concat())
            }
        }
    }

    /// Takes back what [`Moments::to_vec`] gave.
    ///
    /// # Errors
    /// Another number of elements.
    pub fn restore(&self, values: &[f32]) -> Result<()> {
        let shape = self.state.shape().clone();
        let n = shape.elem_count() / rows(self.dtype);
        anyhow::ensure!(values.len() == 3 * n, "{} values for {n} elements", values.len());
        let values = match self.dtype {
            MomentDtype::F32 => values.to_vec(),
            MomentDtype::BF16 => {
                let (master, moments) = values.split_at(n);
                let (first, second) = moments.split_at(n);
                // What bf16 holds is not rounded, whatever the bits.
                let words = iter::zip(first, second).map(|(m, v)| packed([*m, *v], 0));
                master.iter().copied().chain(words.map(f32::from_bits)).collect()
            }
        };
        let tensor = candle_core::Tensor::from_vec(values, shape, self.state.device())?;
        Ok(self.state.slice_set(&tensor, 0, 0)?)
    }

    /// The master: a view that later updates show through, of the shape of `parameter`.
    ///
    /// # Errors
    /// Another number of elements.
    pub fn master(&self, parameter: &Tensor) -> Result<Tensor> {
        Ok(Tensor::of(self.master_of(&parameter.data)?))
    }

    /// Shows the master's values to who reads `parameter`, where that is not the master itself but
    /// a narrower copy.
    ///
    /// # Errors
    /// Another number of elements.
    pub fn publish(&self, parameter: &Tensor) -> Result<()> {
        Ok(self.publish_to(&parameter.data)?)
    }

    fn master_of(
        &self,
        parameter: &candle_core::Tensor,
    ) -> candle_core::Result<candle_core::Tensor> {
        self.state.narrow(0, 0, 1)?.reshape(parameter.shape())
    }

    pub(super) fn publish_to(&self, parameter: &candle_core::Tensor) -> candle_core::Result<()> {
        match parameter.dtype() {
            DType::F32 => Ok(()),
            narrow => parameter.slice_set(&self.master_of(parameter)?.to_dtype(narrow)?, 0, 0),
        }
    }
}

/// Rows of a state.
pub(super) const fn rows(dtype: MomentDtype) -> usize {
    match dtype {
        MomentDtype::F32 => 3,
        MomentDtype::BF16 => 2,
    }
}
