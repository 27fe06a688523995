//! One token of each sequence on a GPU: what [`crate::model`]'s forward pass runs op by op, in few
//! launches that write to buffers made beforehand, so that they can be recorded and replayed.
//!
//! Each method reports every op that its launches contain, with the dimensions of what it is
//! given. It does so too where a recording stands in for the launches: then it launches nothing.

mod products;

use candle_core::{DType, Device};

use super::{
    RopeTable, Sampler, Tensor, candle_dtype,
    choose::Choosing,
    cuda::{Arg, File, Graph, Kernels},
};
use crate::{
    error::Result,
    ledger::{Dtype, Op},
    meter::At,
};

pub use products::{LowRank, Norm, Product};

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
    /// r of the adapters; 0 without any.
    pub rank: usize,
}

/// The state of a decoding batch on its device.
pub struct Decoding {
    sizes: Sizes,
    kernels: Kernels,
    dtype: Dtype,
    x: candle_core::Tensor,        // (B, D), the residual stream
    normed: candle_core::Tensor,   // (B, D)
    qkv: candle_core::Tensor,      // (B, (H + 2K)·d)
    mixed: candle_core::Tensor,    // (B, H·d)
    gate: candle_core::Tensor,     // (B, F)
    up: candle_core::Tensor,       // (B, F)
    inner: candle_core::Tensor,    // (B, F)
    low: Vec<candle_core::Tensor>, // (B, r), (B, 2r), (B, 3r): for so many adapters at once
    logits: candle_core::Tensor,   // (B, V)
    choosing: Choosing,            // the tokens to feed, the number of those in the cache
    done: candle_core::Tensor,     // (B·lookers), zeros between launches
    shares: candle_core::Tensor,   // (B·H, splits, d + 2)
    /// Attention's blocks of a sequence and share of the keys: one a key head, or one a query head.
    lookers: usize,
    /// Shares of the keys.
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

/// Most shares that the keys of one head are split into (`MOST_SPLITS` in decode.cu).
const MOST_SPLITS: usize = 32;
/// Most query heads of one key head (the largest `MOST` in decode.cu).
const MOST_GROUP: usize = 8;

/// Attention's blocks of a sequence, as (for its heads, for its keys), of which a head's shares are
/// added up at the end. The bounds are those that were fastest on an H100.
fn attention_blocks(
    batch: usize,
    heads: usize,
    kv_heads: usize,
    capacity: usize,
) -> (usize, usize) {
    // Enough for every multiprocessor to have four, or eight, at work.
    const MANY: usize = 528;
    // A block a query head has less to add up than one for all those of a key head, and what it
    // reads again is near; until keys are so many that reading them is what takes the time.
    if batch * capacity <= 1 << 18 {
        let room = (2 * MANY / (batch * heads)).max(1);
        let shares = if capacity <= 256 { 1 } else { capacity.div_ceil(128).clamp(8, 24) };
        return (heads, shares.min(room));
    }
    let room = MANY.div_ceil(batch * kv_heads).min(MOST_SPLITS);
    (kv_heads, capacity.div_ceil(64).clamp(1, room))
}

impl Decoding {
    /// Buffers for `sizes`; none where `device` or `dtype` has no kernels for them. `sampler` chooses
    /// the tokens that follow `contexts`, the last of each of which is fed first.
    ///
    /// # Errors
    /// The device's, out of memory among them.
    pub fn new(
        sizes: Sizes,
        dtype: Dtype,
        device: &Device,
        sampler: &mut Sampler,
        contexts: &[Vec<u32>],
    ) -> Result<Option<Self>> {
        let Sizes { batch, capacity, past, steps, hidden, inner, .. } = sizes;
        let Sizes { heads, kv_heads, head_dim, vocab, rank, .. } = sizes;
        let Some(kernels) = Kernels::on(device, candle_dtype(dtype)) else { return Ok(None) };
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
        let (lookers, splits) = attention_blocks(batch, heads, kv_heads, capacity);
        let zeros = |shape: (usize, usize), dtype| candle_core::Tensor::zeros(shape, dtype, device);
        let wide = |width| zeros((batch, width), candle_dtype(dtype));
        Ok(Some(Self {
            sizes,
            choosing: Choosing::new(kernels.clone(), sampler, contexts, vocab, past, steps)?,
            kernels,
            dtype,
            x: wide(hidden)?,
            normed: wide(hidden)?,
            qkv: wide((heads + 2 * kv_heads) * head_dim)?,
            mixed: wide(heads * head_dim)?,
            gate: wide(inner)?,
            up: wide(inner)?,
            inner: wide(inner)?,
            low: match rank {
                0 => vec![],
                _ => [1, 2, 3].into_iter().map(|n| wide(n * rank)).collect::<Result<_, _>>()?,
            },
            logits: wide(vocab)?,
            done: zeros((1, batch * lookers), DType::U32)?,
            shares: zeros((batch * heads, splits * (head_dim + 2)), DType::F32)?,
            lookers,
            splits,
            past,
            graph: None,
            replaying: false,
            ran: false,
        }))
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
                let graph = Graph::record(self.kernels.device(), || step(self))?;
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

    /// The tokens that the latest `steps` steps chose, step after step.
    ///
    /// # Errors
    /// Logits that are not finite.
    pub fn chosen(&self, steps: usize) -> Result<Vec<Vec<u32>>> {
        self.choosing.chosen(self.past - self.sizes.past - steps, steps)
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
        let args = [
            Arg::Of(&self.x),
            Arg::Of(&table.data),
            Arg::Of(&self.choosing.ids),
            Arg::U32(width as u32),
        ];
        self.launch("embed", [width.div_ceil(256), self.sizes.batch, 1], 256, &args)?;
        at.ran(Op::Embed { rows: self.rows(), width: width as u64 }, self.dtype);
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
            Arg::Of(&self.choosing.held),
            Arg::Of(&self.shares),
            Arg::Of(&self.done),
            Arg::U32(heads as u32),
            Arg::U32(kv_heads as u32),
            Arg::U32(capacity as u32),
            Arg::U32(stride as u32),
            Arg::U32(stride as u32),
        ];
        if !self.replaying {
            let most = if self.lookers == heads { 1 } else { MOST_GROUP };
            let name = format!("attend_{}_{head_dim}_{most}", self.kernels.suffix());
            let grid = [self.splits, self.lookers, batch].map(|n| n as u64);
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

    /// Each row's logits become its next token, and the one that was fed is held.
    ///
    /// # Errors
    /// The device's.
    pub fn choose(&self, at: At) -> Result<()> {
        self.choosing.choose(at, &self.logits, self.replaying)
    }
}
