//! Every structure is the reference plus its causes, and every way from one to another sums.

use std::ops::Range;

use flopaudit::{
    analytic::{Cause, Structure, count, reference, terms},
    config::{LoraConfig, ModelConfig, Projection},
    ledger::Dtype,
    prices::{Cost, Prices},
    reconcile::{End, Side, reconcile},
    workload::{Logits, Sampling, Task, Workload},
};
use proptest::prelude::*;

prop_compose! {
    fn models()(
        kv in 1usize..9, group in 1usize..9, half in 1usize..65, explicit in any::<bool>(),
        extra in 0usize..99, inner in 1usize..5000, layers in 1usize..40,
        vocab in 2usize..160_000, tied in any::<bool>(),
    ) -> ModelConfig {
        let heads = kv * group;
        let width = heads * 2 * half;
        ModelConfig {
            vocab_size: vocab,
            hidden_size: if explicit { width + extra } else { width },
            intermediate_size: inner,
            num_hidden_layers: layers,
            num_attention_heads: heads,
            num_key_value_heads: kv,
            head_dim: explicit.then_some(2 * half),
            tie_word_embeddings: tied,
            ..ModelConfig::preset("tiny").unwrap()
        }
    }
}

fn tasks() -> impl Strategy<Value = Task> {
    const LENGTHS: Range<u64> = 1..5000;
    let logits = prop_oneof![Just(Logits::All), Just(Logits::Last)];
    let sampling = (
        prop_oneof![Just(0.0), Just(0.8)],
        proptest::option::of(1usize..100),
        proptest::option::of(0.1f64..1.0),
        prop_oneof![Just(1.0), Just(1.2)],
    )
        .prop_map(|(temperature, top_k, top_p, repeat_penalty)| match temperature {
            0.0 => Sampling { repeat_penalty, ..Sampling::GREEDY },
            temperature => Sampling { temperature, top_k, top_p, repeat_penalty },
        });
    prop_oneof![
        (1u64..9, LENGTHS, 0u64..5000, logits)
            .prop_map(|(batch, seq, past, logits)| { Task::Forward { batch, seq, past, logits } }),
        (1u64..9, LENGTHS, LENGTHS, 0u64..9, any::<bool>(), sampling).prop_map(
            |(batch, prompt_tokens, new_tokens, more, kv_cache, sampling)| Task::Generate {
                batch,
                prompt_tokens,
                new_tokens,
                max_new_tokens: new_tokens + more,
                kv_cache,
                sampling,
            }
        ),
        (1u64..9, LENGTHS, 1u64..9, LENGTHS, any::<[bool; 3]>()).prop_map(
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
        (1u64..9, LENGTHS, 1u64..9).prop_map(|(batch, seq, passes)| Task::Evaluate {
            batch,
            seq,
            passes
        }),
    ]
}

prop_compose! {
    fn workloads()(model in models(), task in tasks())(
        rank in 0usize..9, mask in 1u8..128, model in Just(model), task in Just(task),
    ) -> Workload {
        let targets: Vec<_> =
            Projection::ALL.into_iter().filter(|p| mask >> (*p as u8) & 1 == 1).collect();
        let narrowest = targets.iter().map(|t| { let (k, n) = t.widths(&model); k.min(n) }).min();
        let frozen = matches!(task, Task::Train { full: false, .. });
        let rank = rank.max(usize::from(frozen)).min(narrowest.unwrap());
        let lora = LoraConfig::new(&model, rank, 8.0, &targets).unwrap();
        Workload { model, lora, dtype: Dtype::F32, task }
    }
}

prop_compose! {
    fn price_lists()(
        [add, mul, div, exp, log, sqrt, trig, cmp, neg] in any::<[u8; 9]>(),
        mac in proptest::option::of(0u64..9),
    ) -> Prices {
        let text = format!(
            "add = {add}\nmul = {mul}\ndiv = {div}\nexp = {exp}\nlog = {log}\nsqrt = {sqrt}\n\
             trig = {trig}\ncmp = {cmp}\nneg = {neg}\n"
        );
        Prices { mac, ..toml::from_str(&text).unwrap() }
    }
}

/// macs, outputs and each primitive.
fn parts(cost: &Cost) -> [u128; 11] {
    let other = cost.other.named().map(|(_, n)| n);
    std::array::from_fn(|i| match i {
        0 => cost.macs,
        1 => cost.outputs,
        i => other[i - 2],
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1024, ..ProptestConfig::default() })]

    #[test]
    fn every_structure_is_the_reference_and_its_terms(workload in workloads()) {
        let hub = parts(&reference(&workload).unwrap());
        for structure in Structure::ALL {
            let total = parts(&count(structure, &workload).unwrap().sum(|_, _| true).unwrap());
            let terms = terms(structure, &workload).unwrap();
            for i in 0..hub.len() {
                let counted: u128 = terms.iter().map(|t| parts(&t.counts)[i]).sum();
                let instead: u128 = terms.iter().map(|t| parts(&t.instead_of)[i]).sum();
                prop_assert_eq!(hub[i] + counted, total[i] + instead, "{} part {}", structure, i);
            }
        }
    }

    #[test]
    fn every_way_sums(workload in workloads(), from in price_lists(), to in price_lists()) {
        let covered = || Structure::ALL.into_iter();
        let totals: Vec<[i128; 2]> = covered()
            .map(|structure| {
                let cost = count(structure, &workload).unwrap().sum(|_, _| true).unwrap();
                [&from, &to].map(|prices| prices.flops(&cost).unwrap() as i128)
            })
            .collect();
        for (a, [start, _]) in covered().zip(&totals) {
            for (b, [_, end]) in covered().zip(&totals) {
                let from = End { structure: a, prices: from.clone() };
                let to = End { structure: b, prices: to.clone() };
                let way = reconcile("", std::slice::from_ref(&workload), &from, &to).unwrap();
                let sum: i128 = way.steps.iter().map(|s| s.flops).sum();
                prop_assert_eq!(start + sum, *end, "{} to {}", a, b);
                for step in &way.steps {
                    let name = step.cause.name();
                    prop_assert!(!["other", "rest", "remainder"].iter().any(|w| name.contains(w)));
                }
            }
        }
    }
}

fn named(way: &flopaudit::reconcile::Reconciliation) -> Vec<(Cause, Side, i128)> {
    way.steps.iter().map(|s| (s.cause, s.of, s.flops)).collect()
}

#[test]
fn a_small_way_by_hand() {
    // tiny: D 32, F 48, L 3, H 4, K 2, d 8, V 320, tied. One token, nothing before it.
    let model = ModelConfig::preset("tiny").unwrap();
    let task = Task::Forward { batch: 1, seq: 1, past: 0, logits: Logits::All };
    let workload = Workload { model, lora: LoraConfig::none(), dtype: Dtype::F32, task };
    let end = |structure| End { structure, prices: Prices::matmul() };
    let way = |from, to| {
        reconcile("tiny", std::slice::from_ref(&workload), &end(from), &end(to)).unwrap()
    };
    // 6ND has no attention (2 products of 32 in each of 3 layers, 2 FLOPs a mac), and takes
    // 32 + 2·16 biases and 2·32 gains of each layer, and 32 at the end, for matrices.
    let six = way(Structure::SixNd, Structure::Exact);
    assert_eq!(six.from.total_flops, 2 * 33_696);
    assert_eq!(
        named(&six),
        [
            (Cause::Vectors, Side::From, -2 * (3 * 128 + 32)),
            (Cause::Scores, Side::From, 2 * 3 * 2 * 32),
        ]
    );
    assert_eq!(six.to.total_flops, 2 * 33_696 - 832 + 384);
    // Megatron and torch count the same products where nothing is adapted.
    assert!(way(Structure::Megatron, Structure::Torch).steps.is_empty());
    // The notebook: k and v 32 wide for 16, and two dense rotations of 32 × 32, in 3 layers.
    assert_eq!(
        named(&way(Structure::Exact, Structure::Notebook)),
        [
            (Cause::DenseRope, Side::To, 2 * 3 * 2 * 32 * 32),
            (Cause::MultiHead, Side::To, 2 * 3 * 2 * 32 * 16),
        ]
    );
}

#[test]
fn training_the_adapters_takes_no_gradient_of_frozen_weights() {
    let model = ModelConfig::preset("tiny").unwrap();
    let lora = LoraConfig::new(&model, 2, 4.0, &[Projection::OProj]).unwrap();
    let task = Task::Train {
        batch: 1,
        seq: 4,
        accumulate: 2,
        steps: 5,
        full: false,
        recompute: false,
        clip: true,
    };
    let workload = Workload { model, lora, dtype: Dtype::F32, task };
    let end = |structure| End { structure, prices: Prices::matmul() };
    let way = reconcile("tiny", &[workload], &end(Structure::Megatron), &end(Structure::Torch));
    // 10 micro-steps of 4 tokens, 2 FLOPs a mac. o's adapter: 2·(32 + 32) in 3 layers, three
    // times. Frozen: q and o 32·32, k and v 32·16, MLP 3·32·48 in 3 layers; the head 32·320.
    // Below the first adapter: towards the inputs of q, k, v, o and of o's A, and attention's
    // four gradients of 4 scores a token.
    assert_eq!(
        named(&way.unwrap()),
        [
            (Cause::FrozenWeights, Side::To, -80 * (3 * (2 * 1024 + 2 * 512 + 3 * 1536) + 10_240)),
            (Cause::BelowAdapters, Side::To, -80 * (2 * 1024 + 2 * 512 + 64 + 4 * 4 * 32)),
            (Cause::LoraProducts, Side::From, 80 * 3 * 3 * 128),
        ]
    );
}

#[test]
fn what_training_executes_is_named() {
    let model = ModelConfig::preset("tiny").unwrap();
    let lora = LoraConfig::new(&model, 2, 4.0, &[Projection::QProj]).unwrap();
    let task = Task::Train {
        batch: 1,
        seq: 4,
        accumulate: 2,
        steps: 5,
        full: false,
        recompute: true,
        clip: true,
    };
    let workload = Workload { model, lora, dtype: Dtype::F32, task };
    let end = |structure| End { structure, prices: Prices::unit() };
    let way = reconcile("tiny", &[workload], &end(Structure::Torch), &end(Structure::Exact));
    let named = named(&way.unwrap());
    let size = |cause| named.iter().find(|(c, ..)| *c == cause).map(|(.., flops)| *flops);
    // 10 micro-steps of 4 rows of 320 logits: 2·320 + 1 adds, 320 exps, a log and a mul; then a
    // div, 320 muls and an add.
    assert_eq!(size(Cause::Loss), Some(40 * (641 + 320 + 2 + 322)));
    // 5 steps over 3 pairs of 2·32: norm (2n − 1), clipping n, AdamW 14n; 6 + 2 for the factor.
    assert_eq!(size(Cause::Optimizer), Some(5 * (6 * (2 * 64 - 1 + 64 + 14 * 64) + 8)));
    // Each second micro-step's 6 gradients of 64.
    assert_eq!(size(Cause::Accumulation), Some(5 * 6 * 64));
    assert!(size(Cause::Recompute).unwrap() > 0);
}

#[test]
fn an_evaluation_is_its_passes_and_their_loss() {
    let model = ModelConfig::preset("tiny").unwrap();
    let task = Task::Evaluate { batch: 1, seq: 4, passes: 3 };
    let workload = Workload { model, lora: LoraConfig::none(), dtype: Dtype::F32, task };
    let end = |structure| End { structure, prices: Prices::matmul() };
    let way = reconcile("tiny", &[workload], &end(Structure::Torch), &end(Structure::Exact));
    assert_eq!(named(&way.unwrap()), []);
}
