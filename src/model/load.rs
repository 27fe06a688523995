//! A decoder from a checkpoint: every tensor by its name there, checked against the config.

use candle_core::Device;

use super::{
    Adapter, AdapterSource, Decoder,
    decoder::{Attention, Gain, Layer, Linear, Mlp, Narrow, Sandwich},
};
use crate::{
    config::{ModelConfig, Projection},
    error::Result,
    ledger::{Dtype, Module, Scope},
    ops::{self, Tensor},
    weights::Weights,
    workload::AttentionMode,
};

/// Reads tensors by checkpoint name, in one dtype, on one device.
struct Loader<'a> {
    config: &'a ModelConfig,
    weights: &'a Weights,
    adapters: &'a AdapterSource,
    /// Of everything, but for weights in 8 bits.
    dtype: Dtype,
    device: &'a Device,
    /// What is kept of weights in 8 bits, where those of projections are.
    eight_bit: Option<Kept>,
}

/// What is kept of weights in 8 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kept {
    /// 8 bits alone.
    Narrow,
    /// What they were too, which gradients are computed from.
    Both,
}

impl<'a> Loader<'a> {
    /// In fp8 weights of projections are put into 8 bits, of which `kept` stays; all else is bf16.
    fn new(
        config: &'a ModelConfig,
        weights: &'a Weights,
        adapters: &'a AdapterSource,
        dtype: Dtype,
        device: &'a Device,
        kept: Kept,
    ) -> Self {
        let eight_bit = dtype.is_8_bit().then_some(kept);
        Self { config, weights, adapters, dtype: dtype.base(), device, eight_bit }
    }
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
        let wide = self.tensor(&format!("{name}.weight"), &[output, input])?;
        let (weight, narrow) = match self.eight_bit {
            None => (wide, None),
            Some(kept) => {
                let (weight, scales) = ops::narrowed(&wide)?;
                let wide = (kept == Kept::Both).then_some(wide);
                (weight, Some(Narrow { scales, wide }))
            }
        };
        Ok(Linear {
            projection,
            weight,
            narrow,
            bias: config.has_bias(projection).then(bias).transpose()?,
            adapter: Adapter::load(adapters, config, layer, projection, self.dtype, self.device)?,
        })
    }

    /// Projections of one input.
    fn linears<const N: usize>(&self, layer: usize, of: [Projection; N]) -> Result<[Linear; N]> {
        let each = of.into_iter().map(|projection| self.linear(layer, projection));
        let mut all: Vec<_> = each.collect::<Result<_>>()?;
        Adapter::adjoin(all.iter_mut().filter_map(|linear| linear.adapter.as_mut()))?;
        all.try_into().map_err(|all: Vec<_>| anyhow::anyhow!("{} projections of {N}", all.len()))
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
        let [q_proj, k_proj, v_proj] =
            self.linears(i, [Projection::QProj, Projection::KProj, Projection::VProj])?;
        let [gate_proj, up_proj] = self.linears(i, [Projection::GateProj, Projection::UpProj])?;
        Ok(Layer {
            input_layernorm: wide(Module::InputLayernorm)?,
            self_attn: Attention {
                q_proj,
                k_proj,
                v_proj,
                o_proj: self.linear(i, Projection::OProj)?,
                norms: config.qk_norm.then(head_norms).transpose()?,
                heads: config.num_attention_heads,
                kv_heads: config.num_key_value_heads,
                scale: self.constant(config.attention_scale())?,
                window: config.window_of(i),
                mode: AttentionMode::Dense,
            },
            post_attention_layernorm: wide(Module::PostAttentionLayernorm)?,
            sandwich: config.sandwich_norms.then(sandwich).transpose()?,
            mlp: Mlp {
                gate_proj,
                up_proj,
                down_proj: self.linear(i, Projection::DownProj)?,
                activation: config.activation,
            },
        })
    }
}

impl Decoder {
    /// Loads every tensor, checked against `config`; `progress` hears of each finished layer, and
    /// its error ends the loading. In fp8, the layers' projections are put into 8 bits as they are
    /// loaded, and all else is bf16.
    ///
    /// # Errors
    /// A tensor that is missing, misshapen or not finite, a device out of memory, or one without fp8.
    pub fn load(
        config: &ModelConfig,
        weights: &Weights,
        adapters: &AdapterSource,
        dtype: Dtype,
        device: &Device,
        progress: impl Fn(usize) -> Result<()>,
    ) -> Result<Self> {
        Loader::new(config, weights, adapters, dtype, device, Kept::Narrow).model(progress)
    }

    /// The same, with all that gradients need: beside weights in 8 bits, what they were.
    ///
    /// # Errors
    /// As [`Decoder::load`].
    pub fn load_to_train(
        config: &ModelConfig,
        weights: &Weights,
        adapters: &AdapterSource,
        dtype: Dtype,
        device: &Device,
        progress: impl Fn(usize) -> Result<()>,
    ) -> Result<Self> {
        Loader::new(config, weights, adapters, dtype, device, Kept::Both).model(progress)
    }
}

impl Loader<'_> {
    fn model(&self, progress: impl Fn(usize) -> Result<()>) -> Result<Decoder> {
        let Self { config, adapters, device, .. } = *self;
        if self.eight_bit.is_some() {
            ops::check_8_bits(device, Projection::ALL.map(|projection| projection.widths(config)))?;
        }
        let table = [config.vocab_size, config.hidden_size];
        let embed_tokens = self.tensor("model.embed_tokens.weight", &table)?;
        let layers = (0..config.num_hidden_layers)
            .map(|i| {
                progress(i)?;
                self.layer(i)
            })
            .collect::<Result<_>>()?;
        let lm_head = match config.tie_word_embeddings {
            true => None,
            false => Some(self.tensor("lm_head.weight", &table)?),
        };
        Ok(Decoder {
            config: config.clone(),
            lora: adapters.lora().clone(),
            embed_tokens,
            embed_scale: config.embedding_scale().map(|s| self.constant(s)).transpose()?,
            layers,
            norm: self.norm("", Module::Norm, config.hidden_size)?,
            lm_head,
            dtype: if self.eight_bit.is_some() { Dtype::Fp8 } else { self.dtype },
            device: device.clone(),
            mode: AttentionMode::Dense,
        })
    }
}
