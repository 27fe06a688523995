//! Exact search for the largest number that fits a budget.

/// The largest n up to `most` that `fits`, 0 if not even 1 does. Costs grow with n, so whatever is
/// below a fitting n fits too: doubling finds a bound, halving the gap finds the number, in
/// 2·log₂ n questions.
pub fn largest(most: u64, fits: impl Fn(u64) -> bool) -> u64 {
    let (mut below, mut above) = (0, 1.min(most));
    while below < above && fits(above) {
        below = above;
        above = above.saturating_mul(2).min(most);
    }
    // `below` fits; `above` does not, or is `below`, the bound itself.
    while above - below > 1 {
        let middle = below + (above - below) / 2;
        match fits(middle) {
            true => below = middle,
            false => above = middle,
        }
    }
    below
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn bounds() {
        assert_eq!(largest(0, |_| true), 0);
        assert_eq!(largest(10, |_| false), 0);
        assert_eq!(largest(10, |_| true), 10);
        assert_eq!(largest(u64::MAX, |_| true), u64::MAX);
        assert_eq!(largest(u64::MAX, |n| n < u64::MAX), u64::MAX - 1);
        assert_eq!(largest(7, |n| n <= 6), 6);
    }

    proptest! {
        #[test]
        fn the_result_fits_and_the_next_does_not(
            budget in any::<u64>(), slope in 1u64..1 << 40, square in 0u64..1 << 20,
        ) {
            let fits = |n: u64| {
                let n = u128::from(n);
                n * u128::from(slope) + n * n * u128::from(square) <= u128::from(budget)
            };
            let found = largest(u64::MAX >> 4, fits);
            prop_assert!(found == 0 || fits(found));
            prop_assert!(!fits(found + 1) || found == u64::MAX >> 4);
        }
    }
}
