//! Under which names a checkpoint saves the tensors of one model: whoever wrapped it when it was
//! saved has left a prefix.

/// What stands before the parts of the body.
const BODIES: [&str; 8] = [
    "model.",
    "",
    "model.model.",
    "base_model.model.model.",
    "language_model.model.",
    "model.language_model.",
    "module.model.",
    "_orig_mod.model.",
];
const PARTS: [&str; 3] = ["embed_tokens.", "layers.", "norm."];

/// What stands before the head's own.
const HEADS: [&str; 6] = [
    "lm_head.",
    "model.lm_head.",
    "base_model.model.lm_head.",
    "language_model.lm_head.",
    "module.lm_head.",
    "_orig_mod.lm_head.",
];

/// The name of the Hugging Face layout for a tensor that a file calls `name`; its own where it is
/// none of a model's.
pub(super) fn canonical(name: &str) -> String {
    let part = |rest: &&str| PARTS.iter().any(|part| rest.starts_with(part));
    let body = BODIES.iter().find_map(|prefix| name.strip_prefix(prefix).filter(part));
    let head = HEADS.iter().find_map(|prefix| name.strip_prefix(prefix));
    match (body, head) {
        (Some(rest), _) => format!("model.{rest}"),
        (None, Some(rest)) => format!("lm_head.{rest}"),
        (None, None) => name.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::canonical;

    #[test]
    fn prefixes_are_taken_for_what_they_are() {
        let norm = "model.layers.0.self_attn.q_norm.weight";
        for name in [
            norm,
            "layers.0.self_attn.q_norm.weight",
            "model.model.layers.0.self_attn.q_norm.weight",
            "base_model.model.model.layers.0.self_attn.q_norm.weight",
            "language_model.model.layers.0.self_attn.q_norm.weight",
            "model.language_model.layers.0.self_attn.q_norm.weight",
            "_orig_mod.model.layers.0.self_attn.q_norm.weight",
        ] {
            assert_eq!(canonical(name), norm);
        }
        assert_eq!(canonical("language_model.lm_head.weight"), "lm_head.weight");
        assert_eq!(canonical("norm.weight"), "model.norm.weight");
        for other in ["score.weight", "vision_tower.layers.0.weight", "model.score.weight", ""] {
            assert_eq!(canonical(other), other);
        }
    }
}
