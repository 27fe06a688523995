//! What is to be run: the question that predictions and executions answer alike.

use serde::{Deserialize, Serialize};

use crate::{
    config::{LoraConfig, ModelConfig},
    error::{Error, Result},
    ledger::Dtype,
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
}

/// Rows of logits that the loss is computed over at once: of `rows` rows, as many chunks of this
/// size as fit, and one of the rest.
pub const LOSS_ROWS: usize = 256;

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

/// The shape of a run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Task {
    /// One forward pass.
    Forward {
        /// Sequences, all of one length.
        batch: u64,
        /// Tokens fed to each.
        seq: u64,
        /// Tokens already in the KV cache.
        past: u64,
        /// Positions that get logits.
        logits: Logits,
    },
    /// A generation: one pass over the prompt, then one for each further token. The last token
    /// is chosen but never fed.
    Generate {
        /// Sequences, all of one length.
        batch: u64,
        /// Tokens of each prompt.
        prompt_tokens: u64,
        /// Tokens chosen for each.
        new_tokens: u64,
        /// Tokens that there was room for: above `new_tokens` where every sequence ended early.
        max_new_tokens: u64,
        /// Without a cache, each pass runs over the whole context.
        kv_cache: bool,
        /// How tokens are chosen.
        sampling: Sampling,
    },
    /// Optimizer steps, each over `accumulate` micro-steps: a forward pass with logits of every
    /// position and the backward pass from their loss.
    Train {
        /// Sequences of one micro-step, all of one length.
        batch: u64,
        /// Tokens of each.
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
    },
    /// Forward passes with logits of every position and their loss, to score known text.
    Evaluate {
        /// Sequences of one pass, all of one length.
        batch: u64,
        /// Tokens of each.
        seq: u64,
        /// Passes.
        #[serde(default = "one")]
        passes: u64,
    },
}

fn one() -> u64 {
    1
}

impl Task {
    /// Lower-case name, as commands and JSON spell it.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Forward { .. } => "forward",
            Self::Generate { .. } => "generate",
            Self::Train { .. } => "train",
            Self::Evaluate { .. } => "evaluate",
        }
    }
}

/// A model, its adapters, and what is run on it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Workload {
    /// The model.
    pub model: ModelConfig,
    /// Its adapters.
    pub lora: LoraConfig,
    /// Element type of weights and activations.
    pub dtype: Dtype,
    /// What is run.
    #[serde(flatten)]
    pub task: Task,
}

impl Workload {
    /// Most batch × context, in tokens: with [`ModelConfig::validate`]'s bounds, no dimension of
    /// any op passes 64 bits.
    pub const MOST_TOKENS: u64 = 1 << 36;

    /// Refuses empty and absurd sizes.
    ///
    /// # Errors
    /// The flag at fault.
    pub fn validate(&self) -> Result<()> {
        let at_least_1 = |flag: &str, size: u64| match size {
            0 => Err(Error::flag(flag, "must be at least 1")),
            _ => Ok(()),
        };
        let (batch, length, sizes) = match self.task {
            Task::Forward { batch, seq, past, .. } => {
                (batch, seq.checked_add(past), [("--batch", batch), ("--seq", seq)])
            }
            Task::Evaluate { batch, seq, passes } => {
                at_least_1("--passes", passes)?;
                (batch, Some(seq), [("--batch", batch), ("--seq", seq)])
            }
            Task::Train { batch, seq, accumulate, steps, full, .. } => {
                at_least_1("--accumulate", accumulate)?;
                at_least_1("--steps", steps)?;
                if !full && self.lora.rank == 0 {
                    let why = "0 leaves nothing to train; give a rank, or --full for every weight";
                    return Err(Error::flag("--lora-rank", why).into());
                }
                (batch, Some(seq), [("--batch", batch), ("--seq", seq)])
            }
            Task::Generate {
                batch, prompt_tokens, new_tokens, max_new_tokens, sampling, ..
            } => {
                sampling.validate()?;
                at_least_1("--new-tokens", new_tokens)?;
                let most = max_new_tokens.max(new_tokens);
                let sizes = [("--batch", batch), ("--prompt-tokens", prompt_tokens)];
                (batch, prompt_tokens.checked_add(most), sizes)
            }
        };
        for (flag, size) in sizes {
            at_least_1(flag, size)?;
        }
        match length.and_then(|l| l.checked_mul(batch)) {
            Some(tokens) if tokens <= Self::MOST_TOKENS => Ok(()),
            _ => {
                let why = format!("batch × context is above {} tokens", Self::MOST_TOKENS);
                Err(Error::flag("--batch", why).into())
            }
        }
    }

    /// The same generation, ended after `steps` tokens; any other task as it is.
    pub fn with_new_tokens(mut self, steps: u64) -> Self {
        if let Task::Generate { new_tokens, .. } = &mut self.task {
            *new_tokens = steps;
        }
        self
    }

    /// Most tokens that attention reaches over.
    pub fn context(&self) -> u64 {
        match self.task {
            Task::Forward { seq, past, .. } => past + seq,
            Task::Generate { prompt_tokens, max_new_tokens, .. } => prompt_tokens + max_new_tokens,
            Task::Train { seq, .. } | Task::Evaluate { seq, .. } => seq,
        }
    }

    /// Positions that rotary tables are made for.
    pub fn positions(&self) -> u64 {
        match self.task {
            Task::Generate { prompt_tokens, max_new_tokens, .. } => {
                prompt_tokens + max_new_tokens - 1
            }
            Task::Forward { .. } | Task::Train { .. } | Task::Evaluate { .. } => self.context(),
        }
    }

    /// Bytes of all parameters, adapters included.
    pub fn weights_bytes(&self) -> u128 {
        let parameters = self.model.parameters() + self.lora.parameters(&self.model);
        parameters * u128::from(self.dtype.bytes())
    }

    /// Bytes of the preallocated cache: keys and values, K·d wide, of every layer and token.
    /// Training and evaluation feed whole sequences and keep none.
    pub fn kv_cache_bytes(&self) -> u128 {
        let (batch, tokens) = match self.task {
            Task::Forward { batch, seq, past, .. } => (batch, past + seq),
            Task::Generate { batch, prompt_tokens, max_new_tokens, .. } => {
                (batch, prompt_tokens + max_new_tokens - 1)
            }
            Task::Train { .. } | Task::Evaluate { .. } => return 0,
        };
        let width = 2 * self.model.num_hidden_layers * self.model.kv_width();
        u128::from(batch) * u128::from(tokens) * width as u128 * u128::from(self.dtype.bytes())
    }

    /// Bytes of the token ids, targets and weights that a training step holds on the host.
    pub fn tokens_bytes(&self) -> u128 {
        let Task::Train { batch, seq, accumulate, .. } = self.task else { return 0 };
        12 * [batch, seq, accumulate].map(u128::from).iter().product::<u128>()
    }

    /// Bytes that a training holds beside weights and activations: gradients, and both moments,
    /// in f32; and where the weights are narrower, their f32 masters.
    pub fn training_bytes(&self) -> u128 {
        let Task::Train { full, .. } = self.task else { return 0 };
        let base = if full { self.model.parameters() } else { 0 };
        let trained = base + self.lora.parameters(&self.model);
        let masters = u128::from(self.dtype != Dtype::F32);
        trained * 4 * (3 + masters)
    }

    /// Bytes that the largest pass needs at once beside weights and cache, about: scores before
    /// and after the mask, the mask, the MLP's three tensors, four of the residual's width, and
    /// logits with their f32 copy. In training, layer upon layer, what gradients will read.
    pub fn activations_bytes(&self) -> u128 {
        let [batch, seq, _, head_rows] = self.largest_pass();
        let model = &self.model;
        let (rows, layers) = (batch * seq, model.num_hidden_layers as u128);
        let [d, f, q, kv] =
            [model.hidden_size, model.intermediate_size, model.q_width(), model.kv_width()]
                .map(|n| n as u128);
        let wide = 3 * f + 4 * d;
        let [of_heads, masks] = self.scores();
        let once = 2 * of_heads + masks + rows * wide;
        // Softmax's output; queries, keys and values; gate, up and their product; both norms'
        // inputs and outputs. Of further norms, their inputs: what attention and the MLP give, and
        // queries and keys as projected.
        let outer = if model.sandwich_norms { 2 * d } else { 0 };
        let of_qk = if model.qk_norm { q + kv } else { 0 };
        let kept = of_heads + rows * (wide + q + 2 * kv + outer + of_qk);
        let layered = match self.task {
            Task::Train { recompute: true, .. } => kept + layers * rows * model.hidden_size as u128,
            Task::Train { .. } => layers * kept,
            Task::Forward { .. } | Task::Generate { .. } | Task::Evaluate { .. } => 0,
        };
        let bytes = u128::from(self.dtype.bytes());
        let logits = head_rows * model.vocab_size as u128 * (bytes + 4);
        (once + layered) * bytes + logits
    }

    /// Of which scores and their mask, which a kernel for all of attention never holds.
    pub fn scores_bytes(&self) -> u128 {
        let [of_heads, masks] = self.scores();
        (2 * of_heads + masks) * u128::from(self.dtype.bytes())
    }

    /// Elements of one layer's scores in the largest pass, of the layer that sees most, and of the
    /// masks: one for each kind of layer.
    fn scores(&self) -> [u128; 2] {
        let [batch, seq, held, _] = self.largest_pass();
        let model = &self.model;
        let windowed = model.windowed_layers();
        let width = model.window.as_ref().map_or(held, |window| window.width as u128);
        let seen = seq + (held - seq).min(width - 1);
        let kinds = [(windowed < model.num_hidden_layers, held), (windowed > 0, seen)];
        let keys = kinds.into_iter().filter(|(any, _)| *any).map(|(_, keys)| keys);
        let most = keys.clone().max().unwrap_or(held);
        let of_heads = batch * model.num_attention_heads as u128 * seq * most;
        [of_heads, seq * keys.sum::<u128>()]
    }

    /// (sequences, tokens fed, tokens held after it, rows of logits at once) of the largest pass.
    fn largest_pass(&self) -> [u128; 4] {
        let (batch, seq, held, head_rows) = match self.task {
            Task::Forward { batch, seq, past, logits: Logits::All } => {
                (batch, seq, past + seq, batch * seq)
            }
            Task::Forward { batch, seq, past, .. } => (batch, seq, past + seq, batch),
            Task::Generate { batch, prompt_tokens, new_tokens, kv_cache: false, .. } => {
                (batch, prompt_tokens + new_tokens - 1, prompt_tokens + new_tokens - 1, batch)
            }
            Task::Generate { batch, prompt_tokens, .. } => {
                (batch, prompt_tokens, prompt_tokens, batch)
            }
            Task::Train { batch, seq, .. } | Task::Evaluate { batch, seq, .. } => {
                (batch, seq, seq, (batch * seq).min(LOSS_ROWS as u64))
            }
        };
        [batch, seq, held, head_rows].map(u128::from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_bounds_what_is_held_of_scores() {
        // 6 heads; 1 token on top of 99: 8 keys in a window of 8, all 100 without one.
        let model = ModelConfig::preset("tiny-mistral").unwrap();
        let of = |model: &ModelConfig, seq, past| {
            let task = Task::Forward { batch: 1, seq, past, logits: Logits::Last };
            let (model, lora) = (model.clone(), LoraConfig::none());
            Workload { model, lora, dtype: Dtype::F32, task }.scores()
        };
        assert_eq!(of(&model, 1, 99), [6 * 8, 8]);
        assert_eq!(of(&model, 12, 0), [6 * 12 * 12, 12 * 12]);
        assert_eq!(of(&ModelConfig { window: None, ..model }, 1, 99), [6 * 100, 100]);
        // Layers of both kinds have a mask each.
        let both = ModelConfig::preset("tiny-gemma3").unwrap();
        assert_eq!(of(&both, 2, 99), [4 * 2 * 101, 2 * (101 + 9)]);
    }
}
