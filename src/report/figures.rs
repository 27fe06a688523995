//! Figures for people.

/// A figure of three significant digits, as the notebook prints them (C's `%.3g`): `6.7e+09`, `10`.
pub fn three_digits(n: u128) -> String {
    if n < 1000 {
        return n.to_string();
    }
    let text = format!("{:.2e}", n as f64);
    let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let mantissa = mantissa.trim_end_matches('0').trim_end_matches('.');
    format!("{mantissa}e+{exponent:0>2}")
}

/// An exact integer with thousands separators.
pub fn digits(n: u128) -> String {
    let plain = n.to_string();
    let mut out = String::with_capacity(plain.len() * 4 / 3);
    for (i, c) in plain.chars().enumerate() {
        if i > 0 && (plain.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

/// The same of a difference, with its sign.
pub fn signed(n: i128) -> String {
    let sign = match n.signum() {
        -1 => "-",
        0 => "",
        _ => "+",
    };
    format!("{sign}{}", digits(n.unsigned_abs()))
}

/// How tables show counts of FLOPs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Figures {
    /// Four significant digits and an SI prefix.
    Human,
    /// Every digit.
    Exact,
}

impl Figures {
    /// In a column headed FLOPs.
    pub fn count(self, n: u128) -> String {
        match self {
            Self::Human => human(n as f64),
            Self::Exact => digits(n),
        }
    }

    /// Calls: every digit of them up to a million.
    pub fn calls(self, n: u128) -> String {
        if n < 1_000_000 { digits(n) } else { self.count(n) }
    }

    /// A difference, with its sign.
    pub fn signed(self, n: i128) -> String {
        match (self, n.signum()) {
            (Self::Exact, _) | (_, 0) => signed(n),
            (Self::Human, sign) => {
                let sign = if sign < 0 { '-' } else { '+' };
                format!("{sign}{}", human(n.unsigned_abs() as f64))
            }
        }
    }

    /// In a sentence: `530.8 GFLOP`.
    pub fn flop(self, n: u128) -> String {
        match self {
            Self::Human => with_unit(n as f64, "FLOP"),
            Self::Exact => format!("{} FLOP", digits(n)),
        }
    }
}

/// A figure with an SI prefix, four significant digits.
pub fn human(n: f64) -> String {
    const PREFIXES: [&str; 9] = ["", " k", " M", " G", " T", " P", " E", " Z", " Y"];
    if n < 1e3 {
        return format!("{n:.0}");
    }
    let mut thousands = ((n.log10() / 3.0) as usize).min(PREFIXES.len() - 1);
    let mut scaled = n / 1e3f64.powi(thousands as i32);
    // What rounds to 1000.0 is one of the next.
    if scaled >= 999.95 && thousands + 1 < PREFIXES.len() {
        (scaled, thousands) = (scaled / 1e3, thousands + 1);
    }
    let decimals = match scaled {
        s if s < 9.9995 => 3,
        s if s < 99.995 => 2,
        _ => 1,
    };
    format!("{scaled:.decimals$}{}", PREFIXES[thousands])
}

/// A part of a whole as a percentage, five significant digits.
pub fn percent(part: f64) -> String {
    let percent = 100.0 * part;
    let before = if percent > 0.0 { percent.log10().floor() as i32 } else { 0 };
    let decimals = (4 - before).clamp(0, 12) as usize;
    format!("{percent:.decimals$} %")
}

/// A time, four significant digits.
pub fn seconds(s: f64) -> String {
    let (scaled, unit) = match s {
        s if s < 1e-3 => (s * 1e6, "µs"),
        s if s < 1.0 => (s * 1e3, "ms"),
        s => (s, "s"),
    };
    let decimals = match scaled {
        x if x < 10.0 => 3,
        x if x < 100.0 => 2,
        _ => 1,
    };
    format!("{scaled:.decimals$} {unit}")
}

/// FLOPs a second.
pub fn rate(flops_per_s: f64) -> String {
    with_unit(flops_per_s, "FLOP/s")
}

/// Tokens, or what else is counted one by one, a second.
pub fn per_second(n: f64) -> String {
    if n < 1e3 { format!("{n:.1}") } else { digits(n.round() as u128) }
}

/// Bytes.
pub fn bytes(n: f64) -> String {
    with_unit(n, "B")
}

fn with_unit(n: f64, unit: &str) -> String {
    let text = human(n);
    let space = if text.contains(' ') { "" } else { " " };
    format!("{text}{space}{unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_for_people() {
        assert_eq!(digits(0), "0");
        assert_eq!(digits(528_364_863_488), "528,364,863,488");
        assert_eq!(digits(100), "100");
        assert_eq!(signed(-1234), "-1,234");
        assert_eq!(signed(5), "+5");
        assert_eq!(human(999.0), "999");
        assert_eq!(human(1e3), "1.000 k");
        assert_eq!(human(996_610_048.0), "996.6 M");
        assert_eq!(human(1e12), "1.000 T");
        assert_eq!(human(9.99951e12), "10.00 T");
        assert_eq!(human(99.9976e15), "100.0 P");
        assert_eq!(human(999_960.0), "1.000 M");
        assert_eq!(percent(0.99988), "99.988 %");
        assert_eq!(percent(7.2455e-5), "0.0072455 %");
        assert_eq!(percent(0.0), "0.0000 %");
        assert_eq!(percent(1.0), "100.00 %");
        assert_eq!(rate(12.0), "12 FLOP/s");
        assert_eq!(bytes(1.976e9), "1.976 GB");
        assert_eq!(seconds(1.2346e-5), "12.35 µs");
        assert_eq!(seconds(0.25), "250.0 ms");
        assert_eq!(seconds(83.0), "83.00 s");
    }

    #[test]
    fn styles() {
        let (human, exact) = (Figures::Human, Figures::Exact);
        assert_eq!(human.count(528_364_863_488), "528.4 G");
        assert_eq!(exact.count(528_364_863_488), "528,364,863,488");
        assert_eq!(human.calls(999_999), "999,999");
        assert_eq!(human.calls(1_681_680), "1.682 M");
        assert_eq!(exact.calls(1_681_680), "1,681,680");
        assert_eq!(human.signed(-1234), "-1.234 k");
        assert_eq!(human.signed(5), "+5");
        assert_eq!(human.signed(0), "0");
        assert_eq!(exact.signed(-1234), "-1,234");
        assert_eq!(human.flop(528_364_863_488), "528.4 GFLOP");
        assert_eq!(human.flop(12), "12 FLOP");
        assert_eq!(exact.flop(1234), "1,234 FLOP");
    }

    #[test]
    fn three_digits_as_c_prints_them() {
        let cases: [(u128, &str); 7] = [
            (0, "0"),
            (10, "10"),
            (999, "999"),
            (1000, "1e+03"),
            (999_500, "1e+06"),
            (6_700_000_000, "6.7e+09"),
            (10_240, "1.02e+04"),
        ];
        for (n, text) in cases {
            assert_eq!(three_digits(n), text);
        }
    }
}
