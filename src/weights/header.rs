//! What candle's GGUF reader takes on trust, or reports by number: that the file is one at all, an
//! alignment that it divides by, and how tensors are stored.

use std::collections::HashSet;

/// Refuses a file that is no GGUF, or whose header would bring the reader down.
///
/// Anything else that is wrong (a cut-off value, an absurd length) ends the walk silently: the
/// reader reports it better.
///
/// # Errors
/// The rest of a sentence that begins with the file's name.
pub(super) fn check(file: &[u8]) -> Result<(), String> {
    match file.get(..4) {
        Some(b"GGUF") => {}
        _ if file.is_empty() => return Err("is empty, no GGUF file".into()),
        _ => return Err("is not a GGUF file: it does not begin with `GGUF`".into()),
    }
    Walk { rest: &file[4..], version: 0 }.header().unwrap_or(Ok(()))
}

/// How a file may store a tensor, by ggml's numbers, and the names of other ways.
const STORED: [u32; 13] = [0, 1, 2, 3, 6, 7, 8, 10, 11, 12, 13, 14, 30];
const OTHERS: [(u32, &str); 28] = [
    (4, "Q4_2"),
    (5, "Q4_3"),
    (9, "Q8_1"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (31, "Q4_0_4_4"),
    (32, "Q4_0_4_8"),
    (33, "Q4_0_8_8"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (36, "IQ4_NL_4_4"),
    (37, "IQ4_NL_4_8"),
    (38, "IQ4_NL_8_8"),
    (39, "MXFP4"),
    (40, "NVFP4"),
];

struct Walk<'a> {
    rest: &'a [u8],
    version: u32,
}

impl<'a> Walk<'a> {
    /// What is wrong with a header; `None` where it ends early.
    fn header(mut self) -> Option<Result<(), String>> {
        self.version = self.number()?;
        let tensors = self.length()?;
        let mut keys = HashSet::new();
        for _ in 0..self.length()? {
            let length = self.length()?;
            let key = self.take(length)?;
            if !keys.insert(key) {
                let key = String::from_utf8_lossy(key);
                return Some(Err(format!("malformed GGUF header: `{key}` is there twice")));
            }
            let is_alignment = key == b"general.alignment";
            let kind = self.number()?;
            let value = self.value(kind, 0)?;
            if is_alignment && value.iter().all(|byte| *byte == 0) {
                return Some(Err("malformed GGUF header: `general.alignment` is 0".into()));
            }
        }
        let mut names = HashSet::new();
        for _ in 0..tensors {
            let length = self.length()?;
            let name = self.take(length)?;
            let again = !names.insert(name);
            let name = String::from_utf8_lossy(name);
            if again {
                return Some(Err(format!("holds tensor `{name}` twice")));
            }
            for _ in 0..self.number()? {
                self.length()?;
            }
            let stored = self.number()?;
            if !STORED.contains(&stored) {
                let known = OTHERS.iter().find(|(number, _)| *number == stored);
                let how =
                    known.map_or_else(|| format!("type {stored}"), |(_, how)| how.to_string());
                return Some(Err(format!(
                    "tensor `{name}` is stored as {how}, which is not supported; quantize the \
                     model as Q8_0, Q6_K or Q4_K, say"
                )));
            }
            self.take(8)?;
        }
        Some(Ok(()))
    }

    fn take(&mut self, n: u64) -> Option<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(usize::try_from(n).ok()?)?;
        self.rest = rest;
        Some(taken)
    }

    /// A count or a tensor's dimension: 4 bytes in version 1, else 8.
    fn length(&mut self) -> Option<u64> {
        match self.version {
            1 => Some(u32::from_le_bytes(self.take(4)?.try_into().ok()?).into()),
            _ => Some(u64::from_le_bytes(self.take(8)?.try_into().ok()?)),
        }
    }

    fn number(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.take(4)?.try_into().ok()?))
    }

    /// Skips one value and returns its bytes, without those of an array's elements.
    fn value(&mut self, kind: u32, depth: usize) -> Option<&'a [u8]> {
        const STRING: u32 = 8;
        const ARRAY: u32 = 9;
        let width = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            10..=12 => 8,
            STRING => self.length()?,
            // The reader refuses arrays nested deeper than this.
            ARRAY if depth <= 64 => {
                let kind = self.number()?;
                let n = self.length()?;
                for _ in 0..n {
                    self.value(kind, depth + 1)?;
                }
                0
            }
            _ => return None,
        };
        self.take(width)
    }
}

#[cfg(test)]
mod tests {
    use super::check;

    fn header(version: u32, alignment: u32) -> Vec<u8> {
        let mut file = b"GGUF".to_vec();
        file.extend(version.to_le_bytes());
        let count = |n: u64| {
            if version == 1 { (n as u32).to_le_bytes().to_vec() } else { n.to_le_bytes().to_vec() }
        };
        file.extend(count(0));
        file.extend(count(2));
        // An array of two strings, to be skipped.
        file.extend(count(1));
        file.extend(b"a");
        file.extend(9u32.to_le_bytes());
        file.extend(8u32.to_le_bytes());
        file.extend(count(2));
        for text in ["x", "yz"] {
            file.extend(count(text.len() as u64));
            file.extend(text.as_bytes());
        }
        file.extend(count(17));
        file.extend(b"general.alignment");
        file.extend(4u32.to_le_bytes());
        file.extend(alignment.to_le_bytes());
        file
    }

    #[test]
    fn an_alignment_of_zero_is_refused() {
        for version in [1, 2, 3] {
            check(&header(version, 32)).unwrap();
            let error = check(&header(version, 0)).unwrap_err();
            assert!(error.contains("`general.alignment` is 0"), "{error}");
        }
    }

    #[test]
    fn a_tensor_that_is_stored_in_an_unknown_way_is_named() {
        for (stored, how) in [(0, None), (20, Some("as IQ4_NL")), (99, Some("as type 99"))] {
            let mut file = header(3, 32);
            file[8] = 1;
            file.extend(1u64.to_le_bytes());
            file.extend(b"w");
            file.extend(2u32.to_le_bytes());
            file.extend([32u64, 1].map(u64::to_le_bytes).as_flattened());
            file.extend(u32::to_le_bytes(stored));
            file.extend(0u64.to_le_bytes());
            match (check(&file), how) {
                (Ok(()), None) => {}
                (Err(error), Some(how)) => {
                    assert!(error.starts_with(&format!("tensor `w` is stored {how}")), "{error}");
                }
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn no_prefix_of_a_header_panics() {
        let header = header(3, 0);
        for end in 0..header.len() {
            let _ = check(&header[..end]);
        }
        assert_eq!(check(b"").unwrap_err(), "is empty, no GGUF file");
        assert!(check(b"hello, world").unwrap_err().contains("not a GGUF file"));
    }
}
