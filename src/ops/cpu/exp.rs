//! SiLU and GELU with an exponential that vectorizes: candle's call the C library for each element,
//! which took a fifth of a prefill.

/// x / (1 + exp(−x)).
#[inline(always)]
pub(super) fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// dy · s · (1 + x · (1 − s)) into `out`, s = 1 / (1 + exp(−x)).
pub(super) fn silu_grad(x: &[f32], dy: &[f32], out: &mut [f32]) {
    for ((out, &x), dy) in out.iter_mut().zip(x).zip(dy) {
        let s = 1.0 / (1.0 + exp(-x));
        *out = dy * s * (1.0 + x * (1.0 - s));
    }
}

/// √(2/π) and the cubic's factor in GELU's tanh approximation, as x / (1 + exp(x · (A + B x²)))
/// needs them: A = −2 √(2/π), B = 0.044715 A.
const A: f32 = -1.595_769;
const B: f32 = 0.044_715 * A;

/// x / (1 + exp(x · (A + B x²))), which is x · (1 + tanh(√(2/π) · (x + 0.044715 x³))) / 2.
#[inline(always)]
pub(super) fn gelu(x: f32) -> f32 {
    x / (1.0 + exp(x * (A + B * (x * x))))
}

/// dy · s · (1 + x · (1 − s) · (−A − 3B x²)) into `out`, s = 1 / (1 + exp(x · (A + B x²))).
pub(super) fn gelu_grad(x: &[f32], dy: &[f32], out: &mut [f32]) {
    for ((out, &x), dy) in out.iter_mut().zip(x).zip(dy) {
        let square = x * x;
        let s = 1.0 / (1.0 + exp(x * (A + B * square)));
        *out = dy * s * (1.0 + x * (1.0 - s) * (-A - 3.0 * B * square));
    }
}

/// eˣ within 2 ulp: x = n ln 2 + r, |r| ≤ ln 2 / 2; eʳ by the Cephes polynomial of degree 6; 2ⁿ
/// into the exponent's bits. No branch, so that loops over it vectorize.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // Beyond these, 2ⁿ is no normal number; below, the result is taken as 0.
    const LOW: f32 = -87.0;
    const HIGH: f32 = 88.0;
    // 1.5 · 2²³: adding it leaves the rounded integer in the low bits of the sum.
    const SHIFT: f32 = 12_582_912.0;
    // ln 2 in two parts, the first exact in few bits.
    const LN2: (f32, f32) = (0.693_359_4, -2.121_944_4e-4);
    let bounded = x.clamp(LOW, HIGH);
    let shifted = bounded.mul_add(std::f32::consts::LOG2_E, SHIFT);
    let n = shifted - SHIFT;
    let r = n.mul_add(-LN2.1, n.mul_add(-LN2.0, bounded));
    let p = 1.987_569_1e-4f32;
    let p = p.mul_add(r, 1.398_199_9e-3);
    let p = p.mul_add(r, 8.333_452e-3);
    let p = p.mul_add(r, 4.166_579_6e-2);
    let p = p.mul_add(r, 0.166_666_65);
    let p = p.mul_add(r, 0.5);
    let p = p.mul_add(r * r, r) + 1.0;
    let value = f32::from_bits(p.to_bits().wrapping_add(shifted.to_bits() << 23));
    if x < LOW {
        0.0
    } else if x <= HIGH {
        value
    } else {
        // Infinite above, and NaN stays NaN.
        x + f32::INFINITY
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_ulp() {
        for i in -86_999..88_000 {
            let x = i as f32 * 1e-3;
            let exact = f64::from(x).exp();
            let error = ((f64::from(exp(x)) - exact) / exact).abs();
            assert!(error < 2.0 * f64::from(f32::EPSILON), "{x}: {error}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn activations_equal_their_definitions() {
        for i in -1000..1000 {
            let x = f64::from(i) * 0.01;
            let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
            let exact = 0.5 * x * (1.0 + u.tanh());
            assert!((f64::from(gelu(x as f32)) - exact).abs() < 1e-6 * x.abs().max(1.0), "{x}");
            let exact = x / (1.0 + (-x).exp());
            assert!((f64::from(silu(x as f32)) - exact).abs() < 1e-6 * x.abs().max(1.0), "{x}");
            // Derivatives beside differences.
            let f = |x: f64| {
                let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
                0.5 * x * (1.0 + u.tanh())
            };
            let mut out = [0.0];
            gelu_grad(&[x as f32], &[1.0], &mut out);
            let difference = (f(x + 1e-5) - f(x - 1e-5)) / 2e-5;
            assert!((f64::from(out[0]) - difference).abs() < 1e-5, "{x}");
        }
    }
}
