//! The gradient of each op against finite differences, in f32 on small random inputs.

use std::cell::RefCell;

use candle_core::Device;
use flopaudit::{
    config::{Activation, Rope, RopeScaling},
    error::Result,
    ledger::{Dtype, Ledger, Module, Phase, Scope},
    meter::{At, Meter},
    ops::{self, CausalMask, Gradients, Ids, Losses, RopeTable, Tensor, backward},
};
use proptest::prelude::*;
use rand::{Rng, SeedableRng, rngs::StdRng};

/// How far an input moves to either side; f32 rounds outputs by a hundred-thousandth of it.
const STEP: f32 = 1e-2;
/// Most distance between the gradient and the slopes found, of the gradient's norm.
const TOLERANCE: f64 = 2e-3;

const SCOPE: Scope = Scope { layer: None, module: Module::Mlp };

type Run = Box<dyn Fn(At, &[Tensor]) -> Result<Tensor>>;

/// An op of inputs that all need a gradient.
struct Case {
    name: &'static str,
    shapes: Vec<Vec<usize>>,
    run: Run,
}

const ROPE: Rope = Rope { theta: 10.0, scaling: RopeScaling::Default };

/// Every differentiable op, and every layout, on inputs as long as `b`, `m`, `k` and `n` say.
fn cases([b, m, k, n]: [usize; 4]) -> Vec<Case> {
    let case = |name, shapes: &[&[usize]], run: Run| {
        let shapes = shapes.iter().map(|shape| shape.to_vec()).collect();
        Case { name, shapes, run }
    };
    let ids: Vec<u32> = (0..b * m).map(|i| (i * i % (n + 1)) as u32).collect();
    vec![
        case(
            "linear",
            &[&[b, m, k], &[n, k]],
            Box::new(|at, x| Ok(ops::linear(at, &x[0], &x[1])?.share())),
        ),
        case("bias", &[&[b, m, n], &[n]], Box::new(|at, x| ops::bias(at, &x[0], &x[1]))),
        case(
            "matmul",
            &[&[b, 2, m, k], &[b, 2, k, n]],
            Box::new(|at, x| Ok(ops::matmul(at, &x[0], &x[1])?.share())),
        ),
        case(
            "matmul of a view",
            &[&[b, m, k], &[b, n, k]],
            Box::new(|at, x| Ok(ops::matmul(at, &x[0], &x[1].t()?)?.share())),
        ),
        case("add", &[&[b, m, n], &[b, m, n]], Box::new(|at, x| ops::add(at, &x[0], &x[1]))),
        case("mul", &[&[b, m, n], &[b, m, n]], Box::new(|at, x| ops::mul(at, &x[0], &x[1]))),
        case("square", &[&[m, n]], Box::new(|at, x| ops::mul(at, &x[0], &x[0]))),
        case("scale", &[&[b, n]], Box::new(|at, x| ops::scale(at, &x[0], &tensor(&[-0.7], &[1])))),
        case("silu", &[&[b, m, n]], Box::new(|at, x| ops::silu(at, &x[0]))),
        case(
            "rms_norm",
            &[&[b, m, n], &[n]],
            Box::new(|at, x| ops::rms_norm(at, &x[0], &x[1], 1e-2)),
        ),
        case(
            "rope",
            &[&[b, n, m, 2 * k]],
            Box::new(move |at, x| {
                let table = RopeTable::new(at, m + 3, 2 * k, &ROPE, Dtype::F32, &Device::Cpu)?;
                ops::rope(at, &x[0], &table, 3)
            }),
        ),
        case("softmax", &[&[b, m, n]], Box::new(|at, x| ops::softmax(at, x[0].copied()?))),
        case(
            "mask and softmax",
            &[&[b, m, k + m]],
            Box::new(move |at, x| {
                let mask = CausalMask::new(m, k, None, Dtype::F32, &Device::Cpu)?;
                ops::masked_softmax(at, x[0].copied()?, &mask)
            }),
        ),
        case(
            "softmax in a window",
            &[&[b, m, 1 + m]],
            Box::new(move |at, x| {
                let mask = CausalMask::new(m, 7, Some(2), Dtype::F32, &Device::Cpu)?;
                ops::masked_softmax(at, x[0].copied()?, &mask)
            }),
        ),
        case(
            "gated by SiLU",
            &[&[b, m, n], &[b, m, n]],
            Box::new(|at, x| ops::gated(at, Activation::Silu, &x[0], &x[1])),
        ),
        case(
            "gated by GELU",
            &[&[b, m, n], &[b, m, n]],
            Box::new(|at, x| ops::gated(at, Activation::GeluTanh, &x[0], &x[1])),
        ),
        case("gelu", &[&[b, m, n]], Box::new(|at, x| ops::gelu(at, &x[0]))),
        case(
            "rms_norm by 1 + gain",
            &[&[b, m, n], &[n]],
            Box::new(|at, x| ops::shifted_rms_norm(at, &x[0], &x[1], &tensor(&[1.0], &[1]), 1e-2)),
        ),
        case(
            "rotated heads",
            &[&[b, m, n * 2 * k]],
            Box::new(move |at, x| {
                let table = RopeTable::new(at, m + 3, 2 * k, &ROPE, Dtype::F32, &Device::Cpu)?;
                let factor = Tensor::from_vec(vec![0.5], 1, Dtype::F32, &Device::Cpu)?;
                let turned = ops::rotated_heads(at, &x[0], n, &table, 3, Some(&factor))?;
                ops::merge_heads(&turned)
            }),
        ),
        case(
            "embed",
            &[&[n + 1, k]],
            Box::new(move |at, x| {
                let (ids, factor) = (Ids::Host { ids: &ids, batch: b }, tensor(&[1.5], &[1]));
                Ok(ops::embed(at, &x[0], ids, Some(&factor))?.share())
            }),
        ),
        case("reshape", &[&[b, m, n]], Box::new(move |_, x| x[0].reshape((n, m * b)))),
        case("transpose", &[&[b, m, n]], Box::new(|_, x| x[0].transpose(0, 2))),
        case("t", &[&[b, m, n]], Box::new(|_, x| x[0].t())),
        case("contiguous", &[&[m, n]], Box::new(|_, x| x[0].t()?.contiguous())),
        case("narrow", &[&[b, m + k, n]], Box::new(move |_, x| x[0].narrow(1, k / 2, m))),
        case(
            "one input read by many",
            &[&[b, m], &[m, m]],
            Box::new(|at, x| {
                let y = ops::linear(at, &x[0], &x[1])?.share();
                let gated = ops::mul(at, &ops::silu(at, &y)?, &x[0])?;
                let again = ops::linear(at, &gated, &x[1])?.share();
                ops::add(at, &ops::add(at, &gated, &y)?, &again)
            }),
        ),
    ]
}

fn tensor(values: &[f32], shape: &[usize]) -> Tensor {
    Tensor::from_vec(values.to_vec(), shape, Dtype::F32, &Device::Cpu).unwrap()
}

/// Of either sign and away from zero, where a norm of few elements has a kink.
fn random(rng: &mut StdRng, n: usize) -> Vec<f32> {
    (0..n).map(|_| rng.random_range(0.4..1.2) * [-1.0, 1.0][rng.random_range(0..2)]).collect()
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

/// (f(x + h) − f(x − h)) / 2h, element by element.
fn slopes(x: &[f32], f: impl Fn(&[f32]) -> f64) -> Vec<f32> {
    let slope = |i: usize| {
        let at = |h| {
            let mut x = x.to_vec();
            x[i] += h;
            (f64::from(x[i]), f(&x))
        };
        let (ahead, behind) = (at(STEP), at(-STEP));
        ((ahead.1 - behind.1) / (ahead.0 - behind.0)) as f32
    };
    (0..x.len()).map(slope).collect()
}

/// ‖a − b‖ / ‖b‖, or of `least` where ‖b‖ is next to nothing.
fn apart(a: &[f32], b: &[f32], least: f64) -> f64 {
    assert_eq!(a.len(), b.len());
    let difference: Vec<f32> = a.iter().zip(b).map(|(a, b)| a - b).collect();
    dot(&difference, &difference).sqrt() / dot(b, b).sqrt().max(least)
}

/// Gradients of Σ cotangent · run(values) towards those inputs that are `needed`.
fn gradients(
    run: &Run,
    inputs: &[Tensor],
    needed: &[bool],
    cotangent: &[f32],
) -> Vec<Option<Vec<f32>>> {
    let observer = RefCell::new(());
    let meter = Meter::new(&observer, Phase::Forward).taped(true);
    // An op may overwrite its input: a copy of each.
    let copy = |x: &Tensor| tensor(&x.to_vec().unwrap(), x.dims());
    let inputs: Vec<_> = inputs
        .iter()
        .zip(needed)
        .map(|(x, needed)| if *needed { copy(x).leaf(SCOPE) } else { copy(x) })
        .collect();
    let y = run(meter.at(Module::Mlp), &inputs).unwrap();
    let mut found = backward(meter, &y, tensor(cotangent, y.dims())).unwrap();
    let take = |x: &Tensor| {
        let gradient = found.take(x)?;
        assert_eq!(gradient.dims(), x.dims());
        Some(gradient.to_vec().unwrap())
    };
    inputs.iter().map(take).collect()
}

/// The worst error of `case`'s gradients.
fn error(Case { name, shapes, run }: &Case, seed: u64) -> f64 {
    let observer = RefCell::new(());
    let at = Meter::new(&observer, Phase::Forward).at(Module::Mlp);
    let mut rng = StdRng::seed_from_u64(seed);
    let mut draw = |shape: &Vec<usize>| random(&mut rng, shape.iter().product());
    let values: Vec<Vec<f32>> = shapes.iter().map(&mut draw).collect();
    let inputs = |values: &[Vec<f32>]| -> Vec<Tensor> {
        values.iter().zip(shapes).map(|(values, shape)| tensor(values, shape)).collect()
    };
    let output = |values: &[Vec<f32>]| run(at, &inputs(values)).unwrap();
    let y = output(&values);
    assert!(!y.needs_gradient(), "{name} keeps a graph that nobody asked for");
    let cotangent = draw(&y.dims().to_vec());

    let together = gradients(run, &inputs(&values), &vec![true; shapes.len()], &cotangent);
    let mut worst: f64 = 0.0;
    for (i, found) in together.into_iter().enumerate() {
        let expected = slopes(&values[i], |moved| {
            let mut values = values.clone();
            values[i] = moved.to_vec();
            dot(&cotangent, &output(&values).to_vec().unwrap())
        });
        let found = found.unwrap_or_else(|| panic!("{name} has no gradient of input {i}"));
        let least = 0.1 * dot(&cotangent, &cotangent).sqrt();
        worst = worst.max(apart(&found, &expected, least));
        // Alone it is the same, and nothing else gets one.
        let needed: Vec<bool> = (0..shapes.len()).map(|j| j == i).collect();
        for (j, alone) in
            gradients(run, &inputs(&values), &needed, &cotangent).into_iter().enumerate()
        {
            assert_eq!(alone, (j == i).then(|| found.clone()), "{name}, input {j}");
        }
    }
    worst
}

#[test]
fn every_op_has_the_gradient_of_its_slopes() {
    // Also rows wider than a vector register's lanes, and more than the product of few rows takes.
    for dims in [[2, 3, 4, 5], [1, 9, 2, 40], [1, 2, 36, 3]] {
        for case in cases(dims) {
            let error = error(&case, 1);
            println!("{dims:?} {}: {error:.1e}", case.name);
            assert!(error < TOLERANCE, "{} on {dims:?}: {error}", case.name);
        }
    }
}

/// Loss and gradient of `logits` (rows, V).
fn cross_entropy(logits: &[f32], targets: &[u32], weights: &[f32]) -> (f64, Vec<f32>) {
    let observer = RefCell::new(());
    let at = Meter::new(&observer, Phase::Loss).at(Module::Loss);
    let logits = tensor(logits, &[targets.len(), logits.len() / targets.len()]);
    let copied = || logits.copied().unwrap();
    let (losses, gradient) =
        ops::cross_entropy_with_gradient(at, copied(), targets, weights).unwrap();
    let loss = Losses::sum(&[losses]).unwrap();
    let alone = ops::cross_entropy(at, copied(), targets, weights).unwrap();
    assert_eq!(Losses::sum(&[alone]).unwrap(), loss);
    (loss, gradient.to_vec().unwrap())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn so_it_has_on_any_shape(dims in [1usize..5, 1usize..5, 1usize..5, 1usize..5], seed: u64) {
        for case in cases(dims) {
            let error = error(&case, seed);
            prop_assert!(error < TOLERANCE, "{} on {:?}: {}", case.name, dims, error);
        }
    }

    #[test]
    fn cross_entropy_has_the_gradient_of_its_slopes(
        rows in 1usize..6, width in 1usize..40, unlearnt in 0usize..6, seed: u64,
    ) {
        let mut rng = StdRng::seed_from_u64(seed);
        let logits: Vec<f32> = (0..rows * width).map(|_| rng.random_range(-3.0..3.0)).collect();
        let targets: Vec<u32> = (0..rows).map(|_| rng.random_range(0..width as u32)).collect();
        let mut weights: Vec<f32> = (0..rows).map(|_| rng.random_range(0.1..1.0)).collect();
        if let Some(weight) = weights.get_mut(unlearnt) {
            *weight = 0.0;
        }
        let (loss, found) = cross_entropy(&logits, &targets, &weights);
        let by_hand = |row: usize| {
            let exp = |x: &f32| f64::from(*x).exp();
            let logits = &logits[row * width..(row + 1) * width];
            let share = exp(&logits[targets[row] as usize]) / logits.iter().map(exp).sum::<f64>();
            -f64::from(weights[row]) * share.ln()
        };
        let expected: f64 = (0..rows).map(by_hand).sum();
        prop_assert!((loss - expected).abs() < 1e-5 * expected.max(1.0), "{loss}, not {expected}");

        let expected = slopes(&logits, |logits| cross_entropy(logits, &targets, &weights).0);
        let error = apart(&found, &expected, 0.1);
        prop_assert!(error < TOLERANCE, "{error}");
        if unlearnt < rows {
            let row = &found[unlearnt * width..(unlearnt + 1) * width];
            prop_assert!(row.iter().all(|x| *x == 0.0), "{row:?}");
        }
    }
}

#[test]
fn a_graph_is_used_up_by_its_gradients() {
    let observer = RefCell::new(());
    let meter = Meter::new(&observer, Phase::Forward).taped(true);
    let x = tensor(&[1.0, 2.0], &[2]).leaf(SCOPE);
    let y = ops::mul(meter.at(Module::Mlp), &x, &x).unwrap();
    let ones = || tensor(&[1.0, 1.0], &[2]);
    let mut first = backward(meter, &y, ones()).unwrap();
    assert_eq!(first.take(&x).unwrap().to_vec().unwrap(), [2.0, 4.0]);
    assert!(first.take(&x).is_none() && first.take(&y).is_none());
    assert!(backward(meter, &y, ones()).unwrap().take(&x).is_none());
    // A leaf's gradient is its own; what has no graph has none.
    assert!(backward(meter, &x, ones()).unwrap().take(&x).is_some());
    assert!(backward(meter, &ones(), ones()).unwrap().take(&ones()).is_none());
}

#[test]
fn gradients_of_several_passes_add_up() {
    let observer = RefCell::new(());
    let meter = Meter::new(&observer, Phase::Forward);
    let (x, y) = (tensor(&[0.0; 2], &[2]).parameter(SCOPE), tensor(&[0.0], &[1]).parameter(SCOPE));
    let mut sum = Gradients::default();
    sum.add(meter, &x, tensor(&[1.0, 2.0], &[2])).unwrap();
    let mut other = Gradients::default();
    other.add(meter, &x, tensor(&[10.0, 20.0], &[2])).unwrap();
    other.add(meter, &y, tensor(&[5.0], &[1])).unwrap();
    sum.merge(meter, other).unwrap();
    assert_eq!(sum.values(&x).unwrap().unwrap(), [11.0, 22.0]);
    assert_eq!(sum.values(&y).unwrap().unwrap(), [5.0]);
    assert!(sum.add(meter, &tensor(&[1.0], &[1]), tensor(&[1.0], &[1])).is_err());
}

#[test]
fn a_gradient_that_others_hold_is_not_overwritten() {
    let observer = RefCell::new(());
    let meter = Meter::new(&observer, Phase::Forward).taped(true);
    let at = meter.at(Module::Mlp);
    let (x, w) = (tensor(&[1.0, 2.0], &[1, 2]).leaf(SCOPE), tensor(&[0.0, 3.0, 5.0, 0.0], &[2, 2]));
    // Towards both sides of a sum the gradient is one tensor; products are then added to x's.
    let shared = x.leaf(SCOPE);
    let y = ops::add(at, &x, &shared).unwrap();
    let y = ops::add(at, &y, &ops::linear(at, &x, &w).unwrap().share()).unwrap();
    let y = ops::add(at, &y, &ops::linear(at, &x, &w).unwrap().share()).unwrap();
    let dy = tensor(&[1.0, 10.0], &[1, 2]);
    let mut found = backward(meter, &y, dy.clone()).unwrap();
    assert_eq!(dy.to_vec().unwrap(), [1.0, 10.0]);
    assert_eq!(found.take(&shared).unwrap().to_vec().unwrap(), [1.0, 10.0]);
    // dy + 2 · dy · w
    assert_eq!(found.take(&x).unwrap().to_vec().unwrap(), [101.0, 16.0]);
}

#[test]
fn products_are_added_to_gradients_of_leaves() {
    let ledger = RefCell::new(Ledger::default());
    let meter = Meter::new(&ledger, Phase::BackwardW);
    let (at, w) = (meter.at(Module::LmHead), tensor(&[0.0; 6], &[2, 3]).parameter(SCOPE));
    let (dy, x) = (tensor(&[1.0, 2.0], &[1, 2]), tensor(&[1.0, 10.0, 100.0], &[1, 3]));
    let (mut sum, given) = (Gradients::default(), tensor(&[0.5; 6], &[2, 3]));
    sum.add(meter, &w, given.clone()).unwrap();
    for _ in 0..2 {
        sum.add_product(meter, &w, at, (&dy.t().unwrap(), &x)).unwrap();
    }
    let expected = [2.5, 20.5, 200.5, 4.5, 40.5, 400.5];
    assert_eq!(sum.take(&w).unwrap().to_vec().unwrap(), expected);
    assert_eq!(given.to_vec().unwrap(), [0.5; 6]);
    assert!(sum.add_product(meter, &x, at, (&dy.t().unwrap(), &x)).is_err());
    // Two products of the head, and two sums on account of the weight's own module.
    let ran: Vec<String> = ledger
        .into_inner()
        .iter()
        .map(|(key, calls)| format!("{} {} {:?} {}", key.phase, key.scope, key.op, calls.calls))
        .collect();
    assert_eq!(ran.len(), 2, "{ran:?}");
    assert!(ran.iter().all(|line| line.ends_with(" 2")), "{ran:?}");
}
