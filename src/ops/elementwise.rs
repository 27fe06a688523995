//! One operation an element.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::Device;

use super::{
    Kernel, Nodes, Ops, Tensor,
    backend::Backend,
    cpu,
    cuda::{Gate, Kernels, Map},
    dtype_of, portable,
};
use crate::{config::Activation, error::Result, ledger::Op, meter::At};

/// What an element becomes, from it and one of the other side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Element {
    /// a + b
    Add,
    /// a · b
    Mul,
    /// a · b, b being one factor for all.
    Scale,
    /// a + b, b being 1.
    Shift,
    /// silu(a)
    Silu,
    /// gelu(a)
    Gelu,
    /// silu'(a) · b
    SiluGrad,
    /// gelu'(a) · b
    GeluGrad,
}

impl From<Element> for Map {
    fn from(what: Element) -> Self {
        match what {
            Element::Add | Element::Shift => Self::Add,
            Element::Mul | Element::Scale => Self::Mul,
            Element::Silu => Self::Silu,
            Element::Gelu => Self::Gelu,
            Element::SiluGrad => Self::SiluGrad,
            Element::GeluGrad => Self::GeluGrad,
        }
    }
}

impl From<Activation> for Gate {
    fn from(activation: Activation) -> Self {
        match activation {
            Activation::Silu => Self::Silu,
            Activation::GeluTanh => Self::Gelu,
        }
    }
}

/// One output for each element of `a`; `b` again and again where it is smaller.
struct Elementwise<'a> {
    what: Element,
    a: &'a candle_core::Tensor,
    b: &'a candle_core::Tensor,
}

impl<'a> Elementwise<'a> {
    fn new(what: Element, a: &'a Tensor, b: &'a Tensor) -> Self {
        Self { what, a: &a.data, b: &b.data }
    }
}

impl Kernel for Elementwise<'_> {
    type Output = Tensor;

    fn device(&self) -> &Device {
        self.a.device()
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        let n = self.a.elem_count() as u64;
        let op = match self.what {
            Element::Add => Op::Add { n },
            Element::Mul => Op::Mul { n },
            Element::Scale => Op::Scale { n },
            Element::Shift => Op::Shift { n },
            Element::Silu => Op::Silu { n },
            Element::Gelu => Op::Gelu { n },
            Element::SiluGrad => Op::SiluGrad { n },
            Element::GeluGrad => Op::GeluGrad { n },
        };
        ops.add(op, dtype_of(self.a)?);
        Ok(())
    }

    fn run(&self, nodes: &Nodes) -> candle_core::Result<Tensor> {
        computed(self.what, self.a, self.b, nodes)
    }
}

/// One output for each element of `a`, by whichever kernels take both; `b` again and again where it
/// is smaller.
pub(super) fn computed(
    what: Element,
    a: &candle_core::Tensor,
    b: &candle_core::Tensor,
    nodes: &Nodes,
) -> candle_core::Result<Tensor> {
    let backend = match what {
        Element::SiluGrad | Element::GeluGrad => Backend::wide(&[a, b]),
        Element::Add
        | Element::Mul
        | Element::Scale
        | Element::Shift
        | Element::Silu
        | Element::Gelu => Backend::of(&[a, b]),
    };
    let repeats = b.elem_count() == 1 || a.dims().ends_with(b.dims());
    Ok(Tensor::of(match backend {
        Backend::Cpu if repeats => cpu::map(what, a, b)?,
        Backend::Cuda(kernels) if repeats => kernels.map(nodes, what.into(), a, b)?,
        Backend::Cpu | Backend::Cuda(_) | Backend::Portable => portable::map(what, a, b)?,
    }))
}

/// a + b, equal shapes. Towards either side, the gradient as it is.
///
/// # Errors
/// Shapes or types that differ.
pub fn add(at: At, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    same_shape(a, b)?;
    let sum = at.launch(&Elementwise::new(Element::Add, a, b))?;
    let same = |_: At, dy: &Tensor| Ok(dy.clone());
    Ok(sum.made_from(at, a, same).made_from(at, b, same))
}

/// a · b element by element, equal shapes. Towards one side, the gradient times the other.
///
/// # Errors
/// Shapes or types that differ.
pub fn mul(at: At, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    same_shape(a, b)?;
    let product = at.launch(&Elementwise::new(Element::Mul, a, b))?;
    let (to_a, to_b) = (b.detach(), a.detach());
    let product = product.made_from(at, a, move |at, dy| mul(at, dy, &to_a));
    Ok(product.made_from(at, b, move |at, dy| mul(at, dy, &to_b)))
}

fn same_shape(a: &Tensor, b: &Tensor) -> Result<()> {
    anyhow::ensure!(a.dims() == b.dims(), "{:?} beside {:?}", a.dims(), b.dims());
    Ok(())
}

/// x times one factor, a tensor of one element (candle's `affine` would also add a zero). The
/// gradient likewise.
///
/// # Errors
/// A factor of another type or of more elements.
pub fn scale(at: At, x: &Tensor, factor: &Tensor) -> Result<Tensor> {
    anyhow::ensure!(factor.elements() == 1, "a factor has one element, not {:?}", factor.dims());
    let scaled = at.launch(&Elementwise::new(Element::Scale, x, factor))?;
    let factor = factor.detach();
    Ok(scaled.made_from(at, x, move |at, dy| scale(at, dy, &factor)))
}

/// x + 1 without a graph, `one` being a tensor of 1: the gain of a norm that multiplies by 1 + gain.
///
/// # Errors
/// More than one element in `one`.
pub(super) fn shift(at: At, x: &Tensor, one: &Tensor) -> Result<Tensor> {
    anyhow::ensure!(one.elements() == 1, "one has one element, not {:?}", one.dims());
    at.launch(&Elementwise::new(Element::Shift, x, one))
}

/// x / (1 + exp(−x)).
///
/// # Errors
/// The device's.
pub fn silu(at: At, x: &Tensor) -> Result<Tensor> {
    activated(at, Activation::Silu, x)
}

/// GELU by its tanh approximation, x · (1 + tanh(u)) / 2 with u = √(2/π) · (x + 0.044715 x³), as
/// x / (1 + exp(−2u)).
///
/// # Errors
/// The device's.
pub fn gelu(at: At, x: &Tensor) -> Result<Tensor> {
    activated(at, Activation::GeluTanh, x)
}

/// (what it is, its gradient)
fn elements(activation: Activation) -> (Element, Element) {
    match activation {
        Activation::Silu => (Element::Silu, Element::SiluGrad),
        Activation::GeluTanh => (Element::Gelu, Element::GeluGrad),
    }
}

fn activated(at: At, activation: Activation, x: &Tensor) -> Result<Tensor> {
    let (what, _) = elements(activation);
    let y = at.launch(&Elementwise::new(what, x, x))?;
    let saved = x.detach();
    Ok(y.made_from(at, x, move |at, dy| activation_grad(at, activation, &saved, dy)))
}

/// The derivative of the activation at `x`, times `dy`.
fn activation_grad(at: At, activation: Activation, x: &Tensor, dy: &Tensor) -> Result<Tensor> {
    let (_, gradient) = elements(activation);
    at.launch(&Elementwise::new(gradient, x, dy))
}

/// activation(gate) · up, equal shapes; on a GPU in one launch.
///
/// # Errors
/// Shapes or types that differ.
pub fn gated(at: At, activation: Activation, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    same_shape(gate, up)?;
    let Some(kernels) = Kernels::of(&[&gate.data, &up.data]) else {
        return mul(at, &activated(at, activation, gate)?, up);
    };
    let keep = at.is_taped() && (gate.needs_gradient() || up.needs_gradient());
    let (act, product) = at.launch(&Gated { kernels, activation, gate, up, keep })?;
    let Some(act) = act else { return Ok(product) };
    if !(gate.needs_gradient() && up.needs_gradient()) {
        let (saved, to_gate) = (gate.detach(), up.detach());
        let to_gate = move |at: At, dy: &Tensor| {
            activation_grad(at, activation, &saved, &mul(at, dy, &to_gate)?)
        };
        let product = product.made_from(at, gate, to_gate);
        return Ok(product.made_from(at, up, move |at, dy| mul(at, dy, &act)));
    }
    // Both gradients are one launch, made when the first is asked for; the other waits here.
    let waiting = Arc::new(Mutex::new(None));
    let (of_up, inputs) = (waiting.clone(), [gate.detach(), up.detach(), act]);
    let product = product.made_from(at, gate, move |at, dy| {
        let [gate, up, act] = &inputs;
        let (to_gate, to_up) =
            at.launch(&GatedGrad { activation, dy: &dy.contiguous()?, gate, up, act })?;
        *waiting.lock().unwrap_or_else(PoisonError::into_inner) = Some(to_up);
        Ok(to_gate)
    });
    Ok(product.made_from(at, up, move |_, _| {
        let to_up = of_up.lock().unwrap_or_else(PoisonError::into_inner).take();
        to_up.ok_or_else(|| anyhow::anyhow!("the gate's gradient comes first"))
    }))
}

/// activation(gate) · up, and activation(gate) where it is kept.
struct Gated<'a> {
    kernels: Kernels,
    activation: Activation,
    gate: &'a Tensor,
    up: &'a Tensor,
    keep: bool,
}

impl Kernel for Gated<'_> {
    type Output = (Option<Tensor>, Tensor);

    fn device(&self) -> &Device {
        self.gate.device()
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        report_gate(ops, self.activation, &self.gate.data)
    }

    fn run(&self, nodes: &Nodes) -> candle_core::Result<Self::Output> {
        let Self { kernels, activation, gate, up, keep } = self;
        let gate_kind = (*activation).into();
        let (act, out) = kernels.gated(nodes, gate_kind, &gate.data, &up.data, *keep)?;
        Ok((act.map(Tensor::of), Tensor::of(out)))
    }
}

/// The ops of activation(gate) · up, wherever they are part of a launch.
pub(super) fn report_gate(
    ops: &mut Ops,
    activation: Activation,
    gate: &candle_core::Tensor,
) -> Result<()> {
    let dtype = dtype_of(gate)?;
    let all = ops_of_gate(activation, gate.elem_count() as u64);
    all.into_iter().for_each(|op| ops.add(op, dtype));
    Ok(())
}

/// The same of n elements each.
pub(super) fn ops_of_gate(activation: Activation, n: u64) -> [Op; 2] {
    let activated = match activation {
        Activation::Silu => Op::Silu { n },
        Activation::GeluTanh => Op::Gelu { n },
    };
    [activated, Op::Mul { n }]
}

/// Towards gate and up at once: activation'(gate) · dy · up and dy · act.
struct GatedGrad<'a> {
    activation: Activation,
    dy: &'a Tensor,
    gate: &'a Tensor,
    up: &'a Tensor,
    act: &'a Tensor,
}

impl Kernel for GatedGrad<'_> {
    type Output = (Tensor, Tensor);

    fn device(&self) -> &Device {
        self.gate.device()
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        let (n, dtype) = (self.gate.elements() as u64, self.gate.dtype()?);
        let derived = match self.activation {
            Activation::Silu => Op::SiluGrad { n },
            Activation::GeluTanh => Op::GeluGrad { n },
        };
        // dy · up, the derivative of the activation times that, dy · act.
        [Op::Mul { n }, derived, Op::Mul { n }].into_iter().for_each(|op| ops.add(op, dtype));
        Ok(())
    }

    fn run(&self, nodes: &Nodes) -> candle_core::Result<Self::Output> {
        let Self { activation, dy, gate, up, act } = self;
        let tensors = [dy, gate, up, act].map(|t| &t.data);
        let Some(kernels) = Kernels::of(&tensors) else {
            candle_core::bail!("a gate's gradient in one launch is for a GPU");
        };
        let [dy, gate, up, act] = tensors;
        let (to_gate, to_up) =
            kernels.gated_grad(nodes, (*activation).into(), dy, gate, up, act)?;
        Ok((Tensor::of(to_gate), Tensor::of(to_up)))
    }
}
