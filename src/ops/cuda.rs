//! Launches of our own CUDA kernels: where candle has none, or needs many launches for one op.
//!
//! A kernel computes in f32 on tensors of f32 or bf16, dense, and runs on the device's one stream.
//! Nothing here is metered: the ops that call it report what a kernel contains.

use candle_core::{DType, Device, Result, Tensor};

/// A file of kernels in `src/ops/cuda`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum File {
    /// Attention of whole sequences.
    Attention,
    /// Prefill and training.
    Rows,
    /// A token for each row of logits.
    Choose,
    /// One token of each sequence: the embedding and attention.
    Decode,
    /// The same: products.
    Products,
}

/// One argument of a kernel.
#[derive(Debug, Clone, Copy)]
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
pub(super) enum Arg<'a> {
    /// Where a tensor's elements begin.
    Of(&'a Tensor),
    /// The same of one whose layout the kernel is told, and which need not be dense.
    Strided(&'a Tensor),
    /// So many elements after the beginning.
    After(&'a Tensor, usize),
    /// No tensor.
    Null,
    U64(u64),
    U32(u32),
    F32(f32),
}

impl<'a> From<Option<&'a Tensor>> for Arg<'a> {
    fn from(tensor: Option<&'a Tensor>) -> Self {
        tensor.map_or(Self::Null, Self::Of)
    }
}

/// Kernels for tensors of one element type on one device.
#[derive(Debug, Clone)]
pub(super) struct Kernels {
    device: Device,
    dtype: DType,
}

impl Kernels {
    /// Those that take all of `tensors`; none where another device, another type or a layout that
    /// they do not read is among them.
    pub(super) fn of(tensors: &[&Tensor]) -> Option<Self> {
        let first = tensors.first()?;
        let kernels = Self::on(first.device(), first.dtype())?;
        let fits = |t: &&Tensor| {
            let start = t.layout().start_offset() * t.dtype().size_in_bytes();
            t.device().is_cuda()
                && t.dtype() == kernels.dtype
                && t.is_contiguous()
                && start.is_multiple_of(16)
        };
        tensors.iter().all(fits).then_some(kernels)
    }

    /// Those for `dtype` on `device`, where there are any.
    pub(super) fn on(device: &Device, dtype: DType) -> Option<Self> {
        let known = matches!(dtype, DType::F32 | DType::BF16);
        let built = cfg!(feature = "cuda") && device.is_cuda() && known;
        built.then(|| Self { device: device.clone(), dtype })
    }

    /// Where their tensors are.
    pub(super) fn device(&self) -> &Device {
        &self.device
    }

    /// The type as kernels' names end in it.
    pub(super) fn suffix(&self) -> &'static str {
        if self.dtype == DType::BF16 { "bf16" } else { "f32" }
    }

    /// Launches `name` on `grid` blocks of `block` threads.
    pub(super) fn launch(
        &self,
        file: File,
        name: &str,
        grid: [u64; 3],
        block: u32,
        args: &[Arg],
    ) -> Result<()> {
        backend::launch(&self.device, file, name, grid, block, args)
    }

    /// A tensor whose elements a kernel is about to write, all of them.
    pub(super) fn output(&self, like: &Tensor) -> Result<Tensor> {
        self.empty(like.shape(), self.dtype)
    }

    fn empty(&self, shape: impl Into<candle_core::Shape>, dtype: DType) -> Result<Tensor> {
        // SAFETY: callers write every element before anything reads one.
        unsafe { Tensor::empty(shape, dtype, &self.device) }
    }

    /// An element-wise kernel over `a`, with `b` again and again where it is smaller.
    pub(super) fn map(&self, name: &str, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        let (n, period) = (a.elem_count(), b.elem_count());
        let out = self.output(a)?;
        let width = pack(n.is_multiple_of(8) && (period == 1 || period.is_multiple_of(8)));
        let args =
            [Arg::Of(&out), Arg::Of(a), Arg::Of(b), Arg::U64(n as u64), Arg::U64(period as u64)];
        let name = format!("{name}_{}_{width}", self.suffix());
        self.launch(File::Rows, &name, threads(n / width, 256), 256, &args)?;
        Ok(out)
    }

    /// (silu(gate) if it is to be kept, silu(gate) · up)
    pub(super) fn gated(
        &self,
        gate: &Tensor,
        up: &Tensor,
        keep: bool,
    ) -> Result<(Option<Tensor>, Tensor)> {
        let act = keep.then(|| self.output(gate)).transpose()?;
        let out = self.output(gate)?;
        self.gated_into(act.as_ref(), &out, gate, up)?;
        Ok((act, out))
    }

    /// out = silu(gate) · up, and act = silu(gate) where it is wanted.
    pub(super) fn gated_into(
        &self,
        act: Option<&Tensor>,
        out: &Tensor,
        gate: &Tensor,
        up: &Tensor,
    ) -> Result<()> {
        let n = gate.elem_count();
        let width = pack(n.is_multiple_of(8));
        let args = [act.into(), Arg::Of(out), Arg::Of(gate), Arg::Of(up), Arg::U64(n as u64)];
        let name = format!("gated_{}_{width}", self.suffix());
        self.launch(File::Rows, &name, threads(n / width, 256), 256, &args)
    }

    /// (towards gate, towards up) from `dy`, the gradient of silu(gate) · up, act being silu(gate).
    pub(super) fn gated_grad(
        &self,
        dy: &Tensor,
        gate: &Tensor,
        up: &Tensor,
        act: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        let n = gate.elem_count();
        let (to_gate, to_up) = (self.output(gate)?, self.output(up)?);
        let width = pack(n.is_multiple_of(8));
        let tensors = [&to_gate, &to_up, dy, gate, up, act].map(Arg::Of);
        let args: Vec<_> = tensors.into_iter().chain([Arg::U64(n as u64)]).collect();
        let name = format!("gated_grad_{}_{width}", self.suffix());
        self.launch(File::Rows, &name, threads(n / width, 256), 256, &args)?;
        Ok((to_gate, to_up))
    }

    /// Adds `bias` (n) to columns of `out` (rows, width) from `after` on, in place.
    pub(super) fn add_bias(&self, out: &Tensor, after: usize, bias: &Tensor) -> Result<()> {
        let ((rows, width), n) = (out.dims2()?, bias.elem_count());
        let args = [
            Arg::After(out, after),
            Arg::Of(bias),
            Arg::U32(rows as u32),
            Arg::U32(width as u32),
            Arg::U32(n as u32),
        ];
        let name = format!("add_bias_{}", self.suffix());
        self.launch(File::Rows, &name, threads(rows * n, 256), 256, &args)
    }

    /// Whether row-wise kernels take rows of `width` elements.
    pub(super) fn takes_rows_of(width: usize) -> bool {
        row_kernel(width).is_some()
    }

    /// A row-wise kernel: `args` follow after tensors, then come rows and width, then `rest`.
    pub(super) fn rows(
        &self,
        name: &str,
        of: &Tensor,
        tensors: &[Arg],
        rest: &[Arg],
    ) -> Result<()> {
        let width = of.dims().last().copied().unwrap_or(1);
        let Some((pack, packs, lanes)) = row_kernel(width) else {
            candle_core::bail!("no kernel `{name}` for rows of {width}");
        };
        let rows = of.elem_count() / width;
        let block = if lanes == 32 { 128 } else { lanes };
        let mut args = tensors.to_vec();
        args.extend([Arg::U64(rows as u64), Arg::U32(width as u32)]);
        args.extend(rest);
        let name = format!("{name}_{}_{pack}_{packs}_{lanes}", self.suffix());
        let blocks = rows.div_ceil((block / lanes) as usize);
        self.launch(File::Rows, &name, [blocks as u64, 1, 1], block, &args)
    }

    /// Logits (rows, V) → exponentials in their place; losses and sums, (rows) in f32.
    pub(super) fn cross_entropy(
        &self,
        logits: &Tensor,
        targets: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        let (rows, width) = logits.dims2()?;
        let (losses, sums) = (self.empty(rows, DType::F32)?, self.empty(rows, DType::F32)?);
        let pack = pack(width.is_multiple_of(8));
        let name = format!("cross_entropy_{}_{pack}", self.suffix());
        let args = [
            Arg::Of(logits),
            Arg::Of(targets),
            Arg::Of(&losses),
            Arg::Of(&sums),
            Arg::U32(width as u32),
        ];
        self.launch(File::Rows, &name, [rows as u64, 1, 1], 1024, &args)?;
        Ok((losses, sums))
    }

    /// Exponentials (rows, V) → gradients in their place.
    pub(super) fn cross_entropy_grad(
        &self,
        exponentials: &Tensor,
        targets: &Tensor,
        weights: &Tensor,
        sums: &Tensor,
    ) -> Result<()> {
        let (rows, width) = exponentials.dims2()?;
        let pack = pack(width.is_multiple_of(8));
        let name = format!("cross_entropy_grad_{}_{pack}", self.suffix());
        let args = [
            Arg::Of(exponentials),
            Arg::Of(targets),
            Arg::Of(weights),
            Arg::Of(sums),
            Arg::U32(width as u32),
        ];
        let [blocks, ..] = threads(width / pack, 256);
        self.launch(File::Rows, &name, [blocks, rows as u64, 1], 256, &args)
    }

    /// (A, B, C, d) → (A, C, B, d), each vector turned by its position where `turn` is given, and
    /// multiplied by `factor`, a tensor of one element.
    pub(super) fn heads(
        &self,
        x: &Tensor,
        turn: Option<Turn>,
        factor: Option<&Tensor>,
    ) -> Result<Tensor> {
        let (a, b, c, d) = x.dims4()?;
        let out = self.empty((a, c, b, d), self.dtype)?;
        let pack = pack((d / 2).is_multiple_of(8));
        let pairs = x.elem_count() / 2 / pack;
        let (cos, sin) = (turn.as_ref().map(|t| t.cos), turn.as_ref().map(|t| t.sin));
        let (past, inner, sign) =
            turn.as_ref().map_or((0, false, 1.0), |t| (t.past, t.inner, t.sign));
        let args = [
            Arg::Of(&out),
            Arg::Of(x),
            cos.into(),
            sin.into(),
            factor.into(),
            Arg::U32(b as u32),
            Arg::U32(c as u32),
            Arg::U32(d as u32),
            Arg::U32(past as u32),
            Arg::U32(inner.into()),
            Arg::F32(sign),
            Arg::U64(pairs as u64),
        ];
        let name = format!("heads_{}_{pack}", self.suffix());
        self.launch(File::Rows, &name, threads(pairs, 256), 256, &args)?;
        Ok(out)
    }

    /// Adds Σ x² to the f64 at `index` of `sums`.
    pub(super) fn sum_squares(&self, x: &Tensor, sums: &Tensor, index: usize) -> Result<()> {
        let n = x.elem_count();
        let args = [Arg::After(sums, index), Arg::Of(x), Arg::U64(n as u64)];
        let name = format!("sum_squares_{}", self.suffix());
        let blocks = n.div_ceil(256 * 8).clamp(1, 1024) as u64;
        self.launch(File::Rows, &name, [blocks, 1, 1], 256, &args)
    }
}

/// Rotation by position.
#[derive(Debug, Clone, Copy)]
pub(super) struct Turn<'a> {
    /// (positions, d/2)
    pub cos: &'a Tensor,
    /// (positions, d/2)
    pub sin: &'a Tensor,
    /// Position of the first token.
    pub past: usize,
    /// Tokens lie along the third dimension, not the second.
    pub inner: bool,
    /// 1, or −1 for the other way.
    pub sign: f32,
}

/// Blocks of `block` threads that make up `n`.
fn threads(n: usize, block: usize) -> [u64; 3] {
    [n.div_ceil(block).max(1) as u64, 1, 1]
}

/// Elements that a thread takes at once.
fn pack(by_eight: bool) -> usize {
    if by_eight { 8 } else { 1 }
}

/// (elements of a pack, packs a lane, lanes a row) for rows of `width`.
fn row_kernel(width: usize) -> Option<(u32, u32, u32)> {
    let by_eight = [(1, 32), (2, 32), (4, 32), (1, 256), (2, 256), (4, 256), (4, 1024)];
    let (pack, kernels) = match width.is_multiple_of(8) {
        true => (8, &by_eight[..]),
        false => (1, &[(8, 32), (8, 256)][..]),
    };
    let fits = |&&(packs, lanes): &&(u32, u32)| width <= (pack * packs * lanes) as usize;
    kernels.iter().find(fits).map(|&(packs, lanes)| (pack, packs, lanes))
}

/// Recorded launches, and cuBLAS's product into a tensor that is there already.
pub(super) use backend::{Graph, product};

#[cfg(feature = "cuda")]
#[path = "cuda/driver.rs"]
mod backend;
#[cfg(not(feature = "cuda"))]
#[path = "cuda/absent.rs"]
mod backend;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_of_eights_has_a_kernel() {
        for (width, kernel) in [
            (8, Some((8, 1, 32))),
            (7, Some((1, 8, 32))),
            (513, Some((1, 8, 256))),
            (896, Some((8, 4, 32))),
            (2048, Some((8, 1, 256))),
            (32_768, Some((8, 4, 1024))),
            (32_776, None),
            (2_049, None),
        ] {
            assert_eq!(row_kernel(width), kernel, "{width}");
        }
    }
}
