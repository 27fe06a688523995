//! Random models and workloads: every choice in which families differ, on its own.

// Each test file uses its own part of these.
#![allow(dead_code)]

use std::ops::Range;

use flopaudit_count::{
    config::{
        Activation, Biases, Family, LoraConfig, ModelConfig, Projection, Rope, RopeScaling, Site,
        Window,
    },
    ledger::{Dtype, MomentDtype},
    workload::{AttentionMode, Lengths, Logits, Ragged, Rows, Sampling, Task, Turn, Workload},
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

/// Lengths of a few blocks of attention.
pub const BLOCKS: Sizes = Sizes { layers: 1..3, window: 1..200, length: 1..200, ..SMALL };

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
            head_stored_apart: !tied && vocab % 2 == 0,
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

pub fn samplings() -> impl Strategy<Value = Sampling> {
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
    prop_oneof![
        2 => forwards(length.clone()),
        3 => generations(length.clone()),
        1 => (1u64..5, length.clone(), 1..=length.end / 2, 0..=length.end / 2, 1u64..6).prop_map(
            |(batch, past, drafted, accepted, rounds)| {
                let accepted = accepted.min(drafted);
                Task::Verify { batch, past, drafted, accepted, rounds }
            }
        ),
        3 => (rows(length.clone()), 1u64..4, length.clone(), any::<[bool; 4]>()).prop_map(
            |((batch, seq, passes, rows), divisor, steps, [full, recompute, clip, narrow])| {
                // Where rows are whole, their number is free; else it is that of the passes.
                let accumulate = (1..=divisor).rev().find(|n| passes.is_multiple_of(*n)).unwrap();
                let steps = if rows.is_whole() { steps } else { passes / accumulate };
                let moments = if narrow { MomentDtype::BF16 } else { MomentDtype::F32 };
                Task::Train { batch, seq, accumulate, steps, full, recompute, clip, moments, rows }
            }
        ),
        1 => rows(length.clone())
            .prop_map(|(batch, seq, passes, rows)| Task::Evaluate { batch, seq, passes, rows }),
    ]
}

fn forwards(length: Range<u64>) -> impl Strategy<Value = Task> {
    let past = 0..2 * length.end;
    let logits = prop_oneof![Just(Logits::All), Just(Logits::Last), Just(Logits::None)];
    let sequences = option::weighted(0.3, ragged(length.clone()));
    (1u64..5, length, past, logits, sequences).prop_map(|(batch, seq, past, logits, sequences)| {
        let Some(sequences) = sequences else {
            return Task::Forward { batch, seq, past, logits, sequences };
        };
        let lengths = sequences.lengths();
        let (batch, seq) = match &sequences {
            Ragged::Padded(_) => (lengths.count() as u64, lengths.range().unwrap().1),
            Ragged::Packed(_) => (1, lengths.tokens() as u64),
        };
        Task::Forward { batch, seq, past: 0, logits, sequences: Some(sequences) }
    })
}

/// Sequences of any lengths together, padded or packed.
fn ragged(length: Range<u64>) -> impl Strategy<Value = Ragged> {
    (vec(length, 1..6), any::<bool>()).prop_map(|(lengths, padded)| {
        let of = if padded { Ragged::Padded } else { Ragged::Packed };
        of(lengths.into_iter().collect())
    })
}

fn generations(length: Range<u64>) -> impl Strategy<Value = Task> {
    let turns = vec((1u64..7, 1u64..7), 0..3);
    let prompts = ragged(length.clone());
    let alike = (1u64..5, length.clone(), 0..length.end, turns, option::of(length.clone()));
    (alike, option::weighted(0.3, prompts), length, 0u64..9, any::<bool>(), samplings()).prop_map(
        |((batch, prompt, past, turns, chunk), prompts, new_tokens, more, kv_cache, sampling)| {
            let more = if turns.is_empty() { more } else { 0 };
            let then = turns
                .into_iter()
                .map(|(prompt_tokens, new_tokens)| Turn { prompt_tokens, new_tokens });
            let alike = Task::Generate {
                batch,
                past: if kv_cache { past } else { 0 },
                prompt_tokens: prompt,
                prompts: None,
                new_tokens,
                max_new_tokens: new_tokens + more,
                then: then.collect(),
                prefill_chunk: chunk.filter(|_| kv_cache),
                kv_cache,
                sampling,
            };
            let Some(prompts) = prompts else { return alike };
            let lengths = prompts.lengths();
            Task::Generate {
                batch: lengths.count() as u64,
                past: 0,
                prompt_tokens: lengths.range().unwrap().1,
                prompts: Some(prompts),
                new_tokens,
                max_new_tokens: new_tokens + more,
                then: vec![],
                prefill_chunk: None,
                kv_cache,
                sampling,
            }
        },
    )
}

/// Lengths of text, also beyond one chunk of the loss.
fn text(length: &Range<u64>) -> impl Strategy<Value = u64> + Clone + use<> {
    prop_oneof![3 => length.clone(), 1 => 80u64..1200]
}

/// (batch, seq, passes, rows) of passes that are whole, padded or packed.
fn rows(length: Range<u64>) -> impl Strategy<Value = (u64, u64, u64, Rows)> {
    let whole = (1u64..5, text(&length), 1u64..9)
        .prop_map(|(batch, seq, passes)| (batch, seq, passes, Rows::Whole));
    let padded = (1usize..4, 1usize..5).prop_flat_map({
        let text = text(&length);
        move |(batch, passes)| vec(vec(text.clone(), batch), passes)
    });
    let packed = vec(vec(text(&length), 1..5), 1..5);
    prop_oneof![
        2 => whole,
        1 => padded.prop_map(|passes| {
            let widths = passes.iter().map(|rows| *rows.iter().max().unwrap()).collect::<Lengths>();
            let (batch, seq) = (passes[0].len() as u64, widths.range().unwrap().1);
            let count = passes.len() as u64;
            let lengths = passes.into_iter().flatten().collect();
            (batch, seq, count, Rows::Padded { widths, lengths })
        }),
        1 => packed.prop_map(|passes| {
            let fed = passes.iter().map(|documents| documents.iter().sum()).collect::<Lengths>();
            let count = passes.len() as u64;
            let documents = passes.into_iter().flatten().collect::<Lengths>();
            let seq = documents.range().unwrap().1;
            let batch = fed.range().unwrap().1.div_ceil(seq);
            (batch, seq, count, Rows::Packed { passes: fed, documents })
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
        (dtype, blocked) in (0..3usize, any::<bool>()),
    ) -> Workload {
        let frozen = matches!(task, Task::Train { full: false, .. });
        let any = || LoraConfig::new(&model, 1, 8.0, &[Projection::OProj]).unwrap();
        let lora = if frozen && lora.rank == 0 { any() } else { lora };
        // Weights in 8 bits are frozen.
        let full = matches!(task, Task::Train { full: true, .. });
        let dtype = match dtype {
            0 => Dtype::F32,
            1 if !full => Dtype::Fp8,
            _ => Dtype::BF16,
        };
        let attention = if blocked { AttentionMode::Blocked } else { AttentionMode::Dense };
        Workload { model, lora, dtype, attention, task }
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
