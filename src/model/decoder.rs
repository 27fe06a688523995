//! A dense decoder: grouped-query attention, rotary positions and a gated MLP. Families differ in
//! what [`ModelConfig`] says: biases, norms on queries and keys, windows, where norms stand, the
//! gate's activation.
//!
//! ```text
//! ids ─ embed_tokens ─┬─ norm ─ q,k,v ─ [norm] ─ RoPE ─ attention ─ o ─ [norm] ─ + ─┐
//!                     └─────────────────────────────────────────────────────────────┤
//!                     ┌─ norm ─ act(gate) · up ─ down ─ [norm] ─ + ─ … ─ norm ─ lm_head
//! ```
//! B batch, T tokens of this pass, S tokens that they reach, D hidden, H query heads, K key/value
//! heads, G = H/K, d head width, F MLP width, V vocabulary.
//!
//! The pass is written once. Prefill, training and decoding run it with different meters: one that
//! keeps what gradients need, or one that has ops of a single token computed several at once and
//! recorded.

use std::{collections::HashMap, sync::Arc};

use candle_core::Device;

use super::{Adapter, Cache, Context, Positions};
use crate::{
    config::{Activation, LoraConfig, ModelConfig, Projection},
    error::{Error, Result},
    ledger::{Dtype, Module},
    meter::Meter,
    ops::{
        self, CausalMask, EightBit, Ids, Masks, Norm, Product, RopeTable, Sequences, Span, Tensor,
        Unshared,
    },
    workload::{AttentionMode, Logits, Task, Workload},
};

/// The model with its weights, ready to run.
#[derive(Debug)]
pub struct Decoder {
    pub(super) config: ModelConfig,
    pub(super) lora: LoraConfig,
    pub(super) embed_tokens: Tensor,        // (V, D)
    pub(super) embed_scale: Option<Tensor>, // √D, one element
    pub(super) layers: Vec<Layer>,
    pub(super) norm: Gain,
    pub(super) lm_head: Option<Tensor>, // (V, D); none where the embedding serves
    pub(super) dtype: Dtype,
    pub(super) device: Device,
    pub(super) mode: AttentionMode,
}

#[derive(Debug)]
pub(super) struct Layer {
    pub(super) input_layernorm: Gain,
    pub(super) self_attn: Attention,
    /// Before the MLP; in a sandwich, after attention.
    pub(super) post_attention_layernorm: Gain,
    pub(super) sandwich: Option<Sandwich>,
    pub(super) mlp: Mlp,
}

/// The norms around the MLP, where one stands after attention too.
#[derive(Debug)]
pub(super) struct Sandwich {
    pub(super) pre_feedforward_layernorm: Gain,
    pub(super) post_feedforward_layernorm: Gain,
}

#[derive(Debug)]
pub(super) struct Attention {
    pub(super) q_proj: Linear,
    pub(super) k_proj: Linear,
    pub(super) v_proj: Linear,
    pub(super) o_proj: Linear,
    pub(super) norms: Option<(Gain, Gain)>, // of queries and keys, (d) each
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) scale: Tensor, // one element
    pub(super) window: Option<usize>,
    pub(super) mode: AttentionMode,
}

#[derive(Debug)]
pub(super) struct Mlp {
    pub(super) gate_proj: Linear,
    pub(super) up_proj: Linear,
    pub(super) down_proj: Linear,
    pub(super) activation: Activation,
}

#[derive(Debug)]
pub(super) struct Linear {
    pub(super) projection: Projection,
    pub(super) weight: Tensor, // (out, in), maybe in 8 bits
    pub(super) narrow: Option<Narrow>,
    pub(super) bias: Option<Tensor>, // (out)
    pub(super) adapter: Option<Adapter>,
}

/// What belongs to a weight in 8 bits.
#[derive(Debug)]
pub(super) struct Narrow {
    pub(super) scales: Tensor,       // (out), f32
    pub(super) wide: Option<Tensor>, // (out, in) as it was, where gradients are computed
}

/// A norm's gain.
#[derive(Debug)]
pub(super) struct Gain {
    pub(super) module: Module,
    pub(super) gain: Tensor,
    pub(super) eps: f64,
    /// 1, one element, where the norm multiplies by 1 + gain.
    pub(super) one: Option<Tensor>,
}

impl Decoder {
    /// The model's widths and counts.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The adapters it carries.
    pub fn lora(&self) -> &LoraConfig {
        &self.lora
    }

    /// Element type of weights and activations; fp8 where that of the layers' products is.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// The device it runs on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Which scores its attention computes: all of them, as it is loaded.
    pub fn attention(&self) -> AttentionMode {
        self.mode
    }

    /// The same with this attention.
    pub fn with_attention(mut self, mode: AttentionMode) -> Self {
        self.mode = mode;
        self.layers.iter_mut().for_each(|layer| layer.self_attn.mode = mode);
        self
    }

    /// What it does when it runs `task`.
    pub fn workload(&self, task: Task) -> Workload {
        Workload {
            model: self.config.clone(),
            lora: self.lora.clone(),
            dtype: self.dtype,
            attention: self.mode,
            task,
        }
    }

    /// An empty cache for this model.
    ///
    /// # Errors
    /// A capacity past the model's positions; else as [`Cache::new`].
    pub fn cache(&self, meter: Meter, batch: usize, capacity: usize) -> Result<Cache> {
        self.check_positions(capacity)?;
        Cache::new(meter, &self.config, batch, capacity, self.dtype.base(), &self.device)
    }

    /// Rotary tables for whole sequences of up to `seq` tokens, of which nothing is kept.
    ///
    /// # Errors
    /// More than the model's positions; else as [`Positions::new`].
    pub fn positions(&self, meter: Meter, seq: usize) -> Result<Positions> {
        self.check_positions(seq)?;
        Positions::new(meter, &self.config, seq, self.dtype.base(), &self.device)
    }

    fn check_positions(&self, tokens: usize) -> Result<()> {
        let most = self.config.max_position_embeddings;
        if tokens > most {
            let why = format!("{tokens} tokens are past the model's {most} positions");
            return Err(Error::Prompt(why).into());
        }
        Ok(())
    }

    /// Feeds `ids`, after what `context` holds: logits (B, T or 1, V); of B sequences one behind the
    /// other (1, Σ T or B, V).
    ///
    /// # Errors
    /// An id outside the vocabulary, a full cache, no logits that are asked for, or the device's.
    pub fn forward(
        &self,
        meter: Meter,
        ids: Ids,
        context: Context,
        logits: Logits,
    ) -> Result<Unshared> {
        let x = self.hidden(meter, ids, &context)?; // (B, T, D)
        let seq = x.dims()[1];
        let asked = match (logits, context.lengths()) {
            (Logits::All, _) => x,
            (Logits::Last, None) => x.narrow(1, seq - 1, 1)?, // (B, 1, D)
            (Logits::Last, Some(lengths)) => lasts(&x.share(), lengths)?, // (1, B, D)
            (Logits::None, _) => anyhow::bail!("a pass without logits is fed, and gives none"),
        };
        context.advance(seq)?;
        self.head(meter, &asked)
    }

    /// Feeds `ids` into what `context` holds, without logits.
    ///
    /// # Errors
    /// As [`Decoder::forward`].
    pub fn feed(&self, meter: Meter, ids: Ids, context: Context) -> Result<()> {
        let seq = self.hidden(meter, ids, &context)?.dims()[1];
        context.advance(seq)
    }

    /// What the last layer gives, (B, T, D).
    pub(super) fn hidden(&self, meter: Meter, ids: Ids, context: &Context) -> Result<Unshared> {
        let mut x = self.embed(meter, ids)?;
        let sequences = self.sequences(&x, context)?;
        for (i, layer) in self.layers.iter().enumerate() {
            x = layer.forward(meter.layer(i), i, x, &sequences, context)?;
        }
        Ok(x)
    }

    /// (B, T, D)
    pub(super) fn embed(&self, meter: Meter, ids: Ids) -> Result<Unshared> {
        let at = meter.at(Module::EmbedTokens);
        ops::embed(at, &self.embed_tokens, ids, self.embed_scale.as_ref())
    }

    /// How sequences lie in x (B, T, D), with their masks.
    pub(super) fn sequences(&self, x: &Unshared, context: &Context) -> Result<Sequences> {
        let spans = context.spans(x.dims()[0], x.dims()[1])?;
        let mut known: HashMap<(usize, usize), Arc<Masks>> = HashMap::new();
        let mut each = vec![];
        for span in spans {
            if context.lengths().is_none() {
                return Ok(Sequences::Alike(self.masks(span)?));
            }
            let masks = match known.get(&span) {
                Some(masks) => masks.clone(),
                None => known.entry(span).or_insert(Arc::new(self.masks(span)?)).clone(),
            };
            each.push(Span { length: span.0, masks });
        }
        Ok(Sequences::Each(each))
    }

    /// The masks of `seq` tokens after `past`; a single token may look at everything that it
    /// reaches, and has none.
    fn masks(&self, (seq, past): (usize, usize)) -> Result<Masks> {
        if seq == 1 {
            return Ok(Masks::default());
        }
        let mask = |window| match self.mode {
            AttentionMode::Dense => {
                CausalMask::new(seq, past, window, self.dtype.base(), &self.device)
            }
            AttentionMode::Blocked => Ok(CausalMask::by_block(seq, past, window)),
        };
        let windows = || self.layers.iter().map(|layer| layer.self_attn.window);
        let full = windows().any(|window| window.is_none());
        let windowed = windows().flatten().next();
        Ok(Masks {
            full: full.then(|| mask(None)).transpose()?,
            windowed: windowed.map(|window| mask(Some(window))).transpose()?,
        })
    }

    /// Logits of the last layer's output (B, T, D): (B, T, V).
    fn head(&self, meter: Meter, x: &Unshared) -> Result<Unshared> {
        let at = meter.at(Module::LmHead);
        let head =
            Product { at, weight: self.head_weight(), eight_bit: None, bias: None, adapter: None };
        ops::normed_product(self.norm.at(meter), x, head)
    }

    /// What the head takes, from the last layer's output.
    pub(super) fn normed(&self, meter: Meter, x: &Tensor) -> Result<Tensor> {
        self.norm.at(meter).of(x)
    }

    /// (V, D)
    pub(super) fn head_weight(&self) -> &Tensor {
        self.lm_head.as_ref().unwrap_or(&self.embed_tokens)
    }
}

/// The last row of each of the sequences of these lengths that x (1, Σ T, D) holds: (1, B, D).
fn lasts(x: &Tensor, lengths: &[usize]) -> Result<Unshared> {
    let mut end = 0;
    let last = |length: &usize| {
        end += length;
        x.narrow(1, end - 1, 1)
    };
    let lasts: Vec<Tensor> = lengths.iter().map(last).collect::<Result<_>>()?;
    Tensor::joined(&lasts, 1)?.copied()
}

impl Layer {
    /// Whether an adapter of it is trained.
    pub(super) fn trains_adapters(&self) -> bool {
        let Attention { q_proj, k_proj, v_proj, o_proj, .. } = &self.self_attn;
        let Mlp { gate_proj, up_proj, down_proj, .. } = &self.mlp;
        let all = [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj];
        all.into_iter().filter_map(|linear| linear.adapter.as_ref()).any(Adapter::is_trained)
    }

    pub(super) fn forward(
        &self,
        meter: Meter,
        index: usize,
        x: Unshared, // (B, T, D)
        sequences: &Sequences,
        context: &Context,
    ) -> Result<Unshared> {
        let residual = meter.at(Module::Residual);
        let Attention { o_proj, .. } = &self.self_attn;
        let Mlp { gate_proj, up_proj, down_proj, activation } = &self.mlp;
        // Each norm of the layer, before attention, after it, before the MLP, after it.
        let first = self.input_layernorm.at(meter);
        let post = self.post_attention_layernorm.at(meter);
        let (after_attention, before_mlp, after_mlp) = match &self.sandwich {
            None => (None, post, None),
            Some(Sandwich { pre_feedforward_layernorm, post_feedforward_layernorm }) => (
                Some(post),
                pre_feedforward_layernorm.at(meter),
                Some(post_feedforward_layernorm.at(meter)),
            ),
        };

        let ahead = [&gate_proj.weight, &up_proj.weight];
        let mixed = self.self_attn.forward(meter, index, (first, &x), ahead, sequences, context)?; // (B, T, H·d)
        let (o, down) = (o_proj.product(meter), down_proj.product(meter));
        let x = ops::add_product(residual, x, &mixed, o, after_attention, &[&down_proj.weight])?;
        let sides = [gate_proj.product(meter), up_proj.product(meter)];
        let at = meter.at(Module::Mlp);
        let inner = ops::gated_products(before_mlp, &x, sides, at, *activation)?; // (B, T, F)
        ops::add_product(residual, x, &inner, down, after_mlp, &[])
    }
}

impl Attention {
    /// The weighted values, (B, T, H·d), of normed x (B, T, D).
    fn forward(
        &self,
        meter: Meter,
        layer: usize,
        (norm, x): (Norm, &Unshared),
        ahead: [&Tensor; 2],
        sequences: &Sequences,
        context: &Context,
    ) -> Result<Tensor> {
        let products =
            [&self.q_proj, &self.k_proj, &self.v_proj].map(|linear| linear.product(meter));
        let [q, k, v] = ops::normed_products(norm, x, &products, &ahead)?;
        let attention = self.at(meter, context.positions().of(layer)?);
        let cache = context.kv().map(|kv| (kv, layer));
        ops::attend(attention, [&q, &k, &v], sequences, cache)
    }

    /// What stands between the projections.
    pub(super) fn at<'a>(&'a self, meter: Meter<'a>, rope: &'a RopeTable) -> ops::Attention<'a> {
        let (q_norm, k_norm) = self.norms.as_ref().map(|(q, k)| (q.at(meter), k.at(meter))).unzip();
        ops::Attention {
            at: meter.at(Module::SelfAttn),
            heads: self.heads,
            kv_heads: self.kv_heads,
            scale: &self.scale,
            q_norm,
            k_norm,
            rope,
            window: self.window,
            mode: self.mode,
        }
    }
}

impl Gain {
    pub(super) fn at<'a>(&'a self, meter: Meter<'a>) -> Norm<'a> {
        let Self { module, gain, eps, one } = self;
        Norm { at: meter.at(*module), gain, eps: *eps, one: one.as_ref() }
    }
}

impl Linear {
    pub(super) fn product<'a>(&'a self, meter: Meter<'a>) -> Product<'a> {
        let at = meter.at(Module::Proj(self.projection));
        let adapter = self.adapter.as_ref().map(|adapter| adapter.at(meter));
        let eight_bit = self
            .narrow
            .as_ref()
            .map(|Narrow { scales, wide }| EightBit { scales, wide: wide.as_ref() });
        Product { at, weight: &self.weight, eight_bit, bias: self.bias.as_ref(), adapter }
    }
}
