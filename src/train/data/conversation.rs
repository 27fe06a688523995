//! A row of its own: a conversation as the checkpoint's chat template renders it, or a prompt and its
//! completion; its tokens, and which of them count.

use super::{
    Options,
    formats::{Answers, Conversation, Pair},
    why,
};
use crate::text::{Chat, Text};

/// Tokens of one row and, for each, whether its prediction counts.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Tokens {
    pub(super) tokens: Vec<u32>,
    pub(super) counted: Vec<bool>,
}

impl Tokens {
    /// A row that fits and has something to learn; the error says what is wrong with it.
    fn checked(tokens: Vec<u32>, counted: Vec<bool>, options: &Options) -> Result<Self, String> {
        let (n, most) = (tokens.len(), options.seq.saturating_add(1));
        if n > most {
            return Err(format!(
                "has {n} tokens, and --seq {} takes {most}; raise --seq to {} or shorten it",
                options.seq,
                n - 1
            ));
        }
        // The first token is fed, never predicted.
        match counted.iter().skip(1).any(|&counts| counts) {
            true => Ok(Self { tokens, counted }),
            false => Err("has no token to train on".into()),
        }
    }
}

/// Tokenizes a prompt with its completion as one document, begun and ended as TRL does.
pub(super) fn tokenize_pair(pair: &Pair, text: &Text, options: &Options) -> Result<Tokens, String> {
    let prompt = text.encode_raw(&pair.prompt).map_err(why)?;
    let whole = format!("{}{}", pair.prompt, pair.completion);
    let tokens = text.encode_document(&whole).map_err(why)?;
    let start = if options.mask_prompt { shared(&prompt, &tokens) } else { 0 };
    let counted = (0..tokens.len()).map(|at| at >= start).collect();
    Tokens::checked(tokens, counted, options)
}

/// Renders and tokenizes a conversation; the error says what is wrong with it.
pub(super) fn tokenize(
    conversation: &Conversation,
    text: &Text,
    options: &Options,
) -> Result<Tokens, String> {
    let Conversation { chat, answers } = conversation;
    let rendered = text.render(chat, false).map_err(why)?;
    let tokens = text.encode(&rendered).map_err(why)?;
    let generated = match options.mask_prompt {
        true => text.generated(chat).map_err(why)?,
        false => None,
    };
    let counted = match (options.mask_prompt, answers, &generated) {
        (false, Answers::Marked(counts), _) => {
            let unmarked = chat.messages.iter().zip(counts);
            if unmarked.filter(|(message, _)| message.role() == "assistant").any(|(_, c)| !c) {
                return Err(
                    "marks messages that are not to be learnt: that takes --mask-prompt".into()
                );
            }
            vec![true; tokens.len()]
        }
        (false, Answers::Assistant | Answers::From(_), _) => vec![true; tokens.len()],
        (true, Answers::Assistant, Some(generated)) => {
            let within = text.within(&rendered, generated).map_err(why)?;
            if !within.contains(&true) {
                return Err("the chat template's generation blocks give nothing to train on".into());
            }
            within
        }
        (true, Answers::Marked(_), Some(_)) => {
            return Err(
                "marks messages, and the chat template's generation blocks say what counts".into(),
            );
        }
        (true, Answers::Assistant, None) => {
            let said: Vec<bool> =
                chat.messages.iter().map(|message| message.role() == "assistant").collect();
            Turns { chat, text, rendered: &rendered, tokens: &tokens }.mask(&said)?
        }
        (true, Answers::Marked(counts), None) => {
            Turns { chat, text, rendered: &rendered, tokens: &tokens }.mask(counts)?
        }
        (true, Answers::From(first), _) => {
            let turns = Turns { chat, text, rendered: &rendered, tokens: &tokens };
            let start = turns.length(first + 1, *first, true)?;
            (0..tokens.len()).map(|at| at >= start).collect()
        }
    };
    Tokens::checked(tokens, counted, options)
}

/// How many tokens two lists begin with alike.
fn shared(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

/// A conversation whose turns are looked for in its tokens.
struct Turns<'a> {
    chat: &'a Chat,
    text: &'a Text,
    rendered: &'a str,
    tokens: &'a [u32],
}

impl Turns<'_> {
    /// Marks what these messages say, and the end-of-turn token after each.
    ///
    /// A message begins where the template, given the messages before it, asks for an answer. A
    /// token that is partly prompt and partly answer counts.
    fn mask(&self, said: &[bool]) -> Result<Vec<bool>, String> {
        let mut counted = vec![false; self.tokens.len()];
        if !said.contains(&true) {
            return Err("has no assistant turn, and --mask-prompt trains on nothing else".into());
        }
        for (turn, _) in said.iter().enumerate().filter(|(_, said)| **said) {
            let number = turn + 1;
            let (start, end) =
                (self.length(number, turn, true)?, self.length(number, number, false)?);
            let end = turn_end(self.text, self.tokens, start, end.max(start)).map_err(why)?;
            counted[start..end].fill(true);
        }
        Ok(counted)
    }

    /// How many tokens the first `count` messages make; `number` is the one looked for, from 1.
    fn length(&self, number: usize, count: usize, prompt: bool) -> Result<usize, String> {
        let head = self.chat.with(&self.chat.messages[..count]);
        let head = self.text.render(&head, prompt).map_err(|e| {
            let why = why(e);
            format!("message {number}: --mask-prompt needs what comes up to it alone: {why}")
        })?;
        if !self.rendered.starts_with(&head) {
            return Err(format!(
                "message {number}: --mask-prompt cannot find it, as the chat template renders \
                 what comes up to it otherwise alone than in the whole"
            ));
        }
        let head = self.text.encode(&head).map_err(why)?;
        Ok(shared(&head, self.tokens))
    }
}

/// Where a turn ends: after its last end-of-sequence token, unless more than blanks follow.
fn turn_end(text: &Text, tokens: &[u32], start: usize, end: usize) -> anyhow::Result<usize> {
    let ends = |id| text.eos_ids().contains(id);
    let Some(last) = tokens[start..end].iter().rposition(ends) else { return Ok(end) };
    let after = start + last + 1;
    let blank = text.decode(&tokens[after..end], false)?.trim().is_empty();
    Ok(if blank { after } else { end })
}
