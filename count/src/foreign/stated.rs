//! A figure as it was printed: what it says, and what it may stand for.

/// FLOPs that a file states, and the bounds that its digits leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stated {
    /// As printed.
    pub flops: u128,
    /// The least that is printed so.
    pub least: u128,
    /// The most that is printed so.
    pub most: u128,
}

/// Above this no sum of figures comes near 127 bits.
const MOST: f64 = (1u128 << 120) as f64;

impl Stated {
    /// Every digit.
    pub(super) const fn exact(flops: u128) -> Self {
        Self { flops, least: flops, most: flops }
    }

    /// Decimal digits of so many units of `scale`, a power of 10, rounded to the last one printed,
    /// or to `decimals` where trailing zeros are left out. None where it is no such number, or no
    /// whole FLOPs.
    pub(super) fn printed(text: &str, scale: u128, decimals: usize) -> Option<Self> {
        let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
        let digits = format!("{whole}{fraction}");
        // 30 digits times 10¹² fit 127 bits with room.
        let is_number = !whole.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
        if !is_number || digits.len() > 24 {
            return None;
        }
        let unit = |decimals: usize| 10u128.checked_pow(u32::try_from(decimals).ok()?);
        let scaled = digits.parse::<u128>().ok()?.checked_mul(scale)?;
        let shown = unit(fraction.len())?;
        let flops = (scaled % shown == 0).then(|| scaled / shown)?;
        let half = scale / unit(fraction.len().max(decimals))? / 2;
        Some(Self { flops, least: flops.saturating_sub(half), most: flops + half })
    }

    /// A sum of `additions` that was kept as a double: each past 2⁵³ may have rounded it by half of
    /// its last place. None where it is no count.
    pub(super) fn float(value: f64, additions: u128) -> Option<Self> {
        if !(0.0..MOST).contains(&value) || value.fract() != 0.0 {
            return None;
        }
        let flops = value as u128;
        let bits = 128 - flops.leading_zeros();
        let last_place = if bits > 53 { 1u128 << (bits - 53) } else { 0 };
        let half = (last_place / 2).checked_mul(additions.max(1))?;
        Some(Self { flops, least: flops.saturating_sub(half), most: flops.checked_add(half)? })
    }

    /// So many of them.
    pub(super) fn times(self, n: u128) -> Option<Self> {
        let times = |flops: u128| flops.checked_mul(n).filter(|flops| *flops < 1 << 126);
        let (flops, least, most) = (times(self.flops)?, times(self.least)?, times(self.most)?);
        Some(Self { flops, least, most })
    }

    /// Both together.
    pub(super) fn plus(self, other: Self) -> Option<Self> {
        let add = |a: u128, b: u128| a.checked_add(b).filter(|flops| *flops < 1 << 126);
        let (flops, least) = (add(self.flops, other.flops)?, add(self.least, other.least)?);
        Some(Self { flops, least, most: add(self.most, other.most)? })
    }

    /// Whether so many FLOPs are printed so.
    pub fn holds(&self, flops: u128) -> bool {
        (self.least..=self.most).contains(&flops)
    }

    /// This over `counted`, in words: a fraction of small numbers where its digits allow one.
    pub(super) fn over(&self, counted: u128) -> Option<String> {
        let fraction = (1..=64u128).find_map(|q| {
            let p = self.flops.checked_mul(q)?.checked_add(counted / 2)?.checked_div(counted)?;
            let product = p.checked_mul(counted)?;
            let [least, most] = [self.least.checked_mul(q)?, self.most.checked_mul(q)?];
            (p > 0 && p <= 10_000 && (least..=most).contains(&product)).then_some((p, q))
        });
        match fraction {
            _ if counted == 0 => None,
            Some((p, 1)) => Some(format!("{p} times")),
            Some((p, q)) => Some(format!("{p}/{q} of")),
            None => Some(format!("{:.6} times", self.flops as f64 / counted as f64)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_leave_bounds() {
        let stated = |flops, least, most| Some(Stated { flops, least, most });
        for (text, scale, decimals, expected) in [
            ("1.42", 1_000_000, 2, stated(1_420_000, 1_415_000, 1_425_000)),
            // A trailing zero that `%g` leaves out is a digit all the same.
            ("1.6", 1_000_000, 2, stated(1_600_000, 1_595_000, 1_605_000)),
            (
                "2",
                1_000_000_000_000,
                2,
                stated(2 * 10u128.pow(12), 1_995 * 10u128.pow(9), 2_005 * 10u128.pow(9)),
            ),
            // Thousands with three decimals are whole FLOPs.
            ("3591.168", 1000, 3, stated(3_591_168, 3_591_168, 3_591_168)),
            ("512.000", 1, 3, stated(512, 512, 512)),
            ("0", 1, 2, stated(0, 0, 0)),
            (
                "0.001",
                1_000_000_000_000,
                3,
                stated(10u128.pow(9), 5 * 10u128.pow(8), 15 * 10u128.pow(8)),
            ),
        ] {
            assert_eq!(Stated::printed(text, scale, decimals), expected, "{text}");
        }
        for text in
            ["", ".", "-1", "nan", "inf", "1e3", "1.2.3", "0.5", "１", "1111111111111111111111111"]
        {
            assert_eq!(Stated::printed(text, 1, 0), None, "{text}");
        }
    }

    #[test]
    fn doubles_are_exact_below_2_to_53() {
        assert_eq!(Stated::float(20_265_984.0, 6), Some(Stated::exact(20_265_984)));
        let large = Stated::float(2f64.powi(60), 3).unwrap();
        // 53 of 61 bits: the last place is 2⁸.
        assert_eq!((large.most - large.flops, large.flops - large.least), (3 << 7, 3 << 7));
        for value in [f64::NAN, f64::INFINITY, -1.0, 0.5, 1e40] {
            assert_eq!(Stated::float(value, 1), None, "{value}");
        }
    }

    #[test]
    fn ratios_are_said_in_small_numbers() {
        for (flops, counted, expected) in
            [(30, 10, "3 times"), (15, 10, "3/2 of"), (1_000_001, 10, "100000.100000 times")]
        {
            assert_eq!(Stated::exact(flops).over(counted).as_deref(), Some(expected));
        }
        assert_eq!(Stated::exact(1).over(0), None);
    }
}
