//! candle-transformers' qwen2 on a checkpoint of ours.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use candle_transformers::models::qwen2::{Config, ModelForCausalLM};
use flopaudit::weights::{self, Checkpoint};

/// The same tensors under the same names.
pub fn load(checkpoint: &Checkpoint, dtype: DType) -> anyhow::Result<ModelForCausalLM> {
    let Checkpoint { config: c, weights, .. } = checkpoint;
    let tensors = weights::tensor_shapes(c).into_iter().map(|(name, shape)| {
        let tensor = weights.tensor(&name, &shape, dtype, &Device::Cpu)?;
        Ok((name, tensor))
    });
    let tensors: HashMap<String, Tensor> = tensors.collect::<anyhow::Result<_>>()?;
    let config = Config {
        vocab_size: c.vocab_size,
        hidden_size: c.hidden_size,
        intermediate_size: c.intermediate_size,
        num_hidden_layers: c.num_hidden_layers,
        num_attention_heads: c.num_attention_heads,
        num_key_value_heads: c.num_key_value_heads,
        max_position_embeddings: c.max_position_embeddings,
        sliding_window: c.max_position_embeddings,
        max_window_layers: c.num_hidden_layers,
        tie_word_embeddings: c.tie_word_embeddings,
        rope_theta: c.rope.theta,
        rms_norm_eps: c.rms_norm_eps,
        use_sliding_window: false,
        hidden_act: candle_nn::Activation::Silu,
    };
    let builder = candle_nn::VarBuilder::from_tensors(tensors, dtype, &Device::Cpu);
    Ok(ModelForCausalLM::new(&config, builder)?)
}
