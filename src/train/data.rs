//! Training data: a file of text or of conversations, as rows of tokens.
//!
//! ```text
//! file ─> documents ─> tokens, and which of them count ─> rows ─> passes, in a seeded order
//! ```

mod cache;
mod columns;
mod conversation;
mod documents;
mod formats;
mod order;
mod passes;
mod records;
mod spans;
mod turns;
mod unread;

use std::{
    collections::BTreeSet,
    ops::Range,
    path::{Path, PathBuf},
};

use rayon::prelude::*;

use crate::{
    config::Ignored,
    error::{Error, Result},
    input::read_bytes,
    model::Labelled,
    text::{Chat, Text},
};
use {
    cache::Entry,
    conversation::{tokenize, tokenize_pair},
    documents::{Documents, Found},
    formats::Document,
    records::Kind,
    unread::unread,
};

pub use order::Order;
pub use passes::Passes;

/// How a file becomes rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Tokens that a row feeds, at least 1.
    pub seq: usize,
    /// Of conversations only what the assistant says counts, of prompts with completions the latter.
    pub mask_prompt: bool,
    /// Documents are to be packed: none goes on in the row of another.
    pub packing: bool,
    /// A directory that keeps the tokens of files for later runs.
    pub cache: Option<PathBuf>,
}

/// Rows, each fed to predict, at every position, the token after.
///
/// A row holds 2 to `seq` + 1 tokens: all but the last are fed, all but the first are predicted.
/// In a pass with longer ones it is padded at the right, where nothing counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dataset {
    seq: usize,
    tokens: Vec<u32>,
    /// For each token, whether its prediction counts.
    counted: Vec<bool>,
    /// Where in `tokens` each row lies.
    rows: Vec<Range<usize>>,
    notes: Notes,
}

/// How a file was read, and what of it was not.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Notes {
    /// The form that its records have, after the file's name; `None` for plain text.
    pub form: Option<String>,
    /// Its columns that change nothing.
    pub ignored: Vec<Ignored>,
}

/// Rows as a model takes them; each vector is `rows` × `seq`, row after row. Where they are packed,
/// they lie one behind the other in one row, which no padding is in.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    /// Tokens to feed; padding is 0.
    pub ids: Vec<u32>,
    /// Tokens to predict; padding is 0.
    pub targets: Vec<u32>,
    /// 1 where the prediction counts, else 0, as in padding.
    pub weights: Vec<f32>,
    /// Number of rows.
    pub rows: usize,
    /// Positions of a row: those of the longest.
    pub seq: usize,
    /// Positions of each sequence, where they are packed into one row.
    pub sequences: Option<Vec<usize>>,
}

impl Batch {
    /// The same as a model takes it.
    pub fn labelled(&self) -> Labelled<'_> {
        let Self { ids, targets, weights, rows, sequences, .. } = self;
        Labelled { ids, targets, weights, batch: *rows, sequences: sequences.as_deref() }
    }

    /// Places of `rows` × `seq` tokens, of which none counts yet.
    fn empty(rows: usize, seq: usize) -> Self {
        let (ids, targets, weights) =
            (vec![0; rows * seq], vec![0; rows * seq], vec![0.0; rows * seq]);
        Self { ids, targets, weights, rows, seq, sequences: None }
    }
}

impl Dataset {
    /// Reads and tokenizes `file`.
    ///
    /// With the extension `jsonl` or `ndjson`, each line that is not blank is a record; a `json` file
    /// is a list of them, or one after another; any other file is one plain text. Records are of one
    /// of the forms that docs/training.md lists.
    ///
    /// - Text: one stream of tokens cut into rows, each beginning with the token that the one
    ///   before predicted last. Documents come one after another, each with the tokens that the
    ///   checkpoint puts around a text, and ended by its end-of-sequence token, if it has one. Where
    ///   they are to be packed, each document is a stream of its own.
    /// - Conversations: one row each, as the checkpoint's chat template renders it.
    /// - Prompts with completions: one row each, ended as documents are.
    ///
    /// A cache that cannot be read or written is no error: the file is tokenized anew.
    ///
    /// # Errors
    /// A file that cannot be read, is not UTF-8, is blank, holds a single token or is of a kind that
    /// is no text; plain text that begins with a record of JSON; a record that is no such document,
    /// that has a column which would change what is learnt and is not supported, or that is of
    /// another kind than those before; a conversation that the template refuses, that is longer than
    /// a row, or in which nothing counts; `mask_prompt` with plain text.
    pub fn load(file: &Path, text: &Text, options: &Options) -> Result<Self> {
        if options.seq == 0 {
            return Err(Error::flag("--seq", "must be at least 1").into());
        }
        let fail = |why: String| Error::File { file: file.into(), why };
        let bytes = read_bytes(file).map_err(|e| fail(e.to_string()))?;
        let kind = Kind::of(file, &bytes).map_err(fail)?;
        let found = Found::parse(&bytes, kind).map_err(fail)?;
        if options.mask_prompt
            && matches!(found.documents, Documents::Plain(_) | Documents::Texts(_))
        {
            let why = format!(
                "{} holds text; only conversations and completions have prompts",
                file.display()
            );
            return Err(Error::flag("--mask-prompt", why).into());
        }
        let name = file.display().to_string();
        let listed = |columns: BTreeSet<String>, why: &'static str| {
            let entry = |column| Ignored::new(&name, column, why);
            columns.into_iter().map(entry).collect::<Vec<_>>()
        };
        let mut ignored = listed(found.ignored, "a column that changes nothing of what is learnt");
        if let Documents::Conversations(conversations) = &found.documents {
            let unread = unread(conversations, text);
            ignored.extend(listed(unread, "the chat template does not read it"));
        }
        let form = found.format.map(|form| format!("{name}: read as {form}"));
        let notes = Notes { form, ignored };
        let entry = match &options.cache {
            Some(dir) => {
                let source = (&bytes, kind, options.mask_prompt, text.fingerprint()?);
                Some(Entry::new(dir, (options.seq, options.packing), source))
            }
            None => None,
        };
        if let Some(dataset) = entry.as_ref().and_then(Entry::read) {
            return Ok(Self { notes, ..dataset });
        }
        let dataset = Self::tokenize(&found.documents, text, options).map_err(fail)?;
        if let Some(entry) = entry {
            // Without it, the next run tokenizes again.
            let _ = entry.write(&dataset);
        }
        Ok(Self { notes, ..dataset })
    }

    /// How the file was read, and what of it was not.
    pub fn notes(&self) -> &Notes {
        &self.notes
    }

    /// Tells datasets of other tokens, rows or weights apart.
    pub fn fingerprint(&self) -> u64 {
        cache::fingerprint(self)
    }

    fn tokenize(documents: &Documents, text: &Text, options: &Options) -> Result<Self, String> {
        match documents {
            Documents::Plain(plain) => {
                Self::windows(text.encode_raw(plain).map_err(why)?, options.seq)
            }
            Documents::Texts(texts) => {
                let documents =
                    each(texts, |document| text.encode_document(document).map_err(why))?;
                match options.packing {
                    true => Self::windows_of_each(documents, options.seq),
                    false => Self::windows(documents.concat(), options.seq),
                }
            }
            Documents::Pairs(pairs) => {
                Ok(Self::rows_of(each(pairs, |pair| tokenize_pair(pair, text, options))?, options))
            }
            Documents::Conversations(conversations) => {
                let rows = each(conversations, |chat| tokenize(chat, text, options))?;
                Ok(Self::rows_of(rows, options))
            }
        }
    }

    /// One row for each of these.
    fn rows_of(documents: Vec<conversation::Tokens>, options: &Options) -> Self {
        let (mut tokens, mut counted, mut rows) = (vec![], vec![], vec![]);
        for document in documents {
            let start = tokens.len();
            tokens.extend(document.tokens);
            counted.extend(document.counted);
            rows.push(start..tokens.len());
        }
        Self { seq: options.seq, tokens, counted, rows, notes: Notes::default() }
    }

    /// The same of each document by itself, of which one of a single token predicts nothing.
    fn windows_of_each(documents: Vec<Vec<u32>>, seq: usize) -> Result<Self, String> {
        let (mut all, mut rows) = (vec![], vec![]);
        for document in documents.into_iter().filter(|document| document.len() > 1) {
            let at = all.len();
            let cut = Self::windows(document, seq)?;
            rows.extend(cut.rows.into_iter().map(|row| at + row.start..at + row.end));
            all.extend(cut.tokens);
        }
        if rows.is_empty() {
            return Err("has no document of two tokens, one to feed and one to predict".into());
        }
        let counted = vec![true; all.len()];
        Ok(Self { seq, tokens: all, counted, rows, notes: Notes::default() })
    }

    /// Cuts a stream into rows that predict each token but the first once.
    fn windows(tokens: Vec<u32>, seq: usize) -> Result<Self, String> {
        let n = tokens.len();
        if n < 2 {
            return Err("makes fewer than two tokens, one to feed and one to predict".into());
        }
        let window = |start: usize| start..n.min(start.saturating_add(seq).saturating_add(1));
        let rows = (0..n - 1).step_by(seq).map(window).collect();
        Ok(Self { seq, tokens, counted: vec![true; n], rows, notes: Notes::default() })
    }

    /// Most positions of a row.
    pub fn seq(&self) -> usize {
        self.seq
    }

    /// Number of rows, at least 1.
    pub fn rows(&self) -> usize {
        self.rows.len()
    }

    /// Tokens that each row feeds.
    pub fn lengths(&self) -> Vec<u64> {
        self.rows.iter().map(|row| row.len() as u64 - 1).collect()
    }

    /// Tokens of the data, without padding.
    pub fn tokens(&self) -> usize {
        self.tokens.len()
    }

    /// Tokens whose prediction counts, over all rows.
    pub fn loss_tokens(&self) -> usize {
        let counted = self.rows.iter().flat_map(|row| &self.counted[row.start + 1..row.end]);
        counted.filter(|&&counts| counts).count()
    }

    /// The rows of these indices, each from 0 to below [`rows`](Self::rows), in this order, padded to
    /// the longest of them.
    ///
    /// # Panics
    /// With an index that is no row's.
    pub fn batch(&self, indices: &[usize]) -> Batch {
        let fed = |index: &usize| self.rows[*index].len() - 1;
        let seq = indices.iter().map(fed).max().unwrap_or(0);
        let mut batch = Batch::empty(indices.len(), seq);
        indices.iter().enumerate().for_each(|(row, &index)| self.put(&mut batch, index, row * seq));
        batch
    }

    /// The same rows one behind the other.
    ///
    /// # Panics
    /// As [`batch`](Self::batch).
    pub fn packed(&self, indices: &[usize]) -> Batch {
        let lengths: Vec<usize> = indices.iter().map(|&index| self.rows[index].len() - 1).collect();
        let mut batch = Batch::empty(1, lengths.iter().sum());
        let mut at = 0;
        for (&index, length) in indices.iter().zip(&lengths) {
            self.put(&mut batch, index, at);
            at += length;
        }
        Batch { sequences: Some(lengths), ..batch }
    }

    /// Puts a row into a batch from the place `at` on.
    fn put(&self, batch: &mut Batch, index: usize, at: usize) {
        let Range { start, end } = self.rows[index];
        let at = at..at + (end - start - 1);
        batch.ids[at.clone()].copy_from_slice(&self.tokens[start..end - 1]);
        batch.targets[at.clone()].copy_from_slice(&self.tokens[start + 1..end]);
        for (weight, counts) in batch.weights[at].iter_mut().zip(&self.counted[start + 1..end]) {
            *weight = f32::from(*counts);
        }
    }
}

/// The conversation that one record holds, a JSON object of `messages` or another form.
///
/// # Errors
/// What is no such record, or one that [`Dataset::load`] would refuse.
pub fn conversation(record: &str) -> Result<Chat> {
    let fail = |why: String| Error::Prompt(format!("the record {why}"));
    let record =
        serde_json::from_str(record).map_err(|e| fail(format!("is not valid JSON: {e}")))?;
    match formats::document(&record, &mut BTreeSet::new()).map_err(fail)?.1 {
        Document::Conversation(conversation) => Ok(conversation.chat),
        Document::Text(_) | Document::Pair(_) => Err(fail("holds no messages".into()).into()),
    }
}

/// `work` on each document, on all cores; the error is that of the first line that has one.
fn each<D: Sync, T: Send>(
    documents: &[(usize, D)],
    work: impl Fn(&D) -> Result<T, String> + Sync,
) -> Result<Vec<T>, String> {
    let work =
        |(line, document): &(usize, D)| work(document).map_err(|why| format!("line {line}: {why}"));
    let done: Vec<Result<T, String>> = documents.par_iter().map(work).collect();
    done.into_iter().collect()
}

/// What is wrong, without what it is wrong with: that is the file here.
fn why(error: anyhow::Error) -> String {
    match error.downcast() {
        Ok(Error::Prompt(why)) => why,
        Ok(other) => other.to_string(),
        Err(other) => format!("{other:#}"),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn row(dataset: &Dataset, index: usize) -> (Vec<u32>, Vec<u32>, Vec<f32>) {
        let Batch { ids, targets, weights, .. } = dataset.batch(&[index]);
        (ids, targets, weights)
    }

    #[test]
    fn windows_overlap_by_the_token_that_one_predicts_and_the_next_feeds() {
        let dataset = Dataset::windows(vec![5, 6, 7, 8, 9, 10], 3).unwrap();
        assert_eq!((dataset.rows(), dataset.tokens(), dataset.loss_tokens()), (2, 6, 5));
        assert_eq!(row(&dataset, 0), (vec![5, 6, 7], vec![6, 7, 8], vec![1.0; 3]));
        assert_eq!(row(&dataset, 1), (vec![8, 9], vec![9, 10], vec![1.0; 2]));
        let batch = dataset.batch(&[1, 0]);
        assert_eq!((batch.rows, batch.seq, batch.ids), (2, 3, vec![8, 9, 0, 5, 6, 7]));
        // What the last row predicts last needs no row of its own.
        assert_eq!(Dataset::windows(vec![5, 6, 7, 8], 3).unwrap().rows(), 1);
        let widest = Dataset::windows(vec![5, 6], usize::MAX).unwrap();
        assert_eq!((widest.rows(), widest.loss_tokens()), (1, 1));
    }

    #[test]
    fn the_first_line_at_fault_is_named() {
        let documents: Vec<(usize, usize)> = (1..500).map(|line| (line, line)).collect();
        let work = |&n: &usize| if n % 7 == 0 { Err(format!("{n}!")) } else { Ok(n) };
        assert_eq!(each(&documents, work), Err("line 7: 7!".into()));
        assert_eq!(each(&documents[..3], work), Ok(vec![1, 2, 3]));
    }

    #[test]
    fn a_valid_cache_entry_is_taken_at_its_word() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.txt");
        fs::write(&file, "abc").unwrap();
        let text = Text::bytes(256);
        let source = (b"abc".to_vec(), Kind::Text, false, text.fingerprint().unwrap());
        let entry = Entry::new(&dir.path().join("new/cache"), (4, false), source);
        let other = Dataset::windows(vec![1, 2, 3, 4, 5, 6], 4).unwrap();
        entry.write(&other).unwrap();
        let cache = Some(dir.path().join("new/cache"));
        let mut options = Options { seq: 4, mask_prompt: false, packing: false, cache };
        assert_eq!(Dataset::load(&file, &text, &options).unwrap(), other);
        options.seq = 2;
        assert_eq!(Dataset::load(&file, &text, &options).unwrap().tokens, b"abc".map(u32::from));
    }
}
