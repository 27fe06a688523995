//! Tokens as the checkpoint means them: how text is split, what goes around it, what a pipe or an
//! editor adds to it, and how a checkpoint would have tokens chosen.

mod checkpoints;
mod program;

use std::{collections::HashMap, fs, path::Path};

use candle_core::quantized::{
    GgmlDType,
    gguf_file::{self, Value},
};
use checkpoints::*;
use flopaudit::{
    config::ModelConfig,
    text::Text,
    train::data::{Dataset, Options},
    weights,
    workload::Sampling,
};
use program::*;
use serde::Deserialize;
use serde_json::{Value as Json, json};

const CASES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/cases/loading");

fn golden<T: for<'a> Deserialize<'a>>(name: &str) -> T {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    serde_json::from_str(&fs::read_to_string(file).unwrap()).unwrap()
}

/// golden/pretokenizers.json: what llama.cpp makes of texts under each name.
#[derive(Deserialize)]
struct Pretokenizers {
    tokens: Vec<String>,
    merges: Vec<String>,
    texts: Vec<String>,
    groups: Vec<Group>,
}

#[derive(Deserialize)]
struct Group {
    names: Vec<String>,
    ids: Vec<Vec<u32>>,
}

#[test]
fn pretokenizers_split_as_llama_cpp_does() {
    let golden: Pretokenizers = golden("pretokenizers.json");
    let dir = tmp();
    let file = dir.path().join("m.gguf");
    let config = ModelConfig { vocab_size: golden.tokens.len(), ..tiny() };
    let strings = |list: &[String]| Value::Array(list.iter().cloned().map(Value::String).collect());
    let types = golden.tokens.iter().map(|token| Value::I32(if token == "<s>" { 3 } else { 1 }));
    let bos = golden.tokens.iter().position(|token| token == "<s>").unwrap() as u32;
    let mut written = metadata(&config);
    written.extend(
        [
            ("tokens", strings(&golden.tokens)),
            ("merges", strings(&golden.merges)),
            ("token_type", Value::Array(types.collect())),
            ("bos_token_id", Value::U32(bos)),
            ("eos_token_id", Value::U32(bos)),
        ]
        .map(|(key, value)| (format!("tokenizer.ggml.{key}"), value)),
    );
    written.remove("tokenizer.ggml.pre");
    write_gguf(&file, &written, &tensors(&config), GgmlDType::F32);
    for Group { names, ids } in &golden.groups {
        for name in names {
            let text = weights::open_split(file.to_str(), Some(name)).unwrap().text;
            // llama.cpp's form of these regular expressions has no marks, the models' own has.
            let markless = ["tekken", "gpt-4o", "llama4", "kanana2"].contains(&name.as_str());
            for (spoken, ids) in golden.texts.iter().zip(ids) {
                let same = text.encode_raw(spoken).unwrap() == *ids;
                assert_eq!(same, !(markless && spoken.contains('\u{302}')), "{spoken:?}, {name}");
            }
        }
    }
    assert_eq!(golden.groups.len(), 12);
}

/// tests/cases/loading/gguf_qwen2 with these keys changed; `None` takes one away.
fn gguf_case(dir: &Path, changes: &[(&str, Option<Value>)]) {
    let mut file = fs::File::open(format!("{CASES}/gguf_qwen2/m.gguf")).unwrap();
    let content = gguf_file::Content::read(&mut file).unwrap();
    let mut metadata = content.metadata.clone();
    for (key, value) in changes {
        let key = format!("tokenizer.ggml.{key}");
        match value {
            Some(value) => metadata.insert(key, value.clone()),
            None => metadata.remove(&key),
        };
    }
    let cpu = candle_core::Device::Cpu;
    let tensor = |name: &String| (name.clone(), content.tensor(&mut file, name, &cpu).unwrap());
    let tensors: HashMap<_, _> = content.tensor_infos.keys().map(tensor).collect();
    let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let metadata: Vec<_> = metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
    let mut out = fs::File::create(dir.join("m.gguf")).unwrap();
    gguf_file::write(&mut out, &metadata, &tensors).unwrap();
}

/// What an evaluation gives: its loss and the tokens that count, or what its one line holds.
enum Scored {
    Loss(f64, u64),
    Refused(&'static [&'static str]),
}

#[test]
fn a_ggufs_text_is_split_as_it_says_or_refused() {
    use Scored::{Loss, Refused};
    let name = |name: &str| Some(Value::String(name.into()));
    // Of numpy in float64.
    let qwen2 = || Loss(17.762418, 36);
    type Changes<'a> = &'a [(&'a str, Option<Value>)];
    let cases: [(&str, Changes, &str, Scored); 8] = [
        ("as it is", &[], "", qwen2()),
        ("an alias", &[("pre", name("deepseek-r1-qwen"))], "", qwen2()),
        ("missing", &[("pre", None)], "", Refused(&["`tokenizer.ggml.pre` is missing"])),
        ("missing, named", &[("pre", None)], "--pretokenizer qwen2", qwen2()),
        ("unknown", &[("pre", name("new"))], "", Refused(&["`tokenizer.ggml.pre` is `new`"])),
        ("unknown, named", &[("pre", name("new"))], "--pretokenizer qwen2", qwen2()),
        ("named wrongly", &[], "--pretokenizer new", Refused(&["--pretokenizer: `new` is unkn"])),
        (
            "another tokenizer",
            &[("model", name("bert"))],
            "",
            Refused(&["`tokenizer.ggml.model` is `bert`"]),
        ),
    ];
    let line = format!("eval --model m.gguf --data {CASES}/data2.txt --seq 512 --json");
    for (what, changes, flags, expected) in cases {
        let dir = tmp();
        gguf_case(dir.path(), changes);
        let line = line.replace(" --json", &format!(" {flags} --json"));
        match expected {
            Loss(loss, tokens) => {
                let found = run(dir.path(), &line)["evaluation"].take();
                assert!((found["loss"].as_f64().unwrap() - loss).abs() < 1e-5, "{what}: {found}");
                assert_eq!(found["tokens"]["scored"], tokens, "{what}");
            }
            Refused(parts) => refused(dir.path(), &line, parts),
        }
    }
}

fn run(dir: &Path, line: &str) -> Json {
    let out = flopaudit(dir, line).assert().success().get_output().stdout.clone();
    serde_json::from_slice(&out).unwrap()
}

#[test]
fn the_beginning_of_a_sequence_comes_first_where_the_checkpoint_says_so() {
    let dir = tmp();
    let (yes, id) = (Some(Value::Bool(true)), |id| Some(Value::U32(id)));
    let line = "generate Hello --raw --ignore-eos --max-new-tokens 8 --model m.gguf --json";
    gguf_case(dir.path(), &[("add_bos_token", yes.clone()), ("bos_token_id", id(268))]);
    // llama.cpp's.
    assert_eq!(run(dir.path(), line)["token_ids"], json!([272, 69, 254, 118, 97, 272, 7, 7]));
    let ids = |changes: &[(&str, Option<Value>)]| {
        gguf_case(dir.path(), changes);
        open(&dir.path().join("m.gguf")).unwrap().text.encode_raw("Hello").unwrap()
    };
    let plain = ids(&[]);
    let around = [vec![268], plain.clone(), vec![270]].concat();
    let both = [("add_bos_token", yes.clone()), ("add_eos_token", yes.clone())];
    assert_eq!(ids(&[&both[..], &[("bos_token_id", id(268))]].concat()), around);
    let no = Some(Value::Bool(false));
    assert_eq!(ids(&[("add_bos_token", no), ("bos_token_id", id(268))]), plain);
    gguf_case(dir.path(), &[("add_bos_token", yes)]);
    let why = "`tokenizer.ggml.bos_token_id` is missing, and `tokenizer.ggml.add_bos_token` asks";
    refused(dir.path(), line, &[why]);
    gguf_case(dir.path(), &[("pre", Some(Value::String("llama-bpe".into())))]);
    let why = "`tokenizer.ggml.bos_token_id` is missing, and `tokenizer.ggml.pre` asks for that";
    refused(dir.path(), line, &[why]);
    gguf_case(
        dir.path(),
        &[("add_bos_token", Some(Value::Bool(true))), ("bos_token_id", id(9999))],
    );
    refused(dir.path(), line, &["`tokenizer.ggml.bos_token_id` names no token"]);

    // transformers': a post-processor in tokenizer.json.
    let line = "generate Hello --raw --ignore-eos --max-new-tokens 4 --model";
    let found = run(dir.path(), &format!("{line} {CASES}/tok_bos --json"));
    assert_eq!(found["token_ids"], json!([306, 184, 158, 69]));
}

/// golden/framing.json: what transformers puts around texts.
#[derive(Deserialize)]
struct Framing {
    texts: Vec<String>,
    processors: Vec<Processor>,
}

#[derive(Deserialize)]
struct Processor {
    post_processor: Json,
    ids: Vec<Vec<u32>>,
}

/// A text side with this post-processor and tokenizer_config.json.
fn framed(processor: &Json, config: Json) -> anyhow::Result<Text> {
    let dir = tmp();
    write_text_side(dir.path(), &tiny());
    let file = dir.path().join("tokenizer.json");
    let mut tokenizer: Json = serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
    tokenizer["post_processor"] = processor.clone();
    fs::write(&file, tokenizer.to_string()).unwrap();
    let mut all = json!({"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}});
    let config = config.as_object().unwrap().clone();
    all.as_object_mut().unwrap().extend(config);
    fs::write(dir.path().join("tokenizer_config.json"), all.to_string()).unwrap();
    Text::from_directory(dir.path(), 320)
}

#[test]
fn post_processors_work_as_in_transformers() {
    let golden: Framing = golden("framing.json");
    for Processor { post_processor, ids } in &golden.processors {
        let text = framed(post_processor, json!({})).unwrap();
        let dir = tmp();
        text.save(dir.path()).unwrap();
        let saved = Text::from_directory(dir.path(), 320).unwrap();
        for (spoken, ids) in golden.texts.iter().zip(ids) {
            assert_eq!(text.encode_raw(spoken).unwrap(), *ids, "{spoken:?}, {post_processor}");
            assert_eq!(saved.encode_raw(spoken).unwrap(), *ids, "{spoken:?}, saved");
        }
    }
    assert_eq!(golden.processors.len(), 11);
}

#[test]
fn flags_and_post_processor_agree_or_are_refused() {
    let golden: Framing = golden("framing.json");
    let processor = |index: usize| &golden.processors[index].post_processor;
    // The golden file's order; ids as transformers 4 gives them for a LlamaTokenizerFast.
    let [none, bos, eos, both] = [0, 3, 4, 5].map(processor);
    let [add_bos, add_eos] = ["add_bos_token", "add_eos_token"];
    for (processor, config, expected) in [
        (none, json!({add_bos: true}), Ok(&[256, 39, 72][..])),
        (none, json!({add_eos: true}), Ok(&[39, 72, 257])),
        (none, json!({add_bos: true, add_eos: true}), Ok(&[256, 39, 72, 257])),
        (none, json!({add_bos: false, add_eos: null}), Ok(&[39, 72])),
        (bos, json!({add_bos: true}), Ok(&[256, 39, 72])),
        (bos, json!({add_bos: true, add_eos: true}), Ok(&[256, 39, 72, 257])),
        (eos, json!({add_bos: true}), Ok(&[256, 39, 72, 257])),
        (both, json!({add_bos: true, add_eos: true}), Ok(&[256, 39, 72, 257])),
        (bos, json!({add_bos: false}), Err("`add_bos_token` is false, but the post_processor")),
        (both, json!({add_eos: false}), Err("`add_eos_token` is false, but the post_processor")),
        (
            bos,
            json!({add_bos: true, "bos_token": "<|im_end|>"}),
            Err("`add_bos_token` is true for the `bos_token` `<|im_end|>`, but the post_processor"),
        ),
        (none, json!({add_bos: true, "bos_token": null}), Err("and there is no `bos_token`")),
        // A name that tokenizer.json does not have is a token of its own.
        (none, json!({add_bos: true, "bos_token": "<s>"}), Ok(&[258, 39, 72])),
        (none, json!({add_bos: "yes"}), Err("`add_bos_token` is neither true nor false")),
    ] {
        match (framed(processor, config.clone()), expected) {
            (Ok(text), Ok(ids)) => assert_eq!(text.encode_raw("Hi").unwrap(), ids, "{config}"),
            (Err(error), Err(why)) => {
                let error = one_line(&error);
                assert!(
                    error.contains("tokenizer_config.json: ") && error.contains(why),
                    "{error}"
                );
            }
            (found, _) => panic!("{config}: {found:?}"),
        }
    }
}

#[test]
fn tokens_listed_beside_the_tokenizer_are_recognised() {
    let new = |content: &str, special: bool| json!({"content": content, "special": special});
    let listed = |tokens: Json| framed(&Json::Null, json!({"added_tokens_decoder": tokens}));
    let known = json!({"256": new("<|im_start|>", true), "258": new("<new>", false)});
    let text = listed(known).unwrap();
    // transformers'.
    assert_eq!(text.encode("a<new>b").unwrap(), [64, 258, 65]);
    assert_eq!(text.decode(&[64, 258, 65], true).unwrap(), "a<new>b");
    for (tokens, why) in [
        (json!({"300": new("<new>", true)}), "`added_tokens_decoder.300` is `<new>`, which"),
        (json!({"257": new("<new>", true)}), "`added_tokens_decoder.257` is `<new>`, which"),
        (json!({"x": new("<new>", true)}), "`added_tokens_decoder.x` is no token"),
        (json!([]), "`added_tokens_decoder` is no object"),
    ] {
        let error = one_line(&listed(tokens).unwrap_err());
        assert!(error.contains("tokenizer_config.json: ") && error.contains(why), "{error}");
    }
    let error = framed(&Json::Null, json!({"split_special_tokens": true})).unwrap_err();
    assert!(one_line(&error).contains("`split_special_tokens` is true, which is not supported"));
}

/// The case `base` with these files of its tokenizer; what cannot be read is a line.
fn special(config: &Json, map: Option<&Json>, vocab: usize) -> Result<Text, String> {
    let dir = tmp();
    fs::copy(format!("{CASES}/base/tokenizer.json"), dir.path().join("tokenizer.json")).unwrap();
    fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    if let Some(map) = map {
        fs::write(dir.path().join("special_tokens_map.json"), map.to_string()).unwrap();
    }
    Text::from_directory(dir.path(), vocab).map_err(|error| one_line(&error))
}

#[test]
fn special_tokens_are_those_that_transformers_finds() {
    const TEMPLATE: &str =
        "{{ bos_token }},{{ eos_token }},{{ pad_token }},{{ image_token }},{{ x_token }}";
    let [im_end, im_start, end] = ["<|im_end|>", "<|im_start|>", "<|endoftext|>"];
    // (config, map, the ids of `<x>`, `<y>` and `Hello` or None where they are text, the names), as
    // transformers' PreTrainedTokenizerFast has them.
    type Ids = [Option<u32>; 3];
    let none: Ids = [None; 3];
    let (x, y): (Ids, Ids) = ([Some(261), None, None], [None, Some(261), None]);
    let both = [Some(261), Some(262), None];
    for (mut config, map, ids, names) in [
        (json!({}), None, none, ",,,,"),
        (
            json!({}),
            Some(json!({"bos_token": end, "eos_token": {"content": im_end, "lstrip": false}})),
            none,
            "<|endoftext|>,<|im_end|>,,,",
        ),
        // The map takes the config's place, unless there is an added_tokens_decoder.
        (
            json!({"eos_token": end, "bos_token": im_start}),
            Some(json!({"eos_token": im_end, "bos_token": null})),
            none,
            ",<|im_end|>,,,",
        ),
        (
            json!({"eos_token": end, "added_tokens_decoder": {}}),
            Some(json!({"eos_token": im_end, "bos_token": im_start})),
            none,
            ",<|endoftext|>,,,",
        ),
        (json!({"additional_special_tokens": ["<x>", "<y>"]}), None, both, ",,,,"),
        (json!({"additional_special_tokens": [im_start]}), None, none, ",,,,"),
        (json!({"extra_special_tokens": ["<x>"]}), None, x, ",,,,"),
        (json!({"extra_special_tokens": {"x_token": "<x>"}}), None, x, ",,,,<x>"),
        (json!({"image_token": "<x>"}), None, x, ",,,<x>,"),
        (
            json!({"extra_special_tokens": ["<x>"], "additional_special_tokens": ["<y>"]}),
            None,
            x,
            ",,,,",
        ),
        (
            json!({"extra_special_tokens": {"x_token": "<x>"}, "additional_special_tokens": ["<y>"]}),
            None,
            both,
            ",,,,<x>",
        ),
        (
            json!({"pad_token": "<y>", "eos_token": "<x>", "image_token": "Hello"}),
            None,
            [Some(261), Some(262), Some(263)],
            ",<x>,<y>,Hello,",
        ),
        (json!({}), Some(json!({"additional_special_tokens": ["<y>"]})), y, ",,,,"),
        (
            json!({"additional_special_tokens": ["<x>"]}),
            Some(json!({"additional_special_tokens": ["<y>"]})),
            x,
            ",,,,",
        ),
        (
            json!({"additional_special_tokens": ["<x>"]}),
            Some(json!({"extra_special_tokens": ["<y>"]})),
            both,
            ",,,,",
        ),
        (json!({"image_token": "<x>"}), Some(json!({"image_token": "<y>"})), x, ",,,<x>,"),
    ] {
        config["chat_template"] = TEMPLATE.into();
        let text = special(&config, map.as_ref(), 1024).unwrap();
        for (token, id) in ["<x>", "<y>", "Hello"].into_iter().zip(ids) {
            let found = text.encode(token).unwrap();
            let bytes: Vec<u32> = token.bytes().map(u32::from).collect();
            assert_eq!(found, id.map_or(bytes, |id| vec![id]), "{token} of {config}");
        }
        assert_eq!(text.chat(None, "").unwrap(), names, "{config}");
    }
    // The document's end and the flags know of the map too.
    let map = json!({"bos_token": end, "eos_token": im_end});
    let text = special(&json!({"add_bos_token": true}), Some(&map), 1024).unwrap();
    let id = |token: &str| text.encode(token).unwrap()[0];
    assert_eq!(text.encode_document("a").unwrap(), [id(end), 97, id(im_end)]);
    // A space before the token is part of it where its flag says so.
    let stripped = json!({"eos_token": {"content": "<x>", "lstrip": true, "normalized": false}});
    assert_eq!(special(&stripped, None, 1024).unwrap().encode("a <x>").unwrap(), [97, 261]);
}

#[test]
fn what_no_tokenizer_can_be_is_refused_by_name() {
    for (config, map, why) in [
        (json!({"pad_token": 5}), None, "tokenizer_config.json: `pad_token` is 5, which is no tok"),
        (json!({"extra_special_tokens": 1}), None, "`extra_special_tokens` is neither a list"),
        (json!({"additional_special_tokens": [1]}), None, "holds 1, which is no token"),
        (json!({}), Some(json!([])), "special_tokens_map.json: is no JSON object"),
        (json!({}), Some(json!({"eos_token": 1})), "special_tokens_map.json: `eos_token` is 1"),
        (
            json!({"add_prefix_space": true}),
            None,
            "`add_prefix_space` is true, but tokenizer.json adds no space",
        ),
        (json!({"add_prefix_space": 1}), None, "`add_prefix_space` is 1, neither true nor false"),
    ] {
        let error = special(&config, map.as_ref(), 1024).unwrap_err();
        assert!(error.contains(why), "{error}");
    }
    special(&json!({"add_prefix_space": false}), None, 1024).unwrap();
    // A token that is added beyond the model's own is refused where a text has it.
    let text = special(&json!({"eos_token": "<x>"}), None, 261).unwrap();
    for error in [text.encode("<x>").unwrap_err(), text.encode_document("a").unwrap_err()] {
        assert!(one_line(&error).contains("`<x>`, a token that the model does not have"));
    }
}

#[test]
fn a_ggufs_template_knows_its_special_tokens() {
    let dir = tmp();
    let template = "{{ pad_token }},{{ unk_token }},{{ mask_token }},{{ eos_token }}";
    let id = |id| Some(Value::U32(id));
    gguf_case(dir.path(), &[("padding_token_id", id(268)), ("unknown_token_id", id(269))]);
    let file = dir.path().join("m.gguf");
    let mut text = open(&file).unwrap().text;
    fs::write(dir.path().join("a.jinja"), template).unwrap();
    text.choose_template(dir.path().join("a.jinja").to_str().unwrap()).unwrap();
    let token = |id: u32| text.decode(&[id], false).unwrap();
    let names = format!("{},{},,{}", token(268), token(269), token(270));
    assert_eq!(text.chat(None, "").unwrap(), names);
    // What templates are given is not listed as unused.
    let line = "eval --model m.gguf --data data.txt --seq 8 --json";
    fs::write(dir.path().join("data.txt"), "Some text.").unwrap();
    let ignored = run(dir.path(), line)["ignored"].to_string();
    assert!(!ignored.contains("padding_token_id"), "{ignored}");
}

#[test]
fn documents_have_what_goes_around_a_text_and_chats_what_their_template_writes() {
    let golden: Framing = golden("framing.json");
    let chat = "{{ bos_token }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}";
    let config = json!({"chat_template": chat, "eos_token": "<|im_end|>"});
    let bos = framed(&golden.processors[3].post_processor, config.clone()).unwrap();
    let both = framed(&golden.processors[5].post_processor, config).unwrap();
    let dir = tmp();
    let stream = |text: &Text, name: &str, content: &str| {
        let file = dir.path().join(name);
        fs::write(&file, content).unwrap();
        let options = Options { seq: 64, mask_prompt: false, packing: false, cache: None };
        let data = Dataset::load(&file, text, &options).unwrap();
        let batch = data.batch(&[0]);
        [&batch.ids[..1], &batch.targets[..data.tokens() - 1]].concat()
    };
    let documents = "{\"text\": \"Hi\"}\n{\"text\": \"a<|im_end|>\"}\n";
    let chat = "{\"messages\": [{\"role\": \"user\", \"content\": \"Hi\"}]}\n";
    let (hi, a) = ([39, 72], [64]);
    for text in [&bos, &both] {
        // A document's end is there once, whoever writes it.
        let twice = if std::ptr::eq(text, &both) { vec![257] } else { vec![] };
        let all = [&[256][..], &hi, &[257, 256], &a, &[257], &twice].concat();
        assert_eq!(stream(text, "d.jsonl", documents), all);
        assert_eq!(stream(text, "c.jsonl", chat), [256, 39, 72, 257]);
    }
    assert_eq!(stream(&bos, "a.txt", "Hi"), [256, 39, 72]);
    assert_eq!(stream(&both, "a.txt", "Hi"), [256, 39, 72, 257]);
    assert_eq!(bos.encode(&bos.chat(None, "Hi").unwrap()).unwrap(), [256, 39, 72, 257]);
}

#[test]
fn a_newline_from_a_pipe_is_no_part_of_the_prompt() {
    let dir = tmp();
    let line = format!("--raw --ignore-eos --model {CASES}/tok_bos --max-new-tokens 3 --json");
    let said = |prompt: &[u8]| {
        let mut command = flopaudit(dir.path(), &format!("generate - {line}"));
        let out = command.write_stdin(prompt).assert().success().get_output().stdout.clone();
        let report: Json = serde_json::from_slice(&out).unwrap();
        (report["sequences"][0]["prompt_tokens"].clone(), report["token_ids"].clone())
    };
    let plain = run(dir.path(), &format!("generate Hi {line}"));
    let plain = (plain["sequences"][0]["prompt_tokens"].clone(), plain["token_ids"].clone());
    for piped in [&b"Hi"[..], b"Hi\n", b"Hi\r\n", b"\xef\xbb\xbfHi\n"] {
        assert_eq!(said(piped), plain, "{piped:?}");
    }
    // BOS, H, i, and what else is there.
    for (piped, tokens) in [(&b"Hi\n\n"[..], 4), (b"Hi\r", 4), (b"Hi \n", 4), (b"\nHi\n", 4)] {
        assert_eq!(said(piped).0, tokens, "{piped:?}");
    }
    for (piped, why) in
        [(&b"\n"[..], "prompt: is empty"), (b"a\xff", "prompt: stdin: is not UTF-8")]
    {
        let mut command = flopaudit(dir.path(), &format!("generate - {line}"));
        let assert = command.write_stdin(piped).assert().code(2);
        let stderr = String::from_utf8_lossy(&assert.get_output().stderr).into_owned();
        assert!(stderr.contains(why), "{stderr}");
    }
}

/// Every file of text in `dir`, with a byte order mark before it.
fn mark(dir: &Path) {
    for file in fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()) {
        let text = ["json", "jinja", "toml", "txt", "jsonl"];
        if file.extension().is_some_and(|end| text.iter().any(|text| end == *text)) {
            fs::write(&file, [b"\xef\xbb\xbf", &fs::read(&file).unwrap()[..]].concat()).unwrap();
        }
    }
}

const PLAN: &str = "budget = '1e15 FLOP'\npreset = 'tiny'\n\n\
                    [[experiment]]\nname = 'one'\nkind = 'evaluate'\nseq = 8\n";

#[test]
fn a_byte_order_mark_is_no_text() {
    let sharded = sharded(&tiny(), &tensors(&tiny()));
    let dir = sharded.path();
    let config = json!({"eos_token": "<|im_end|>", "bos_token": "<|im_start|>"});
    for (name, text) in [
        ("tokenizer_config.json", &*config.to_string()),
        ("generation_config.json", "{\"eos_token_id\": 257}"),
        ("chat_template.jinja", CHAT),
        ("prompts.txt", "Hi\n"),
        ("data.txt", "Some text."),
        ("data.jsonl", "{\"text\": \"Some text.\"}\n"),
        ("prices.toml", "name = \"mine\"\nmac = 2\n"),
        ("plan.toml", PLAN),
    ] {
        fs::write(dir.join(name), text).unwrap();
    }
    let lines = [
        "generate --prompts prompts.txt --raw --model . --max-new-tokens 2 --no-audit --json",
        "generate Hi --model . --max-new-tokens 2 --no-audit --json",
        "eval --model . --data data.txt --seq 16 --json",
        "eval --model . --data data.jsonl --seq 16 --json",
        "count forward --config config.json --seq 8 --prices prices.toml --json",
        "plan plan.toml --json",
    ];
    let kept = |line: &str| {
        let mut found = run(dir, line);
        found["timings"].take();
        for timed in ["seconds", "tokens_per_s"] {
            found["evaluation"][timed].take();
        }
        found
    };
    let plain = lines.map(kept);
    mark(dir);
    assert_eq!(lines.map(kept), plain);
    // Another mark than UTF-8's is another encoding.
    fs::write(dir.join("data.txt"), b"\xff\xfeH\0i\0").unwrap();
    refused(dir, lines[2], &["data.txt: is UTF-16; save it as UTF-8"]);
}

fn suggested(config: &Json) -> anyhow::Result<Sampling> {
    let dir = tmp();
    write_text_side(dir.path(), &tiny());
    fs::write(dir.path().join("generation_config.json"), config.to_string()).unwrap();
    Text::from_directory(dir.path(), 320)?.suggested().unwrap().sampling()
}

#[test]
fn a_checkpoints_sampling_is_taken_whole_or_refused_by_name() {
    let drawn = |temperature, top_k, top_p, repeat_penalty| Sampling {
        temperature,
        top_k,
        top_p,
        repeat_penalty,
    };
    // What transformers' `generate` does with such files.
    for (config, expected) in [
        // Qwen2.5-0.5B-Instruct's and gemma-3-1b-it's own.
        (
            json!({"bos_token_id": 3, "pad_token_id": 3, "do_sample": true, "eos_token_id": [257, 3],
                "repetition_penalty": 1.1, "temperature": 0.7, "top_p": 0.8, "top_k": 20,
                "transformers_version": "4.37.0"}),
            Ok(drawn(0.7, Some(20), Some(0.8), 1.1)),
        ),
        (
            json!({"cache_implementation": "hybrid", "do_sample": true, "top_k": 64, "top_p": 0.95}),
            Ok(drawn(1.0, Some(64), Some(0.95), 1.0)),
        ),
        (json!({"do_sample": true}), Ok(drawn(1.0, Some(50), None, 1.0))),
        (json!({"do_sample": true, "top_k": 0, "top_p": 1.0}), Ok(drawn(1.0, None, None, 1.0))),
        (json!({"eos_token_id": 257}), Ok(Sampling::GREEDY)),
        (json!({"temperature": 0.6, "top_p": 0.9}), Ok(Sampling::GREEDY)),
        (json!({"do_sample": false, "repetition_penalty": 1.2}), Ok(drawn(0.0, None, None, 1.2))),
        (
            json!({"do_sample": null, "min_p": 0.0, "num_beams": 1, "typical_p": 1.0,
                "suppress_tokens": [], "_from_model_config": true}),
            Ok(Sampling::GREEDY),
        ),
        // What narrows a draw does nothing without one, and what is off does nothing at all.
        (json!({"min_p": 0.05, "typical_p": 0.9}), Ok(Sampling::GREEDY)),
        (
            json!({"trust_remote_code": false, "new": null, "other": [], "_name": 3}),
            Ok(Sampling::GREEDY),
        ),
        (json!({"trust_remote_code": true}), Err("`trust_remote_code` is unknown")),
        (json!({"do_sample": true, "min_p": 0.05}), Err("`min_p` is 0.05, which is not supported")),
        (json!({"num_beams": 4}), Err("`num_beams` is 4, which is not supported")),
        (json!({"suppress_tokens": [0]}), Err("`suppress_tokens` is [0], which is not")),
        (json!({"forced_bos_token_id": 0}), Err("`forced_bos_token_id` is 0, which is not")),
        (json!({"new_penalty": 0.5}), Err("`new_penalty` is unknown")),
        (json!({"do_sample": "yes"}), Err("`do_sample` is neither true nor false")),
        (json!({"do_sample": true, "temperature": 0}), Err("`temperature` is 0, while")),
        (json!({"do_sample": true, "temperature": -1.5}), Err("`temperature` -1.5 is neither")),
        (json!({"do_sample": true, "top_p": 1.5}), Err("`top_p` 1.5 is not in (0, 1]")),
        (json!({"do_sample": true, "top_k": -1}), Err("`top_k` is not a count")),
        (json!({"repetition_penalty": 0}), Err("`repetition_penalty` 0 is not a usable")),
        (json!([]), Err("generation_config.json: is no JSON object")),
    ] {
        match (suggested(&config), expected) {
            (Ok(found), Ok(sampling)) => assert_eq!(found, sampling, "{config}"),
            (Err(error), Err(why)) => {
                let error = one_line(&error);
                let named = error.contains("generation_config.json: ") && error.contains(why);
                assert!(named, "{error}");
            }
            (found, _) => panic!("{config}: {found:?}"),
        }
    }
}

#[test]
fn a_ggufs_sampling_is_its_own_keys() {
    let float = Value::F32;
    for (keys, expected) in [
        (
            &[("temp", float(0.6)), ("top_k", Value::I32(20)), ("top_p", float(0.95))][..],
            Ok(Sampling {
                temperature: 0.6,
                top_k: Some(20),
                top_p: Some(0.95),
                ..Sampling::GREEDY
            }),
        ),
        (&[("temp", float(0.0))], Ok(Sampling::GREEDY)),
        (&[("temp", float(1.0))], Ok(Sampling { temperature: 1.0, ..Sampling::GREEDY })),
        (&[("min_p", float(0.05))], Err("`min_p` is 0.05")),
        (&[("mirostat", Value::I32(2))], Err("`mirostat` is 2")),
    ] {
        let dir = tmp();
        let mut metadata = metadata(&tiny());
        let keys = keys.iter().map(|(key, value)| (format!("general.sampling.{key}"), value));
        metadata.extend(keys.map(|(key, value)| (key, value.clone())));
        write_gguf(&dir.path().join("m.gguf"), &metadata, &tensors(&tiny()), GgmlDType::F32);
        let text = open(dir.path()).unwrap().text;
        match (text.suggested().unwrap().sampling(), expected) {
            (Ok(found), Ok(sampling)) => assert_eq!(found, sampling),
            (Err(error), Err(why)) => assert!(one_line(&error).contains(why), "{error}"),
            (found, _) => panic!("{found:?}"),
        }
    }
}

#[test]
fn the_suggestion_is_reported_and_taken_on_request() {
    let dir = tmp();
    for file in fs::read_dir(format!("{CASES}/tok_bos")).unwrap().map(Result::unwrap) {
        fs::copy(file.path(), dir.path().join(file.file_name())).unwrap();
    }
    let line = "generate Hi --raw --ignore-eos --model . --max-new-tokens 6 --seed 3";
    let (json, checkpoint) = (format!("{line} --json"), format!("{line} --sampling checkpoint"));
    refused(dir.path(), &checkpoint, &["--sampling checkpoint: . suggests none"]);

    let config = json!({"do_sample": true, "temperature": 1.5, "top_k": 40, "top_p": 0.9,
        "repetition_penalty": 1.3, "eos_token_id": 258});
    fs::write(dir.path().join("generation_config.json"), config.to_string()).unwrap();
    let greedy = run(dir.path(), &json);
    assert_eq!(greedy["checkpoint_sampling"]["values"], config);
    assert_eq!(greedy["checkpoint_sampling"]["taken"], false);
    let taken = run(dir.path(), &format!("{checkpoint} --json"));
    assert_eq!(taken["checkpoint_sampling"]["taken"], true);
    assert_eq!(taken["balanced"], true);
    assert_ne!(taken["token_ids"], greedy["token_ids"]);
    let flags = "--temperature 1.5 --top-k 40 --top-p 0.9 --repeat-penalty 1.3";
    let by_hand = run(dir.path(), &format!("{line} {flags} --json"));
    for key in ["token_ids", "workload", "total_flops"] {
        assert_eq!(taken[key], by_hand[key], "{key}");
    }
    refused(dir.path(), &format!("{checkpoint} --top-k 3"), &["--sampling", "--top-k"]);

    let out = flopaudit(dir.path(), line).assert().success().get_output().stdout.clone();
    let out = String::from_utf8(out).unwrap();
    assert!(
        out.contains("suggested do_sample true, repetition_penalty 1.3, temperature 1.5"),
        "{out}"
    );
    assert!(out.contains("--sampling checkpoint"), "{out}");

    // Weights of a run without --model.
    fs::create_dir(dir.path().join("weights")).unwrap();
    for name in ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"] {
        fs::copy(dir.path().join(name), dir.path().join("weights").join(name)).unwrap();
    }
    let doctor = flopaudit(dir.path(), "doctor --json").output().unwrap();
    let doctor: Json = serde_json::from_slice(&doctor.stdout).unwrap();
    let findings = doctor["findings"].as_array().unwrap();
    let found = findings.iter().find(|finding| finding["subject"] == "sampling").unwrap();
    assert_eq!(found["status"], "ok");
    assert!(found["found"].as_str().unwrap().contains("temperature 1.5"), "{found}");
}
