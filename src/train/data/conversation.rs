//! A row of its own: a conversation as the checkpoint's chat template renders it, or a prompt and its
//! completion; its tokens, and which of them count.

use super::{
    Options,
    formats::{Answers, Conversation, Pair},
    spans::{Turns, shared},
    why,
};
use crate::text::Text;

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
    let Conversation { chat, answers, .. } = conversation;
    let rendered = text.render(chat, false).map_err(why)?;
    let tokens = text.encode(&rendered).map_err(why)?;
    let generated = match options.mask_prompt {
        true => text.generated(chat).map_err(why)?,
        false => None,
    };
    let counted = match (options.mask_prompt, answers, &generated) {
        (false, Answers::Marked { excludes: true, .. }, _) => {
            return Err("marks messages that are not to be learnt: that takes --mask-prompt".into());
        }
        (false, Answers::Marked { .. } | Answers::Assistant | Answers::From(_), _) => {
            vec![true; tokens.len()]
        }
        (true, Answers::Assistant, Some(generated)) => {
            let within = text.within(&rendered, generated).map_err(why)?;
            if !within.contains(&true) {
                return Err("the chat template's generation blocks give nothing to train on".into());
            }
            within
        }
        (true, Answers::Marked { .. }, Some(_)) => {
            return Err(
                "marks messages, and the chat template's generation blocks say what counts".into(),
            );
        }
        (true, Answers::Assistant, None) => {
            let said: Vec<bool> =
                chat.messages.iter().map(|message| message.role() == "assistant").collect();
            Turns { chat, text, rendered: &rendered, tokens: &tokens }.mask(&said)?
        }
        (true, Answers::Marked { counts, .. }, None) => {
            Turns { chat, text, rendered: &rendered, tokens: &tokens }.mask(counts)?
        }
        (true, Answers::From(first), _) => {
            let turns = Turns { chat, text, rendered: &rendered, tokens: &tokens };
            let start = turns.start(*first)?;
            (0..tokens.len()).map(|at| at >= start).collect()
        }
    };
    Tokens::checked(tokens, counted, options)
}
