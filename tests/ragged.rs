//! Sequences of different lengths, prefixes and turns: what runs is what was counted, to the last
//! FLOP, and computes what each sequence computes by itself.

#[path = "../count/tests/random/mod.rs"]
mod random;

use std::cell::RefCell;

use candle_core::Device;
use flopaudit::{
    audit::Audit,
    config::{LoraConfig, ModelConfig, Projection},
    generate::{Next, Request, Sequence, generate},
    ledger::{Dtype, Ledger, Module, Phase},
    meter::Meter,
    model::{AdapterSource, Context, Decoder, How, Trained},
    ops::{Ids, Sampler},
    train::{Hyper, Trainer, data::Batch},
    weights,
    workload::{Filling, Layout, Lengths, Logits, Ragged, Rows, Sampling, Task, Workload},
};
use proptest::{collection::vec, prelude::*};
use random::{SMALL, adapted, samplings};

fn load(model: &ModelConfig, lora: &LoraConfig, dtype: Dtype) -> Decoder {
    let weights = weights::synthetic(model.clone(), 5).unwrap().weights;
    let adapters = AdapterSource::Fresh { lora: lora.clone(), seed: 1 };
    Decoder::load(model, &weights, &adapters, dtype, &Device::Cpu, |_| Ok(())).unwrap()
}

fn assert_balanced(workload: &Workload, ledger: &Ledger) {
    let audit = Audit::new(std::slice::from_ref(workload), ledger).unwrap();
    let (keys, sums) = (&audit.key_differences, &audit.sum_differences);
    assert!(audit.balanced(), "{:?}\n{keys:#?}\n{sums:#?}", workload.task);
}

fn tokens(n: usize, salt: usize, vocab: usize) -> Vec<u32> {
    (0..n).map(|i| ((i * i + 3 * i + 7 * salt) % vocab) as u32).collect()
}

fn request(prompts: Vec<Vec<u32>>, new: usize) -> Request {
    Request {
        seeds: (7..).take(prompts.len()).collect(),
        prompts,
        max_new_tokens: new,
        sampling: Sampling::GREEDY,
        kv_cache: true,
        eos: vec![],
        timed: false,
        how: How::RECORDED,
        past: 0,
        prefill_chunk: None,
        then: vec![],
    }
}

/// Generates; the run must balance.
fn audited(model: &Decoder, request: &Request) -> Vec<Sequence> {
    let ledger = RefCell::new(Ledger::default());
    let out = generate(model, request, &ledger, |_, _| Ok(())).unwrap();
    assert_balanced(&out.workload, &ledger.into_inner());
    out.sequences
}

const FAMILIES: [&str; 5] = ["tiny", "tiny-llama", "tiny-mistral", "tiny-qwen3", "tiny-gemma3"];

#[test]
fn a_batch_of_unequal_prompts_generates_what_each_generates_alone() {
    for preset in FAMILIES {
        let config = ModelConfig::preset(preset).unwrap();
        let model = load(&config, &LoraConfig::none(), Dtype::F32);
        let lengths = [5, 1, 11, 5, 3];
        let prompts: Vec<_> = (0..5).map(|i| tokens(lengths[i], i, config.vocab_size)).collect();
        for kv_cache in [true, false] {
            let with = |request: Request| Request { kv_cache, ..request };
            let together = audited(&model, &with(request(prompts.clone(), 9)));
            for (prompt, sequence) in prompts.iter().zip(&together) {
                let alone = audited(&model, &with(request(vec![prompt.clone()], 9)));
                assert_eq!(alone[0], *sequence, "{preset}, cache {kv_cache}");
            }
        }
    }
}

#[test]
fn a_prompt_in_parts_and_a_conversation_in_turns_are_one_long_context() {
    for preset in FAMILIES {
        let config = ModelConfig::preset(preset).unwrap();
        let model = load(&config, &LoraConfig::none(), Dtype::F32);
        let prompts: Vec<_> = (0..2).map(|i| tokens(13, i, config.vocab_size)).collect();
        let whole = audited(&model, &request(prompts.clone(), 6));
        for chunk in [1, 4, 13, 50] {
            let parts = Request { prefill_chunk: Some(chunk), ..request(prompts.clone(), 6) };
            assert_eq!(audited(&model, &parts), whole, "{preset} in parts of {chunk}");
        }
        let more: Vec<_> = (0..2).map(|i| tokens(4, 9 + i, config.vocab_size)).collect();
        let next = Next { prompts: more.clone(), new_tokens: 5 };
        let turns = Request { then: vec![next], ..request(prompts.clone(), 6) };
        let turns = audited(&model, &turns);
        // The second turn's answer is that to everything before it at once.
        let context = |i: usize| [&prompts[i][..], &whole[i].tokens, &more[i]].concat();
        let again = audited(&model, &request((0..2).map(context).collect(), 5));
        for i in 0..2 {
            assert_eq!(turns[i].tokens[..6], whole[i].tokens, "{preset}");
            assert_eq!(turns[i].tokens[6..], again[i].tokens, "{preset}");
        }
    }
}

#[test]
fn packed_sequences_have_the_logits_of_each_alone() {
    for preset in FAMILIES {
        let config = ModelConfig::preset(preset).unwrap();
        let model = load(&config, &LoraConfig::none(), Dtype::F32);
        let ledger = RefCell::new(Ledger::default());
        let meter = Meter::new(&ledger, Phase::Setup);
        let lengths = [12, 1, 9, 12];
        let positions = model.positions(meter, 12).unwrap();
        let texts: Vec<_> = (0..4).map(|i| tokens(lengths[i], i, config.vocab_size)).collect();
        let packed = texts.concat();
        let forward = meter.phase(Phase::Forward);
        for (logits, rows) in [(Logits::All, packed.len()), (Logits::Last, 4)] {
            let ids = Ids::Host { ids: &packed, batch: 1 };
            let context = Context::Packed(&positions, &lengths);
            let out = model.forward(forward, ids, context, logits).unwrap();
            assert_eq!(out.dims(), [1, rows, config.vocab_size]);
            let out = out.share().to_vec().unwrap();
            let mut expected = vec![];
            for text in &texts {
                let ids = Ids::Host { ids: text, batch: 1 };
                let alone = model.forward(forward, ids, Context::Whole(&positions), logits);
                expected.extend(alone.unwrap().share().to_vec().unwrap());
            }
            let apart = out.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(apart < 1e-4, "{preset}: {apart}");
        }
    }
}

/// Rows with weights that sum to 1.
fn rows(lengths: &[usize], vocab: usize) -> Vec<Batch> {
    let all: usize = lengths.iter().sum();
    let row = |(i, &length): (usize, &usize)| Batch {
        ids: tokens(length, i, vocab),
        targets: tokens(length, i + 50, vocab),
        weights: (0..length).map(|j| ((j + i) % 3) as f32 / all as f32).collect(),
        rows: 1,
        seq: length,
        sequences: None,
    };
    lengths.iter().enumerate().map(row).collect()
}

fn packed(rows: &[Batch]) -> Batch {
    let all = |of: fn(&Batch) -> &Vec<u32>| rows.iter().flat_map(of).copied().collect::<Vec<_>>();
    let ids = all(|row| &row.ids);
    Batch {
        rows: 1,
        seq: ids.len(),
        targets: all(|row| &row.targets),
        weights: rows.iter().flat_map(|row| row.weights.clone()).collect(),
        sequences: Some(rows.iter().map(|row| row.seq).collect()),
        ids,
    }
}

#[test]
fn packing_changes_neither_the_loss_nor_a_gradient() {
    for preset in FAMILIES {
        let config = ModelConfig::preset(preset).unwrap();
        let rows = rows(&[7, 1, 12, 7, 30], config.vocab_size);
        let packed = packed(&rows);
        for (trained, recompute) in
            [(Trained::All, false), (Trained::All, true), (Trained::Adapters, false)]
        {
            let targets = [Projection::QProj, Projection::VProj, Projection::DownProj];
            let lora = LoraConfig::new(&config, 2, 8.0, &targets).unwrap();
            let mut model = load(&config, &lora, Dtype::F32);
            model.train(trained);
            let ledger = RefCell::new(Ledger::default());
            let meter = Meter::new(&ledger, Phase::Setup);
            let positions = model.positions(meter, 30).unwrap();
            let mut of = |texts: Vec<&Batch>| {
                let (mut loss, mut sum) = (0.0, flopaudit::ops::Gradients::default());
                for text in texts {
                    let text = text.labelled();
                    let (part, gradients) =
                        model.loss_and_gradients(meter, text, &positions, recompute).unwrap();
                    loss += part;
                    sum.merge(meter, gradients).unwrap();
                }
                let named: Vec<(String, Vec<f32>)> = model
                    .trained()
                    .into_iter()
                    .map(|(name, _, tensor)| {
                        (name, sum.values(tensor).unwrap().unwrap_or_default())
                    })
                    .collect();
                (loss, named)
            };
            let (expected, apart) = of(rows.iter().collect());
            let (loss, together) = of(vec![&packed]);
            assert!((loss - expected).abs() < 1e-5 * expected, "{preset}: {loss} for {expected}");
            for ((name, a), (_, b)) in apart.iter().zip(&together) {
                assert_eq!(a.len(), b.len(), "{name}");
                let most = a.iter().fold(1e-6f32, |most, x| most.max(x.abs()));
                let off = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(off < 1e-3 * most, "{preset} {name}: {off} of {most}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn packed_passes_balance(
        (model, lora) in adapted(SMALL, 3), lengths in vec(1usize..9, 1..6), which in 0usize..3,
    ) {
        let logits = [Logits::All, Logits::Last, Logits::None][which];
        let decoder = load(&model, &lora, Dtype::F32);
        let ledger = RefCell::new(Ledger::default());
        let meter = Meter::new(&ledger, Phase::Setup);
        let positions = decoder.positions(meter, lengths.iter().copied().max().unwrap()).unwrap();
        let ids = tokens(lengths.iter().sum(), 1, model.vocab_size);
        let (forward, context) = (meter.phase(Phase::Forward), Context::Packed(&positions, &lengths));
        let fed = Ids::Host { ids: &ids, batch: 1 };
        match logits {
            Logits::None => decoder.feed(forward, fed, context).unwrap(),
            _ => drop(decoder.forward(forward, fed, context, logits).unwrap()),
        }
        let sequences = Some(Ragged::Packed(lengths.iter().map(|n| *n as u64).collect::<Lengths>()));
        let task = Task::Forward { batch: 1, seq: ids.len() as u64, past: 0, logits, sequences };
        assert_balanced(&Workload { model, lora, dtype: Dtype::F32, attention: Default::default(), task }, &ledger.into_inner());
    }

    #[test]
    fn ragged_generations_balance(
        (model, lora) in adapted(SMALL, 3), prompts in vec(1usize..8, 1..5), new in 1usize..6,
        kv_cache in any::<bool>(), sampling in samplings(), eos in any::<bool>(),
    ) {
        let decoder = load(&model, &lora, Dtype::F32);
        let prompts = prompts.iter().enumerate().map(|(i, n)| tokens(*n, i, model.vocab_size));
        let eos = if eos { vec![0, 1] } else { vec![] };
        audited(&decoder, &Request { kv_cache, sampling, eos, ..request(prompts.collect(), new) });
    }

    #[test]
    fn prefixes_parts_and_turns_balance(
        (model, lora) in adapted(SMALL, 3), batch in 1usize..3, prompt in 1usize..12, new in 1usize..5,
        past in 0usize..9, chunk in prop::option::of(1usize..6),
        turns in vec((1usize..6, 1usize..4), 0..3),
    ) {
        let decoder = load(&model, &lora, Dtype::F32);
        let of = |length: usize, salt: usize| -> Vec<Vec<u32>> {
            (0..batch).map(|i| tokens(length, i + salt, model.vocab_size)).collect()
        };
        let next = |(prompt, new): &(usize, usize)| Next { prompts: of(*prompt, 20), new_tokens: *new };
        let then = turns.iter().map(next).collect();
        audited(&decoder, &Request { past, prefill_chunk: chunk, then, ..request(of(prompt, 0), new) });
    }

    #[test]
    fn verification_balances(
        (model, lora) in adapted(SMALL, 3), batch in 1u64..3, past in 0u64..9, drafted in 1u64..5,
        accepted in 0u64..5, rounds in 1u64..4,
    ) {
        let accepted = accepted.min(drafted);
        let decoder = load(&model, &lora, Dtype::F32);
        let ledger = RefCell::new(Ledger::default());
        let meter = Meter::new(&ledger, Phase::Setup);
        let room = past + (rounds - 1) * (accepted + 1) + drafted + 1;
        let mut cache = decoder.cache(meter, batch as usize, room as usize).unwrap();
        let mut sampler = Sampler::new(Sampling::GREEDY, &[]);
        for round in 0..rounds {
            cache.set_held((past + round * (accepted + 1)) as usize).unwrap();
            let ids = tokens((batch * (drafted + 1)) as usize, 3, model.vocab_size);
            let rows: Vec<Vec<u32>> = ids.iter().map(|id| vec![*id]).collect();
            let ids = Ids::Host { ids: &ids, batch: batch as usize };
            let context = Context::Cached(&mut cache);
            let logits = decoder.forward(meter.phase(Phase::Decode), ids, context, Logits::All);
            let at = meter.phase(Phase::Sampling).at(Module::Sampler);
            sampler.next(at, &logits.unwrap().share(), &rows).unwrap();
        }
        let task = Task::Verify { batch, past, drafted, accepted, rounds };
        assert_balanced(&Workload { model, lora, dtype: Dtype::F32, attention: Default::default(), task }, &ledger.into_inner());
    }

    #[test]
    fn packed_and_padded_trainings_balance(
        (model, lora) in adapted(SMALL, 3),
        passes in prop_oneof![
            14 => vec(vec(prop_oneof![4 => 1usize..9, 1 => 40usize..120], 1..4), 1..4),
            // More rows than one chunk of the loss takes.
            1 => vec(vec(345usize..370, 3), 1..3),
        ],
        [full, recompute, clip, bf16, packs] in any::<[bool; 5]>(),
    ) {
        let full = full || lora.rank == 0;
        let dtype = if bf16 { Dtype::BF16 } else { Dtype::F32 };
        // Padded passes are all of as many rows.
        let batch = if packs { 4 } else { passes[0].len() };
        let passes: Vec<Vec<usize>> = passes
            .into_iter()
            .map(|rows| if packs { rows } else { rows.into_iter().cycle().take(batch).collect() })
            .collect();
        let seq = passes.iter().flatten().copied().max().unwrap();
        let mut fed = Filling::new(if packs { Layout::Packed } else { Layout::Padded });
        let mut batches = vec![];
        for lengths in &passes {
            fed.add(&lengths.iter().map(|n| *n as u64).collect::<Vec<_>>(), 1);
            let width = *lengths.iter().max().unwrap();
            batches.push(match packs {
                true => packed(&rows(lengths, model.vocab_size)),
                false => Batch {
                    rows: batch,
                    sequences: None,
                    ..packed(&rows(&vec![width; batch], model.vocab_size))
                },
            });
        }
        let ledger = RefCell::new(Ledger::default());
        let meter = Meter::new(&ledger, Phase::Setup);
        let trained = if full { Trained::All } else { Trained::Adapters };
        let hyper = Hyper { clip: clip.then_some(0.1), ..Hyper::DEFAULT };
        let decoder = load(&model, &lora, dtype);
        let mut trainer = Trainer::new(meter, decoder, trained, hyper, seq, recompute).unwrap();
        let texts: Vec<_> = batches.iter().map(Batch::labelled).collect();
        let found = trainer.gradients(meter, &texts).unwrap();
        trainer.update(meter, found, 0.01).unwrap();
        let rows = fed.rows(seq as u64);
        let is_packed = matches!(rows, Rows::Packed { .. });
        prop_assert_eq!(packs, is_packed);
        let task = Task::Train {
            batch: batch as u64,
            seq: seq as u64,
            accumulate: passes.len() as u64,
            steps: 1,
            full,
            recompute,
            clip,
            moments: Default::default(),
            rows,
        };
        assert_balanced(&Workload { model, lora, dtype, attention: Default::default(), task }, &ledger.into_inner());
    }
}
