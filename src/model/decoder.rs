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

use candle_core::Device;

use super::{Adapter, AdapterSource, Cache, Context, Positions};
use crate::{
    config::{Activation, LoraConfig, ModelConfig, Projection},
    error::{Error, Result},
    ledger::{Dtype, Module, Scope},
    meter::Meter,
    ops::{self, CausalMask, Ids, Masks, Norm, Product, Tensor, Unshared},
    weights::{Weights, adapter_name, fingerprint},
    workload::Logits,
};

/// The model with its weights, ready to run.
#[derive(Debug)]
pub struct Decoder {
    config: ModelConfig,
    lora: LoraConfig,
    embed_tokens: Tensor,        // (V, D)
    embed_scale: Option<Tensor>, // √D, one element
    pub(super) layers: Vec<Layer>,
    norm: Gain,
    lm_head: Option<Tensor>, // (V, D); none where the embedding serves
    dtype: Dtype,
    device: Device,
}

#[derive(Debug)]
pub(super) struct Layer {
    input_layernorm: Gain,
    self_attn: Attention,
    /// Before the MLP; in a sandwich, after attention.
    post_attention_layernorm: Gain,
    sandwich: Option<Sandwich>,
    mlp: Mlp,
}

/// The norms around the MLP, where one stands after attention too.
#[derive(Debug)]
struct Sandwich {
    pre_feedforward_layernorm: Gain,
    post_feedforward_layernorm: Gain,
}

#[derive(Debug)]
struct Attention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    norms: Option<(Gain, Gain)>, // of queries and keys, (d) each
    heads: usize,
    kv_heads: usize,
    scale: Tensor, // one element
    window: Option<usize>,
}

#[derive(Debug)]
struct Mlp {
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
    activation: Activation,
}

#[derive(Debug)]
struct Linear {
    projection: Projection,
    weight: Tensor,       // (out, in)
    bias: Option<Tensor>, // (out)
    adapter: Option<Adapter>,
}

/// A norm's gain.
#[derive(Debug)]
struct Gain {
    module: Module,
    gain: Tensor,
    eps: f64,
    /// 1, one element, where the norm multiplies by 1 + gain.
    one: Option<Tensor>,
}

/// Reads tensors by checkpoint name, in one dtype, on one device.
struct Loader<'a> {
    config: &'a ModelConfig,
    weights: &'a Weights,
    adapters: &'a AdapterSource,
    dtype: Dtype,
    device: &'a Device,
}

impl Loader<'_> {
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let dtype = ops::candle_dtype(self.dtype);
        Ok(Tensor::of(self.weights.tensor(name, shape, dtype, self.device)?))
    }

    fn constant(&self, value: f64) -> Result<Tensor> {
        Tensor::from_vec(vec![value as f32], 1, self.dtype, self.device)
    }

    /// The norm `module` of `width`, at `path` in the checkpoint.
    fn norm(&self, path: &str, module: Module, width: usize) -> Result<Gain> {
        let (config, name) = (self.config, Scope { layer: None, module });
        Ok(Gain {
            module,
            gain: self.tensor(&format!("model.{path}{name}.weight"), &[width])?,
            eps: config.rms_norm_eps,
            one: config.unit_offset_norms.then(|| self.constant(1.0)).transpose()?,
        })
    }

    fn linear(&self, layer: usize, projection: Projection) -> Result<Linear> {
        let (adapters, config) = (self.adapters, self.config);
        let (input, output) = projection.widths(config);
        let name = format!("model.layers.{layer}.{}.{projection}", projection.parent());
        let bias = || self.tensor(&format!("{name}.bias"), &[output]);
        Ok(Linear {
            projection,
            weight: self.tensor(&format!("{name}.weight"), &[output, input])?,
            bias: config.has_bias(projection).then(bias).transpose()?,
            adapter: Adapter::load(adapters, config, layer, projection, self.dtype, self.device)?,
        })
    }

    fn layer(&self, i: usize) -> Result<Layer> {
        let (config, path) = (self.config, format!("layers.{i}."));
        let wide = |module| self.norm(&path, module, config.hidden_size);
        let of_heads = |module| self.norm(&path, module, config.head_dim());
        let head_norms = || anyhow::Ok((of_heads(Module::QNorm)?, of_heads(Module::KNorm)?));
        let sandwich = || {
            anyhow::Ok(Sandwich {
                pre_feedforward_layernorm: wide(Module::PreFeedforwardLayernorm)?,
                post_feedforward_layernorm: wide(Module::PostFeedforwardLayernorm)?,
            })
        };
        Ok(Layer {
            input_layernorm: wide(Module::InputLayernorm)?,
            self_attn: Attention {
                q_proj: self.linear(i, Projection::QProj)?,
                k_proj: self.linear(i, Projection::KProj)?,
                v_proj: self.linear(i, Projection::VProj)?,
                o_proj: self.linear(i, Projection::OProj)?,
                norms: config.qk_norm.then(head_norms).transpose()?,
                heads: config.num_attention_heads,
                kv_heads: config.num_key_value_heads,
                scale: self.constant(config.attention_scale())?,
                window: config.window_of(i),
            },
            post_attention_layernorm: wide(Module::PostAttentionLayernorm)?,
            sandwich: config.sandwich_norms.then(sandwich).transpose()?,
            mlp: Mlp {
                gate_proj: self.linear(i, Projection::GateProj)?,
                up_proj: self.linear(i, Projection::UpProj)?,
                down_proj: self.linear(i, Projection::DownProj)?,
                activation: config.activation,
            },
        })
    }
}

impl Decoder {
    /// Loads every tensor, checked against `config`; `progress` hears of each finished layer, and
    /// its error ends the loading.
    ///
    /// # Errors
    /// A tensor that is missing, misshapen or not finite, or a device out of memory.
    pub fn load(
        config: &ModelConfig,
        weights: &Weights,
        adapters: &AdapterSource,
        dtype: Dtype,
        device: &Device,
        progress: impl Fn(usize) -> Result<()>,
    ) -> Result<Self> {
        let loader = Loader { config, weights, adapters, dtype, device };
        let table = [config.vocab_size, config.hidden_size];
        let embed_tokens = loader.tensor("model.embed_tokens.weight", &table)?;
        let layers = (0..config.num_hidden_layers)
            .map(|i| {
                progress(i)?;
                loader.layer(i)
            })
            .collect::<Result<_>>()?;
        let lm_head = match config.tie_word_embeddings {
            true => None,
            false => Some(loader.tensor("lm_head.weight", &table)?),
        };
        Ok(Self {
            config: config.clone(),
            lora: adapters.lora().clone(),
            embed_tokens,
            embed_scale: config.embedding_scale().map(|s| loader.constant(s)).transpose()?,
            layers,
            norm: loader.norm("", Module::Norm, config.hidden_size)?,
            lm_head,
            dtype,
            device: device.clone(),
        })
    }

    /// The model's widths and counts.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The adapters it carries.
    pub fn lora(&self) -> &LoraConfig {
        &self.lora
    }

    /// Element type of weights and activations.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// The device it runs on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// An empty cache for this model.
    ///
    /// # Errors
    /// A capacity past the model's positions; else as [`Cache::new`].
    pub fn cache(&self, meter: Meter, batch: usize, capacity: usize) -> Result<Cache> {
        self.check_positions(capacity)?;
        Cache::new(meter, &self.config, batch, capacity, self.dtype, &self.device)
    }

    /// Rotary tables for whole sequences of up to `seq` tokens, of which nothing is kept.
    ///
    /// # Errors
    /// More than the model's positions; else as [`Positions::new`].
    pub fn positions(&self, meter: Meter, seq: usize) -> Result<Positions> {
        self.check_positions(seq)?;
        Positions::new(meter, &self.config, seq, self.dtype, &self.device)
    }

    fn check_positions(&self, tokens: usize) -> Result<()> {
        let most = self.config.max_position_embeddings;
        if tokens > most {
            let why = format!("{tokens} tokens are past the model's {most} positions");
            return Err(Error::Prompt(why).into());
        }
        Ok(())
    }

    /// Feeds `ids`, after what `context` holds: logits (B, T or 1, V).
    ///
    /// # Errors
    /// An id outside the vocabulary, a full cache, or the device's.
    pub fn forward(
        &self,
        meter: Meter,
        ids: Ids,
        context: Context,
        logits: Logits,
    ) -> Result<Unshared> {
        let x = self.hidden(meter, ids, &context)?; // (B, T, D)
        let seq = x.dims()[1];
        if let Context::Cached(cache) = context {
            cache.kv.advance(seq)?;
        }
        let last = match logits {
            Logits::Last => x.narrow(1, seq - 1, 1)?, // (B, 1, D)
            Logits::All => x,
        };
        self.head(meter, &last)
    }

    /// What the last layer gives, (B, T, D).
    pub(super) fn hidden(&self, meter: Meter, ids: Ids, context: &Context) -> Result<Unshared> {
        let mut x = self.embed(meter, ids)?;
        let masks = self.masks(&x, context)?;
        for (i, layer) in self.layers.iter().enumerate() {
            x = layer.forward(meter.layer(i), i, x, &masks, context)?;
        }
        Ok(x)
    }

    /// (B, T, D)
    pub(super) fn embed(&self, meter: Meter, ids: Ids) -> Result<Unshared> {
        let at = meter.at(Module::EmbedTokens);
        ops::embed(at, &self.embed_tokens, ids, self.embed_scale.as_ref())
    }

    /// The masks of the tokens of x (B, T, D); a single token may look at everything that it
    /// reaches, and has none.
    pub(super) fn masks(&self, x: &Unshared, context: &Context) -> Result<Masks> {
        let (batch, seq) = (x.dims()[0], x.dims()[1]);
        let past = context.past(batch, seq)?;
        if seq == 1 {
            return Ok(Masks::default());
        }
        let mask = |window| CausalMask::new(seq, past, window, self.dtype, &self.device);
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
        let head = Product { at, weight: self.head_weight(), bias: None, adapter: None };
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

    /// Tells models of other weights or adapters apart, by the first row of every parameter.
    ///
    /// # Errors
    /// The device's.
    pub fn fingerprint(&mut self) -> Result<u64> {
        let mut bytes = vec![];
        for Parameter { name, tensor, .. } in self.parameters() {
            bytes.extend(name.bytes());
            let first = tensor.detach().narrow(0, 0, 1)?.to_vec()?;
            bytes.extend(first.into_iter().flat_map(f32::to_le_bytes));
        }
        Ok(fingerprint(&bytes))
    }

    /// Every parameter, adapters included, in the order of the data flow.
    pub(super) fn parameters(&mut self) -> Vec<Parameter<'_>> {
        let outside = |name: &str, module, tensor| {
            let scope = Scope { layer: None, module };
            Parameter { name: name.into(), scope, tensor }
        };
        let embedding = &mut self.embed_tokens;
        let mut all = vec![outside("model.embed_tokens.weight", Module::EmbedTokens, embedding)];
        for (i, layer) in self.layers.iter_mut().enumerate() {
            layer.parameters(i, &mut all);
        }
        all.push(outside("model.norm.weight", Module::Norm, &mut self.norm.gain));
        if let Some(tensor) = &mut self.lm_head {
            all.push(outside("lm_head.weight", Module::LmHead, tensor));
        }
        all
    }
}

/// One tensor of weights, where it is.
pub(super) struct Parameter<'a> {
    /// Its name in a checkpoint, or in PEFT's format.
    pub name: String,
    pub scope: Scope,
    pub tensor: &'a mut Tensor,
}

impl Layer {
    fn parameters<'a>(&'a mut self, layer: usize, all: &mut Vec<Parameter<'a>>) {
        let Self { input_layernorm, self_attn, post_attention_layernorm, sandwich, mlp } = self;
        input_layernorm.parameter(layer, all);
        let Attention { q_proj, k_proj, v_proj, o_proj, norms, .. } = self_attn;
        for linear in [q_proj, k_proj, v_proj] {
            linear.parameters(layer, all);
        }
        for norm in norms.iter_mut().flat_map(|(q, k)| [q, k]) {
            norm.parameter(layer, all);
        }
        o_proj.parameters(layer, all);
        post_attention_layernorm.parameter(layer, all);
        let (before, after) = match sandwich {
            Some(s) => {
                (Some(&mut s.pre_feedforward_layernorm), Some(&mut s.post_feedforward_layernorm))
            }
            None => (None, None),
        };
        before.into_iter().for_each(|norm| norm.parameter(layer, all));
        for linear in [&mut mlp.gate_proj, &mut mlp.up_proj, &mut mlp.down_proj] {
            linear.parameters(layer, all);
        }
        after.into_iter().for_each(|norm| norm.parameter(layer, all));
    }

    pub(super) fn forward(
        &self,
        meter: Meter,
        index: usize,
        x: Unshared, // (B, T, D)
        masks: &Masks,
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
        let mixed = self.self_attn.forward(meter, index, (first, &x), ahead, masks, context)?; // (B, T, H·d)
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
        masks: &Masks,
        context: &Context,
    ) -> Result<Tensor> {
        let products =
            [&self.q_proj, &self.k_proj, &self.v_proj].map(|linear| linear.product(meter));
        let [q, k, v] = ops::normed_products(norm, x, &products, &ahead)?;
        let (q_norm, k_norm) = self.norms.as_ref().map(|(q, k)| (q.at(meter), k.at(meter))).unzip();
        let attention = ops::Attention {
            at: meter.at(Module::SelfAttn),
            heads: self.heads,
            kv_heads: self.kv_heads,
            scale: &self.scale,
            q_norm,
            k_norm,
            rope: context.positions().of(layer)?,
            window: self.window,
        };
        let cache = context.kv().map(|kv| (kv, layer));
        ops::attend(attention, [&q, &k, &v], masks, cache)
    }
}

impl Gain {
    fn at<'a>(&'a self, meter: Meter<'a>) -> Norm<'a> {
        let Self { module, gain, eps, one } = self;
        Norm { at: meter.at(*module), gain, eps: *eps, one: one.as_ref() }
    }

    fn parameter<'a>(&'a mut self, layer: usize, all: &mut Vec<Parameter<'a>>) {
        let scope = Scope { layer: Some(layer as u32), module: self.module };
        all.push(Parameter {
            name: format!("model.{scope}.weight"),
            scope,
            tensor: &mut self.gain,
        });
    }
}

impl Linear {
    fn parameters<'a>(&'a mut self, layer: usize, all: &mut Vec<Parameter<'a>>) {
        let Self { projection, weight, bias, adapter } = self;
        let name = format!("model.layers.{layer}.{}.{projection}", projection.parent());
        let at = |module| Scope { layer: Some(layer as u32), module };
        let scope = at(Module::Proj(*projection));
        all.push(Parameter { name: format!("{name}.weight"), scope, tensor: weight });
        if let Some(tensor) = bias {
            all.push(Parameter { name: format!("{name}.bias"), scope, tensor });
        }
        for (part, tensor) in adapter.iter_mut().flat_map(Adapter::factors) {
            let scope = at(Module::Lora(*projection, part));
            let name = adapter_name(layer, *projection, part);
            all.push(Parameter { name, scope, tensor });
        }
    }

    fn product<'a>(&'a self, meter: Meter<'a>) -> Product<'a> {
        let at = meter.at(Module::Proj(self.projection));
        let adapter = self.adapter.as_ref().map(|adapter| adapter.at(meter));
        Product { at, weight: &self.weight, bias: self.bias.as_ref(), adapter }
    }
}
