//! Decoding on a GPU: the same ops as [`Qwen2::forward`] of one token a sequence, in five launches
//! a layer, recorded once and replayed.

use super::{
    KvCache, Qwen2,
    qwen2::{Layer, Linear},
};
use crate::{
    error::Result,
    ledger::{Module, Phase},
    meter::Meter,
    ops::{Decoding, Norm, Product, Sampler, Sizes},
};

/// A batch being decoded on a GPU.
#[derive(Debug)]
pub struct Decoder<'a> {
    model: &'a Qwen2,
    decoding: Decoding,
    recorded: bool,
}

impl Qwen2 {
    /// A decoder of at most `steps` steps on top of what `cache` holds, the first of which feeds
    /// the last token of each of `contexts`, while `sampler` chooses; with `recorded`, steps are
    /// replayed from a CUDA graph. None where the device, the element type or the model's widths
    /// ask for [`Qwen2::forward`].
    ///
    /// # Errors
    /// The device's, out of memory among them.
    pub fn decoder(
        &self,
        cache: &KvCache,
        sampler: &mut Sampler,
        contexts: &[Vec<u32>],
        steps: usize,
        recorded: bool,
    ) -> Result<Option<Decoder<'_>>> {
        let config = self.config();
        let sizes = Sizes {
            batch: contexts.len(),
            capacity: cache.capacity(),
            past: cache.past(),
            steps,
            hidden: config.hidden_size,
            inner: config.intermediate_size,
            heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim(),
            vocab: config.vocab_size,
            rank: self.lora().rank,
        };
        let decoding = Decoding::new(sizes, self.dtype(), self.device(), sampler, contexts)?;
        Ok(decoding.map(|decoding| Decoder { model: self, decoding, recorded }))
    }
}

impl Decoder<'_> {
    /// The next tokens of every sequence, `steps` of them, step after step.
    ///
    /// # Errors
    /// Logits that are not finite, a full cache, or the device's.
    pub fn next(
        &mut self,
        meter: Meter,
        cache: &mut KvCache,
        steps: usize,
    ) -> Result<Vec<Vec<u32>>> {
        cache.set_past(cache.past() + steps)?;
        for _ in 0..steps {
            self.step(meter, cache, true)?;
        }
        self.decoding.chosen(steps)
    }

    /// One step up to the logits on top of what `cache` holds, which holds as much afterwards: the
    /// same step, however often.
    ///
    /// # Errors
    /// The device's.
    pub fn again(&mut self, meter: Meter, cache: &KvCache) -> Result<()> {
        self.decoding.rewind();
        self.step(meter, cache, false)
    }

    fn step(&mut self, meter: Meter, cache: &KvCache, choose: bool) -> Result<()> {
        let Self { model, decoding, recorded } = self;
        decoding.step(*recorded, |decoding| {
            let decode = meter.phase(Phase::Decode);
            model.decode(decode, decoding, cache)?;
            match choose {
                true => decoding.choose(meter.phase(Phase::Sampling).at(Module::Sampler)),
                false => Ok(()),
            }
        })
    }
}

impl Qwen2 {
    /// One step of `decoding`, up to the logits.
    fn decode(&self, meter: Meter, decoding: &Decoding, cache: &KvCache) -> Result<()> {
        decoding.embed(meter.at(Module::EmbedTokens), self.embedding())?;
        for (i, layer) in self.layers.iter().enumerate() {
            layer.decode(meter.layer(i), decoding, cache, i)?;
        }
        let norm = Norm {
            at: meter.at(Module::Norm),
            gain: self.last_norm(),
            eps: self.config().rms_norm_eps,
        };
        let at = meter.at(Module::LmHead);
        let head = Product { at, weight: self.head(), bias: None, adapter: None };
        decoding.head(norm, head)
    }
}

impl Layer {
    fn decode(
        &self,
        meter: Meter,
        decoding: &Decoding,
        cache: &KvCache,
        index: usize,
    ) -> Result<()> {
        let norm = |module, gain| Norm { at: meter.at(module), gain, eps: self.eps };
        let residual = meter.at(Module::Residual);
        let attention = &self.self_attn;
        let [q, k, v, o] =
            [&attention.q_proj, &attention.k_proj, &attention.v_proj, &attention.o_proj]
                .map(|linear| linear.product(meter));
        let first = norm(Module::InputLayernorm, &self.input_layernorm);
        let ahead = [&self.mlp.gate_proj.weight, &self.mlp.up_proj.weight];
        decoding.queries_keys_values(first, [q, k, v], ahead)?;
        let at = meter.at(Module::SelfAttn);
        decoding.attend(at, cache.layer(index)?, cache.rope(), &attention.scale)?;
        decoding.add_mixed(o, residual, &self.mlp.down_proj.weight)?;

        let [gate, up, down] = [&self.mlp.gate_proj, &self.mlp.up_proj, &self.mlp.down_proj]
            .map(|linear| linear.product(meter));
        let second = norm(Module::PostAttentionLayernorm, &self.post_attention_layernorm);
        decoding.gated(second, gate, up, meter.at(Module::Mlp))?;
        decoding.add_inner(down, residual)
    }
}

impl Linear {
    fn product<'a>(&'a self, meter: Meter<'a>) -> Product<'a> {
        let at = meter.at(Module::Proj(self.projection));
        let adapter = self.adapter.as_ref().map(|adapter| adapter.low_rank(meter));
        Product { at, weight: &self.weight, bias: self.bias.as_ref(), adapter }
    }
}
