//! Qwen2: a pre-norm decoder with grouped-query attention, rotary positions and a SwiGLU MLP.
//!
//! ```text
//! ids ─ embed_tokens ─┬─ input_layernorm ─ q,k,v ─ RoPE ─ attention ─ o ─ + ─┐
//!                     └──────────────────────────────────────────────────────┤
//!                     ┌─ post_attention_layernorm ─ silu(gate) · up ─ down ─ + ─ … ─ norm ─ lm_head
//! ```
//! B batch, T tokens of this pass, S = past + T, D hidden, H query heads, K key/value heads,
//! G = H/K, d head width, F MLP width, V vocabulary.

use candle_core::Device;

use super::{Adapter, AdapterSource, KvCache};
use crate::{
    config::{LoraConfig, ModelConfig, Projection},
    error::{Error, Result},
    ledger::{Dtype, Module, Scope},
    meter::Meter,
    ops::{self, CausalMask, Tensor},
    weights::{Weights, adapter_name, fingerprint},
    workload::Logits,
};

/// The model with its weights, ready to run.
#[derive(Debug)]
pub struct Qwen2 {
    config: ModelConfig,
    lora: LoraConfig,
    embed_tokens: Tensor, // (V, D)
    pub(super) layers: Vec<Layer>,
    norm: Tensor,            // (D)
    lm_head: Option<Tensor>, // (V, D); none where the embedding serves
    dtype: Dtype,
    device: Device,
}

#[derive(Debug)]
pub(super) struct Layer {
    pub(super) input_layernorm: Tensor, // (D)
    pub(super) self_attn: Attention,
    pub(super) post_attention_layernorm: Tensor, // (D)
    pub(super) mlp: Mlp,
    pub(super) eps: f64,
}

#[derive(Debug)]
pub(super) struct Attention {
    pub(super) q_proj: Linear,
    pub(super) k_proj: Linear,
    pub(super) v_proj: Linear,
    pub(super) o_proj: Linear,
    heads: usize,
    kv_heads: usize,
    pub(super) scale: Tensor, // 1/√d, one element
}

#[derive(Debug)]
pub(super) struct Mlp {
    pub(super) gate_proj: Linear,
    pub(super) up_proj: Linear,
    pub(super) down_proj: Linear,
}

#[derive(Debug)]
pub(super) struct Linear {
    pub(super) projection: Projection,
    pub(super) weight: Tensor,       // (out, in)
    pub(super) bias: Option<Tensor>, // (out)
    pub(super) adapter: Option<Adapter>,
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
        Ok(self.weights.tensor(name, shape, ops::candle_dtype(self.dtype), self.device)?.into())
    }

    fn linear(&self, layer: usize, projection: Projection) -> Result<Linear> {
        let (input, output) = projection.widths(self.config);
        let name = format!("model.layers.{layer}.{}.{projection}", projection.parent());
        let bias = projection.has_bias().then(|| self.tensor(&format!("{name}.bias"), &[output]));
        let (adapters, config) = (self.adapters, self.config);
        Ok(Linear {
            projection,
            weight: self.tensor(&format!("{name}.weight"), &[output, input])?,
            bias: bias.transpose()?,
            adapter: Adapter::load(adapters, config, layer, projection, self.dtype, self.device)?,
        })
    }

    fn layer(&self, i: usize) -> Result<Layer> {
        let config = self.config;
        let norm =
            |name| self.tensor(&format!("model.layers.{i}.{name}.weight"), &[config.hidden_size]);
        let scale = 1.0 / (config.head_dim() as f64).sqrt();
        Ok(Layer {
            input_layernorm: norm("input_layernorm")?,
            self_attn: Attention {
                q_proj: self.linear(i, Projection::QProj)?,
                k_proj: self.linear(i, Projection::KProj)?,
                v_proj: self.linear(i, Projection::VProj)?,
                o_proj: self.linear(i, Projection::OProj)?,
                heads: config.num_attention_heads,
                kv_heads: config.num_key_value_heads,
                scale: Tensor::from_vec(vec![scale as f32], 1, self.dtype, self.device)?,
            },
            post_attention_layernorm: norm("post_attention_layernorm")?,
            mlp: Mlp {
                gate_proj: self.linear(i, Projection::GateProj)?,
                up_proj: self.linear(i, Projection::UpProj)?,
                down_proj: self.linear(i, Projection::DownProj)?,
            },
            eps: config.rms_norm_eps,
        })
    }
}

impl Qwen2 {
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
            layers,
            norm: loader.tensor("model.norm.weight", &table[1..])?,
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
    /// A capacity past the model's positions; else as [`KvCache::new`].
    pub fn cache(&self, meter: Meter, batch: usize, capacity: usize) -> Result<KvCache> {
        let most = self.config.max_position_embeddings;
        if capacity > most {
            let why = format!("{capacity} tokens are past the model's {most} positions");
            return Err(Error::Prompt(why).into());
        }
        KvCache::new(meter, &self.config, batch, capacity, self.dtype, &self.device)
    }

    /// Feeds `ids`, a batch of equally long sequences one after another, on top of what `cache`
    /// holds: logits (B, T or 1, V).
    ///
    /// # Errors
    /// An id outside the vocabulary, a full cache, or the device's.
    pub fn forward(
        &self,
        meter: Meter,
        ids: &[u32],
        batch: usize,
        cache: &mut KvCache,
        logits: Logits,
    ) -> Result<Tensor> {
        let mut x = self.hidden(meter, ids, batch, cache)?; // (B, T, D)
        let seq = x.dims()[1];
        cache.set_past(cache.past() + seq)?;
        if logits == Logits::Last {
            x = x.narrow(1, seq - 1, 1)?; // (B, 1, D)
        }
        let x = self.normed(meter, &x)?;
        ops::linear(meter.at(Module::LmHead), &x, self.head())
    }

    /// What the last layer gives, (B, T, D).
    pub(super) fn hidden(
        &self,
        meter: Meter,
        ids: &[u32],
        batch: usize,
        cache: &KvCache,
    ) -> Result<Tensor> {
        let mut x = self.embed(meter, ids, batch)?;
        let mask = self.mask(batch, x.dims()[1], cache)?;
        for (i, layer) in self.layers.iter().enumerate() {
            x = layer.forward(meter.layer(i), i, &x, mask.as_ref(), cache)?;
        }
        Ok(x)
    }

    /// (B, T, D)
    pub(super) fn embed(&self, meter: Meter, ids: &[u32], batch: usize) -> Result<Tensor> {
        ops::embed(meter.at(Module::EmbedTokens), &self.embed_tokens, ids, batch)
    }

    /// The mask (T, S) of `seq` tokens on top of what `cache` holds; a single token may look at
    /// everything before it and has none.
    pub(super) fn mask(
        &self,
        batch: usize,
        seq: usize,
        cache: &KvCache,
    ) -> Result<Option<CausalMask>> {
        cache.check_room(batch, seq)?;
        let mask = || CausalMask::new(seq, cache.past(), self.dtype, &self.device);
        (seq > 1).then(mask).transpose()
    }

    /// What the head takes, from the last layer's output.
    pub(super) fn normed(&self, meter: Meter, x: &Tensor) -> Result<Tensor> {
        ops::rms_norm(meter.at(Module::Norm), x, &self.norm, self.config.rms_norm_eps)
    }

    /// The final norm's gain, (D).
    pub(super) fn last_norm(&self) -> &Tensor {
        &self.norm
    }

    /// (V, D)
    pub(super) fn embedding(&self) -> &Tensor {
        &self.embed_tokens
    }

    /// (V, D)
    pub(super) fn head(&self) -> &Tensor {
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
            Parameter { name: format!("model.{name}.weight"), scope, tensor }
        };
        let mut all = vec![outside("embed_tokens", Module::EmbedTokens, &mut self.embed_tokens)];
        for (i, layer) in self.layers.iter_mut().enumerate() {
            layer.parameters(i, &mut all);
        }
        all.push(outside("norm", Module::Norm, &mut self.norm));
        if let Some(tensor) = &mut self.lm_head {
            let scope = Scope { layer: None, module: Module::LmHead };
            all.push(Parameter { name: "lm_head.weight".into(), scope, tensor });
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
        let norm = |name: &str, module, tensor| Parameter {
            name: format!("model.layers.{layer}.{name}.weight"),
            scope: Scope { layer: Some(layer as u32), module },
            tensor,
        };
        let Self { input_layernorm, self_attn, post_attention_layernorm, mlp, .. } = self;
        all.push(norm("input_layernorm", Module::InputLayernorm, input_layernorm));
        let Attention { q_proj, k_proj, v_proj, o_proj, .. } = self_attn;
        for linear in [q_proj, k_proj, v_proj, o_proj] {
            linear.parameters(layer, all);
        }
        let module = Module::PostAttentionLayernorm;
        all.push(norm("post_attention_layernorm", module, post_attention_layernorm));
        for linear in [&mut mlp.gate_proj, &mut mlp.up_proj, &mut mlp.down_proj] {
            linear.parameters(layer, all);
        }
    }

    pub(super) fn forward(
        &self,
        meter: Meter,
        index: usize,
        x: &Tensor, // (B, T, D)
        mask: Option<&CausalMask>,
        cache: &KvCache,
    ) -> Result<Tensor> {
        let h =
            ops::rms_norm(meter.at(Module::InputLayernorm), x, &self.input_layernorm, self.eps)?;
        let h = self.self_attn.forward(meter, index, &h, mask, cache)?;
        let x = ops::add(meter.at(Module::Residual), x, &h)?;
        let gain = &self.post_attention_layernorm;
        let h = ops::rms_norm(meter.at(Module::PostAttentionLayernorm), &x, gain, self.eps)?;
        let h = self.mlp.forward(meter, &h)?;
        ops::add(meter.at(Module::Residual), &x, &h)
    }
}

impl Attention {
    fn forward(
        &self,
        meter: Meter,
        layer: usize,
        x: &Tensor, // (B, T, D)
        mask: Option<&CausalMask>,
        cache: &KvCache,
    ) -> Result<Tensor> {
        let at = meter.at(Module::SelfAttn);
        let (q, k, v) = (
            self.q_proj.forward(meter, x)?,
            self.k_proj.forward(meter, x)?,
            self.v_proj.forward(meter, x)?,
        );
        let (rope, past) = (cache.rope(), cache.past());
        // Scaling q costs T·d a head; scaling the scores would cost T·S.
        let q = ops::rotated_heads(at, &q, self.heads, rope, past, Some(&self.scale))?; // (B, H, T, d)
        let k = ops::rotated_heads(at, &k, self.kv_heads, rope, past, None)?; // (B, K, T, d)
        let (k, v) = cache.extend(layer, &k, &ops::split_heads(&v, self.kv_heads)?)?; // (B, K, S, d)
        let mixed = ops::attention(at, &q, &k, &v, mask)?; // (B, T, H·d)
        self.o_proj.forward(meter, &mixed)
    }
}

impl Mlp {
    fn forward(&self, meter: Meter, x: &Tensor) -> Result<Tensor> {
        let at = meter.at(Module::Mlp);
        let gate = self.gate_proj.forward(meter, x)?; // (B, T, F)
        let up = self.up_proj.forward(meter, x)?;
        self.down_proj.forward(meter, &ops::gated(at, &gate, &up)?)
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

    fn forward(&self, meter: Meter, x: &Tensor) -> Result<Tensor> {
        let at = meter.at(Module::Proj(self.projection));
        let mut y = ops::linear(at, x, &self.weight)?;
        if let Some(bias) = &self.bias {
            y = ops::bias(at, &y, bias)?;
        }
        match &self.adapter {
            Some(adapter) => adapter.forward(meter, x, &y),
            None => Ok(y),
        }
    }
}
