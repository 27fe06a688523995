//! Rounding to bf16 up or down at random, so that it is right on average: the nearest bf16 of a
//! value that moves by less than half a step is where it was, and so it would never move.
//!
//! The random bits are a hash of a counter. They need no state, and are the same in any order and on
//! any device: `optimizer.cu` has the same hash. Its whole numbers are no floating-point operations.

/// What one update of one parameter draws its random bits from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Draws([u32; 2]);

impl Draws {
    /// Those of parameter number `parameter` at update number `update`.
    pub fn new(seed: u64, update: u64, parameter: u64) -> Self {
        let key = [update, parameter].into_iter().fold(mixed(seed), |key, n| mixed(key ^ n));
        Self([key as u32, (key >> 32) as u32])
    }

    /// The two halves of what they are drawn from.
    pub(super) fn key(self) -> [u32; 2] {
        self.0
    }

    /// The bits of element `index`: the lower half for the first moment, the upper for the second.
    pub(super) fn bits(self, index: u64) -> u32 {
        let [low, high] = self.0;
        scrambled(scrambled(index as u32 ^ low) ^ (index >> 32) as u32 ^ high)
    }
}

/// Two moments in one word, each rounded to bf16 by its half of `bits`: the first is the lower half.
pub(super) fn packed([first, second]: [f32; 2], bits: u32) -> u32 {
    (noisy(first, bits & 0xffff) >> 16) | (noisy(second, bits >> 16) & 0xffff_0000)
}

/// The two moments of a word.
pub(super) fn unpacked(word: u32) -> [f32; 2] {
    [word << 16, word & 0xffff_0000].map(f32::from_bits)
}

/// A word whose upper half is `x` in bf16, away from zero where `noise`, of 16 bits, carries into it:
/// as often as `x` is that way from the bf16 below it. One that is no number stays as it is.
fn noisy(x: f32, noise: u32) -> u32 {
    if x.is_finite() { x.to_bits() + noise } else { x.to_bits() }
}

/// The last step of SplitMix64 (Steele, Lea and Flood 2014).
fn mixed(n: u64) -> u64 {
    let n = n.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ (n >> 31)
}

/// Wellons' `lowbias32`, one to one: every bit of it depends on every bit of `n`.
fn scrambled(n: u32) -> u32 {
    let n = (n ^ (n >> 16)).wrapping_mul(0x7feb_352d);
    let n = (n ^ (n >> 15)).wrapping_mul(0x846c_a68b);
    n ^ (n >> 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `x` becomes as a first and as a second moment.
    fn both(x: f32, bits: u32) -> [f32; 2] {
        unpacked(packed([x, x], bits))
    }

    #[test]
    fn what_bf16_holds_stays_as_it_is() {
        let draws = Draws::new(1, 2, 3);
        for x in [0.0, -0.0, 1.0, -1.5, 3.0e-38, 1.0e-40, -3.3895e38, f32::INFINITY, -f32::INFINITY]
        {
            let exact = f32::from_bits(x.to_bits() & 0xffff_0000);
            for index in 0..1000 {
                let found = both(exact, draws.bits(index)).map(f32::to_bits);
                assert_eq!(found, [exact.to_bits(); 2], "{exact}");
            }
        }
        for bits in [0, u32::MAX] {
            for bad in [f32::NAN, -f32::NAN, f32::from_bits(0x7fff_ffff)] {
                assert!(both(bad, bits).iter().all(|x| x.is_nan()));
            }
        }
    }

    #[test]
    fn rounding_goes_to_both_neighbours_and_is_right_on_average() {
        let n = 1 << 16;
        for x in [1.001_f32, -0.3, 7.77e-6, 1.7e-12, 2.0e-39, -65_000.3] {
            let below = f32::from_bits(x.to_bits() & 0xffff_0000);
            let above = f32::from_bits((x.to_bits() & 0xffff_0000) + 0x1_0000);
            let draws = Draws::new(7, 1, 0);
            let mut sums = [0.0; 2];
            for index in 0..n {
                for (sum, found) in sums.iter_mut().zip(both(x, draws.bits(index))) {
                    assert!(found == below || found == above, "{x}: {found}");
                    *sum += f64::from(found);
                }
            }
            // Of n draws the mean is this far off, five times in ten million.
            let step = f64::from(above) - f64::from(below);
            let most = 5.0 * 0.5 * step.abs() / f64::from(n as u32).sqrt();
            for mean in sums.map(|sum| sum / f64::from(n as u32)) {
                assert!((mean - f64::from(x)).abs() < most, "{x}: {mean}");
            }
        }
    }

    #[test]
    fn bits_are_of_seed_update_parameter_element_and_moment() {
        let first = |seed, update, parameter| {
            let draws = Draws::new(seed, update, parameter);
            (0..4096).map(|index| draws.bits(index)).collect::<Vec<_>>()
        };
        let bits = first(0, 1, 0);
        assert_eq!(bits, first(0, 1, 0));
        let differing = |others: &[u32]| -> f64 {
            let bits = bits.iter().zip(others).map(|(a, b)| (a ^ b).count_ones()).sum::<u32>();
            f64::from(bits) / f64::from(32 * 4096)
        };
        let next = [&bits[1..], &bits[..1]].concat();
        let halves: Vec<u32> = bits.iter().map(|word| word.rotate_left(16)).collect();
        let far: Vec<u32> =
            (0..4096).map(|index| Draws::new(0, 1, 0).bits(index + (1 << 32))).collect();
        let others = [first(1, 1, 0), first(0, 2, 0), first(0, 1, 1), next, halves, far];
        for share in others.map(|others| differing(&others)) {
            assert!((share - 0.5).abs() < 0.01, "{share} of the bits differ");
        }
    }

    /// Known values, which the GPU's twin has too.
    #[test]
    fn the_hash_does_not_change() {
        let draws = Draws::new(0, 1, 0);
        assert_eq!(draws.bits(0), scrambled(scrambled(draws.0[0]) ^ draws.0[1]));
        // By the reference implementations of both: splitmix64 from 0, and lowbias32 of 1.
        assert_eq!(mixed(0), 0xe220_a839_7b1d_cdaf);
        assert_eq!(scrambled(1), 0x6889_90c0);
    }
}
