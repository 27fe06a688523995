//! One token of one sequence through a whole model, in one launch.

use candle_core::{DType, Result, Tensor};

use super::{
    Gate, Kernels, Norm,
    args::{self, StepLayer},
    backend,
    call::{Call, Element, File, Read, Write},
    rows::window,
    tiles::{STEP_HEADS, STEP_HIDDEN, STEP_OWN, STEP_ROWS, STEP_TILES, STEP_WARPS, STEP_WIDTHS},
};
use crate::ops::launch::Nodes;

/// A layer.
#[derive(Debug, Clone, Copy)]
pub(in crate::ops) struct Layer<'a> {
    /// Weights (n, k) and biases (n) of q, k, v, o, gate, up and down.
    pub products: [(&'a Tensor, Option<&'a Tensor>); 7],
    /// Gain of D.
    pub before_attention: Norm<'a>,
    /// Gain of D.
    pub before_mlp: Norm<'a>,
    /// Gain of d; where q has a norm, k has one too.
    pub q_norm: Option<Norm<'a>>,
    /// Gain of d.
    pub k_norm: Option<Norm<'a>>,
    /// (1, K, capacity, d)
    pub keys: &'a Tensor,
    /// (1, K, capacity, d)
    pub values: &'a Tensor,
    /// (positions, d/2)
    pub cos: &'a Tensor,
    /// (positions, d/2)
    pub sin: &'a Tensor,
    /// The factor on queries, one element.
    pub scale: &'a Tensor,
    /// The most tokens that are seen, the new one among them.
    pub window: Option<usize>,
}

/// All that every step reads.
#[derive(Debug, Clone)]
pub(in crate::ops) struct Model<'a> {
    /// (V, D)
    pub table: &'a Tensor,
    /// On rows of the table, one element.
    pub factor: Option<&'a Tensor>,
    /// In their order.
    pub layers: Vec<Layer<'a>>,
    /// Of all gates.
    pub gate: Gate,
    /// Before the head, gain of D.
    pub norm: Norm<'a>,
    /// (V, D)
    pub head: &'a Tensor,
}

/// Widths that all layers have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Widths {
    hidden: usize,
    inner: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    capacity: usize,
}

/// How a step is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Cut {
    /// Blocks that attend, and those that multiply.
    blocks: [usize; 2],
    /// Shares of the keys.
    splits: usize,
    /// Bytes of the ring of weights, and of all of a block's shared memory.
    bytes: [usize; 2],
}

/// Bytes of shared memory that a block may have on Hopper.
const SHARED: usize = 227 * 1024;

/// Tokens that a step attends to at most: with more of them, attention wants more blocks than are
/// left for it.
const MOST_HELD: usize = 4096;

/// How a step over `multiprocessors` is cut; none where the kernel does not serve.
fn cut(multiprocessors: usize, w: Widths) -> Option<Cut> {
    let Widths { hidden, inner, heads, kv_heads, head_dim, capacity } = w;
    let (q, kv) = (heads * head_dim, kv_heads * head_dim);
    let widest = hidden.max(inner).max(q);
    let fits = STEP_WIDTHS.iter().any(|&[width]| width as usize == head_dim)
        && kv_heads > 0
        && heads.is_multiple_of(kv_heads)
        && [hidden, inner, q].iter().all(|n| *n > 0 && n.is_multiple_of(64))
        && hidden <= STEP_HIDDEN as usize
        && (1..=MOST_HELD).contains(&capacity);
    // A ring ends where 128 bytes do, as each row does.
    let ring = SHARED.checked_sub(STEP_OWN as usize + widest * 2)? / 128 * 128;
    let tiles = STEP_TILES as usize;
    let has_room = [tiles * hidden * 4, tiles / 2 * hidden * 2, q * 2, inner * 2];
    // A block attends with as many query heads of one key head as go into it in equal parts. Shares of
    // the keys are told to one another, which takes longer than reading some hundreds more of them.
    let each = if fits { heads / kv_heads } else { return None };
    let together = (1..=STEP_HEADS as usize).rev().find(|n| each.is_multiple_of(*n))?;
    let groups = heads / together;
    let splits = match capacity {
        ..=896 => 1,
        897..=1664 => 2,
        1665..=2560 => 3,
        _ => 4,
    };
    let splits = (1..=splits).rev().find(|n| groups * n * 3 <= multiprocessors)?;
    let attending = groups * splits;
    let most = multiprocessors - attending;
    let multiplying = most.min(hidden).min(inner).min(q + 2 * kv);
    let rows = hidden.div_ceil(multiplying.max(1)) <= STEP_ROWS as usize;
    (rows && has_room.iter().all(|bytes| *bytes <= ring)).then_some(Cut {
        blocks: [attending, multiplying],
        splits,
        bytes: [ring, ring + widest * 2 + STEP_OWN as usize],
    })
}

/// A model as the kernel reads it, with what its blocks tell one another.
#[derive(Debug)]
pub(in crate::ops) struct Plan {
    args: args::Step,
    cut: Cut,
    head_dim: u32,
    /// What `args` points to.
    #[allow(dead_code)]
    held: Vec<Tensor>,
}

impl Kernels {
    /// What [`Self::step`] takes for `model`; none where its kernel does not serve. The buffers are
    /// this plan's alone.
    ///
    /// # Errors
    /// Shapes that do not fit one another; the device's.
    pub(in crate::ops) fn step_plan(&self, model: &Model) -> Result<Option<Plan>> {
        let nodes = Nodes::default();
        let call = self.call(&nodes, File::Step, "step");
        let Some(first) = model.layers.first() else { return Ok(None) };
        let widths = call.widths(first)?;
        if self.dtype != DType::BF16 || !backend::are_for_hopper() {
            return Ok(None);
        }
        // Newer GPUs may have less shared memory than Hopper.
        let [multiprocessors, shared] = backend::room(&self.device)?;
        let cut = cut(multiprocessors, widths).filter(|_| shared >= SHARED);
        let Some(cut) = cut else { return Ok(None) };
        let Widths { hidden, inner, heads, kv_heads, head_dim, capacity } = widths;
        let [vocab, width] = call.dims(model.table)?;
        let fits = width == hidden && model.head.dims() == [vocab, hidden];
        call.check(
            fits && u32::try_from(vocab * cut.blocks[1]).is_ok(),
            &[model.table, model.head],
        )?;
        call.check(model.factor.is_none_or(|f| f.elem_count() == 1), &[model.table])?;

        let layers: Vec<StepLayer> =
            model.layers.iter().map(|layer| call.layer(layer, widths)).collect::<Result<_>>()?;
        let (depth, q, kv) = (layers.len(), heads * head_dim, kv_heads * head_dim);
        // Each layer's q, k and v, mixed values, stream, inner values, stream; and one before all.
        let words = hidden + depth * (2 * q + 2 * kv + 2 * hidden + inner);
        let zeros = |n: usize, dtype| Tensor::zeros((1, n), dtype, &self.device);
        let mail = zeros(words, DType::U32)?;
        let shares = zeros(depth * heads * cut.splits * (head_dim + 2), DType::I64)?;
        let epoch = zeros(1, DType::U32)?;
        // SAFETY: such a layer is plain numbers without padding.
        let bytes = unsafe {
            std::slice::from_raw_parts(layers.as_ptr().cast::<u8>(), size_of_val(layers.as_slice()))
        };
        let table = Tensor::from_vec(bytes.to_vec(), (1, bytes.len()), &self.device)?;
        let args = args::Step {
            logits: Write::NULL,
            layers: call.reads(&table)?,
            mail: call.writes(&mail)?,
            shares: call.writes(&shares)?,
            epoch: call.writes(&epoch)?,
            table: call.reads(model.table)?,
            ids: Read::NULL,
            factor: call.reads_any(model.factor)?,
            head: call.reads(model.head)?,
            norm: call.norm(Some(model.norm), hidden)?,
            held: Read::NULL,
            depth: call.size(depth)?,
            hidden: call.size(hidden)?,
            inner: call.size(inner)?,
            vocab: call.size(vocab)?,
            heads: call.size(heads)?,
            kv_heads: call.size(kv_heads)?,
            capacity: call.size(capacity)?,
            splits: call.size(cut.splits)?,
            attending: call.size(cut.blocks[0])?,
            ring: call.size(cut.bytes[0])?,
            gelu: u32::from(model.gate == Gate::Gelu),
        };
        let mut held = vec![table, mail, shares, epoch, model.table.clone(), model.head.clone()];
        held.extend(model.factor.cloned());
        held.push(model.norm.gain.clone());
        model.layers.iter().for_each(|layer| held.extend(layer.tensors().cloned()));
        Ok(Some(Plan { args, cut, head_dim: call.size(head_dim)?, held }))
    }

    /// logits (1, V) of the token in `ids`, one u32, on top of the `held` tokens, one u32, that the
    /// caches of the model hold; its keys and values join them.
    ///
    /// # Errors
    /// Shapes that do not fit; the device's.
    pub(in crate::ops) fn step(
        &self,
        nodes: &Nodes,
        plan: &Plan,
        logits: &Tensor,
        [ids, held]: [&Tensor; 2],
    ) -> Result<()> {
        let call = self.call(nodes, File::Step, "step");
        call.check(logits.elem_count() == plan.args.vocab as usize, &[logits])?;
        call.check([ids, held].iter().all(|t| t.elem_count() == 1), &[ids, held])?;
        let args = args::Step {
            logits: call.writes(logits)?,
            ids: call.reads(ids)?,
            held: call.reads(held)?,
            ..plan.args
        };
        let [attending, multiplying] = plan.cut.blocks;
        let (grid, block) = ([attending + multiplying, 1, 1], (STEP_WARPS + 1) * 32);
        // SAFETY: the plan's tensors have the dimensions that it was made with, and the caches room
        // for one more token than are held.
        unsafe {
            call.start_sharing(&[plan.head_dim], grid, block, plan.cut.bytes[1] as u32, &args)
        }
    }
}

impl<'a> Layer<'a> {
    /// All of its tensors.
    fn tensors(&self) -> impl Iterator<Item = &'a Tensor> {
        let products = self.products.into_iter();
        let norms = [Some(self.before_attention), Some(self.before_mlp), self.q_norm, self.k_norm];
        products
            .flat_map(|(weight, bias)| [Some(weight), bias])
            .chain(norms.map(|norm| norm.map(|norm| norm.gain)))
            .chain([self.keys, self.values, self.cos, self.sin, self.scale].map(Some))
            .flatten()
    }
}

impl Call<'_> {
    /// Those of a layer.
    fn widths(&self, layer: &Layer) -> Result<Widths> {
        let [(q, _), (k, _), _, _, (gate, _), ..] = layer.products;
        let [_, kv_heads, capacity, head_dim] = self.dims(layer.keys)?;
        let ([q, hidden], [inner, _]) = (self.dims(q)?, self.dims(gate)?);
        self.check(head_dim > 0 && q.is_multiple_of(head_dim), &[k, layer.keys])?;
        Ok(Widths { hidden, inner, heads: q / head_dim, kv_heads, head_dim, capacity })
    }

    /// A layer of these widths as the kernel reads it.
    fn layer(&self, layer: &Layer, widths: Widths) -> Result<StepLayer> {
        let Widths { hidden, inner, heads, kv_heads, head_dim, capacity } = widths;
        let (q, kv) = (heads * head_dim, kv_heads * head_dim);
        let shapes = [
            [q, hidden],
            [kv, hidden],
            [kv, hidden],
            [hidden, q],
            [inner, hidden],
            [inner, hidden],
            [hidden, inner],
        ];
        for ((weight, bias), shape) in layer.products.iter().zip(shapes) {
            let fits = bias.is_none_or(|bias| bias.elem_count() == shape[0]);
            self.check(weight.dims() == shape && fits, &[weight])?;
        }
        let cache = [1, kv_heads, capacity, head_dim];
        let caches = [layer.keys, layer.values];
        self.check(caches.iter().all(|t| t.dims() == cache), &caches)?;
        let [positions, half] = self.dims(layer.cos)?;
        let turned = half * 2 == head_dim && positions >= capacity;
        self.check(turned && layer.sin.dims() == layer.cos.dims(), &[layer.cos, layer.sin])?;
        let whole = layer.scale.elem_count() == 1 && layer.window != Some(0);
        self.check(whole && layer.q_norm.is_some() == layer.k_norm.is_some(), &[layer.scale])?;
        Ok(StepLayer {
            weights: self.reads_all(layer.products.iter().map(|(weight, _)| Some(*weight)))?,
            biases: self.reads_all(layer.products.iter().map(|(_, bias)| *bias))?,
            before_attention: self.norm(Some(layer.before_attention), hidden)?,
            before_mlp: self.norm(Some(layer.before_mlp), hidden)?,
            q_norm: self.norm(layer.q_norm, head_dim)?,
            k_norm: self.norm(layer.k_norm, head_dim)?,
            keys: self.writes(layer.keys)?,
            values: self.writes(layer.values)?,
            cos: self.reads(layer.cos)?,
            sin: self.reads(layer.sin)?,
            scale: self.reads::<Element>(layer.scale)?,
            window: window(layer.window),
            unused: 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_cut_to_the_multiprocessors() {
        let qwen = Widths {
            hidden: 896,
            inner: 4864,
            heads: 14,
            kv_heads: 2,
            head_dim: 64,
            capacity: 200,
        };
        let blocks = |w: Widths| cut(132, w).map(|cut| (cut.blocks, cut.splits));
        assert_eq!(blocks(qwen), Some(([2, 130], 1)));
        assert_eq!(blocks(Widths { capacity: 2081, ..qwen }), Some(([6, 126], 3)));
        // Of more key heads, each has fewer shares; of too many, nothing is left for products.
        let many = Widths { heads: 32, kv_heads: 16, capacity: 2081, ..qwen };
        assert_eq!(blocks(many), Some(([32, 100], 2)));
        assert_eq!(blocks(Widths { heads: 64, kv_heads: 64, ..qwen }), None);
        // Nine query heads go into a block three at a time.
        assert_eq!(blocks(Widths { heads: 9, kv_heads: 1, ..qwen }), Some(([3, 129], 1)));
        // A narrow model has no row for every block.
        assert_eq!(blocks(Widths { hidden: 64, ..qwen }), Some(([2, 64], 1)));
        for other in [
            Widths { hidden: 4096, ..qwen },
            Widths { hidden: 900, ..qwen },
            Widths { head_dim: 80, ..qwen },
            Widths { capacity: 8192, ..qwen },
            Widths { kv_heads: 4, ..qwen },
            Widths { inner: 1 << 20, ..qwen },
        ] {
            assert_eq!(cut(132, other), None, "{other:?}");
        }
        let [ring, all] = cut(132, qwen).unwrap().bytes;
        assert!(ring.is_multiple_of(128) && all <= SHARED, "{ring} of {all}");
    }
}
