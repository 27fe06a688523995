//! Kernels for the CPU: in f32, on all threads, by loops that vectorize.

mod blocks;
mod by_row;
mod e4m3;
mod exp;
mod gemv;
mod loss;
mod norm;
mod optimize;
mod product;
mod softmax;

pub(super) use blocks::{row_dots, scores_grad, softmax_again, softmax_kept};
pub(super) use by_row::{add_into, map};
pub(super) use e4m3::{product as eight_bit_product, quantized};
pub(super) use gemv::{gemv, takes_few_rows};
pub(super) use loss::{cross_entropy, cross_entropy_grad};
pub(super) use norm::rms_norm_grad;
pub(super) use optimize::{adamw, sum_squares};
pub(super) use product::{product, serves};
pub(super) use softmax::{softmax, softmax_grad};

use candle_core::{DType, Result, Tensor};

/// `t` as the dense f32 that kernels here take, whatever its type.
fn widened(t: &Tensor) -> Result<Tensor> {
    t.to_dtype(DType::F32)?.contiguous()
}
