//! Gradients that are sums over rows.

use candle_core::{DType, Result, Tensor};
use proptest::prelude::*;
use rand::{Rng, SeedableRng, rngs::StdRng};

use super::{super::Kernels, TYPES, check, gpu, random, values_of};
use crate::ops::launch::Nodes;

/// `rows` ids below `vocab`, most of them few: tokens of a text are.
fn ids(rows: usize, vocab: u32, seed: u64) -> Vec<u32> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut id = || {
        let below = if rng.random_bool(0.5) { vocab.min(3) } else { vocab };
        rng.random_range(0..below)
    };
    (0..rows).map(|_| id()).collect()
}

/// Of each id the sum of its rows, in f32 and in their order: the kernel's to the last bit.
fn embedded(vocab: usize, ids: &[u32], dy: &[f32]) -> Vec<f32> {
    let width = dy.len() / ids.len();
    let mut table = vec![0.0; vocab * width];
    for (id, dy) in ids.iter().zip(dy.chunks_exact(width)) {
        let row = &mut table[*id as usize * width..][..width];
        row.iter_mut().zip(dy).for_each(|(sum, d)| *sum += d);
    }
    table
}

fn embed_grad_is_exact(
    dtype: DType,
    vocab: u32,
    rows: usize,
    width: usize,
    seed: u64,
) -> Result<()> {
    let (device, nodes) = (gpu(), Nodes::kept());
    let kernels = Kernels::on(&device, dtype).unwrap();
    let (dy, values) = random(&[rows, width], dtype, seed, &device);
    let ids = ids(rows, vocab, seed);
    let on_device = Tensor::new(ids.as_slice(), &device)?;
    let ours = kernels.embed_grad(&nodes, vocab as usize, &on_device, &dy)?;
    let table = embedded(vocab as usize, &ids, &values);
    let rounded = Tensor::new(table, &candle_core::Device::Cpu)?.to_dtype(dtype)?;
    assert_eq!(ours.dims(), [vocab as usize, width]);
    assert!(values_of(&ours) == values_of(&rounded), "{rows} x {width} of {vocab}, {dtype:?}");
    Ok(())
}

#[test]
fn rows_of_an_embedding_are_summed_in_their_order() -> Result<()> {
    for dtype in TYPES {
        for (vocab, rows, width) in [
            (1, 1, 1),
            (1, 1000, 8),
            (7, 5, 7),
            (300, 513, 896),
            (40_000, 4096, 64),
            (50, 8200, 1032),
            (9, 129, 3000),
        ] {
            embed_grad_is_exact(dtype, vocab, rows, width, 1)?;
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn so_they_are_in_any_shape(
        vocab in 1u32..600, rows in 1usize..700, width in 1usize..300, narrow: bool, seed: u64,
    ) {
        let dtype = if narrow { DType::BF16 } else { DType::F32 };
        embed_grad_is_exact(dtype, vocab, rows, width, seed).unwrap();
    }
}

/// Sums of columns in f64, and of their terms' magnitudes.
struct Sums {
    of: Vec<f64>,
    magnitudes: Vec<f64>,
}

impl Sums {
    fn add(&mut self, column: usize, term: f64) {
        self.of[column] += term;
        self.magnitudes[column] += term.abs();
    }

    /// That `ours` are these. A sum in f32 is off by so much of its terms' magnitudes, however much
    /// they cancel one another.
    fn check(&self, what: &str, dtype: DType, ours: &Tensor) {
        if dtype != DType::F32 {
            let theirs: Vec<f32> = self.of.iter().map(|&sum| sum as f32).collect();
            return check(what, dtype, ours, &theirs);
        }
        for ((ours, theirs), all) in values_of(ours).iter().zip(&self.of).zip(&self.magnitudes) {
            let apart = (f64::from(*ours) - theirs).abs() / all;
            assert!(apart < 5e-7, "{what}: {ours} for {theirs}, of {all}");
        }
    }
}

/// (towards a gain, the plain sum of rows) of rows x and dy of `width`.
fn by_column(x: &[f32], dy: &[f32], width: usize, eps: f64) -> [Sums; 2] {
    let none = || Sums { of: vec![0.0; width], magnitudes: vec![0.0; width] };
    let mut sums = [none(), none()];
    for (x, dy) in x.chunks_exact(width).zip(dy.chunks_exact(width)) {
        let mean = x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / width as f64;
        let inverse = 1.0 / (mean + eps).sqrt();
        for (i, (x, dy)) in x.iter().zip(dy).enumerate() {
            sums[0].add(i, f64::from(*dy) * f64::from(*x) * inverse);
            sums[1].add(i, f64::from(*dy));
        }
    }
    sums
}

#[test]
fn gains_and_biases_have_sums_of_rows() -> Result<()> {
    let (device, nodes) = (gpu(), Nodes::kept());
    for dtype in TYPES {
        let kernels = Kernels::on(&device, dtype).unwrap();
        // Every shape of rows, widths that fill none, and rows that fill no block or many.
        for width in [1, 3, 8, 40, 64, 72, 128, 200, 300, 512, 896, 1032, 2048, 4096, 8192] {
            for rows in [1, 2, 31, 700, 5000] {
                let ((x, xs), (dy, ds)) = (
                    random(&[rows, width], dtype, 1, &device),
                    random(&[rows, width], dtype, 2, &device),
                );
                let of = format!("{rows} x {width}");
                let [to_gain, to_bias] = by_column(&xs, &ds, width, 1e-6);
                let sum = kernels.gain_grad(&nodes, &x, 1e-6, &dy)?;
                to_gain.check(&format!("gain of {of}"), dtype, &sum);
                // Nothing depends on the order in which blocks come.
                let again = kernels.gain_grad(&nodes, &x, 1e-6, &dy)?;
                assert_eq!(values_of(&again), values_of(&sum), "{of}");
                let sum = kernels.sum_rows(&nodes, &dy)?;
                to_bias.check(&format!("bias of {of}"), dtype, &sum);
            }
        }
    }
    Ok(())
}

#[test]
fn rows_of_zeros_have_a_gain_of_zero() -> Result<()> {
    let (device, nodes) = (gpu(), Nodes::kept());
    let kernels = Kernels::on(&device, DType::F32).unwrap();
    let (x, (dy, _)) =
        (Tensor::zeros((9, 64), DType::F32, &device)?, random(&[9, 64], DType::F32, 1, &device));
    let sum = kernels.gain_grad(&nodes, &x, 1e-6, &dy)?;
    assert_eq!(values_of(&sum), vec![0.0; 64]);
    Ok(())
}

#[test]
fn sums_that_do_not_fit_are_refused() {
    let (device, nodes) = (gpu(), Nodes::kept());
    let kernels = Kernels::on(&device, DType::F32).unwrap();
    let of = |shape: &[usize]| random(shape, DType::F32, 1, &device).0;
    let refused = |result: Result<Tensor>, parts: &[&str]| {
        let said = result.unwrap_err().to_string();
        assert!(parts.iter().all(|part| said.contains(part)), "{said}");
    };
    refused(kernels.sum_rows(&nodes, &of(&[2, 2049])), &["kernel sum_rows", "[2, 2049]"]);
    let (x, dy) = (of(&[2, 6]), of(&[3, 4]));
    refused(kernels.gain_grad(&nodes, &x, 1e-6, &dy), &["gain_grad", "[2, 6], [3, 4]"]);
    let ids = Tensor::new(&[0u32, 1], &device).unwrap();
    refused(kernels.embed_grad(&nodes, 4, &ids, &dy), &["embed_grad", "[2], [3, 4]"]);
    assert!(nodes.into_vec().is_empty());
}
