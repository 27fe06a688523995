//! Updates against AdamW and clipping written out in f64.

mod tiny;

use std::cell::RefCell;

use candle_core::Device;
use flopaudit::{
    config::{ModelConfig, Projection},
    error::Error,
    ledger::{Dtype, Key, Ledger, MomentDtype, Op, Phase},
    meter::Meter,
    model::Trained,
    ops::{Gradients, Tensor},
    train::{Hyper, Trainer},
};
use rand::{Rng, SeedableRng, rngs::StdRng};
use tiny::norm;

const RATE: f64 = 0.03;
const HYPER: Hyper = Hyper {
    betas: (0.8, 0.95),
    eps: 1e-4,
    weight_decay: 0.1,
    clip: None,
    moments: MomentDtype::F32,
};

fn trainer(meter: Meter, config: &ModelConfig, trained: Trained, hyper: Hyper) -> Trainer {
    let model = tiny::model(config, &[Projection::QProj], trained);
    Trainer::new(meter, model, trained, hyper, 4, false).unwrap()
}

/// A gradient for every trained parameter, and the same values.
fn draw(meter: Meter, trainer: &mut Trainer, rng: &mut StdRng) -> (Gradients, Vec<Vec<f64>>) {
    let (mut gradients, mut all) = (Gradients::default(), vec![]);
    for (_, _, tensor) in trainer.model.trained() {
        let values: Vec<f32> =
            (0..tensor.elements()).map(|_| rng.random_range(-0.2..0.2)).collect();
        all.push(values.iter().copied().map(f64::from).collect());
        let gradient = Tensor::from_vec(values, tensor.dims(), Dtype::F32, &Device::Cpu).unwrap();
        gradients.add(meter, tensor, gradient).unwrap();
    }
    (gradients, all)
}

/// Every parameter with its moments, as p, m and v of each.
fn state(trainer: &Trainer) -> Vec<[Vec<f64>; 3]> {
    let split = |(_, values): (&str, Vec<f32>)| {
        let n = values.len() / 3;
        [0, 1, 2].map(|i| values[i * n..(i + 1) * n].iter().copied().map(f64::from).collect())
    };
    trainer.optimizer.state().unwrap().into_iter().map(split).collect()
}

/// What the model computes with.
fn parameters(trainer: &mut Trainer) -> Vec<Vec<f32>> {
    trainer.model.trained().into_iter().map(|(.., tensor)| tensor.to_vec().unwrap()).collect()
}

#[test]
fn five_steps_equal_adamw_by_hand() {
    let observer = RefCell::new(());
    let meter = Meter::new(&observer, Phase::Setup);
    // An embedding of more elements than one task of the kernel takes.
    let config = ModelConfig { vocab_size: 1500, ..tiny::config(true) };
    for trained in [Trained::Adapters, Trained::All] {
        let mut trainer = trainer(meter, &config, trained, HYPER);
        let mut rng = StdRng::seed_from_u64(4);
        let mut expected = state(&trainer);
        let mut worst: f64 = 0.0;
        for t in 1..=5 {
            let (gradients, values) = draw(meter, &mut trainer, &mut rng);
            let step = trainer.update(meter, (0.5, gradients), RATE).unwrap();
            let norms: Vec<f64> = values.iter().map(|g| norm(g)).collect();
            assert_eq!((step.loss, step.norms.len()), (0.5, norms.len()));
            for (a, b) in step.norms.iter().zip(&norms) {
                assert!((a / b - 1.0).abs() < 1e-6, "a norm of {a}, not {b}");
            }
            assert!((step.gradient_norm / norm(&norms) - 1.0).abs() < 1e-6);

            let Hyper { betas: (b1, b2), eps, weight_decay, .. } = HYPER;
            for ([p, m, v], g) in expected.iter_mut().zip(values) {
                for i in 0..g.len() {
                    p[i] -= RATE * weight_decay * p[i];
                    m[i] = b1 * m[i] + (1.0 - b1) * g[i];
                    v[i] = b2 * v[i] + (1.0 - b2) * g[i] * g[i];
                    let (mean, square) = (m[i] / (1.0 - b1.powi(t)), v[i] / (1.0 - b2.powi(t)));
                    p[i] -= RATE * mean / (square.sqrt() + eps);
                }
            }
            let found = state(&trainer);
            for (found, expected) in found.iter().flatten().zip(expected.iter().flatten()) {
                let off: Vec<f64> = found.iter().zip(expected).map(|(a, b)| a - b).collect();
                worst = worst.max(norm(&off) / norm(expected));
            }
            // The model reads the master itself.
            for (read, [master, ..]) in parameters(&mut trainer).iter().zip(&found) {
                assert!(read.iter().zip(master).all(|(a, b)| f64::from(*a) == *b));
            }
        }
        println!("{trained:?}: worst error {worst:.1e} after 5 steps");
        assert!(worst < 1e-5, "{trained:?}: {worst}");
        assert_eq!(trainer.optimizer.steps(), 5);
    }
}

#[test]
fn gradients_are_scaled_down_to_the_norm_asked_for() {
    let observer = RefCell::new(());
    let meter = Meter::new(&observer, Phase::Setup);
    for clip in [None, Some(0.3), Some(1e6)] {
        let hyper = Hyper { clip, ..HYPER };
        let mut trainer = trainer(meter, &tiny::config(false), Trained::All, hyper);
        let (gradients, values) = draw(meter, &mut trainer, &mut StdRng::seed_from_u64(5));
        let step = trainer.update(meter, (0.0, gradients), RATE).unwrap();
        let size = norm(&values.concat());
        assert!(size > 1.0 && (step.gradient_norm / size - 1.0).abs() < 1e-6);
        let factor = clip.map_or(1.0, |most| (most / (size + 1e-6)).min(1.0));
        // The first moments are what arrived, times 1 − β₁.
        let arrived = |m: &[f64]| norm(m) / (1.0 - HYPER.betas.0);
        let moments = state(&trainer);
        for ([_, m, _], g) in moments.iter().zip(&values) {
            assert!((arrived(m) / (factor * norm(g)) - 1.0).abs() < 1e-5, "clipped to {clip:?}");
        }
        let all: Vec<f64> = moments.into_iter().flat_map(|[_, m, _]| m).collect();
        let expected = if clip == Some(0.3) { 0.3 } else { size };
        assert!((arrived(&all) / expected - 1.0).abs() < 1e-5);
    }
}

#[test]
fn gradients_that_are_no_numbers_change_nothing() {
    let observer = RefCell::new(());
    let meter = Meter::new(&observer, Phase::Setup);
    for (clip, bad) in [(None, f32::NAN), (Some(1.0), f32::NAN), (Some(1.0), f32::INFINITY)] {
        let hyper = Hyper { clip, ..HYPER };
        let mut trainer = trainer(meter, &tiny::config(true), Trained::Adapters, hyper);
        let rng = &mut StdRng::seed_from_u64(6);
        let (gradients, _) = draw(meter, &mut trainer, rng);
        trainer.update(meter, (1.0, gradients), RATE).unwrap();
        let before = (parameters(&mut trainer), state(&trainer));

        let (mut gradients, _) = draw(meter, &mut trainer, rng);
        let (_, _, last) = trainer.model.trained().pop().unwrap();
        let mut values = vec![0.0; last.elements()];
        values[1] = bad;
        let poison = Tensor::from_vec(values, last.dims(), Dtype::F32, &Device::Cpu).unwrap();
        gradients.add(meter, last, poison).unwrap();
        let error = trainer.update(meter, (1.0, gradients), RATE).unwrap_err();
        let Some(Error::Diverged(why)) = error.downcast_ref() else { panic!("{error:?}") };
        assert!(why.contains("norm of step 2"), "{why}");
        assert_eq!((parameters(&mut trainer), state(&trainer)), before);
        assert_eq!(trainer.optimizer.steps(), 1);

        // And it can go on.
        let (gradients, _) = draw(meter, &mut trainer, rng);
        trainer.update(meter, (1.0, gradients), RATE).unwrap();
        assert_eq!(trainer.optimizer.steps(), 2);
    }
}

#[test]
fn a_loss_that_is_no_number_and_a_gradient_too_few_are_errors() {
    let observer = RefCell::new(());
    let meter = Meter::new(&observer, Phase::Setup);
    let config = tiny::config(true);
    let mut trainer = trainer(meter, &config, Trained::All, HYPER);
    let error = trainer.update(meter, (1.0, Gradients::default()), RATE).unwrap_err();
    assert!(error.to_string().contains("model.embed_tokens.weight has no gradient"), "{error}");

    let text = tiny::Text::new(&config, 1, 4);
    trainer.gradients(meter, &[text.labelled()]).unwrap();
    let (.., norm) = trainer.model.trained().pop().unwrap();
    tiny::write(norm, vec![f32::NAN; norm.elements()]);
    let error = trainer.gradients(meter, &[text.labelled()]).unwrap_err();
    assert!(error.to_string().contains("the loss of step 1 is NaN"), "{error}");
}

#[test]
fn micro_batches_add_up() {
    let observer = RefCell::new(());
    let meter = Meter::new(&observer, Phase::Setup);
    let config = tiny::config(false);
    let mut trainer = trainer(meter, &config, Trained::All, HYPER);
    let rows = tiny::Text::new(&config, 3, 4).rows();
    let texts: Vec<_> = rows.iter().map(tiny::Text::labelled).collect();
    let (loss, mut together) = trainer.gradients(meter, &texts).unwrap();
    let mut apart: Vec<_> =
        texts.iter().map(|text| trainer.gradients(meter, &[*text]).unwrap()).collect();
    assert_eq!(loss, apart.iter().map(|(loss, _)| loss).sum::<f64>());
    for (name, _, tensor) in trainer.model.trained() {
        let take = |found: &mut Gradients| found.take(tensor).unwrap().to_vec().unwrap();
        let mut sum = vec![0.0; tensor.elements()];
        for (_, found) in &mut apart {
            sum.iter_mut().zip(take(found)).for_each(|(sum, x)| *sum += x);
        }
        assert_eq!(take(&mut together), sum, "{name}");
    }
}

#[test]
fn a_narrow_model_has_masters_and_its_gradients_are_widened() {
    let ledger = RefCell::new(Ledger::default());
    let meter = Meter::new(&ledger, Phase::Setup);
    let config = tiny::config(true);
    for dtype in [Dtype::BF16, Dtype::F16] {
        let trainer = || {
            let model = tiny::model_in(dtype, &config, &[], Trained::All);
            let hyper = Hyper { clip: Some(0.3), ..HYPER };
            Trainer::new(meter, model, Trained::All, hyper, 4, false).unwrap()
        };
        // A gradient in the model's type does what the same values do in f32.
        let (mut narrow, mut wide) = (trainer(), trainer());
        for step in 0..2 {
            let mut rng = StdRng::seed_from_u64(step);
            let (mut of_narrow, mut of_wide) = (Gradients::default(), Gradients::default());
            for ((.., a), (.., b)) in narrow.model.trained().into_iter().zip(wide.model.trained()) {
                let values = (0..a.elements()).map(|_| rng.random_range(-0.2..0.2)).collect();
                let drawn = Tensor::from_vec(values, a.dims(), dtype, &Device::Cpu).unwrap();
                of_wide.add(meter, b, drawn.to_dtype(Dtype::F32).unwrap()).unwrap();
                of_narrow.add(meter, a, drawn).unwrap();
            }
            let step = narrow.update(meter, (0.0, of_narrow), RATE).unwrap();
            assert_eq!(step, wide.update(meter, (0.0, of_wide), RATE).unwrap());
        }
        assert_eq!(state(&narrow), state(&wide));
        // The model reads the masters, rounded.
        let masters = narrow.optimizer.masters(&mut narrow.model).unwrap();
        for (read, master) in parameters(&mut narrow).into_iter().zip(masters) {
            let n = read.len();
            let rounded = Tensor::from_vec(master.values.clone(), n, dtype, &Device::Cpu).unwrap();
            assert_eq!(read, rounded.to_vec().unwrap(), "{}", master.name);
            assert_ne!(read, master.values, "{} has a master that is no finer", master.name);
        }
        let clipped =
            |key: &Key| matches!(key.op, Op::Scale { .. }) && key.phase == Phase::Clipping;
        let of_f32 = |key: &&Key| key.dtype == Dtype::F32;
        let ledger = ledger.borrow();
        let scaled: Vec<_> = ledger.iter().map(|(key, _)| key).filter(|key| clipped(key)).collect();
        assert!(!scaled.is_empty() && scaled.iter().all(of_f32), "{scaled:?}");
    }
}

#[test]
fn passes_are_summed_in_f32() {
    let observer = RefCell::new(());
    let meter = Meter::new(&observer, Phase::Setup);
    let config = tiny::config(false);
    for (dtype, alone) in
        [(Dtype::F32, Dtype::F32), (Dtype::BF16, Dtype::BF16), (Dtype::F16, Dtype::F32)]
    {
        let model = tiny::model_in(dtype, &config, &[], Trained::All);
        let mut trainer = Trainer::new(meter, model, Trained::All, HYPER, 4, false).unwrap();
        let rows = tiny::Text::new(&config, 2, 4).rows();
        let texts: Vec<_> = rows.iter().map(tiny::Text::labelled).collect();
        let of_texts = |texts: &[_]| trainer.gradients(meter, texts).unwrap().1;
        let mut found = [of_texts(&texts[..1]), of_texts(&texts[1..]), of_texts(&texts)];
        for (name, _, tensor) in trainer.model.trained() {
            let [first, second, both] = found.each_mut().map(|of| of.take(tensor).unwrap());
            assert_eq!(first.dtype().unwrap(), alone, "{name}");
            assert_eq!(both.dtype().unwrap(), Dtype::F32, "{name}");
            let (a, b) = (first.to_vec().unwrap(), second.to_vec().unwrap());
            let sum: Vec<f32> = a.iter().zip(b).map(|(a, b)| a + b).collect();
            assert_eq!(both.to_vec().unwrap(), sum, "{name}");
        }
    }
}

/// The loss after some steps over one text, and every parameter with its moments.
fn learnt(moments: MomentDtype, seed: u64, steps: usize) -> (f64, Vec<[Vec<f64>; 3]>) {
    let observer = RefCell::new(());
    let meter = Meter::new(&observer, Phase::Setup);
    let config = tiny::config(true);
    // As trainings have it: a second moment moves by a thousandth of itself, which is less than half
    // a step of bf16.
    let hyper = Hyper { moments, ..Hyper::DEFAULT };
    let mut trainer = trainer(meter, &config, Trained::All, hyper).seeded(seed);
    let text = tiny::Text::new(&config, 2, 4);
    for _ in 0..steps {
        let found = trainer.gradients(meter, &[text.labelled()]).unwrap();
        trainer.update(meter, found, 3e-3).unwrap();
    }
    let (loss, _) = trainer.gradients(meter, &[text.labelled()]).unwrap();
    (loss, state(&trainer))
}

#[test]
fn moments_in_bf16_learn_as_those_in_f32() {
    let (start, _) = learnt(MomentDtype::F32, 0, 0);
    for steps in [20, 60] {
        let (wide, of_wide) = learnt(MomentDtype::F32, 0, steps);
        let (narrow, of_narrow) = learnt(MomentDtype::BF16, 5, steps);
        println!("{steps} steps: {start} to {wide}, {narrow} with moments in bf16");
        assert!(wide < 0.9 * start, "{wide} of {start}");
        assert!((narrow - wide).abs() < 0.02 * (start - wide), "{narrow}, not {wide}");
        for ([_, m, v], [_, of_m, of_v]) in of_narrow.iter().zip(&of_wide) {
            // bf16 holds what is kept.
            let fits = |x: &f64| (*x as f32).to_bits().trailing_zeros() >= 16;
            assert!(m.iter().chain(v).all(fits));
            // Steps of two parts in a thousand add up to no drift.
            let sum = |values: &[f64]| values.iter().sum::<f64>();
            assert!((sum(v) / sum(of_v) - 1.0).abs() < 0.1, "{} for {}", sum(v), sum(of_v));
            assert_eq!(m.len(), of_m.len());
        }
    }
    // A run is its seed's.
    let of_seed = |seed| learnt(MomentDtype::BF16, seed, 3);
    assert_eq!(of_seed(1), of_seed(1));
    assert_ne!(of_seed(1).1, of_seed(2).1);
}

#[test]
fn moments_in_bf16_are_those_of_f32_rounded() {
    let observer = RefCell::new(());
    let meter = Meter::new(&observer, Phase::Setup);
    let config = ModelConfig { vocab_size: 1500, ..tiny::config(true) };
    let trainer = |moments| trainer(meter, &config, Trained::All, Hyper { moments, ..HYPER });
    let (mut narrow, mut wide) = (trainer(MomentDtype::BF16), trainer(MomentDtype::F32));
    let mut rng = StdRng::seed_from_u64(9);
    for _ in 0..3 {
        // From one state, by one gradient.
        let kept = narrow.optimizer.state().unwrap();
        let kept: Vec<(String, Vec<f32>)> =
            kept.into_iter().map(|(name, values)| (name.into(), values)).collect();
        let find = |name: &str| Ok(kept.iter().find(|(known, _)| known == name).unwrap().1.clone());
        let steps = narrow.optimizer.steps();
        wide.optimizer.restore(&mut wide.model, steps, find).unwrap();
        let mut again = rng.clone();
        let (gradients, _) = draw(meter, &mut narrow, &mut rng);
        narrow.update(meter, (0.0, gradients), RATE).unwrap();
        let (gradients, _) = draw(meter, &mut wide, &mut again);
        wide.update(meter, (0.0, gradients), RATE).unwrap();
        for ([p, moments @ ..], [of_p, exact @ ..]) in state(&narrow).iter().zip(&state(&wide)) {
            assert_eq!(p, of_p);
            let (mut up, mut down) = (0, 0);
            for (found, exact) in moments.iter().flatten().zip(exact.iter().flatten()) {
                let low = f64::from(f32::from_bits((*exact as f32).to_bits() & 0xffff_0000));
                let high = f32::from_bits(((*exact as f32).to_bits() & 0xffff_0000) + 0x1_0000);
                assert!(*found == low || *found == f64::from(high), "{found} for {exact}");
                let is_up = u32::from(*found != low);
                (up, down) = (up + is_up, down + 1 - is_up);
            }
            assert!(up > 0 && down > 0, "{up} up, {down} down");
        }
    }
}
