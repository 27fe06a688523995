//! Launches: the only way to run arithmetic, and the only way to report it.
//!
//! A [`Kernel`] is a value that holds the tensors it will read and write. What it reports is worked
//! out from those tensors, and [`At::launch`] reports it by executing it: neither happens without
//! the other. A kernel that computes several ops at once reports them all, each with the module
//! that it belongs to.
//!
//! While a CUDA graph is recorded nothing executes, so the launches are kept ([`Launched`]) rather
//! than reported; each replay reports that very list.

use std::{cell::RefCell, fmt};

use crate::{
    ledger::{Dtype, Key, Op},
    meter::At,
};

/// Work for a device: the tensors that it reads and writes, and nothing else that has a dimension.
pub(crate) trait Kernel {
    /// What comes of it.
    type Output;

    /// Says which ops it computes, their dimensions being those of the tensors that it holds.
    fn report(&self, ops: &mut Ops<'_>);

    /// Computes them. What it starts on a GPU is written to `nodes`.
    ///
    /// # Errors
    /// The device's.
    fn run(&self, nodes: &Nodes) -> candle_core::Result<Self::Output>;
}

/// The ops of one launch.
#[derive(Default)]
pub(crate) struct Ops<'a>(pub(crate) Vec<(At<'a>, Reported, Dtype)>);

impl<'a> Ops<'a> {
    /// One op, of dimensions that every execution has.
    pub fn add(&mut self, at: At<'a>, op: Op, dtype: Dtype) {
        self.0.push((at, Reported::Always(op), dtype));
    }

    /// One op that reaches over all tokens held: `op` says what it is with so many of them, the
    /// newest one included. A device counts them itself while a recording is replayed.
    pub fn over_held(
        &mut self,
        at: At<'a>,
        dtype: Dtype,
        op: impl Fn(u64) -> Op + Send + Sync + 'static,
    ) {
        self.0.push((at, Reported::OverHeld(Box::new(op)), dtype));
    }
}

/// An op as a launch reports it.
pub(crate) enum Reported {
    /// With these dimensions.
    Always(Op),
    /// With those that it has over so many tokens held.
    OverHeld(Box<dyn Fn(u64) -> Op + Send + Sync>),
}

impl Reported {
    /// The op where `held` tokens are held, the newest one included.
    pub fn with(&self, held: u64) -> Op {
        match self {
            Self::Always(op) => *op,
            Self::OverHeld(op) => op(held),
        }
    }
}

impl fmt::Debug for Reported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Always(op) => write!(f, "{op}"),
            Self::OverHeld(op) => write!(f, "{} over the tokens held", op(1)),
        }
    }
}

/// A launch that went into a recording.
#[derive(Debug, Default)]
pub(crate) struct Launched {
    /// What it reports, each op under a key whose dimensions are those of the recording.
    pub ops: Vec<(Key, Reported)>,
    /// What it started on the GPU.
    pub nodes: Vec<Node>,
}

/// A kernel as it was started on a GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Node {
    /// One of ours.
    Ours {
        /// The function's name in its module.
        function: String,
        /// Blocks in each dimension.
        grid: [u32; 3],
        /// Threads of a block in each dimension.
        block: [u32; 3],
    },
    /// A product by cuBLAS, which starts kernels of its own choice, one or more.
    Library,
}

/// What a launch starts, in order.
#[derive(Debug, Default)]
pub(crate) struct Nodes(RefCell<Vec<Node>>);

impl Nodes {
    /// One more.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub fn push(&self, node: Node) {
        self.0.borrow_mut().push(node);
    }

    /// All of them.
    pub fn into_vec(self) -> Vec<Node> {
        self.0.into_inner()
    }
}
