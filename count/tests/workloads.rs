//! Prefixes, turns, parts, verification and sequences of many lengths, by hand and by identities.

use flopaudit_count::{
    analytic::{Structure, closed_form, count, terms},
    config::{LoraConfig, ModelConfig, Projection, Window},
    ledger::Dtype,
    prices::Prices,
    reconcile::{End, reconcile},
    tally::Component,
    workload::{
        Checks, Filling, Kind, Layout, Lengths, Logits, Ragged, Rows, Sampling, Task, Turn,
        Workload,
    },
};
use proptest::{collection::vec, prelude::*};

fn workload(preset: &str, task: Task) -> Workload {
    let (model, lora) = (ModelConfig::preset(preset).unwrap(), LoraConfig::none());
    Workload { model, lora, dtype: Dtype::F32, attention: Default::default(), task }
}

fn matmuls(preset: &str, task: Task) -> u128 {
    let cost = closed_form(&workload(preset, task)).unwrap().sum(|_, _| true).unwrap();
    Prices::matmul().flops(&cost).unwrap()
}

fn generate(past: u64, prompt_tokens: u64, new_tokens: u64) -> Task {
    let Task::Generate { kv_cache, sampling, .. } = Kind::Generate.task() else { unreachable!() };
    Task::Generate {
        batch: 1,
        past,
        prompt_tokens,
        prompts: None,
        new_tokens,
        max_new_tokens: new_tokens,
        then: vec![],
        prefill_chunk: None,
        kv_cache,
        sampling,
    }
}

fn packed(lengths: &[u64]) -> Task {
    let all: Lengths = lengths.iter().copied().collect();
    let seq = lengths.iter().sum();
    Task::Forward {
        batch: 1,
        seq,
        past: 0,
        logits: Logits::All,
        sequences: Some(Ragged::Packed(all)),
    }
}

#[test]
fn figures_of_7b() {
    assert_eq!(matmuls("qwen2.5-7b", generate(4000, 100, 200)), 4_620_195_528_704);
    assert_eq!(matmuls("qwen2.5-7b", packed(&[512; 8])), 58_761_595_060_224);
    let batch = Task::Forward { batch: 8, seq: 512, past: 0, logits: Logits::All, sequences: None };
    assert_eq!(matmuls("qwen2.5-7b", batch), 58_761_595_060_224);
}

/// Scores of a head, by what attention's products cost: 2 · H·d macs each.
fn scores(task: Task) -> u128 {
    let workload = workload("tiny", task);
    let attention = closed_form(&workload).unwrap().sum(|_, c| c == Component::Attention).unwrap();
    let model = &workload.model;
    let of_one = 2 * model.q_width() * model.num_hidden_layers;
    assert!(attention.macs.is_multiple_of(of_one as u128));
    attention.macs / of_one as u128
}

#[test]
fn scores_by_hand() {
    // 3 tokens on 5, then one on 8 and one on 9.
    assert_eq!(scores(generate(5, 3, 3)), 3 * 8 + 9 + 10);
    let Task::Generate { sampling, .. } = generate(1, 1, 1) else { unreachable!() };
    let with = |then: Vec<Turn>, prefill_chunk| Task::Generate {
        batch: 1,
        past: 5,
        prompt_tokens: 3,
        prompts: None,
        new_tokens: 3,
        max_new_tokens: 3,
        then,
        prefill_chunk,
        kv_cache: true,
        sampling,
    };
    // 2 on 5, and then 1 on 7.
    assert_eq!(scores(with(vec![], Some(2))), 2 * 7 + 8 + 9 + 10);
    // The turn feeds the third token and two more on 10; the next chosen one on 13.
    let turn = Turn { prompt_tokens: 2, new_tokens: 2 };
    assert_eq!(scores(with(vec![turn], None)), 3 * 8 + 9 + 10 + 3 * 13 + 14);
    // In parts of two: two on 10, one on 12.
    assert_eq!(scores(with(vec![turn], Some(2))), 2 * 7 + 8 + 9 + 10 + 2 * 12 + 13 + 14);
    // Three rounds of 4 tokens, each moving on by 3.
    let verify = Task::Verify { batch: 1, past: 7, drafted: 3, accepted: 2, rounds: 3 };
    assert_eq!(scores(verify), 4 * 11 + 4 * 14 + 4 * 17);
    assert_eq!(scores(packed(&[3, 1, 4])), 9 + 1 + 16);
}

#[test]
fn padding_is_what_rows_lack_of_the_longest() {
    let mut fed = Filling::new(Layout::Padded);
    fed.add(&[5, 2], 1);
    fed.add(&[3, 3], 1);
    let task = Task::Evaluate { batch: 2, seq: 8, passes: 2, rows: fed.rows(8) };
    assert_eq!((task.tokens().fed, task.tokens().real), (2 * 5 + 2 * 3, 5 + 2 + 3 + 3));
    let workload = workload("tiny", task);
    let cost = |structure| count(structure, &workload).unwrap().sum(|_, _| true).unwrap();
    let (padded, real) = (cost(Structure::Exact), cost(Structure::Unpadded));
    // Three tokens, and 25 − 4 scores of each head.
    let model = &workload.model;
    let [layers, d, f, q, kv, v] = [
        model.num_hidden_layers,
        model.hidden_size,
        model.intermediate_size,
        model.q_width(),
        model.kv_width(),
        model.vocab_size,
    ];
    let of_token = layers * (2 * d * (q + kv) + 3 * d * f) + d * v;
    let macs = 3 * of_token + layers * 2 * (25 - 4) * q;
    assert_eq!(padded.macs - real.macs, macs as u128);
}

#[test]
fn what_contradicts_itself_is_refused() {
    let refused = |task: Task| workload("tiny", task).validate().unwrap_err().to_string();
    let Task::Generate { sampling, .. } = generate(1, 1, 1) else { unreachable!() };
    let without_cache = |past, prefill_chunk| Task::Generate {
        batch: 1,
        past,
        prompt_tokens: 3,
        prompts: None,
        new_tokens: 3,
        max_new_tokens: 3,
        then: vec![],
        prefill_chunk,
        kv_cache: false,
        sampling: Sampling { ..sampling },
    };
    assert!(refused(without_cache(1, None)).contains("--past: needs the KV cache"));
    assert!(refused(without_cache(0, Some(2))).contains("--prefill-chunk: needs the KV cache"));
    let verify =
        |drafted, accepted| Task::Verify { batch: 1, past: 0, drafted, accepted, rounds: 1 };
    assert!(refused(verify(2, 3)).contains("--accepted: 3 of 2 drafted tokens"));
    assert!(refused(verify(0, 0)).contains("--drafted: must be at least 1"));
    let documents: Lengths = [4, 9].into_iter().collect();
    let passes: Lengths = [13].into_iter().collect();
    let rows = |documents: &Lengths, passes: &Lengths| Rows::Packed {
        documents: documents.clone(),
        passes: passes.clone(),
    };
    let evaluate = |seq, rows| Task::Evaluate { batch: 2, seq, passes: 1, rows };
    assert!(workload("tiny", evaluate(9, rows(&documents, &passes))).validate().is_ok());
    assert!(refused(evaluate(8, rows(&documents, &passes))).contains("--lengths"));
    assert!(refused(evaluate(9, rows(&documents, &documents))).contains("--lengths"));
}

proptest! {
    #[test]
    fn sequences_of_one_length_cost_what_a_batch_costs(
        length in 1u64..40, batch in 1u64..6, all in any::<bool>(),
    ) {
        let logits = if all { Logits::All } else { Logits::Last };
        let seq = length * batch;
        let lengths: Lengths = [(length, batch)].to_vec().into();
        let together = Task::Forward { batch: 1, seq, past: 0, logits, sequences: Some(Ragged::Packed(lengths)) };
        let batch = Task::Forward { batch, seq: length, past: 0, logits, sequences: None };
        prop_assert_eq!(matmuls("tiny", together), matmuls("tiny", batch));
    }

    #[test]
    fn sequences_together_cost_what_they_cost_alone(lengths in vec(1u64..40, 1..6)) {
        let alone = |seq: &u64| matmuls(
            "tiny", Task::Forward { batch: 1, seq: *seq, past: 0, logits: Logits::All, sequences: None },
        );
        prop_assert_eq!(matmuls("tiny", packed(&lengths)), lengths.iter().map(alone).sum::<u128>());
    }

    #[test]
    fn padded_sequences_without_their_padding_cost_what_packed_ones_cost(
        lengths in vec(1u64..40, 1..6), new in 1u64..5, kv_cache in any::<bool>(),
        windowed in any::<bool>(),
    ) {
        let preset = if windowed { "tiny-gemma3" } else { "tiny" };
        let all: Lengths = lengths.iter().copied().collect();
        let (batch, longest) = (lengths.len() as u64, all.range().unwrap().1);
        let forward = |(batch, seq), sequences| {
            Task::Forward { batch, seq, past: 0, logits: Logits::All, sequences: Some(sequences) }
        };
        let generation = |prompts| {
            let mut task = generate(0, longest, new);
            if let Task::Generate { batch: of, prompts: at, kv_cache: cached, .. } = &mut task {
                (*of, *at, *cached) = (batch, Some(prompts), kv_cache);
            }
            task
        };
        let (padded, packed) = (Ragged::Padded(all.clone()), Ragged::Packed(all.clone()));
        let pairs = [
            (
                forward((batch, longest), padded.clone()),
                forward((1, lengths.iter().sum()), packed.clone()),
            ),
            (generation(padded), generation(packed)),
        ];
        for (padded, packed) in pairs {
            let tokens = padded.tokens();
            prop_assert_eq!(tokens.real, packed.tokens().fed);
            prop_assert!(tokens.fed >= tokens.real);
            let padded = workload(preset, padded);
            let unpadded = count(Structure::Unpadded, &padded).unwrap().sum(|_, _| true).unwrap();
            prop_assert_eq!(Prices::matmul().flops(&unpadded).unwrap(), matmuls(preset, packed));
            let (exact, unpadded) = (Structure::Exact, Structure::Unpadded);
            let end = |structure| End { structure, prices: Prices::unit() };
            prop_assert!(reconcile("tiny", &[padded], &end(exact), &end(unpadded)).is_ok());
        }
    }

    #[test]
    fn a_round_without_drafts_kept_is_a_forward_pass(past in 0u64..40, drafted in 1u64..9) {
        let verify = Task::Verify { batch: 1, past, drafted, accepted: 0, rounds: 1 };
        let (seq, logits) = (drafted + 1, Logits::All);
        let forward = Task::Forward { batch: 1, seq, past, logits, sequences: None };
        prop_assert_eq!(matmuls("tiny", verify), matmuls("tiny", forward));
    }
}

/// Small numbers, powers of two, and any up to the largest.
fn sizes() -> impl Strategy<Value = u64> + Clone {
    let bits = (0u32..65, any::<u64>());
    prop_oneof![
        3 => bits.prop_map(|(bits, any)| any.checked_shr(64 - bits).unwrap_or(0)),
        2 => (0u32..64).prop_map(|bits| 1 << bits),
        1 => Just(u64::MAX),
    ]
}

/// Mostly few of each length, so that their sums come near what is refused.
fn lengths() -> impl Strategy<Value = Lengths> + Clone {
    vec((sizes(), sizes()), 0..4).prop_map(Lengths::from)
}

/// Tasks of any dimensions, few of which can be counted.
fn any_tasks() -> impl Strategy<Value = Task> {
    let rows = prop_oneof![
        6 => Just(Rows::Whole),
        1 => (lengths(), lengths()).prop_map(|(widths, lengths)| Rows::Padded { widths, lengths }),
        1 => (lengths(), lengths())
            .prop_map(|(passes, documents)| Rows::Packed { passes, documents }),
    ];
    let ragged =
        prop_oneof![lengths().prop_map(Ragged::Padded), lengths().prop_map(Ragged::Packed),];
    let of = proptest::option::weighted(0.1, ragged);
    let turn = (sizes(), sizes())
        .prop_map(|(prompt_tokens, new_tokens)| Turn { prompt_tokens, new_tokens });
    let all = proptest::array::uniform5(sizes());
    prop_oneof![
        (all.clone(), 0usize..3, of.clone()).prop_map(
            |([batch, seq, past, ..], logits, sequences)| {
                let logits = [Logits::All, Logits::Last, Logits::None][logits];
                Task::Forward { batch, seq, past, logits, sequences }
            }
        ),
        (all.clone(), any::<bool>(), proptest::option::of(sizes()), vec(turn, 0..3), of).prop_map(
            |(
                [batch, past, prompt_tokens, new_tokens, max_new_tokens],
                kv_cache,
                chunk,
                then,
                prompts,
            )| {
                let sampling = Sampling::GREEDY;
                let (past, prefill_chunk) = if kv_cache { (past, chunk) } else { (0, None) };
                Task::Generate {
                    batch,
                    past,
                    prompt_tokens,
                    prompts,
                    new_tokens,
                    max_new_tokens,
                    then,
                    prefill_chunk,
                    kv_cache,
                    sampling,
                }
            }
        ),
        all.clone().prop_map(|[batch, past, drafted, accepted, rounds]| Task::Verify {
            batch,
            past,
            drafted,
            accepted,
            rounds
        }),
        (all.clone(), any::<[bool; 3]>(), rows.clone()).prop_map(
            |([batch, seq, accumulate, steps, _], [full, recompute, clip], rows)| Task::Train {
                batch,
                seq,
                accumulate,
                steps,
                full,
                recompute,
                clip,
                moments: Default::default(),
                rows
            }
        ),
        (all, rows).prop_map(|([batch, seq, passes, ..], rows)| Task::Evaluate {
            batch,
            seq,
            passes,
            rows
        }),
    ]
}

/// The largest model that is one, with windows.
fn largest_model() -> ModelConfig {
    let layers = 1 << 10;
    ModelConfig {
        hidden_size: 1 << 24,
        intermediate_size: 1 << 24,
        num_hidden_layers: layers,
        num_attention_heads: 1 << 10,
        num_key_value_heads: 1 << 10,
        vocab_size: 1 << 24,
        window: Some(Window { width: 1 << 24, layers: (0..layers).map(|i| i % 2 == 0).collect() }),
        ..ModelConfig::preset("tiny").unwrap()
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    #[test]
    fn no_structure_panics_whatever_the_dimensions(task in any_tasks(), which in 0usize..3) {
        let model = match which {
            0 => ModelConfig::preset("tiny-gemma3").unwrap(),
            1 => ModelConfig::preset("qwen2.5-72b").unwrap(),
            _ => largest_model(),
        };
        let lora = LoraConfig::new(&model, 4, 8.0, &[Projection::QProj]).unwrap();
        let workload = Workload { model, lora, dtype: Dtype::F32, attention: Default::default(), task };
        for structure in Structure::ALL {
            // Counted, or refused.
            let _ = count(structure, &workload);
            let _ = terms(structure, &workload);
        }
        if workload.validate().is_ok() {
            let _ = (workload.task.tokens(), workload.bytes(), workload.context());
            for eval_every in [1, u64::MAX] {
                let checks = Checks { eval_rows: 3, eval_every, gradients: 7 };
                for (beside, _) in checks.of(&workload) {
                    let _ = count(Structure::Exact, &beside);
                }
            }
        }
    }
}

#[test]
fn too_many_passes_are_refused_by_flag() {
    let refused = |task: Task| workload("tiny", task).validate().unwrap_err().to_string();
    let rows = Rows::Whole;
    let (full, recompute, clip) = (true, false, false);
    let train = |accumulate, steps| Task::Train {
        batch: 1,
        seq: 1,
        accumulate,
        steps,
        full,
        recompute,
        clip,
        moments: Default::default(),
        rows: Rows::Whole,
    };
    assert!(refused(train(2, u64::MAX)).contains("--steps: --steps × --accumulate is above"));
    assert!(workload("tiny", train(1 << 24, 1 << 24)).validate().is_ok());
    let evaluate = Task::Evaluate { batch: 1, seq: 1, passes: u64::MAX, rows };
    assert!(refused(evaluate).contains("--passes: their number is above"));
    let checks = |eval_rows, gradients| Checks { eval_rows, eval_every: 1, gradients };
    let refused = |checks: Checks| checks.validate(2).unwrap_err().to_string();
    assert!(refused(checks(u64::MAX, 0)).contains("--eval-rows: above"));
    assert!(refused(checks(0, u64::MAX)).contains("--check-gradients: above"));
    assert_eq!(checks(3, 0).evaluations(u64::MAX), u64::MAX);
}
