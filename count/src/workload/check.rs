//! Workloads that mean nothing, or that no sum of costs would fit.

use super::{Lengths, Ragged, Rows, Task, Workload};
use crate::error::{Error, Result};

fn at_least_1(flag: &str, size: u64) -> Result<()> {
    match size {
        0 => Err(Error::flag(flag, "must be at least 1").into()),
        _ => Ok(()),
    }
}

fn refused(flag: &str, why: impl Into<String>) -> Result<()> {
    Err(Error::flag(flag, why).into())
}

impl Workload {
    /// Most batch × context, in tokens: with [`crate::config::ModelConfig::validate`]'s bounds, no
    /// dimension of any op passes 64 bits.
    pub const MOST_TOKENS: u64 = 1 << 36;

    /// Most passes of a training or an evaluation: sums over so many, each over
    /// [`Self::MOST_TOKENS`], fit 128 bits.
    pub const MOST_PASSES: u64 = 1 << 48;

    /// Refuses empty and absurd sizes, and dimensions that contradict each other.
    ///
    /// # Errors
    /// The flag at fault.
    pub fn validate(&self) -> Result<()> {
        self.check_sizes()?;
        let (batch, length) = match &self.task {
            Task::Forward { batch, seq, past, .. } => {
                at_least_1("--seq", *seq)?;
                (*batch, seq.checked_add(*past))
            }
            Task::Evaluate { batch, seq, passes, .. } => {
                at_least_1("--passes", *passes)?;
                at_least_1("--seq", *seq)?;
                (*batch, Some(*seq))
            }
            Task::Train { batch, seq, accumulate, steps, full, .. } => {
                at_least_1("--accumulate", *accumulate)?;
                at_least_1("--steps", *steps)?;
                at_least_1("--seq", *seq)?;
                if *full && self.dtype.is_8_bit() {
                    let why = "does not go with --dtype fp8, whose 8-bit weights are frozen; train \
                               adapters with --lora-rank, or every weight in bf16";
                    return refused("--full", why);
                }
                if !full && self.lora.rank == 0 {
                    let why = "0 leaves nothing to train; give a rank, or --full for every weight";
                    return refused("--lora-rank", why);
                }
                (*batch, Some(*seq))
            }
            Task::Verify { batch, past, drafted, accepted, rounds } => {
                at_least_1("--drafted", *drafted)?;
                at_least_1("--rounds", *rounds)?;
                if accepted > drafted {
                    let why = format!("{accepted} of {drafted} drafted tokens");
                    return refused("--accepted", why);
                }
                let kept = accepted.checked_add(1).and_then(|kept| kept.checked_mul(rounds - 1));
                let fed = drafted.checked_add(1).and_then(|fed| fed.checked_add(*past));
                (*batch, kept.zip(fed).and_then(|(kept, fed)| kept.checked_add(fed)))
            }
            Task::Generate { batch, .. } => (*batch, self.check_generation()?),
        };
        at_least_1("--batch", batch)?;
        if length.and_then(|l| l.checked_mul(batch)).is_none_or(|all| all > Self::MOST_TOKENS) {
            let why = format!("batch × context is above {} tokens", Self::MOST_TOKENS);
            return refused(if self.is_ragged() { "--lengths" } else { "--batch" }, why);
        }
        self.check_passes()?;
        self.check_lengths()
    }

    /// Refuses more passes than sums over them fit 128 bits.
    fn check_passes(&self) -> Result<()> {
        let (flag, of) = match self.task {
            Task::Train { .. } => ("--steps", "--steps × --accumulate"),
            Task::Evaluate { .. } => ("--passes", "their number"),
            // Their passes are no more than the tokens of their contexts.
            Task::Forward { .. } | Task::Generate { .. } | Task::Verify { .. } => return Ok(()),
        };
        match self.task.scored_passes() <= Self::MOST_PASSES.into() {
            true => Ok(()),
            false => refused(flag, format!("{of} is above {} passes", Self::MOST_PASSES)),
        }
    }

    /// Refuses sequences of many lengths that are not those of the dimensions, which are bounded.
    fn check_lengths(&self) -> Result<()> {
        match &self.task {
            Task::Forward { batch, seq, past, sequences, .. } => {
                check_ragged_pass(sequences.as_ref(), *batch, *seq, *past)
            }
            Task::Generate { batch, prompt_tokens, prompts: Some(prompts), .. } => {
                check_prompts(prompts.lengths(), *batch, *prompt_tokens)
            }
            Task::Train { batch, seq, rows, .. } | Task::Evaluate { batch, seq, rows, .. } => {
                check_rows(rows, *batch, *seq, self.task.scored_passes())
            }
            Task::Generate { prompts: None, .. } | Task::Verify { .. } => Ok(()),
        }
    }

    /// Whether its batch and context follow from lengths.
    fn is_ragged(&self) -> bool {
        match &self.task {
            Task::Forward { sequences, .. } => sequences.is_some(),
            Task::Generate { prompts, .. } => prompts.is_some(),
            Task::Verify { .. } | Task::Train { .. } | Task::Evaluate { .. } => false,
        }
    }

    /// Refuses a context too long even for a batch of one: by the flag that adds most to it.
    fn check_sizes(&self) -> Result<()> {
        let listed = |flag| if self.is_ragged() { "--lengths" } else { flag };
        let wide = |n: u64| u128::from(n);
        let sizes: Vec<(&str, u128)> = match &self.task {
            Task::Forward { seq, past, .. } => {
                vec![(listed("--seq"), wide(*seq)), ("--past", wide(*past))]
            }
            Task::Train { seq, .. } | Task::Evaluate { seq, .. } => vec![("--seq", wide(*seq))],
            Task::Verify { past, drafted, accepted, rounds, .. } => vec![
                ("--drafted", wide(*drafted)),
                ("--past", wide(*past)),
                ("--rounds", wide(*rounds).saturating_mul(1 + wide(*accepted))),
            ],
            Task::Generate { past, prompt_tokens, new_tokens, max_new_tokens, then, .. } => {
                let turns =
                    then.iter().map(|turn| wide(turn.prompt_tokens) + wide(turn.new_tokens));
                vec![
                    ("--past", wide(*past)),
                    (listed("--prompt-tokens"), wide(*prompt_tokens)),
                    ("--new-tokens", wide(*max_new_tokens.max(new_tokens))),
                    ("--then", turns.sum()),
                ]
            }
        };
        let context = sizes.iter().map(|(_, size)| *size).fold(0, u128::saturating_add);
        match sizes.into_iter().max_by_key(|(_, size)| *size) {
            Some((flag, _)) if context > Self::MOST_TOKENS.into() => {
                refused(flag, format!("brings the context above {} tokens", Self::MOST_TOKENS))
            }
            _ => Ok(()),
        }
    }

    /// The context of a generation, unless it passes 64 bits.
    fn check_generation(&self) -> Result<Option<u64>> {
        let Task::Generate {
            batch: _,
            past,
            prompt_tokens,
            prompts,
            new_tokens,
            max_new_tokens,
            then,
            prefill_chunk,
            kv_cache,
            sampling,
        } = &self.task
        else {
            return Ok(Some(0));
        };
        sampling.validate()?;
        at_least_1("--prompt-tokens", *prompt_tokens)?;
        at_least_1("--new-tokens", *new_tokens)?;
        prefill_chunk.map_or(Ok(()), |chunk| at_least_1("--prefill-chunk", chunk))?;
        for turn in then {
            at_least_1("--then", turn.prompt_tokens)?;
            at_least_1("--then", turn.new_tokens)?;
        }
        if !kv_cache && *past > 0 {
            refused("--past", "needs the KV cache, which --no-kv-cache leaves out")?;
        }
        if !kv_cache && prefill_chunk.is_some() {
            refused("--prefill-chunk", "needs the KV cache, which --no-kv-cache leaves out")?;
        }
        if prompts.is_some() {
            let alone = [
                (*past > 0, "--past"),
                (!then.is_empty(), "--then"),
                (prefill_chunk.is_some(), "--prefill-chunk"),
            ];
            if let Some((_, flag)) = alone.into_iter().find(|(given, _)| *given) {
                refused(flag, "does not go with prompts of different lengths")?;
            }
        }
        let most = max_new_tokens.max(new_tokens);
        let turns = then.iter().flat_map(|turn| [turn.prompt_tokens, turn.new_tokens]);
        let mut sizes = [*past, *prompt_tokens, *most].into_iter().chain(turns);
        Ok(sizes.try_fold(0u64, u64::checked_add))
    }
}

/// Refuses prompts that are not `batch` ones of 1 to `longest` tokens.
fn check_prompts(prompts: &Lengths, batch: u64, longest: u64) -> Result<()> {
    let fits = prompts.range().is_some_and(|(shortest, most)| shortest > 0 && most == longest);
    match fits && prompts.count() == batch.into() {
        true => Ok(()),
        false => refused("--prompt-tokens", "the prompts are not those of the batch"),
    }
}

/// Refuses sequences of one pass that are not its tokens.
fn check_ragged_pass(sequences: Option<&Ragged>, batch: u64, seq: u64, past: u64) -> Result<()> {
    let Some(sequences) = sequences else { return Ok(()) };
    if past > 0 {
        let why = "does not go with sequences of different lengths, which come after nothing";
        return refused("--past", why);
    }
    let Some((1.., longest)) = sequences.lengths().range() else {
        return refused("--lengths", "a sequence has no token");
    };
    let fits = match sequences {
        Ragged::Padded(lengths) => longest == seq && lengths.count() == batch.into(),
        Ragged::Packed(lengths) => batch == 1 && lengths.tokens() == seq.into(),
    };
    match fits {
        true => Ok(()),
        false => refused("--lengths", "the sequences are not the tokens of the pass"),
    }
}

/// Refuses rows that are not those of `passes` passes of at most batch · seq tokens.
fn check_rows(rows: &Rows, batch: u64, seq: u64, passes: u128) -> Result<()> {
    let within = |lengths: &Lengths, most: u128| {
        lengths.range().is_some_and(|(least, longest)| least > 0 && u128::from(longest) <= most)
    };
    let (wide, seq) = (u128::from(batch), u128::from(seq));
    let fits = match rows {
        Rows::Whole => true,
        Rows::Padded { widths, lengths } => {
            let longest = |lengths: &Lengths| lengths.range().map(|(_, longest)| longest);
            within(widths, seq)
                && within(lengths, seq)
                && widths.count() == passes
                && lengths.count() == passes * wide
                && longest(widths) == longest(lengths)
                && lengths.tokens() <= wide * widths.tokens()
        }
        Rows::Packed { passes: fed, documents } => {
            within(fed, wide * seq)
                && within(documents, seq)
                && fed.count() == passes
                && fed.tokens() == documents.tokens()
        }
    };
    match fits {
        true => Ok(()),
        false => refused("--lengths", "the sequences are not those of the passes"),
    }
}
