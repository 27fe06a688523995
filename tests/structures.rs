//! The notebook's figures and PyTorch's, digit for digit.

use flopaudit::{
    analytic::{Structure, count, notebook},
    config::{LoraConfig, ModelConfig, Projection},
    ledger::Dtype,
    prices::Prices,
    tally::Component,
    workload::{Logits, Sampling, Task, Workload},
};

fn workload(rank: usize, task: Task) -> Workload {
    let model = ModelConfig::preset("qwen2.5-0.5b").unwrap();
    let targets = [Projection::QProj, Projection::VProj];
    let lora = LoraConfig::new(&model, rank, 16.0, &targets).unwrap();
    Workload { model, lora, dtype: Dtype::F32, task }
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
    }
}

fn train(steps: u64) -> Task {
    Task::Train { batch: 4, seq: 512, accumulate: 1, steps, full: false }
}

#[test]
fn the_notebooks_totals() {
    assert_eq!(notebook_total(0, generate(900, 294, 0.0)), (377_605_673_710_902, 0));
    assert_eq!(notebook_total(0, generate(512, 512, 0.0)), (473_172_281_951_744, 0));
    let adapted = notebook_total(5, generate(512, 512, 0.0));
    assert_eq!(adapted, (473_527_096_538_624, 354_814_586_880));
    assert_eq!(notebook_total(0, generate(512, 512, 1.0)), (473_173_215_446_016, 0));
    let evaluate = Task::Evaluate { batch: 100, seq: 512 };
    assert_eq!(notebook_total(0, evaluate), (60_341_912_907_200, 0));

    let printed = |(total, lora): (u128, u128)| format!("{:.4e} {:.4e}", total as f64, lora as f64);
    assert_eq!(printed(notebook_total(4, train(1))), "7.2455e12 4.4909e9");
    assert_eq!(printed(notebook_total(4, train(13_800))), "9.9988e16 6.1975e13");
    // The notebook stops at 13 800 steps; its budget of 1e17 would take one more.
    let budget = 10u128.pow(17);
    assert!(notebook_total(4, train(13_801)).0 <= budget);
    assert!(notebook_total(4, train(13_802)).0 > budget);
}

#[test]
fn the_notebooks_table() {
    let forward = Task::Forward { batch: 1, seq: 512, past: 0, logits: Logits::All };
    let table = |rank| {
        let rows = notebook::table(&workload(rank, forward), &Prices::coursework());
        rows.unwrap()
            .unwrap()
            .into_iter()
            .map(|row| {
                let cells: Vec<_> = row
                    .flops
                    .into_iter()
                    .chain([row.total])
                    .map(flopaudit::report::three_digits)
                    .collect();
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
        serde_json::from_str(include_str!("golden/torch_flops.json")).unwrap();
    let forward = |batch, seq, past, logits| Task::Forward { batch, seq, past, logits };
    let (train, full) = (
        |full| Task::Train { batch: 2, seq: 64, accumulate: 1, steps: 1, full },
        forward(2, 64, 0, Logits::All),
    );
    let cases = [
        ("fwd_B1_T512", 0, forward(1, 512, 0, Logits::All)),
        ("fwd_B1_T512_last_logits_only", 0, forward(1, 512, 0, Logits::Last)),
        ("fwd_B3_T37", 0, forward(3, 37, 0, Logits::All)),
        ("decode_1tok_cache100", 0, forward(1, 1, 100, Logits::All)),
        ("full_ft_fwd_B2_T64", 0, full),
        ("full_ft_fwd_bwd_B2_T64", 0, train(true)),
        ("lora_r8_fwd_B2_T64", 8, full),
        ("lora_r8_fwd_bwd_B2_T64", 8, train(false)),
    ];
    assert_eq!(golden["cases"].as_object().unwrap().len(), cases.len());
    for (name, rank, task) in cases {
        let total = u128::from(golden["cases"][name]["total"].as_u64().unwrap());
        let workload = workload(rank, task);
        for prices in [Prices::matmul(), Prices::unit(), Prices::coursework()] {
            assert_eq!(priced(Structure::Torch, &workload, &prices).0, total, "{name}");
        }
        if let Task::Forward { .. } = task {
            let exact = priced(Structure::Exact, &workload, &Prices::matmul());
            assert_eq!(exact.0, total, "{name}");
        }
    }
}
