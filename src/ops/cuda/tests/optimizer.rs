//! Sums of squares, AdamW and sums over passes, of many tensors a launch.

use candle_core::{DType, Device, Result, Tensor};

use super::{
    super::{AdamWFactors, Kernels, TENSORS, Updated},
    TYPES, check, gpu, random, values_of,
};
use crate::ops::{cpu, launch::Nodes, rounding::Draws};

/// Sizes of one element, of odd ones, of packs that end within a block and at its end, and of more
/// than a block.
const SIZES: [usize; 11] = [1, 3, 8, 896, 2047, 2048, 2056, 16_384, 16_385, 40_000, 100_003];

fn widened(t: &Tensor) -> Result<Tensor> {
    t.to_device(&Device::Cpu)?.to_dtype(DType::F32)
}

#[test]
fn squares_of_many_tensors() -> Result<()> {
    let (device, nodes) = (gpu(), Nodes::kept());
    for dtype in TYPES {
        let kernels = Kernels::on(&device, dtype).unwrap();
        let sizes = SIZES.iter().cycle().take(TENSORS);
        let all: Vec<_> =
            sizes.zip(0..).map(|(n, seed)| random(&[*n], dtype, seed, &device)).collect();
        for count in [1, 2, SIZES.len(), TENSORS] {
            let tensors: Vec<_> = all.iter().take(count).map(|(x, _)| x).collect();
            let sums = kernels.sum_squares(&nodes, &tensors)?.to_vec1::<f64>()?;
            assert_eq!(sums.len(), count);
            for (sum, (_, values)) in sums.iter().zip(&all) {
                let expected = values.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>();
                let n = values.len();
                assert!((sum / expected - 1.0).abs() < 1e-6, "{n} {dtype:?}: {sum} {expected}");
            }
            // Nothing depends on the order in which blocks come.
            for _ in 0..5 {
                assert_eq!(sums, kernels.sum_squares(&nodes, &tensors)?.to_vec1::<f64>()?);
            }
        }
    }
    Ok(())
}

#[test]
fn squares_that_are_not_finite_show() -> Result<()> {
    let (device, nodes) = (gpu(), Nodes::kept());
    let kernels = Kernels::on(&device, DType::F32).unwrap();
    for bad in [f32::NAN, f32::INFINITY] {
        let mut values = vec![1.0; 40_000];
        values[39_999] = bad;
        let (x, sound) =
            (Tensor::from_vec(values, 40_000, &device)?, random(&[5], DType::F32, 1, &device).0);
        let sums = kernels.sum_squares(&nodes, &[&sound, &x, &sound])?.to_vec1::<f64>()?;
        assert!(sums[0].is_finite() && !sums[1].is_finite() && sums[2] == sums[0], "{sums:?}");
    }
    Ok(())
}

/// As of a third step.
const BY: AdamWFactors = AdamWFactors {
    clip: 0.7,
    decay: 0.99,
    rate: 1e-2,
    correction: 0.3,
    eps: 1e-8,
    b1: 0.9,
    b2: 0.999,
    rest1: 0.1,
    rest2: 1e-3,
};

/// Parameters must be the CPU's within rounding. So must moments, of which in words hardly any may
/// round the other way: the random bits are the same.
fn check_states(what: &str, ours: &Tensor, theirs: &Tensor) {
    let (theirs, rows) = (values_of(theirs), ours.dims()[0]);
    if rows == 3 {
        return check(what, DType::F32, ours, &theirs);
    }
    let n = theirs.len() / 2;
    check(what, DType::F32, &ours.narrow(0, 0, 1).unwrap(), &theirs[..n]);
    let halves = |word: &f32| [word.to_bits() & 0xffff, word.to_bits() >> 16];
    let (ours, theirs) = (&values_of(ours)[n..], &theirs[n..]);
    let mut differ = 0;
    for (a, b) in ours.iter().flat_map(halves).zip(theirs.iter().flat_map(halves)) {
        assert!(a.abs_diff(b) <= 1, "{what}: {a:x} for {b:x}");
        differ += usize::from(a != b);
    }
    assert!(differ <= 2 + n / 500, "{what}: {differ} of {n} differ");
}

#[test]
fn many_parameters_are_updated_at_once() -> Result<()> {
    let (device, nodes) = (gpu(), Nodes::kept());
    // Of three rows of f32, or of two: the parameter, and words of both moments.
    let cases = TYPES.into_iter().flat_map(|dtype| [(dtype, false), (dtype, true)]);
    for ((dtype, is_narrow), rows) in cases.flat_map(|case| [(case, 3), (case, 2)]) {
        let kernels = Kernels::on(&device, dtype).unwrap();
        for count in [1, SIZES.len(), TENSORS] {
            let sizes: Vec<_> = SIZES.iter().copied().cycle().take(count).collect();
            let (mut states, mut expected, mut gradients, mut narrow) =
                (vec![], vec![], vec![], vec![]);
            for (n, seed) in sizes.iter().zip(0..) {
                let state = match rows {
                    3 => {
                        let (state, _) = random(&[3, *n], DType::F32, seed, &Device::Cpu);
                        // Of a root there is no negative.
                        let v = state.narrow(0, 2, 1)?.abs()?;
                        state.slice_set(&v, 0, 2)?;
                        state
                    }
                    _ => Tensor::cat(
                        &[
                            random(&[1, *n], DType::F32, seed, &Device::Cpu).0,
                            Tensor::zeros((1, *n), DType::F32, &Device::Cpu)?,
                        ],
                        0,
                    )?,
                };
                states.push(state.to_device(&device)?);
                expected.push(state);
                gradients.push(random(&[*n], dtype, 100 + seed, &device).0);
                narrow.push(Tensor::zeros(*n, DType::BF16, &device)?);
            }
            for number in 0..3 {
                let draws = |i: usize| Draws::new(3, number, i as u64);
                let updated = |i: usize| Updated {
                    state: &states[i],
                    draws: draws(i),
                    gradient: &gradients[i],
                    narrow: is_narrow.then_some(&narrow[i]),
                };
                kernels.adamw(&nodes, &(0..count).map(updated).collect::<Vec<_>>(), BY)?;
                for (i, (state, gradient)) in expected.iter().zip(&gradients).enumerate() {
                    // The CPU's takes gradients that are clipped already.
                    let clipped = (widened(gradient)? * f64::from(BY.clip))?;
                    cpu::adamw(state, &clipped, &BY, draws(i))?;
                }
            }
            for (i, n) in sizes.iter().enumerate() {
                check_states(&format!("{n} of {count} updated"), &states[i], &expected[i]);
                let master = states[i].narrow(0, 0, 1)?.flatten_all()?;
                let shown = match is_narrow {
                    true => values_of(&master.to_dtype(DType::BF16)?),
                    false => vec![0.0; *n],
                };
                assert_eq!(values_of(&narrow[i]), shown, "{n} of {count}, {dtype:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn what_is_summed_over_passes_is_widened() -> Result<()> {
    let (device, nodes) = (gpu(), Nodes::kept());
    for dtype in TYPES {
        let kernels = Kernels::on(&device, dtype).unwrap();
        for n in SIZES {
            let ((sum, sums), (x, values)) =
                (random(&[n], DType::F32, 1, &device), random(&[n], dtype, 2, &device));
            let ours = kernels.add_to_sum(&nodes, &sum, &x)?;
            let theirs: Vec<f32> = sums.iter().zip(values).map(|(a, b)| a + b).collect();
            assert_eq!(ours.dtype(), DType::F32);
            assert_eq!(values_of(&ours), theirs, "{n} {dtype:?}");
        }
    }
    Ok(())
}

#[test]
fn updates_that_do_not_fit_are_refused() -> Result<()> {
    let (device, nodes) = (gpu(), Nodes::kept());
    let kernels = Kernels::on(&device, DType::BF16).unwrap();
    let of = |shape: &[usize], dtype| random(shape, dtype, 1, &device).0;
    let (state, gradient) = (of(&[3, 8], DType::F32), of(&[8], DType::BF16));
    let refused = |updated: Updated, part: &str| {
        let said = kernels.adamw(&nodes, &[updated], BY).unwrap_err().to_string();
        assert!(said.contains("kernel adamw") && said.contains(part), "{said}");
    };
    let draws = Draws::new(0, 1, 0);
    let fits = Updated { state: &state, draws, gradient: &gradient, narrow: None };
    refused(Updated { gradient: &of(&[7], DType::BF16), ..fits }, "[3, 8], [7]");
    refused(Updated { gradient: &of(&[8], DType::F32), ..fits }, "F32");
    refused(Updated { state: &of(&[3, 8], DType::BF16), ..fits }, "BF16");
    refused(Updated { narrow: Some(&of(&[8], DType::F32)), ..fits }, "F32");
    refused(Updated { state: &of(&[4, 8], DType::F32), ..fits }, "[4, 8], [8]");
    refused(Updated { narrow: Some(&of(&[9], DType::BF16)), ..fits }, "[3, 8], [8]");
    let too_many = vec![&gradient; TENSORS + 1];
    assert!(kernels.sum_squares(&nodes, &too_many).is_err());
    assert!(kernels.adamw(&nodes, &vec![fits; TENSORS + 1], BY).is_err());
    let words = of(&[2, 8], DType::F32);
    let both = [fits, Updated { state: &words, ..fits }];
    assert!(kernels.adamw(&nodes, &both, BY).is_err(), "both kinds of states in one launch");
    assert!(nodes.into_vec().is_empty());
    Ok(())
}
