//! Which tokens are what a template's generation blocks give.

use std::ops::Range;

use super::super::{Model, Text, first_line};
use crate::error::{Error, Result};

impl Text {
    /// For each token of `text`, whether it is in one of these parts, given in bytes, as
    /// transformers' `return_assistant_tokens_mask` has it: from the token of a part's first
    /// character to the first token of its last, both of them whole.
    ///
    /// # Errors
    /// Text that the tokenizer cannot take.
    pub(crate) fn within(&self, text: &str, parts: &[Range<usize>]) -> Result<Vec<bool>> {
        let tokens: Vec<Range<usize>> = match &self.model {
            Model::Bytes => (0..text.len()).map(|at| at..at + 1).collect(),
            Model::Tokenizer(tokenizer) => {
                let encoding = tokenizer.encode(text, false).map_err(|e| {
                    Error::Prompt(format!("cannot be tokenized: {}", first_line(&e)))
                })?;
                encoding.get_offsets().iter().map(|&(start, end)| start..end).collect()
            }
        };
        let mut within = vec![false; tokens.len()];
        let token_at = |byte: usize| tokens.iter().position(|token| token.contains(&byte));
        for part in parts {
            let starts = text[part.clone()].char_indices().map(|(at, _)| part.start + at);
            // Characters that a tokenizer drops are in no token.
            let first = starts.clone().find_map(token_at);
            let last = starts.rev().find_map(token_at);
            if let (Some(first), Some(last)) = (first, last) {
                within[first..=last.max(first)].fill(true);
            }
        }
        Ok(within)
    }
}
