//! Other tools' counts, against the tools themselves on the tiny models in tests/golden/families:
//! see scripts/witness/tools.py.

use std::path::PathBuf;

use flopaudit_count::{
    analytic::{Structure, count},
    config::{LoraConfig, ModelConfig, Projection},
    ledger::Dtype,
    prices::Prices,
    workload::{Lengths, Logits, Rows, Sampling, Task, Workload},
};
use serde_json::Value;

fn golden(path: &str) -> Value {
    let root = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden"));
    serde_json::from_str(&std::fs::read_to_string(root.join(path)).unwrap()).unwrap()
}

/// One tiny model: its config, the adapters that it was counted with, and what the tools said.
struct Counted {
    name: String,
    model: ModelConfig,
    adapters: LoraConfig,
    said: Value,
}

fn all() -> Vec<Counted> {
    let tools = golden("tools.json");
    let models = tools["models"].as_object().unwrap();
    assert_eq!(models.len(), 10);
    let counted = models.iter().map(|(name, said)| {
        let folder = format!("families/{name}");
        let root = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden"));
        let model = ModelConfig::from_file(&root.join(&folder).join("config.json")).unwrap();
        let expected = golden(&format!("{folder}/expected.json"));
        let targets = expected["lora"]["targets"].as_array().unwrap().iter();
        let targets: Vec<Projection> =
            targets.map(|target| serde_json::from_value(target.clone()).unwrap()).collect();
        let adapters = LoraConfig::new(&model, 3, 6.0, &targets).unwrap();
        Counted { name: name.clone(), model, adapters, said: said.clone() }
    });
    counted.collect()
}

impl Counted {
    fn flops(&self, structure: Structure, lora: bool, task: Task, prices: &Prices) -> u128 {
        let lora = if lora { self.adapters.clone() } else { LoraConfig::none() };
        let workload = Workload {
            model: self.model.clone(),
            lora,
            dtype: Dtype::F32,
            attention: Default::default(),
            task,
        };
        prices.flops(&count(structure, &workload).unwrap().sum(|_, _| true).unwrap()).unwrap()
    }
}

const FORWARD: Task =
    Task::Forward { batch: 2, seq: 12, past: 0, logits: Logits::All, sequences: None };

fn train(full: bool) -> Task {
    Task::Train {
        batch: 2,
        seq: 12,
        accumulate: 1,
        steps: 1,
        full,
        recompute: false,
        clip: false,
        moments: Default::default(),
        rows: Rows::Whole,
    }
}

/// Multiply-accumulates as one operation, everything else as one each.
fn of_macs() -> Prices {
    Prices { mac: Some(1), ..Prices::unit() }
}

#[test]
fn profilers_report_their_structures() {
    use Structure::{CalflopsSdpa, DeepSpeed, DeepSpeedSdpa, Ptflops, Torch, TorchSdpaCpu};
    let only_macs = Prices { mac: Some(1), ..Prices::matmul() };
    for counted in all() {
        for (trained, lora) in [("full", false), ("lora", true)] {
            for (attention, tool, structure, prices) in [
                ("eager", "deepspeed", DeepSpeed, Prices::unit()),
                ("eager", "calflops", DeepSpeed, Prices::unit()),
                ("sdpa", "deepspeed", DeepSpeedSdpa, Prices::unit()),
                ("sdpa", "calflops", CalflopsSdpa, Prices::unit()),
                ("eager", "ptflops", Ptflops, of_macs()),
                // fvcore has no structure of its own: PyTorch's matmuls, one a multiply-accumulate.
                ("eager", "fvcore", Torch, only_macs.clone()),
                ("sdpa", "fvcore", TorchSdpaCpu, only_macs.clone()),
            ] {
                let said = counted.said[trained][attention][tool].as_u64().unwrap();
                let flops = counted.flops(structure, lora, FORWARD, &prices);
                let name = &counted.name;
                assert_eq!(flops, said.into(), "{name} {trained} {attention} {tool}");
            }
        }
    }
}

#[test]
fn a_profilers_training_is_three_forward_passes() {
    let counted = &all()[0];
    for structure in [Structure::DeepSpeed, Structure::DeepSpeedSdpa, Structure::CalflopsSdpa] {
        for (lora, full) in [(false, true), (true, false)] {
            let forward = counted.flops(structure, lora, FORWARD, &Prices::unit());
            assert_eq!(counted.flops(structure, lora, train(full), &Prices::unit()), 3 * forward);
        }
    }
}

#[test]
fn formulas_of_training_frameworks_are_theirs() {
    for counted in all() {
        let step =
            |structure, lora| counted.flops(structure, lora, train(!lora), &Prices::matmul());
        let said = |value: &Value| u128::from(value.as_u64().unwrap());
        let name = &counted.name;
        let [full, lora] = [&counted.said["full"], &counted.said["lora"]];
        assert_eq!(step(Structure::HfTrainer, false), said(&full["hf-trainer"]), "{name}");
        assert_eq!(step(Structure::HfTrainer, true), said(&lora["hf-trainer"]), "{name}");
        assert_eq!(step(Structure::Torchtitan, false), said(&full["torchtitan"]), "{name}");
        assert_eq!(step(Structure::MaxText, false), said(&counted.said["maxtext"]), "{name}");
    }
}

#[test]
fn vllm_counts_prompts_and_tokens() {
    for counted in all() {
        let flops = |task| counted.flops(Structure::Vllm, false, task, &Prices::matmul());
        let said = |case: &str| u128::from(counted.said["vllm"][case].as_u64().unwrap());
        let name = &counted.name;
        // Logits of one position a request, whatever is asked for.
        for logits in [Logits::All, Logits::Last] {
            let pass =
                |seq, past| flops(Task::Forward { batch: 2, seq, past, logits, sequences: None });
            assert_eq!(pass(12, 0), said("prompt"), "{name}");
            assert_eq!(pass(12, 9), said("chunk"), "{name}");
            assert_eq!(pass(1, 12), said("token"), "{name}");
        }
        // The second token is chosen from the first's pass, and never fed.
        let generate = Task::Generate {
            batch: 2,
            prompt_tokens: 12,
            new_tokens: 2,
            max_new_tokens: 2,
            kv_cache: true,
            sampling: Sampling::GREEDY,
            past: 0,
            prompts: None,
            then: vec![],
            prefill_chunk: None,
        };
        assert_eq!(flops(generate), said("prompt") + said("token"), "{name}");
    }
}

/// A prompt that is fed in parts, and drafts that are verified, are what vLLM says of each pass.
#[test]
fn vllm_counts_parts_of_prompts_and_drafts() {
    for counted in all() {
        let flops = |task| counted.flops(Structure::Vllm, false, task, &Prices::matmul());
        let pass = |seq, past| {
            flops(Task::Forward { batch: 2, seq, past, logits: Logits::Last, sequences: None })
        };
        let name = &counted.name;
        let parts = Task::Generate {
            batch: 2,
            prompt_tokens: 12,
            new_tokens: 3,
            max_new_tokens: 3,
            kv_cache: true,
            sampling: Sampling::GREEDY,
            past: 5,
            prompts: None,
            then: vec![],
            prefill_chunk: Some(5),
        };
        let each = pass(5, 5) + pass(5, 10) + pass(2, 15) + pass(1, 17) + pass(1, 18);
        assert_eq!(flops(parts), each, "{name}");
        let verify = Task::Verify { batch: 2, past: 3, drafted: 4, accepted: 2, rounds: 3 };
        assert_eq!(flops(verify), pass(5, 3) + pass(5, 6) + pass(5, 9), "{name}");
    }
}

/// Qwen2.5-0.5B: 12·L·D² · (1 + K/H) of q, k, v and o; 18·L·D·F; 6·V·D; two thirds of these, and
/// 12·L·D·T of attention, a token.
#[test]
fn nemos_lora_is_two_thirds_of_the_base() {
    let model = ModelConfig::preset("qwen2.5-0.5b").unwrap();
    let lora = LoraConfig::new(&model, 8, 16.0, &Projection::ALL).unwrap();
    let (batch, seq) = (4, 512);
    let task = Task::Train {
        batch,
        seq,
        accumulate: 3,
        steps: 2,
        full: false,
        recompute: false,
        clip: true,
        moments: Default::default(),
        rows: Rows::Whole,
    };
    let workload =
        Workload { model, lora, dtype: Dtype::BF16, attention: Default::default(), task };
    let sum = count(Structure::NemoLora, &workload).unwrap().sum(|_, _| true).unwrap();
    let (l, d, f, v, kv, t) = (24u128, 896u128, 4864u128, 151_936u128, 128u128, 512u128);
    let base = 12 * l * d * (d + kv) + 18 * l * d * f + 6 * v * d;
    let a_token = base * 2 / 3 + 12 * l * d * t;
    assert_eq!(Prices::matmul().flops(&sum).unwrap(), 6 * 4 * 512 * a_token);
}

#[test]
fn what_a_tool_has_no_count_of_is_refused_by_name() {
    let generate = Task::Generate {
        batch: 1,
        prompt_tokens: 3,
        new_tokens: 2,
        max_new_tokens: 2,
        kv_cache: false,
        sampling: Sampling::GREEDY,
        past: 0,
        prompts: None,
        then: vec![],
        prefill_chunk: None,
    };
    let mut packed = train(true);
    if let Task::Train { rows, .. } = &mut packed {
        let of = |lengths: &[u64]| lengths.iter().copied().collect::<Lengths>();
        *rows = Rows::Packed { passes: of(&[24]), documents: of(&[10, 10, 4]) };
    }
    for (structure, task, expected) in [
        (Structure::Ptflops, train(true), "train: ptflops counts forward passes and no training"),
        (Structure::Vllm, train(true), "train: vllm counts serving and no training"),
        (Structure::Vllm, generate, "--no-kv-cache: vllm always keeps a cache"),
        (Structure::MaxText, FORWARD, "forward: maxtext counts training alone"),
        (Structure::MaxText, packed, "rows: maxtext counts rows of one length"),
        (
            Structure::NemoLora,
            train(true),
            "--full: nemo-lora counts a frozen base; megatron-causal counts a trained one",
        ),
    ] {
        let model = ModelConfig::preset("tiny").unwrap();
        let workload = Workload {
            model,
            lora: LoraConfig::none(),
            dtype: Dtype::F32,
            attention: Default::default(),
            task,
        };
        assert_eq!(count(structure, &workload).unwrap_err().to_string(), expected);
        let terms = flopaudit_count::analytic::terms(structure, &workload);
        assert_eq!(terms.unwrap_err().to_string(), expected);
    }
}
