//! Published sizes by name.

use serde_json::{Value, json};

use super::ModelConfig;
use crate::error::{Error, Result};

/// One preset: what its family's `config.json` files have in common, and what is its own.
struct Preset {
    name: &'static str,
    /// Keys of a `config.json`.
    common: &'static str,
    /// D, F, L, H, K and V.
    sizes: [usize; 6],
    /// d, where the file says it.
    head_dim: Option<usize>,
    tied: bool,
}

const fn preset(
    name: &'static str,
    common: &'static str,
    sizes: [usize; 6],
    head_dim: Option<usize>,
    tied: bool,
) -> Preset {
    Preset { name, common, sizes, head_dim, tied }
}

const QWEN2_5: &str = r#"{"model_type": "qwen2", "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6}"#;
const QWEN3: &str = r#"{"model_type": "qwen3", "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6}"#;
const LLAMA_3_1: &str = r#"{"model_type": "llama", "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5, "rope_theta": 500000, "rope_scaling": {"rope_type": "llama3",
    "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4,
    "original_max_position_embeddings": 8192}}"#;
const LLAMA_3_2: &str = r#"{"model_type": "llama", "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5, "rope_theta": 500000, "rope_scaling": {"rope_type": "llama3",
    "factor": 32, "low_freq_factor": 1, "high_freq_factor": 4,
    "original_max_position_embeddings": 8192}}"#;
const SMOLLM2: &str = r#"{"model_type": "llama", "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5, "rope_theta": 100000}"#;
const SMOLLM2_LARGE: &str = r#"{"model_type": "llama", "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5, "rope_theta": 130000}"#;
const MISTRAL_V0_3: &str = r#"{"model_type": "mistral", "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": null}"#;
const GEMMA3_1B: &str = r#"{"model_type": "gemma3_text", "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "rope_local_base_freq": 10000,
    "query_pre_attn_scalar": 256, "sliding_window": 512, "sliding_window_pattern": 6}"#;
const GEMMA3_4B: &str = r#"{"model_type": "gemma3_text", "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "rope_local_base_freq": 10000,
    "rope_scaling": {"rope_type": "linear", "factor": 8},
    "query_pre_attn_scalar": 256, "sliding_window": 1024, "sliding_window_pattern": 6}"#;
/// Of the tiny ones, frequencies below, between and above the two of Llama 3's scaling.
const TINY_LLAMA: &str = r#"{"model_type": "llama", "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5, "rope_theta": 1000, "rope_scaling": {"rope_type": "llama3", "factor": 4,
    "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 512}}"#;
const TINY_MISTRAL: &str = r#"{"model_type": "mistral", "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5, "rope_theta": 1e4, "sliding_window": 8}"#;
const TINY_GEMMA3: &str = r#"{"model_type": "gemma3_text", "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
    "rope_scaling": {"rope_type": "linear", "factor": 8},
    "query_pre_attn_scalar": 12, "sliding_window": 8, "sliding_window_pattern": 6}"#;

/// Source: each checkpoint's published `config.json` (Qwen/Qwen2.5-*-Instruct, Qwen/Qwen3-*,
/// meta-llama/Llama-3.*, HuggingFaceTB/SmolLM2-*, mistralai/Mistral-7B-v0.3, google/gemma-3-1b-it;
/// of google/gemma-3-4b-it the text side). The tiny ones are for tests and first steps.
const PRESETS: [Preset; 28] = [
    preset("tiny", QWEN2_5, [32, 48, 3, 4, 2, 320], None, true),
    preset("tiny-llama", TINY_LLAMA, [40, 56, 3, 5, 1, 320], None, true),
    preset("tiny-mistral", TINY_MISTRAL, [48, 72, 3, 6, 3, 320], None, false),
    preset("tiny-qwen3", QWEN3, [24, 40, 3, 6, 3, 320], Some(8), true),
    preset("tiny-gemma3", TINY_GEMMA3, [24, 56, 7, 4, 1, 320], Some(8), true),
    preset("qwen2.5-0.5b", QWEN2_5, [896, 4864, 24, 14, 2, 151_936], None, true),
    preset("qwen2.5-1.5b", QWEN2_5, [1536, 8960, 28, 12, 2, 151_936], None, true),
    preset("qwen2.5-3b", QWEN2_5, [2048, 11_008, 36, 16, 2, 151_936], None, true),
    preset("qwen2.5-7b", QWEN2_5, [3584, 18_944, 28, 28, 4, 152_064], None, false),
    preset("qwen2.5-14b", QWEN2_5, [5120, 13_824, 48, 40, 8, 152_064], None, false),
    preset("qwen2.5-32b", QWEN2_5, [5120, 27_648, 64, 40, 8, 152_064], None, false),
    preset("qwen2.5-72b", QWEN2_5, [8192, 29_568, 80, 64, 8, 152_064], None, false),
    preset("qwen3-0.6b", QWEN3, [1024, 3072, 28, 16, 8, 151_936], Some(128), true),
    preset("qwen3-1.7b", QWEN3, [2048, 6144, 28, 16, 8, 151_936], Some(128), true),
    preset("qwen3-4b", QWEN3, [2560, 9728, 36, 32, 8, 151_936], Some(128), true),
    preset("qwen3-8b", QWEN3, [4096, 12_288, 36, 32, 8, 151_936], Some(128), false),
    preset("qwen3-14b", QWEN3, [5120, 17_408, 40, 40, 8, 151_936], Some(128), false),
    preset("qwen3-32b", QWEN3, [5120, 25_600, 64, 64, 8, 151_936], Some(128), false),
    preset("llama-3.2-1b", LLAMA_3_2, [2048, 8192, 16, 32, 8, 128_256], Some(64), true),
    preset("llama-3.2-3b", LLAMA_3_2, [3072, 8192, 28, 24, 8, 128_256], Some(128), true),
    preset("llama-3.1-8b", LLAMA_3_1, [4096, 14_336, 32, 32, 8, 128_256], None, false),
    preset("llama-3.1-70b", LLAMA_3_1, [8192, 28_672, 80, 64, 8, 128_256], None, false),
    preset("smollm2-135m", SMOLLM2, [576, 1536, 30, 9, 3, 49_152], None, true),
    preset("smollm2-360m", SMOLLM2, [960, 2560, 32, 15, 5, 49_152], None, true),
    preset("smollm2-1.7b", SMOLLM2_LARGE, [2048, 8192, 24, 32, 32, 49_152], None, true),
    preset("mistral-7b", MISTRAL_V0_3, [4096, 14_336, 32, 32, 8, 32_768], None, false),
    preset("gemma-3-1b", GEMMA3_1B, [1152, 6912, 26, 4, 1, 262_144], Some(256), true),
    preset("gemma-3-4b", GEMMA3_4B, [2560, 10_240, 34, 8, 4, 262_208], Some(256), true),
];

impl Preset {
    /// Its `config.json`.
    fn json(&self) -> Result<Value> {
        let mut json: Value = serde_json::from_str(self.common)?;
        let [d, f, l, h, k, v] = self.sizes;
        json["hidden_size"] = d.into();
        json["intermediate_size"] = f.into();
        json["num_hidden_layers"] = l.into();
        json["num_attention_heads"] = h.into();
        json["num_key_value_heads"] = k.into();
        json["vocab_size"] = v.into();
        json["head_dim"] = json!(self.head_dim);
        json["tie_word_embeddings"] = self.tied.into();
        Ok(json)
    }
}

impl ModelConfig {
    /// Whether the published model of this family and these sizes ties embedding and head; none
    /// where no preset has them.
    pub fn published_ties(&self) -> Option<bool> {
        let sizes = [
            self.hidden_size,
            self.intermediate_size,
            self.num_hidden_layers,
            self.num_attention_heads,
            self.num_key_value_heads,
            self.vocab_size,
        ];
        let alike = PRESETS.iter().filter(|preset| preset.sizes == sizes);
        let family = format!("\"model_type\": \"{}\"", self.family.name());
        alike.filter(|preset| preset.common.contains(&family)).map(|preset| preset.tied).next()
    }

    /// The names that [`ModelConfig::preset`] knows.
    pub fn preset_names() -> impl Iterator<Item = &'static str> {
        PRESETS.iter().map(|preset| preset.name)
    }

    /// A published size by name, as `qwen2.5-0.5b`, `llama-3.2-1b` or `gemma-3-4b`, or one of the
    /// tiny ones.
    ///
    /// # Errors
    /// An unknown name.
    pub fn preset(name: &str) -> Result<Self> {
        let wanted = name.to_ascii_lowercase();
        let preset = PRESETS.iter().find(|preset| preset.name == wanted).ok_or_else(|| {
            let known: Vec<_> = Self::preset_names().collect();
            Error::flag("--preset", format!("no preset `{name}`; known: {}", known.join(", ")))
        })?;
        Self::from_json(&preset.json()?.to_string(), preset.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameter_counts_equal_the_published_checkpoints() {
        // The totals of the tensors in each checkpoint on the hub, a tied head counted once.
        let published: [(&str, u128); 23] = [
            ("qwen2.5-0.5b", 494_032_768),
            ("qwen2.5-1.5b", 1_543_714_304),
            ("qwen2.5-3b", 3_085_938_688),
            ("qwen2.5-7b", 7_615_616_512),
            ("qwen2.5-14b", 14_770_033_664),
            ("qwen2.5-32b", 32_763_876_352),
            ("qwen2.5-72b", 72_706_203_648),
            ("qwen3-0.6b", 596_049_920),
            ("qwen3-1.7b", 1_720_574_976),
            ("qwen3-4b", 4_022_468_096),
            ("qwen3-8b", 8_190_735_360),
            ("qwen3-14b", 14_768_307_200),
            ("qwen3-32b", 32_762_123_264),
            ("llama-3.2-1b", 1_235_814_400),
            ("llama-3.2-3b", 3_212_749_824),
            ("llama-3.1-8b", 8_030_261_248),
            ("llama-3.1-70b", 70_553_706_496),
            ("smollm2-135m", 134_515_008),
            ("smollm2-360m", 361_821_120),
            ("smollm2-1.7b", 1_711_376_384),
            ("mistral-7b", 7_248_023_552),
            ("gemma-3-1b", 999_885_952),
            // 4 300 079 472 less the vision tower's 416 866 032 and the projector's 2 950 272.
            ("gemma-3-4b", 3_880_263_168),
        ];
        let mut left: Vec<_> = ModelConfig::preset_names().collect();
        for (name, parameters) in published {
            assert_eq!(ModelConfig::preset(name).unwrap().parameters(), parameters, "{name}");
            left.retain(|n| *n != name);
        }
        assert!(left.iter().all(|name| name.starts_with("tiny")), "{left:?}");
    }

    #[test]
    fn tiny_ones_differ_as_their_families_do() {
        let tiny = |name| ModelConfig::preset(name).unwrap();
        let windows = |name| tiny(name).window.map(|w| w.layers).unwrap_or_default();
        assert_eq!(windows("tiny-mistral"), [true; 3]);
        assert_eq!(windows("tiny-gemma3"), [true, true, true, true, true, false, true]);
        assert_eq!(tiny("tiny-gemma3").ropes().len(), 2);
        for name in ["tiny-qwen3", "tiny-gemma3"] {
            assert_ne!(tiny(name).q_width(), tiny(name).hidden_size);
        }
        for name in ModelConfig::preset_names().filter(|name| name.starts_with("tiny")) {
            assert_eq!(tiny(name).head_dim(), 8);
        }
    }
}
