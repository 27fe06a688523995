//! Random models and workloads: every choice in which families differ, on its own.

// Each test file uses its own part of these.
#![allow(dead_code)]

use std::ops::Range;

use flopaudit_count::{
    config::{
        Activation, Biases, Family, LoraConfig, ModelConfig, Projection, Rope, RopeScaling, Site,
        Window,
    },
    ledger::Dtype,
    workload::{Logits, Sampling, Task, Workload},
};
use proptest::{collection::vec, option, prelude::*};

/// How large models and workloads may be.
#[derive(Debug, Clone)]
pub struct Sizes {
    pub heads: Range<usize>,
    pub half: Range<usize>,
    pub inner: Range<usize>,
    pub layers: Range<usize>,
    pub vocab: Range<usize>,
    pub window: Range<usize>,
    pub length: Range<u64>,
}

/// Small enough to list every op of every token.
pub const SMALL: Sizes = Sizes {
    heads: 1..4,
    half: 1..5,
    inner: 1..40,
    layers: 1..5,
    vocab: 2..60,
    window: 1..12,
    length: 1..9,
};

/// As large as models are.
pub const LARGE: Sizes = Sizes {
    heads: 1..9,
    half: 1..65,
    inner: 1..5000,
    layers: 1..40,
    vocab: 2..160_000,
    window: 1..6000,
    length: 1..5000,
};

fn ropes() -> impl Strategy<Value = Rope> {
    let positive = || 1.5f64..100.0;
    let scaling = prop_oneof![
        Just(RopeScaling::Default),
        positive().prop_map(|factor| RopeScaling::Linear { factor }),
        (positive(), 1usize..9000).prop_map(|(factor, original_max_position_embeddings)| {
            RopeScaling::Llama3 {
                factor,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_max_position_embeddings,
            }
        }),
        (positive(), 1usize..9000, positive(), any::<bool>()).prop_map(
            |(factor, original_max_position_embeddings, attention_factor, truncate)| {
                RopeScaling::Yarn {
                    factor,
                    beta_fast: 32.0,
                    beta_slow: 1.0,
                    original_max_position_embeddings,
                    attention_factor,
                    truncate,
                }
            }
        ),
    ];
    (100.0f64..1e6, scaling).prop_map(|(theta, scaling)| Rope { theta, scaling })
}

fn windows(width: Range<usize>, layers: usize) -> impl Strategy<Value = Option<Window>> {
    option::of((width, vec(any::<bool>(), layers)))
        .prop_map(|window| window.map(|(width, layers)| Window { width, layers }))
}

prop_compose! {
    /// Widths and counts of a plain model.
    fn plain(sizes: Sizes)(
        kv in sizes.heads.clone(), group in sizes.heads.clone(), half in sizes.half.clone(),
        extra in option::of(0usize..99), inner in sizes.inner.clone(),
        layers in sizes.layers.clone(), vocab in sizes.vocab.clone(), tied in any::<bool>(),
    ) -> ModelConfig {
        let heads = kv * group;
        let width = heads * 2 * half;
        ModelConfig {
            vocab_size: vocab,
            // Either D = H·d, or a head width of its own beside another D.
            hidden_size: width + extra.unwrap_or(0),
            intermediate_size: inner,
            num_hidden_layers: layers,
            num_attention_heads: heads,
            num_key_value_heads: kv,
            head_dim: extra.map(|_| 2 * half),
            tie_word_embeddings: tied,
            ..ModelConfig::preset("tiny").unwrap()
        }
    }
}

prop_compose! {
    /// Models of every family, and of others that could be.
    pub fn models(sizes: Sizes)(model in plain(sizes.clone()))(
        [qkv, o, mlp] in any::<[bool; 3]>(),
        [qk_norm, sandwich_norms, unit_offset_norms, scaled_embedding, gelu] in any::<[bool; 5]>(),
        rope in ropes(), local_rope in option::of(ropes()),
        window in windows(sizes.window.clone(), model.num_hidden_layers),
        query_pre_attn_scalar in option::of(1u16..300),
        model in Just(model),
    ) -> ModelConfig {
        ModelConfig {
            rope,
            local_rope,
            window,
            bias: Biases { qkv, o, mlp },
            qk_norm,
            sandwich_norms,
            unit_offset_norms,
            scaled_embedding,
            activation: if gelu { Activation::GeluTanh } else { Activation::Silu },
            query_pre_attn_scalar: query_pre_attn_scalar.map(f64::from),
            ..model
        }
    }
}

fn samplings() -> impl Strategy<Value = Sampling> {
    let stochastic = (0.1f64..3.0, option::of(1usize..100), option::of(0.1f64..1.0));
    (option::of(stochastic), prop_oneof![Just(1.0), Just(1.2)]).prop_map(
        |(stochastic, repeat_penalty)| match stochastic {
            None => Sampling { repeat_penalty, ..Sampling::GREEDY },
            Some((temperature, top_k, top_p)) => {
                Sampling { temperature, top_k, top_p, repeat_penalty }
            }
        },
    )
}

pub fn tasks(length: Range<u64>) -> impl Strategy<Value = Task> {
    let past = 0..2 * length.end;
    // Of training, also lengths beyond one chunk of the loss.
    let text = prop_oneof![3 => length.clone(), 1 => 80u64..300];
    let logits = prop_oneof![Just(Logits::All), Just(Logits::Last)];
    prop_oneof![
        (1u64..5, length.clone(), past, logits)
            .prop_map(|(batch, seq, past, logits)| Task::Forward { batch, seq, past, logits }),
        (1u64..5, length.clone(), length.clone(), 0u64..9, any::<bool>(), samplings()).prop_map(
            |(batch, prompt_tokens, new_tokens, more, kv_cache, sampling)| Task::Generate {
                batch,
                prompt_tokens,
                new_tokens,
                max_new_tokens: new_tokens + more,
                kv_cache,
                sampling,
            }
        ),
        (1u64..5, text.clone(), 1u64..5, length, any::<[bool; 3]>()).prop_map(
            |(batch, seq, accumulate, steps, [full, recompute, clip])| Task::Train {
                batch,
                seq,
                accumulate,
                steps,
                full,
                recompute,
                clip,
            }
        ),
        (1u64..5, text, 1u64..9).prop_map(|(batch, seq, passes)| Task::Evaluate {
            batch,
            seq,
            passes
        }),
    ]
}

prop_compose! {
    /// Adapters of one rank on some projections of every layer, or of any ranks at any sites.
    pub fn adapters(model: ModelConfig, most: usize)(
        rank in 0..=most, mask in 1u8..128, even in any::<bool>(),
        sites in vec(option::weighted(0.4, (1..=most, 1u8..9)), 7 * model.num_hidden_layers),
    ) -> LoraConfig {
        let fits = |p: Projection, rank: usize| {
            let (k, n) = p.widths(&model);
            rank.min(k).min(n)
        };
        if even || sites.iter().all(Option::is_none) {
            let targets: Vec<_> =
                Projection::ALL.into_iter().filter(|p| mask >> (*p as u8) & 1 == 1).collect();
            let rank = targets.iter().map(|p| fits(*p, rank)).min().unwrap();
            return LoraConfig::new(&model, rank, 8.0, &targets).unwrap();
        }
        let plain = LoraConfig { rank, alpha: 4.0, use_rslora: mask % 2 == 0, ..LoraConfig::none() };
        plain.of_sites(&model, |layer, p| {
            let (rank, alpha) = sites[7 * layer + p as usize]?;
            Some(Site { rank: fits(p, rank), alpha: alpha.into() })
        }).unwrap()
    }
}

prop_compose! {
    /// A random model with random adapters.
    pub fn adapted(sizes: Sizes, most: usize)(model in models(sizes))(
        lora in adapters(model.clone(), most), model in Just(model),
    ) -> (ModelConfig, LoraConfig) {
        (model, lora)
    }
}

prop_compose! {
    pub fn workloads(sizes: Sizes)(
        (model, lora) in adapted(sizes.clone(), 8), task in tasks(sizes.length.clone()),
        bf16 in any::<bool>(),
    ) -> Workload {
        let frozen = matches!(task, Task::Train { full: false, .. });
        let any = || LoraConfig::new(&model, 1, 8.0, &[Projection::OProj]).unwrap();
        let lora = if frozen && lora.rank == 0 { any() } else { lora };
        Workload { model, lora, dtype: if bf16 { Dtype::BF16 } else { Dtype::F32 }, task }
    }
}

prop_compose! {
    /// Models that a family's config.json can say.
    pub fn of_families(sizes: Sizes)(model in models(sizes), family in 0..Family::ALL.len()) -> ModelConfig {
        let family = Family::ALL[family];
        let Biases { qkv, mlp, .. } = model.bias;
        let layers = model.num_hidden_layers;
        let windows = model.window.clone().filter(|window| window.layers.contains(&true));
        let (bias, window) = match family {
            Family::Qwen2 => (Biases { qkv: true, o: false, mlp: false }, windows),
            Family::Llama => (Biases { qkv, o: qkv, mlp }, None),
            Family::Mistral => {
                let all = windows.map(|w| Window { layers: vec![true; layers], ..w });
                (Biases::default(), all)
            }
            Family::Qwen3 | Family::Gemma3 => (Biases { qkv, o: qkv, mlp: false }, windows),
        };
        let gemma = family == Family::Gemma3;
        let width = model.head_dim();
        // By kind of layer, transformers reads no `truncate`.
        let rounded = |rope: Rope| match rope.scaling {
            RopeScaling::Yarn {
                factor, beta_fast, beta_slow, original_max_position_embeddings, attention_factor, ..
            } => Rope {
                scaling: RopeScaling::Yarn {
                    factor, beta_fast, beta_slow, original_max_position_embeddings,
                    attention_factor, truncate: true,
                },
                ..rope
            },
            RopeScaling::Default | RopeScaling::Linear { .. } | RopeScaling::Llama3 { .. } => rope,
        };
        ModelConfig {
            family,
            head_dim: match family {
                Family::Qwen2 | Family::Llama | Family::Mistral => model.head_dim,
                Family::Qwen3 | Family::Gemma3 => Some(width),
            },
            local_rope: if gemma && window.is_some() { Some(model.local_rope.map_or(
                Rope::default(), rounded)) } else { None },
            rope: if gemma { rounded(model.rope) } else { model.rope },
            bias,
            window,
            qk_norm: gemma || family == Family::Qwen3,
            sandwich_norms: gemma,
            unit_offset_norms: gemma,
            scaled_embedding: gemma,
            query_pre_attn_scalar: gemma.then(|| model.query_pre_attn_scalar.unwrap_or(width as f64)),
            ..model
        }
    }
}
