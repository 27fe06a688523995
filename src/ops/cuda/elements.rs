//! What is done element by element, and layouts by heads.

use candle_core::{Result, Tensor};

use super::{
    Kernels, args,
    call::{Call, File, blocks},
    tiles::{ELEMENT_THREADS, PACKS},
};
use crate::ops::launch::Nodes;

/// One operation an element.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::ops) enum Map {
    /// a + b
    Add,
    /// a · b
    Mul,
    /// SiLU of a, whatever b is.
    Silu,
    /// SiLU's derivative at a, times b.
    SiluGrad,
    /// GELU of a by its tanh, whatever b is.
    Gelu,
    /// That GELU's derivative at a, times b.
    GeluGrad,
}

/// What the gate of a gated unit goes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::ops) enum Gate {
    /// x / (1 + exp(−x))
    Silu,
    /// x / (1 + exp(x·(a + b·x²))), GELU by its tanh: a = −2·√(2/π), b = 0.044715·a.
    Gelu,
}

/// Rotation by position.
#[derive(Debug, Clone, Copy)]
pub(in crate::ops) struct Turn<'a> {
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

impl Map {
    fn name(self) -> &'static str {
        match self {
            Self::Add => "add",
            Self::Mul => "mul",
            Self::Silu => "silu",
            Self::SiluGrad => "silu_grad",
            Self::Gelu => "gelu",
            Self::GeluGrad => "gelu_grad",
        }
    }
}

/// Elements that a thread takes at once.
pub(super) fn pack(by_several: bool) -> usize {
    let [[one], [several]] = PACKS;
    (if by_several { several } else { one }) as usize
}

/// Whether `n` elements are so many packs of several.
pub(super) fn by_several(n: usize) -> bool {
    n.is_multiple_of(pack(true))
}

impl Call<'_> {
    /// Starts a kernel that takes `n` elements, a thread a pack.
    ///
    /// # Safety
    /// As [`Self::start`].
    pub(super) unsafe fn start_packed<A: Copy>(
        &self,
        n: usize,
        pack: usize,
        args: &A,
    ) -> Result<()> {
        let grid = blocks(n / pack, ELEMENT_THREADS);
        // SAFETY: the caller's.
        unsafe { self.start(&[pack as u32], grid, ELEMENT_THREADS, args) }
    }
}

impl Kernels {
    /// `what` of a and b, which comes again and again where it has fewer elements.
    ///
    /// # Errors
    /// Elements of b that do not go into those of a; the device's.
    pub(in crate::ops) fn map(
        &self,
        nodes: &Nodes,
        what: Map,
        a: &Tensor,
        b: &Tensor,
    ) -> Result<Tensor> {
        let out = self.output(a)?;
        self.map_into(nodes, what, &out, a, b)?;
        Ok(out)
    }

    /// The same into `out`, which may be a.
    ///
    /// # Errors
    /// As [`Kernels::map`]; another number of elements in `out`.
    pub(in crate::ops) fn map_into(
        &self,
        nodes: &Nodes,
        what: Map,
        out: &Tensor,
        a: &Tensor,
        b: &Tensor,
    ) -> Result<()> {
        let call = self.call(nodes, File::Elements, what.name());
        let (n, period) = (a.elem_count(), b.elem_count());
        call.check(n.is_multiple_of(period) && out.elem_count() == n, &[out, a, b])?;
        let args = args::Map {
            out: call.writes(out)?,
            a: call.reads(a)?,
            b: call.reads(b)?,
            n: n as u64,
            period: period as u64,
        };
        let pack = pack(by_several(n) && (period == 1 || by_several(period)));
        // SAFETY: of a and out there are n, of b there are period.
        unsafe { call.start_packed(n, pack, &args) }
    }

    /// (the gate's activation if it is to be kept, it · up)
    ///
    /// # Errors
    /// Shapes that differ; the device's.
    pub(in crate::ops) fn gated(
        &self,
        nodes: &Nodes,
        kind: Gate,
        gate: &Tensor,
        up: &Tensor,
        keep: bool,
    ) -> Result<(Option<Tensor>, Tensor)> {
        let act = keep.then(|| self.output(gate)).transpose()?;
        let out = self.output(gate)?;
        self.gate(nodes, kind, act.as_ref(), &out, gate, up)?;
        Ok((act, out))
    }

    /// out = the gate's activation · up
    ///
    /// # Errors
    /// Shapes that differ; the device's.
    pub(in crate::ops) fn gated_into(
        &self,
        nodes: &Nodes,
        kind: Gate,
        out: &Tensor,
        gate: &Tensor,
        up: &Tensor,
    ) -> Result<()> {
        self.gate(nodes, kind, None, out, gate, up)
    }

    fn gate(
        &self,
        nodes: &Nodes,
        kind: Gate,
        act: Option<&Tensor>,
        out: &Tensor,
        gate: &Tensor,
        up: &Tensor,
    ) -> Result<()> {
        let name = match kind {
            Gate::Silu => "gated_silu",
            Gate::Gelu => "gated_gelu",
        };
        let call = self.call(nodes, File::Elements, name);
        let n = gate.elem_count();
        call.check(up.elem_count() == n && out.elem_count() == n, &[out, gate, up])?;
        let args = args::Gated {
            act: call.writes_any(act)?,
            out: call.writes(out)?,
            gate: call.reads(gate)?,
            up: call.reads(up)?,
            n: n as u64,
        };
        // SAFETY: of each there are n, the activation being made like the gate.
        unsafe { call.start_packed(n, pack(by_several(n)), &args) }
    }

    /// (towards gate, towards up) from `dy`, the gradient of activation · up, act being the
    /// gate's activation.
    ///
    /// # Errors
    /// Shapes that differ; the device's.
    pub(in crate::ops) fn gated_grad(
        &self,
        nodes: &Nodes,
        kind: Gate,
        dy: &Tensor,
        gate: &Tensor,
        up: &Tensor,
        act: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        let name = match kind {
            Gate::Silu => "gated_silu_grad",
            Gate::Gelu => "gated_gelu_grad",
        };
        let call = self.call(nodes, File::Elements, name);
        let n = gate.elem_count();
        let alike = [dy, up, act].iter().all(|t| t.elem_count() == n);
        call.check(alike, &[dy, gate, up, act])?;
        let (to_gate, to_up) = (self.output(gate)?, self.output(up)?);
        let args = args::GatedGrad {
            to_gate: call.writes(&to_gate)?,
            to_up: call.writes(&to_up)?,
            dy: call.reads(dy)?,
            gate: call.reads(gate)?,
            up: call.reads(up)?,
            act: call.reads(act)?,
            n: n as u64,
        };
        // SAFETY: of each there are n.
        unsafe { call.start_packed(n, pack(by_several(n)), &args)? };
        Ok((to_gate, to_up))
    }

    /// Adds `bias` (n) to each row of `out` (rows, n), which may be columns of a wider matrix.
    ///
    /// # Errors
    /// Another width; the device's.
    pub(in crate::ops) fn add_bias(
        &self,
        nodes: &Nodes,
        out: &Tensor,
        bias: &Tensor,
    ) -> Result<()> {
        let call = self.call(nodes, File::Elements, "add_bias");
        let [rows, n, stride] = call.columns(out)?;
        call.check(bias.elem_count() == n, &[out, bias])?;
        call.size(rows * n)?;
        let args = args::AddBias {
            out: call.writes_from(out)?,
            bias: call.reads(bias)?,
            rows: call.size(rows)?,
            n: call.size(n)?,
            stride: call.size(stride)?,
        };
        // SAFETY: out has rows of n, so far apart; bias has n.
        unsafe { call.start(&[], blocks(rows * n, ELEMENT_THREADS), ELEMENT_THREADS, &args) }
    }

    /// (A, B, C, d) → (A, C, B, d), each vector turned by its position where `turn` is given, and
    /// multiplied by `factor`, a tensor of one element.
    ///
    /// # Errors
    /// An odd d, positions past the table's end; the device's.
    pub(in crate::ops) fn heads(
        &self,
        nodes: &Nodes,
        x: &Tensor,
        turn: Option<Turn>,
        factor: Option<&Tensor>,
    ) -> Result<Tensor> {
        let call = self.call(nodes, File::Elements, "heads");
        let [a, b, c, d] = call.dims(x)?;
        call.check(d.is_multiple_of(2), &[x])?;
        call.check(factor.is_none_or(|f| f.elem_count() == 1), &[x])?;
        if let Some(Turn { cos, sin, past, inner, .. }) = turn {
            let [positions, half] = call.dims(cos)?;
            let within = past + if inner { c } else { b } <= positions;
            let fits = within && half == d / 2 && sin.dims() == cos.dims();
            call.check(fits, &[x, cos, sin])?;
        }
        let out = self.empty((a, c, b, d), self.dtype)?;
        let pack = pack(by_several(d / 2));
        let pairs = x.elem_count() / 2 / pack;
        let args = args::Heads {
            out: call.writes(&out)?,
            x: call.reads(x)?,
            cos: call.reads_any(turn.map(|t| t.cos))?,
            sin: call.reads_any(turn.map(|t| t.sin))?,
            factor: call.reads_any(factor)?,
            pairs: pairs as u64,
            b: call.size(b)?,
            c: call.size(c)?,
            d: call.size(d)?,
            past: call.size(turn.map_or(0, |t| t.past))?,
            inner: turn.is_some_and(|t| t.inner).into(),
            sign: turn.map_or(1.0, |t| t.sign),
        };
        // SAFETY: x and out have A vectors of B · C, the table has a row for each position.
        unsafe { call.start_packed(pairs * pack, pack, &args)? };
        Ok(out)
    }
}
