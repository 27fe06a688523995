//! Small inputs that once gave a plausible wrong number, each with the value that is right or with
//! what the one line holds that refuses it, and how that is known. They lie in tests/cases/loading,
//! where `base` is the sound model.

mod program;

use std::{collections::BTreeSet, fs};

use program::{flopaudit, refused, tmp};
use serde_json::{Value, json};

use Answer::{Has, Loss, Refused};

const CASES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/cases/loading");

/// What is right of a case.
enum Answer {
    /// The mean loss in nats, of so many tokens.
    Loss(f64, u64),
    /// What the JSON holds where this pointer shows.
    Has(&'static str, Value),
    /// One line that holds all these.
    Refused(&'static [&'static str]),
}

/// A case's folder, the command of which it is `CASE`, what is right, and how that is known.
type Case = (&'static str, &'static str, Answer, &'static str);

/// The loss of `base`, and of whatever is the same model.
const BASE: Answer = Loss(17.026_877, 58);

const EVAL: &str = "eval --model CASE --data data.txt --seq 512";
const GGUF: &str = "eval --model CASE/m.gguf --data data2.txt --seq 512";
const ADAPTER: &str = "eval --model base --adapter CASE --data data.txt --seq 512";
const RAW: &str = "generate Hello --raw --ignore-eos --max-new-tokens 4 --model CASE";
const RAW_GGUF: &str = "generate Hello --raw --ignore-eos --max-new-tokens 4 --model CASE/m.gguf";
const CHAT: &str = "generate Hi --max-new-tokens 1 --model CASE";
const CHAT_GGUF: &str = "generate Hello --max-new-tokens 2 --model CASE/m.gguf";
const TRAIN: &str =
    "train --model base --data CASE/arr.json --seq 64 --steps 1 --lora-rank 2 --out OUT";

/// Oracles; the losses of transformers are of its version 5.23, in float64.
const NUMPY: &str = "a forward pass in numpy, in float64";
const HF: &str = "transformers";
const SAME: &str = "it describes the same model as base";

#[rustfmt::skip]
fn cases() -> Vec<Case> {
    vec![
        ("base", EVAL, BASE, NUMPY),
        ("gguf_qwen2", GGUF, Loss(17.762_418, 36), NUMPY),

        ("gguf_pre_deepseek", GGUF, Loss(17.762_418, 36), "llama.cpp splits it as qwen2"),
        ("gguf_pre_missing", GGUF, Refused(&["`tokenizer.ggml.pre` is missing", "--pretokenizer"]), "nothing says how to split"),
        ("gguf_add_bos", RAW_GGUF, Has("/token_ids", json!([272, 69, 254, 118])), "the prompt as gguf-py has it, fed to numpy"),
        ("gguf_notpl", CHAT_GGUF, Has("/notes/0", json!("the checkpoint has no chat template: the prompt runs raw, as with --raw")), "it has no template"),
        ("gguf_iq", GGUF, Refused(&["gguf_iq/m.gguf: tensor `blk.0.attn_q.weight` is stored as IQ4_NL"]), "gguf-py"),
        ("gguf_noncausal", GGUF, Refused(&["gguf_noncausal/m.gguf: `qwen2.attention.causal` is false"]), "gguf-py"),
        ("gguf_rope_factor", GGUF, Loss(18.834_485, 36), "transformers, with a linear factor of 4"),

        ("tok_bos", RAW, Has("/token_ids", json!([306, 184, 158, 69])), HF),
        ("tok_bos", RAW, Has("/sequences/0/prompt_tokens", json!(6)), HF),
        ("stdin_newline", "generate - --raw --ignore-eos --model base --max-new-tokens 3", Has("/sequences/0/prompt_tokens", json!(2)), "`Hi` is two tokens"),

        ("is_causal_false", EVAL, Refused(&["is_causal_false/config.json: `is_causal` is false"]), "transformers gives 17.618894"),
        ("rope_nested", EVAL, Loss(16.514_703, 58), "transformers, of the same without nesting"),
        ("rope_notype", EVAL, Refused(&["rope_notype/config.json: `rope_scaling.factor` is 4", "rope_type"]), "nothing says what to scale"),
        ("rope_linear1", EVAL, BASE, SAME),
        ("usw_noop", EVAL, BASE, SAME),
        ("kv_null", EVAL, Refused(&["k_proj.weight` has shape [16, 32]; the config asks for [32, 32]"]), "null means as many as heads"),
        ("quant_cfg", EVAL, Refused(&["quant_cfg/config.json: `quantization_config`", "gptq"]), "its config"),
        ("reward_model", CHAT, Refused(&["reward_model/config.json: `architectures`", "Qwen2ForSequenceClassification"]), "its config"),

        ("extra_tensors", EVAL, Refused(&["extra_tensors/model.safetensors: tensor `model.layers.0.self_attn.o_proj.bias`"]), "its config"),
        ("more_layers", EVAL, Refused(&["more_layers/model.safetensors: tensor `model.layers.3."]), "its config has 3 layers"),
        ("tied_head_differs", EVAL, Loss(16.799_704, 58), HF),
        ("only_lm_head", EVAL, BASE, SAME),
        ("prefixless", EVAL, BASE, SAME),

        ("ad_lora_ga", ADAPTER, Refused(&["ad_lora_ga/adapter_config.json: `init_lora_weights`", "lora_ga"]), "PEFT moves the base weights"),
        ("ad_rankpat", ADAPTER, Refused(&["q_proj.lora_A.weight` has shape [4, 32]", "[8, 32]"]), "PEFT refuses the shapes"),

        ("base_tools", EVAL, BASE, SAME),
        ("tools_column", "eval --model base_tools --data CASE/d.jsonl --seq 512", Loss(17.651_589, 136), HF),
        ("json_array", TRAIN, Has("/notes/0", json!("json_array/arr.json: read as `messages`")), "it is a list of conversations"),
        ("json_array", "eval --model base --data CASE/arr.json --seq 64", Has("/evaluation/tokens/scored", json!(66)), HF),
        ("generation_tag", CHAT, Has("/sequences/0/prompt_tokens", json!(21)), HF),
    ]
}

#[test]
fn each_case_gives_the_right_value_or_one_line() {
    let out = tmp();
    let out = out.path().join("out");
    for (case, line, answer, known) in cases() {
        let line = line.replace("CASE", case).replace("OUT", out.to_str().unwrap());
        let report = |stdin: &str| -> Value {
            let mut command = flopaudit(CASES.as_ref(), &format!("{line} --json"));
            let output = command.write_stdin(stdin).output().unwrap();
            let stderr = String::from_utf8(output.stderr).unwrap();
            assert!(output.status.success(), "{case}: {stderr}");
            serde_json::from_slice(&output.stdout).unwrap()
        };
        match answer {
            Loss(loss, tokens) => {
                let found = &report("")["evaluation"];
                let near = (found["loss"].as_f64().unwrap() - loss).abs() < 2e-5;
                assert!(near, "{case}: {found}; {known} gives {loss}");
                assert_eq!(found["tokens"]["scored"], tokens, "{case}; {known}");
            }
            Has(pointer, expected) => {
                assert_eq!(report("Hi\n").pointer(pointer), Some(&expected), "{case}; {known}");
            }
            Refused(parts) => refused(CASES.as_ref(), &line, parts),
        }
    }
}

/// A folder that no row names would be tried by nothing.
#[test]
fn each_folder_has_a_row() {
    let folders = fs::read_dir(CASES).unwrap().map(|entry| entry.unwrap());
    let folders = folders.filter(|entry| entry.file_type().unwrap().is_dir());
    let folders: BTreeSet<String> =
        folders.map(|entry| entry.file_name().into_string().unwrap()).collect();
    let rows: BTreeSet<String> = cases().iter().map(|(case, ..)| (*case).to_string()).collect();
    // This case is its command alone.
    let rows = rows.into_iter().filter(|case| case != "stdin_newline").collect();
    assert_eq!(folders, rows);
}
