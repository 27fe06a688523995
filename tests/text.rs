//! Tokenizers and chat templates: from files, from GGUF metadata, and the real ones.

mod checkpoints;

use std::{env, fs, path::PathBuf};

use candle_core::{DType, Device, quantized::GgmlDType, quantized::gguf_file::Value};
use checkpoints::*;
use flopaudit::{
    config::ModelConfig,
    text::{Chat, Message, Text},
    weights,
};
use serde_json::json;

/// The text side of a fresh directory with these further files.
fn text_of(files: &[(&str, serde_json::Value)]) -> anyhow::Result<Text> {
    let dir = tempfile::tempdir().unwrap();
    write_text_side(dir.path(), &tiny());
    for (name, json) in files {
        fs::write(dir.path().join(name), json.to_string()).unwrap();
    }
    Text::from_directory(dir.path(), tiny().vocab_size)
}

fn gguf_text(change: impl Fn(&mut Metadata)) -> Text {
    let dir = tempfile::tempdir().unwrap();
    let mut metadata = metadata(&tiny());
    change(&mut metadata);
    write_gguf(&dir.path().join("m.gguf"), &metadata, &tensors(&tiny()), GgmlDType::F32);
    open(dir.path()).unwrap().text
}

#[test]
fn special_tokens_in_text_are_recognised_and_text_comes_back() {
    for text in [text_of(&[]).unwrap(), gguf_text(|_| {})] {
        let spoken = "<|im_start|>Grüße, 🦀!<|im_end|>\n";
        let ids = text.encode(spoken).unwrap();
        assert_eq!((ids[0], ids[ids.len() - 2]), (256, 257));
        assert_eq!(text.decode(&ids, false).unwrap(), spoken);
        assert_eq!(text.decode(&ids, true).unwrap(), "Grüße, 🦀!\n");
        assert_eq!(text.encode("").unwrap(), [0; 0]);
    }
}

#[test]
fn user_defined_tokens_are_recognised_and_kept_and_padding_is_neither() {
    let text = gguf_text(|_| {});
    let ids = text.encode("<tool_call>x").unwrap();
    assert_eq!((ids.len(), ids[0]), (2, 258));
    assert_eq!(text.decode(&ids, true).unwrap(), "<tool_call>x");
    assert_eq!(text.encode("[PAD259]").unwrap().len(), 8);
}

#[test]
fn streams_never_split_a_character() {
    let texts = [text_of(&[]).unwrap(), gguf_text(|_| {}), Text::bytes(320), Text::bytes(151_936)];
    for text in &texts {
        let spoken = "né 🦀🏳️‍🌈 日本\u{FFFD}x";
        let mut stream = text.stream(true);
        let mut out = vec![];
        for id in text.encode(spoken).unwrap() {
            out.extend(stream.push(id).unwrap());
        }
        out.extend(stream.finish().unwrap());
        assert_eq!(out.concat(), spoken);
        assert!(out.contains(&"🦀".to_string()), "{out:?}");
    }
}

#[test]
fn a_stream_gives_what_decoding_at_once_gives_even_for_noise() {
    let text = Text::bytes(320);
    let mut state = 1u32;
    let ids: Vec<u32> = (0..4000)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 16) % 320
        })
        .collect();
    let mut stream = text.stream(false);
    let mut out: Vec<String> = ids.iter().filter_map(|id| stream.push(*id).unwrap()).collect();
    assert!(out.len() > 2000, "{} pieces: nothing may wait for long", out.len());
    out.extend(stream.finish().unwrap());
    assert_eq!(out.concat(), text.decode(&ids, false).unwrap());
}

#[test]
fn the_stand_in_speaks_bytes() {
    let text = Text::bytes(100);
    assert_eq!(text.encode("ab").unwrap(), [97, 98]);
    assert_eq!(text.encode("é").unwrap(), [0xc3 % 100, 0xa9 % 100]);
    assert_eq!(Text::bytes(400).decode(&[72, 105, 300], true).unwrap(), "Hi<300>");
    assert_eq!(text.chat(None, "Hi").unwrap(), "Hi");
    assert!(!text.has_chat_template() && text.is_stand_in() && text.eos_ids().is_empty());
}

#[test]
fn the_end_of_sequence_is_the_checkpoints_own() {
    assert_eq!(text_of(&[]).unwrap().eos_ids(), [0; 0]);
    let one = ("generation_config.json", json!({"eos_token_id": 257}));
    assert_eq!(text_of(&[one]).unwrap().eos_ids(), [257]);
    let many = ("generation_config.json", json!({"eos_token_id": [257, 256]}));
    assert_eq!(text_of(&[many]).unwrap().eos_ids(), [257, 256]);
    let named = ("tokenizer_config.json", json!({"eos_token": {"content": "<|im_end|>"}}));
    assert_eq!(text_of(&[named]).unwrap().eos_ids(), [257]);
    assert_eq!(gguf_text(|_| {}).eos_ids(), [257]);

    let bad = ("generation_config.json", json!({"eos_token_id": "x"}));
    let error = one_line(&text_of(&[bad]).unwrap_err());
    assert!(error.contains("generation_config.json: `eos_token_id` is neither"), "{error}");
}

#[test]
fn the_chat_template_is_the_checkpoints_own() {
    let expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n\
                    <|im_start|>assistant\n";
    let forms = [
        json!(CHAT),
        json!([{"name": "tool", "template": "x"}, {"name": "default", "template": CHAT}]),
    ];
    let texts =
        forms.map(|form| text_of(&[("tokenizer_config.json", json!({"chat_template": form}))]));
    for text in texts.into_iter().map(Result::unwrap).chain([gguf_text(|_| {})]) {
        assert!(text.has_chat_template());
        assert_eq!(text.chat(Some("Be brief."), "Hi").unwrap(), expected);
    }

    let dir = tempfile::tempdir().unwrap();
    write_text_side(dir.path(), &tiny());
    fs::write(dir.path().join("chat_template.jinja"), "{{ messages[0].content }}!").unwrap();
    let text = Text::from_directory(dir.path(), 320).unwrap();
    assert_eq!(text.chat(None, "Hi").unwrap(), "Hi!");

    let text = gguf_text(|metadata| {
        let source = "{{ raise_exception('roles must alternate') }}".into();
        metadata.insert("tokenizer.chat_template".into(), Value::String(source));
    });
    let error = one_line(&text.chat(None, "Hi").unwrap_err());
    assert!(error.contains("chat template fails: roles must alternate"), "{error}");
}

#[test]
fn conversations_are_rendered_whole_or_up_to_the_next_answer() {
    let text = gguf_text(|_| {});
    let messages = [Message::new("user", "Hi"), Message::new("assistant", "Yes?")];
    let whole = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n";
    let chat = Chat::new(&messages[..]);
    assert_eq!(text.render(&chat, false).unwrap(), whole);
    let asks = text.render(&Chat::new(&messages[..1]), true).unwrap();
    assert_eq!(asks, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
    let error = one_line(&Text::bytes(256).render(&chat, false).unwrap_err());
    assert_eq!(error, "prompt: the model has no chat template");
}

#[test]
fn fingerprints_tell_text_sides_apart() {
    let print =
        |files: &[(&str, serde_json::Value)]| text_of(files).unwrap().fingerprint().unwrap();
    let template = |source: &str| ("tokenizer_config.json", json!({"chat_template": source}));
    let eos = ("generation_config.json", json!({"eos_token_id": 257}));
    assert_eq!(print(&[]), print(&[]));
    assert_eq!(print(&[template(CHAT)]), print(&[template(CHAT)]));
    let bytes = |vocab| Text::bytes(vocab).fingerprint().unwrap();
    let mut prints = [
        print(&[]),
        print(&[eos]),
        print(&[template(CHAT)]),
        print(&[template("x")]),
        gguf_text(|_| {}).fingerprint().unwrap(),
        bytes(320),
        bytes(256),
    ]
    .to_vec();
    prints.sort();
    prints.dedup();
    assert_eq!(prints.len(), 7);
}

#[test]
fn tokens_beyond_the_models_are_refused_where_they_occur() {
    let dir = tempfile::tempdir().unwrap();
    write_text_side(dir.path(), &tiny());
    let text = Text::from_directory(dir.path(), 257).unwrap();
    assert_eq!(text.encode("<|im_start|>x").unwrap().len(), 2);
    let error = one_line(&text.encode("x<|im_end|>").unwrap_err());
    assert_eq!(error, "prompt: holds `<|im_end|>`, a token that the model does not have");
}

#[test]
fn the_text_side_of_a_gguf_survives_saving() {
    let spoken = "the <|im_start|>cafés  <tool>x</tool>\n\n🦀";
    let pieces = pieces().into_iter().map(|model| model.open(|_| {}).unwrap());
    for text in [gguf_text(|_| {})].into_iter().chain(pieces) {
        let dir = tempfile::tempdir().unwrap();
        text.save(dir.path()).unwrap();
        let saved = Text::from_directory(dir.path(), 520).unwrap();
        let ids = text.encode(spoken).unwrap();
        assert_eq!(saved.encode(spoken).unwrap(), ids);
        assert_eq!(saved.decode(&ids, false).unwrap(), spoken);
        assert_eq!(saved.eos_ids(), text.eos_ids());
        assert_eq!(saved.chat(None, "Hi").unwrap(), text.chat(None, "Hi").unwrap());
    }
}

#[test]
fn broken_text_files_are_named() {
    let error = one_line(&text_of(&[("tokenizer.json", json!({"model": 1}))]).unwrap_err());
    assert!(error.contains("tokenizer.json: not a tokenizer"), "{error}");
    let dir = tempfile::tempdir().unwrap();
    write_text_side(dir.path(), &tiny());
    let error = one_line(&Text::from_directory(dir.path(), 100).unwrap_err());
    assert!(error.contains("tokenizer.json: has 256 tokens, the model only 100"), "{error}");
    fs::write(dir.path().join("tokenizer_config.json"), "{").unwrap();
    let error = one_line(&Text::from_directory(dir.path(), 320).unwrap_err());
    assert!(error.contains("tokenizer_config.json: not valid JSON"), "{error}");
    fs::remove_file(dir.path().join("tokenizer.json")).unwrap();
    let error = one_line(&Text::from_directory(dir.path(), 320).unwrap_err());
    assert!(error.contains("tokenizer.json: no such file"), "{error}");
}

/// One of the models of golden/sentence_piece.json.
#[derive(serde::Deserialize)]
struct Pieces {
    add_space_prefix: bool,
    tokens: Vec<String>,
    scores: Vec<f32>,
    types: Vec<i32>,
    texts: Vec<PieceText>,
}

#[derive(serde::Deserialize)]
struct PieceText {
    text: String,
    ids: Vec<u32>,
    back: String,
}

fn pieces() -> Vec<Pieces> {
    let golden = fs::read_to_string("tests/golden/sentence_piece.json").unwrap();
    let golden: serde_json::Value = serde_json::from_str(&golden).unwrap();
    serde_json::from_value(golden["models"].clone()).unwrap()
}

impl Pieces {
    /// A GGUF of this tokenizer, changed.
    fn open(&self, change: impl Fn(&mut Metadata)) -> anyhow::Result<Text> {
        let config = ModelConfig { vocab_size: self.tokens.len(), ..tiny() };
        let list = |values: Vec<Value>| Value::Array(values);
        let mut metadata = metadata(&config);
        metadata.remove("tokenizer.ggml.eos_token_id");
        metadata.extend(
            [
                ("model", Value::String("llama".into())),
                ("tokens", list(self.tokens.iter().cloned().map(Value::String).collect())),
                ("scores", list(self.scores.iter().copied().map(Value::F32).collect())),
                ("token_type", list(self.types.iter().copied().map(Value::I32).collect())),
                ("add_space_prefix", Value::Bool(self.add_space_prefix)),
            ]
            .map(|(key, value)| (format!("tokenizer.ggml.{key}"), value)),
        );
        change(&mut metadata);
        let dir = tempfile::tempdir().unwrap();
        write_gguf(&dir.path().join("m.gguf"), &metadata, &tensors(&config), GgmlDType::F32);
        open(dir.path()).map(|checkpoint| checkpoint.text)
    }
}

#[test]
fn sentence_piece_tokenizers_give_its_own_ids() {
    for model in pieces() {
        let text = model.open(|_| {}).unwrap();
        for PieceText { text: spoken, ids, back } in &model.texts {
            assert_eq!(text.encode(spoken).unwrap(), *ids, "{spoken:?}");
            assert_eq!(text.decode(ids, false).unwrap(), *back);
            let mut stream = text.stream(false);
            let mut out: String = ids.iter().filter_map(|id| stream.push(*id).unwrap()).collect();
            out.extend(stream.finish().unwrap());
            assert_eq!(out, *back);
        }
        assert_eq!(text.encode("<s>a</s>").unwrap().first(), Some(&1));
        assert_eq!(text.eos_ids(), [2]);
    }
}

#[test]
fn sentence_piece_metadata_is_checked() {
    let model = &pieces()[0];
    let same = Value::Array(vec![Value::F32(-1000.0); model.tokens.len()]);
    let cases = [
        ("scores", None, "`tokenizer.ggml.scores` is missing"),
        ("scores", Some(same), "ranks no token above another"),
        ("scores", Some(Value::Array(vec![Value::F32(0.0)])), "has 1 entries for 520 tokens"),
        ("token_type", Some(Value::Array(vec![Value::I32(1); 520])), "marks 0 tokens as bytes"),
        ("token_type", Some(Value::Array(vec![Value::I32(9); 520])), "the unknown type 9"),
        ("remove_extra_whitespaces", Some(Value::Bool(true)), "is true, which is not supported"),
        ("precompiled_charsmap", Some(Value::Array(vec![Value::U8(1)])), "is a list of 1"),
        ("add_space_prefix", Some(Value::U32(1)), "is not true or false"),
        ("bos_token_id", Some(Value::U32(9999)), "`tokenizer.ggml.bos_token_id` names no token"),
    ];
    for (key, value, why) in cases {
        let key = format!("tokenizer.ggml.{key}");
        let changed = model.open(|metadata| match &value {
            Some(value) => drop(metadata.insert(key.clone(), value.clone())),
            None => drop(metadata.remove(&key)),
        });
        let error = one_line(&changed.unwrap_err());
        assert!(error.contains(why), "`{why}` is not in: {error}");
    }
}

#[test]
fn a_gguf_says_which_tokens_end_a_turn() {
    // Renamed, a token of the vocabulary's padding is one of those that always do.
    let named = gguf_text(|metadata| {
        let Some(Value::Array(tokens)) = metadata.get_mut("tokenizer.ggml.tokens") else {
            panic!()
        };
        tokens[259] = Value::String("<|eot_id|>".into());
    });
    assert_eq!(named.eos_ids(), [257, 259]);
    let keyed = gguf_text(|metadata| {
        metadata.insert("tokenizer.ggml.eot_token_id".into(), Value::U32(258));
        metadata.insert("tokenizer.ggml.eom_token_id".into(), Value::U32(256));
    });
    assert_eq!(keyed.eos_ids(), [257, 258, 256]);
}

/// The trained weights, or `None` where the environment says that there are none.
fn real_weights() -> Option<PathBuf> {
    let path = env::var("FLOPAUDIT_WEIGHTS").unwrap_or_else(|_| "weights/model.gguf".into());
    let path = PathBuf::from(path);
    if path.exists() {
        return Some(path);
    }
    let skip = env::var("FLOPAUDIT_NO_WEIGHTS").is_ok_and(|v| v == "1");
    assert!(skip, "no {}: run scripts/fetch-weights.sh", path.display());
    eprintln!("SKIPPED: no {}, and FLOPAUDIT_NO_WEIGHTS=1", path.display());
    None
}

#[test]
fn the_trained_checkpoint_tokenizes_as_transformers_does() {
    let Some(path) = real_weights() else { return };
    let checkpoint = open(&path).unwrap();
    let golden = fs::read_to_string("tests/golden/logits.json").unwrap();
    let golden: serde_json::Value = serde_json::from_str(&golden).unwrap();
    let prompts = golden["prompts"].as_array().unwrap();
    assert_eq!(prompts.len(), 3);
    for prompt in prompts {
        let text = prompt["text"].as_str().unwrap();
        let ids: Vec<u32> = serde_json::from_value(prompt["token_ids"].clone()).unwrap();
        assert_eq!(checkpoint.text.encode(text).unwrap(), ids, "{}", prompt["name"]);
        let mut stream = checkpoint.text.stream(false);
        let mut out: String = ids.iter().filter_map(|id| stream.push(*id).unwrap()).collect();
        out.extend(stream.finish().unwrap());
        assert_eq!(out, checkpoint.text.decode(&ids, false).unwrap());
    }
    let chat = checkpoint.text.chat(None, "Write a Rust function that reverses a string.").unwrap();
    assert_eq!(chat, prompts[0]["text"].as_str().unwrap());
    assert_eq!(checkpoint.text.eos_ids(), [151_645, 151_643]);
}

#[test]
fn every_trained_tensor_is_finite_and_of_the_configs_shape() {
    let Some(path) = real_weights() else { return };
    let checkpoint = open(&path).unwrap();
    for (name, shape) in weights::tensor_shapes(&checkpoint.config) {
        let found = checkpoint.weights.tensor(&name, &shape, DType::F32, &Device::Cpu).unwrap();
        assert_eq!(found.dims(), shape, "{name}");
    }
}
