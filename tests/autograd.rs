//! The model's gradients against finite differences, against candle's own autograd over unfused
//! ops in f64, and against themselves where the work is divided otherwise.

mod tiny;

use std::{cell::RefCell, collections::HashMap};

use candle_core::{D, Device, Tensor, Var};
use flopaudit::{
    config::{LoraConfig, ModelConfig, Projection},
    ledger::{Dtype, Key, Ledger, Lora, Module, Op, Phase},
    model::{Decoder, Trained},
    workload::LOSS_ROWS,
};
use rand::{Rng, SeedableRng, rngs::StdRng};
use tiny::{
    Gradient, Text, config, gradients, loss, model, model_in, norm, observed, worst, write,
};

/// What is trained, and the adapted projections.
const TRAININGS: [(Trained, &[Projection]); 4] = [
    (Trained::Adapters, &Projection::ALL),
    (Trained::Adapters, &[Projection::QProj, Projection::VProj]),
    (Trained::All, &[]),
    (Trained::All, &Projection::ALL),
];

/// Every training of a tied and an untied model.
fn trainings() -> impl Iterator<Item = (ModelConfig, Trained, &'static [Projection])> {
    let of = |tied| TRAININGS.map(|(trained, targets)| (config(tied), trained, targets));
    [true, false].into_iter().flat_map(of)
}

#[test]
fn gradients_are_the_slopes_of_the_loss() {
    let mut rng = StdRng::seed_from_u64(3);
    let mut farthest: f64 = 0.0;
    for (config, trained, targets) in trainings() {
        let mut text = Text::new(&config, 2, 5);
        text.weights[3] = 0.0; // not to be learnt
        let mut model = model(&config, targets, trained);
        let (_, found) = gradients(&mut model, &text, false);
        for (i, (name, gradient)) in found.iter().enumerate() {
            let before = model.trained()[i].2.to_vec().unwrap();
            // One random direction, and one that goes uphill with every element.
            let mut random = || gradient.iter().map(|_| rng.random_range(-1.0..1.0)).collect();
            let (anywhere, lengths): (Vec<f64>, Vec<f64>) = (random(), random());
            let uphill = gradient.iter().zip(&lengths).map(|(g, l)| g * l.abs()).collect();
            for direction in [anywhere, uphill] {
                let size = norm(&direction);
                // As far as the loss stays well above its rounding and close to a line.
                let step = (1e-3 / norm(gradient)).min(0.05);
                let mut loss_at = |step: f64| {
                    let moved = before.iter().zip(&direction);
                    let moved = moved.map(|(x, d)| (f64::from(*x) + step * d / size) as f32);
                    write(model.trained()[i].2, moved.collect());
                    loss(&model, &text)
                };
                let slope = (loss_at(step) - loss_at(-step)) / (2.0 * step);
                write(model.trained()[i].2, before.clone());
                let along: f64 = gradient.iter().zip(&direction).map(|(g, d)| g * d / size).sum();
                let error = (along - slope).abs() / norm(gradient);
                farthest = farthest.max(error);
                assert!(error < 5e-3, "{trained:?} {targets:?} {name}: {along}, not {slope}");
            }
        }
    }
    println!("worst error of a slope {farthest:.1e}");
}

/// Qwen2 in candle's differentiable ops, none of them fused, every tensor by its checkpoint name.
struct Reference {
    config: ModelConfig,
    /// alpha / rank.
    lora: LoraConfig,
    weights: HashMap<String, Tensor>,
}

impl Reference {
    fn linear(&self, x: &Tensor, layer: usize, p: Projection) -> candle_core::Result<Tensor> {
        let name = format!("model.layers.{layer}.{}.{p}", p.parent());
        let times = |x: &Tensor, w: &Tensor| x.matmul(&w.t()?);
        let mut y = times(x, &self.weights[&format!("{name}.weight")])?;
        if let Some(bias) = self.weights.get(&format!("{name}.bias")) {
            y = y.broadcast_add(bias)?;
        }
        let factor = |f| self.weights.get(&format!("base_model.model.{name}.lora_{f}.weight"));
        match (factor('A'), factor('B')) {
            (Some(a), Some(b)) => y + (times(&times(x, a)?, b)? * self.scaling(layer, p))?,
            _ => Ok(y),
        }
    }

    fn scaling(&self, layer: usize, p: Projection) -> f64 {
        self.lora.scaling(self.lora.at(layer, p).unwrap())
    }

    fn norm(&self, x: &Tensor, name: &str) -> candle_core::Result<Tensor> {
        let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
        let root = (mean + self.config.rms_norm_eps)?.sqrt()?;
        x.broadcast_div(&root)?.broadcast_mul(&self.weights[name])
    }

    /// x (B, heads, T, d): element i turns with element i + d/2.
    fn rope(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let (_, _, seq, d) = x.dims4()?;
        let angle = |i: usize| {
            (i / (d / 2)) as f64
                / self.config.rope.theta.powf((i % (d / 2)) as f64 * 2.0 / d as f64)
        };
        let angles: Vec<f64> = (0..seq * d / 2).map(angle).collect();
        let angles = Tensor::from_vec(angles, (seq, d / 2), &Device::Cpu)?;
        let (cos, sin) = (angles.cos()?, angles.sin()?);
        let (a, b) = (x.narrow(3, 0, d / 2)?, x.narrow(3, d / 2, d / 2)?);
        let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
        let second = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
        Tensor::cat(&[first, second], 3)
    }

    /// x (B·T, D) → (B·T, H·d)
    fn attention(&self, x: &Tensor, layer: usize, batch: usize) -> candle_core::Result<Tensor> {
        let (h, kv) = (self.config.num_attention_heads, self.config.num_key_value_heads);
        let (seq, d) = (x.dim(0)? / batch, self.config.head_dim());
        let heads = |p, n| {
            self.linear(x, layer, p)?.reshape((batch, seq, n, d))?.transpose(1, 2)?.contiguous()
        };
        // Each key head stands beside every query head that reads it.
        let repeated = |x: Tensor| {
            x.unsqueeze(2)?.broadcast_as((batch, kv, h / kv, seq, d))?.reshape((batch, h, seq, d))
        };
        let q = self.rope(&heads(Projection::QProj, h)?)?;
        let k = repeated(self.rope(&heads(Projection::KProj, kv)?)?)?;
        let v = repeated(heads(Projection::VProj, kv)?)?;
        let scores = (q.matmul(&k.t()?.contiguous()?)? / (d as f64).sqrt())?;
        let later = |i: usize| if i % seq > i / seq { f64::NEG_INFINITY } else { 0.0 };
        let mask: Vec<f64> = (0..seq * seq).map(later).collect();
        let scores = scores.broadcast_add(&Tensor::from_vec(mask, (seq, seq), &Device::Cpu)?)?;
        let mixed = candle_nn::ops::softmax(&scores, D::Minus1)?.matmul(&v)?;
        mixed.transpose(1, 2)?.contiguous()?.reshape((batch * seq, h * d))
    }

    /// Mean cross-entropy.
    fn loss(&self, text: &Text) -> candle_core::Result<Tensor> {
        let table = &self.weights["model.embed_tokens.weight"];
        let ids = |ids: &[u32]| Tensor::new(ids, &Device::Cpu);
        let mut x = table.index_select(&ids(&text.ids)?, 0)?; // (B·T, D)
        for i in 0..self.config.num_hidden_layers {
            let name = format!("model.layers.{i}");
            let h = self.norm(&x, &format!("{name}.input_layernorm.weight"))?;
            let h = self.attention(&h, i, text.batch)?;
            x = (x + self.linear(&h, i, Projection::OProj)?)?;
            let h = self.norm(&x, &format!("{name}.post_attention_layernorm.weight"))?;
            let gate = self.linear(&h, i, Projection::GateProj)?.silu()?;
            let h = (gate * self.linear(&h, i, Projection::UpProj)?)?;
            x = (x + self.linear(&h, i, Projection::DownProj)?)?;
        }
        let x = self.norm(&x, "model.norm.weight")?;
        let head = self.weights.get("lm_head.weight").unwrap_or(table);
        candle_nn::loss::cross_entropy(&x.matmul(&head.t()?)?, &ids(&text.targets)?)
    }
}

/// The reference with the same weights as `model`, of which `trained` are variables.
fn reference(model: &mut Decoder, trained: Trained) -> (Reference, Vec<(String, Var)>) {
    let (config, lora) = (model.config().clone(), model.lora().clone());
    let (mut weights, mut variables) = (HashMap::new(), vec![]);
    model.train(Trained::All);
    for (name, scope, tensor) in model.trained() {
        let values = tensor.to_vec().unwrap().into_iter().map(f64::from).collect();
        let mut weight = Tensor::from_vec(values, tensor.dims(), &Device::Cpu).unwrap();
        if trained == Trained::All || matches!(scope.module, Module::Lora(..)) {
            let variable = Var::from_tensor(&weight).unwrap();
            weight = variable.as_tensor().clone();
            variables.push((name.clone(), variable));
        }
        weights.insert(name, weight);
    }
    model.train(trained);
    (Reference { config, lora, weights }, variables)
}

#[test]
fn gradients_equal_candles_autograd() {
    for ((config, trained, targets), seq) in trainings().flat_map(|t| [(t.clone(), 1), (t, 5)]) {
        let text = Text::new(&config, 2, seq);
        let mut model = model(&config, targets, trained);
        let (reference, variables) = reference(&mut model, trained);
        let expected_loss = reference.loss(&text).unwrap();
        let mut theirs = expected_loss.backward().unwrap();
        let mut of = |(name, variable): (String, Var)| {
            (name, theirs.remove(&variable).unwrap().flatten_all().unwrap().to_vec1().unwrap())
        };
        let expected: Vec<Gradient> = variables.into_iter().map(&mut of).collect();
        let expected_loss: f64 = expected_loss.to_scalar().unwrap();

        let (loss, found) = gradients(&mut model, &text, false);
        let off = (loss - expected_loss).abs();
        let (error, whose) = worst(&found, &expected);
        println!("{} gradients {error:.1e} ({whose}), loss {off:.1e}", found.len());
        assert!(off < 1e-5, "{loss}, not {expected_loss}");
        assert!(error < 1e-4, "{trained:?} {targets:?} {whose}: {error}");
    }
}

#[test]
fn gradients_in_bf16_are_near_those_in_f32() {
    for (config, trained, targets) in trainings() {
        let text = Text::new(&config, 2, 5);
        let (loss, wide) = gradients(&mut model(&config, targets, trained), &text, false);
        let narrow = &mut model_in(Dtype::BF16, &config, targets, trained);
        let (narrow_loss, narrow) = gradients(narrow, &text, false);
        let (error, whose) = worst(&narrow, &wide);
        println!("bf16: {error:.1e} ({whose}), loss {:.1e}", (narrow_loss - loss).abs());
        assert!((narrow_loss / loss - 1.0).abs() < 0.02, "{narrow_loss}, not {loss}");
        assert!(error < 0.2, "{trained:?} {targets:?} {whose}: {error}");
    }
}

#[test]
fn running_layers_again_changes_no_gradient() {
    for (config, trained, targets) in trainings() {
        for seq in [1, 5] {
            let text = Text::new(&config, 2, seq);
            let mut model = model(&config, targets, trained);
            let kept = gradients(&mut model, &text, false);
            let again = gradients(&mut model, &text, true);
            assert_eq!(kept.0, again.0);
            let (error, whose) = worst(&again.1, &kept.1);
            assert!(error < 1e-6, "{trained:?} {targets:?} {whose}: {error}");
            assert_eq!(kept.0, loss(&model, &text));
        }
    }
}

/// Sums over sequences of one batch each.
fn one_by_one(model: &mut Decoder, text: &Text) -> (f64, Vec<Gradient>) {
    let mut parts = text.rows().into_iter().map(|row| gradients(model, &row, false));
    let first = parts.next().unwrap();
    parts.fold(first, |(loss, mut sum), (more, gradients)| {
        for ((_, sum), (_, gradient)) in sum.iter_mut().zip(gradients) {
            sum.iter_mut().zip(gradient).for_each(|(sum, x)| *sum += x);
        }
        (loss + more, sum)
    })
}

#[test]
fn a_batch_is_the_sum_of_its_sequences() {
    // The second has more rows than one chunk of the loss, and each of its sequences fewer.
    for (batch, seq) in [(2, 5), (9, LOSS_ROWS / 8)] {
        for (config, trained, targets) in trainings() {
            let text = Text::new(&config, batch, seq);
            let mut model = model(&config, targets, trained);
            let (loss, together) = gradients(&mut model, &text, false);
            let (sum, apart) = one_by_one(&mut model, &text);
            let (error, whose) = worst(&together, &apart);
            println!("{batch} × {seq}: loss {:.1e}, {whose} {error:.1e}", (loss - sum).abs());
            assert!((loss - sum).abs() < 1e-5, "{loss}, not {sum}");
            assert!(error < 1e-5, "{trained:?} {targets:?} {whose}: {error}");
        }
    }
}

#[test]
fn only_what_a_trained_adapter_needs_is_computed() {
    use Projection::{KProj, OProj, QProj, VProj};
    let config = config(true);
    let (batch, t) = (2, 5);
    let text = Text::new(&config, batch, t);
    let mut model = model(&config, &[QProj, VProj], Trained::Adapters);
    for recompute in [false, true] {
        let ledger = RefCell::new(Ledger::default());
        observed(&mut model, &text, recompute, &ledger);
        let ledger = ledger.into_inner();
        let ran = |layer, phase, module, op: Option<Op>| -> u64 {
            let here = |key: &Key| {
                let scope = (key.scope.layer, key.scope.module);
                key.phase == phase
                    && scope == (Some(layer), module)
                    && op.is_none_or(|op| op == key.op)
            };
            ledger.iter().filter(|(key, _)| here(key)).map(|(_, entry)| entry.calls).sum()
        };
        // Layer 0 has nothing to train below it, layer 1 has.
        for (layer, below) in [(0, 0), (1, 1)] {
            let dx = |module| ran(layer, Phase::BackwardX, module, None);
            for module in [QProj, KProj, VProj].map(Module::Proj) {
                assert_eq!(dx(module), below, "{module:?} of layer {layer}");
            }
            for p in [QProj, VProj] {
                let lora = |part| Module::Lora(p, part);
                assert_eq!(dx(lora(Lora::A)), below);
                assert_eq!([Lora::B, Lora::Scale].map(|part| dx(lora(part))), [1, 1]);
                assert_eq!(ran(layer, Phase::BackwardA, lora(Lora::A), None), 1);
                assert_eq!(ran(layer, Phase::BackwardB, lora(Lora::B), None), 1);
            }
            assert_eq!(dx(Module::InputLayernorm) > 0, below > 0);
            assert_eq!(dx(Module::Proj(OProj)), 1);

            // dQ is (G·T, S)·(S, d), dK is (d, G·T)·(G·T, S) and turned back like keys.
            let (b, rows) = (batch as u64 * 2, 2 * t as u64);
            let (t, d) = (t as u64, 4);
            let attention = |op| ran(layer, Phase::BackwardX, Module::SelfAttn, Some(op));
            assert_eq!(attention(Op::Matmul { b, m: rows, k: t, n: d }), 1);
            assert_eq!(attention(Op::Matmul { b, m: d, k: rows, n: t }), below);
            assert_eq!(attention(Op::Rope { n: b * rows * d }), 1);
            assert_eq!(attention(Op::Rope { n: b * t * d }), below);
        }
        let phases = |phase| ledger.iter().filter(|(key, _)| key.phase == phase).count();
        assert_eq!(phases(Phase::BackwardW), 0, "a frozen weight got a gradient");
        assert_eq!(phases(Phase::Recompute) > 0, recompute);
        let outside = ledger.iter().filter(|(key, _)| {
            key.phase == Phase::BackwardX && key.scope.module == Module::EmbedTokens
        });
        assert_eq!(outside.count(), 0, "the embedding got a gradient");
    }
}
