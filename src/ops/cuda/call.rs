//! A kernel about to be started: what it is given is checked here, and becomes what it takes.

use std::{iter, marker::PhantomData};

use candle_core::{DType, Result, Tensor, bail};

use super::{Kernels, backend};
use crate::ops::launch::Nodes;

/// A file of kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum File {
    /// Attention of whole sequences.
    Attention,
    /// A token for each row of logits.
    Choose,
    /// One token of each sequence: the embedding and attention.
    Decode,
    /// Element-wise ops and layouts.
    Elements,
    /// Sums of squares, and AdamW.
    Optimizer,
    /// Products of few rows.
    Products,
    /// Row-wise ops.
    Rows,
    /// All of a step.
    Step,
    /// Sums over rows.
    Sums,
}

/// The element type of [`Kernels`].
#[derive(Debug, Clone, Copy)]
pub(in crate::ops) enum Element {}

/// bf16, whatever the type of [`Kernels`].
#[derive(Debug, Clone, Copy)]
pub(in crate::ops) enum Bf16 {}

/// 8 bits, e4m3.
#[derive(Debug, Clone, Copy)]
pub(in crate::ops) enum E4m3 {}

/// A type of elements as kernels are written for it.
pub(super) trait Elements {
    /// Whether a tensor of `dtype` holds such, `own` being that of the kernels.
    fn are(dtype: DType, own: DType) -> bool;
    /// Whether kernels load several at once, from multiples of 16 bytes.
    const PACKED: bool = false;
}

impl Elements for Element {
    fn are(dtype: DType, own: DType) -> bool {
        dtype == own
    }
    const PACKED: bool = true;
}

/// A type that is candle's of another name.
macro_rules! elements {
    ($($kind:ty: $dtype:ident,)*) => {
        $(impl Elements for $kind {
            fn are(dtype: DType, _: DType) -> bool {
                dtype == DType::$dtype
            }
        })*
    };
}

// candle has no u64.
elements! { u8: U8, u32: U32, u64: I64, f32: F32, f64: F64, Bf16: BF16, E4m3: F8E4M3, }

/// Where elements begin that a kernel reads.
#[derive(Debug, Clone, Copy)]
#[repr(transparent)]
pub(in crate::ops) struct Read<E>(u64, PhantomData<E>);

/// Where elements begin that a kernel writes.
#[derive(Debug, Clone, Copy)]
#[repr(transparent)]
pub(in crate::ops) struct Write<E>(u64, PhantomData<E>);

impl<E> Read<E> {
    /// Nothing to read.
    pub(super) const NULL: Self = Self(0, PhantomData);

    /// Where that is.
    pub(super) fn address(self) -> u64 {
        self.0
    }
}

impl<E> Write<E> {
    /// Nowhere to write.
    pub(super) const NULL: Self = Self(0, PhantomData);

    /// Where that is.
    pub(super) fn address(self) -> u64 {
        self.0
    }
}

/// A kernel about to be started.
pub(super) struct Call<'a> {
    kernels: &'a Kernels,
    nodes: &'a Nodes,
    file: File,
    name: &'static str,
}

impl Kernels {
    /// The kernel `name` of `file`; its start is written to `nodes`.
    pub(super) fn call<'a>(&'a self, nodes: &'a Nodes, file: File, name: &'static str) -> Call<'a> {
        Call { kernels: self, nodes, file, name }
    }
}

impl Call<'_> {
    /// Refuses tensors that do not fit one another.
    pub(super) fn check(&self, fits: bool, tensors: &[&Tensor]) -> Result<()> {
        if fits {
            return Ok(());
        }
        let shape = |t: &&Tensor| match t.is_contiguous() {
            true => format!("{:?}", t.dims()),
            false => format!("{:?} by {:?}", t.dims(), t.stride()),
        };
        let shapes: Vec<_> = tensors.iter().map(shape).collect();
        bail!("kernel {} does not take tensors of {}", self.name, shapes.join(", "))
    }

    /// The dimensions of a tensor of N of them.
    pub(super) fn dims<const N: usize>(&self, tensor: &Tensor) -> Result<[usize; N]> {
        self.check(tensor.rank() == N, &[tensor])?;
        Ok(std::array::from_fn(|i| tensor.dims()[i]))
    }

    /// (rows, columns, elements from row to row) of a matrix or of columns of a wider one.
    pub(super) fn columns(&self, tensor: &Tensor) -> Result<[usize; 3]> {
        let [rows, width] = self.dims(tensor)?;
        let (stride, dense) = (tensor.stride()[0], width <= 1 || tensor.stride()[1] == 1);
        self.check(dense && (rows <= 1 || stride >= width), &[tensor])?;
        Ok([rows, width, stride])
    }

    /// A size as kernels count.
    pub(super) fn size(&self, n: usize) -> Result<u32> {
        match u32::try_from(n) {
            Ok(n) => Ok(n),
            Err(_) => bail!("kernel {} does not count to {n}", self.name),
        }
    }

    /// The elements of a dense tensor, to be read.
    pub(super) fn reads<E: Elements>(&self, tensor: &Tensor) -> Result<Read<E>> {
        self.check(tensor.is_contiguous(), &[tensor])?;
        self.reads_from(tensor)
    }

    /// The same, or none.
    pub(super) fn reads_any<E: Elements>(&self, tensor: Option<&Tensor>) -> Result<Read<E>> {
        tensor.map_or(Ok(Read::NULL), |tensor| self.reads(tensor))
    }

    /// The same of up to N tensors.
    pub(super) fn reads_all<'t, E: Elements + Copy, const N: usize>(
        &self,
        tensors: impl IntoIterator<Item = Option<&'t Tensor>>,
    ) -> Result<[Read<E>; N]> {
        let mut all = [Read::NULL; N];
        for (to, tensor) in iter::zip(&mut all, tensors) {
            *to = self.reads_any(tensor)?;
        }
        Ok(all)
    }

    /// The first element of a tensor whose layout the kernel is told.
    pub(super) fn reads_from<E: Elements>(&self, tensor: &Tensor) -> Result<Read<E>> {
        let at = self.address::<E>(tensor)?;
        self.check(!E::PACKED || at.is_multiple_of(16), &[tensor])?;
        Ok(Read(at, PhantomData))
    }

    /// The elements of a dense tensor, to be written.
    pub(super) fn writes<E: Elements>(&self, tensor: &Tensor) -> Result<Write<E>> {
        self.check(tensor.is_contiguous(), &[tensor])?;
        let Read(at, _) = self.reads_from::<E>(tensor)?;
        Ok(Write(at, PhantomData))
    }

    /// The same, or nowhere.
    pub(super) fn writes_any<E: Elements>(&self, tensor: Option<&Tensor>) -> Result<Write<E>> {
        tensor.map_or(Ok(Write::NULL), |tensor| self.writes(tensor))
    }

    /// The first element of a tensor whose layout the kernel is told, and which it writes one
    /// element at a time.
    pub(super) fn writes_from<E: Elements>(&self, tensor: &Tensor) -> Result<Write<E>> {
        Ok(Write(self.address::<E>(tensor)?, PhantomData))
    }

    fn address<E: Elements>(&self, tensor: &Tensor) -> Result<u64> {
        let Self { kernels: Kernels { device, dtype }, name, .. } = self;
        if !(E::are(tensor.dtype(), *dtype) && tensor.device().same_device(device)) {
            let (is, on) = (tensor.dtype(), tensor.device().location());
            bail!("kernel {name} for {dtype:?} does not take a tensor of {is:?} on {on:?}");
        }
        backend::address(tensor)
    }

    /// Starts the kernel's `variant` on `grid` blocks of `block` threads.
    ///
    /// # Safety
    /// `args` is the struct that the kernel is declared with, and wherever it reads or writes by
    /// what is in it, its tensors have elements.
    pub(super) unsafe fn start<A: Copy>(
        &self,
        variant: &[u32],
        grid: [usize; 3],
        block: u32,
        args: &A,
    ) -> Result<()> {
        // SAFETY: the caller's.
        unsafe { self.start_sharing(variant, grid, block, 0, args) }
    }

    /// The same with `shared` bytes of shared memory for each block, beside what the kernel declares.
    ///
    /// # Safety
    /// As [`Self::start`]; and the kernel uses no more of it.
    pub(super) unsafe fn start_sharing<A: Copy>(
        &self,
        variant: &[u32],
        grid: [usize; 3],
        block: u32,
        shared: u32,
        args: &A,
    ) -> Result<()> {
        let Self { kernels, nodes, file, name } = self;
        let mut function = format!("{name}_{}", kernels.suffix());
        for number in variant {
            function.push_str(&format!("_{number}"));
        }
        let [x, y, z] = grid;
        let most = |n: usize| n <= 65_535;
        if !(most(y) && most(z) && i32::try_from(x).is_ok()) {
            bail!("kernel {name} does not take {x} x {y} x {z} blocks");
        }
        let space = Space { grid: grid.map(|n| n as u32), block, shared };
        // SAFETY: the caller's.
        unsafe { backend::launch(&kernels.device, nodes, *file, function, space, args) }
    }
}

/// What a kernel is started on.
#[derive(Debug, Clone, Copy)]
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
pub(super) struct Space {
    /// Blocks along each dimension.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: u32,
    /// Bytes of shared memory that a block gets beside what the kernel declares.
    pub shared: u32,
}

/// Blocks of `block` threads that make up `n`.
pub(super) fn blocks(n: usize, block: u32) -> [usize; 3] {
    [n.div_ceil(block as usize).max(1), 1, 1]
}
