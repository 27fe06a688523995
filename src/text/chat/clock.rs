//! The time that templates ask for.

use std::fmt::Write;

use chrono::{Local, NaiveDateTime};

/// What may follow a `%`, with or without a `-` against padding: what chrono and the C library of
/// Python's `strftime` write alike.
const DIRECTIVES: &str = "aAbBcCdDeFgGhHIjklmMnpPrRStTuUVwWxXyY";

/// The local time, without its zone, as `datetime.now()` gives it.
pub(super) fn now() -> NaiveDateTime {
    Local::now().naive_local()
}

/// `now.strftime(format)`; the error names a format that Python would take otherwise.
pub(super) fn strftime(format: &str, now: NaiveDateTime) -> Result<String, String> {
    let refused = || format!("strftime_now: the format `{format}` is not supported");
    let mut rest = format;
    while let Some((_, after)) = rest.split_once('%') {
        let known = |c: &char| DIRECTIVES.contains(*c);
        let padded = after.strip_prefix('-').unwrap_or(after);
        rest = match padded.chars().next().filter(known) {
            Some(_) => &padded[1..],
            None => after.strip_prefix('%').ok_or_else(refused)?,
        };
    }
    let mut out = String::new();
    write!(out, "{}", now.format(format)).map_err(|_| refused())?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use chrono::NaiveDate;

    use super::*;

    #[test]
    fn dates_are_those_of_python() {
        // What Python's datetime gives for each, in the C locale.
        let at = NaiveDate::from_ymd_opt(2024, 2, 9).and_then(|day| day.and_hms_opt(7, 5, 58));
        for (format, expected) in [
            ("%d %b %Y", "09 Feb 2024"),
            ("%Y-%m-%d %a %A %B %H:%M:%S", "2024-02-09 Fri Friday February 07:05:58"),
            ("%-d/%-m %y %I:%M %p %j", "9/2 24 07:05 AM 040"),
            ("100 %% %F %T %U %w %e", "100 % 2024-02-09 07:05:58 05 5  9"),
        ] {
            assert_eq!(strftime(format, at.unwrap()).unwrap(), expected);
        }
        for format in ["%q", "%s", "%f", "%Z", "%+", "x%"] {
            let error = strftime(format, at.unwrap()).unwrap_err();
            assert_eq!(error, format!("strftime_now: the format `{format}` is not supported"));
        }
    }
}
