//! Where in a conversation's tokens each message is, for templates that do not mark what is generated.
//!
//! Mostly what comes up to a message, rendered alone, begins the whole. Templates that render a turn
//! otherwise once another follows (those that forget what was thought) break that. Then a message is
//! found by what stays: the whole, rendered once more with a probe in place of one message's content,
//! must be the same before and after it.

use std::ops::Range;

use super::why;
use crate::text::{Chat, Text};

/// What stands for a message's content while its place is looked for: characters that no text has.
const PROBE: &str = "\u{fdd2}\u{fdd3}";

/// A conversation whose turns are looked for in its tokens.
pub(super) struct Turns<'a> {
    pub(super) chat: &'a Chat,
    pub(super) text: &'a Text,
    pub(super) rendered: &'a str,
    pub(super) tokens: &'a [u32],
}

/// How many tokens two lists begin with alike.
pub(super) fn shared(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

impl Turns<'_> {
    /// Marks what these messages say, and the end-of-turn token after each.
    ///
    /// A message begins where the template, given the messages before it, asks for an answer. A
    /// token that is partly prompt and partly answer counts.
    pub(super) fn mask(&self, said: &[bool]) -> Result<Vec<bool>, String> {
        let mut counted = vec![false; self.tokens.len()];
        if !said.contains(&true) {
            return Err("has no assistant turn, and --mask-prompt trains on nothing else".into());
        }
        for (turn, _) in said.iter().enumerate().filter(|(_, said)| **said) {
            let start = self.start(turn)?;
            let end = self.end(turn, start)?;
            counted[start..end].fill(true);
        }
        Ok(counted)
    }

    /// How many tokens come before the message of this index.
    pub(super) fn start(&self, turn: usize) -> Result<usize, String> {
        match self.head(turn, turn, true)? {
            Some(head) => self.length(&head),
            None => {
                let start = self.opened(turn).ok_or_else(|| lost(turn))?;
                self.length(&self.rendered[..start])
            }
        }
    }

    /// How many tokens come up to the end of this message, which begins after `start` tokens.
    fn end(&self, turn: usize, start: usize) -> Result<usize, String> {
        if let Some(head) = self.head(turn, turn + 1, false)? {
            let end = self.length(&head)?.max(start);
            return turn_end(self.text, self.tokens, start, end).map_err(why);
        }
        // What comes before the next message's content ends this turn, and opens the next.
        let next = self.place(turn + 1).ok_or_else(|| lost(turn))?;
        let before = self.length(&self.rendered[..next.start])?.max(start);
        let ends = |id| self.text.eos_ids().contains(id);
        let last = self.tokens[start..before].iter().rposition(ends).ok_or_else(|| lost(turn))?;
        let end = start + last + 1;
        // A token that the message itself spells ends nothing.
        let said = match self.chat.messages[turn].says_nothing() {
            true => 0,
            false => {
                self.length(&self.rendered[..self.place(turn).ok_or_else(|| lost(turn))?.end])?
            }
        };
        if end > said { Ok(end) } else { Err(lost(turn)) }
    }

    /// The text of the first `count` messages, where the whole begins with it; `turn` is the message
    /// that is looked for.
    fn head(&self, turn: usize, count: usize, prompt: bool) -> Result<Option<String>, String> {
        let head = self.chat.with(&self.chat.messages[..count]);
        let head = self.text.render(&head, prompt).map_err(|e| {
            let (number, why) = (turn + 1, why(e));
            format!("message {number}: --mask-prompt needs what comes up to it alone: {why}")
        })?;
        Ok(self.rendered.starts_with(&head).then_some(head))
    }

    /// How many tokens the text `head`, which begins the whole, makes of it.
    fn length(&self, head: &str) -> Result<usize, String> {
        Ok(shared(&self.text.encode(head).map_err(why)?, self.tokens))
    }

    /// Where in the whole the content of a message is, in bytes, if the rest is the same with another.
    fn place(&self, turn: usize) -> Option<Range<usize>> {
        let probed = self.text.render(&self.chat.saying(turn, PROBE), false).ok()?;
        let (before, after) = around(&probed)?;
        let end = self.rendered.len().checked_sub(after.len())?;
        let same = self.rendered.starts_with(before) && self.rendered.ends_with(after);
        (same && before.len() <= end).then_some(before.len()..end)
    }

    /// Where in the whole a message begins, in bytes: after what asks for it.
    ///
    /// Between the content before and its own stand the end of the turn before, what asks for an
    /// answer, and perhaps what was thought. The end of a turn is what follows its content where it
    /// is the last; what asks for an answer is what a prompt for one adds. If the whole has only the
    /// first part of that, and then at once the content, the message begins there.
    fn opened(&self, turn: usize) -> Option<usize> {
        let (before, own) = (self.place(turn.checked_sub(1)?)?, self.place(turn)?);
        let head = self.chat.with(&self.chat.messages[..turn]).saying(turn - 1, PROBE);
        let (end, asked) =
            (self.text.render(&head, false).ok()?, self.text.render(&head, true).ok()?);
        let asks = asked.strip_prefix(&*end)?;
        let between = self.rendered.get(before.end..own.start)?;
        let opening = between.strip_prefix(around(&end)?.1)?;
        match (opening.starts_with(asks), asks.starts_with(opening)) {
            (_, _) if opening.is_empty() => None,
            (true, _) => Some(own.start - opening.len() + asks.len()),
            (false, true) => Some(own.start),
            (false, false) => None,
        }
    }
}

/// What stands before and after the one probe of a text.
fn around(probed: &str) -> Option<(&str, &str)> {
    let (before, after) = probed.split_once(PROBE)?;
    (!after.contains(PROBE)).then_some((before, after))
}

/// Why a message is not found, and what to do.
fn lost(turn: usize) -> String {
    format!(
        "message {}: --mask-prompt cannot find it, as the chat template renders what comes up to it \
         otherwise alone than in the whole: end the conversation with it, or put {{% generation %}} \
         around what the template writes of an answer, and give that as --template",
        turn + 1
    )
}

/// Where a turn ends: after its last end-of-sequence token, unless more than blanks follow.
fn turn_end(text: &Text, tokens: &[u32], start: usize, end: usize) -> anyhow::Result<usize> {
    let ends = |id| text.eos_ids().contains(id);
    let Some(last) = tokens[start..end].iter().rposition(ends) else { return Ok(end) };
    let after = start + last + 1;
    let blank = text.decode(&tokens[after..end], false)?.trim().is_empty();
    Ok(if blank { after } else { end })
}
