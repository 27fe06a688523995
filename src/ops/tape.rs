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

use super::{Tensor, elementwise};
use crate::{
    error::Result,
    ledger::{Dtype, Lora, Module, Phase, Scope},
    meter::{At, Meter},
};

/// Gradient of an op's output → gradient of one input, in metered ops.
type Vjp = Box<dyn FnOnce(At, &Tensor) -> Result<Tensor> + Send>;

/// One input of an op that needs a gradient.
pub(super) struct Edge {
    to: Arc<Node>,
    vjp: Vjp,
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
        mut self,
        at: At,
        input: &Self,
        vjp: impl FnOnce(At, &Tensor) -> Result<Tensor> + Send + 'static,
    ) -> Self {
        if let (true, Some(to)) = (at.is_taped(), &input.node) {
            let edge = Edge { to: to.clone(), vjp: Box::new(vjp) };
            match &self.node {
                Some(node) => node.edges(|edges| edges.push(edge)),
                None => self.node = Some(Node::new(at.scope(), Phase::BackwardX, vec![edge])),
            }
        }
        self
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
            let vjp: Vjp = Box::new(|_, gradient| Ok(Self::of(back(&gradient.data)?)));
            Node::new(to.scope, Phase::BackwardX, vec![Edge { to: to.clone(), vjp }])
        });
        Self { data, node, lease: self.lease.clone() }
    }
}

/// Gradients of leaves.
#[derive(Debug, Default)]
pub struct Gradients(HashMap<*const Node, (Arc<Node>, Tensor)>);

impl Gradients {
    /// Takes the gradient of `leaf`; none where nothing depended on it.
    pub fn take(&mut self, leaf: &Tensor) -> Option<Tensor> {
        self.remove(leaf.node.as_ref()?)
    }

    /// The gradient of `leaf`, if anything depended on it.
    pub fn get(&self, leaf: &Tensor) -> Option<&Tensor> {
        self.0.get(&Arc::as_ptr(leaf.node.as_ref()?)).map(|(_, gradient)| gradient)
    }

    /// Adds a gradient of `leaf`: an op where it has one already.
    ///
    /// # Errors
    /// Another shape, or a tensor that is no leaf.
    pub fn add(&mut self, meter: Meter, leaf: &Tensor, gradient: Tensor) -> Result<()> {
        let node = leaf.node.as_ref().ok_or_else(|| anyhow::anyhow!("is no leaf"))?;
        self.accumulate(meter, node.clone(), gradient)
    }

    /// Adds everything that `other` holds: an op for each leaf that both have.
    ///
    /// # Errors
    /// The device's.
    pub fn merge(&mut self, meter: Meter, other: Self) -> Result<()> {
        let theirs = other.0.into_values();
        theirs.into_iter().try_for_each(|(node, gradient)| self.accumulate(meter, node, gradient))
    }

    /// The same gradients in f32, to be summed over passes.
    ///
    /// # Errors
    /// The device's.
    pub fn widened(self) -> Result<Self> {
        let wide = self
            .0
            .into_iter()
            .map(|(key, (node, gradient))| Ok((key, (node, gradient.to_dtype(Dtype::F32)?))));
        Ok(Self(wide.collect::<Result<_>>()?))
    }

    fn remove(&mut self, node: &Arc<Node>) -> Option<Tensor> {
        self.0.remove(&Arc::as_ptr(node)).map(|(_, gradient)| gradient)
    }

    fn accumulate(&mut self, meter: Meter, node: Arc<Node>, gradient: Tensor) -> Result<()> {
        let at = meter.phase(node.phase).scope(node.scope);
        let sum = match self.remove(&node) {
            Some(sum) => elementwise::add(at, &sum, &gradient)?,
            None => gradient,
        };
        self.0.insert(Arc::as_ptr(&node), (node, sum));
        Ok(())
    }
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
    gradients.accumulate(meter, root.clone(), gradient)?;
    let mut ready = vec![root.clone()];
    while let Some(node) = ready.pop() {
        let edges = node.edges(std::mem::take);
        if edges.is_empty() {
            continue; // a leaf: its gradient stays
        }
        let Some(gradient) = gradients.remove(&node) else { continue };
        for Edge { to, vjp } in edges {
            let at = meter.phase(to.phase).scope(node.scope);
            gradients.accumulate(meter, to.clone(), vjp(at, &gradient)?)?;
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
