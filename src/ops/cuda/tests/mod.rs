//! Kernels against plain arithmetic on the host, through their wrappers: what no op of another
//! backend has a twin for, and what a recording holds. Needs a GPU.

mod attention;
mod eight_bit;
mod library;
mod optimizer;
mod products;
mod sums;

use candle_core::{DType, Device, Result, Tensor};
use rand::{Rng, SeedableRng, rngs::StdRng};

use super::{Causal, Gate, Kernels, Map, Norm};
use crate::ops::launch::Nodes;

const TYPES: [DType; 2] = [DType::F32, DType::BF16];

pub(super) fn gpu() -> Device {
    let device = Device::new_cuda_with_stream(0).expect("a GPU");
    // SAFETY: one stream alone is used.
    unsafe { device.as_cuda_device().unwrap().disable_event_tracking() };
    device
}

/// Random values as a tensor of `dtype`, and what it then holds.
pub(super) fn random(
    shape: &[usize],
    dtype: DType,
    seed: u64,
    device: &Device,
) -> (Tensor, Vec<f32>) {
    let mut rng = StdRng::seed_from_u64(seed);
    let values: Vec<f32> =
        (0..shape.iter().product()).map(|_| rng.random_range(-1.0..1.0)).collect();
    let rounded = Tensor::from_vec(values, shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
    (rounded.to_device(device).unwrap(), values_of(&rounded))
}

pub(super) fn values_of(t: &Tensor) -> Vec<f32> {
    let on_host = t.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
    on_host.flatten_all().unwrap().to_vec1().unwrap()
}

fn one(value: f32, dtype: DType, device: &Device) -> Tensor {
    let one = Tensor::from_vec(vec![value], 1, &Device::Cpu).unwrap();
    one.to_dtype(dtype).unwrap().to_device(device).unwrap()
}

fn check(what: &str, dtype: DType, ours: &Tensor, theirs: &[f32]) {
    let ours = values_of(ours);
    assert_eq!(ours.len(), theirs.len(), "{what}");
    let square = |x: f32| f64::from(x) * f64::from(x);
    let apart: f64 = ours.iter().zip(theirs).map(|(a, b)| square(a - b)).sum();
    let norm: f64 = theirs.iter().map(|b| square(*b)).sum();
    let (apart, most) = ((apart / norm).sqrt(), if dtype == DType::F32 { 2e-6 } else { 1.2e-2 });
    println!("{what} {dtype:?}: {apart:.1e}");
    assert!(apart < most, "{what} {dtype:?}: {apart}");
}

fn gelu(x: f32) -> f32 {
    let inner = (2.0 / std::f32::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3));
    0.5 * x * (1.0 + inner.tanh())
}

fn silu(x: f32) -> f32 {
    x / (1.0 + (-x).exp())
}

/// x · (shift + gain) / sqrt(mean(x²) + eps)
fn normed(x: &[f32], gain: &[f32], eps: f32, shift: f32) -> Vec<f32> {
    let mean = x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32;
    x.iter().zip(gain).map(|(x, g)| x * (shift + g) / (mean + eps).sqrt()).collect()
}

fn softmax(scores: &[f32]) -> Vec<f32> {
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let all: Vec<f32> = scores.iter().map(|s| (s - max).exp()).collect();
    let sum: f32 = all.iter().sum();
    all.into_iter().map(|e| e / sum).collect()
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[test]
fn gelu_and_its_gradient() -> Result<()> {
    let (device, nodes) = (gpu(), Nodes::kept());
    for dtype in TYPES {
        let kernels = Kernels::on(&device, dtype).unwrap();
        for n in [5, 640] {
            let of = |seed| random(&[3, n], dtype, seed, &device);
            let ((gate, g), (up, u), (dy, d)) = (of(1), of(2), of(3));
            let slope = |x: f32| {
                let (x, h) = (f64::from(x), 1e-4);
                let gelu = |x: f64| {
                    let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3));
                    0.5 * x * (1.0 + inner.tanh())
                };
                ((gelu(x + h) - gelu(x - h)) / (2.0 * h)) as f32
            };
            let each = |f: &dyn Fn(usize) -> f32| (0..3 * n).map(f).collect::<Vec<f32>>();
            let y = kernels.map(&nodes, Map::Gelu, &gate, &gate)?;
            check("gelu", dtype, &y, &each(&|i| gelu(g[i])));
            let dx = kernels.map(&nodes, Map::GeluGrad, &gate, &dy)?;
            check("gelu_grad", dtype, &dx, &each(&|i| d[i] * slope(g[i])));
            let (act, out) = kernels.gated(&nodes, Gate::Gelu, &gate, &up, true)?;
            check("gated by GELU", dtype, &out, &each(&|i| gelu(g[i]) * u[i]));
            let act = act.unwrap();
            let (to_gate, to_up) = kernels.gated_grad(&nodes, Gate::Gelu, &dy, &gate, &up, &act)?;
            check("towards the gate", dtype, &to_gate, &each(&|i| d[i] * u[i] * slope(g[i])));
            check("towards up", dtype, &to_up, &each(&|i| d[i] * gelu(g[i])));
        }
    }
    Ok(())
}

#[test]
fn rows_with_a_window_or_a_shift() -> Result<()> {
    let (device, nodes) = (gpu(), Nodes::kept());
    for dtype in TYPES {
        let kernels = Kernels::on(&device, dtype).unwrap();
        // (queries, tokens before, window, keys)
        for (seq, past, window, keys) in
            [(4, 3, Some(2), 7), (4, 3, Some(2), 5), (40, 24, Some(9), 64), (3, 0, None, 3)]
        {
            let (x, values) = random(&[2, seq, keys], dtype, 4, &device);
            kernels.softmax(&nodes, &x, Some(Causal { seq, past, window }))?;
            let mut expected = vec![];
            for (row, values) in values.chunks_exact(keys).enumerate() {
                let own = keys - seq + row % seq;
                let sees = |i: usize| i <= own && window.is_none_or(|w| i + w > own);
                let seen = |(i, x): (usize, &f32)| if sees(i) { *x } else { f32::NEG_INFINITY };
                expected.extend(softmax(&values.iter().enumerate().map(seen).collect::<Vec<_>>()));
            }
            check("windowed softmax", dtype, &x, &expected);
        }
        for width in [7, 640] {
            let ((x, values), (gain, gains)) =
                (random(&[3, width], dtype, 5, &device), random(&[width], dtype, 6, &device));
            let out = kernels.output(&x)?;
            let norm = Norm { gain: &gain, eps: 1e-6, shift: true };
            kernels.rms_norm_into(&nodes, &out, &x, norm)?;
            let rows = values.chunks_exact(width);
            let expected: Vec<f32> = rows.flat_map(|x| normed(x, &gains, 1e-6, 1.0)).collect();
            check("norm by 1 + gain", dtype, &out, &expected);
        }
    }
    Ok(())
}

#[test]
fn an_embedding_times_a_factor() -> Result<()> {
    let (device, nodes) = (gpu(), Nodes::kept());
    for dtype in TYPES {
        let kernels = Kernels::on(&device, dtype).unwrap();
        let (table, values) = random(&[9, 300], dtype, 1, &device);
        let ids = Tensor::from_vec(vec![8u32, 0, 5], (1, 3), &device)?;
        for factor in [None, Some(4.0)] {
            let out = kernels.empty((3, 300), dtype)?;
            let scale = factor.map(|f| one(f, dtype, &device));
            kernels.embed(&nodes, &out, &table, &ids, scale.as_ref())?;
            let rows = [8, 0, 5].map(|id: usize| &values[id * 300..][..300]).concat();
            let expected: Vec<f32> = rows.iter().map(|x| x * factor.unwrap_or(1.0)).collect();
            check("embedding", dtype, &out, &expected);
        }
    }
    Ok(())
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let (device, nodes) = (gpu(), Nodes::kept());
    let kernels = Kernels::on(&device, DType::BF16).unwrap();
    let of = |shape: &[usize], dtype| random(shape, dtype, 1, &device).0;
    let bf16 = |shape: &[usize]| of(shape, DType::BF16);
    let refused = |result: Result<()>, parts: &[&str]| {
        let said = result.unwrap_err().to_string();
        assert!(parts.iter().all(|part| said.contains(part)), "{said}");
    };
    let (a, b) = (bf16(&[2, 6]), bf16(&[4]));
    refused(kernels.map(&nodes, Map::Add, &bf16(&[2, 5]), &b).map(drop), &["add", "[2, 5]", "[4]"]);
    let wide = of(&[2, 6], DType::F32);
    refused(kernels.map(&nodes, Map::Mul, &a, &wide).map(drop), &["kernel mul", "BF16", "F32"]);
    refused(kernels.add_bias(&nodes, &a, &b), &["kernel add_bias", "[2, 6], [4]"]);
    refused(kernels.add_bias(&nodes, &a.t().unwrap(), &b), &["add_bias", "[6, 2] by [1, 6]"]);
    let causal = Causal { seq: 2, past: 1, window: None };
    refused(kernels.softmax(&nodes, &a, Some(causal)), &["kernel softmax", "[2, 6]"]);
    assert!(nodes.into_vec().is_empty());
}
