//! What a checkpoint holds and a run does not take, with the reason.

use serde::{Deserialize, Serialize};

/// A key, a tensor or a file of a checkpoint that was found and is not used.
///
/// Whatever would change what the model computes is honoured or refused; the rest is listed as
/// this, so that nothing is left out in silence.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ignored {
    /// The file that holds it.
    pub file: String,
    /// The key, or the tensor's name.
    pub key: String,
    /// Why it is not used, as the rest of a sentence.
    pub reason: String,
    /// Whether some runs should hear more of it than this list.
    #[serde(skip)]
    pub matters: Matters,
}

/// Where something that is ignored would be missed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Matters {
    /// Nowhere.
    #[default]
    Never,
    /// A training would compute something else with it: refused there.
    InTraining,
    /// The file says two things of which one was taken: said aloud.
    Always,
}

impl Ignored {
    /// An entry that matters nowhere.
    pub fn new(file: impl Into<String>, key: impl Into<String>, reason: impl Into<String>) -> Self {
        let (file, key, reason) = (file.into(), key.into(), reason.into());
        Self { file, key, reason, matters: Matters::Never }
    }

    /// The same, said aloud or refused where it `matters`.
    #[must_use]
    pub fn where_it(self, matters: Matters) -> Self {
        Self { matters, ..self }
    }
}
