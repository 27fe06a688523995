//! What a page is made of. The template gives each of these its markup, and escapes all text.

use serde::Serialize;

use super::chart::Chart;
use crate::report::figures::{bytes, digits, human, percent, signed};

/// One report.
#[derive(Debug, Serialize)]
pub struct Section {
    /// What was done, as a heading.
    pub title: String,
    /// With which model.
    pub model: String,
    /// What was run, and how it was counted.
    pub about: Vec<String>,
    /// The file that holds the figures.
    pub file: String,
    /// What the reader wants to know first.
    pub verdicts: Vec<Verdict>,
    /// The figures worth a glance.
    pub figures: Vec<Figure>,
    /// All else, in reading order.
    pub blocks: Vec<Block>,
}

impl Section {
    /// Bad if any verdict is.
    pub fn tone(&self) -> Tone {
        let has = |tone| self.verdicts.iter().any(|verdict| verdict.tone == tone);
        match (has(Tone::Bad), has(Tone::Good)) {
            (true, _) => Tone::Bad,
            (false, true) => Tone::Good,
            (false, false) => Tone::Plain,
        }
    }
}

/// How a verdict looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Tone {
    /// As it should be.
    Good,
    /// Not as it should be.
    Bad,
    /// A statement.
    Plain,
}

/// One answer.
#[derive(Debug, Serialize)]
pub struct Verdict {
    /// How it looks.
    pub tone: Tone,
    /// The answer.
    pub text: String,
    /// What it rests on.
    pub detail: String,
}

impl Verdict {
    /// Good or bad.
    pub fn of(good: bool, text: impl Into<String>, detail: impl Into<String>) -> Self {
        let tone = if good { Tone::Good } else { Tone::Bad };
        Self { tone, text: text.into(), detail: detail.into() }
    }

    /// A statement.
    pub fn plain(text: impl Into<String>, detail: impl Into<String>) -> Self {
        Self { tone: Tone::Plain, text: text.into(), detail: detail.into() }
    }
}

/// A figure with its name.
#[derive(Debug, Serialize)]
pub struct Figure {
    /// Its name.
    pub name: String,
    /// The figure, for people.
    pub value: String,
    /// Its unit.
    pub unit: String,
    /// The exact integer, or where the figure comes from.
    pub note: String,
}

impl Figure {
    /// A figure, its unit and a note.
    pub fn new(name: &str, value: impl Into<String>, unit: &str, note: impl Into<String>) -> Self {
        Self { name: name.into(), value: value.into(), unit: unit.into(), note: note.into() }
    }

    /// A large number: its SI prefix joins the unit.
    pub fn large(name: &str, n: f64, unit: &str, note: impl Into<String>) -> Self {
        let text = human(n);
        let (value, prefix) = text.split_once(' ').unwrap_or((&text, ""));
        Self::new(name, value, &format!("{prefix}{unit}"), note)
    }

    /// An exact count, which stands below its short form.
    pub fn exact(name: &str, n: u128, unit: &str) -> Self {
        Self::large(name, n as f64, unit, if n < 1000 { String::new() } else { digits(n) })
    }
}

/// A part of a section.
#[derive(Debug, Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Block {
    /// A chart.
    Chart(Chart),
    /// A table.
    Table(Table),
    /// Text that a model wrote, as it stands.
    Text(Text),
    /// Sentences.
    Notes(Notes),
}

/// Text that a model wrote.
#[derive(Debug, Serialize)]
pub struct Text {
    /// Its heading.
    pub title: String,
    /// Where it came from and how it ended.
    pub note: String,
    /// The text.
    pub text: String,
}

/// Sentences, each under a name.
#[derive(Debug, Serialize)]
pub struct Notes {
    /// Their heading.
    pub title: String,
    /// Name and sentence.
    pub notes: Vec<(String, String)>,
}

/// A table, which a reader can sort and copy.
#[derive(Debug, Serialize)]
pub struct Table {
    /// Its heading.
    pub title: String,
    /// Names of the columns.
    pub head: Vec<String>,
    /// How many of the first columns hold words; the others hold figures.
    pub words: usize,
    /// The rows.
    pub rows: Vec<Vec<Cell>>,
    /// The sum of the rows; stays last.
    pub foot: Option<Vec<Cell>>,
}

impl Table {
    /// An empty table.
    pub fn new<S: Into<String>>(
        title: &str,
        words: usize,
        head: impl IntoIterator<Item = S>,
    ) -> Self {
        let head = head.into_iter().map(Into::into).collect();
        Self { title: title.into(), head, words, rows: vec![], foot: None }
    }
}

/// A cell.
#[derive(Debug, Clone, Serialize)]
pub struct Cell {
    /// What is read.
    pub text: String,
    /// What is sorted by and copied, where that is another: the plain number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub value: Option<String>,
    /// What a pointer shows: the exact figure, where the text rounds it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exact: Option<String>,
}

impl Cell {
    /// Words.
    pub fn word(text: impl Into<String>) -> Self {
        Self { text: text.into(), value: None, exact: None }
    }

    /// Nothing to say.
    pub fn none() -> Self {
        Self::word("–")
    }

    /// An exact count with all its digits.
    pub fn count(n: u128) -> Self {
        Self { text: digits(n), value: Some(n.to_string()), exact: None }
    }

    /// A difference with all its digits and its sign.
    pub fn signed(n: i128) -> Self {
        Self { text: signed(n).replace('-', "−"), value: Some(n.to_string()), exact: None }
    }

    /// A sum that may have passed below zero.
    pub fn total(n: i128) -> Self {
        let text = signed(n).trim_start_matches('+').replace('-', "−");
        Self { text, value: Some(n.to_string()), exact: None }
    }

    /// An exact count in short, its digits on hover.
    pub fn short(n: u128) -> Self {
        let exact = (n >= 1000).then(|| digits(n));
        Self { text: human(n as f64), value: Some(n.to_string()), exact }
    }

    /// Bytes in short, their digits on hover.
    pub fn bytes(n: u128) -> Self {
        let exact = Some(format!("{} bytes", digits(n)));
        Self { text: bytes(n as f64), value: Some(n.to_string()), exact }
    }

    /// A part of a whole.
    pub fn share(part: f64) -> Self {
        let text = format!("{:.2} %", 100.0 * part).replace('-', "−");
        Self { text, value: Some(part.to_string()), exact: Some(percent(part)) }
    }

    /// A figure already in words; all its digits, in `unit`, on hover.
    pub fn figure(x: f64, text: impl Into<String>, unit: &str) -> Self {
        let exact = format!("{} {unit}", plain(x)).trim_end().replace('-', "−");
        Self { text: text.into(), value: Some(x.to_string()), exact: Some(exact) }
    }
}

/// As many digits as tell `x` from any other number; with an exponent where zeros would be many.
fn plain(x: f64) -> String {
    match x.abs() {
        size if size == 0.0 || (1e-6..1e21).contains(&size) => x.to_string(),
        _ => format!("{x:e}"),
    }
}

/// `part` of `whole`; 0 of nothing.
pub fn ratio(part: u128, whole: u128) -> f64 {
    part as f64 / whole.max(1) as f64
}

/// A sum that a file's figures cannot make fail.
pub fn total(parts: impl Iterator<Item = u128>) -> u128 {
    parts.fold(0, u128::saturating_add)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rounded_figure_keeps_its_digits_and_unit() {
        let exact = |x: f64, unit: &str| Cell::figure(x, "about", unit).exact.unwrap();
        assert_eq!(exact(0.0544971595, "s"), "0.0544971595 s");
        assert_eq!(exact(18331570033.48037, "FLOP/s"), "18331570033.48037 FLOP/s");
        assert_eq!(exact(-1.8655602768701922e-7, "s"), "−1.8655602768701922e−7 s");
        assert_eq!(exact(0.0, ""), "0");
    }
}
