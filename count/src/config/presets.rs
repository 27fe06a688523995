//! Published sizes by name.

use super::{Biases, Family, ModelConfig, Rope, RopeScaling};
use crate::error::{Error, Result};

/// One preset: name, D, F, L, H, K, V, tied head. Source: each checkpoint's published
/// `config.json` (Qwen/Qwen2.5-*-Instruct); `tiny` is for tests and first steps.
type Preset = (&'static str, usize, usize, usize, usize, usize, usize, bool);

const PRESETS: &[Preset] = &[
    ("tiny", 32, 48, 3, 4, 2, 320, true),
    ("qwen2.5-0.5b", 896, 4864, 24, 14, 2, 151_936, true),
    ("qwen2.5-1.5b", 1536, 8960, 28, 12, 2, 151_936, true),
    ("qwen2.5-3b", 2048, 11_008, 36, 16, 2, 151_936, true),
    ("qwen2.5-7b", 3584, 18_944, 28, 28, 4, 152_064, false),
    ("qwen2.5-14b", 5120, 13_824, 48, 40, 8, 152_064, false),
    ("qwen2.5-32b", 5120, 27_648, 64, 40, 8, 152_064, false),
    ("qwen2.5-72b", 8192, 29_568, 80, 64, 8, 152_064, false),
];

impl ModelConfig {
    /// The names that [`ModelConfig::preset`] knows.
    pub fn preset_names() -> impl Iterator<Item = &'static str> {
        PRESETS.iter().map(|p| p.0)
    }

    /// A published size by name, `qwen2.5-0.5b` … `qwen2.5-72b`, or `tiny`.
    ///
    /// # Errors
    /// An unknown name.
    pub fn preset(name: &str) -> Result<Self> {
        let wanted = name.to_ascii_lowercase();
        let &(_, d, f, l, h, k, v, tied) =
            PRESETS.iter().find(|p| p.0 == wanted).ok_or_else(|| {
                let known: Vec<_> = Self::preset_names().collect();
                Error::flag("--preset", format!("no preset `{name}`; known: {}", known.join(", ")))
            })?;
        Ok(Self {
            family: Family::Qwen2,
            vocab_size: v,
            hidden_size: d,
            intermediate_size: f,
            num_hidden_layers: l,
            num_attention_heads: h,
            num_key_value_heads: k,
            head_dim: None,
            max_position_embeddings: 32_768,
            rms_norm_eps: 1e-6,
            tie_word_embeddings: tied,
            rope: Rope { theta: 1e6, scaling: RopeScaling::Default },
            local_rope: None,
            window: None,
            bias: Biases { qkv: true, o: false, mlp: false },
            qk_norm: false,
            sandwich_norms: false,
            unit_offset_norms: false,
            activation: super::Activation::Silu,
            scaled_embedding: false,
            query_pre_attn_scalar: None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameter_counts_equal_the_published_checkpoints() {
        // The totals that the hub reports for each Qwen/Qwen2.5-* checkpoint.
        let published: [(&str, u128); 7] = [
            ("qwen2.5-0.5b", 494_032_768),
            ("qwen2.5-1.5b", 1_543_714_304),
            ("qwen2.5-3b", 3_085_938_688),
            ("qwen2.5-7b", 7_615_616_512),
            ("qwen2.5-14b", 14_770_033_664),
            ("qwen2.5-32b", 32_763_876_352),
            ("qwen2.5-72b", 72_706_203_648),
        ];
        for (name, parameters) in published {
            let config = ModelConfig::preset(name).unwrap();
            config.validate(name).unwrap();
            assert_eq!(config.parameters(), parameters, "{name}");
        }
    }
}
