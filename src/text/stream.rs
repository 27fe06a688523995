//! Text as it is generated.

use super::Text;
use crate::error::Result;

/// Incremental decoding: text comes out as soon as it is whole characters.
#[derive(Debug)]
pub struct Stream<'a> {
    text: &'a Text,
    skip_special: bool,
    /// The last ids put out whole (decoders may look back at them), then those since.
    ids: Vec<u32>,
    /// Where the latter begin.
    read: usize,
    /// How many bytes of the text of `ids` are out.
    shown: usize,
}

impl<'a> Stream<'a> {
    pub(super) fn new(text: &'a Text, skip_special: bool) -> Self {
        Self { text, skip_special, ids: vec![], read: 0, shown: 0 }
    }

    /// Takes the next token; gives the text that is complete with it, if any.
    ///
    /// # Errors
    /// A decoder that fails.
    pub fn push(&mut self, id: u32) -> Result<Option<String>> {
        self.ids.push(id);
        let text = self.text.decode(&self.ids, self.skip_special)?;
        // A character that is cut decodes to U+FFFD at the end until the rest of it comes, and some
        // decoders spoil the bytes before it meanwhile. Four tokens hold the bytes of any: what is
        // cut for longer is none.
        let cut = text.strip_suffix(char::REPLACEMENT_CHARACTER);
        if cut.is_some() && self.ids.len() - self.read < 4 {
            return Ok(None);
        }
        let settled = cut.unwrap_or(&text);
        let new = settled.get(self.shown..).unwrap_or_default().to_string();
        if new.is_empty() {
            return Ok(None);
        }
        self.shown = settled.len();
        if settled.len() == text.len() {
            self.ids.drain(..self.read);
            self.read = self.ids.len();
            self.shown = self.text.decode(&self.ids, self.skip_special)?.len();
        }
        Ok(Some(new))
    }

    /// What is left when no more tokens come: a character that stayed cut, as U+FFFD.
    ///
    /// # Errors
    /// A decoder that fails.
    pub fn finish(self) -> Result<Option<String>> {
        let text = self.text.decode(&self.ids, self.skip_special)?;
        Ok(text.get(self.shown..).filter(|rest| !rest.is_empty()).map(str::to_string))
    }
}
