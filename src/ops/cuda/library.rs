//! Products by cuBLAS: of matrices in any layout that it reads, alone or added to what is there.

use std::marker::PhantomData;

use candle_core::{Layout, Result, Tensor, bail};

use super::{Kernels, backend};
use crate::ops::launch::Nodes;

/// Matrices of one size in a GPU's memory, as cuBLAS takes them.
#[derive(Debug, Clone, Copy)]
pub(in crate::ops) struct Matrices<'a> {
    at: u64,
    lie: Lie,
    of: PhantomData<&'a Tensor>,
}

/// How matrices lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Lie {
    batch: usize,
    rows: usize,
    columns: usize,
    /// Whether column after column, and not row after row.
    transposed: bool,
    /// Elements from one of those to the next.
    leading: usize,
    /// Elements from matrix to matrix.
    stride: usize,
}

/// What cuBLAS is told of a product: three matrices by rows, each of `a` and `b` maybe transposed.
#[derive(Debug, Clone, Copy)]
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
pub(super) struct Gemm {
    pub out: Side,
    pub a: Side,
    pub b: Side,
    /// (matrices, rows of a, columns of a, columns of b)
    pub sizes: [i32; 4],
    /// What the product is multiplied by.
    pub factor: f32,
    /// Whether it is added to what `out` holds.
    pub add: bool,
}

/// One of its matrices.
#[derive(Debug, Clone, Copy)]
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
pub(super) struct Side {
    pub at: u64,
    pub transposed: bool,
    pub leading: i32,
    pub stride: i64,
}

impl Lie {
    /// How the last two dimensions of such a tensor lie; none where cuBLAS does not read them so.
    fn of(layout: &Layout) -> Option<Self> {
        let (&[ref counts @ .., rows, columns], &[ref steps @ .., row, column]) =
            (layout.dims(), layout.stride())
        else {
            return None;
        };
        // A stride over one entry says nothing.
        let (transposed, leading) =
            if (column == 1 || columns == 1) && (row >= columns || rows == 1) {
                (false, if rows == 1 { columns } else { row })
            } else if (row == 1 || rows == 1) && (column >= rows || columns == 1) {
                (true, if columns == 1 { rows } else { column })
            } else {
                return None;
            };
        let (mut batch, mut stride) = (1, 0);
        for (&count, &step) in counts.iter().zip(steps).rev().filter(|&(&count, _)| count != 1) {
            match batch {
                1 => stride = step,
                held if step == held * stride => {}
                _ => return None,
            }
            batch *= count;
        }
        Some(Self { batch, rows, columns, transposed, leading: leading.max(1), stride })
    }

    fn t(self) -> Self {
        let Self { rows, columns, transposed, .. } = self;
        Self { rows: columns, columns: rows, transposed: !transposed, ..self }
    }

    /// Whether no element of one is another's too.
    fn is_apart(self) -> bool {
        let lines = if self.transposed { self.columns } else { self.rows };
        self.batch <= 1 || self.stride >= lines * self.leading
    }
}

impl<'a> Matrices<'a> {
    /// Those of (…, rows, columns).
    fn of(tensor: &'a Tensor) -> Result<Self> {
        let Some(lie) = Lie::of(tensor.layout()) else {
            bail!("cuBLAS does not take {:?} by {:?}", tensor.dims(), tensor.stride());
        };
        Ok(Self { at: backend::address(tensor)?, lie, of: PhantomData })
    }

    /// The same, rows and columns exchanged.
    pub(in crate::ops) fn t(self) -> Self {
        Self { lie: self.lie.t(), ..self }
    }

    fn side(self) -> Result<Side> {
        let Lie { transposed, leading, stride, .. } = self.lie;
        Ok(Side { at: self.at, transposed, leading: counted(leading)?, stride: stride as i64 })
    }
}

fn bytes(tensor: &Tensor) -> u64 {
    (tensor.elem_count() * tensor.dtype().size_in_bytes()) as u64
}

fn counted(n: usize) -> Result<i32> {
    i32::try_from(n).map_err(candle_core::Error::wrap)
}

impl Kernels {
    /// Those that multiply `a` by `b`, of whatever layout; none where cuBLAS does not read them.
    pub(in crate::ops) fn multiply(a: &Tensor, b: &Tensor) -> Option<Self> {
        let kernels = Self::on(a.device(), a.dtype())?;
        let reads = |t: &Tensor| kernels.serves(t) && Lie::of(t.layout()).is_some();
        (reads(a) && reads(b)).then_some(kernels)
    }

    /// The last two dimensions of `tensor`.
    ///
    /// # Errors
    /// Another device or type, or a layout that cuBLAS does not read.
    pub(in crate::ops) fn matrices<'a>(&self, tensor: &'a Tensor) -> Result<Matrices<'a>> {
        if !self.serves(tensor) {
            let (is, on) = (tensor.dtype(), tensor.device().location());
            bail!("cuBLAS for {:?} does not take {is:?} on {on:?}", self.dtype);
        }
        Matrices::of(tensor)
    }

    /// Whether matrices (n, k) lie one after another, so that [`Self::stacked`] takes them.
    pub(in crate::ops) fn are_stacked(&self, parts: &[&Tensor]) -> bool {
        self.stacked(parts).is_ok()
    }

    /// Matrices (n, k) that lie one after another, as the rows of one.
    ///
    /// # Errors
    /// Matrices that do not; else as [`Self::matrices`].
    pub(in crate::ops) fn stacked<'a>(&self, parts: &[&'a Tensor]) -> Result<Matrices<'a>> {
        let Some((first, rest)) = parts.split_first() else { bail!("no matrices") };
        let mut all = self.matrices(first)?;
        let mut end = all.at + bytes(first);
        // Each is in memory of its own as much as in its neighbours': all of it lives.
        for part in rest {
            let Matrices { at, lie, .. } = self.matrices(part)?;
            let (n, k) = part.dims2()?;
            let dense = first.is_contiguous() && part.is_contiguous() && first.rank() == 2;
            if !(dense && at == end && k == all.lie.columns) {
                bail!("{:?} is not behind {:?}", lie, all.lie);
            }
            all.lie.rows += n;
            end += bytes(part);
        }
        Ok(all)
    }

    /// a (…, m, k) · b (…, k, n), leading dimensions equal: (…, m, n).
    ///
    /// # Errors
    /// Shapes that do not multiply, layouts that cuBLAS does not read; the device's.
    pub(in crate::ops) fn product(&self, nodes: &Nodes, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        let (&[ref leading @ .., m, _], &[ref others @ .., _, n]) = (a.dims(), b.dims()) else {
            bail!("{:?} times {:?}", a.dims(), b.dims());
        };
        if leading != others {
            bail!("{:?} times {:?}", a.dims(), b.dims());
        }
        let out = self.empty([leading, &[m, n]].concat(), self.dtype)?;
        self.product_into(nodes, &out, self.matrices(a)?, self.matrices(b)?, None)?;
        Ok(out)
    }

    /// out (…, m, n), which may be columns of a wider matrix, = a (…, m, k) · b (…, k, n); where
    /// there is a factor, that times the product is added to what `out` holds.
    ///
    /// # Errors
    /// Shapes that do not multiply, an `out` that is transposed or not as large; the device's.
    pub(in crate::ops) fn product_into(
        &self,
        nodes: &Nodes,
        out: &Tensor,
        a: Matrices,
        b: Matrices,
        added: Option<f32>,
    ) -> Result<()> {
        let to = self.matrices(out)?;
        let (x, y, z) = (a.lie, b.lie, to.lie);
        let fits = [y.rows, y.batch] == [x.columns, x.batch]
            && [z.batch, z.rows, z.columns] == [x.batch, x.rows, y.columns];
        if !(fits && !z.transposed && z.is_apart() && x.columns > 0) {
            let shape = |l: Lie| [l.batch, l.rows, l.columns];
            let [x, y, z] = [shape(x), shape(y), shape(z)];
            bail!("cuBLAS does not take {x:?} times {y:?} into {z:?} by {:?}", out.stride());
        }
        if out.elem_count() == 0 {
            return Ok(());
        }
        let gemm = Gemm {
            out: to.side()?,
            a: a.side()?,
            b: b.side()?,
            sizes: [counted(x.batch)?, counted(x.rows)?, counted(x.columns)?, counted(y.columns)?],
            factor: added.unwrap_or(1.0),
            add: added.is_some(),
        };
        // SAFETY: all three are of these sizes and this type, and live until the product is done,
        // since one stream alone is used; no two elements of `out` are in one place.
        unsafe { backend::product(&self.device, self.dtype, nodes, gemm) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};

    fn lie(t: &Tensor) -> Option<[usize; 6]> {
        let Lie { batch, rows, columns, transposed, leading, stride } = Lie::of(t.layout())?;
        Some([batch, rows, columns, usize::from(transposed), leading, stride])
    }

    #[test]
    fn layouts_are_told_as_they_are() -> Result<()> {
        let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu);
        let (matrix, many) = (zeros(&[5, 7])?, zeros(&[2, 3, 5, 7])?);
        assert_eq!(lie(&matrix), Some([1, 5, 7, 0, 7, 0]));
        assert_eq!(lie(&matrix.t()?), Some([1, 7, 5, 1, 7, 0]));
        assert_eq!(lie(&matrix.narrow(1, 2, 3)?), Some([1, 5, 3, 0, 7, 0]));
        assert_eq!(lie(&matrix.narrow(0, 2, 1)?), Some([1, 1, 7, 0, 7, 0]));
        // A column of a matrix: entries a row apart.
        assert_eq!(lie(&matrix.narrow(1, 2, 1)?), Some([1, 5, 1, 0, 7, 0]));
        assert_eq!(lie(&matrix.narrow(1, 2, 1)?.t()?), Some([1, 1, 5, 1, 7, 0]));
        assert_eq!(lie(&many), Some([6, 5, 7, 0, 7, 35]));
        assert_eq!(lie(&many.t()?), Some([6, 7, 5, 1, 7, 35]));
        assert_eq!(lie(&many.narrow(0, 1, 1)?), Some([3, 5, 7, 0, 7, 35]));
        // Part of what a cache holds: heads further apart than they are long.
        assert_eq!(lie(&many.narrow(2, 1, 2)?), Some([6, 2, 7, 0, 7, 35]));
        assert_eq!(lie(&many.narrow(1, 0, 2)?), None);
        assert_eq!(lie(&many.transpose(0, 1)?), None);
        assert_eq!(lie(&many.transpose(1, 2)?.narrow(0, 0, 1)?), Some([5, 3, 7, 0, 35, 7]));
        assert_eq!(lie(&many.transpose(0, 3)?), None);
        assert_eq!(lie(&zeros(&[4])?), None);
        Ok(())
    }

    #[test]
    fn matrices_that_share_elements_are_not_written() -> Result<()> {
        let many = Tensor::zeros((1, 5, 7), DType::F32, &Device::Cpu)?;
        let apart = |t: &Tensor| Lie::of(t.layout()).map(Lie::is_apart);
        assert_eq!(apart(&many), Some(true));
        assert_eq!(apart(&many.broadcast_as((3, 5, 7))?), Some(false));
        Ok(())
    }
}
