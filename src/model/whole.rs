//! The model in the words of a step that is one launch.

use super::{Cache, Decoder, decoder::Layer};
use crate::{
    error::Result,
    ledger::Module,
    meter::Meter,
    ops::{Product, WholeLayer, WholeModel},
};

impl Decoder {
    /// It, on top of what `cache` has room for; none where a layer has other norms than the two.
    ///
    /// # Errors
    /// A cache for fewer layers.
    pub(super) fn whole<'a>(
        &'a self,
        meter: Meter<'a>,
        cache: &'a Cache,
    ) -> Result<Option<WholeModel<'a>>> {
        if self.layers.iter().any(|layer| layer.sandwich.is_some()) {
            return Ok(None);
        }
        let layers = self.layers.iter().enumerate();
        let layer = |(i, layer): (usize, &'a Layer)| layer.whole(meter.layer(i), i, cache);
        let at = meter.at(Module::LmHead);
        Ok(Some(WholeModel {
            embed: meter.at(Module::EmbedTokens),
            table: &self.embed_tokens,
            factor: self.embed_scale.as_ref(),
            layers: layers.map(layer).collect::<Result<_>>()?,
            norm: self.norm.at(meter),
            head: Product {
                at,
                weight: self.head_weight(),
                eight_bit: None,
                bias: None,
                adapter: None,
            },
        }))
    }
}

impl Layer {
    fn whole<'a>(
        &'a self,
        meter: Meter<'a>,
        index: usize,
        cache: &'a Cache,
    ) -> Result<WholeLayer<'a>> {
        let (attn, mlp) = (&self.self_attn, &self.mlp);
        Ok(WholeLayer {
            before_attention: self.input_layernorm.at(meter),
            projections: [&attn.q_proj, &attn.k_proj, &attn.v_proj].map(|p| p.product(meter)),
            attention: attn.at(meter, cache.positions.of(index)?),
            output: attn.o_proj.product(meter),
            residual: meter.at(Module::Residual),
            before_mlp: self.post_attention_layernorm.at(meter),
            sides: [&mlp.gate_proj, &mlp.up_proj].map(|p| p.product(meter)),
            mlp: meter.at(Module::Mlp),
            activation: mlp.activation,
            down: mlp.down_proj.product(meter),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use candle_core::Device;

    use super::*;
    use crate::{
        config::{LoraConfig, ModelConfig},
        ledger::{Dtype, Key, Ledger, Phase},
        meter::Observer,
        model::{AdapterSource, Context},
        ops::{Ids, Ops},
        weights::synthetic,
        workload::Logits,
    };

    #[test]
    fn a_step_in_one_launch_reports_what_the_pass_reports() {
        for preset in ["tiny", "tiny-llama", "tiny-mistral", "tiny-qwen3", "tiny-gemma3"] {
            let (config, lora) = (ModelConfig::preset(preset).unwrap(), LoraConfig::none());
            let weights = synthetic(config.clone(), 0).unwrap().weights;
            let adapters = AdapterSource::Fresh { lora, seed: 0 };
            let model =
                Decoder::load(&config, &weights, &adapters, Dtype::F32, &Device::Cpu, |_| Ok(()));
            let model = model.unwrap();
            let nobody = RefCell::new(());
            let mut cache = model.cache(Meter::new(&nobody, Phase::Setup), 1, 13).unwrap();
            cache.set_held(12).unwrap();

            let whole = RefCell::new(Ledger::default());
            let meter = Meter::new(&whole, Phase::Decode);
            let Some(described) = model.whole(meter, &cache).unwrap() else {
                assert_eq!(preset, "tiny-gemma3", "it has four norms a layer");
                continue;
            };
            let mut ops = Ops::new(described.embed);
            described.report(&mut ops, &cache.kv, 1, 13).unwrap();
            let mut reported = Ledger::default();
            for (at, op, dtype) in &ops.all {
                let key =
                    Key { phase: Phase::Decode, scope: at.scope(), op: op.now(), dtype: *dtype };
                reported.op(&key, None);
            }

            let passed = RefCell::new(Ledger::default());
            let meter = Meter::new(&passed, Phase::Decode);
            let ids = Ids::Host { ids: &[3], batch: 1 };
            model.forward(meter, ids, Context::Cached(&mut cache), Logits::Last).unwrap();
            assert_eq!(reported, passed.into_inner(), "{preset}");
        }
    }
}
