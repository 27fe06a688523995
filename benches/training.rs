//! One LoRA step (rank 8 on q and v, 256 tokens, f32), side by side: flopaudit, and candle's
//! autograd over unfused ops, its fused ones having no gradient. Both ways update by AdamW.
//!
//! `cargo bench --bench training`, with the weights of `scripts/fetch-weights.sh` or of
//! `FLOPAUDIT_WEIGHTS`; without any, random ones of the same shapes.

use std::{cell::RefCell, collections::HashMap, hint::black_box, path::PathBuf, time::Duration};

use candle_core::{D, DType, Device, Result, Tensor, Var};
use candle_nn::{AdamW, Optimizer, ParamsAdamW, loss::cross_entropy, ops::softmax};
use criterion::{Criterion, criterion_group, criterion_main};
use flopaudit::{
    config::{LoraConfig, ModelConfig, Projection},
    ledger::{Dtype, Ledger, Phase},
    meter::Meter,
    model::{AdapterSource, Decoder, Labelled, Trained},
    train::{Hyper, Trainer},
    weights::{self, Checkpoint},
};

const TOKENS: usize = 256;
const RANK: usize = 8;
const ALPHA: f64 = 16.0;
const TARGETS: [Projection; 2] = [Projection::QProj, Projection::VProj];
const RATE: f64 = 1e-4;

fn checkpoint() -> Checkpoint {
    let default = concat!(env!("CARGO_MANIFEST_DIR"), "/weights/model.gguf");
    let path = std::env::var_os("FLOPAUDIT_WEIGHTS").map_or(PathBuf::from(default), PathBuf::from);
    match path.to_str() {
        Some(spec) if path.exists() => weights::open(Some(spec)).unwrap(),
        _ => weights::synthetic(ModelConfig::preset("qwen2.5-0.5b").unwrap(), 0).unwrap(),
    }
}

fn ours(checkpoint: &Checkpoint, meter: Meter) -> Trainer {
    let Checkpoint { config, weights, .. } = checkpoint;
    let lora = LoraConfig::new(config, RANK, ALPHA, &TARGETS).unwrap();
    let source = AdapterSource::Fresh { lora, seed: 0 };
    let model =
        Decoder::load(config, weights, &source, Dtype::F32, &Device::Cpu, |_| Ok(())).unwrap();
    let hyper = Hyper { clip: None, ..Hyper::DEFAULT };
    Trainer::new(meter, model, Trained::Adapters, hyper, TOKENS, false).unwrap()
}

/// The same model in candle's differentiable ops.
struct Peer {
    config: ModelConfig,
    tensors: HashMap<String, Tensor>,
    adapters: HashMap<String, (Var, Var)>,
    rope: (Tensor, Tensor), // cos and sin, (T, d/2)
    mask: Tensor,           // (T, T)
    optimizer: AdamW,
}

impl Peer {
    fn new(Checkpoint { config, weights, .. }: &Checkpoint) -> Result<Self> {
        let cpu = &Device::Cpu;
        let tensors: HashMap<_, _> = weights::tensor_shapes(config)
            .into_iter()
            .map(|(name, shape)| {
                let tensor = weights.tensor(&name, &shape, DType::F32, cpu).unwrap();
                (name, tensor)
            })
            .collect();
        let mut adapters = HashMap::new();
        for layer in 0..config.num_hidden_layers {
            for projection in TARGETS {
                let (input, output) = projection.widths(config);
                let a = Var::randn(0f32, 0.02, (RANK, input), cpu)?;
                let b = Var::zeros((output, RANK), DType::F32, cpu)?;
                let name = format!("model.layers.{layer}.{}.{projection}", projection.parent());
                adapters.insert(name, (a, b));
            }
        }
        let vars = adapters.values().flat_map(|(a, b)| [a.clone(), b.clone()]).collect();
        let params = ParamsAdamW { lr: RATE, weight_decay: 0.01, ..Default::default() };
        let half = config.head_dim() / 2;
        let frequency = |i| config.rope.theta.powf(-(i as f64) / half as f64) as f32;
        let frequencies = Tensor::from_iter((0..half).map(frequency), cpu)?.unsqueeze(0)?;
        let positions = Tensor::arange(0f32, TOKENS as f32, cpu)?.unsqueeze(1)?;
        let angles = positions.matmul(&frequencies)?;
        let above = |i| if i % TOKENS > i / TOKENS { f32::NEG_INFINITY } else { 0.0 };
        let mask = Tensor::from_iter((0..TOKENS * TOKENS).map(above), cpu)?;
        Ok(Self {
            config: config.clone(),
            tensors,
            adapters,
            rope: (angles.cos()?, angles.sin()?),
            mask: mask.reshape((TOKENS, TOKENS))?,
            optimizer: AdamW::new(vars, params)?,
        })
    }

    /// x (T, in) → (T, out)
    fn linear(&self, x: &Tensor, name: &str) -> Result<Tensor> {
        let mut y = x.matmul(&self.tensors[&format!("{name}.weight")].t()?)?;
        if let Some(bias) = self.tensors.get(&format!("{name}.bias")) {
            y = y.broadcast_add(bias)?;
        }
        let Some((a, b)) = self.adapters.get(name) else { return Ok(y) };
        y + (x.matmul(&a.t()?)?.matmul(&b.t()?)? * (ALPHA / RANK as f64))?
    }

    fn norm(&self, x: &Tensor, name: &str) -> Result<Tensor> {
        let rms = (x.sqr()?.mean_keepdim(D::Minus1)? + self.config.rms_norm_eps)?.sqrt()?;
        x.broadcast_div(&rms)?.broadcast_mul(&self.tensors[&format!("{name}.weight")])
    }

    /// x (T, n·d) → (n, T, d)
    fn heads(&self, x: &Tensor, n: usize) -> Result<Tensor> {
        x.reshape((TOKENS, n, self.config.head_dim()))?.transpose(0, 1)?.contiguous()
    }

    fn rotate(&self, x: &Tensor) -> Result<Tensor> {
        let half = self.config.head_dim() / 2;
        let (a, b) = (x.narrow(2, 0, half)?, x.narrow(2, half, half)?);
        let (cos, sin) = &self.rope;
        let first = (a.broadcast_mul(cos)? - b.broadcast_mul(sin)?)?;
        let second = (b.broadcast_mul(cos)? + a.broadcast_mul(sin)?)?;
        Tensor::cat(&[first, second], 2)
    }

    fn attention(&self, x: &Tensor, name: &str) -> Result<Tensor> {
        let (heads, kv_heads) = (self.config.num_attention_heads, self.config.num_key_value_heads);
        let d = self.config.head_dim();
        let q = self.heads(&self.linear(x, &format!("{name}.q_proj"))?, heads)?;
        let k = self.heads(&self.linear(x, &format!("{name}.k_proj"))?, kv_heads)?;
        let v = self.heads(&self.linear(x, &format!("{name}.v_proj"))?, kv_heads)?;
        let (q, k) = ((self.rotate(&q)? * (d as f64).powf(-0.5))?, self.rotate(&k)?);
        let grouped = |q: &Tensor| q.reshape((kv_heads, heads / kv_heads * TOKENS, ()));
        let scores = grouped(&q)?.matmul(&k.t()?)?.reshape((heads, TOKENS, TOKENS))?;
        let weights = softmax(&scores.broadcast_add(&self.mask)?, D::Minus1)?;
        let mixed = grouped(&weights)?.matmul(&v)?.reshape((heads, TOKENS, d))?;
        let mixed = mixed.transpose(0, 1)?.reshape((TOKENS, heads * d))?;
        self.linear(&mixed, &format!("{name}.o_proj"))
    }

    fn step(&mut self, ids: &Tensor, targets: &Tensor) -> Result<f32> {
        let embedding = &self.tensors["model.embed_tokens.weight"];
        let mut x = embedding.index_select(ids, 0)?;
        for layer in 0..self.config.num_hidden_layers {
            let name = |module: &str| format!("model.layers.{layer}.{module}");
            let h = self.norm(&x, &name("input_layernorm"))?;
            x = (x + self.attention(&h, &name("self_attn"))?)?;
            let h = self.norm(&x, &name("post_attention_layernorm"))?;
            let gate = self.linear(&h, &name("mlp.gate_proj"))?.silu()?;
            let up = self.linear(&h, &name("mlp.up_proj"))?;
            x = (x + self.linear(&(gate * up)?, &name("mlp.down_proj"))?)?;
        }
        let head = self.tensors.get("lm_head.weight").unwrap_or(embedding);
        let logits = self.norm(&x, "model.norm")?.matmul(&head.t()?)?;
        let loss = cross_entropy(&logits, targets)?;
        self.optimizer.step(&loss.backward()?)?;
        loss.to_scalar()
    }
}

fn training(c: &mut Criterion) {
    let checkpoint = checkpoint();
    let ledger = RefCell::new(Ledger::default());
    let meter = Meter::new(&ledger, Phase::Setup);
    let mut trainer = ours(&checkpoint, meter);
    let mut peer = Peer::new(&checkpoint).unwrap();

    let ids: Vec<u32> = (0..=TOKENS as u32).map(|i| i * 37 % 1000).collect();
    let (fed, targets) = (&ids[..TOKENS], &ids[1..]);
    let tensor = |ids: &[u32]| Tensor::new(ids, &Device::Cpu).unwrap();
    let theirs = (tensor(fed), tensor(targets));
    let weights = vec![1.0 / TOKENS as f32; TOKENS];
    let text = Labelled { ids: fed, targets, weights: &weights, batch: 1, sequences: None };

    // B is zero, so both must find the loss of the base model.
    let (loss, _) = trainer.gradients(meter, &[text]).unwrap();
    let their_loss = f64::from(peer.step(&theirs.0, &theirs.1).unwrap());
    assert!((loss - their_loss).abs() < 1e-3, "the losses differ: {loss} and {their_loss}");

    let mut group = c.benchmark_group(format!("LoRA step, rank {RANK}, {TOKENS} tokens, f32"));
    group.sample_size(10).warm_up_time(Duration::from_secs(3));
    group.bench_function("flopaudit", |b| {
        b.iter(|| {
            let gradients = trainer.gradients(meter, &[text]).unwrap();
            black_box(trainer.update(meter, gradients, RATE).unwrap())
        })
    });
    group.bench_function("candle's autograd", |b| {
        b.iter(|| black_box(peer.step(&theirs.0, &theirs.1).unwrap()))
    });
    group.finish();
}

criterion_group!(benches, training);
criterion_main!(benches);
