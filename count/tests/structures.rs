//! The notebook's figures and PyTorch's, digit for digit.

use flopaudit_count::{
    analytic::{Structure, count, notebook, terms},
    config::{LoraConfig, ModelConfig, Projection},
    ledger::Dtype,
    prices::Prices,
    tally::Component,
    workload::{Logits, Rows, Sampling, Task, Workload},
};

fn workload(rank: usize, task: Task) -> Workload {
    let model = ModelConfig::preset("qwen2.5-0.5b").unwrap();
    let targets = [Projection::QProj, Projection::VProj];
    let lora = LoraConfig::new(&model, rank, 16.0, &targets).unwrap();
    Workload { model, lora, dtype: Dtype::F32, attention: Default::default(), task }
}

/// Total, and what adapters take of it.
fn priced(structure: Structure, workload: &Workload, prices: &Prices) -> (u128, u128) {
    let tally = count(structure, workload).unwrap();
    let sum = |keep: fn(Component) -> bool| {
        prices.flops(&tally.sum(|_, component| keep(component)).unwrap()).unwrap()
    };
    (sum(|_| true), sum(|component| matches!(component, Component::Lora(_))))
}

fn notebook_total(rank: usize, task: Task) -> (u128, u128) {
    priced(Structure::Notebook, &workload(rank, task), &Prices::coursework())
}

fn generate(prompt_tokens: u64, new_tokens: u64, temperature: f64) -> Task {
    Task::Generate {
        batch: 1,
        prompt_tokens,
        new_tokens,
        max_new_tokens: new_tokens,
        kv_cache: true,
        sampling: Sampling { temperature, ..Sampling::GREEDY },
        past: 0,
        prompts: None,
        then: vec![],
        prefill_chunk: None,
    }
}

fn train(steps: u64) -> Task {
    Task::Train {
        batch: 4,
        seq: 512,
        accumulate: 1,
        steps,
        full: false,
        recompute: false,
        clip: true,
        moments: Default::default(),
        rows: Rows::Whole,
    }
}

#[test]
fn the_notebooks_totals() {
    assert_eq!(notebook_total(0, generate(900, 294, 0.0)), (377_605_673_710_902, 0));
    assert_eq!(notebook_total(0, generate(512, 512, 0.0)), (473_172_281_951_744, 0));
    let adapted = notebook_total(5, generate(512, 512, 0.0));
    assert_eq!(adapted, (473_527_096_538_624, 354_814_586_880));
    assert_eq!(notebook_total(0, generate(512, 512, 1.0)), (473_173_215_446_016, 0));
    let evaluate = Task::Evaluate { batch: 100, seq: 512, passes: 1, rows: Rows::Whole };
    assert_eq!(notebook_total(0, evaluate), (60_341_912_907_200, 0));

    let printed = |(total, lora): (u128, u128)| format!("{:.4e} {:.4e}", total as f64, lora as f64);
    assert_eq!(printed(notebook_total(4, train(1))), "7.2455e12 4.4909e9");
    assert_eq!(printed(notebook_total(4, train(13_800))), "9.9988e16 6.1975e13");
    // The notebook stops at 13 800 steps; its budget of 1e17 would take one more.
    let budget = 10u128.pow(17);
    assert!(notebook_total(4, train(13_801)).0 <= budget);
    assert!(notebook_total(4, train(13_802)).0 > budget);
}

/// As C's %.3g prints it, which the notebook does.
fn three_digits(n: u128) -> String {
    if n < 1000 {
        return n.to_string();
    }
    let text = format!("{:.2e}", n as f64);
    let (mantissa, exponent) = text.split_once('e').unwrap();
    format!("{}e+{exponent:0>2}", mantissa.trim_end_matches('0').trim_end_matches('.'))
}

#[test]
fn the_notebooks_table() {
    let forward =
        Task::Forward { batch: 1, seq: 512, past: 0, logits: Logits::All, sequences: None };
    let table = |rank| {
        let rows = notebook::table(&workload(rank, forward.clone()), &Prices::coursework());
        rows.unwrap()
            .unwrap()
            .into_iter()
            .map(|row| {
                let cells: Vec<_> =
                    row.flops.into_iter().chain([row.total]).map(three_digits).collect();
                format!("{} | {}", row.name, cells.join(" | "))
            })
            .collect::<Vec<_>>()
    };
    let block = [
        "Single Attention Block | 2.93e+09 | 2.94e+09 | 7.34e+06 | 3.67e+07 | 10 | 5.91e+09",
        "Single MLP Block | 6.69e+09 | 6.7e+09 | 2.49e+06 | 2.49e+07 | 0 | 1.34e+10",
        "RMS, Residual etc | 1.83e+06 | 1.84e+06 | 9.19e+05 | 0 | 1.02e+04 | 4.6e+06",
    ];
    let full = "Full Forward Pass | 3.01e+11 | 3.01e+11 | 2.58e+08 | 1.48e+09";
    for (rank, layer, lora) in [
        (0, "9.63e+09 | 9.63e+09 | 1.07e+07 | 6.16e+07 | 1.02e+04 | 1.93e+10", None),
        (
            1,
            "9.63e+09 | 9.64e+09 | 1.07e+07 | 6.16e+07 | 1.02e+04 | 1.93e+10",
            Some("1.83e+06 | 2.75e+06 | 0 | 0 | 0 | 4.59e+06"),
        ),
        (
            4,
            "9.63e+09 | 9.64e+09 | 1.07e+07 | 6.16e+07 | 1.02e+04 | 1.93e+10",
            Some("7.34e+06 | 8.26e+06 | 0 | 0 | 0 | 1.56e+07"),
        ),
    ] {
        let rows = table(rank);
        assert_eq!(rows[..3], block);
        assert_eq!(rows[3], format!("Single Transformer Layer (r={rank}) | {layer}"));
        if let Some(lora) = lora {
            assert_eq!(rows[4], format!("LoRA cost in this Layer, r={rank} | {lora}"));
        }
        assert_eq!(rows.len(), 5 + usize::from(lora.is_some()));
        assert!(rows[rows.len() - 1].starts_with(full), "{rows:?}");
    }
}

#[test]
fn torchs_totals() {
    let golden: serde_json::Value =
        serde_json::from_str(include_str!("../../tests/golden/torch_flops.json")).unwrap();
    let forward =
        |batch, seq, past, logits| Task::Forward { batch, seq, past, logits, sequences: None };
    let (train, full) = (
        |full| Task::Train {
            batch: 2,
            seq: 64,
            accumulate: 1,
            steps: 1,
            full,
            recompute: false,
            clip: true,
            moments: Default::default(),
            rows: Rows::Whole,
        },
        forward(2, 64, 0, Logits::All),
    );
    let cases = [
        ("fwd_B1_T512", 0, forward(1, 512, 0, Logits::All)),
        ("fwd_B1_T512_last_logits_only", 0, forward(1, 512, 0, Logits::Last)),
        ("fwd_B3_T37", 0, forward(3, 37, 0, Logits::All)),
        ("decode_1tok_cache100", 0, forward(1, 1, 100, Logits::All)),
        ("full_ft_fwd_B2_T64", 0, full.clone()),
        ("full_ft_fwd_bwd_B2_T64", 0, train(true)),
        ("lora_r8_fwd_B2_T64", 8, full),
        ("lora_r8_fwd_bwd_B2_T64", 8, train(false)),
    ];
    assert_eq!(golden["cases"].as_object().unwrap().len(), cases.len());
    for (name, rank, task) in cases {
        let total = u128::from(golden["cases"][name]["total"].as_u64().unwrap());
        let workload = workload(rank, task);
        let task = &workload.task;
        for prices in [Prices::matmul(), Prices::unit(), Prices::coursework()] {
            assert_eq!(priced(Structure::Torch, &workload, &prices).0, total, "{name}");
        }
        if let Task::Forward { .. } = task {
            let exact = priced(Structure::Exact, &workload, &Prices::matmul());
            assert_eq!(exact.0, total, "{name}");
        }
    }
}

/// tiny: D 32, F 48, L 3, H 4, K 2, d 8, V 320; 2 sequences of 3 tokens.
fn tiny(tied: bool, lora: bool, task: Task) -> Workload {
    let model = ModelConfig { tie_word_embeddings: tied, ..ModelConfig::preset("tiny").unwrap() };
    let targets = [Projection::QProj, Projection::DownProj];
    let lora = LoraConfig::new(&model, usize::from(lora) * 2, 4.0, &targets).unwrap();
    Workload { model, lora, dtype: Dtype::F32, attention: Default::default(), task }
}

#[test]
fn formulas_by_hand() {
    let pass =
        |past| Task::Forward { batch: 2, seq: 3, past, logits: Logits::Last, sequences: None };
    let flops = |structure, tied, lora, task| {
        priced(structure, &tiny(tied, lora, task), &Prices::matmul()).0
    };
    use Structure::{HfTrainer, Megatron, MegatronCausal, Palm, SixNd, SixNdNoEmbedding};
    // A layer: 2·32·32 (q, o) + 2·32·16 (k, v) + 3·32·48 matrices, 32 + 2·16 biases, 2·32 gains;
    // 32 gains at the end.
    let (matrices, vectors, table) = (3 * 7_680, 3 * 128 + 32, 320 * 32);
    let layers = matrices + vectors;
    for (structure, tied, n) in [
        (SixNd, true, layers + table),
        (SixNd, false, layers + 2 * table),
        (SixNdNoEmbedding, true, layers),
        (SixNdNoEmbedding, false, layers),
        (HfTrainer, true, layers),
        (HfTrainer, false, layers + table),
    ] {
        // 2N for each of 6 tokens, whatever is cached or adapted, except that Trainer counts
        // adapters: rank 2, 3 layers, 32 + 32 on q and 48 + 32 on down.
        for past in [0, 7] {
            assert_eq!(flops(structure, tied, false, pass(past)), 2 * 6 * n, "{structure}");
        }
        let adapters = if structure == HfTrainer { 3 * 2 * (64 + 80) } else { 0 };
        assert_eq!(flops(structure, tied, true, pass(0)), 2 * 6 * (n + adapters), "{structure}");
        let task = Task::Train {
            batch: 2,
            seq: 3,
            accumulate: 5,
            steps: 7,
            full: true,
            recompute: false,
            clip: true,
            moments: Default::default(),
            rows: Rows::Whole,
        };
        assert_eq!(flops(structure, tied, false, task), 6 * 6 * 35 * n, "{structure}");
    }
    // 12·L·H·Q·T a token in training, 4·L·H·Q·T forward: 6 tokens of 3 + past.
    let scores = |held: u128| 2 * 2 * 3 * 32 * 6 * held;
    assert_eq!(flops(Palm, true, true, pass(0)), 2 * 6 * (layers + table) + scores(3));
    assert_eq!(flops(Palm, true, true, pass(7)), 2 * 6 * (layers + table) + scores(10));
    let train = Task::Train {
        batch: 2,
        seq: 3,
        accumulate: 1,
        steps: 1,
        full: true,
        recompute: false,
        clip: true,
        moments: Default::default(),
        rows: Rows::Whole,
    };
    assert_eq!(flops(Palm, true, true, train), 3 * (2 * 6 * (layers + table) + scores(3)));
    // Matrices and head at every position, whichever logits are asked for; half of 3 × 3 scores.
    let products = 2 * 6 * (matrices + table);
    assert_eq!(flops(Megatron, true, true, pass(7)), products + scores(10));
    assert_eq!(flops(MegatronCausal, true, true, pass(0)), products + scores(3) / 2);
    assert_eq!(flops(MegatronCausal, true, true, pass(7)), products + scores(7) + scores(3) / 2);
    // A cached generation feeds 4 + 2 tokens; the last of 3 is chosen, not fed.
    let Task::Generate { sampling, .. } = generate(1, 1, 0.0) else { unreachable!() };
    let (batch, prompt_tokens, new_tokens, max_new_tokens) = (1, 4, 3, 3);
    for (kv_cache, fed) in [(true, 6), (false, 4 + 5 + 6)] {
        let task = Task::Generate {
            batch,
            prompt_tokens,
            new_tokens,
            max_new_tokens,
            kv_cache,
            sampling,
            past: 0,
            prompts: None,
            then: vec![],
            prefill_chunk: None,
        };
        assert_eq!(flops(SixNd, true, false, task), 2 * (layers + table) * fed);
    }
}

#[test]
fn torchs_attention_is_its_bmm() {
    let golden: serde_json::Value =
        serde_json::from_str(include_str!("../../tests/golden/torch_flops.json")).unwrap();
    let bmm = golden["cases"]["lora_r8_fwd_bwd_B2_T64"]["by_op"]["aten.bmm"].as_u64().unwrap();
    let task = Task::Train {
        batch: 2,
        seq: 64,
        accumulate: 1,
        steps: 1,
        full: false,
        recompute: false,
        clip: true,
        moments: Default::default(),
        rows: Rows::Whole,
    };
    let tally = count(Structure::Torch, &workload(8, task)).unwrap();
    let attention = tally.sum(|_, component| component == Component::Attention).unwrap();
    assert_eq!(2 * attention.macs, bmm.into());
}

#[test]
fn every_size_counts_to_a_million_tokens() {
    for name in ModelConfig::preset_names() {
        let model = ModelConfig::preset(name).unwrap();
        let lora = LoraConfig::new(&model, 8, 16.0, &Projection::ALL).unwrap();
        for structure in Structure::ALL {
            for kv_cache in [true, false] {
                let new_tokens = 1_000_000;
                let task = Task::Generate {
                    batch: 8,
                    prompt_tokens: 1_000_000,
                    new_tokens,
                    max_new_tokens: new_tokens,
                    kv_cache,
                    sampling: Sampling::GREEDY,
                    past: 0,
                    prompts: None,
                    then: vec![],
                    prefill_chunk: None,
                };
                if structure.covers(&task).is_err() {
                    continue;
                }
                let (model, lora) = (model.clone(), lora.clone());
                let workload = Workload {
                    model,
                    lora,
                    dtype: Dtype::BF16,
                    attention: Default::default(),
                    task,
                };
                let total = priced(structure, &workload, &Prices::coursework()).0;
                // At least 2 FLOPs for each of 8 · 2e6 tokens and each matrix of a layer.
                let layer = 3 * workload.model.hidden_size * workload.model.intermediate_size;
                assert!(total > 2 * 16_000_000 * layer as u128 * 9 / 10, "{name} {structure}");
            }
        }
    }
}

#[test]
fn sums_past_128_bits_are_refused() {
    let model = ModelConfig {
        hidden_size: 1 << 24,
        intermediate_size: 1 << 24,
        num_hidden_layers: 1 << 16,
        num_attention_heads: 1 << 10,
        num_key_value_heads: 1 << 10,
        vocab_size: 1 << 24,
        ..ModelConfig::preset("tiny").unwrap()
    };
    model.validate("").unwrap();
    let new_tokens = 1 << 35;
    let generate = Task::Generate {
        batch: 1,
        prompt_tokens: 1,
        new_tokens,
        max_new_tokens: new_tokens,
        kv_cache: false,
        sampling: Sampling::GREEDY,
        past: 0,
        prompts: None,
        then: vec![],
        prefill_chunk: None,
    };
    let (batch, seq, steps) = (1, 1 << 36, 1 << 28);
    let train = Task::Train {
        batch,
        seq,
        accumulate: 1 << 20,
        steps,
        full: true,
        recompute: false,
        clip: true,
        moments: Default::default(),
        rows: Rows::Whole,
    };
    for task in [generate, train] {
        let lora = LoraConfig::none();
        let workload = Workload {
            model: model.clone(),
            lora,
            dtype: Dtype::F32,
            attention: Default::default(),
            task,
        };
        for structure in Structure::ALL.into_iter().filter(|s| s.covers(&workload.task).is_ok()) {
            let refused = |error: anyhow::Error| {
                let error = error.to_string();
                assert!(error.contains("128 bits") || structure == Structure::Exact, "{error}");
            };
            refused(count(structure, &workload).unwrap_err());
            refused(terms(structure, &workload).unwrap_err());
        }
    }
}

/// Qwen2.5-7B, all of it trained on 4,096 tokens: what the counter reports by attention, and with
/// checkpointed layers.
#[test]
fn torchs_totals_of_7b_by_attention() {
    let model = ModelConfig::preset("qwen2.5-7b").unwrap();
    let total = |structure, recompute| {
        let (batch, seq, accumulate, steps, full, clip) = (1, 4096, 1, 1, true, true);
        let task = Task::Train {
            batch,
            seq,
            accumulate,
            steps,
            full,
            recompute,
            clip,
            moments: Default::default(),
            rows: Rows::Whole,
        };
        let lora = LoraConfig::none();
        let workload = Workload {
            model: model.clone(),
            lora,
            dtype: Dtype::F32,
            attention: Default::default(),
            task,
        };
        priced(structure, &workload, &Prices::matmul()).0
    };
    for (structure, recompute, expected) in [
        (Structure::Torch, false, 193_962_870_571_008),
        (Structure::Torch, true, 254_152_542_257_152),
        (Structure::TorchSdpa, false, 197_330_124_931_072),
        (Structure::TorchSdpaCpu, false, 173_759_344_410_624),
    ] {
        assert_eq!(total(structure, recompute), expected, "{structure} {recompute}");
    }
}
