//! Launches of decoding: each a kernel that computes several ops, with the tensors that it takes.

use candle_core::Device;

use super::{
    super::{
        Attention, Kernel, Nodes, Ops, Tensor,
        cache::Counted,
        cuda::{Adapt, Attend, Kernels, Map, Norm as KernelNorm, Out, Project},
        dtype_of,
        elementwise::report_gate,
    },
    LowRank, Norm, Product,
};
use crate::{
    config::Activation,
    error::Result,
    ledger::{Dtype, Op},
    meter::At,
};

impl<'a> From<Norm<'a>> for KernelNorm<'a> {
    fn from(Norm { gain, eps, one, .. }: Norm<'a>) -> Self {
        Self { gain: &gain.data, eps, shift: one.is_some() }
    }
}

/// The ops of a norm over rows of `x` as wide as its gain.
fn report_norm<'a>(ops: &mut Ops<'a>, norm: Norm<'a>, x: &candle_core::Tensor) -> Result<()> {
    let rows = x.elem_count() / norm.gain.elements().max(1);
    report_norm_of(ops, norm, rows as u64, dtype_of(x)?);
    Ok(())
}

/// The same over so many rows.
pub(super) fn report_norm_of<'a>(ops: &mut Ops<'a>, norm: Norm<'a>, rows: u64, dtype: Dtype) {
    let width = norm.gain.elements() as u64;
    if norm.one.is_some() {
        ops.add_at(norm.at, Op::Shift { n: width }, dtype);
    }
    ops.add_at(norm.at, Op::RmsNorm { rows, width }, dtype);
}

/// The product of x (m, k) with a weight (n, k), at its own place.
fn report_product<'a>(
    ops: &mut Ops<'a>,
    at: At<'a>,
    x: &candle_core::Tensor,
    weight: &Tensor,
) -> Result<()> {
    report_product_of(ops, at, x.dim(0)? as u64, weight)
}

/// The same of so many rows.
pub(super) fn report_product_of<'a>(
    ops: &mut Ops<'a>,
    at: At<'a>,
    m: u64,
    weight: &Tensor,
) -> Result<()> {
    let (n, k) = weight.data.dims2()?;
    ops.add_at(at, Op::Matmul { b: 1, m, k: k as u64, n: n as u64 }, weight.dtype()?);
    Ok(())
}

/// Rows of a table, times a factor where there is one.
pub(super) struct EmbedInto<'a> {
    pub kernels: &'a Kernels,
    pub out: &'a candle_core::Tensor, // (B, D)
    pub table: &'a Tensor,            // (V, D)
    pub ids: &'a candle_core::Tensor, // (1, B)
    pub factor: Option<&'a Tensor>,
}

impl Kernel for EmbedInto<'_> {
    type Output = ();

    fn device(&self) -> &Device {
        self.out.device()
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        let ((rows, width), dtype) = (self.out.dims2()?, dtype_of(self.out)?);
        let (rows, width) = (rows as u64, width as u64);
        ops.add(Op::Embed { rows, width }, dtype);
        if self.factor.is_some() {
            ops.add(Op::Scale { n: rows * width }, dtype);
        }
        Ok(())
    }

    fn run(&self, nodes: &Nodes) -> candle_core::Result<()> {
        let factor = self.factor.map(|factor| &factor.data);
        self.kernels.embed(nodes, self.out, &self.table.data, self.ids, factor)
    }
}

/// A norm by itself.
pub(super) struct NormInto<'a> {
    pub kernels: &'a Kernels,
    pub out: &'a candle_core::Tensor, // (B, w)
    pub x: &'a candle_core::Tensor,   // (B, w)
    pub norm: Norm<'a>,
}

impl Kernel for NormInto<'_> {
    type Output = ();

    fn device(&self) -> &Device {
        self.out.device()
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        report_norm(ops, self.norm, self.x)
    }

    fn run(&self, nodes: &Nodes) -> candle_core::Result<()> {
        self.kernels.rms_norm_into(nodes, self.out, self.x, self.norm.into())
    }
}

/// Where a product goes.
#[derive(Clone, Copy)]
pub(super) enum To<'a> {
    /// Columns of this (B, Σ n).
    Plain(&'a candle_core::Tensor),
    /// Added to this (B, n), the sum being accounted for there.
    Added(At<'a>, &'a candle_core::Tensor),
    /// Of two products, activation(first) · second: this (B, n).
    Gated(Activation, &'a candle_core::Tensor),
}

impl<'a> To<'a> {
    pub fn tensor(self) -> &'a candle_core::Tensor {
        match self {
            Self::Plain(tensor) | Self::Added(_, tensor) | Self::Gated(_, tensor) => tensor,
        }
    }

    /// What is done to products on their way there.
    fn report(self, ops: &mut Ops<'a>) -> Result<()> {
        match self {
            Self::Plain(_) => Ok(()),
            Self::Added(residual, sum) => {
                ops.add_at(residual, Op::Add { n: sum.elem_count() as u64 }, dtype_of(sum)?);
                Ok(())
            }
            Self::Gated(activation, inner) => report_gate(ops, activation, inner),
        }
    }
}

/// Up to three products of x, normed first where there is a norm.
pub(super) struct Projected<'a> {
    pub kernels: &'a Kernels,
    pub out: To<'a>,
    pub x: &'a candle_core::Tensor, // (B, k)
    pub norm: Option<Norm<'a>>,
    pub products: &'a [Product<'a>],
    /// Weights that come nearer meanwhile.
    pub ahead: &'a [&'a Tensor],
}

impl Kernel for Projected<'_> {
    type Output = ();

    fn device(&self) -> &Device {
        self.x.device()
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        if let Some(norm) = self.norm {
            report_norm(ops, norm, self.x)?;
        }
        let (rows, dtype) = (self.x.dim(0)? as u64, dtype_of(self.x)?);
        for Product { at, weight, bias, .. } in self.products {
            report_product(ops, *at, self.x, weight)?;
            if let Some(bias) = bias {
                ops.add_at(*at, Op::Bias { rows, width: bias.elements() as u64 }, dtype);
            }
        }
        self.out.report(ops)
    }

    fn run(&self, nodes: &Nodes) -> candle_core::Result<()> {
        let pair = |product: &Product<'_>| {
            (product.weight.data.clone(), product.bias.map(|b| b.data.clone()))
        };
        let pairs: Vec<_> = self.products.iter().map(pair).collect();
        let products: Vec<_> = pairs.iter().map(|(w, b)| (w, b.as_ref())).collect();
        let ahead: Vec<_> = self.ahead.iter().map(|weight| &weight.data).collect();
        let out = match self.out {
            To::Plain(out) => Out::Plain(out),
            To::Added(_, out) => Out::Added(out),
            To::Gated(activation, out) => Out::Gated(activation.into(), out),
        };
        let norm = self.norm.map(Into::into);
        let x = self.x;
        self.kernels.project(nodes, Project { out, x, norm, products: &products, ahead: &ahead })
    }
}

/// One product by cuBLAS.
pub(super) struct Library<'a> {
    pub kernels: &'a Kernels,
    pub out: To<'a>,
    pub x: &'a candle_core::Tensor, // (B, k)
    pub weight: &'a Tensor,         // (n, k)
}

impl Kernel for Library<'_> {
    type Output = ();

    fn device(&self) -> &Device {
        self.x.device()
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        report_product(ops, ops.at(), self.x, self.weight)?;
        self.out.report(ops)
    }

    fn run(&self, nodes: &Nodes) -> candle_core::Result<()> {
        let (out, added) = match self.out {
            To::Plain(out) => (out, None),
            To::Added(_, out) => (out, Some(1.0)),
            To::Gated(..) => candle_core::bail!("cuBLAS has no gate"),
        };
        let kernels = self.kernels;
        let (x, weight) = (kernels.matrices(self.x)?, kernels.matrices(&self.weight.data)?);
        kernels.product_into(nodes, out, x, weight.t(), added)
    }
}

/// A bias added in place.
pub(super) struct BiasInto<'a> {
    pub kernels: &'a Kernels,
    pub out: &'a candle_core::Tensor, // (B, n), columns of a wider matrix maybe
    pub bias: &'a Tensor,             // (n)
}

impl Kernel for BiasInto<'_> {
    type Output = ();

    fn device(&self) -> &Device {
        self.out.device()
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        let (rows, width) = self.out.dims2()?;
        ops.add(Op::Bias { rows: rows as u64, width: width as u64 }, dtype_of(self.out)?);
        Ok(())
    }

    fn run(&self, nodes: &Nodes) -> candle_core::Result<()> {
        self.kernels.add_bias(nodes, self.out, &self.bias.data)
    }
}

/// What adapters of one rank and one scale add to up to three products, from what their A made of
/// the input.
pub(super) struct Adapted<'a> {
    pub kernels: &'a Kernels,
    pub low: &'a candle_core::Tensor, // (B, Σ r)
    /// Each with the product (B, n) that it is added to.
    pub adapters: &'a [(LowRank<'a>, candle_core::Tensor)],
}

impl Kernel for Adapted<'_> {
    type Output = ();

    fn device(&self) -> &Device {
        self.low.device()
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        let (rows, dtype) = (self.low.dim(0)? as u64, dtype_of(self.low)?);
        for (LowRank { b: (at, b), scaling, sum, .. }, _) in self.adapters {
            let (n, r) = b.data.dims2()?;
            let (n, r) = (n as u64, r as u64);
            ops.add_at(*at, Op::Matmul { b: 1, m: rows, k: r, n }, dtype);
            ops.add_at(scaling.at, Op::Scale { n: rows * n }, dtype);
            ops.add_at(*sum, Op::Add { n: rows * n }, dtype);
        }
        Ok(())
    }

    fn run(&self, nodes: &Nodes) -> candle_core::Result<()> {
        // All have the first one's.
        let Some((first, _)) = self.adapters.first() else { return Ok(()) };
        let adapters: Vec<_> = self.adapters.iter().map(|(a, out)| (out, &a.b.1.data)).collect();
        let scaling = &first.scaling.tensor.data;
        self.kernels.adapt(nodes, Adapt { x: self.low, adapters: &adapters, scaling })
    }
}

/// activation(gate) · up.
pub(super) struct GateInto<'a> {
    pub kernels: &'a Kernels,
    pub activation: Activation,
    pub out: &'a candle_core::Tensor,
    pub gate: &'a candle_core::Tensor,
    pub up: &'a candle_core::Tensor,
}

impl Kernel for GateInto<'_> {
    type Output = ();

    fn device(&self) -> &Device {
        self.out.device()
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        report_gate(ops, self.activation, self.gate)
    }

    fn run(&self, nodes: &Nodes) -> candle_core::Result<()> {
        self.kernels.gated_into(nodes, self.activation.into(), self.out, self.gate, self.up)
    }
}

/// x + y in the place of x.
pub(super) struct AddedInto<'a> {
    pub kernels: &'a Kernels,
    pub x: &'a candle_core::Tensor,
    pub y: &'a candle_core::Tensor,
}

impl Kernel for AddedInto<'_> {
    type Output = ();

    fn device(&self) -> &Device {
        self.x.device()
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        ops.add(Op::Add { n: self.x.elem_count() as u64 }, dtype_of(self.x)?);
        Ok(())
    }

    fn run(&self, nodes: &Nodes) -> candle_core::Result<()> {
        self.kernels.map_into(nodes, Map::Add, self.x, self.x, self.y)
    }
}

/// Attention of one token of each sequence: norms of queries and keys, RoPE, both written to the
/// cache, and the softmax-weighted mix of the values there.
pub(super) struct AttendOne<'a> {
    pub kernels: &'a Kernels,
    pub a: &'a Attention<'a>,
    pub out: &'a candle_core::Tensor, // (B, H·d)
    pub q: &'a candle_core::Tensor,   // (B, H·d)
    pub k: &'a candle_core::Tensor,   // (B, K·d)
    pub v: &'a candle_core::Tensor,   // (B, K·d)
    pub keys: &'a Tensor,             // (B, K, capacity, d)
    pub values: &'a Tensor,           // (B, K, capacity, d)
    /// Tokens held before this one.
    pub counted: &'a Counted,
    /// Tokens held of the longest sequence when this is launched, the new one included.
    pub held_now: u64,
    /// How many fewer each sequence holds; none where all hold as many.
    pub behind: Option<Vec<usize>>,
    pub shares: &'a candle_core::Tensor,
    pub done: &'a candle_core::Tensor,
}

impl Kernel for AttendOne<'_> {
    type Output = ();

    fn device(&self) -> &Device {
        self.out.device()
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        let (_, kv_heads, _, d) = self.keys.data.dims4()?;
        let ((batch, width), dtype) = (self.q.dims2()?, dtype_of(self.q)?);
        let [b, h, kv, d] = [batch, width / d, kv_heads, d].map(|n| n as u64);
        for (norm, x) in [(self.a.q_norm, self.q), (self.a.k_norm, self.k)] {
            norm.map_or(Ok(()), |norm| report_norm(ops, norm, x))?;
        }
        match &self.behind {
            None => report_attention(ops, self.a, [b, h, kv, d], (self.held_now, 0), dtype),
            Some(behind) => {
                let each = behind.iter().map(|behind| *behind as u64);
                each.for_each(|less| {
                    report_attention(ops, self.a, [1, h, kv, d], (self.held_now, less), dtype);
                });
            }
        }
        Ok(())
    }

    fn run(&self, nodes: &Nodes) -> candle_core::Result<()> {
        let (cos, sin) = self.a.rope.parts();
        self.kernels.attend(
            nodes,
            Attend {
                out: self.out,
                q: self.q,
                k: self.k,
                v: self.v,
                keys: &self.keys.data,
                values: &self.values.data,
                cos: &cos.data,
                sin: &sin.data,
                scale: &self.a.scale.data,
                q_norm: self.a.q_norm.map(Into::into),
                k_norm: self.a.k_norm.map(Into::into),
                held: &self.counted.held,
                behind: self.counted.behind.as_ref(),
                window: self.a.window,
                shares: self.shares,
                done: self.done,
            },
        )
    }
}

/// What attention of one token computes of b sequences that hold `less` tokens fewer than the longest,
/// which holds `held`: rotations, the cache, and scores, softmax and values over the tokens held, or over
/// the latest of a window.
pub(super) fn report_attention<'a>(
    ops: &mut Ops<'a>,
    a: &Attention<'a>,
    [b, h, kv, d]: [u64; 4],
    (held, less): (u64, u64),
    dtype: Dtype,
) {
    let write = Op::CacheWrite { rows: b, width: kv * d };
    let [q, k] = [b * h * d, b * kv * d];
    for op in [Op::Rope { n: q }, Op::Scale { n: q }, Op::Rope { n: k }, write, write] {
        ops.add_at(a.at, op, dtype);
    }
    let most = a.window.map_or(u64::MAX, |window| window as u64);
    let (b_kv, group, rows) = (b * kv, h / kv, b * h);
    let reached = move |held: u64| (held - less).min(most);
    let scores = move |held| Op::Matmul { b: b_kv, m: group, k: d, n: reached(held) };
    let softmax = move |held| Op::Softmax { rows, width: reached(held) };
    let values = move |held| Op::Matmul { b: b_kv, m: group, k: reached(held), n: d };
    ops.over_held_at(a.at, held, scores, dtype);
    ops.over_held_at(a.at, held, softmax, dtype);
    ops.over_held_at(a.at, held, values, dtype);
}
