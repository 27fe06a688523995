//! Products of few rows by our own kernels.

use candle_core::{DType, Result, Tensor, bail};

use super::{
    Gate, Kernels, Norm,
    args::{self, Ahead, Weights},
    call::{Call, Element, File, Read, Write, blocks},
    tiles::{
        PROJECT_ADD_SHAPES, PROJECT_GATED_SHAPES, PROJECT_SHAPES, PROJECT_THREADS, TILE_COLUMNS,
        TILE_ROWS, TILE_WARPS, TILES,
    },
};
use crate::ops::launch::Nodes;

/// Where products go, and what happens to them.
#[derive(Debug, Clone, Copy)]
pub(in crate::ops) enum Out<'a> {
    /// (B, Σn), beside one another.
    Plain(&'a Tensor),
    /// (B, n), to which the product is added.
    Added(&'a Tensor),
    /// (B, n), the first one's activation times the second.
    Gated(Gate, &'a Tensor),
}

/// Products of x (B, k), normed first where a norm is given, with up to three weights.
#[derive(Debug, Clone, Copy)]
pub(in crate::ops) struct Project<'a> {
    /// Three products where they are plain, two where they are gated, else one.
    pub out: Out<'a>,
    /// (B, k)
    pub x: &'a Tensor,
    /// Gain of k; none where products are added.
    pub norm: Option<Norm<'a>>,
    /// Each a weight (n, k) and a bias (n).
    pub products: &'a [(&'a Tensor, Option<&'a Tensor>)],
    /// Weights that later kernels read, two at most: they come nearer meanwhile.
    pub ahead: &'a [&'a Tensor],
}

/// What up to three adapters add to products: scaling · low · Bᵀ.
#[derive(Debug, Clone, Copy)]
pub(in crate::ops) struct Adapt<'a> {
    /// (B, Σr), the columns of each adapter beside one another.
    pub x: &'a Tensor,
    /// Each columns (B, n) to add to, and B (n, r); all of one r.
    pub adapters: &'a [(&'a Tensor, &'a Tensor)],
    /// One element.
    pub scaling: &'a Tensor,
}

impl Out<'_> {
    fn tensor(&self) -> &Tensor {
        match self {
            Self::Plain(out) | Self::Added(out) | Self::Gated(_, out) => out,
        }
    }

    /// The kernel, and the one for the tensor cores.
    fn names(&self) -> [&'static str; 2] {
        match self {
            Self::Plain(_) => ["project", "project_tiles"],
            Self::Added(_) => ["project_add", "project_add_tiles"],
            Self::Gated(..) => ["project_gated", "project_gated_tiles"],
        }
    }

    /// (rows of the input at most, rows of the weight a block, packs under way)
    fn shapes(&self) -> &'static [[u32; 3]] {
        match self {
            Self::Plain(_) => &PROJECT_SHAPES,
            Self::Added(_) => &PROJECT_ADD_SHAPES,
            Self::Gated(..) => &PROJECT_GATED_SHAPES,
        }
    }
}

/// How products are cut.
struct Cut {
    tiles: bool,
    /// Rows of the input, or tiles of them, that the kernel is made for.
    variant: u32,
    /// Rows of the weight that a block takes.
    rows: u32,
    threads: u32,
}

/// Most rows that are not worth tiles that they do not fill.
const ROWS_WITHOUT_TILES: usize = 2;

/// Most rows of the input of one product, and of several beside one another.
const MOST_ROWS: usize = 32;
const MOST_ROWS_BESIDE: usize = 64;

/// How products of so many rows are cut; none where no kernel serves.
fn cut(dtype: DType, rows: usize, shapes: &[[u32; 3]]) -> Option<Cut> {
    if dtype == DType::BF16 && rows > ROWS_WITHOUT_TILES {
        let [tiles] = TILES.into_iter().find(|[n]| rows <= (n * TILE_COLUMNS) as usize)?;
        return Some(Cut {
            tiles: true,
            variant: tiles,
            rows: TILE_ROWS,
            threads: TILE_WARPS * 32,
        });
    }
    let &[most, each, _] = shapes.iter().find(|&&[most, ..]| rows <= most as usize)?;
    Some(Cut { tiles: false, variant: most, rows: each, threads: PROJECT_THREADS })
}

impl Call<'_> {
    /// Weights (n, k) with their biases, and each one's n.
    fn weights(
        &self,
        products: &[(&Tensor, Option<&Tensor>)],
        k: usize,
    ) -> Result<(Weights, Vec<usize>)> {
        if !(1..=3).contains(&products.len()) {
            bail!("{} weights for a kernel of products", products.len());
        }
        let mut heights = vec![];
        for (weight, bias) in products {
            let [n, width] = self.dims(weight)?;
            let fits = bias.is_none_or(|bias| bias.elem_count() == n);
            self.check(width == k && fits, &[weight])?;
            heights.push(n);
        }
        let mut ends = [0; 3];
        for (i, end) in ends.iter_mut().enumerate() {
            *end = self.size(heights.iter().take(i + 1).sum())?;
        }
        let weights = Weights {
            weights: self.reads_all(products.iter().map(|&(weight, _)| Some(weight)))?,
            biases: self.reads_all(products.iter().map(|&(_, bias)| bias))?,
            ends,
        };
        Ok((weights, heights))
    }

    /// What is to be fetched ahead.
    fn ahead(&self, tensors: &[&Tensor]) -> Result<[Ahead; 2]> {
        let mut all = [Ahead { weight: Read::NULL, bytes: 0 }; 2];
        if tensors.len() > all.len() {
            bail!("{} weights to fetch ahead", tensors.len());
        }
        for (to, tensor) in all.iter_mut().zip(tensors) {
            let bytes = tensor.elem_count() * tensor.dtype().size_in_bytes();
            *to = Ahead { weight: self.reads(tensor)?, bytes: bytes as u64 };
        }
        Ok(all)
    }
}

impl Kernels {
    /// Whether [`Self::project`] is to take `products` products of so many rows beside one another:
    /// with more, cuBLAS is faster, which runs each by itself.
    pub(in crate::ops) fn project_serves(dtype: DType, rows: usize, products: usize) -> bool {
        let most = if products > 1 { MOST_ROWS_BESIDE } else { MOST_ROWS };
        matches!(dtype, DType::F32 | DType::BF16)
            && rows <= most
            && cut(dtype, rows, &PROJECT_SHAPES).is_some()
    }

    /// Products of few rows.
    ///
    /// # Errors
    /// More rows than [`Self::project_serves`], k that is no multiple of 8, shapes that do not fit
    /// one another; the device's.
    pub(in crate::ops) fn project(&self, nodes: &Nodes, p: Project) -> Result<()> {
        let Project { out, x, norm, products, ahead } = p;
        let [name, by_tiles] = out.names();
        let (&[rows, ..], shapes) = (x.dims(), out.shapes()) else {
            bail!("kernel {name} does not take a scalar")
        };
        let Some(cut) = cut(self.dtype, rows, shapes) else {
            bail!("kernel {name} does not take {rows} rows of {:?}", self.dtype);
        };
        let call = self.call(nodes, File::Products, if cut.tiles { by_tiles } else { name });
        let [batch, k] = call.dims(x)?;
        let (mut weights, heights) = call.weights(products, k)?;
        let n = match (out, heights.as_slice()) {
            (Out::Plain(_), all) => all.iter().sum(),
            (Out::Added(_), &[n]) if norm.is_none() => n,
            (Out::Gated(..), &[n, other]) if n == other => {
                // A row of both gives one column.
                weights.ends = [call.size(n)?; 3];
                n
            }
            (_, all) => {
                let with = if norm.is_some() { "a norm and " } else { "" };
                bail!("kernel {name} does not take {with}weights of {all:?} rows")
            }
        };
        let to = out.tensor();
        call.check(k.is_multiple_of(8) && k > 0 && to.dims() == [batch, n], &[to, x])?;
        let args = args::Project {
            out: call.writes(to)?,
            x: call.reads(x)?,
            norm: call.norm(norm, k)?,
            w: weights,
            ahead: call.ahead(ahead)?,
            batch: call.size(batch)?,
            k: call.size(k)?,
            gelu: matches!(out, Out::Gated(Gate::Gelu, _)).into(),
        };
        // SAFETY: x and out have `batch` rows, of k and n; the weights have n rows of k.
        unsafe { call.start(&[cut.variant], blocks(n, cut.rows), cut.threads, &args) }
    }

    /// Adds what adapters make of their inputs to the columns that are theirs.
    ///
    /// # Errors
    /// Shapes that do not fit one another; the device's.
    pub(in crate::ops) fn adapt(&self, nodes: &Nodes, a: Adapt) -> Result<()> {
        let call = self.call(nodes, File::Products, "adapt");
        let [batch, columns] = call.dims(a.x)?;
        let rank = columns / a.adapters.len().max(1);
        call.check(rank * a.adapters.len() == columns, &[a.x])?;
        let products: Vec<_> = a.adapters.iter().map(|&(_, b)| (b, None)).collect();
        let (w, heights) = call.weights(&products, rank)?;
        let (mut outs, mut strides) = ([Write::NULL; 3], [0; 3]);
        for (i, ((out, b), n)) in a.adapters.iter().zip(&heights).enumerate() {
            let [rows, width, stride] = call.columns(out)?;
            call.check((rows, width) == (batch, *n), &[out, a.x, b])?;
            (outs[i], strides[i]) = (call.writes_from::<Element>(out)?, call.size(stride)?);
        }
        call.check(a.scaling.elem_count() == 1, &[a.scaling])?;
        let args = args::Adapt {
            outs,
            strides,
            w,
            low: call.reads(a.x)?,
            scaling: call.reads(a.scaling)?,
            columns: call.size(columns)?,
            rank: call.size(rank)?,
        };
        let [along, ..] = blocks(heights.iter().sum(), PROJECT_THREADS);
        // SAFETY: each out has `batch` rows of its B's n, and low has `rank` columns for each.
        unsafe { call.start(&[], [along, batch, 1], PROJECT_THREADS, &args) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_rows_are_taken_beside_one_another() {
        let serves = Kernels::project_serves;
        for (rows, alone, beside) in [(32, true, true), (33, false, true), (65, false, false)] {
            assert_eq!(serves(DType::BF16, rows, 1), alone, "{rows}");
            assert_eq!(serves(DType::BF16, rows, 3), beside, "{rows}");
        }
        assert!(!serves(DType::F32, 9, 3) && !serves(DType::F16, 1, 1));
    }

    #[test]
    fn few_rows_have_kernels() {
        for shapes in [PROJECT_SHAPES, PROJECT_ADD_SHAPES, PROJECT_GATED_SHAPES] {
            let of = |dtype, rows| cut(dtype, rows, &shapes).map(|cut| (cut.tiles, cut.variant));
            assert_eq!(of(DType::F32, 1), Some((false, 1)));
            assert_eq!(of(DType::F32, 3), Some((false, 4)));
            assert_eq!(of(DType::F32, 8), Some((false, 8)));
            assert_eq!(of(DType::F32, 9), None);
            assert_eq!(of(DType::BF16, 2), Some((false, 2)));
            assert_eq!(of(DType::BF16, 3), Some((true, 1)));
            assert_eq!(of(DType::BF16, 17), Some((true, 4)));
            assert_eq!(of(DType::BF16, 64), Some((true, 8)));
            assert_eq!(of(DType::BF16, 65), None);
        }
    }
}
