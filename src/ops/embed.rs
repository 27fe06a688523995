//! Token embedding: rows copied out of a table.

use candle_core::DType;

use super::Tensor;
use crate::{
    error::{Error, Result},
    ledger::Op,
    meter::At,
};

/// Rows `ids` of `table` (V, D), as (batch, ids / batch, D).
///
/// # Errors
/// No ids, a number of ids that is no multiple of `batch`, or an id of V or more.
pub fn embed(at: At, table: &Tensor, ids: &[u32], batch: usize) -> Result<Tensor> {
    let (vocab, width) = table.data.dims2()?;
    if ids.is_empty() || batch == 0 || !ids.len().is_multiple_of(batch) {
        return Err(Error::Prompt(format!("{} tokens make no batch of {batch}", ids.len())).into());
    }
    if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab) {
        return Err(
            Error::Prompt(format!("token id {id} is outside the vocabulary of {vocab}")).into()
        );
    }
    let op = Op::Embed { rows: ids.len() as u64, width: width as u64 };
    let ids = candle_core::Tensor::new(ids, table.device())?.to_dtype(DType::U32)?;
    let rows = at.run(op, table.dtype()?, table.device(), || {
        table.data.index_select(&ids, 0)?.reshape((batch, (), width))
    })?;
    Ok(Tensor::from(rows).made_from(at, table, move |at, dy| embed_grad(at, vocab, &ids, dy)))
}

/// A table of zeros to which each row of the gradient is added at its id.
fn embed_grad(at: At, vocab: usize, ids: &candle_core::Tensor, dy: &Tensor) -> Result<Tensor> {
    let (rows, width) = dy.rows_width()?;
    let op = Op::EmbedGrad { rows, width };
    let table = at.run(op, dy.dtype()?, dy.device(), || {
        let table =
            candle_core::Tensor::zeros((vocab, width as usize), dy.data.dtype(), dy.device())?;
        table.index_add(ids, &dy.data.reshape((rows as usize, width as usize))?.contiguous()?, 0)
    })?;
    Ok(table.into())
}
