//! Draws of a sampler, and where they have to fall.

use std::cell::RefCell;

use flopaudit::{
    error::Result,
    ledger::{Ledger, Module, Phase},
    meter::Meter,
    ops::{Sampler, Tensor},
    workload::Sampling,
};
use rand::{Rng, SeedableRng, rngs::StdRng};

/// What `steps` choices from the same logits give, row i's by a generator of seed i, and what they
/// reported.
pub fn choices(
    sampling: Sampling,
    logits: &Tensor,
    seen: &[Vec<u32>],
    steps: usize,
) -> Result<(Vec<Vec<u32>>, Ledger)> {
    let ledger = RefCell::new(Ledger::default());
    let at = Meter::new(&ledger, Phase::Sampling).at(Module::Sampler);
    let seeds: Vec<u64> = (0..seen.len() as u64).collect();
    let mut sampler = Sampler::new(sampling, &seeds);
    let all = (0..steps).map(|_| sampler.next(at, logits, seen)).collect::<Result<_>>()?;
    Ok((all, ledger.into_inner()))
}

/// Temperatures, at the lowest of which most weights vanish, with every kind of cut.
pub fn samplings() -> Vec<Sampling> {
    let cuts = [
        (None, None),
        (Some(1), None),
        (Some(3), None),
        (Some(50), None),
        (None, Some(0.9)),
        (None, Some(1e-9)),
        (None, Some(1.0)),
        (Some(20), Some(0.8)),
        (Some(1_000_000), Some(0.5)),
    ];
    let all = [0.02, 0.7, 3.0].into_iter().flat_map(|t| cuts.map(|cut| (t, cut))).enumerate();
    all.map(|(i, (temperature, (top_k, top_p)))| {
        let repeat_penalty = if i % 2 == 0 { 1.0 } else { 1.2 };
        Sampling { temperature, top_k, top_p, repeat_penalty }
    })
    .collect()
}

/// Whether each token of `drawn`, step after step, is where its row's generator points: scaled logits
/// in f32, as they are rounded there, their weights and sums in f64.
pub fn check_draws(sampling: Sampling, logits: &[f32], seen: &[Vec<u32>], drawn: &[Vec<u32>]) {
    let width = logits.len() / seen.len();
    for (row, (logits, seen)) in logits.chunks_exact(width).zip(seen).enumerate() {
        let drawn: Vec<u32> = drawn.iter().map(|step| step[row]).collect();
        check_row(sampling, logits, seen, row as u64, &drawn);
    }
}

fn check_row(sampling: Sampling, logits: &[f32], seen: &[u32], seed: u64, drawn: &[u32]) {
    let Sampling { temperature, top_k, top_p, repeat_penalty } = sampling;
    let mut logits = logits.to_vec();
    for &id in seen {
        let penalty = repeat_penalty as f32;
        let x = &mut logits[id as usize];
        *x *= if *x > 0.0 { 1.0 / penalty } else { penalty };
    }
    let scaled: Vec<f32> = logits.iter().map(|x| x * (1.0 / temperature as f32)).collect();
    let top = scaled.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f64> = scaled.iter().map(|x| f64::from(x - top).exp()).collect();
    let mut order: Vec<usize> = (0..weights.len()).collect();
    let fewer = top_k.is_some_and(|k| k < order.len());
    if fewer || top_p.is_some() {
        order.sort_by(|&a, &b| weights[b].total_cmp(&weights[a]).then(a.cmp(&b)));
    }
    // Mass before each token, and of all that may be drawn.
    let mut before = vec![0.0];
    before.extend(order.iter().scan(0.0, |sum, &i| {
        *sum += weights[i];
        Some(*sum)
    }));
    let mut all = before[top_k.unwrap_or(usize::MAX).min(order.len())];
    if let Some(p) = top_p {
        let enough = f64::from(p as f32) * all; // in f32 as elsewhere: many equal weights may tie
        all = before[1..].iter().copied().find(|&with| with >= enough).unwrap();
    }
    let mut rng = StdRng::seed_from_u64(seed);
    for &token in drawn {
        let mark = f64::from(rng.random::<f32>()) * all;
        let place = order.iter().position(|&i| i == token as usize).unwrap();
        let (before, own) = (before[place], weights[token as usize]);
        // f32 rounds weights by 1e-7, and so may take two small neighbours for each other.
        let off = own.min(1e-4 * all) + 3e-6 * all;
        assert!(
            (before - off..before + own + off).contains(&mark),
            "{sampling:?}: {token} holds {before} and {own} of {all}, not {mark}"
        );
    }
}
