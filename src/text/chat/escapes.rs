//! What stands for a character in a string: Python's escapes, written as minijinja reads them.

/// A string's source, its quotes included, as minijinja takes it to mean what it means to Python;
/// the error is an escape that cannot be read.
pub(super) fn translated(literal: &str) -> Result<String, String> {
    let quote = literal.chars().next().unwrap_or('"');
    let inside = literal.strip_prefix(quote).and_then(|rest| rest.strip_suffix(quote));
    // One without its end is for minijinja to refuse.
    let Some(inside) = inside.filter(|text| text.contains('\\')) else { return Ok(literal.into()) };
    let (mut out, mut lines) = (String::from(quote), 0);
    let mut rest = inside.chars();
    while let Some(c) = rest.next() {
        if c != '\\' {
            out.push(c);
            continue;
        }
        let Some(named) = rest.next() else { return Ok(literal.into()) };
        let meant = match named {
            // The line goes on; its number is kept behind the string.
            '\n' => {
                lines += 1;
                continue;
            }
            '\\' | '\'' | '"' => named,
            'a' => '\u{7}',
            'b' => '\u{8}',
            't' => '\t',
            'n' => '\n',
            'v' => '\u{b}',
            'f' => '\u{c}',
            'r' => '\r',
            'x' => numbered(named, digits(&mut rest, 2, 16), 2, 16)?,
            'u' => numbered(named, digits(&mut rest, 4, 16), 4, 16)?,
            'U' => numbered(named, digits(&mut rest, 8, 16), 8, 16)?,
            '0'..='7' => {
                let octal = format!("{named}{}", digits(&mut rest, 2, 8));
                numbered(named, octal, 1, 8)?
            }
            'N' => return Err("`\\N` names a character: write the character itself".into()),
            // No escape at all, to Python: the backslash stays. A character outside ASCII is
            // written by its number then.
            other => {
                out += "\\\\";
                match u32::from(other) {
                    0..0x80 => push(&mut out, other, quote),
                    n @ 0x80..0x100 => out += &format!("x{n:02x}"),
                    n @ 0x100..0x1_0000 => out += &format!("u{n:04x}"),
                    n => out += &format!("U{n:08x}"),
                }
                continue;
            }
        };
        push(&mut out, meant, quote);
    }
    out.push(quote);
    Ok(out + &"\n".repeat(lines))
}

/// Writes a character as minijinja reads it.
fn push(out: &mut String, c: char, quote: char) {
    match c {
        '\\' => out.push_str("\\\\"),
        '\n' => out.push_str("\\n"),
        '\r' => out.push_str("\\r"),
        c if c == quote => out.extend(['\\', c]),
        c => out.push(c),
    }
}

/// At most this many digits from the front of `rest`.
fn digits(rest: &mut std::str::Chars, most: usize, radix: u32) -> String {
    let text = rest.as_str();
    let found: String = text.chars().take_while(|c| c.is_digit(radix)).take(most).collect();
    *rest = text[found.len()..].chars();
    found
}

/// The character of this number, which has at least that many digits.
fn numbered(escape: char, digits: String, least: usize, radix: u32) -> Result<char, String> {
    let number = u32::from_str_radix(&digits, radix).ok().filter(|_| digits.len() >= least);
    number
        .and_then(char::from_u32)
        .ok_or_else(|| format!("the escape `\\{escape}` in a string is no whole character"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_mean_what_they_mean_to_python() {
        // Python's values, written with minijinja's escapes.
        for (source, expected) in [
            (r#""a'é""#, r#""a'é""#),
            (r#""<\/think>""#, r#""<\\/think>""#),
            (r#""\U0001F600\u00e9\x41\101\0""#, "\"😀éAA\0\""),
            (r#""\a\v\b\f""#, "\"\u{7}\u{b}\u{8}\u{c}\""),
            (r#"'\'\"\\\n\r\t'"#, "'\\'\"\\\\\\n\\r\t'"),
            ("\"a\\\nb\"", "\"ab\"\n"),
            (r#""\é\€\q""#, r#""\\xe9\\u20ac\\q""#),
            (r#""\777""#, r#""ǿ""#),
        ] {
            assert_eq!(translated(source).unwrap(), expected, "{source}");
        }
        for source in [r#""\x4""#, r#""\ud83d\ude00""#, r#""\U00110000""#, r#""\N{BULLET}""#] {
            translated(source).unwrap_err();
        }
    }
}
