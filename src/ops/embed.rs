//! Token embedding: rows copied out of a table.

use candle_core::{DType, Device};

use super::{Kernel, Nodes, Ops, Tensor, Unshared, cuda::Kernels, scale};
use crate::{
    error::{Error, Result},
    ledger::Op,
    meter::At,
};

/// Which tokens are fed.
#[derive(Debug, Clone, Copy)]
pub enum Ids<'a> {
    /// A batch of equally long sequences, one after another.
    Host {
        /// Tokens of all of them.
        ids: &'a [u32],
        /// Sequences.
        batch: usize,
    },
    /// One token of each sequence, (1, B), where it was chosen.
    Device(&'a candle_core::Tensor),
}

/// Rows `ids` of `table` (V, D), as (B, T, D), times a factor where there is one.
///
/// # Errors
/// No ids, a number of ids that is no multiple of the batch, or an id of V or more.
pub fn embed(at: At, table: &Tensor, ids: Ids, factor: Option<&Tensor>) -> Result<Unshared> {
    let (ids, batch) = match ids {
        Ids::Host { ids, batch } => (on_device(table, ids, batch)?, batch),
        Ids::Device(ids) => {
            if let Some(embedded) = super::block::embed_chosen(at, table, ids, factor)? {
                return Ok(embedded);
            }
            (ids.flatten_all()?, ids.elem_count())
        }
    };
    let rows = at.launch(&Embed { table, ids: &ids, batch })?;
    let vocab = table.dims()[0];
    let rows =
        rows.made_from(at, table, move |at, dy| at.launch(&EmbedGrad { vocab, ids: &ids, dy }));
    Ok(Unshared(factor.map_or(Ok(rows.clone()), |factor| scale(at, &rows, factor))?))
}

fn on_device(table: &Tensor, ids: &[u32], batch: usize) -> Result<candle_core::Tensor> {
    let (vocab, _) = table.data.dims2()?;
    if ids.is_empty() || batch == 0 || !ids.len().is_multiple_of(batch) {
        return Err(Error::Prompt(format!("{} tokens make no batch of {batch}", ids.len())).into());
    }
    if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab) {
        let why = format!("token id {id} is outside the vocabulary of {vocab}");
        return Err(Error::Prompt(why).into());
    }
    Ok(candle_core::Tensor::new(ids, table.device())?.to_dtype(DType::U32)?)
}

struct Embed<'a> {
    table: &'a Tensor,            // (V, D)
    ids: &'a candle_core::Tensor, // (B·T)
    batch: usize,
}

impl Kernel for Embed<'_> {
    type Output = Tensor;

    fn device(&self) -> &Device {
        self.table.device()
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        let (rows, (_, width)) = (self.ids.dim(0)? as u64, self.table.data.dims2()?);
        ops.add(Op::Embed { rows, width: width as u64 }, self.table.dtype()?);
        Ok(())
    }

    fn run(&self, _: &Nodes) -> candle_core::Result<Tensor> {
        let width = self.table.data.dim(1)?;
        let rows = self.table.data.index_select(self.ids, 0)?;
        Ok(Tensor::of(rows.reshape((self.batch, (), width))?))
    }
}

/// A table of zeros to which each row of the gradient is added at its id.
struct EmbedGrad<'a> {
    vocab: usize,
    ids: &'a candle_core::Tensor,
    dy: &'a Tensor,
}

impl Kernel for EmbedGrad<'_> {
    type Output = Tensor;

    fn device(&self) -> &Device {
        self.dy.device()
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        let (rows, width) = self.dy.rows_width()?;
        ops.add(Op::EmbedGrad { rows, width }, self.dy.dtype()?);
        Ok(())
    }

    fn run(&self, nodes: &Nodes) -> candle_core::Result<Tensor> {
        let dy = &self.dy.data;
        let rows = dy.reshape((self.ids.dim(0)?, ()))?.contiguous()?;
        if let Some(kernels) = Kernels::of(&[&rows]) {
            return Ok(Tensor::of(kernels.embed_grad(nodes, self.vocab, self.ids, &rows)?));
        }
        let zeros = (self.vocab, rows.dim(1)?);
        let table = candle_core::Tensor::zeros(zeros, dy.dtype(), dy.device())?;
        Ok(Tensor::of(table.index_add(self.ids, &rows, 0)?))
    }
}
