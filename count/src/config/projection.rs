//! The linear projections of a layer.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::ModelConfig;

/// The seven linear projections of a decoder layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Projection {
    /// Queries, D → H·d.
    QProj,
    /// Keys, D → K·d.
    KProj,
    /// Values, D → K·d.
    VProj,
    /// Attention output, H·d → D.
    OProj,
    /// MLP gate, D → F.
    GateProj,
    /// MLP up, D → F.
    UpProj,
    /// MLP down, F → D.
    DownProj,
}

impl Projection {
    /// All seven, in execution order.
    pub const ALL: [Self; 7] = [
        Self::QProj,
        Self::KProj,
        Self::VProj,
        Self::OProj,
        Self::GateProj,
        Self::UpProj,
        Self::DownProj,
    ];

    /// The checkpoint's name, as PEFT's `target_modules` spells it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::QProj => "q_proj",
            Self::KProj => "k_proj",
            Self::VProj => "v_proj",
            Self::OProj => "o_proj",
            Self::GateProj => "gate_proj",
            Self::UpProj => "up_proj",
            Self::DownProj => "down_proj",
        }
    }

    /// The module that holds it.
    pub const fn parent(self) -> &'static str {
        match self {
            Self::QProj | Self::KProj | Self::VProj | Self::OProj => "self_attn",
            Self::GateProj | Self::UpProj | Self::DownProj => "mlp",
        }
    }

    /// (input width, output width) under `config`.
    pub fn widths(self, config: &ModelConfig) -> (usize, usize) {
        let (d, f) = (config.hidden_size, config.intermediate_size);
        match self {
            Self::QProj => (d, config.q_width()),
            Self::KProj | Self::VProj => (d, config.kv_width()),
            Self::OProj => (config.q_width(), d),
            Self::GateProj | Self::UpProj => (d, f),
            Self::DownProj => (f, d),
        }
    }
}

impl fmt::Display for Projection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
