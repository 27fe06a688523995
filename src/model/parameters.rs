//! A decoder's parameters, adapters included: where each is, and what it is called in a checkpoint.

use super::{
    Adapter, Decoder,
    decoder::{Attention, Gain, Layer, Linear},
};
use crate::{
    error::Result,
    ledger::{Module, Scope},
    ops::Tensor,
    weights::{adapter_name, fingerprint},
};

impl Decoder {
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
}

impl Gain {
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
        let Self { projection, weight, narrow, bias, adapter } = self;
        let wide = narrow.as_mut().and_then(|narrow| narrow.wide.as_mut());
        let weight = wide.unwrap_or(weight);
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
}
