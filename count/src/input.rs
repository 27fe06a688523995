//! Files of the user's that hold text, read in one way: UTF-8, without the byte order mark that
//! some editors put first.

use std::{
    fs,
    io::{Error, ErrorKind, Result},
    path::Path,
};

/// UTF-8's byte order mark, and those of UTF-16.
const UTF8: &[u8] = b"\xef\xbb\xbf";
const UTF16: [&[u8]; 2] = [b"\xff\xfe", b"\xfe\xff"];

/// The text of `file`.
///
/// # Errors
/// A file that cannot be read or is not UTF-8.
pub fn read_text(file: &Path) -> Result<String> {
    text(fs::read(file)?)
}

/// The bytes of a file of text, whose form is for the caller to check.
///
/// # Errors
/// A file that cannot be read, or is UTF-16.
pub fn read_bytes(file: &Path) -> Result<Vec<u8>> {
    unmarked(fs::read(file)?)
}

/// Text from `bytes`, wherever they were read.
///
/// # Errors
/// Bytes that are not UTF-8.
pub fn text(bytes: Vec<u8>) -> Result<String> {
    let text = String::from_utf8(unmarked(bytes)?);
    text.map_err(|e| invalid(format!("is not UTF-8 (byte {})", e.utf8_error().valid_up_to())))
}

fn unmarked(mut bytes: Vec<u8>) -> Result<Vec<u8>> {
    if UTF16.iter().any(|mark| bytes.starts_with(mark)) {
        return Err(invalid("is UTF-16; save it as UTF-8".into()));
    }
    if bytes.starts_with(UTF8) {
        bytes.drain(..UTF8.len());
    }
    Ok(bytes)
}

fn invalid(why: String) -> Error {
    Error::new(ErrorKind::InvalidData, why)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_order_mark_is_no_text() {
        for (bytes, expected) in [
            (&b"\xef\xbb\xbfa"[..], "a"),
            (b"a", "a"),
            (b"", ""),
            // Only the first one is a mark.
            (b"\xef\xbb\xbf\xef\xbb\xbf", "\u{feff}"),
        ] {
            assert_eq!(text(bytes.into()).unwrap(), expected);
        }
    }

    #[test]
    fn other_encodings_are_named() {
        for (bytes, expected) in [
            (&b"\xff\xfea\0"[..], "is UTF-16; save it as UTF-8"),
            (b"\xfe\xff\0a", "is UTF-16; save it as UTF-8"),
            (b"ab\xe9", "is not UTF-8 (byte 2)"),
        ] {
            assert_eq!(text(bytes.into()).unwrap_err().to_string(), expected);
        }
    }
}
