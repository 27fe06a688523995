//! What kind of file it is, and the records that it holds.

use std::path::Path;

use minijinja::Value;
use serde::de::IgnoredAny;
use serde_json::{Deserializer, error::Category};

/// How a file is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    /// One plain text.
    Text,
    /// A record a line.
    Lines,
    /// A list of records, or records one after another.
    Json,
}

const TABLE: &str = "is no text: write it as JSON lines first, for example with pandas' \
                     `to_json(file, orient='records', lines=True)`";
const PACKED: &str = "is compressed: unpack it first";
const BINARY: &str = "holds no text";
const DOCUMENT: &str = "is no plain text: write its text as .txt first";

/// Extensions that are read as records.
const RECORDS: [(&str, Kind); 5] = [
    ("jsonl", Kind::Lines),
    ("ndjson", Kind::Lines),
    ("jsonlines", Kind::Lines),
    ("jl", Kind::Lines),
    ("json", Kind::Json),
];

/// Extensions of files that would be read as something that they are not, and why.
const REFUSED: [(&[&str], &str); 4] = [
    (
        &[
            "parquet", "arrow", "feather", "orc", "avro", "csv", "tsv", "xls", "xlsx", "ods", "db",
            "sqlite", "sqlite3",
        ],
        TABLE,
    ),
    (&["gz", "tgz", "bz2", "xz", "zst", "lz4", "zip", "7z", "tar", "rar"], PACKED),
    (
        &["bin", "pt", "pth", "pkl", "npy", "npz", "h5", "hdf5", "tfrecord", "safetensors", "gguf"],
        BINARY,
    ),
    (&["pdf", "doc", "docx", "odt", "epub", "rtf"], DOCUMENT),
];

/// How such files begin, whatever they are called.
const MAGIC: [(&[u8], &str, &str); 8] = [
    (b"PAR1", "a parquet file", TABLE),
    (b"ARROW1", "an Arrow file", TABLE),
    (b"\x1f\x8b", "a gzip file", PACKED),
    (b"BZh", "a bzip2 file", PACKED),
    (b"\xfd7zXZ\0", "an xz file", PACKED),
    (b"\x28\xb5\x2f\xfd", "a zstd file", PACKED),
    (b"PK\x03\x04", "a zip file", PACKED),
    (b"%PDF-", "a PDF file", DOCUMENT),
];

impl Kind {
    /// What `file` with this content is; the error says what to do with it instead.
    pub(super) fn of(file: &Path, bytes: &[u8]) -> Result<Self, String> {
        let extension = file.extension().unwrap_or_default().to_string_lossy().to_lowercase();
        let refused = REFUSED.iter().find(|(names, _)| names.contains(&extension.as_str()));
        if let Some((_, why)) = refused {
            return Err(format!("a .{extension} file {why}"));
        }
        if let Some((_, what, why)) = MAGIC.iter().find(|(magic, ..)| bytes.starts_with(magic)) {
            return Err(format!("{what} {why}"));
        }
        if let Some(at) = bytes.iter().position(|&byte| byte == 0) {
            return Err(format!(
                "holds a NUL byte (byte {at}), as binary files and UTF-16 do: write it as UTF-8 text"
            ));
        }
        let known = RECORDS.iter().find(|(name, _)| *name == extension);
        Ok(known.map_or(Self::Text, |(_, kind)| *kind))
    }

    /// Refuses plain text that begins with a JSON object, or with a list of them, on lines of its own.
    ///
    /// A run would learn the braces and keys of such records. What merely begins with a brace or a
    /// bracket, as code and prose do, is text.
    pub(super) fn check(self, text: &str) -> Result<(), String> {
        let inside = text.trim_start();
        let begins = |open: char, then: char| {
            inside.strip_prefix(open).is_some_and(|rest| rest.trim_start().starts_with(then))
        };
        if self != Self::Text || !(begins('{', '"') || begins('[', '{')) {
            return Ok(());
        }
        let mut values = Deserializer::from_str(inside).into_iter::<IgnoredAny>();
        let parses = values.next().is_some_and(|value| value.is_ok());
        let line = inside[values.byte_offset()..].lines().next().unwrap_or_default();
        match parses && line.trim().is_empty() {
            true => Err("holds records of JSON, and a file of this name is read as plain text: \
                         name it .jsonl (a record a line) or .json"
                .into()),
            false => Ok(()),
        }
    }

    /// The records of a text, each with the number of its first line, from 1; none of plain text.
    pub(super) fn records(self, text: &str) -> Result<Vec<(usize, Value)>, String> {
        match self {
            Self::Text => Ok(vec![]),
            Self::Lines => {
                let lines = (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty());
                lines.map(|(line, json)| Ok((line, one(line, json)?))).collect()
            }
            Self::Json => Json { text, at: 0 }.records(),
        }
    }
}

/// One line's record.
fn one(line: usize, json: &str) -> Result<Value, String> {
    serde_json::from_str(json).map_err(|error| {
        let (message, column) = (message(&error), error.column());
        match error.classify() {
            Category::Eof => {
                format!("line {line}: not valid JSON: {message}: the line ends in the middle")
            }
            _ => format!("line {line}: not valid JSON: {message} (column {column})"),
        }
    })
}

/// The parser's message without the place that it gives.
fn message(error: &serde_json::Error) -> String {
    let message = error.to_string();
    let suffix = format!(" at line {} column {}", error.line(), error.column());
    message.strip_suffix(&suffix).unwrap_or(&message).to_string()
}

/// A JSON file, read from `at` on.
struct Json<'a> {
    text: &'a str,
    at: usize,
}

impl Json<'_> {
    /// The items of a list, or values with nothing but blanks between them.
    fn records(mut self) -> Result<Vec<(usize, Value)>, String> {
        let mut records = vec![];
        if self.next() != Some('[') {
            while self.next().is_some() {
                records.push(self.value()?);
            }
            return Ok(records);
        }
        self.at += 1;
        while self.next() != Some(']') {
            if !records.is_empty() {
                self.comma()?;
            }
            records.push(self.value()?);
        }
        self.at += 1;
        match self.next() {
            None => Ok(records),
            Some(_) => Err(format!("line {}: not valid JSON: more after the list", self.line())),
        }
    }

    /// The next character that is no blank.
    fn next(&mut self) -> Option<char> {
        let rest = &self.text[self.at..];
        self.at = self.text.len() - rest.trim_start().len();
        self.text[self.at..].chars().next()
    }

    fn comma(&mut self) -> Result<(), String> {
        if self.next() != Some(',') {
            let line = self.line();
            return Err(format!("line {line}: not valid JSON: expected `,` or `]` after an item"));
        }
        self.at += 1;
        self.next();
        Ok(())
    }

    fn value(&mut self) -> Result<(usize, Value), String> {
        let line = self.line();
        let mut values = Deserializer::from_str(&self.text[self.at..]).into_iter();
        match values.next() {
            Some(Ok(value)) => {
                self.at += values.byte_offset();
                Ok((line, value))
            }
            Some(Err(error)) => {
                let line = line + error.line().saturating_sub(1);
                Err(format!("line {line}: not valid JSON: {}", message(&error)))
            }
            None => Err(format!("line {line}: not valid JSON: the file ends in the middle")),
        }
    }

    /// The number of the line that is read, from 1.
    fn line(&self) -> usize {
        1 + self.text[..self.at].matches('\n').count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(kind: Kind, text: &str) -> Result<Vec<usize>, String> {
        kind.records(text).map(|records| records.into_iter().map(|(line, _)| line).collect())
    }

    #[test]
    fn a_json_file_is_a_list_or_records_one_after_another() {
        for (text, expected) in [
            ("[{\"a\": 1},\n {\"a\":\n 2}, {\"a\": 3}]\n", vec![1, 2, 3]),
            ("[]", vec![]),
            ("{\"a\":\n[1]}", vec![1]),
            ("{\"a\": 1}\n{\"a\": 2}\n", vec![1, 2]),
        ] {
            assert_eq!(lines(Kind::Json, text), Ok(expected), "{text}");
        }
        for (text, why) in [
            ("[1,\n 2", "line 2: not valid JSON: expected `,` or `]` after an item"),
            ("[1,\n]", "line 2: not valid JSON: expected value"),
            ("[1]\nx", "line 2: not valid JSON: more after the list"),
            ("[1,", "line 1: not valid JSON: the file ends in the middle"),
            ("[{\n\"a\" 1}]", "line 2: not valid JSON: expected `:`"),
        ] {
            assert_eq!(lines(Kind::Json, text), Err(why.into()), "{text}");
        }
    }

    #[test]
    fn files_are_told_apart_by_name_and_by_how_they_begin() {
        let of = |name: &str, bytes: &[u8]| Kind::of(Path::new(name), bytes);
        assert_eq!(of("a.JSONL", b"{}"), Ok(Kind::Lines));
        assert_eq!(of("a.json", b"{}"), Ok(Kind::Json));
        assert_eq!(of("a", b"x"), Ok(Kind::Text));
        assert!(of("a.Parquet", b"x").unwrap_err().starts_with("a .parquet file is no text"));
        assert!(of("a.jsonl.gz", b"x").unwrap_err().ends_with("is compressed: unpack it first"));
        assert!(of("a.jsonl", b"PAR1x").unwrap_err().starts_with("a parquet file is no text"));
    }
}
