//! Errors that the user's input causes, one clear line each: what is wrong, where, and what to do.
//!
//! Everything else (IO, the backend) travels as [`anyhow::Error`] with context.

use std::path::PathBuf;

/// The crate's result: an [`Error`] where the input is at fault, anything else with context.
pub type Result<T, E = anyhow::Error> = std::result::Result<T, E>;

/// What the user gave and cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A value in a model config that no model can have.
    #[error("{origin}: `{key}` {why}")]
    Config {
        /// File or preset that holds the value.
        origin: String,
        /// The key at fault.
        key: String,
        /// What is wrong with it, as the rest of a sentence.
        why: String,
    },
    /// A checkpoint that cannot be loaded.
    #[error("{}: {why}", file.display())]
    Weights {
        /// The file at fault.
        file: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A tensor that is missing, misshapen or not finite.
    #[error("{origin}: tensor `{tensor}` {why}")]
    Tensor {
        /// File or directory that should hold it.
        origin: String,
        /// The tensor's checkpoint name.
        tensor: String,
        /// What is wrong with it, as the rest of a sentence.
        why: String,
    },
    /// A flag, or a combination of flags, that means nothing.
    #[error("{flag}: {why}")]
    Flag {
        /// The flag at fault.
        flag: String,
        /// What is wrong with it.
        why: String,
    },
    /// A command line that does not parse.
    #[error("{0}; see --help")]
    Usage(String),
    /// A file of the user's (prices, prompts) that cannot be read as what it should be.
    #[error("{}: {why}", file.display())]
    File {
        /// The file at fault.
        file: PathBuf,
        /// What is wrong with it, with the line where there is one.
        why: String,
    },
    /// A prompt that the model cannot take.
    #[error("prompt: {0}")]
    Prompt(String),
    /// A count that does not fit 128 bits.
    #[error("the count of {0} does not fit 128 bits; use smaller lengths")]
    Overflow(String),
    /// More memory than there is.
    #[error("out of memory: {0}; use smaller lengths, a smaller model or --dtype bf16")]
    Memory(String),
    /// A measured rate that its ceiling rules out, or a ceiling that does not serve.
    #[error("ceiling: {0}")]
    Ceiling(String),
    /// A training whose numbers are no numbers any more.
    #[error("training diverged: {0}")]
    Diverged(String),
    /// Ctrl-C.
    #[error("interrupted")]
    Interrupted,
    /// An audit whose sides differ. Exits with 1.
    #[error("the audit does not balance: {0}")]
    Unbalanced(String),
    /// A machine that lacks what a run without flags needs. Exits with 1.
    #[error("missing: {0}")]
    Missing(String),
    /// A plan that costs more than there is to spend. Exits with 1.
    #[error("over budget: `{item}` needs {needed}, {left} are left for it")]
    OverBudget {
        /// The first experiment, or finished run, that the budget does not cover.
        item: String,
        /// What it needs, with its unit.
        needed: String,
        /// What was left for it, in the same unit.
        left: String,
    },
}

impl Error {
    /// A [`Error::Flag`].
    pub fn flag(flag: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Flag { flag: flag.into(), why: why.into() }
    }

    /// A [`Error::Tensor`].
    pub fn tensor(
        origin: impl Into<String>,
        tensor: impl Into<String>,
        why: impl Into<String>,
    ) -> Self {
        Self::Tensor { origin: origin.into(), tensor: tensor.into(), why: why.into() }
    }

    /// The process's exit status: 1 for an audit that does not balance, a budget that does not
    /// suffice or a machine that lacks something, 130 for an interrupt, 2 for usage and input.
    pub fn exit_code(error: &anyhow::Error) -> u8 {
        match error.downcast_ref() {
            Some(Self::Unbalanced(_) | Self::OverBudget { .. } | Self::Missing(_)) => 1,
            Some(Self::Interrupted) => 130,
            _ => 2,
        }
    }
}
