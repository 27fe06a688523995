//! Sequences of many lengths: how many there are of each, and how they come to rows.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    input::read_text,
};

/// How many sequences there are of each length. In JSON, a list of `[length, count]`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(from = "Vec<(u64, u64)>", into = "Vec<(u64, u64)>")]
pub struct Lengths(BTreeMap<u64, u64>);

impl Lengths {
    /// Adds `count` sequences of `length` tokens.
    pub fn add(&mut self, length: u64, count: u64) {
        if count > 0 {
            let sum = self.0.entry(length).or_insert(0);
            *sum = sum.saturating_add(count);
        }
    }

    /// Each length with its count, the shortest first.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.0.iter().map(|(length, count)| (*length, *count))
    }

    /// Σ count · f(length).
    pub fn sum(&self, f: impl Fn(u128) -> u128) -> u128 {
        self.iter().map(|(length, count)| u128::from(count) * f(length.into())).sum()
    }

    /// How many sequences there are.
    pub fn count(&self) -> u128 {
        self.sum(|_| 1)
    }

    /// Tokens of all of them.
    pub fn tokens(&self) -> u128 {
        self.sum(|length| length)
    }

    /// The shortest and the longest; none where there is no sequence.
    pub fn range(&self) -> Option<(u64, u64)> {
        Some((*self.0.first_key_value()?.0, *self.0.last_key_value()?.0))
    }
}

impl From<Vec<(u64, u64)>> for Lengths {
    fn from(pairs: Vec<(u64, u64)>) -> Self {
        let mut lengths = Self::default();
        pairs.into_iter().for_each(|(length, count)| lengths.add(length, count));
        lengths
    }
}

impl From<Lengths> for Vec<(u64, u64)> {
    fn from(lengths: Lengths) -> Self {
        lengths.iter().collect()
    }
}

impl FromIterator<u64> for Lengths {
    fn from_iter<I: IntoIterator<Item = u64>>(lengths: I) -> Self {
        let mut all = Self::default();
        lengths.into_iter().for_each(|length| all.add(length, 1));
        all
    }
}

/// Most sequences that a file of lengths lists.
pub const MOST_SEQUENCES: usize = 10_000_000;

/// Reads a file of lengths, in their order: a length a line, or a length and how many times it
/// comes (`512 8`, `512,8` or `512 x 8`), or a JSON list of lengths. What follows `#` is no length.
///
/// # Errors
/// The file and the line at fault, a file without a length, or more than [`MOST_SEQUENCES`].
pub fn read_lengths(file: &Path) -> Result<Vec<u64>> {
    let fail = |why: String| Error::File { file: file.into(), why };
    let text = read_text(file).map_err(|e| fail(e.to_string()))?;
    Ok(parse_lengths(&text).map_err(fail)?)
}

fn parse_lengths(text: &str) -> std::result::Result<Vec<u64>, String> {
    let too_many = || format!("has more than {MOST_SEQUENCES} sequences");
    if text.trim_start().starts_with('[') {
        let listed: Vec<u64> =
            serde_json::from_str(text).map_err(|e| format!("is no JSON list of lengths: {e}"))?;
        return match listed.iter().position(|length| *length == 0) {
            Some(at) => Err(format!("entry {at} is 0 tokens long")),
            None if listed.is_empty() => Err("lists no length".into()),
            None if listed.len() > MOST_SEQUENCES => Err(too_many()),
            None => Ok(listed),
        };
    }
    let mut lengths = vec![];
    for (index, line) in text.lines().enumerate() {
        let line = line.split('#').next().unwrap_or_default();
        let bad = |why: &str| format!("line {}: `{}` {why}", index + 1, line.trim());
        // `LENGTH`, `LENGTH COUNT`, `LENGTH,COUNT` or `LENGTH x COUNT`.
        let words: Vec<&str> = match line.split_once([',', 'x']) {
            Some((length, count)) => vec![length.trim(), count.trim()],
            None => line.split_whitespace().collect(),
        };
        let numbers: std::result::Result<Vec<u64>, _> = words.into_iter().map(str::parse).collect();
        let (length, count) = match numbers.as_deref() {
            Ok([]) => continue,
            Ok([length]) => (*length, 1),
            Ok([length, count]) => (*length, *count),
            _ => return Err(bad("is no length, and no length with its count")),
        };
        if length == 0 {
            return Err(bad("is 0 tokens long"));
        }
        if count > (MOST_SEQUENCES - lengths.len()) as u64 {
            return Err(too_many());
        }
        lengths.extend(std::iter::repeat_n(length, count as usize));
    }
    match lengths.is_empty() {
        true => Err("lists no length".into()),
        false => Ok(lengths),
    }
}

/// How sequences of different lengths are fed together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
#[serde(rename_all = "lowercase")]
pub enum Layout {
    /// In their order, each batch as wide as its longest sequence.
    #[default]
    Padded,
    /// The same, sorted by length first, so that sequences of a batch are about as long.
    Bucketed,
    /// One behind the other in rows without padding; each attends to itself alone.
    Packed,
}

impl Layout {
    /// The layout of this name.
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "padded" => Some(Self::Padded),
            "bucketed" => Some(Self::Bucketed),
            "packed" => Some(Self::Packed),
            _ => None,
        }
    }
}

/// The order in which `lengths` are fed where they are bucketed: by length, equal ones as they come.
pub fn bucketed(lengths: &[u64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|&index| lengths[index]);
    order
}

/// Sequences of `lengths` as rows of at most `room` tokens: best fit decreasing. The longest comes
/// first, and each goes to the fullest row that has room for it. Rows come in the order of their
/// first sequences, and so do the sequences of a row.
///
/// # Errors
/// The index of a sequence longer than `room`.
pub fn packed(lengths: &[u64], room: u64) -> std::result::Result<Vec<Vec<usize>>, usize> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|&index| (Reverse(lengths[index]), index));
    let mut rows: Vec<Vec<usize>> = vec![];
    // Rows that are not full, by what is left in them.
    let mut left: BTreeSet<(u64, usize)> = BTreeSet::new();
    for index in order {
        let length = lengths[index];
        if length > room {
            return Err(index);
        }
        let fullest = left.range((length, 0)..).next().copied();
        let (free, row) = fullest.unwrap_or_else(|| {
            rows.push(vec![]);
            (room, rows.len() - 1)
        });
        left.remove(&(free, row));
        left.insert((free - length, row));
        rows[row].push(index);
    }
    rows.iter_mut().for_each(|row| row.sort_unstable());
    rows.sort_unstable();
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn files_of_lengths() {
        assert_eq!(
            parse_lengths("512\n\n 7 # short\n3 x 2\n4,1\n5\t2\n").unwrap(),
            [512, 7, 3, 3, 4, 5, 5]
        );
        assert_eq!(parse_lengths("[3, 1, 2]").unwrap(), [3, 1, 2]);
        for (text, why) in [
            ("", "lists no length"),
            ("# nothing", "lists no length"),
            ("[]", "lists no length"),
            ("[1, 0]", "entry 1 is 0 tokens long"),
            ("[1, -2]", "no JSON list"),
            ("7\nabc", "line 2: `abc` is no length"),
            ("-3", "line 1: `-3` is no length"),
            ("0", "line 1: `0` is 0 tokens long"),
            ("1 2 3", "line 1: `1 2 3` is no length"),
            ("5 x 99999999999", "more than 10000000 sequences"),
        ] {
            let error = parse_lengths(text).unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
    }

    #[test]
    fn packing_by_hand() {
        // 7 and 3 fill a row of 10; 6 and 4 the next; 5 begins one.
        assert_eq!(packed(&[3, 7, 4, 6, 5], 10).unwrap(), [vec![0, 1], vec![2, 3], vec![4]]);
        assert_eq!(packed(&[1, 11], 10), Err(1));
        assert!(packed(&[], 10).unwrap().is_empty());
    }

    proptest! {
        #[test]
        fn packed_rows_hold_every_sequence_once(
            lengths in prop::collection::vec(1u64..40, 0..60), more in 0u64..40,
        ) {
            let room = lengths.iter().copied().max().unwrap_or(1) + more;
            let rows = packed(&lengths, room).unwrap();
            let mut all: Vec<usize> = rows.concat();
            all.sort_unstable();
            prop_assert_eq!(all, (0..lengths.len()).collect::<Vec<_>>());
            let of = |row: &Vec<usize>| row.iter().map(|&i| lengths[i]).sum::<u64>();
            prop_assert!(rows.iter().all(|row| of(row) <= room));
            // No two rows would go into one: best fit leaves none that do.
            if let [.., a, b] = rows.as_slice() {
                prop_assert!(of(a) + of(b) > room);
            }
        }
    }
}
