//! How PEFT calls an adapter's tensors.

use crate::{config::Projection, ledger::Lora};

/// One factor of one adapter: its layer, its projection, A or B.
pub(super) type Factor = (usize, Projection, Lora);

/// PEFT's name of one factor of an adapter; none but A and B are tensors.
pub fn adapter_name(layer: usize, p: Projection, part: Lora) -> String {
    format!("base_model.model.model.layers.{layer}.{}.{p}.lora_{}.weight", p.parent(), letter(part))
}

fn letter(part: Lora) -> char {
    if part == Lora::A { 'A' } else { 'B' }
}

/// Which factor a tensor called `name` is: with PEFT's prefix or without, with the model's or
/// without, and with the name `default` that an adapter has in memory or without.
pub(super) fn factor(name: &str) -> Option<Factor> {
    let name = name.strip_prefix("base_model.model.").unwrap_or(name);
    let name = name.strip_prefix("model.").unwrap_or(name);
    let (layer, rest) = name.strip_prefix("layers.")?.split_once('.')?;
    let projection = Projection::ALL.into_iter().find(|p| {
        let own = rest.strip_prefix(p.parent()).and_then(|rest| rest.strip_prefix('.'));
        own.and_then(|rest| rest.strip_prefix(p.name())).is_some_and(|rest| rest.starts_with('.'))
    })?;
    let rest = rest.get(projection.parent().len() + projection.name().len() + 2..)?;
    let part = [Lora::A, Lora::B].into_iter().find(|part| {
        let own = rest.strip_prefix("lora_").and_then(|rest| rest.strip_prefix(letter(*part)));
        matches!(own, Some(".weight" | ".default.weight"))
    })?;
    // No number but the one that it stands for: `layers.01` is another name.
    let number = layer.parse().ok().filter(|n: &usize| n.to_string() == layer)?;
    Some((number, projection, part))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_are_read_with_any_prefix() {
        let q = (3, Projection::QProj, Lora::A);
        assert_eq!(factor(&adapter_name(3, Projection::QProj, Lora::A)), Some(q));
        for name in [
            "base_model.model.model.layers.3.self_attn.q_proj.lora_A.default.weight",
            "model.layers.3.self_attn.q_proj.lora_A.weight",
            "layers.3.self_attn.q_proj.lora_A.default.weight",
        ] {
            assert_eq!(factor(name), Some(q), "{name}");
        }
        for name in [
            "base_model.model.model.layers.3.self_attn.q_proj.lora_A.other.weight",
            "base_model.model.model.layers.3.self_attn.q_proj.lora_B.bias",
            "base_model.model.model.layers.3.self_attn.q_proj.lora_magnitude_vector.weight",
            "base_model.model.model.layers.3.mlp.q_proj.lora_A.weight",
            "base_model.model.model.layers.03.self_attn.q_proj.lora_A.weight",
            "base_model.model.model.layers.3.self_attn.q_proj.base_layer.weight",
            "base_model.model.lm_head.lora_A.weight",
            "",
        ] {
            assert_eq!(factor(name), None, "{name}");
        }
    }
}
