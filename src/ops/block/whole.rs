//! The same of a whole step: one token of one sequence through all layers and the head, in one launch.

use candle_core::Device;

use super::{
    super::{
        Attention, Kernel, KvCache, Nodes, Ops, Tensor,
        cache::Counted,
        cuda::{Kernels, StepLayer, StepModel, StepPlan},
        dtype_of,
        elementwise::ops_of_gate,
        embed::Ids,
    },
    Norm, Product,
    launches::{report_attention, report_norm_of, report_product_of},
};
use crate::{
    config::Activation,
    error::Result,
    ledger::{Dtype, Op},
    meter::At,
};

/// A layer with two norms, each before what it norms.
#[derive(Clone, Copy)]
pub struct WholeLayer<'a> {
    /// Before attention.
    pub before_attention: Norm<'a>,
    /// q, k and v.
    pub projections: [Product<'a>; 3],
    /// What stands between them.
    pub attention: Attention<'a>,
    /// Of what attention mixed.
    pub output: Product<'a>,
    /// Where sums with the residual stream are accounted for.
    pub residual: At<'a>,
    /// Before the MLP.
    pub before_mlp: Norm<'a>,
    /// Gate and up.
    pub sides: [Product<'a>; 2],
    /// Where the gate is accounted for.
    pub mlp: At<'a>,
    /// The gate's.
    pub activation: Activation,
    /// Of what the gate let through.
    pub down: Product<'a>,
}

/// A model from the token's id to its logits.
#[derive(Clone)]
pub struct WholeModel<'a> {
    /// The embedding.
    pub embed: At<'a>,
    /// (V, D)
    pub table: &'a Tensor,
    /// On its rows, one element.
    pub factor: Option<&'a Tensor>,
    /// In their order.
    pub layers: Vec<WholeLayer<'a>>,
    /// Before the head.
    pub norm: Norm<'a>,
    /// The head.
    pub head: Product<'a>,
}

/// Steps of a model on a GPU, each of them one launch.
pub struct WholeStep {
    kernels: Kernels,
    plan: StepPlan,
    logits: Tensor, // (1, 1, V)
}

impl std::fmt::Debug for WholeStep {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "WholeStep({:?})", self.logits.dims())
    }
}

impl WholeStep {
    /// Steps of `model` on top of `cache`, which the device counts; none where no kernel takes them:
    /// for several sequences, with adapters, in 8 bits, of other widths.
    ///
    /// # Errors
    /// Shapes that do not fit one another; the device's, out of memory among them.
    pub fn new(model: &WholeModel, cache: &KvCache) -> Result<Option<Self>> {
        let one = cache.batch() == 1 && cache.on_device().is_some_and(|c| c.behind.is_none());
        let Some(first) = model.layers.first().filter(|_| one) else { return Ok(None) };
        let products = model.layers.iter().flat_map(WholeLayer::products);
        let mut plain = products.chain([model.head]);
        let alike = model.layers.iter().all(|layer| layer.activation == first.activation);
        let served = |product: Product| product.adapter.is_none() && product.eight_bit.is_none();
        if !plain.all(served) || !alike || model.head.bias.is_some() {
            return Ok(None);
        }
        let Some(kernels) = Kernels::of(&[&model.table.data, &model.head.weight.data]) else {
            return Ok(None);
        };
        let layers = model.layers.iter().enumerate();
        let plan = kernels.step_plan(&StepModel {
            table: &model.table.data,
            factor: model.factor.map(|factor| &factor.data),
            layers: layers.map(|(i, layer)| layer.on_device(cache, i)).collect::<Result<_>>()?,
            gate: first.activation.into(),
            norm: model.norm.into(),
            head: &model.head.weight.data,
        })?;
        let Some(plan) = plan else { return Ok(None) };
        let vocab = model.head.weight.dims()[0];
        let logits = Tensor::of(kernels.empty((1, 1, vocab), kernels.dtype())?);
        Ok(Some(Self { kernels, plan, logits }))
    }

    /// The logits (1, 1, V) of the token in `ids` after what `cache` holds, whose keys and values
    /// join it. `model` and `cache` are those that it was made for.
    ///
    /// # Errors
    /// Tokens that are not on the device; the device's.
    pub fn run(&self, model: &WholeModel, cache: &KvCache, ids: Ids) -> Result<&Tensor> {
        let (Ids::Device(ids), Some(counted)) = (ids, cache.on_device()) else {
            anyhow::bail!("a step in one launch takes what the device has chosen and counted");
        };
        let held = cache.held() as u64 + 1;
        model.head.at.launch(&Launch { step: self, model, cache, counted, ids, held })?;
        Ok(&self.logits)
    }
}

impl WholeModel<'_> {
    /// The ops of so many tokens of one sequence, one, over `held` of them in `cache`, itself among
    /// them.
    pub(crate) fn report<'r>(
        &'r self,
        ops: &mut Ops<'r>,
        cache: &KvCache,
        rows: u64,
        held: u64,
    ) -> Result<()> {
        let Self { embed, table, factor, layers, norm, head } = self;
        let (width, dtype) = (table.dims()[1] as u64, dtype_of(&table.data)?);
        ops.add_at(*embed, Op::Embed { rows, width }, dtype);
        if factor.is_some() {
            ops.add_at(*embed, Op::Scale { n: rows * width }, dtype);
        }
        for (index, layer) in layers.iter().enumerate() {
            let (keys, _) = cache.layer(index)?;
            layer.report(ops, keys, held, dtype)?;
        }
        report_norm_of(ops, *norm, rows, dtype);
        report_product_of(ops, head.at, rows, head.weight)
    }
}

impl<'a> WholeLayer<'a> {
    /// q, k, v, o, gate, up and down.
    fn products(&self) -> [Product<'a>; 7] {
        let ([q, k, v], [gate, up]) = (self.projections, self.sides);
        [q, k, v, self.output, gate, up, self.down]
    }

    fn on_device<'t>(&'t self, cache: &'t KvCache, index: usize) -> Result<StepLayer<'t>>
    where
        'a: 't,
    {
        let ((keys, values), (cos, sin)) = (cache.layer(index)?, self.attention.rope.parts());
        Ok(StepLayer {
            products: self.products().map(|p| (&p.weight.data, p.bias.map(|bias| &bias.data))),
            before_attention: self.before_attention.into(),
            before_mlp: self.before_mlp.into(),
            q_norm: self.attention.q_norm.map(Into::into),
            k_norm: self.attention.k_norm.map(Into::into),
            keys: &keys.data,
            values: &values.data,
            cos: &cos.data,
            sin: &sin.data,
            scale: &self.attention.scale.data,
            window: self.attention.window,
        })
    }

    /// The ops of one token over `held` tokens, itself among them, whose keys are `keys`.
    fn report<'r>(
        &'r self,
        ops: &mut Ops<'r>,
        keys: &Tensor,
        held: u64,
        dtype: Dtype,
    ) -> Result<()> {
        let (_, kv, _, d) = keys.data.dims4()?;
        let product = |ops: &mut Ops<'r>, product: Product<'r>| -> Result<()> {
            report_product_of(ops, product.at, 1, product.weight)?;
            if let Some(bias) = product.bias {
                ops.add_at(product.at, Op::Bias { rows: 1, width: bias.elements() as u64 }, dtype);
            }
            Ok(())
        };
        let add = |ops: &mut Ops<'r>, of: Product<'r>| {
            let n = of.weight.dims()[0] as u64;
            ops.add_at(self.residual, Op::Add { n }, dtype);
        };
        let [q, ..] = self.projections;
        let (kv, d) = (kv as u64, d as u64);
        let heads = q.weight.dims()[0] as u64 / d;
        report_norm_of(ops, self.before_attention, 1, dtype);
        self.projections.into_iter().try_for_each(|of| product(ops, of))?;
        for (norm, heads) in [(self.attention.q_norm, heads), (self.attention.k_norm, kv)] {
            norm.into_iter().for_each(|norm| report_norm_of(ops, norm, heads, dtype));
        }
        report_attention(ops, &self.attention, [1, heads, kv, d], (held, 0), dtype);
        product(ops, self.output)?;
        add(ops, self.output);
        report_norm_of(ops, self.before_mlp, 1, dtype);
        self.sides.into_iter().try_for_each(|of| product(ops, of))?;
        let inner = self.sides[0].weight.dims()[0] as u64;
        ops_of_gate(self.activation, inner)
            .into_iter()
            .for_each(|op| ops.add_at(self.mlp, op, dtype));
        product(ops, self.down)?;
        add(ops, self.down);
        Ok(())
    }
}

/// One of them.
struct Launch<'a> {
    step: &'a WholeStep,
    model: &'a WholeModel<'a>,
    cache: &'a KvCache,
    counted: &'a Counted,
    ids: &'a candle_core::Tensor, // one
    /// Tokens held when this is launched, the new one included.
    held: u64,
}

impl Kernel for Launch<'_> {
    type Output = ();

    fn device(&self) -> &Device {
        self.step.kernels.device()
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        self.model.report(ops, self.cache, self.ids.elem_count() as u64, self.held)
    }

    fn run(&self, nodes: &Nodes) -> candle_core::Result<()> {
        let WholeStep { kernels, plan, logits } = self.step;
        kernels.step(nodes, plan, &logits.data, [self.ids, &self.counted.held])
    }
}
