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
    let (vocab, width) = table.0.dims2()?;
    if ids.is_empty() || batch == 0 || !ids.len().is_multiple_of(batch) {
        return Err(Error::Prompt(format!("{} tokens make no batch of {batch}", ids.len())).into());
    }
    if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab) {
        return Err(
            Error::Prompt(format!("token id {id} is outside the vocabulary of {vocab}")).into()
        );
    }
    let op = Op::Embed { rows: ids.len() as u64, width: width as u64 };
    at.run(op, table.dtype()?, table.device(), || {
        let ids = candle_core::Tensor::new(ids, table.device())?.to_dtype(DType::U32)?;
        let rows = table.0.index_select(&ids, 0)?;
        Ok(Tensor(rows.reshape((batch, (), width))?))
    })
}
