//! Draws on the CPU, from rows as long as the vocabulary's too: each where its generator points.

mod draws;

use candle_core::Device;
use draws::{check_draws, choices, samplings};
use flopaudit::{ledger::Dtype, ops::Tensor, workload::Sampling};
use rand::{Rng, SeedableRng, rngs::StdRng};

#[test]
fn draws_fall_where_they_have_to() {
    for (rows, width) in [(1, 5), (3, 320), (1, 151_936)] {
        let mut rng = StdRng::seed_from_u64(3);
        let values: Vec<f32> = (0..rows * width).map(|_| rng.random_range(-8.0..8.0)).collect();
        let logits =
            Tensor::from_vec(values.clone(), (rows, width), Dtype::F32, &Device::Cpu).unwrap();
        let seen = vec![(0..width as u32).step_by(7).collect(); rows];
        for sampling in samplings() {
            let (drawn, _) = choices(sampling, &logits, &seen, 12).unwrap();
            check_draws(sampling, &values, &seen, &drawn);
        }
    }
}

#[test]
fn equal_weights_are_drawn_equally_often() {
    let even = Tensor::zeros((1, 8), Dtype::F32, &Device::Cpu).unwrap();
    let warm = Sampling { temperature: 1.0, ..Sampling::GREEDY };
    let (drawn, _) = choices(warm, &even, &[vec![]], 4000).unwrap();
    for token in 0..8 {
        let count = drawn.iter().filter(|row| row[0] == token).count();
        assert!((380..620).contains(&count), "{token}: {count}");
    }
}
