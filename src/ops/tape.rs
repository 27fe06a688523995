//! Reverse-mode differentiation over the metered ops.
//!
//! A tensor knows its [`Node`]: how a gradient of it is turned into gradients of what it was made
//! from, one [`Edge`] for each input that needs one. An edge holds only what its own formula
//! reads, and is dropped with it as soon as it has run. No input that needs no gradient has an
//! edge, so frozen weights get none and nothing is computed below the first trained parameter.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use candle_core::{DType, Device, Shape};

use super::{Tensor, Unshared, elementwise, linear::product_added, optimize};
use crate::{
    error::Result,
    ledger::{Dtype, Lora, Module, Phase, Scope},
    meter::{At, Meter},
};

/// Gradient of an op's output → gradient of one input, added to what there is of it so far, in
/// metered ops.
type Vjp = Box<dyn FnOnce(At, &Tensor, SoFar) -> Result<Gradient> + Send>;

/// The gradient of a tensor, or the sum of those that have been computed.
#[derive(Debug)]
pub(super) enum Gradient {
    /// Nobody else holds it, so that a sum may take its place.
    Own(Unshared),
    /// Another tensor's too, maybe.
    Shared(Tensor),
}

impl Gradient {
    fn tensor(&self) -> &Tensor {
        match self {
            Self::Own(Unshared(tensor)) | Self::Shared(tensor) => tensor,
        }
    }

    fn share(self) -> Tensor {
        match self {
            Self::Own(Unshared(tensor)) | Self::Shared(tensor) => tensor,
        }
    }
}

/// What there is so far of a gradient that is being summed.
pub(super) struct SoFar<'a> {
    /// Where its sums are accounted for.
    pub(super) at: At<'a>,
    gradient: Option<Gradient>,
}

impl<'a> SoFar<'a> {
    /// The sum with `more`.
    ///
    /// # Errors
    /// Another shape.
    pub(super) fn plus(self, more: Gradient) -> Result<Gradient> {
        let Some(sum) = self.gradient else { return Ok(more) };
        let sum = elementwise::add(self.at, sum.tensor(), more.tensor())?;
        Ok(Gradient::Own(Unshared(sum)))
    }

    /// Whether there is nothing yet.
    pub(super) fn is_empty(&self) -> bool {
        self.gradient.is_none()
    }

    /// Where a kernel can add to it in its place, and where that is accounted for; else itself, as
    /// it is: where there is nothing yet, others hold it, or its layout or type is another.
    pub(super) fn into_place(self, dtype: DType) -> Result<(At<'a>, Unshared), Self> {
        match self.gradient {
            Some(Gradient::Own(sum))
                if sum.0.data.is_contiguous() && sum.0.data.dtype() == dtype =>
            {
                Ok((self.at, sum))
            }
            gradient => Err(Self { at: self.at, gradient }),
        }
    }
}

/// A vjp that has nothing of its own to do with what there is so far.
fn alone(vjp: impl FnOnce(At, &Tensor) -> Result<Tensor> + Send + 'static) -> Vjp {
    Box::new(move |at, dy, so_far| so_far.plus(Gradient::Shared(vjp(at, dy)?)))
}

/// One input of an op that needs a gradient.
pub(super) struct Edge {
    to: Arc<Node>,
    carry: Carry,
}

/// How a gradient gets to an input.
enum Carry {
    /// Through the op.
    Through(Vjp),
    /// Put into its place, where the output is a part of the input: nothing else reads that part.
    Into { start: usize, whole: Arc<Whole> },
}

/// Gradient of an op's output → gradients of all its inputs.
type JointVjp<const N: usize> = Box<dyn FnOnce(At, &Tensor) -> Result<[Option<Tensor>; N]> + Send>;

/// Gradients of several inputs, which are computed when the first is asked for. The edges of a node
/// are all given the same gradient.
enum Together<const N: usize> {
    Waiting(JointVjp<N>),
    Done([Option<Tensor>; N]),
}

impl<const N: usize> Together<N> {
    fn take(&mut self, index: usize, at: At, dy: &Tensor) -> Result<Tensor> {
        let mut gradients = match std::mem::replace(self, Self::Done([const { None }; N])) {
            Self::Waiting(vjp) => vjp(at, dy)?,
            Self::Done(gradients) => gradients,
        };
        let found = gradients.get_mut(index).and_then(Option::take);
        *self = Self::Done(gradients);
        found.ok_or_else(|| anyhow::anyhow!("no gradient of input {index}"))
    }
}

/// A tensor that is read in parts.
struct Whole {
    dim: usize,
    shape: Shape,
    dtype: DType,
    device: Device,
}

/// The graph of a tensor that is read in parts.
pub(super) struct Parts {
    /// Stands between the parts and the tensor, so that all else which reads that is not in the way.
    node: Arc<Node>,
    whole: Arc<Whole>,
}

impl Parts {
    /// The node of the part that begins at `start`.
    pub(super) fn part(&self, start: usize) -> Arc<Node> {
        let carry = Carry::Into { start, whole: self.whole.clone() };
        let edge = Edge { to: self.node.clone(), carry };
        Node::new(self.node.scope, Phase::BackwardX, vec![edge])
    }
}

/// A tensor's place in the graph; a leaf where it has no edges.
pub(super) struct Node {
    /// Where the tensor was made: its gradient is computed, and summed, on account of this module.
    scope: Scope,
    /// Whether towards an activation, an adapter or a weight.
    phase: Phase,
    edges: Mutex<Vec<Edge>>,
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.phase, self.scope)
    }
}

impl Node {
    fn new(scope: Scope, phase: Phase, edges: Vec<Edge>) -> Arc<Self> {
        Arc::new(Self { scope, phase, edges: Mutex::new(edges) })
    }

    fn edges<T>(&self, f: impl FnOnce(&mut Vec<Edge>) -> T) -> T {
        f(&mut self.edges.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The phase in which the gradient of a parameter of `module` is computed.
fn phase_of_parameter(module: Module) -> Phase {
    match module {
        Module::Lora(_, Lora::A) => Phase::BackwardA,
        Module::Lora(_, Lora::B) => Phase::BackwardB,
        _ => Phase::BackwardW,
    }
}

impl Tensor {
    /// The same elements as a trained parameter of the module at `scope`.
    pub fn parameter(&self, scope: Scope) -> Self {
        let node = Node::new(scope, phase_of_parameter(scope.module), vec![]);
        Self { data: self.data.clone(), node: Some(node), lease: self.lease.clone() }
    }

    /// The same elements as an activation, made at `scope`, that a new graph starts from.
    pub fn leaf(&self, scope: Scope) -> Self {
        let node = Node::new(scope, Phase::BackwardX, vec![]);
        Self { data: self.data.clone(), node: Some(node), lease: self.lease.clone() }
    }

    /// The same elements without a graph.
    pub fn detach(&self) -> Self {
        Self { data: self.data.clone(), node: None, lease: self.lease.clone() }
    }

    /// Whether a gradient of it would be computed.
    pub fn needs_gradient(&self) -> bool {
        self.node.is_some()
    }

    /// Says that this tensor, just made by an op at `at`, came from `input`.
    pub(super) fn made_from(
        self,
        at: At,
        input: &Self,
        vjp: impl FnOnce(At, &Tensor) -> Result<Tensor> + Send + 'static,
    ) -> Self {
        self.made_with(at, input, alone(vjp))
    }

    /// The same, of an op whose gradient is added to what there is so far by the vjp itself.
    pub(super) fn made_by_product(
        self,
        at: At,
        input: &Self,
        vjp: impl FnOnce(At, &Tensor, SoFar) -> Result<Gradient> + Send + 'static,
    ) -> Self {
        self.made_with(at, input, Box::new(vjp))
    }

    fn made_with(mut self, at: At, input: &Self, vjp: Vjp) -> Self {
        if let (true, Some(to)) = (at.is_taped(), &input.node) {
            let edge = Edge { to: to.clone(), carry: Carry::Through(vjp) };
            match &self.node {
                Some(node) => node.edges(|edges| edges.push(edge)),
                None => self.node = Some(Node::new(at.scope(), Phase::BackwardX, vec![edge])),
            }
        }
        self
    }

    /// Says that this tensor, just made by an op at `at`, came from all of `inputs`, whose gradients
    /// one computation gives: none for an input that needs none.
    pub(super) fn made_together<const N: usize>(
        self,
        at: At,
        inputs: [&Self; N],
        vjp: impl FnOnce(At, &Tensor) -> Result<[Option<Self>; N]> + Send + 'static,
    ) -> Self {
        let all = Arc::new(Mutex::new(Together::Waiting(Box::new(vjp))));
        inputs.into_iter().enumerate().fold(self, |made, (index, input)| {
            let all = all.clone();
            made.made_from(at, input, move |at, dy| {
                all.lock().unwrap_or_else(PoisonError::into_inner).take(index, at, dy)
            })
        })
    }

    /// `data` as another layout of this tensor's elements; `back` undoes it on a gradient.
    pub(super) fn laid_out(
        &self,
        data: candle_core::Tensor,
        back: impl FnOnce(&candle_core::Tensor) -> candle_core::Result<candle_core::Tensor>
        + Send
        + 'static,
    ) -> Self {
        let node = self.node.as_ref().map(|to| {
            let vjp = alone(|_, gradient| Ok(Self::of(back(&gradient.data)?)));
            let edge = Edge { to: to.clone(), carry: Carry::Through(vjp) };
            Node::new(to.scope, Phase::BackwardX, vec![edge])
        });
        Self { data, node, lease: self.lease.clone() }
    }

    /// The graph of its parts along `dim`, where it has one.
    pub(super) fn parts_of(&self, dim: usize) -> Option<Parts> {
        let to = self.node.as_ref()?;
        let as_it_is = alone(|_, gradient| Ok(gradient.clone()));
        let edge = Edge { to: to.clone(), carry: Carry::Through(as_it_is) };
        let node = Node::new(to.scope, Phase::BackwardX, vec![edge]);
        let (shape, dtype) = (self.data.shape().clone(), self.data.dtype());
        let whole = Arc::new(Whole { dim, shape, dtype, device: self.device().clone() });
        Some(Parts { node, whole })
    }

    /// `parts` one after another along `dim`: a copy. Each gets its part of the gradient.
    ///
    /// # Errors
    /// Parts of other shapes but for `dim`, or none.
    pub fn joined(parts: &[Self], dim: usize) -> Result<Self> {
        let data: Vec<_> = parts.iter().map(|part| &part.data).collect();
        let data = candle_core::Tensor::cat(&data, dim)?;
        let (mut edges, mut start) = (vec![], 0);
        for part in parts {
            let (from, length) = (start, part.data.dim(dim)?);
            start += length;
            if let Some(to) = &part.node {
                let vjp = alone(move |_, gradient| {
                    Ok(Self::of(gradient.data.narrow(dim, from, length)?.contiguous()?))
                });
                edges.push(Edge { to: to.clone(), carry: Carry::Through(vjp) });
            }
        }
        let scope = edges.first().map(|edge| edge.to.scope);
        let node = scope.map(|scope| Node::new(scope, Phase::BackwardX, edges));
        Ok(Self { data, node, lease: None })
    }
}

/// Gradients of leaves.
#[derive(Debug, Default)]
pub struct Gradients(HashMap<*const Node, (Arc<Node>, Gradient)>);

impl Gradients {
    /// Takes the gradient of `leaf`; none where nothing depended on it.
    pub fn take(&mut self, leaf: &Tensor) -> Option<Tensor> {
        self.remove(leaf.node.as_ref()?).map(Gradient::share)
    }

    /// The elements of the gradient of `leaf`, on the host; none where nothing depended on it.
    ///
    /// # Errors
    /// The device's.
    pub fn values(&self, leaf: &Tensor) -> Result<Option<Vec<f32>>> {
        let found = leaf.node.as_ref().and_then(|node| self.0.get(&Arc::as_ptr(node)));
        found.map(|(_, gradient)| gradient.tensor().to_vec()).transpose()
    }

    /// Adds a gradient of `leaf`: an op where it has one already.
    ///
    /// # Errors
    /// Another shape, or a tensor that is no leaf.
    pub fn add(&mut self, meter: Meter, leaf: &Tensor, gradient: Tensor) -> Result<()> {
        self.accumulate(meter, node_of(leaf)?, Gradient::Shared(gradient))
    }

    /// Adds a · b, computed at `at`, as a gradient of `leaf`; where it has one that is nobody
    /// else's, in the place of that.
    ///
    /// # Errors
    /// Another shape, or a tensor that is no leaf.
    pub fn add_product(
        &mut self,
        meter: Meter,
        leaf: &Tensor,
        at: At,
        (a, b): (&Tensor, &Tensor),
    ) -> Result<()> {
        let node = node_of(leaf)?;
        let so_far = self.so_far(meter, &node);
        let sum = product_added(at, [a, b], leaf.data.shape().clone(), so_far)?;
        self.put(node, sum);
        Ok(())
    }

    /// Adds everything that `other` holds: an op for each leaf that both have.
    ///
    /// # Errors
    /// The device's.
    pub fn merge(&mut self, meter: Meter, other: Self) -> Result<()> {
        let theirs = other.0.into_values();
        theirs.into_iter().try_for_each(|(node, gradient)| self.accumulate(meter, node, gradient))
    }

    /// Adds the gradients of one more pass, in f32: an op for each leaf that both have.
    ///
    /// # Errors
    /// The device's.
    pub fn add_pass(&mut self, meter: Meter, pass: Self) -> Result<()> {
        for (node, gradient) in pass.0.into_values() {
            let (at, gradient) = (meter.phase(node.phase).scope(node.scope), gradient.share());
            let sum = match self.remove(&node) {
                Some(sum) => optimize::add_to_sum(at, sum.tensor(), &gradient)?,
                None => gradient.to_dtype(Dtype::F32)?,
            };
            self.put(node, Gradient::Shared(sum));
        }
        Ok(())
    }

    fn remove(&mut self, node: &Arc<Node>) -> Option<Gradient> {
        self.0.remove(&Arc::as_ptr(node)).map(|(_, gradient)| gradient)
    }

    fn put(&mut self, node: Arc<Node>, gradient: Gradient) {
        self.0.insert(Arc::as_ptr(&node), (node, gradient));
    }

    /// Takes what there is of the gradient of `node`, to be put back with what is added.
    fn so_far<'a>(&mut self, meter: Meter<'a>, node: &Arc<Node>) -> SoFar<'a> {
        let at = meter.phase(node.phase).scope(node.scope);
        SoFar { at, gradient: self.remove(node) }
    }

    /// Puts the gradient of a part of `node` into its place, where zeros are.
    fn place(
        &mut self,
        node: &Arc<Node>,
        gradient: &Tensor,
        start: usize,
        whole: &Whole,
    ) -> Result<()> {
        let Whole { dim, shape, dtype, device } = whole;
        let all = match self.remove(node) {
            Some(all) => all.share(),
            None => Tensor::of(candle_core::Tensor::zeros(shape, *dtype, device)?),
        };
        all.data.slice_set(&gradient.data.contiguous()?, *dim, start)?;
        self.put(node.clone(), Gradient::Shared(all));
        Ok(())
    }

    fn accumulate(&mut self, meter: Meter, node: Arc<Node>, gradient: Gradient) -> Result<()> {
        let sum = self.so_far(meter, &node).plus(gradient)?;
        self.put(node, sum);
        Ok(())
    }
}

fn node_of(leaf: &Tensor) -> Result<Arc<Node>> {
    leaf.node.clone().ok_or_else(|| anyhow::anyhow!("is no leaf"))
}

/// Gradients of every leaf that `root` came from, given the gradient of `root`. The graph is
/// consumed: each op's saved tensors are dropped when its gradients are computed.
///
/// # Errors
/// The device's.
pub fn backward(meter: Meter, root: &Tensor, gradient: Tensor) -> Result<Gradients> {
    let meter = meter.taped(false);
    let mut gradients = Gradients::default();
    let Some(root) = &root.node else { return Ok(gradients) };
    let mut waiting = consumers(root);
    gradients.put(root.clone(), Gradient::Shared(gradient));
    let mut ready = vec![root.clone()];
    while let Some(node) = ready.pop() {
        let edges = node.edges(std::mem::take);
        if edges.is_empty() {
            continue; // a leaf: its gradient stays
        }
        let Some(gradient) = gradients.remove(&node).map(Gradient::share) else { continue };
        for Edge { to, carry } in edges {
            let at = meter.phase(to.phase).scope(node.scope);
            match carry {
                Carry::Through(vjp) => {
                    let so_far = gradients.so_far(meter, &to);
                    gradients.put(to.clone(), vjp(at, &gradient, so_far)?);
                }
                Carry::Into { start, whole } => gradients.place(&to, &gradient, start, &whole)?,
            }
            let left = waiting.entry(Arc::as_ptr(&to)).or_insert(1);
            *left -= 1;
            if *left == 0 {
                ready.push(to);
            }
        }
    }
    Ok(gradients)
}

/// How many edges lead to each node under `root`.
fn consumers(root: &Arc<Node>) -> HashMap<*const Node, usize> {
    let mut counts = HashMap::new();
    let mut unseen = vec![root.clone()];
    while let Some(node) = unseen.pop() {
        node.edges(|edges| {
            for edge in edges {
                let count = counts.entry(Arc::as_ptr(&edge.to)).or_insert(0);
                *count += 1;
                if *count == 1 {
                    unseen.push(edge.to.clone());
                }
            }
        });
    }
    counts
}
