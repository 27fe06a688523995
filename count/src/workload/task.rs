//! What is run on a model, with its dimensions.

use serde::{Deserialize, Serialize};

use super::{Kind, Lengths};
use crate::{
    error::{Error, Result},
    ledger::MomentDtype,
};

/// Which positions get logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
#[serde(rename_all = "lowercase")]
pub enum Logits {
    /// Every position: final norm and head over batch · seq rows.
    All,
    /// The last position of each sequence.
    Last,
    /// No position, as in all but the last part of a prompt that is fed in parts: neither final
    /// norm nor head.
    None,
}

/// How the next token is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// 0 is greedy; above 0, logits are divided by it before the softmax.
    pub temperature: f64,
    /// Draw among the k likeliest.
    pub top_k: Option<usize>,
    /// Draw among the likeliest that together hold this probability.
    pub top_p: Option<f64>,
    /// Factor against tokens already seen; 1 is off.
    pub repeat_penalty: f64,
}

impl Sampling {
    /// Always the likeliest token.
    pub const GREEDY: Self =
        Self { temperature: 0.0, top_k: None, top_p: None, repeat_penalty: 1.0 };

    /// Refuses what means nothing.
    ///
    /// # Errors
    /// The flag at fault.
    pub fn validate(&self) -> Result<()> {
        let fail = |flag: &str, why: String| Err(Error::flag(flag, why).into());
        // Draws are computed in f32, with the reciprocals of both.
        let usable = |x: f64| x > 0.0 && (x as f32).is_normal() && (1.0 / x as f32).is_normal();
        if self.temperature != 0.0 && !usable(self.temperature) {
            let why = format!("{} is neither 0 nor a usable positive number", self.temperature);
            return fail("--temperature", why);
        }
        if self.top_k == Some(0) {
            return fail("--top-k", "must be at least 1".into());
        }
        if let Some(p) = self.top_p.filter(|p| !(*p > 0.0 && *p <= 1.0)) {
            return fail("--top-p", format!("{p} is not in (0, 1]"));
        }
        if !usable(self.repeat_penalty) {
            let why = format!("{} is not a usable positive number", self.repeat_penalty);
            return fail("--repeat-penalty", why);
        }
        if self.temperature == 0.0 && (self.top_k.is_some() || self.top_p.is_some()) {
            return fail("--top-k, --top-p", "need a --temperature above 0".into());
        }
        Ok(())
    }
}

/// One more turn of a conversation: what is fed, the token that the turn before chose last aside,
/// and what is chosen then.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Turn {
    /// Tokens that are new in the prompt.
    pub prompt_tokens: u64,
    /// Tokens chosen for each sequence.
    pub new_tokens: u64,
}

/// How sequences fill the passes of a training or an evaluation.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Rows {
    /// Every pass feeds batch · seq tokens, all of which are real.
    #[default]
    Whole,
    /// Each pass is as wide as its longest row.
    Padded {
        /// How many passes are so wide.
        widths: Lengths,
        /// Tokens that rows feed without their padding.
        lengths: Lengths,
    },
    /// Sequences one behind the other, without padding, each attending to itself alone.
    Packed {
        /// How many passes feed so many tokens.
        passes: Lengths,
        /// The sequences of all passes.
        documents: Lengths,
    },
}

impl Rows {
    /// (sequences, tokens of each) of the largest pass, of at most `batch` rows of `seq` tokens: packed
    /// sequences are as if each were as long as the longest.
    pub fn largest(&self, batch: u64, seq: u64) -> (u64, u64) {
        let most = |lengths: &Lengths| lengths.range().map_or(1, |(_, longest)| longest);
        match self {
            Self::Whole => (batch, seq),
            Self::Padded { widths, .. } => (batch, most(widths)),
            Self::Packed { passes, documents } => {
                (most(passes).div_ceil(most(documents)), most(documents))
            }
        }
    }

    /// Whether every pass feeds batch · seq real tokens.
    pub fn is_whole(&self) -> bool {
        *self == Self::Whole
    }
}

/// Sequences of several lengths that one pass feeds, or the passes of one generation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ragged {
    /// Each fed as if it were as long as the longest.
    Padded(Lengths),
    /// One behind the other, without padding, each attending to itself alone.
    Packed(Lengths),
}

impl Ragged {
    /// Their lengths without padding.
    pub const fn lengths(&self) -> &Lengths {
        let (Self::Padded(lengths) | Self::Packed(lengths)) = self;
        lengths
    }
}

/// The shape of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Task {
    /// One forward pass.
    Forward {
        /// Sequences; 1 where they are packed.
        batch: u64,
        /// Tokens fed to each, padding among them; all of them where they are packed.
        seq: u64,
        /// Tokens already in the KV cache.
        past: u64,
        /// Positions that get logits.
        logits: Logits,
        /// The sequences, where they differ in length.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        sequences: Option<Ragged>,
    },
    /// A generation: one pass over the prompt, then one for each further token. The last token
    /// is chosen but never fed, unless another turn follows.
    Generate {
        /// Sequences.
        batch: u64,
        /// Tokens already in the KV cache.
        #[serde(default, skip_serializing_if = "is_zero")]
        past: u64,
        /// Tokens of each prompt; of the longest, where they differ.
        prompt_tokens: u64,
        /// The prompts, where they differ in length.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        prompts: Option<Ragged>,
        /// Tokens chosen for each.
        new_tokens: u64,
        /// Tokens that there was room for: above `new_tokens` where every sequence ended early.
        max_new_tokens: u64,
        /// Further turns, on top of what is cached.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        then: Vec<Turn>,
        /// Most tokens of a prompt that one pass feeds.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        prefill_chunk: Option<u64>,
        /// Without a cache, each pass runs over the whole context.
        kv_cache: bool,
        /// How tokens are chosen.
        sampling: Sampling,
    },
    /// Verification in speculative decoding: each round feeds the last token and those drafted
    /// after it, and chooses at every position; some of the drafted tokens are kept, and the one
    /// chosen after them is next.
    Verify {
        /// Sequences, all of which keep as many tokens.
        batch: u64,
        /// Tokens in the KV cache before the first round.
        past: u64,
        /// Tokens drafted for each round.
        drafted: u64,
        /// Drafted tokens that each round keeps.
        accepted: u64,
        /// Rounds.
        rounds: u64,
    },
    /// Optimizer steps, each over `accumulate` micro-steps: a forward pass with logits of every
    /// position and the backward pass from their loss.
    Train {
        /// Rows of one micro-step.
        batch: u64,
        /// Tokens of each; at most so many, where they differ.
        seq: u64,
        /// Micro-steps whose gradients are summed into one step.
        accumulate: u64,
        /// Optimizer steps.
        steps: u64,
        /// Every weight is trained, not the adapters alone.
        full: bool,
        /// Layers keep only their inputs and run forward again for their gradients.
        #[serde(default)]
        recompute: bool,
        /// Gradients are scaled by a factor that bounds their norm.
        #[serde(default)]
        clip: bool,
        /// How the optimizer keeps its moments.
        #[serde(default, skip_serializing_if = "MomentDtype::is_f32")]
        moments: MomentDtype,
        /// How sequences fill them.
        #[serde(default, skip_serializing_if = "Rows::is_whole")]
        rows: Rows,
    },
    /// Forward passes with logits of every position and their loss, to score known text.
    #[serde(rename = "eval", alias = "evaluate")]
    Evaluate {
        /// Rows of one pass.
        batch: u64,
        /// Tokens of each; at most so many, where they differ.
        seq: u64,
        /// Passes.
        #[serde(default = "one")]
        passes: u64,
        /// How sequences fill them.
        #[serde(default, skip_serializing_if = "Rows::is_whole")]
        rows: Rows,
    },
}

fn one() -> u64 {
    1
}

fn is_zero(n: &u64) -> bool {
    *n == 0
}

/// Tokens of a run, which throughput and costs per token are stated by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Tokens {
    /// Rows that the layers were fed, padding among them.
    pub fed: u128,
    /// Those that are no padding.
    pub real: u128,
}

impl Task {
    /// Its kind.
    pub const fn kind(&self) -> Kind {
        match self {
            Self::Forward { .. } => Kind::Forward,
            Self::Generate { .. } => Kind::Generate,
            Self::Verify { .. } => Kind::Verify,
            Self::Train { .. } => Kind::Train,
            Self::Evaluate { .. } => Kind::Evaluate,
        }
    }

    /// Lower-case name, as commands and JSON spell it.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Forward { .. } => "forward",
            Self::Generate { .. } => "generate",
            Self::Verify { .. } => "verify",
            Self::Train { .. } => "train",
            Self::Evaluate { .. } => "eval",
        }
    }

    /// Passes of a training or an evaluation, each a forward pass with a loss; 0 of other tasks.
    pub fn scored_passes(&self) -> u128 {
        match *self {
            Self::Train { accumulate, steps, .. } => u128::from(accumulate) * u128::from(steps),
            Self::Evaluate { passes, .. } => passes.into(),
            Self::Forward { .. } | Self::Generate { .. } | Self::Verify { .. } => 0,
        }
    }

    /// Tokens fed, over all passes; as many as 128 bits hold, where they are more.
    pub fn tokens(&self) -> Tokens {
        let all = |fed| Tokens { fed, real: fed };
        let wide = u128::from;
        match self {
            Self::Forward { batch, seq, sequences, .. } => {
                let fed = wide(*batch) * wide(*seq);
                let real = sequences.as_ref().map_or(fed, |ragged| ragged.lengths().tokens());
                Tokens { fed, real }
            }
            Self::Verify { batch, drafted, rounds, .. } => {
                all((wide(*batch) * wide(*rounds)).saturating_mul(1 + wide(*drafted)))
            }
            Self::Generate {
                batch, prompt_tokens, prompts, new_tokens, then, kv_cache, ..
            } => {
                let b = wide(*batch);
                // The tokens of all prompts and those chosen after them, turn by turn.
                let turns = then.iter().map(|t| (b * wide(t.prompt_tokens), wide(t.new_tokens)));
                let fed = |prompts: u128| {
                    let (mut context, mut fed) = (0, 0);
                    let first = (prompts, wide(*new_tokens));
                    let all = std::iter::once(first).chain(turns.clone());
                    for (index, (prompt, new)) in all.enumerate() {
                        context += prompt;
                        fed += match kv_cache {
                            true => prompt + b * u128::from(index > 0) + b * (new - 1),
                            false => new * context + b * (new * (new - 1) / 2),
                        };
                        context += b * new;
                    }
                    fed
                };
                let as_long = fed(b * wide(*prompt_tokens));
                match prompts {
                    None => all(as_long),
                    Some(Ragged::Packed(lengths)) => all(fed(lengths.tokens())),
                    Some(Ragged::Padded(lengths)) => {
                        Tokens { fed: as_long, real: fed(lengths.tokens()) }
                    }
                }
            }
            Self::Train { batch, seq, rows, .. } | Self::Evaluate { batch, seq, rows, .. } => {
                match rows {
                    Rows::Whole => {
                        all((wide(*batch) * wide(*seq)).saturating_mul(self.scored_passes()))
                    }
                    Rows::Padded { widths, lengths } => {
                        Tokens { fed: wide(*batch) * widths.tokens(), real: lengths.tokens() }
                    }
                    Rows::Packed { documents, .. } => all(documents.tokens()),
                }
            }
        }
    }
}
