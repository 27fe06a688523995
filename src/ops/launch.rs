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

use candle_core::Device;

use crate::{
    error::Result,
    ledger::{Dtype, Op, Phase, Scope},
    meter::At,
};

/// Work for a device: the tensors that it reads and writes, and nothing else that has a dimension.
pub(crate) trait Kernel {
    /// What comes of it.
    type Output;

    /// Where it runs.
    fn device(&self) -> &Device;

    /// Says which ops it computes, their dimensions being those of the tensors that it holds.
    ///
    /// # Errors
    /// An element type that no op computes in.
    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()>;

    /// Computes them. What it starts on a GPU is written to `nodes`.
    ///
    /// # Errors
    /// The device's.
    fn run(&self, nodes: &Nodes) -> candle_core::Result<Self::Output>;
}

/// The ops of one launch, each with where it belongs.
pub(crate) struct Ops<'a> {
    at: At<'a>,
    pub(crate) all: Vec<(At<'a>, Reported, Dtype)>,
}

impl<'a> Ops<'a> {
    /// None yet, of a launch at `at`.
    pub(crate) fn new(at: At<'a>) -> Self {
        Self { at, all: Vec::with_capacity(8) }
    }

    /// Where the launch is made.
    pub(crate) fn at(&self) -> At<'a> {
        self.at
    }

    /// One op of the module that the launch is made at.
    pub(crate) fn add(&mut self, op: Op, dtype: Dtype) {
        self.add_at(self.at, op, dtype);
    }

    /// One op of another module that the launch computes too.
    pub(crate) fn add_at(&mut self, at: At<'a>, op: Op, dtype: Dtype) {
        self.all.push((at, Reported::Always(op), dtype));
    }

    /// One op that reaches over all `held` tokens, the newest one included: `op` says what it is
    /// over so many. While a recording is replayed, the device counts them.
    pub(crate) fn over_held_at(
        &mut self,
        at: At<'a>,
        held: u64,
        op: impl Fn(u64) -> Op + Send + Sync + 'static,
        dtype: Dtype,
    ) {
        self.all.push((at, Reported::OverHeld(held, Box::new(op)), dtype));
    }
}

/// An op as a launch reports it.
pub(crate) enum Reported {
    /// With these dimensions, whenever it runs.
    Always(Op),
    /// With those that it has over the tokens held: so many when it was launched.
    OverHeld(u64, Box<dyn Fn(u64) -> Op + Send + Sync>),
}

impl Reported {
    /// The op as it was launched.
    pub(crate) fn now(&self) -> Op {
        match self {
            Self::Always(op) => *op,
            Self::OverHeld(held, op) => op(*held),
        }
    }

    /// The same op where `held` tokens are held, the newest one included.
    pub(crate) fn over(&self, held: u64) -> Op {
        match self {
            Self::Always(op) => *op,
            Self::OverHeld(_, op) => op(held),
        }
    }
}

impl fmt::Debug for Reported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.now())
    }
}

/// A launch that went into a recording.
#[derive(Debug, Default)]
pub(crate) struct Launched {
    /// What it reports: phase, scope, op and element type.
    pub ops: Vec<(Phase, Scope, Reported, Dtype)>,
    /// What it started on the GPU.
    pub nodes: Vec<Node>,
}

/// A kernel as it was started on a GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
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
    /// A product by cuBLAS, which starts kernels of its own choice.
    Library {
        /// Nodes that it added to the graph that is being recorded, as CUDA counted them right
        /// before and after.
        nodes: usize,
    },
}

/// What a launch starts, in order, where somebody keeps it.
#[derive(Debug, Default)]
pub(crate) struct Nodes(Option<RefCell<Vec<Node>>>);

impl Nodes {
    /// None yet, for a recording.
    pub fn kept() -> Self {
        Self(Some(RefCell::default()))
    }

    /// Whether they are kept: while a graph is recorded.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub fn are_kept(&self) -> bool {
        self.0.is_some()
    }

    /// One more, made only where it is kept.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub fn push(&self, node: impl FnOnce() -> Node) {
        if let Some(nodes) = &self.0 {
            nodes.borrow_mut().push(node());
        }
    }

    /// All of them.
    pub fn into_vec(self) -> Vec<Node> {
        self.0.map(RefCell::into_inner).unwrap_or_default()
    }
}
