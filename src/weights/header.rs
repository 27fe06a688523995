//! What candle's GGUF reader takes on trust: that the file is one at all, and an alignment that
//! it divides by.

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
    match zero_alignment(file) {
        Some(true) => Err("malformed GGUF header: `general.alignment` is 0".into()),
        _ => Ok(()),
    }
}

/// Whether any `general.alignment` is 0 (the last one counts); `None` where the walk ended early.
fn zero_alignment(file: &[u8]) -> Option<bool> {
    let mut walk = Walk { rest: file.get(4..)?, version: 0 };
    walk.version = u32::from_le_bytes(walk.take(4)?.try_into().ok()?);
    walk.length()?;
    let mut zero = false;
    for _ in 0..walk.length()? {
        let length = walk.length()?;
        let is_alignment = walk.take(length)? == b"general.alignment";
        let kind = walk.kind()?;
        let value = walk.value(kind, 0)?;
        zero |= is_alignment && value.iter().all(|byte| *byte == 0);
    }
    Some(zero)
}

struct Walk<'a> {
    rest: &'a [u8],
    version: u32,
}

impl<'a> Walk<'a> {
    fn take(&mut self, n: u64) -> Option<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(usize::try_from(n).ok()?)?;
        self.rest = rest;
        Some(taken)
    }

    /// A count: 4 bytes in version 1, else 8.
    fn length(&mut self) -> Option<u64> {
        match self.version {
            1 => Some(u32::from_le_bytes(self.take(4)?.try_into().ok()?).into()),
            _ => Some(u64::from_le_bytes(self.take(8)?.try_into().ok()?)),
        }
    }

    fn kind(&mut self) -> Option<u32> {
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
                let kind = self.kind()?;
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
    fn no_prefix_of_a_header_panics() {
        let header = header(3, 0);
        for end in 0..header.len() {
            let _ = check(&header[..end]);
        }
        assert_eq!(check(b"").unwrap_err(), "is empty, no GGUF file");
        assert!(check(b"hello, world").unwrap_err().contains("not a GGUF file"));
    }
}
