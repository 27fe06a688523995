//! What a file of training data holds.

use std::collections::BTreeSet;

use minijinja::Value;

use super::{
    formats::{Conversation, Document, Pair, document},
    records::Kind,
};

/// One text, or documents of one kind, each with the number of its line, from 1.
#[derive(Debug, PartialEq)]
pub(super) enum Documents<'a> {
    Plain(&'a str),
    Texts(Vec<(usize, String)>),
    Pairs(Vec<(usize, Pair)>),
    Conversations(Vec<(usize, Conversation)>),
}

/// What was found in a file.
#[derive(Debug, PartialEq)]
pub(super) struct Found<'a> {
    pub(super) documents: Documents<'a>,
    /// How its records are read, for a report; plain text needs no words.
    pub(super) format: Option<&'static str>,
    /// Columns that change nothing.
    pub(super) ignored: BTreeSet<String>,
}

impl<'a> Found<'a> {
    /// Takes `bytes` apart; the error says what is wrong with them.
    pub(super) fn parse(bytes: &'a [u8], kind: Kind) -> Result<Self, String> {
        let text = str::from_utf8(bytes).map_err(|e| {
            let (at, line) = (e.valid_up_to(), line_of(bytes, e.valid_up_to()));
            format!("line {line}: is not UTF-8 (byte {at} of the file)")
        })?;
        let empty = || "is empty: there is no text in it".to_string();
        if text.trim().is_empty() {
            return Err(empty());
        }
        kind.check(text)?;
        if kind == Kind::Text {
            let (documents, ignored) = (Documents::Plain(text), BTreeSet::new());
            return Ok(Self { documents, format: None, ignored });
        }
        let records = kind.records(text)?;
        if records.is_empty() {
            return Err(empty());
        }
        Self::of(records)
    }

    fn of(records: Vec<(usize, Value)>) -> Result<Self, String> {
        let (mut texts, mut pairs, mut conversations) = (vec![], vec![], vec![]);
        let (mut ignored, mut format) = (BTreeSet::new(), None);
        for (line, record) in records {
            let read = document(&record, &mut ignored);
            let (found, document) = read.map_err(|why| format!("line {line}: {why}"))?;
            let before = *format.get_or_insert(found);
            if before != found {
                return Err(format!(
                    "line {line}: is of another kind than those before: {found}, not {before}"
                ));
            }
            match document {
                Document::Text(text) => texts.push((line, text)),
                Document::Pair(pair) => pairs.push((line, pair)),
                Document::Conversation(conversation) => conversations.push((line, conversation)),
            }
        }
        let documents = match (texts.is_empty(), pairs.is_empty()) {
            (false, _) => Documents::Texts(texts),
            (true, false) => Documents::Pairs(pairs),
            (true, true) => Documents::Conversations(conversations),
        };
        Ok(Self { documents, format, ignored })
    }
}

/// The number, from 1, of the line that byte `at` is in.
fn line_of(bytes: &[u8], at: usize) -> usize {
    1 + bytes[..at].iter().filter(|&&byte| byte == b'\n').count()
}
