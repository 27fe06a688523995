//! The kernels that a model's time goes to, beside candle's own: products of a prompt and of a
//! decoding step, softmax, RMSNorm, RoPE, SiLU.
//!
//! `cargo bench --bench ops`; the shapes are Qwen2.5-0.5B's.

use std::{cell::RefCell, time::Duration};

use candle_core::{DType, Device, Tensor as Candle};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use flopaudit::{
    config::{Rope, RopeScaling},
    ledger::{Dtype, Module, Phase},
    meter::{At, Meter},
    ops::{self, RopeTable, Tensor},
};

/// Tokens of a prompt, width of the residual and of the MLP, heads and their width.
const T: usize = 512;
const D: usize = 896;
const F: usize = 4864;
const H: usize = 14;
const K: usize = 64;

fn random(shape: &[usize], dtype: DType) -> Candle {
    Candle::randn(0f32, 1.0, shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
}

/// Calls `run` where nobody listens.
fn unheard<T>(run: impl FnOnce(At) -> T) -> T {
    let nobody = RefCell::new(());
    run(Meter::new(&nobody, Phase::Forward).at(Module::Mlp))
}

/// The same values as a metered tensor.
fn ours(x: &Candle) -> Tensor {
    let dtype = if x.dtype() == DType::BF16 { Dtype::BF16 } else { Dtype::F32 };
    let values = x.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    Tensor::from_vec(values, x.shape().clone(), dtype, &Device::Cpu).unwrap()
}

/// x (m, k) · wᵀ for w (n, k).
fn products(c: &mut Criterion) {
    for (name, m, k, n) in [
        ("prompt up_proj", T, D, F),
        ("prompt down_proj", T, F, D),
        ("step up_proj", 1, D, F),
        ("step lm_head", 1, D, 151_936),
    ] {
        for dtype in [DType::F32, DType::BF16] {
            let (x, w) = (random(&[m, k], dtype), random(&[n, k], dtype));
            let (our_x, our_w) = (ours(&x), ours(&w));
            let mut group = c.benchmark_group(format!("{name} {dtype:?}"));
            group.sample_size(10).measurement_time(Duration::from_secs(3));
            // FLOPs: criterion's elements a second are FLOP/s.
            group.throughput(Throughput::Elements((2 * m * k * n) as u64));
            group.bench_function("flopaudit", |b| {
                b.iter(|| unheard(|at| ops::linear(at, &our_x, &our_w).unwrap()))
            });
            group.bench_function("candle", |b| b.iter(|| x.matmul(&w.t().unwrap()).unwrap()));
            group.finish();
        }
    }
}

/// Ops of one element, or one row, at a time.
fn by_element(c: &mut Criterion) {
    let f32s = |shape: &[usize]| random(shape, DType::F32);
    let (scores, x, gain) = (f32s(&[H, T, T]), f32s(&[T, D]), f32s(&[D]));
    let (gate, q) = (f32s(&[T, F]), f32s(&[1, H, T, K]));
    let rope = Rope { theta: 1e6, scaling: RopeScaling::Default };
    let table = unheard(|at| RopeTable::new(at, T, K, &rope, Dtype::F32, &Device::Cpu)).unwrap();
    let (cos, sin) = (f32s(&[T, K / 2]), f32s(&[T, K / 2]));

    let mut pair = |name: &str, ours: &dyn Fn() -> Tensor, theirs: &dyn Fn() -> Candle| {
        let mut group = c.benchmark_group(name);
        group.sample_size(20).measurement_time(Duration::from_secs(2));
        group.bench_function("flopaudit", |b| b.iter(ours));
        group.bench_function("candle", |b| b.iter(theirs));
        group.finish();
    };
    // Ours works in place: both are given a copy of their own.
    let our_scores = ours(&scores);
    let copy = || scores.copy().unwrap();
    pair(
        "softmax",
        &|| unheard(|at| ops::softmax(at, our_scores.copied().unwrap())).unwrap(),
        &|| candle_nn::ops::softmax_last_dim(&copy()).unwrap(),
    );
    let (our_x, our_gain) = (ours(&x), ours(&gain));
    pair(
        "rms_norm",
        &|| unheard(|at| ops::rms_norm(at, &our_x, &our_gain, 1e-6)).unwrap(),
        &|| candle_nn::ops::rms_norm(&x, &gain, 1e-6).unwrap(),
    );
    let our_q = ours(&q);
    pair("rope", &|| unheard(|at| ops::rope(at, &our_q, &table, 0)).unwrap(), &|| {
        candle_nn::rotary_emb::rope(&q, &cos, &sin).unwrap()
    });
    let our_gate = ours(&gate);
    pair("silu", &|| unheard(|at| ops::silu(at, &our_gate)).unwrap(), &|| {
        candle_nn::ops::silu(&gate).unwrap()
    });
}

criterion_group!(benches, products, by_element);
criterion_main!(benches);
