//! Tokens of a file, kept for later runs.
//!
//! ```text
//! magic (8 bytes) · key · tokens · rows (u64 each)
//! the tokens (u32 each) · whether each counts (u8 each) · the rows (u64 start, u64 end each)
//! a hash (u64) of all that; integers are little-endian
//! ```

use std::{
    fs,
    hash::{Hash, Hasher},
    io::{self, Write},
    ops::Range,
    path::{Path, PathBuf},
};

use fnv::FnvHasher;

use super::{Dataset, Notes};
use crate::{target::temporary_beside, weights};

/// Names the format and its version.
const MAGIC: &[u8; 8] = b"fadata-2";

/// Where the tokens of one file, tokenized in one way, are kept.
#[derive(Debug)]
pub(super) struct Entry {
    file: PathBuf,
    key: u64,
    seq: usize,
}

impl Entry {
    /// The entry in `dir` for rows of `seq`, packed or not, and all else that they depend on.
    pub(super) fn new(dir: &Path, (seq, packing): (usize, bool), source: impl Hash) -> Self {
        let key = hash((MAGIC, seq, packing, source));
        Self { file: dir.join(format!("{key:016x}.tokens")), key, seq }
    }

    /// What is kept; `None` if it is nothing, damaged or another's.
    pub(super) fn read(&self) -> Option<Dataset> {
        decode(&fs::read(&self.file).ok()?, self.key, self.seq)
    }

    /// Keeps `dataset`, whole or not at all.
    pub(super) fn write(&self, dataset: &Dataset) -> io::Result<()> {
        let dir = self.file.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(dir)?;
        let mut file = temporary_beside(&self.file)?;
        file.write_all(&encode(dataset, self.key))?;
        file.persist(&self.file).map_err(|e| e.error)?;
        Ok(())
    }
}

fn hash(value: impl Hash) -> u64 {
    let mut hasher = FnvHasher::default();
    value.hash(&mut hasher);
    hasher.finish()
}

/// Tells datasets of other tokens, rows or weights apart, whatever build asks.
pub(super) fn fingerprint(dataset: &Dataset) -> u64 {
    let mut bytes = encode(dataset, 0);
    bytes.extend((dataset.seq as u64).to_le_bytes());
    weights::fingerprint(&bytes)
}

fn encode(dataset: &Dataset, key: u64) -> Vec<u8> {
    let Dataset { tokens, counted, rows, .. } = dataset;
    let mut out = MAGIC.to_vec();
    for n in [key, tokens.len() as u64, rows.len() as u64] {
        out.extend(n.to_le_bytes());
    }
    out.extend(tokens.iter().flat_map(|id| id.to_le_bytes()));
    out.extend(counted.iter().map(|&counts| u8::from(counts)));
    let ends = rows.iter().flat_map(|row| [row.start as u64, row.end as u64]);
    out.extend(ends.flat_map(u64::to_le_bytes));
    out.extend(hash(&out).to_le_bytes());
    out
}

fn decode(bytes: &[u8], key: u64, seq: usize) -> Option<Dataset> {
    let (body, sum) = bytes.split_last_chunk()?;
    let mut rest = body.strip_prefix(MAGIC)?;
    let intact = hash(body) == u64::from_le_bytes(*sum) && number(&mut rest)? == key;
    intact.then_some(())?;
    let tokens = usize::try_from(number(&mut rest)?).ok()?;
    let rows = usize::try_from(number(&mut rest)?).ok()?;

    let ids = rest.split_off(..tokens.checked_mul(4)?)?.as_chunks().0;
    let counted = rest.split_off(..tokens)?;
    let ends = rest.split_off(..rows.checked_mul(16)?)?.as_chunks().0;
    let row = |[start, end]: &[[u8; 8]; 2]| {
        let start = usize::try_from(u64::from_le_bytes(*start)).ok()?;
        let end = usize::try_from(u64::from_le_bytes(*end)).ok()?;
        let fed = end.checked_sub(start)?.checked_sub(1)?;
        (end <= tokens && (1..=seq).contains(&fed)).then_some(start..end)
    };
    let rows: Vec<Range<usize>> = ends.as_chunks().0.iter().map(row).collect::<Option<_>>()?;
    (rest.is_empty() && !rows.is_empty()).then(|| Dataset {
        seq,
        tokens: ids.iter().map(|id| u32::from_le_bytes(*id)).collect(),
        counted: counted.iter().map(|&counts| counts != 0).collect(),
        rows,
        notes: Notes::default(),
    })
}

/// Takes the next number off `rest`.
fn number(rest: &mut &[u8]) -> Option<u64> {
    let (head, tail) = rest.split_first_chunk()?;
    *rest = tail;
    Some(u64::from_le_bytes(*head))
}

#[cfg(test)]
mod tests {
    use std::iter;

    use super::*;

    fn dataset() -> Dataset {
        let counted = vec![true, false, true, true, false];
        let (tokens, rows) = (vec![7, 0, u32::MAX, 9, 1], vec![0..2, 1..5]);
        Dataset { seq: 3, tokens, counted, rows, notes: Notes::default() }
    }

    #[test]
    fn what_is_kept_comes_back() {
        let bytes = encode(&dataset(), 42);
        assert_eq!(decode(&bytes, 42, 3), Some(dataset()));
        assert_eq!(decode(&bytes, 43, 3), None);
        // Rows of another length, though the key says that they are these.
        assert_eq!(decode(&bytes, 42, 2), None);
    }

    #[test]
    fn damage_is_noticed() {
        let bytes = encode(&dataset(), 42);
        for length in 0..bytes.len() {
            assert_eq!(decode(&bytes[..length], 42, 3), None, "{length} bytes");
        }
        for at in 0..bytes.len() {
            let mut bytes = bytes.clone();
            bytes[at] ^= 1;
            assert_eq!(decode(&bytes, 42, 3), None, "byte {at}");
        }
        assert_eq!(decode(&[&bytes[..], &bytes].concat(), 42, 3), None);
    }

    #[test]
    fn an_entry_that_contradicts_itself_is_no_entry() {
        for (start, end) in [(2, 1), (3, 6), (0, 1), (0, 5), (usize::MAX, 2)] {
            let rows = iter::once(start..end).collect();
            let bytes = encode(&Dataset { rows, ..dataset() }, 42);
            assert_eq!(decode(&bytes, 42, 3), None);
        }
        let (rows, counted) = (vec![], vec![true; 4]);
        assert_eq!(decode(&encode(&Dataset { rows, ..dataset() }, 42), 42, 3), None);
        assert_eq!(decode(&encode(&Dataset { counted, ..dataset() }, 42), 42, 3), None);
    }
}
