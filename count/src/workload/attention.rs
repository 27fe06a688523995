//! How attention treats scores that its mask hides.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Queries and keys of a block, the last ones of a sequence aside: what blocked attention computes
/// or skips as a whole.
pub const ATTENTION_BLOCK: usize = 64;

/// Which scores attention computes, and which of them training keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
#[serde(rename_all = "lowercase")]
pub enum AttentionMode {
    /// Every score, which the mask then hides; training keeps the weights that come of them.
    #[default]
    Dense,
    /// No score of blocks that the mask hides wholly; training computes scores again when it needs
    /// them.
    Blocked,
}

impl AttentionMode {
    /// Both of them.
    pub const ALL: [Self; 2] = [Self::Dense, Self::Blocked];

    /// As flags, plans and JSON spell it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Dense => "dense",
            Self::Blocked => "blocked",
        }
    }

    /// The one of this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|mode| mode.name() == name)
    }

    /// Whether it is the mode where nobody says one, which JSON leaves out.
    pub fn is_dense(&self) -> bool {
        *self == Self::Dense
    }
}

impl fmt::Display for AttentionMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}
