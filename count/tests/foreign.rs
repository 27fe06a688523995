//! Other tools' files, as they wrote them (tests/foreign), read beside their formulas.

use std::path::Path;

use flopaudit_count::{
    analytic::{Cause, Structure},
    config::{LoraConfig, ModelConfig, Projection},
    foreign::{Agreement, KNOWN, Tool, read},
    ledger::Dtype,
    prices::Prices,
    reconcile::{End, Side, reconcile},
    workload::{Logits, Rows, Sampling, Task, Workload},
};
use proptest::prelude::*;

fn sample(name: &str) -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/foreign");
    std::fs::read_to_string(folder.join(name)).unwrap()
}

fn workload(preset: &str, rank: usize, task: Task) -> Workload {
    let model = ModelConfig::preset(preset).unwrap();
    let targets = [Projection::QProj, Projection::VProj];
    let lora = LoraConfig::new(&model, rank, 8.0, &targets).unwrap();
    Workload { model, lora, dtype: Dtype::F32, attention: Default::default(), task }
}

fn train(batch: u64, seq: u64, accumulate: u64, steps: u64, full: bool) -> Task {
    Task::Train {
        batch,
        seq,
        accumulate,
        steps,
        full,
        recompute: false,
        clip: false,
        moments: Default::default(),
        rows: Rows::Whole,
    }
}

fn generate(batch: u64, prompt_tokens: u64, new_tokens: u64) -> Task {
    let (max_new_tokens, kv_cache, sampling) = (new_tokens, true, Sampling::GREEDY);
    Task::Generate {
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
    }
}

const FORWARD: Task =
    Task::Forward { batch: 2, seq: 12, past: 0, logits: Logits::All, sequences: None };
const EVALUATE: Task = Task::Evaluate { batch: 2, seq: 12, passes: 5, rows: Rows::Whole };

/// The structure and what the file says of `workload`; the way from its figure to `exact` sums.
fn settled(text: &str, gpus: Option<u64>, workload: &Workload) -> (Structure, Tool) {
    let foreign = read(text).unwrap();
    let told = foreign.told(workload, gpus).unwrap();
    let (structure, tool) = told.settle("file", foreign.format(), workload).unwrap();
    let ends = [structure, Structure::Exact];
    let [from, to] = ends.map(|structure| End { structure, prices: told.prices.clone() });
    let counted = |a: &End, b: &End| reconcile("", std::slice::from_ref(workload), a, b).unwrap();
    let exact = counted(&from, &to).to.total_flops;
    for (side, way) in [(Side::From, counted(&from, &to)), (Side::To, counted(&to, &from))] {
        let way = way.with_tool(side, tool.clone()).unwrap();
        let stated = tool.stated_flops.unwrap_or(tool.counted_flops);
        let [start, end] = match side {
            Side::To => [exact, stated],
            Side::From | Side::Both => [stated, exact],
        };
        assert_eq!([way.from.total_flops, way.to.total_flops], [start, end]);
        let last = way.steps.iter().fold(start as i128, |before, step| {
            assert_eq!(before + step.flops, step.running_total);
            step.running_total
        });
        assert_eq!(last, end as i128);
        let apart = way.steps.iter().any(|step| step.cause == Cause::Unexplained);
        assert_eq!(apart, tool.agreement == Agreement::Differs);
    }
    (structure, tool)
}

#[test]
fn every_sample_is_told_and_agrees() {
    use Agreement::{Exact, NoFigure, WithinRounding};
    use Structure::{CalflopsSdpa, DeepSpeedSdpa, HfTrainer, MegatronCausal};
    use Structure::{Torch, TorchSdpa, Vllm};
    let tiny = |rank, task| workload("tiny", rank, task);
    let megatron = workload("qwen2.5-0.5b", 0, train(4, 2048, 8, 30, true));
    let last =
        |seq| Task::Forward { batch: 1, seq, past: 0, logits: Logits::Last, sequences: None };
    for (file, format, gpus, workload, structure, agreement) in [
        ("trainer_state.json", 0, None, tiny(0, train(2, 12, 2, 3, true)), HfTrainer, Exact),
        ("trainer_state_lora.json", 0, None, tiny(4, train(2, 12, 2, 3, false)), HfTrainer, Exact),
        // Thousands with three decimals are exact.
        ("torch_train_lora.txt", 1, None, tiny(4, train(2, 12, 1, 1, false)), Torch, Exact),
        ("torch_forward_sdpa.txt", 1, None, tiny(0, FORWARD), TorchSdpa, Exact),
        ("deepspeed_eager.txt", 2, None, tiny(0, FORWARD), DeepSpeedSdpa, WithinRounding),
        ("deepspeed_sdpa.txt", 2, None, tiny(0, EVALUATE), DeepSpeedSdpa, WithinRounding),
        (
            "deepspeed_sdpa.txt",
            2,
            None,
            tiny(0, train(2, 12, 3, 5, true)),
            DeepSpeedSdpa,
            WithinRounding,
        ),
        ("calflops_sdpa.txt", 3, None, tiny(0, FORWARD), CalflopsSdpa, WithinRounding),
        ("megatron.log", 4, None, megatron.clone(), MegatronCausal, WithinRounding),
        ("megatron.log", 4, Some(8), megatron, MegatronCausal, WithinRounding),
        ("vllm_metrics.txt", 5, Some(1), tiny(0, generate(2, 12, 4)), Vllm, Exact),
        ("llama_bench.json", 6, None, workload("qwen2.5-7b", 0, last(512)), Torch, NoFigure),
        (
            "llama_bench.json",
            6,
            None,
            workload("qwen2.5-7b", 0, generate(1, 512, 1)),
            Torch,
            NoFigure,
        ),
        (
            "llama_bench.json",
            6,
            None,
            workload("qwen2.5-7b", 0, generate(1, 1, 128)),
            Torch,
            NoFigure,
        ),
    ] {
        let (found, tool) = settled(&sample(file), gpus, &workload);
        assert_eq!((found, tool.agreement), (structure, agreement), "{file}: {tool:?}");
        assert_eq!(tool.format, KNOWN[format], "{file}");
        let unlike = tool.notes.iter().find(|note| note.starts_with("it has"));
        assert_eq!(unlike, None, "{file}");
    }
    // 5,184 operations of softmax are less than the printed digits tell apart: both are named.
    let (_, tool) = settled(&sample("deepspeed_eager.txt"), None, &tiny(0, FORWARD));
    let both = "deepspeed:eager agrees as well; by default it is deepspeed:sdpa";
    assert!(tool.notes.iter().any(|note| note == both), "{tool:?}");
}

#[test]
fn a_difference_is_a_step_with_a_hint() {
    let state = sample("trainer_state.json");
    let (_, tool) = settled(&state, None, &workload("tiny", 0, train(2, 12, 2, 2, true)));
    assert_eq!(tool.agreement, Agreement::Differs);
    assert_eq!(tool.stated_flops, Some(20_265_984));
    assert_eq!(tool.counted_flops, 20_265_984 / 3 * 2);
    assert_eq!(
        tool.notes,
        ["it has 3 steps, the workload 2", "it states 3/2 of what hf-trainer counts"]
    );

    let lora = workload("tiny", 8, train(2, 12, 1, 1, false));
    let (_, tool) = settled(&sample("torch_train_lora.txt"), None, &lora);
    assert_eq!(tool.agreement, Agreement::Differs);

    let served = sample("vllm_metrics.txt");
    let (_, tool) = settled(&served, Some(1), &workload("tiny", 0, generate(2, 12, 5)));
    assert_eq!(tool.notes[1], "it has 8 generated tokens, the workload 10");

    let log = sample("megatron.log");
    let half = workload("qwen2.5-0.5b", 0, train(16, 2048, 1, 30, true));
    let (_, tool) = settled(&log, None, &half);
    assert!(tool.notes.contains(&"it has 32 sequences a step, the workload 16".into()), "{tool:?}");
    assert!(
        tool.notes.contains(&"it states 2 times what megatron-causal counts".into()),
        "{tool:?}"
    );
}

#[test]
fn an_older_megatron_took_attention_whole() {
    // 12·L·H·d·T² of attention a sequence beside 6 of later versions; 1 GPU, 1 s.
    let workload = workload("qwen2.5-0.5b", 0, train(1, 4096, 1, 1, true));
    let cost = flopaudit_count::analytic::count(Structure::Megatron, &workload).unwrap();
    let flops = Prices::matmul().flops(&cost.sum(|_, _| true).unwrap()).unwrap();
    let line = |tenths: u128| {
        format!(
            "using world size: 1, data\n elapsed time per iteration (ms): 1000.0 | throughput per GPU (TFLOP/s/GPU): {}.{} |",
            tenths / 10,
            tenths % 10
        )
    };
    let (structure, tool) =
        settled(&line((flops + 50_000_000_000) / 100_000_000_000), None, &workload);
    assert_eq!((structure, tool.agreement), (Structure::Megatron, Agreement::WithinRounding));
}

#[test]
fn llama_bench_gives_a_rate() {
    let forward =
        Task::Forward { batch: 1, seq: 512, past: 0, logits: Logits::Last, sequences: None };
    let (_, tool) = settled(&sample("llama_bench.json"), None, &workload("qwen2.5-7b", 0, forward));
    let rate = tool.counted_flops as f64 / 0.072_135_64;
    assert_eq!(tool.flops_per_second, Some(rate));
    assert_eq!(tool.notes, ["pp512: 72135640 ns, and no FLOPs stated"]);
    let other = Task::Forward { batch: 1, seq: 12, past: 0, logits: Logits::Last, sequences: None };
    let bench = read(&sample("llama_bench.json")).unwrap();
    let why = bench.told(&workload("tiny", 0, other), None).unwrap_err();
    assert_eq!(
        why,
        "has no test of this workload; it has pp512 (`forward --seq 512 --logits last`), tg128 \
         (`generate --prompt-tokens 1 --new-tokens 128`)"
    );
    // Lines of objects are the same as a list of them.
    let lines = "{\"n_prompt\": 5, \"n_gen\": 0, \"avg_ns\": 7, \"model_n_params\": 43936, \"n_ubatch\": 4}\n\
                 {\"n_prompt\": 5, \"n_gen\": 2, \"n_depth\": 9, \"avg_ns\": 7}\n";
    let forward =
        Task::Forward { batch: 1, seq: 5, past: 0, logits: Logits::Last, sequences: None };
    let (_, tool) = settled(lines, None, &workload("tiny", 0, forward));
    assert_eq!(
        tool.notes[1..],
        [
            "its model has 43936 parameters, the workload's 33696",
            "it feeds the prompt 4 tokens at a time, which score fewer keys than counted"
        ]
    );
}

#[test]
fn a_workload_that_a_file_cannot_be_of_is_refused() {
    let tiny = |task| workload("tiny", 4, task);
    let told =
        |file: &str, gpus, task| read(&sample(file)).unwrap().told(&tiny(task), gpus).unwrap_err();
    let training = train(2, 12, 1, 1, false);
    for (file, gpus, task, expected) in [
        ("trainer_state.json", None, FORWARD, "is of train; state that as the workload"),
        ("megatron.log", None, FORWARD, "is of train; state that as the workload"),
        ("deepspeed_sdpa.txt", None, generate(1, 2, 3), "is of forward, train or eval;"),
        ("vllm_metrics.txt", Some(1), training.clone(), "is of generate, forward or eval;"),
        ("vllm_metrics.txt", None, FORWARD, "give --gpus"),
        ("vllm_metrics.txt", Some(0), FORWARD, "does not divide"),
        ("trainer_state.json", Some(1), training.clone(), "leave --gpus out"),
        ("megatron.log", Some(4), training.clone(), "ran on 8 GPUs, and --gpus says 4"),
    ] {
        let why = told(file, gpus, task);
        assert!(why.contains(expected), "{file}: {why}");
    }
}

#[test]
fn what_is_no_figure_is_one_clear_sentence() {
    let header = "Module  FLOP  % Total\n------  ----  -------\n";
    let deepspeed = |value: &str| {
        format!(
            "- DeepSpeed Flops Profiler -\nfwd flops of model = fwd flops per GPU * mp_size:  {value}\n"
        )
    };
    let megatron = |time: &str, rate: &str| {
        format!(
            "elapsed time per iteration (ms): {time} | throughput per GPU (TFLOP/s/GPU): {rate} |"
        )
    };
    let state = |flos: &str| format!("{{\"total_flos\": {flos}, \"global_step\": 1}}");
    let vllm = |value: &str| format!("vllm:estimated_flops_per_gpu_total{{engine=\"0\"}} {value}");
    let long = "9".repeat(400);
    for (text, expected) in [
        (String::new(), "is none of what is read: Hugging Face's trainer_state.json, "),
        ("hello".into(), "is none of what is read"),
        ("{}".into(), "is none of what is read"),
        ("[]".into(), "is none of what is read"),
        ("{\"total_flos\": 1".into(), "is no JSON: EOF"),
        (state("-1"), "`total_flos` is -1, which is no count"),
        (state("0.5"), "which is no count"),
        (state("NaN"), "is no JSON"),
        (state("1e300"), "which is no count"),
        (state(&long), "is no JSON: number out of range"),
        (state("\"many\""), "total_flos: invalid type"),
        ("{\"total_flos\": 1}".into(), "missing field `global_step`"),
        ("{\"total_flos\": 1, \"global_step\": -1}".into(), "global_step: invalid value"),
        (header.into(), "holds a table without a row"),
        (format!("{header}Model  lots  100%"), "line 3: `Model  lots  100%` is no row of FLOPs"),
        (format!("{header}Model  -1.000K  100%"), "is no row of FLOPs"),
        (format!("{header}Model  nanK  100%"), "is no row of FLOPs"),
        (format!("{header}Model  {long}T  100%"), "is no row of FLOPs"),
        (format!("{header}Model  1.000K"), "is no row of FLOPs"),
        (format!("{header}{header}"), "holds several tables; keep one"),
        ("- DeepSpeed Flops Profiler -".into(), "lacks the line `fwd flops of model"),
        ("- Calculate Flops Results -".into(), "lacks the line `fwd FLOPs:`"),
        (deepspeed("1.2 X"), "line 2: `1.2 X` is no count of FLOPs"),
        (deepspeed("-1.2 M"), "is no count of FLOPs"),
        (deepspeed("nan T"), "is no count of FLOPs"),
        (deepspeed(""), "is no count of FLOPs"),
        (deepspeed(&long), "is no count of FLOPs"),
        (deepspeed("1 M") + &deepspeed("2 M"), "holds profiles that differ; keep one"),
        ("elapsed time per iteration (ms): 1.0 |".into(), "run with --log-throughput"),
        (megatron("1.0", "nan"), "line 1: `nan` is no number of one decimal"),
        (megatron("-1.0", "1.0"), "is no number of one decimal"),
        (megatron("1.00", "1.0"), "is no number of one decimal"),
        (megatron("1111111111111111.0", "1111111111111111.0"), "absurd figures"),
        (format!("using world size: x,\n{}", megatron("1.0", "1.0")), "no whole number"),
        (format!("using world size: 0,\n{}", megatron("1.0", "1.0")), "a world size of 0"),
        ("vllm:num_requests_running 1".into(), "start vLLM with --enable-mfu-metrics"),
        (vllm("NaN"), "line 1: `vllm:estimated_flops_per_gpu_total` has no count"),
        (vllm("-1.0"), "has no count"),
        (vllm("+Inf"), "has no count"),
        (vllm(""), "has no count"),
        (vllm("1e300"), "is no count"),
        ("[{\"avg_ns\": 0, \"n_prompt\": 1, \"n_gen\": 0}]".into(), "test 1: `avg_ns` is 0"),
        ("[{\"avg_ns\": 1, \"n_prompt\": 0, \"n_gen\": 0}]".into(), "test 1: runs no token"),
        ("[{\"avg_ns\": 1, \"n_prompt\": -4, \"n_gen\": 0}]".into(), "n_prompt: invalid value"),
    ] {
        let why = read(&text).unwrap_err();
        assert!(why.contains(expected), "{text}: {why}");
        assert_eq!(why.lines().count(), 1, "{why}");
    }
    // Iterations of two sizes are not averaged.
    let two = format!(
        "using world size: 1, x\n{}\n{}",
        megatron("100.0", "50.0"),
        megatron("100.0", "60.0")
    );
    let why = read(&two).unwrap().told(&workload("tiny", 4, train(1, 1, 1, 1, false)), None);
    assert!(why.unwrap_err().contains("different FLOPs"));
}

proptest! {
    #[test]
    fn no_text_panics(name in 0usize..9, cut in 0usize..4000, put in "[ -~\n]{0,6}") {
        let names = [
            "trainer_state.json", "torch_train_lora.txt", "torch_forward_sdpa.txt",
            "deepspeed_sdpa.txt", "calflops_sdpa.txt", "vllm_metrics.txt", "megatron.log",
            "llama_bench.json", "deepspeed_eager.txt",
        ];
        let text = sample(names[name]);
        let cut = cut.min(text.len());
        let damaged = format!("{}{put}{}", &text[..cut], &text[(cut + put.len()).min(text.len())..]);
        for text in [&damaged, &text[..cut]] {
            if let Ok(foreign) = read(text) {
                for task in [FORWARD, EVALUATE, generate(2, 12, 4), train(2, 12, 2, 3, true)] {
                    for gpus in [None, Some(2), Some(u64::MAX)] {
                        let workload = workload("tiny", 0, task.clone());
                        if let Ok(told) = foreign.told(&workload, gpus) {
                            let _ = told.settle("", "", &workload);
                        }
                    }
                }
            }
        }
    }
}
