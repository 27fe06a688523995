//! Matrix products, by gemm's kernels.
//!
//! Left to itself, gemm gives each thread a share once and for all and has all of them pack the
//! same weight; pieces of the output, each packed and computed by whoever is free, are up to twice
//! as fast. Same multiplications, same sums.

use candle_core::{CpuStorage, CustomOp2, DType, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

/// Whether candle would use gemm too, and not a library of the vendor's.
const OURS: bool = !cfg!(any(feature = "mkl", feature = "accelerate"));

/// Whether [`product`] takes both.
pub(in crate::ops) fn serves(a: &Tensor, b: &Tensor) -> bool {
    OURS && [a, b].iter().all(|t| t.device().is_cpu() && t.dtype() == DType::F32)
}

/// a (…, m, k) · b (…, k, n) in f32, leading dimensions equal, of any layout.
pub(in crate::ops) fn product(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    a.apply_op2_no_bwd(b, &Product)
}

struct Product;

impl CustomOp2 for Product {
    fn name(&self) -> &'static str {
        "product"
    }

    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        a_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (CpuStorage::F32(a), CpuStorage::F32(b)) = (a, b) else { bail!("takes f32") };
        let (a, b) = (Matrices::new(a, a_layout)?, Matrices::new(b, b_layout)?);
        let (m, k, n) = (a.rows, a.columns, b.columns);
        if b.rows != k || a.starts.len() != b.starts.len() {
            bail!("{:?} times {:?}", a_layout.shape(), b_layout.shape());
        }
        let mut shape = a_layout.dims().to_vec();
        shape[a_layout.dims().len() - 1] = n;

        let elements = a.starts.len() * m * n;
        let mut out = Vec::<f32>::with_capacity(elements);
        let pieces = pieces(a.starts.len(), m, n);
        let destination = Destination(out.as_mut_ptr());
        let run = |&Piece { batch, rows: (i, height), columns: (j, width) }: &Piece| {
            let (a_row, a_column) = a.strides;
            let (b_row, b_column) = b.strides;
            // SAFETY: `Matrices` found every element that its starts and strides lead to within
            // its slice; no element of `out` is in two pieces, and gemm is told not to read it.
            unsafe {
                gemm::gemm(
                    height,
                    width,
                    k,
                    destination.at((batch * m + i) * n + j),
                    1,
                    n as isize,
                    false,
                    a.values.as_ptr().add(a.starts[batch] + i * a_row),
                    a_column as isize,
                    a_row as isize,
                    b.values.as_ptr().add(b.starts[batch] + j * b_column),
                    b_column as isize,
                    b_row as isize,
                    0.0,
                    1.0,
                    false,
                    false,
                    false,
                    gemm::Parallelism::None,
                );
            }
        };
        match elements * k < FEW {
            true => pieces.iter().for_each(run),
            false => pieces.par_iter().with_max_len(1).for_each(run),
        }
        // SAFETY: the pieces cover all elements, and gemm wrote each of them.
        unsafe { out.set_len(elements) };
        Ok((CpuStorage::F32(out), shape.into()))
    }
}

/// Fewer multiplications than this are not worth waking a thread for.
const FEW: usize = 1 << 19;

/// Rows or columns of a piece come in as many: what gemm's kernels take at once.
const SIDE: usize = 64;

/// (start, length) of the rows and columns of one product's output.
struct Piece {
    batch: usize,
    rows: (usize, usize),
    columns: (usize, usize),
}

/// The output in a few pieces a thread, to even out their speed: by columns as far as that goes,
/// since each column of pieces packs its part of b once.
fn pieces(batches: usize, m: usize, n: usize) -> Vec<Piece> {
    let wanted = (4 * rayon::current_num_threads()).div_ceil(batches.max(1));
    let cut = |length: usize, parts: usize| -> Vec<(usize, usize)> {
        let side = length.div_ceil(parts).next_multiple_of(SIDE);
        (0..length).step_by(side).map(|start| (start, side.min(length - start))).collect()
    };
    let columns = cut(n, wanted);
    let rows = cut(m, wanted.div_ceil(columns.len().max(1)));
    let (rows, columns) = (&rows, &columns);
    let of_batch = |batch| {
        let piece = move |rows| columns.iter().map(move |&columns| Piece { batch, rows, columns });
        rows.iter().copied().flat_map(piece)
    };
    (0..batches).flat_map(of_batch).collect()
}

/// Where pieces write, each to its own elements.
struct Destination(*mut f32);

// SAFETY: only handed to pieces, which do not overlap.
unsafe impl Sync for Destination {}

impl Destination {
    fn at(&self, index: usize) -> *mut f32 {
        self.0.wrapping_add(index)
    }
}

/// Matrices of one size, anywhere in a slice.
struct Matrices<'a> {
    values: &'a [f32],
    starts: Vec<usize>,
    rows: usize,
    columns: usize,
    /// From row to row, from column to column.
    strides: (usize, usize),
}

impl<'a> Matrices<'a> {
    fn new(values: &'a [f32], layout: &Layout) -> Result<Self> {
        let (&[ref batches @ .., rows, columns], &[ref steps @ .., row, column]) =
            (layout.dims(), layout.stride())
        else {
            bail!("{:?} is no matrix", layout.shape());
        };
        let mut starts = vec![layout.start_offset()];
        for (&count, &step) in batches.iter().zip(steps) {
            starts = starts.iter().flat_map(|s| (0..count).map(move |i| s + i * step)).collect();
        }
        let end = rows.saturating_sub(1) * row + columns.saturating_sub(1) * column;
        match starts.iter().max() {
            Some(last) if last + end >= values.len() => bail!("{layout:?} leaves its storage"),
            _ => Ok(Self { values, starts, rows, columns, strides: (row, column) }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn it_equals_candles_product_in_every_layout() {
        let random = |shape: &[usize]| Tensor::randn(0f32, 1., shape, &Device::Cpu).unwrap();
        let check = |a: &Tensor, b: &Tensor| {
            let ours = product(a, b).unwrap();
            let worst = (ours - a.matmul(b).unwrap()).unwrap().abs().unwrap().flatten_all();
            let worst = worst.unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
            assert!(worst < 1e-3, "{:?} · {:?}: {worst}", a.layout(), b.layout());
        };
        for (m, k, n) in [(1, 1, 1), (3, 7, 5), (100, 33, 130), (300, 64, 200), (8, 500, 700)] {
            check(&random(&[m, k]), &random(&[k, n]));
            check(&random(&[k, m]).t().unwrap(), &random(&[k, n]));
            check(&random(&[m, k]), &random(&[n, k]).t().unwrap());
            check(&random(&[2, m, k]), &random(&[2, k, n]));
            let held = random(&[2, 3, n + 9, k]).narrow(2, 4, n).unwrap();
            check(&random(&[2, 3, m, k]), &held.t().unwrap());
        }
        let unlike = (random(&[4, 3]), random(&[4, 3]));
        assert!(product(&unlike.0, &unlike.1).is_err());
    }
}
