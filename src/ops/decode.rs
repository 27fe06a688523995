//! One token of each sequence on a GPU: what [`crate::model`]'s forward pass runs op by op, in few
//! launches that write to buffers made beforehand, so that they can be recorded and replayed.
//!
//! Each method reports every op that its launches contain, with the dimensions of what it is
//! given. It does so too where a recording stands in for the launches: then it launches nothing.

use candle_core::{DType, Device};

use super::{
    RopeTable, Tensor,
    cuda::{self, Arg, File, Graph, Kernels, unranked},
    sample,
};
use crate::{
    error::Result,
    ledger::{Dtype, Op},
    meter::At,
};

/// Sizes that decoding is made for.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    /// Sequences.
    pub batch: usize,
    /// Tokens of each that the cache has room for.
    pub capacity: usize,
    /// Tokens of each that are held before the first step.
    pub past: usize,
    /// Steps at most.
    pub steps: usize,
    /// D
    pub hidden: usize,
    /// F
    pub inner: usize,
    /// H
    pub heads: usize,
    /// K
    pub kv_heads: usize,
    /// d
    pub head_dim: usize,
    /// V
    pub vocab: usize,
}

/// A weight (n, k) with its bias (n), and where its product is accounted for.
#[derive(Clone, Copy)]
pub struct Product<'a, 'm> {
    /// The projection.
    pub at: At<'m>,
    /// (n, k)
    pub weight: &'a Tensor,
    /// (n)
    pub bias: Option<&'a Tensor>,
}

/// A norm's gain (D), its epsilon, and where it is accounted for.
#[derive(Clone, Copy)]
pub struct Norm<'a, 'm> {
    /// The norm.
    pub at: At<'m>,
    /// (D)
    pub gain: &'a Tensor,
    /// Added to the mean square.
    pub eps: f64,
}

/// The state of a decoding batch on its device.
pub struct Decoding {
    sizes: Sizes,
    kernels: Kernels,
    dtype: Dtype,
    device: Device,
    x: candle_core::Tensor,      // (B, D), the residual stream
    normed: candle_core::Tensor, // (B, D)
    qkv: candle_core::Tensor,    // (B, (H + 2K)·d)
    mixed: candle_core::Tensor,  // (B, H·d)
    gate: candle_core::Tensor,   // (B, F)
    up: candle_core::Tensor,     // (B, F)
    inner: candle_core::Tensor,  // (B, F)
    logits: candle_core::Tensor, // (B, V)
    ids: candle_core::Tensor,    // (B), the tokens to feed
    held: candle_core::Tensor,   // one: tokens in the cache
    chosen: candle_core::Tensor, // (steps, B), as `ranked` in common.cuh
    best: candle_core::Tensor,   // (B), zeros between launches
    done: candle_core::Tensor,   // (B·K + 1), likewise
    shares: candle_core::Tensor, // (B·H, splits, d + 2)
    splits: usize,
    /// Tokens that are held when the next step begins.
    past: usize,
    graph: Option<Graph>,
    replaying: bool,
    /// Whether a step has run, and with it every kernel once.
    ran: bool,
}

impl std::fmt::Debug for Decoding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Decoding({:?}, {} held)", self.sizes, self.past)
    }
}

/// The last arguments of a kernel: weights to fetch ahead, two at most, with their bytes.
fn fetched<'a>(weights: &[&'a Tensor]) -> [Arg<'a>; 4] {
    let mut args = [Arg::Null, Arg::U64(0), Arg::Null, Arg::U64(0)];
    for (pair, weight) in args.chunks_exact_mut(2).zip(weights) {
        let bytes = weight.elements() * weight.data.dtype().size_in_bytes();
        pair.copy_from_slice(&[Arg::Of(&weight.data), Arg::U64(bytes as u64)]);
    }
    args
}

/// Most rows that our own kernels of products take; more go through cuBLAS.
fn few(dtype: Dtype) -> usize {
    match dtype {
        Dtype::BF16 => 32,
        Dtype::F32 | Dtype::F16 => 8,
    }
}

/// Rows up to which the kernels of products normalize their input themselves: each of their blocks
/// does.
const NORMED_BY_EACH: usize = 8;
/// Most shares that the keys of one head are split into (`MOST_SPLITS` in decode.cu).
const MOST_SPLITS: usize = 32;
/// Most query heads of one key head (`MOST_G` in decode.cu).
const MOST_GROUP: usize = 8;

impl Decoding {
    /// Buffers for `sizes`; none where `device` or `dtype` has no kernels for them.
    ///
    /// # Errors
    /// The device's, out of memory among them.
    pub fn new(sizes: Sizes, dtype: Dtype, device: &Device) -> Result<Option<Self>> {
        let Sizes { batch, capacity, past, steps, hidden, inner, heads, kv_heads, head_dim, vocab } =
            sizes;
        let Some(kernels) = Kernels::on(device, dtype.to_candle()) else { return Ok(None) };
        let widths = [hidden, inner, vocab, heads * head_dim];
        let serves = matches!(head_dim, 8 | 64 | 128)
            && heads / kv_heads <= MOST_GROUP
            && widths.iter().all(|width| width.is_multiple_of(8))
            && Kernels::takes_rows_of(hidden)
            // A grid's second and third dimension.
            && batch <= 65_535;
        if !serves {
            return Ok(None);
        }
        // As many blocks as keep the device busy, none with too few keys to be worth a block.
        let most = 528usize.div_ceil(batch * kv_heads).clamp(1, MOST_SPLITS);
        let splits = capacity.div_ceil(64).clamp(1, most);
        let zeros = |shape: (usize, usize), dtype| candle_core::Tensor::zeros(shape, dtype, device);
        let wide = |width| zeros((batch, width), dtype.to_candle());
        let mut new = Self {
            sizes,
            kernels,
            dtype,
            device: device.clone(),
            x: wide(hidden)?,
            normed: wide(hidden)?,
            qkv: wide((heads + 2 * kv_heads) * head_dim)?,
            mixed: wide(heads * head_dim)?,
            gate: wide(inner)?,
            up: wide(inner)?,
            inner: wide(inner)?,
            logits: wide(vocab)?,
            ids: zeros((1, batch), DType::U32)?,
            held: zeros((1, 1), DType::U32)?,
            chosen: zeros((steps.max(1), batch), DType::I64)?,
            best: zeros((1, batch), DType::I64)?,
            done: zeros((1, batch * kv_heads + 1), DType::U32)?,
            shares: zeros((batch * heads, splits * (head_dim + 2)), DType::F32)?,
            splits,
            past,
            graph: None,
            replaying: false,
            ran: false,
        };
        new.hold(past)?;
        Ok(Some(new))
    }

    /// Runs `step`, which calls the methods below, once: as it is, or as a recording of it, which
    /// is made of the first step that asks for one.
    ///
    /// # Errors
    /// `step`'s, or a step past those that it was made for.
    pub fn step(&mut self, recorded: bool, step: impl Fn(&Self) -> Result<()>) -> Result<()> {
        let done = self.past - self.sizes.past;
        anyhow::ensure!(done < self.sizes.steps, "{done} steps of {} done", self.sizes.steps);
        match self.graph.take().filter(|_| recorded) {
            Some(graph) => {
                graph.replay()?;
                // Accounted for while the device is at it.
                self.replaying = true;
                let reported = step(self);
                self.replaying = false;
                reported?;
                self.graph = Some(graph);
            }
            // The first step loads kernels, which no recording may do.
            None if recorded && self.ran => {
                let graph = Graph::record(&self.device, || step(self))?;
                graph.replay()?;
                self.graph = Some(graph);
            }
            None => step(self)?,
        }
        self.ran = true;
        self.past += 1;
        Ok(())
    }

    /// Forgets the steps so far, which must not have chosen tokens: the next feeds the same again.
    pub fn rewind(&mut self) {
        self.past = self.sizes.past;
    }

    /// Sets the tokens that the next step feeds.
    ///
    /// # Errors
    /// Another number than the batch's.
    pub fn feed(&self, ids: &[u32]) -> Result<()> {
        let ids = candle_core::Tensor::from_slice(ids, (1, self.sizes.batch), &self.device)?;
        Ok(self.ids.slice_set(&ids, 0, 0)?)
    }

    /// Says how many tokens are held: for steps that choose no token themselves.
    ///
    /// # Errors
    /// The device's.
    pub fn hold(&mut self, past: usize) -> Result<()> {
        let held = candle_core::Tensor::from_slice(&[past as u32], (1, 1), &self.device)?;
        self.past = past;
        Ok(self.held.slice_set(&held, 0, 0)?)
    }

    /// The logits of the latest step, (B, V).
    pub fn logits(&self) -> Tensor {
        self.logits.clone().into()
    }

    /// The tokens that the latest `steps` steps chose, step after step.
    ///
    /// # Errors
    /// Logits that are not finite.
    pub fn chosen(&self, steps: usize) -> Result<Vec<Vec<u32>>> {
        let done = self.past - self.sizes.past;
        let latest = self.chosen.narrow(0, done - steps, steps)?.to_vec2::<i64>()?;
        let row = |row: Vec<i64>| sample::finite(row.into_iter().map(unranked).collect());
        latest.into_iter().map(row).collect()
    }

    fn launch(&self, name: &str, grid: [usize; 3], block: u32, args: &[Arg]) -> Result<()> {
        if self.replaying {
            return Ok(());
        }
        let name = format!("{name}_{}", self.kernels.suffix());
        Ok(self.kernels.launch(File::Decode, &name, grid.map(|n| n as u64), block, args)?)
    }

    fn rows(&self) -> u64 {
        self.sizes.batch as u64
    }

    /// x = rows of `table` (V, D).
    ///
    /// # Errors
    /// The device's.
    pub fn embed(&self, at: At, table: &Tensor) -> Result<()> {
        let width = self.sizes.hidden;
        let args =
            [Arg::Of(&self.x), Arg::Of(&table.data), Arg::Of(&self.ids), Arg::U32(width as u32)];
        self.launch("embed", [width.div_ceil(256), self.sizes.batch, 1], 256, &args)?;
        at.ran(Op::Embed { rows: self.rows(), width: width as u64 }, self.dtype);
        Ok(())
    }

    /// q, k and v of normed x, beside one another. Attention after it leaves memory idle: meanwhile
    /// the weights `ahead` come nearer, which a later kernel reads.
    ///
    /// # Errors
    /// The device's.
    pub fn queries_keys_values(
        &self,
        norm: Norm,
        products: [Product; 3],
        ahead: [&Tensor; 2],
    ) -> Result<()> {
        self.normed_products(norm, &products, &self.qkv, &ahead)
    }

    /// Logits of normed x.
    ///
    /// # Errors
    /// The device's.
    pub fn head(&self, norm: Norm, product: Product) -> Result<()> {
        self.normed_products(norm, &[product], &self.logits, &[])
    }

    /// Adds `product` of the heads' mixed values to x; the sum is accounted for at `residual`.
    ///
    /// # Errors
    /// The device's.
    pub fn add_mixed(&self, product: Product, residual: At, ahead: &Tensor) -> Result<()> {
        self.add_product(product, residual, &self.mixed, Some(ahead))
    }

    /// Adds `product` of the MLP's inner activations to x, likewise.
    ///
    /// # Errors
    /// The device's.
    pub fn add_inner(&self, product: Product, residual: At) -> Result<()> {
        self.add_product(product, residual, &self.inner, None)
    }

    /// silu(gate) · up of normed x.
    ///
    /// # Errors
    /// The device's.
    pub fn gated<'a, 'm>(
        &self,
        norm: Norm,
        gate: Product<'a, 'm>,
        up: Product<'a, 'm>,
        at: At,
    ) -> Result<()> {
        let weights = [gate.weight, up.weight];
        if self.sizes.batch <= few(self.dtype) {
            let (x, norm) = self.input(norm)?;
            self.few("project_gated", &self.inner, x, norm, &[gate, up], &[])?;
        } else {
            self.norm(norm)?;
            self.product(&self.gate, 0, &self.normed, weights[0], false)?;
            self.product(&self.up, 0, &self.normed, weights[1], false)?;
            if !self.replaying {
                self.kernels.gated_into(None, &self.inner, &self.gate, &self.up)?;
            }
        }
        self.report_norm(norm);
        self.report_products(&[gate, up])?;
        let n = self.inner.elem_count() as u64;
        at.ran(Op::Silu { n }, self.dtype);
        at.ran(Op::Mul { n }, self.dtype);
        Ok(())
    }

    /// RoPE of q and k, q times `scale`, k and v into the cache (B, K, capacity, d), and the
    /// softmax-weighted mix of all values there.
    ///
    /// # Errors
    /// The device's.
    pub fn attend(
        &self,
        at: At,
        (keys, values): (&Tensor, &Tensor),
        table: &RopeTable,
        scale: &Tensor,
    ) -> Result<()> {
        let Sizes { batch, heads, kv_heads, head_dim, .. } = self.sizes;
        let (cos, sin) = table.parts();
        let capacity = keys.dims()[2];
        let stride = (heads + 2 * kv_heads) * head_dim;
        let args = [
            Arg::Of(&self.mixed),
            Arg::Of(&self.qkv),
            Arg::After(&self.qkv, heads * head_dim),
            Arg::After(&self.qkv, (heads + kv_heads) * head_dim),
            Arg::Of(&keys.data),
            Arg::Of(&values.data),
            Arg::Of(&cos.data),
            Arg::Of(&sin.data),
            Arg::Of(&scale.data),
            Arg::Of(&self.held),
            Arg::Of(&self.shares),
            Arg::Of(&self.done),
            Arg::U32(heads as u32),
            Arg::U32(kv_heads as u32),
            Arg::U32(capacity as u32),
            Arg::U32(stride as u32),
            Arg::U32(stride as u32),
        ];
        if !self.replaying {
            let name = format!("attend_{}_{head_dim}", self.kernels.suffix());
            let grid = [self.splits, kv_heads, batch].map(|n| n as u64);
            self.kernels.launch(File::Decode, &name, grid, 256, &args)?;
        }
        let [b, h, kv, d] = [batch, heads, kv_heads, head_dim].map(|n| n as u64);
        let (group, held) = (h / kv, self.past as u64 + 1);
        for op in [
            Op::Rope { n: b * h * d },
            Op::Rope { n: b * kv * d },
            Op::Scale { n: b * h * d },
            Op::Matmul { b: b * kv, m: group, k: d, n: held },
            Op::Softmax { rows: b * h, width: held },
            Op::Matmul { b: b * kv, m: group, k: held, n: d },
        ] {
            at.ran(op, self.dtype);
        }
        Ok(())
    }

    /// The largest logit of each row becomes its next token, and the one that was fed is held.
    ///
    /// # Errors
    /// The device's.
    pub fn choose(&self, at: At) -> Result<()> {
        let Sizes { batch, vocab, kv_heads, past, .. } = self.sizes;
        let args = [
            Arg::Of(&self.ids),
            Arg::Of(&self.chosen),
            Arg::Of(&self.best),
            Arg::Of(&self.held),
            Arg::After(&self.done, batch * kv_heads),
            Arg::Of(&self.logits),
            Arg::U32(vocab as u32),
            Arg::U32(past as u32),
        ];
        let blocks = vocab.div_ceil(256 * 8).min(528usize.div_ceil(batch));
        self.launch("choose", [blocks, batch, 1], 256, &args)?;
        at.ran(Op::Argmax { rows: self.rows(), width: vocab as u64 }, Dtype::F32);
        Ok(())
    }

    /// `products` of normed x, beside one another in `out`.
    fn normed_products(
        &self,
        norm: Norm,
        products: &[Product],
        out: &candle_core::Tensor,
        ahead: &[&Tensor],
    ) -> Result<()> {
        if self.sizes.batch <= few(self.dtype) {
            let (x, norm) = self.input(norm)?;
            self.few("project", out, x, norm, products, ahead)?;
        } else {
            self.norm(norm)?;
            let mut after = 0;
            for Product { weight, bias, .. } in products {
                self.product(out, after, &self.normed, weight, false)?;
                if let (Some(bias), false) = (bias, self.replaying) {
                    self.kernels.add_bias(out, after, &bias.data)?;
                }
                after += weight.dims()[0];
            }
        }
        self.report_norm(norm);
        self.report_products(products)
    }

    fn add_product(
        &self,
        product: Product,
        residual: At,
        input: &candle_core::Tensor,
        ahead: Option<&Tensor>,
    ) -> Result<()> {
        if self.sizes.batch <= few(self.dtype) {
            self.few("project_add", &self.x, input, None, &[product], ahead.as_slice())?;
        } else {
            self.product(&self.x, 0, input, product.weight, true)?;
        }
        self.report_products(&[product])?;
        residual.ran(Op::Add { n: self.x.elem_count() as u64 }, self.dtype);
        Ok(())
    }

    /// Up to three products of few rows, by our own kernel.
    fn few(
        &self,
        name: &str,
        out: &candle_core::Tensor,
        x: &candle_core::Tensor,
        norm: Option<Norm>,
        products: &[Product],
        ahead: &[&Tensor],
    ) -> Result<()> {
        if self.replaying {
            return Ok(());
        }
        let k = x.dim(1)?;
        let gated = name == "project_gated";
        let mut ends = [0; 3];
        let mut end = 0;
        for (i, last) in ends.iter_mut().enumerate() {
            end += products.get(i).map_or(0, |p| p.weight.dims()[0]);
            *last = end;
        }
        // Gate and up give one column together.
        let n = if gated { ends[0] } else { ends[2] };
        let weight = |i: usize| Arg::from(products.get(i).map(|p| &p.weight.data));
        let bias = |i: usize| Arg::from(products.get(i).and_then(|p| Some(&p.bias?.data)));
        let args = [
            Arg::Of(out),
            Arg::Of(x),
            Arg::from(norm.map(|norm| &norm.gain.data)),
            weight(0),
            weight(1),
            weight(2),
            bias(0),
            bias(1),
            bias(2),
            Arg::U32(ends[0] as u32),
            Arg::U32(ends[1] as u32),
            Arg::U32(n as u32),
            Arg::U32(self.sizes.batch as u32),
            Arg::U32(k as u32),
            Arg::F32(norm.map_or(0.0, |norm| norm.eps as f32)),
        ];
        let args = [&args[..], &fetched(ahead)].concat();
        let (batch, t) = (self.sizes.batch, self.kernels.suffix());
        // Rows of the weight that a block takes, as PROJECTS and TILES in decode.cu say.
        let (name, rows, block) = match self.dtype {
            Dtype::BF16 if batch > 2 => {
                let tiles = batch.div_ceil(8).next_power_of_two();
                (format!("{name}_tiles_{t}_{tiles}"), 16, 256)
            }
            _ => {
                let batch = batch.next_power_of_two();
                let rows = match name {
                    "project_add" => 2,
                    "project_gated" if batch > 4 => 2,
                    _ => 4,
                };
                (format!("{name}_{t}_{batch}"), rows, 128)
            }
        };
        let grid = [n.div_ceil(rows) as u64, 1, 1];
        Ok(self.kernels.launch(File::Decode, &name, grid, block, &args)?)
    }

    /// What products of normed x read: x and the norm, or what is normed already and none.
    fn input<'a, 'm>(
        &self,
        norm: Norm<'a, 'm>,
    ) -> Result<(&candle_core::Tensor, Option<Norm<'a, 'm>>)> {
        if self.sizes.batch <= NORMED_BY_EACH {
            return Ok((&self.x, Some(norm)));
        }
        self.norm(norm)?;
        Ok((&self.normed, None))
    }

    /// normed = norm of x
    fn norm(&self, norm: Norm) -> Result<()> {
        if self.replaying {
            return Ok(());
        }
        let tensors = [Arg::Of(&self.normed), Arg::Of(&self.x), Arg::Of(&norm.gain.data)];
        Ok(self.kernels.rows("rms_norm", &self.x, &tensors, &[Arg::F32(norm.eps as f32)])?)
    }

    /// Columns of `out` from `after` on: `x` · weightᵀ, by cuBLAS.
    fn product(
        &self,
        out: &candle_core::Tensor,
        after: usize,
        x: &candle_core::Tensor,
        weight: &Tensor,
        add: bool,
    ) -> Result<()> {
        if self.replaying {
            return Ok(());
        }
        let place = (out, after, out.dim(1)?);
        Ok(cuda::product(&self.device, place, x, &weight.data, add)?)
    }

    fn report_norm(&self, norm: Norm) {
        let op = Op::RmsNorm { rows: self.rows(), width: self.sizes.hidden as u64 };
        norm.at.ran(op, self.dtype);
    }

    fn report_products(&self, products: &[Product]) -> Result<()> {
        for Product { at, weight, bias } in products {
            let (n, k) = weight.data.dims2()?;
            let (m, k, n) = (self.rows(), k as u64, n as u64);
            at.ran(Op::Matmul { b: 1, m, k, n }, self.dtype);
            if bias.is_some() {
                at.ran(Op::Bias { rows: m, width: n }, self.dtype);
            }
        }
        Ok(())
    }
}
