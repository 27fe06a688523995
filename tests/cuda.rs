//! Our CUDA kernels against their CPU twins: each op and its gradients on the same values, on every
//! layout that a kernel treats differently. Needs a GPU and the feature `cuda`.
#![cfg(feature = "cuda")]

mod draws;

use std::{cell::RefCell, time::Duration};

use candle_core::Device;
use draws::{check_draws, choices, samplings};
use flopaudit::{
    audit::{Audit, GraphView},
    config::{Activation, LoraConfig, ModelConfig, Projection, Rope, RopeScaling},
    error::Result,
    generate::{Generation, Request, Sequence, generate},
    ledger::{Dtype, Key, Ledger, Lora, Module, MomentDtype, Phase, Scope},
    meter::{At, Meter, Observer},
    model::{AdapterSource, Decoder, How, Labelled, Trained},
    ops::{
        self, AdamW, CausalMask, Draws, Fault, Ids, Losses, Moments, RopeTable, Tensor, Update,
        backward, sums_of_squares,
    },
    train::{Hyper, Trainer},
    weights::{self, Named, PeftAdapter, adapter_name, save_adapter},
    workload::{Lengths, Rows, Sampling, Task, Workload},
};
use rand::{Rng, SeedableRng, rngs::StdRng};

const SCOPE: Scope = Scope { layer: None, module: Module::Mlp };

type OpRun<'a> = &'a dyn Fn(At, &[Tensor]) -> Result<Tensor>;

fn gpu() -> Device {
    let device = Device::new_cuda_with_stream(0).expect("a GPU");
    // SAFETY: one stream alone is used.
    unsafe { device.as_cuda_device().unwrap().disable_event_tracking() };
    device
}

fn random(n: usize, seed: u64) -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(seed);
    (0..n).map(|_| rng.random_range(-2.0..2.0)).collect()
}

/// Output and gradients of `run` on inputs of `shapes`, rounded to `rounded` and computed in
/// `dtype`, and what it reported.
fn outcome(
    run: OpRun,
    shapes: &[&[usize]],
    rounded: Dtype,
    dtype: Dtype,
    device: &Device,
) -> (Vec<Vec<f32>>, Ledger) {
    let ledger = RefCell::new(Ledger::default());
    let meter = Meter::new(&ledger, Phase::Forward).taped(true);
    let at = meter.at(Module::Mlp);
    let tensor = |n: usize, seed: u64, shape: Vec<usize>| {
        let rounded = Tensor::from_vec(random(n, seed), shape, rounded, &Device::Cpu).unwrap();
        let (shape, values) = (rounded.dims().to_vec(), rounded.to_vec().unwrap());
        Tensor::from_vec(values, shape, dtype, device).unwrap()
    };
    let input = |(i, shape): (usize, &&[usize])| {
        tensor(shape.iter().product(), i as u64, shape.to_vec()).leaf(SCOPE)
    };
    let inputs: Vec<_> = shapes.iter().enumerate().map(input).collect();
    let y = run(at, &inputs).unwrap();
    let mut all = vec![y.to_vec().unwrap()];
    let dy = tensor(y.elements(), 99, y.dims().to_vec());
    let mut gradients = backward(meter, &y, dy).unwrap();
    all.extend(inputs.iter().filter_map(|x| Some(gradients.take(x)?.to_vec().unwrap())));
    (all, ledger.into_inner())
}

fn distance(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let square = |x: f32| f64::from(x) * f64::from(x);
    let apart: f64 = a.iter().zip(b).map(|(a, b)| square(a - b)).sum();
    let norm: f64 = b.iter().map(|b| square(*b)).sum();
    (apart / norm.max(1e-30)).sqrt()
}

/// The values and gradients that the CPU computes in f32 from the same inputs, and the same ledger,
/// in both types.
fn check(name: &str, shapes: &[&[usize]], run: OpRun) {
    let gpu = gpu();
    for (dtype, tolerance) in [(Dtype::F32, 1e-5), (Dtype::BF16, 2e-2)] {
        let (ours, our_ledger) = outcome(run, shapes, dtype, dtype, &gpu);
        let (_, their_ledger) = outcome(run, shapes, dtype, dtype, &Device::Cpu);
        let (theirs, _) = outcome(run, shapes, dtype, Dtype::F32, &Device::Cpu);
        assert_eq!(our_ledger, their_ledger, "{name} {dtype:?}");
        for (i, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
            let apart = distance(ours, theirs);
            println!("{name} {shapes:?} {dtype:?} {i}: {apart:.1e}");
            assert!(apart < tolerance, "{name} {shapes:?} {dtype:?} {i}: {apart}");
        }
    }
}

#[test]
fn elementwise() {
    for n in [5, 64, 4864] {
        let shape: &[usize] = &[3, 7, n];
        check("add", &[shape, shape], &|at, x| ops::add(at, &x[0], &x[1]));
        check("mul", &[shape, shape], &|at, x| ops::mul(at, &x[0], &x[1]));
        check("silu", &[shape], &|at, x| ops::silu(at, &x[0]));
        for activation in [Activation::Silu, Activation::GeluTanh] {
            check("gated", &[shape, shape], &|at, x| ops::gated(at, activation, &x[0], &x[1]));
        }
        check("gelu", &[shape], &|at, x| ops::gelu(at, &x[0]));
        check("bias", &[shape, &[n]], &|at, x| ops::bias(at, &x[0], &x[1]));
        check("scale", &[shape], &|at, x| ops::scale(at, &x[0], &factor(&x[0])?));
    }
}

#[test]
fn products_and_their_sums() {
    for (m, k, n) in [(1, 8, 16), (7, 5, 9), (40, 72, 24), (33, 64, 130)] {
        // Both the input and a weight are read twice: gradients of both are summed.
        check("linear, read twice", &[&[2, m, k], &[n, k], &[n, k]], &|at, x| {
            let first = ops::linear(at, &x[0], &x[1])?.share();
            let second = ops::linear(at, &x[0], &x[2])?.share();
            let third = ops::linear(at, &ops::silu(at, &x[0])?, &x[1])?.share();
            ops::add(at, &ops::mul(at, &first, &second)?, &third)
        });
        check("matmul, read twice", &[&[2, 3, m, k], &[2, 3, n, k]], &|at, x| {
            let scores = ops::matmul(at, &x[0], &x[1].t()?)?.share();
            let mixed = ops::matmul(at, &scores, &x[1])?.share();
            ops::add(at, &mixed, &x[0])
        });
    }
}

#[test]
fn rows() {
    for width in [3, 8, 72, 500, 512, 896, 2048, 4096, 8192, 16_384] {
        let shape: &[usize] = &[2, 5, width];
        check("rms_norm", &[shape, &[width]], &|at, x| ops::rms_norm(at, &x[0], &x[1], 1e-6));
        check("rms_norm by 1 + gain", &[shape, &[width]], &|at, x| {
            let one = Tensor::from_vec(vec![1.0], 1, x[0].dtype()?, x[0].device())?;
            ops::shifted_rms_norm(at, &x[0], &x[1], &one, 1e-6)
        });
        check("softmax", &[shape], &|at, x| ops::softmax(at, x[0].copied()?));
        let seq = 5.min(width);
        check("masked softmax", &[&[2, seq, width]], &|at, x| {
            let mask = CausalMask::new(seq, width - seq, None, x[0].dtype()?, x[0].device())?;
            ops::masked_softmax(at, x[0].copied()?, &mask)
        });
    }
    // Gains and biases over many rows, of norms of heads too.
    for shape in [[3, 700, 896], [2, 5000, 64], [1, 1000, 128], [1, 300, 77], [2, 40, 5120]] {
        let width = shape[2];
        check("rms_norm", &[&shape, &[width]], &|at, x| ops::rms_norm(at, &x[0], &x[1], 1e-6));
        check("bias", &[&shape, &[width]], &|at, x| ops::bias(at, &x[0], &x[1]));
    }
    for width in [3, 8, 72, 500] {
        // A window of 3, which reaches two tokens before the pass.
        check("softmax in a window", &[&[2, width, width + 2]], &|at, x| {
            let mask = CausalMask::new(width, 9, Some(3), x[0].dtype()?, x[0].device())?;
            ops::masked_softmax(at, x[0].copied()?, &mask)
        });
    }
}

#[test]
fn heads() {
    let rope = Rope { theta: 1e6, scaling: RopeScaling::Default };
    for (heads, d) in [(2, 8), (14, 64), (3, 128)] {
        let shape: &[usize] = &[2, 5, heads * d];
        check("rotated heads", &[shape], &|at, x| {
            let table = RopeTable::new(at, 9, d, &rope, x[0].dtype()?, x[0].device())?;
            ops::rotated_heads(at, &x[0], heads, &table, 3, Some(&factor(&x[0])?))
        });
        check("split and merged heads", &[shape], &|at, x| {
            let split = ops::split_heads(&x[0], heads)?;
            ops::merge_heads(&ops::silu(at, &split)?)
        });
    }
}

#[test]
fn attention_of_whole_sequences() {
    // (heads, key heads, d, tokens, past, window): tiles that are full, and that are not; windows
    // within a tile, over several, and beyond all.
    for (heads, kv_heads, d, seq, past, window) in [
        (14, 2, 64, 256, 0, None),
        (4, 2, 64, 37, 100, None),
        (2, 1, 128, 70, 3, None),
        (3, 3, 64, 129, 0, None),
        (4, 2, 64, 300, 0, Some(20)),
        (4, 1, 128, 200, 50, Some(97)),
        (2, 2, 64, 100, 30, Some(1000)),
        (2, 1, 128, 65, 40, Some(1)),
    ] {
        let held = seq + window.map_or(past, |w: usize| past.min(w - 1));
        let shapes: [&[usize]; 3] =
            [&[2, heads, seq, d], &[2, kv_heads, held, d], &[2, kv_heads, held, d]];
        let run = |at: At, x: &[Tensor]| {
            let mask = CausalMask::new(seq, past, window, x[0].dtype()?, x[0].device())?;
            let q = ops::scale(at, &x[0].detach(), &factor(&x[0])?)?;
            ops::attention(at, &q, &x[1].detach(), &x[2].detach(), Some(&mask))
        };
        check("attention", &shapes, &run);
        // With gradients, op by op.
        check("attention and gradients", &shapes, &|at, x| {
            let mask = CausalMask::new(seq, past, window, x[0].dtype()?, x[0].device())?;
            let q = ops::scale(at, &x[0], &factor(&x[0])?)?;
            ops::attention(at, &q, &x[1], &x[2], Some(&mask))
        });
    }
}

/// A factor of 1/8, where `x` is.
fn factor(x: &Tensor) -> Result<Tensor> {
    Tensor::from_vec(vec![0.125], 1, x.dtype()?, x.device())
}

#[test]
fn cross_entropy() {
    let observer = RefCell::new(());
    let at = Meter::new(&observer, Phase::Loss).at(Module::Loss);
    // Widths of packs and others; less than a block's threads, and more than once all of them.
    for (rows, width) in [(1, 1), (3, 7), (5, 320), (2, 9001), (1030, 8200), (4, 151_936)] {
        let targets: Vec<u32> = (0..rows).map(|i| (i * 31 % width) as u32).collect();
        // Nothing is to be learnt from the first row.
        let weights: Vec<f32> = (0..rows).map(|i| 0.1 * (i % 7) as f32).collect();
        for (dtype, most) in [(Dtype::F32, 1e-5), (Dtype::BF16, 1e-2)] {
            // What bf16 holds, so that the CPU's f32 starts from the same.
            let values = random(rows * width, 1).into_iter().map(|x| 8.0 * x).collect();
            let logits = Tensor::from_vec(values, (rows, width), dtype, &Device::Cpu).unwrap();
            let logits = logits.to_vec().unwrap();
            let run = |dtype: Dtype, device: &Device| {
                let of = || Tensor::from_vec(logits.clone(), (rows, width), dtype, device);
                let (losses, gradient) =
                    ops::cross_entropy_with_gradient(at, of()?.copied()?, &targets, &weights)?;
                let alone = ops::cross_entropy(at, of()?.copied()?, &targets, &weights)?;
                let [loss, alone] = [losses, alone].map(|losses| Losses::sum(&[losses]));
                let (loss, alone) = (loss?, alone?);
                anyhow::ensure!(loss == alone, "{loss}, alone {alone}");
                Ok::<_, anyhow::Error>((loss, gradient.to_vec()?))
            };
            let (ours, theirs) =
                (run(dtype, &gpu()).unwrap(), run(Dtype::F32, &Device::Cpu).unwrap());
            let case = format!("{rows} x {width} {dtype:?}");
            let apart = (ours.0 - theirs.0).abs();
            assert!(apart <= 1e-5 * theirs.0.abs(), "{case}: {} and {}", ours.0, theirs.0);
            assert!(ours.1[..width].iter().all(|x| *x == 0.0), "{case}: unlearnt");
            if rows > 1 && width > 1 {
                let apart = distance(&ours.1, &theirs.1);
                assert!(apart < most, "{case}: {apart}");
            }
        }
    }
}

#[test]
fn the_largest_logit() {
    let gpu = gpu();
    for (rows, width) in [(1, 5), (3, 320), (9, 151_936), (600, 40)] {
        for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16] {
            for repeat_penalty in [1.0, 1.3] {
                // bf16 has many equal values: the first counts.
                let sampling = Sampling { repeat_penalty, ..Sampling::GREEDY };
                let values = random(rows * width, 3);
                let seen = vec![(0..width as u32).step_by(3).collect(); rows];
                let on = |device: &Device| {
                    let logits = Tensor::from_vec(values.clone(), (rows, width), dtype, device)?;
                    choices(sampling, &logits, &seen, 1)
                };
                let (ours, theirs) = (on(&gpu).unwrap(), on(&Device::Cpu).unwrap());
                assert!(ours == theirs, "{rows} x {width} {dtype:?} {repeat_penalty}");
            }
        }
    }
}

#[test]
fn a_draw() {
    let gpu = gpu();
    for (rows, width) in [(1, 5), (3, 320), (2, 151_936)] {
        for dtype in [Dtype::F32, Dtype::BF16] {
            for sampling in samplings() {
                let values = random(rows * width, 3).iter().map(|x| 4.0 * x).collect();
                let logits = Tensor::from_vec(values, (rows, width), dtype, &gpu).unwrap();
                let values = logits.to_vec().unwrap();
                let on_cpu =
                    Tensor::from_vec(values.clone(), (rows, width), Dtype::F32, &Device::Cpu);
                let seen = vec![(0..width as u32).step_by(7).collect(); rows];
                let ours = choices(sampling, &logits, &seen, 40).unwrap();
                let theirs = choices(sampling, &on_cpu.unwrap(), &seen, 40).unwrap();
                assert_eq!(ours.1, theirs.1);
                // The CPU's, but for one that falls within rounding of a border.
                let differ = ours.0.iter().zip(&theirs.0).filter(|(a, b)| a != b).count();
                println!("{rows} x {width} {dtype:?} {sampling:?}: {differ} of 40 differ");
                assert!(differ <= usize::from(width > 1000), "{width} {sampling:?}: {differ}");
                check_draws(sampling, &values, &seen, &ours.0);
                // Nothing depends on the order in which threads come.
                assert_eq!(ours.0, choices(sampling, &logits, &seen, 40).unwrap().0);
            }
        }
    }
}

#[test]
fn logits_that_are_not_finite() {
    let gpu = gpu();
    for temperature in [0.0, 1.0] {
        for bad in [f32::NAN, f32::INFINITY] {
            let values = vec![0.0, 1.0, 2.0, 0.0, bad, 1.0];
            let logits = Tensor::from_vec(values, (2, 3), Dtype::F32, &gpu).unwrap();
            let sampling = Sampling { temperature, ..Sampling::GREEDY };
            let error = choices(sampling, &logits, &[vec![], vec![]], 1).unwrap_err().to_string();
            assert!(error.contains("not finite"), "{error}");
        }
    }
}

/// Each parameter as the model reads it and with its moments; sums of squares; and what ran.
type Updated = (Vec<[Vec<f32>; 2]>, Vec<f64>, Ledger);

/// Parameters of `sizes` after three steps.
fn updated(
    sizes: &[usize],
    [gradient, parameter]: [Dtype; 2],
    clip: Option<f64>,
    kept: MomentDtype,
    device: &Device,
) -> Result<Updated> {
    let ledger = RefCell::new(Ledger::default());
    let meter = Meter::new(&ledger, Phase::Optimizer);
    let step =
        AdamW { clip, decay: 0.99, rate: 1e-2, correction: 0.3, betas: (0.9, 0.999), eps: 1e-8 };
    let of = |seed: usize, n: usize, dtype| {
        let rounded = Tensor::from_vec(random(n, seed as u64), n, dtype, &Device::Cpu)?;
        Tensor::from_vec(rounded.to_vec()?, n, dtype, device)
    };
    let parameters = sizes.iter().enumerate().map(|(i, n)| of(i, *n, parameter));
    let gradients = sizes.iter().enumerate().map(|(i, n)| of(1000 + i, *n, gradient));
    let (mut parameters, gradients) =
        (parameters.collect::<Result<Vec<_>>>()?, gradients.collect::<Result<Vec<_>>>()?);
    let moments = parameters.iter().map(|p| Moments::new(p, kept));
    let moments = moments.collect::<Result<Vec<_>>>()?;
    if parameter == Dtype::F32 {
        for (parameter, moments) in parameters.iter_mut().zip(&moments) {
            *parameter = moments.master(parameter)?;
        }
    }
    let at = |i: usize| meter.layer(i).at(Module::Mlp);
    for number in 0..3 {
        let updates: Vec<_> = (0..sizes.len())
            .map(|i| Update {
                clipping: meter.phase(Phase::Clipping).layer(i).at(Module::Mlp),
                at: at(i),
                moments: &moments[i],
                draws: Draws::new(1, number, i as u64),
                gradient: &gradients[i],
                parameter: &parameters[i],
            })
            .collect();
        step.step(&updates)?;
    }
    let squared: Vec<_> = gradients.iter().enumerate().map(|(i, g)| (at(i), g)).collect();
    let sums = sums_of_squares(&squared)?;
    let both = parameters.iter().zip(&moments).map(|(p, m)| Ok([p.to_vec()?, m.to_vec()?]));
    let found = both.collect::<Result<Vec<_>>>()?;
    Ok((found, sums, ledger.into_inner()))
}

#[test]
fn updates() {
    let (device, many) = (gpu(), [1, 8, 896, 3, 2047].repeat(27));
    for sizes in [&[3][..], &[100_003, 1, 8, 40_000], &many] {
        for gradient in [Dtype::F32, Dtype::BF16, Dtype::F16] {
            for parameter in [Dtype::F32, Dtype::BF16, Dtype::F16] {
                for (clip, kept) in [
                    (None, MomentDtype::F32),
                    (Some(0.7), MomentDtype::F32),
                    (None, MomentDtype::BF16),
                    (Some(0.7), MomentDtype::BF16),
                ] {
                    let types = [gradient, parameter];
                    let on = |device| updated(sizes, types, clip, kept, device).unwrap();
                    let ((ours, our_sums, our_ledger), (theirs, their_sums, their_ledger)) =
                        (on(&device), on(&Device::Cpu));
                    let name = format!("{gradient:?} {parameter:?} {clip:?} {kept:?}");
                    assert_eq!(our_ledger, their_ledger, "{name}");
                    // Of moments in bf16 one in some ten thousands rounds the other way, of parameters
                    // in 16 bits likewise: that is seen in all of them together.
                    let kind = |index: usize, all: &[[Vec<f32>; 2]]| {
                        all.iter().map(|pair| pair[index].as_slice()).collect::<Vec<_>>().concat()
                    };
                    let apart = |index| distance(&kind(index, &ours), &kind(index, &theirs));
                    let most_of_state = if kept == MomentDtype::F32 { 1e-6 } else { 2e-4 };
                    assert!(apart(1) < most_of_state, "{name}: state {}", apart(1));
                    let most = if parameter == Dtype::F32 { most_of_state } else { 5e-3 };
                    assert!(apart(0) < most, "{name}: parameters {}", apart(0));
                    if kept == MomentDtype::F32 {
                        for ([reads, state], [their_reads, their_state]) in ours.iter().zip(&theirs)
                        {
                            assert!(distance(state, their_state) < 1e-6, "{name}");
                            // A narrow one may round the other way.
                            assert!(distance(reads, their_reads) < most, "{name}");
                        }
                    }
                    for (ours, theirs) in our_sums.iter().zip(&their_sums) {
                        assert!((ours - theirs).abs() < 1e-5 * theirs, "{name}: {ours} {theirs}");
                    }
                }
            }
        }
    }
}

#[test]
fn embeddings() {
    for (vocab, width, batch, seq) in [(3, 7, 1, 1), (40, 64, 2, 70), (700, 896, 3, 200)] {
        let ids: Vec<u32> = (0..batch * seq).map(|i| (i * i % vocab) as u32).collect();
        check("embedding", &[&[vocab, width]], &|at, x| {
            let ids = Ids::Host { ids: &ids, batch };
            Ok(ops::embed(at, &x[0], ids, Some(&factor(&x[0])?))?.share())
        });
    }
}

/// An adapter of random numbers, as PEFT writes it.
fn adapter(config: &ModelConfig, lora: &LoraConfig) -> AdapterSource {
    let dir = tempfile::tempdir().unwrap();
    let factor = |layer: usize, p: Projection, part: Lora, shape: [usize; 2]| {
        let seed = (layer * 100 + p as usize * 2) as u64 + u64::from(part == Lora::B);
        let values = random(shape[0] * shape[1], seed).iter().map(|x| 0.05 * x).collect();
        Named { name: adapter_name(layer, p, part), shape: shape.into(), values }
    };
    let all: Vec<Named> = lora
        .sites(config)
        .flat_map(|(layer, p, site)| {
            let ((k, n), r) = (p.widths(config), site.rank);
            [factor(layer, p, Lora::A, [r, k]), factor(layer, p, Lora::B, [n, r])]
        })
        .collect();
    save_adapter(dir.path(), "base", lora, &all).unwrap();
    AdapterSource::Peft(PeftAdapter::open(dir.path(), config).unwrap())
}

/// Of one rank beside every projection.
fn even(config: &ModelConfig, rank: usize) -> AdapterSource {
    adapter(config, &LoraConfig::new(config, rank, 8.0, &Projection::ALL).unwrap())
}

/// Of several ranks and scales, beside some projections, and none in the second layer.
fn uneven(config: &ModelConfig) -> AdapterSource {
    let mut lora = LoraConfig::new(config, 8, 8.0, &Projection::ALL).unwrap();
    let of = |name: &str| name.parse().unwrap();
    lora.targets.retain(|target| target.projection != Projection::OProj);
    lora.layers = Some("0,2".parse().unwrap());
    lora.rank_pattern = [(of("v_proj"), 3), (of("layers.2.mlp.up_proj"), 5)].into();
    lora.alpha_pattern = [(of("k_proj"), 2.0), (of("layers.2.self_attn.q_proj"), 4.0)].into();
    adapter(config, &lora.checked(config).unwrap())
}

/// What a batch of prompts goes on with.
#[derive(Clone)]
struct Run<'a> {
    preset: &'static str,
    adapters: &'a AdapterSource,
    sampling: Sampling,
    batch: usize,
    /// Whether prompts are of different lengths.
    ragged: bool,
    how: How,
    eos: Vec<u32>,
}

const STEP_BY_STEP: How = How { recorded: false, fault: None };

impl Run<'_> {
    fn on(&self, device: &Device, dtype: Dtype) -> (Vec<Sequence>, Ledger) {
        let (generation, ledger) = self.generation(device, dtype);
        (generation.sequences, ledger)
    }

    fn generation(&self, device: &Device, dtype: Dtype) -> (Generation, Ledger) {
        let config = ModelConfig::preset(self.preset).unwrap();
        let checkpoint = weights::synthetic(config, 1).unwrap();
        let (config, weights) = (&checkpoint.config, &checkpoint.weights);
        let model = Decoder::load(config, weights, self.adapters, dtype, device, |_| Ok(()));
        let length = |row: usize| if self.ragged { 1 + row * 5 % 17 } else { 9 };
        let prompt =
            |row: usize| (0..length(row)).map(|i| ((i * 37 + row * 11) % 320) as u32).collect();
        let request = Request {
            prompts: (0..self.batch).map(prompt).collect(),
            max_new_tokens: 40,
            sampling: self.sampling,
            seeds: (0..self.batch as u64).collect(),
            kv_cache: true,
            eos: self.eos.clone(),
            timed: false,
            how: self.how,
            past: 0,
            prefill_chunk: None,
            then: vec![],
        };
        let ledger = RefCell::new(Ledger::default());
        let generation = generate(&model.unwrap(), &request, &ledger, |_, _| Ok(())).unwrap();
        (generation, ledger.into_inner())
    }
}

/// Decoding by few launches, recorded and not, against the model's own forward pass on the CPU.
fn decodes_as_on_the_cpu(preset: &'static str, adapters: &AdapterSource, sampling: Sampling) {
    let (gpu, rank) = (gpu(), adapters.lora().rank);
    for (batch, ragged) in [1, 2, 3, 8, 9].into_iter().flat_map(|n| [(n, false), (n, true)]) {
        let run =
            Run { preset, adapters, sampling, batch, ragged, how: How::RECORDED, eos: vec![] };
        let theirs = run.on(&Device::Cpu, Dtype::F32);
        for how in [How::RECORDED, STEP_BY_STEP] {
            let ours = Run { how, ..run.clone() }.on(&gpu, Dtype::F32);
            assert!(ours == theirs, "{preset}, rank {rank}, {sampling:?}, batch {batch}, {how:?}");
        }
    }
    // In bf16 other kernels run; recorded or not, they give the same.
    for (batch, ragged) in [1, 3, 9, 33, 64, 65].into_iter().flat_map(|n| [(n, false), (n, true)]) {
        let run =
            Run { preset, adapters, sampling, batch, ragged, how: How::RECORDED, eos: vec![] };
        let recorded = run.on(&gpu, Dtype::BF16);
        // A token that nobody chooses: each is looked at before the next is computed.
        let stepwise = Run { how: STEP_BY_STEP, eos: vec![320], ..run }.on(&gpu, Dtype::BF16);
        assert!(recorded == stepwise, "{preset}, rank {rank}, {sampling:?}, batch {batch}");
    }
}

const NONE: AdapterSource = AdapterSource::Fresh { lora: LoraConfig::none(), seed: 0 };

#[test]
fn decoding_in_few_launches() {
    let config = ModelConfig::preset("tiny").unwrap();
    let drawn =
        Sampling { temperature: 0.9, top_k: Some(50), top_p: Some(0.95), repeat_penalty: 1.1 };
    let penalized = Sampling { repeat_penalty: 1.5, ..Sampling::GREEDY };
    let warm = Sampling { temperature: 1.5, ..Sampling::GREEDY };
    for adapters in [NONE, even(&config, 8), even(&config, 3), uneven(&config)] {
        for sampling in [Sampling::GREEDY, drawn, penalized, warm] {
            decodes_as_on_the_cpu("tiny", &adapters, sampling);
        }
    }
}

#[test]
fn every_family_decodes_in_few_launches() {
    for preset in ["tiny-llama", "tiny-mistral", "tiny-qwen3", "tiny-gemma3"] {
        let config = ModelConfig::preset(preset).unwrap();
        for adapters in [NONE, even(&config, 3)] {
            decodes_as_on_the_cpu(preset, &adapters, Sampling::GREEDY);
        }
    }
}

/// A recorded generation of one sequence with `fault`: both sides of its graph.
fn recorded(preset: &'static str, batch: usize, fault: Option<Fault>) -> (GraphView, Audit) {
    let how = How { recorded: true, fault };
    let sampling = Sampling::GREEDY;
    let run = Run { preset, adapters: &NONE, sampling, batch, ragged: true, how, eos: vec![] };
    let (generation, ledger) = run.generation(&gpu(), Dtype::BF16);
    let [view] = &generation.recordings[..] else { panic!("{:?}", generation.recordings) };
    (view.clone(), Audit::new(&[generation.workload], &ledger).unwrap())
}

#[test]
fn cuda_lists_what_was_launched() {
    for preset in ["tiny", "tiny-llama", "tiny-mistral", "tiny-qwen3", "tiny-gemma3"] {
        for batch in [1, 9, 65] {
            let (view, audit) = recorded(preset, batch, None);
            assert_eq!(view.difference, None, "{preset}, batch {batch}");
            assert!(view.nodes >= view.launches && view.launches > 15, "{view:?}");
            assert!(audit.balanced(), "{preset}, batch {batch}: {:#?}", audit.key_differences);
        }
    }
}

#[test]
fn a_kernel_dropped_doubled_or_halved_in_the_graph_is_found() {
    let (sound, _) = recorded("tiny", 1, None);
    for n in [0, 5, sound.launches - 2] {
        let (view, _) = recorded("tiny", 1, Some(Fault::Drop(n)));
        assert_eq!((view.nodes, view.launches), (sound.nodes - 1, sound.launches));
        assert!(view.difference.is_some(), "kernel {n} dropped");
        let (view, _) = recorded("tiny", 1, Some(Fault::Double(n)));
        assert_eq!((view.nodes, view.launches), (sound.nodes + 1, sound.launches));
        assert!(view.difference.is_some(), "kernel {n} doubled");
    }
    for (batch, n) in [(1, sound.launches - 2), (9, 3), (65, 3)] {
        let (view, _) = recorded("tiny", batch, Some(Fault::Halve(n)));
        assert!(view.difference.is_some(), "kernel {n} of {batch} rows has half of its blocks");
    }
    // So many rows that cuBLAS computes the products: its kernels are counted too.
    for preset in ["tiny", "tiny-gemma3"] {
        for n in 0..8 {
            let (view, _) = recorded(preset, 65, Some(Fault::Drop(n)));
            assert!(view.difference.is_some(), "{preset}: kernel {n} dropped of 65 rows");
        }
    }
}

/// The loss of packed sequences, the norm of each gradient, and what ran.
fn packed_training(preset: &str, dtype: Dtype, device: &Device) -> (f64, Vec<f64>, Audit) {
    let config = ModelConfig::preset(preset).unwrap();
    let checkpoint = weights::synthetic(config, 1).unwrap();
    let (config, weights) = (&checkpoint.config, &checkpoint.weights);
    let (lengths, adapters) = ([40, 1, 77, 40, 9], even(config, 3));
    let model =
        Decoder::load_to_train(config, weights, &adapters, dtype, device, |_| Ok(())).unwrap();
    let tokens = |salt: usize| -> Vec<u32> {
        (0..lengths.iter().sum()).map(|i: usize| ((i * i + salt) % 320) as u32).collect()
    };
    let (ids, targets) = (tokens(3), tokens(11));
    let weights = vec![1.0 / ids.len() as f32; ids.len()];
    let (ledger, hyper) = (RefCell::new(Ledger::default()), Hyper::DEFAULT);
    let meter = Meter::new(&ledger, Phase::Setup);
    let mut trainer = Trainer::new(meter, model, Trained::All, hyper, 77, true).unwrap();
    let text = Labelled {
        ids: &ids,
        targets: &targets,
        weights: &weights,
        batch: 1,
        sequences: Some(&lengths),
    };
    let found = trainer.gradients(meter, &[text]).unwrap();
    let step = trainer.update(meter, found, 1e-3).unwrap();
    let documents: Lengths = lengths.iter().map(|n| *n as u64).collect();
    let task = Task::Train {
        batch: 3,
        seq: 77,
        accumulate: 1,
        steps: 1,
        full: true,
        recompute: true,
        clip: true,
        moments: Default::default(),
        rows: Rows::Packed { passes: [ids.len() as u64].into_iter().collect(), documents },
    };
    let lora = adapters.lora().clone();
    let workload =
        Workload { model: config.clone(), lora, dtype, attention: Default::default(), task };
    let audit = Audit::new(&[workload], &ledger.into_inner()).unwrap();
    (step.loss, step.norms, audit)
}

#[test]
fn packed_sequences_train_as_on_the_cpu() {
    for preset in ["tiny", "tiny-llama", "tiny-mistral", "tiny-qwen3", "tiny-gemma3"] {
        let (loss, norms, audit) = packed_training(preset, Dtype::F32, &Device::Cpu);
        assert!(audit.balanced(), "{preset}: {:#?}", audit.key_differences);
        for (dtype, most) in [(Dtype::F32, 1e-3), (Dtype::BF16, 0.1)] {
            let (ours, of_ours, audit) = packed_training(preset, dtype, &gpu());
            assert!(audit.balanced(), "{preset} {dtype:?}: {:#?}", audit.key_differences);
            assert!((ours / loss - 1.0).abs() < most, "{preset} {dtype:?}: {ours} for {loss}");
            let all = |norms: &[f64]| norms.iter().map(|norm| norm * norm).sum::<f64>().sqrt();
            let (a, b) = (all(&of_ours), all(&norms));
            assert!((a / b - 1.0).abs() < most, "{preset} {dtype:?}: gradients of {a} for {b}");
        }
    }
}

/// Makes a model's adapters.
type Adapters = fn(&ModelConfig) -> AdapterSource;

/// The loss of two rows, the norm of each adapter's gradient, and what ran.
fn adapted_training(
    preset: &str,
    adapters: Adapters,
    (dtype, device): (Dtype, &Device),
    recompute: bool,
) -> (f64, Vec<f64>, Audit) {
    let config = ModelConfig::preset(preset).unwrap();
    let checkpoint = weights::synthetic(config, 1).unwrap();
    let (config, weights, adapters) =
        (&checkpoint.config, &checkpoint.weights, adapters(&checkpoint.config));
    let model =
        Decoder::load_to_train(config, weights, &adapters, dtype, device, |_| Ok(())).unwrap();
    let tokens = |salt: usize| -> Vec<u32> {
        (0..2 * 33).map(|i: usize| ((i * i + salt) % 320) as u32).collect()
    };
    let (ids, targets, weights) = (tokens(3), tokens(11), vec![1.0 / 132.0; 66]);
    let (ledger, hyper) = (RefCell::new(Ledger::default()), Hyper::DEFAULT);
    let meter = Meter::new(&ledger, Phase::Setup);
    let mut trainer = Trainer::new(meter, model, Trained::Adapters, hyper, 33, recompute).unwrap();
    let text =
        Labelled { ids: &ids, targets: &targets, weights: &weights, batch: 2, sequences: None };
    let (mut loss, mut norms) = (0.0, vec![]);
    // The second step shows whether the first update reached what products read.
    for _ in 0..2 {
        let found = trainer.gradients(meter, &[text, text]).unwrap();
        let step = trainer.update(meter, found, 1e-3).unwrap();
        loss += step.loss;
        norms.extend(step.norms);
    }
    let lora = adapters.lora().clone();
    let task = Task::Train {
        batch: 2,
        seq: 33,
        accumulate: 2,
        steps: 2,
        full: false,
        recompute,
        clip: true,
        moments: Default::default(),
        rows: Rows::Whole,
    };
    let workload =
        Workload { model: config.clone(), lora, dtype, attention: Default::default(), task };
    let audit = Audit::new(&[workload], &ledger.into_inner()).unwrap();
    (loss, norms, audit)
}

#[test]
fn adapters_train_as_on_the_cpu() {
    let cases: [(&str, Adapters, bool); 6] = [
        ("tiny", |config| even(config, 3), false),
        ("tiny", uneven, false),
        ("tiny", uneven, true),
        ("tiny-llama", |config| even(config, 8), false),
        ("tiny-qwen3", uneven, false),
        ("tiny-gemma3", |config| even(config, 3), true),
    ];
    for (preset, adapters, recompute) in cases {
        let train =
            |dtype, device: &Device| adapted_training(preset, adapters, (dtype, device), recompute);
        let (loss, norms, audit) = train(Dtype::F32, &Device::Cpu);
        assert!(audit.balanced(), "{preset}: {:#?}", audit.key_differences);
        for (dtype, most) in [(Dtype::F32, 1e-3), (Dtype::BF16, 0.1)] {
            let (ours, of_ours, audit) = train(dtype, &gpu());
            assert!(audit.balanced(), "{preset} {dtype:?}: {:#?}", audit.key_differences);
            assert!((ours / loss - 1.0).abs() < most, "{preset} {dtype:?}: {ours} for {loss}");
            let all = |norms: &[f64]| norms.iter().map(|norm| norm * norm).sum::<f64>().sqrt();
            let apart: Vec<f64> = of_ours.iter().zip(&norms).map(|(a, b)| a - b).collect();
            let apart = all(&apart) / all(&norms);
            assert!(apart < most, "{preset} {dtype:?}: gradients are {apart} apart");
        }
    }
}

/// Whether a GPU has products in 8 bits of all of a model's widths.
fn takes_8_bits(preset: &str) -> bool {
    let config = ModelConfig::preset(preset).unwrap();
    let widths = Projection::ALL.map(|projection| projection.widths(&config));
    ops::check_8_bits(&gpu(), widths).is_ok()
}

const FAMILIES: [&str; 5] = ["tiny", "tiny-llama", "tiny-mistral", "tiny-qwen3", "tiny-gemma3"];

#[test]
fn products_in_8_bits_are_recorded_and_audited() {
    assert!(takes_8_bits("tiny"));
    for preset in FAMILIES.into_iter().filter(|preset| takes_8_bits(preset)) {
        let config = ModelConfig::preset(preset).unwrap();
        for adapters in [NONE, even(&config, 3), uneven(&config)] {
            for batch in [1, 3, 9, 33, 65] {
                let sampling = Sampling::GREEDY;
                let (how, eos) = (How::RECORDED, vec![]);
                let adapters = &adapters;
                let run = Run { preset, adapters, sampling, batch, ragged: true, how, eos };
                let stepwise = Run { how: STEP_BY_STEP, ..run.clone() }.on(&gpu(), Dtype::Fp8);
                let (generation, ledger) = run.generation(&gpu(), Dtype::Fp8);
                let [view] = &generation.recordings[..] else { panic!("no recording") };
                assert_eq!(view.difference, None, "{preset}, batch {batch}");
                assert!(generation.sequences == stepwise.0, "{preset}, batch {batch}");
                assert!(ledger == stepwise.1, "{preset}, batch {batch}");
                let audit = Audit::new(&[generation.workload], &ledger).unwrap();
                assert!(audit.balanced(), "{preset}: {:#?}", audit.key_differences);
            }
        }
    }
}

#[test]
fn adapters_train_over_8_bits_as_on_the_cpu() {
    for preset in FAMILIES.into_iter().filter(|preset| takes_8_bits(preset)) {
        for recompute in [false, true] {
            let train =
                |device: &Device| adapted_training(preset, uneven, (Dtype::Fp8, device), recompute);
            let ((loss, norms, audit), (ours, of_ours, our_audit)) =
                (train(&Device::Cpu), train(&gpu()));
            assert!(audit.balanced(), "{preset}: {:#?}", audit.key_differences);
            assert!(our_audit.balanced(), "{preset}: {:#?}", our_audit.key_differences);
            println!("{preset}: loss {ours} for {loss}");
            assert!((ours / loss - 1.0).abs() < 0.02, "{preset}: {ours} for {loss}");
            let all = |norms: &[f64]| norms.iter().map(|norm| norm * norm).sum::<f64>().sqrt();
            let apart: Vec<f64> = of_ours.iter().zip(&norms).map(|(a, b)| a - b).collect();
            assert!(all(&apart) / all(&norms) < 0.15, "{preset}: {apart:?}");
        }
    }
}

/// Counts launches: of the ops that one computes, the last has its time.
struct Launches(usize);

impl Observer for Launches {
    fn op(&mut self, key: &Key, time: Option<Duration>) {
        let is_launch = key.phase != Phase::Setup && time.is_some_and(|time| !time.is_zero());
        self.0 += usize::from(is_launch);
    }
}

/// How many launches the loss and the gradients of adapters beside all projections take.
fn launches(layers: usize, dtype: Dtype, device: &Device) -> usize {
    let tiny = ModelConfig::preset("tiny").unwrap();
    let checkpoint =
        weights::synthetic(ModelConfig { num_hidden_layers: layers, ..tiny }, 1).unwrap();
    let (config, weights) = (&checkpoint.config, &checkpoint.weights);
    let adapters = even(config, 8);
    let mut model = Decoder::load(config, weights, &adapters, dtype, device, |_| Ok(())).unwrap();
    model.train(Trained::Adapters);
    let (ids, weights) = ([3, 1, 4, 1, 5, 9, 2, 6], [0.125; 8]);
    let text = Labelled { ids: &ids, targets: &ids, weights: &weights, batch: 1, sequences: None };
    let counted = RefCell::new(Launches(0));
    let meter = Meter::new(&counted, Phase::Setup).timed(true);
    let positions = model.positions(meter, 8).unwrap();
    model.loss_and_gradients(meter, text, &positions, false).unwrap();
    counted.into_inner().0
}

#[test]
fn a_layer_of_adapters_takes_so_many_launches() {
    for dtype in [Dtype::F32, Dtype::BF16] {
        let [two, three] = [2, 3].map(|layers| launches(layers, dtype, &gpu()));
        println!("{dtype:?}: {two} launches of two layers, {three} of three");
        // Forward: norms 2, A x of what reads a norm 2 and of the others 2, products 7, biases 3,
        // adapters' sums 7, heads 2, attention 3, the gate 1, residual sums 2. Backward: scales 7,
        // towards A x 7, B 7, A 4, x 4 by adapters and 7 by weights, norms and their sums 4, the
        // gate 1, attention 5, heads 2.
        assert_eq!(three - two, 31 + 48);
        // In the lowest layer none towards the norm's input: 3 weights, adapters, norm, sum. Beside
        // the layers: embedding, norm and its gradient, head and its gradient, the loss with its own.
        assert_eq!(two, 31 + 42 + 31 + 48 + 6);
    }
}
