//! When and where an op ran.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

use crate::config::Projection;

/// What the run was doing when the op ran.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Phase {
    /// Tables made once for a run.
    Setup,
    /// A forward pass on its own, of training or of an evaluation.
    Forward,
    /// A layer's forward pass run again for its gradients, its activations not having been kept.
    Recompute,
    /// Cross-entropy of the logits, and its gradient.
    Loss,
    /// Gradients of a forward pass, in formulas that do not say towards what.
    Backward,
    /// Gradients towards activations.
    BackwardX,
    /// Gradients of adapters' A, summed over micro-steps.
    BackwardA,
    /// Gradients of adapters' B, likewise.
    BackwardB,
    /// Gradients of base weights, likewise.
    BackwardW,
    /// The gradients' norm, and their scaling down to it.
    Clipping,
    /// Updates of the trained parameters.
    Optimizer,
    /// The pass over the prompt in a generation.
    Prefill,
    /// The passes after it, one for each further token.
    Decode,
    /// Choosing the next token.
    Sampling,
}

impl Phase {
    /// All of them, in order.
    pub const ALL: [Self; 14] = [
        Self::Setup,
        Self::Forward,
        Self::Recompute,
        Self::Loss,
        Self::Backward,
        Self::BackwardX,
        Self::BackwardA,
        Self::BackwardB,
        Self::BackwardW,
        Self::Clipping,
        Self::Optimizer,
        Self::Prefill,
        Self::Decode,
        Self::Sampling,
    ];

    /// Lower-case name for tables and JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Setup => "setup",
            Self::Forward => "forward",
            Self::Recompute => "recompute",
            Self::Loss => "loss",
            Self::Backward => "backward",
            Self::BackwardX => "backward dX",
            Self::BackwardA => "backward dA",
            Self::BackwardB => "backward dB",
            Self::BackwardW => "backward dW",
            Self::Clipping => "clipping",
            Self::Optimizer => "optimizer",
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::Sampling => "sampling",
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl Serialize for Phase {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(self.name())
    }
}

impl<'de> Deserialize<'de> for Phase {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let name = String::deserialize(d)?;
        let found = Self::ALL.into_iter().find(|phase| phase.name() == name);
        found.ok_or_else(|| D::Error::custom(format!("no phase `{name}`")))
    }
}

/// A module of the model, as checkpoints name it; inside a layer or outside all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Module {
    /// Token embedding.
    EmbedTokens,
    /// Cosine and sine tables.
    RotaryEmb,
    /// Norm before attention.
    InputLayernorm,
    /// A base projection.
    Proj(Projection),
    /// The adapter beside a projection.
    Lora(Projection, Lora),
    /// Norm of each head's queries.
    QNorm,
    /// Norm of each head's keys.
    KNorm,
    /// Attention between the projections: RoPE, cache, scores, softmax, weighted values.
    SelfAttn,
    /// Residual additions, in the layer itself.
    Residual,
    /// Norm after attention; before the MLP where a layer has two norms.
    PostAttentionLayernorm,
    /// Norm before the MLP where a layer has four norms.
    PreFeedforwardLayernorm,
    /// Activation and gate, between the MLP's projections.
    Mlp,
    /// Norm after the MLP where a layer has four norms.
    PostFeedforwardLayernorm,
    /// Final norm.
    Norm,
    /// Output head.
    LmHead,
    /// Token choice.
    Sampler,
    /// Cross-entropy.
    Loss,
    /// What an optimizer step does over all parameters at once.
    Optimizer,
}

/// Which part of an adapter: y += scale · B(A x).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Lora {
    /// A x: in → rank.
    A,
    /// B(A x): rank → out.
    B,
    /// The factor alpha / rank.
    Scale,
    /// The addition to the base projection.
    Sum,
}

/// Where an op ran: `layers.3.self_attn.q_proj.lora_a`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Scope {
    /// The decoder layer, from 0; none outside the layers.
    pub layer: Option<u32>,
    /// The module.
    pub module: Module,
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(layer) = self.layer {
            write!(f, "layers.{layer}")?;
            if self.module != Module::Residual {
                f.write_str(".")?;
            }
        }
        match self.module {
            Module::EmbedTokens => f.write_str("embed_tokens"),
            Module::RotaryEmb => f.write_str("rotary_emb"),
            Module::InputLayernorm => f.write_str("input_layernorm"),
            Module::Proj(p) => write!(f, "{}.{p}", p.parent()),
            Module::Lora(p, part) => {
                let part = match part {
                    Lora::A => "lora_a",
                    Lora::B => "lora_b",
                    Lora::Scale => "lora_scale",
                    Lora::Sum => "lora_sum",
                };
                write!(f, "{}.{p}.{part}", p.parent())
            }
            Module::QNorm => f.write_str("self_attn.q_norm"),
            Module::KNorm => f.write_str("self_attn.k_norm"),
            Module::SelfAttn => f.write_str("self_attn"),
            Module::Residual => Ok(()),
            Module::PostAttentionLayernorm => f.write_str("post_attention_layernorm"),
            Module::PreFeedforwardLayernorm => f.write_str("pre_feedforward_layernorm"),
            Module::Mlp => f.write_str("mlp"),
            Module::PostFeedforwardLayernorm => f.write_str("post_feedforward_layernorm"),
            Module::Norm => f.write_str("norm"),
            Module::LmHead => f.write_str("lm_head"),
            Module::Sampler => f.write_str("sampler"),
            Module::Loss => f.write_str("loss"),
            Module::Optimizer => f.write_str("optimizer"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scopes_read_as_checkpoint_paths() {
        let at = |layer, module| Scope { layer, module }.to_string();
        let q = Projection::QProj;
        assert_eq!(at(Some(3), Module::Lora(q, Lora::A)), "layers.3.self_attn.q_proj.lora_a");
        assert_eq!(at(Some(0), Module::Proj(Projection::UpProj)), "layers.0.mlp.up_proj");
        assert_eq!(at(Some(7), Module::Residual), "layers.7");
        assert_eq!(at(Some(2), Module::QNorm), "layers.2.self_attn.q_norm");
        let after = Module::PostFeedforwardLayernorm;
        assert_eq!(at(Some(2), after), "layers.2.post_feedforward_layernorm");
        assert_eq!(at(None, Module::LmHead), "lm_head");
    }
}
