//! A conversation as one row: the tokens of the checkpoint's chat template, and which count.

use super::{Options, why};
use crate::text::{Message, Text};

/// Tokens of one conversation and, for each, whether its prediction counts.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Tokens {
    pub(super) tokens: Vec<u32>,
    pub(super) counted: Vec<bool>,
}

/// Renders and tokenizes a conversation; the error says what is wrong with it.
pub(super) fn tokenize(
    messages: &[Message],
    text: &Text,
    options: &Options,
) -> Result<Tokens, String> {
    let rendered = text.render(messages, false).map_err(why)?;
    let tokens = text.encode(&rendered).map_err(why)?;
    let (n, most) = (tokens.len(), options.seq.saturating_add(1));
    if n > most {
        return Err(format!(
            "has {n} tokens, and --seq {} takes {most}; raise --seq to {} or shorten it",
            options.seq,
            n - 1
        ));
    }
    let counted = match options.mask_prompt {
        true => assistant(messages, text, &rendered, &tokens)?,
        false => vec![true; n],
    };
    // The first token is fed, never predicted.
    match counted.iter().skip(1).any(|&counts| counts) {
        true => Ok(Tokens { tokens, counted }),
        false => Err("has no token to train on".into()),
    }
}

/// Marks what the assistant says: each of its messages and the end-of-turn token after it.
///
/// A message begins where the template, given the messages before it, asks for an answer. A token
/// that is partly prompt and partly answer counts.
fn assistant(
    messages: &[Message],
    text: &Text,
    rendered: &str,
    tokens: &[u32],
) -> Result<Vec<bool>, String> {
    let mut counted = vec![false; tokens.len()];
    let turns = messages.iter().enumerate().filter(|(_, m)| m.role == "assistant");
    let turns: Vec<usize> = turns.map(|(turn, _)| turn).collect();
    if turns.is_empty() {
        return Err("has no assistant turn, and --mask-prompt trains on nothing else".into());
    }
    // How many tokens the first `count` messages make; `number` is the one looked for, from 1.
    let length = |number: usize, count: usize, prompt: bool| {
        let head = text.render(&messages[..count], prompt).map_err(|e| {
            let why = why(e);
            format!("message {number}: --mask-prompt needs what comes up to it alone: {why}")
        })?;
        if !rendered.starts_with(&head) {
            return Err(format!(
                "message {number}: --mask-prompt cannot find it, as the chat template renders \
                 what comes up to it otherwise alone than in the whole"
            ));
        }
        let head = text.encode(&head).map_err(why)?;
        Ok(head.iter().zip(tokens).take_while(|(a, b)| a == b).count())
    };
    for turn in turns {
        let number = turn + 1;
        let (start, end) = (length(number, turn, true)?, length(number, number, false)?);
        let said = start..turn_end(text, tokens, start, end.max(start)).map_err(why)?;
        counted[said].fill(true);
    }
    Ok(counted)
}

/// Where a turn ends: after its last end-of-sequence token, unless more than blanks follow.
fn turn_end(text: &Text, tokens: &[u32], start: usize, end: usize) -> anyhow::Result<usize> {
    let ends = |id| text.eos_ids().contains(id);
    let Some(last) = tokens[start..end].iter().rposition(ends) else { return Ok(end) };
    let after = start + last + 1;
    let blank = text.decode(&tokens[after..end], false)?.trim().is_empty();
    Ok(if blank { after } else { end })
}
