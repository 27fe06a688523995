//! What a GGUF calls the tensors of a Hugging Face checkpoint.

/// Tensors outside the layers, without what follows the last dot.
const OUTSIDE: [(&str, &str); 3] =
    [("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output")];

/// A layer's modules.
const MODULES: [(&str, &str); 10] = [
    ("input_layernorm", "attn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];

/// The norms between attention and the MLP, of layers with two norms.
const TWO_NORMS: &[(&str, &str)] = &[("post_attention_layernorm", "ffn_norm")];

/// Those of layers with four: the same name is another norm there.
const FOUR_NORMS: &[(&str, &str)] = &[
    ("post_attention_layernorm", "post_attention_norm"),
    ("pre_feedforward_layernorm", "ffn_norm"),
    ("post_feedforward_layernorm", "post_ffw_norm"),
];

/// The GGUF's name of a tensor that the Hugging Face layout calls `name`; none for one that no
/// model here has. With `sandwich_norms` a layer has four norms.
pub(super) fn gguf_name(name: &str, sandwich_norms: bool) -> Option<String> {
    let find = |table: &[(&str, &'static str)], name: &str| {
        table.iter().find(|(ours, _)| *ours == name).map(|(_, theirs)| *theirs)
    };
    let (module, kind) = name.rsplit_once('.')?;
    if let Some(theirs) = find(&OUTSIDE, module) {
        return Some(format!("{theirs}.{kind}"));
    }
    let (layer, module) = module.strip_prefix("model.layers.")?.split_once('.')?;
    let norms = if sandwich_norms { FOUR_NORMS } else { TWO_NORMS };
    let theirs = find(&MODULES, module).or_else(|| find(norms, module))?;
    Some(format!("blk.{layer}.{theirs}.{kind}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_map_to_those_of_llama_cpp() {
        for (ours, two, four) in [
            ("model.embed_tokens.weight", "token_embd.weight", ""),
            ("model.norm.weight", "output_norm.weight", ""),
            ("lm_head.weight", "output.weight", ""),
            ("model.layers.11.self_attn.q_proj.bias", "blk.11.attn_q.bias", ""),
            ("model.layers.0.self_attn.q_norm.weight", "blk.0.attn_q_norm.weight", ""),
            ("model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight", ""),
            ("model.layers.0.input_layernorm.weight", "blk.0.attn_norm.weight", ""),
            (
                "model.layers.0.post_attention_layernorm.weight",
                "blk.0.ffn_norm.weight",
                "blk.0.post_attention_norm.weight",
            ),
        ] {
            assert_eq!(gguf_name(ours, false).as_deref(), Some(two));
            let four = if four.is_empty() { two } else { four };
            assert_eq!(gguf_name(ours, true).as_deref(), Some(four));
        }
        let name = "model.layers.3.pre_feedforward_layernorm.weight";
        assert_eq!(gguf_name(name, true).as_deref(), Some("blk.3.ffn_norm.weight"));
        let name = "model.layers.3.post_feedforward_layernorm.weight";
        assert_eq!(gguf_name(name, true).as_deref(), Some("blk.3.post_ffw_norm.weight"));
        for none in [name, "model.layers", "model.layers.0.self_attn.rotary_emb.inv_freq", ""] {
            assert_eq!(gguf_name(none, false), None);
        }
    }
}
