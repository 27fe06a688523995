//! Training data: files of text and of conversations, as rows of tokens.

mod checkpoints;

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use checkpoints::*;
use flopaudit::{
    text::{Chat, Message, Text},
    train::data::{Batch, Dataset, Options},
};
use proptest::prelude::*;
use serde_json::json;

/// Earlier answers lose what stands before `/`, as reasoning models' templates do to thoughts.
const FORGETFUL: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n\
    {{ m.content if loop.last else m.content.split('/')[-1] }}<|im_end|>\n\
    {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

fn options(seq: usize) -> Options {
    Options { seq, mask_prompt: false, packing: false, cache: None }
}

fn masked(seq: usize) -> Options {
    Options { mask_prompt: true, ..options(seq) }
}

/// A byte-level tokenizer with `<|im_start|>` = 256 and `<|im_end|>` = 257, which ends sequences.
fn text(template: &str) -> Text {
    let dir = tempfile::tempdir().unwrap();
    write_text_side(dir.path(), &tiny());
    let config = json!({"eos_token": "<|im_end|>", "chat_template": template});
    fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    Text::from_directory(dir.path(), tiny().vocab_size).unwrap()
}

/// What `content` in a file of this name gives.
fn load(name: &str, content: &[u8], text: &Text, options: &Options) -> anyhow::Result<Dataset> {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join(name);
    fs::write(&file, content).unwrap();
    Dataset::load(&file, text, options)
}

/// The one line that loading gives, from the file's name on.
fn refused(name: &str, content: &[u8], text: &Text, options: &Options) -> String {
    let line = one_line(&load(name, content, text, options).unwrap_err());
    line.rsplit_once(std::path::MAIN_SEPARATOR).map_or(line.clone(), |(_, rest)| rest.into())
}

fn message(role: &str, content: &str) -> Message {
    Message::new(role, content)
}

/// Lines of conversations.
fn chats(conversations: &[&[Message]]) -> String {
    conversations.iter().map(|c| json!({"messages": c}).to_string() + "\n").collect()
}

fn all(dataset: &Dataset) -> Batch {
    dataset.batch(&(0..dataset.rows()).collect::<Vec<_>>())
}

/// The text of the targets that count.
fn learned(text: &Text, batch: &Batch) -> String {
    let counted = batch.targets.iter().zip(&batch.weights).filter(|(_, weight)| **weight == 1.0);
    let ids: Vec<u32> = counted.map(|(id, _)| *id).collect();
    text.decode(&ids, false).unwrap()
}

fn conversation() -> Vec<Message> {
    vec![
        message("system", "Be brief."),
        message("user", "Hi"),
        message("assistant", " Grüße,\n🦀"),
        message("user", "Bye"),
        message("assistant", "\n"),
    ]
}

proptest! {
    #[test]
    fn windows_are_the_stream_and_predict_each_token_but_the_first_once(
        chars in prop::collection::vec(any::<char>().prop_filter("binary", |c| *c != '\0'), 1..60),
        seq in 1usize..90,
    ) {
        let source: String = ['x', 'y'].into_iter().chain(chars).collect();
        let dataset = load("a.txt", source.as_bytes(), &Text::bytes(256), &options(seq)).unwrap();
        let stream: Vec<u32> = source.bytes().map(u32::from).collect();
        prop_assert_eq!((dataset.tokens(), dataset.seq()), (stream.len(), seq));
        prop_assert_eq!(dataset.loss_tokens(), stream.len() - 1);
        prop_assert_eq!(dataset.rows(), (stream.len() - 1).div_ceil(seq));

        let Batch { ids, targets, weights, .. } = all(&dataset);
        // As wide as the longest row.
        prop_assert_eq!(ids.len(), dataset.rows() * seq.min(stream.len() - 1));
        let (real, padding) = weights.split_at(stream.len() - 1);
        prop_assert!(real.iter().all(|w| *w == 1.0) && padding.iter().all(|w| *w == 0.0));
        prop_assert_eq!(&ids[..real.len()], &stream[..real.len()]);
        prop_assert_eq!(&targets[..real.len()], &stream[1..]);
    }

    #[test]
    fn masked_or_not_a_conversation_is_fed_as_the_template_renders_it(
        contents in prop::collection::vec("[ \n<|a-cé/]{0,8}", 1..6),
    ) {
        let text = text(CHAT);
        let role = |i: usize| if i.is_multiple_of(2) { "user" } else { "assistant" };
        let messages: Vec<Message> =
            contents.iter().enumerate().map(|(i, c)| message(role(i), c)).collect();
        let whole = text.encode(&text.render(&Chat::new(&messages[..]), false).unwrap()).unwrap();
        let file = chats(&[&messages]);
        let plain = load("a.jsonl", file.as_bytes(), &text, &options(200)).unwrap();
        let batch = all(&plain);
        prop_assert_eq!(&batch.ids[..whole.len() - 1], &whole[..whole.len() - 1]);
        prop_assert_eq!(&batch.targets[..whole.len() - 1], &whole[1..]);
        prop_assert_eq!((plain.loss_tokens(), plain.tokens()), (whole.len() - 1, whole.len()));

        if messages.len() > 1 {
            let masked = all(&load("a.jsonl", file.as_bytes(), &text, &masked(200)).unwrap());
            prop_assert_eq!((&masked.ids, &masked.targets), (&batch.ids, &batch.targets));
            let said: String = messages
                .iter()
                .filter(|m| m.role() == "assistant")
                .zip(contents.iter().skip(1).step_by(2))
                .map(|(_, content)| format!("{content}<|im_end|>"))
                .collect();
            prop_assert_eq!(learned(&text, &masked), said);
        }
    }
}

#[test]
fn documents_are_packed_and_each_ends_with_the_end_of_sequence() {
    let lines = "{\"text\": \"ab\"}\n\n{\"text\": \"\"}\n{\"text\": \"<|im_start|>c\"}";
    let speaks = text(CHAT);
    let ids = |s: &str| speaks.encode(s).unwrap();
    let dataset = load("a.jsonl", lines.as_bytes(), &speaks, &options(4)).unwrap();
    let stream = ids("ab<|im_end|><|im_end|><|im_start|>c<|im_end|>");
    let batch = all(&dataset);
    assert_eq!((dataset.rows(), dataset.tokens(), dataset.loss_tokens()), (2, 7, 6));
    assert_eq!((&batch.ids[..6], &batch.targets[..6]), (&stream[..6], &stream[1..]));
    // The stand-in has none.
    let dataset = load("a.NDJSON", lines.as_bytes(), &Text::bytes(256), &options(40)).unwrap();
    assert_eq!(dataset.tokens(), "ab<|im_start|>c".len());
}

#[test]
fn a_masked_row_counts_what_the_assistant_says_and_its_end_of_turn() {
    let speaks = text(CHAT);
    let file = chats(&[&conversation(), &conversation()[..3]]);
    let dataset = load("a.jsonl", file.as_bytes(), &speaks, &masked(150)).unwrap();
    assert_eq!(dataset.rows(), 2);
    let first = dataset.batch(&[0]);
    assert_eq!(learned(&speaks, &first), " Grüße,\n🦀<|im_end|>\n<|im_end|>");
    let second = dataset.batch(&[1]);
    assert_eq!(learned(&speaks, &second), " Grüße,\n🦀<|im_end|>");
    let counted = first.weights.iter().chain(&second.weights).filter(|w| **w == 1.0).count();
    assert_eq!(dataset.loss_tokens(), counted);

    // Without an end-of-turn token in the turn, all of it counts.
    let speaks = text(&CHAT.replace("<|im_end|>", "."));
    let dataset = load("a.jsonl", file.as_bytes(), &speaks, &masked(150)).unwrap();
    assert_eq!(learned(&speaks, &dataset.batch(&[1])), " Grüße,\n🦀.\n");
    // Spelt in what is said, it ends nothing.
    let file = chats(&[&[message("user", "a"), message("assistant", "b<|im_end|>c")]]);
    let dataset = load("a.jsonl", file.as_bytes(), &speaks, &masked(150)).unwrap();
    assert_eq!(learned(&speaks, &all(&dataset)), "b<|im_end|>c.\n");
}

#[test]
fn conversations_that_cannot_be_rows_are_told_with_their_line() {
    let turn = conversation();
    let good = chats(&[&turn[1..3]]);
    let after_good = |messages: &[Message], text: &Text, options: &Options| {
        refused("a.jsonl", format!("{good}\n{}", chats(&[messages])).as_bytes(), text, options)
    };
    let speaks = text(CHAT);
    let n = speaks.encode(&speaks.render(&Chat::new(&turn[..]), false).unwrap()).unwrap().len();
    assert_eq!(
        after_good(&turn, &speaks, &options(n - 2)),
        format!(
            "a.jsonl: line 3: has {n} tokens, and --seq {} takes {}; raise --seq to {} or shorten it",
            n - 2,
            n - 1,
            n - 1
        )
    );
    let file = chats(&[&turn]);
    assert_eq!(load("a.jsonl", file.as_bytes(), &speaks, &options(n - 1)).unwrap().rows(), 1);

    assert_eq!(
        after_good(&turn[..2], &speaks, &masked(200)),
        "a.jsonl: line 3: has no assistant turn, and --mask-prompt trains on nothing else"
    );
    assert_eq!(
        refused("a.jsonl", good.as_bytes(), &Text::bytes(256), &options(200)),
        "a.jsonl: line 1: the model has no chat template"
    );
    let strict = text(
        "{% for m in messages %}{% if m.role not in ['user', 'assistant'] %}\
                       {{ raise_exception('no ' + m.role) }}{% endif %}{{ m.content }}{% endfor %}",
    );
    assert_eq!(
        after_good(&turn, &strict, &options(200)),
        "a.jsonl: line 3: the checkpoint's chat template fails: no system (its line 1)"
    );
    assert_eq!(
        after_good(&[message("assistant", "x")], &strict, &options(200)),
        "a.jsonl: line 3: has no token to train on"
    );
}

#[test]
fn templates_that_hide_the_prompt_are_told() {
    let thoughts = [
        message("user", "a"),
        message("assistant", "hm/b"),
        message("user", "c"),
        message("assistant", "d"),
    ];
    let forgetful = text(FORGETFUL);
    let file = chats(&[&thoughts]);
    let one_answer = chats(&[&thoughts[..2]]);
    let dataset = load("a.jsonl", one_answer.as_bytes(), &forgetful, &masked(200)).unwrap();
    assert_eq!(learned(&forgetful, &all(&dataset)), "hm/b<|im_end|>");
    // What a template forgets is not learnt; what it keeps is.
    let dataset = load("a.jsonl", file.as_bytes(), &forgetful, &masked(200)).unwrap();
    assert_eq!(learned(&forgetful, &all(&dataset)), "b<|im_end|>d<|im_end|>");
    // What ends a turn is not to be told from what it says, where the template writes no end.
    let endless = text(&FORGETFUL.replace("<|im_end|>\n", "\n"));
    let why = "cannot find it, as the chat template renders what comes up to it otherwise alone than \
               in the whole: end the conversation with it, or put {% generation %} around what the \
               template writes of an answer, and give that as --template";
    assert_eq!(
        refused("a.jsonl", file.as_bytes(), &endless, &masked(200)),
        format!("a.jsonl: line 1: message 2: --mask-prompt {why}")
    );
    assert!(load("a.jsonl", file.as_bytes(), &endless, &options(200)).is_ok());
    // Nor where it changes what comes before by what is said.
    let echoes = text(&format!("{{{{ messages[-1].content }}}}{FORGETFUL}"));
    let error = refused("a.jsonl", file.as_bytes(), &echoes, &masked(200));
    assert_eq!(error, format!("a.jsonl: line 1: message 2: --mask-prompt {why}"));

    let first = text("{{ messages[0].content.strip() }}");
    let file = chats(&[&[message("assistant", "alone")]]);
    assert_eq!(
        refused("a.jsonl", file.as_bytes(), &first, &masked(200)),
        "a.jsonl: line 1: message 1: --mask-prompt needs what comes up to it alone: the \
         checkpoint's chat template fails: `messages[0]` is undefined (its line 1)"
    );
}

#[test]
fn files_that_cannot_be_rows_are_refused() {
    let bytes = Text::bytes(256);
    let some = options(8);
    let empty = "is empty: there is no text in it";
    assert_eq!(refused("a.txt", b"", &bytes, &some), format!("a.txt: {empty}"));
    assert_eq!(refused("a.txt", b" \n\t\n", &bytes, &some), format!("a.txt: {empty}"));
    assert_eq!(refused("a.jsonl", b"\n\n", &bytes, &some), format!("a.jsonl: {empty}"));
    let one = "makes fewer than two tokens, one to feed and one to predict";
    assert_eq!(refused("a", b"x", &bytes, &some), format!("a: {one}"));
    assert_eq!(refused("a.jsonl", br#"{"text":"x"}"#, &bytes, &some), format!("a.jsonl: {one}"));
    assert_eq!(
        refused("a.txt", b"ab\n\xffc", &bytes, &some),
        "a.txt: line 2: is not UTF-8 (byte 3 of the file)"
    );
    assert_eq!(
        refused("a.jsonl", b"{\"text\": \"ab\"}\n{\"text\": }", &bytes, &some),
        "a.jsonl: line 2: not valid JSON: expected value (column 10)"
    );
    assert_eq!(
        one_line(&load("a.txt", b"ab", &bytes, &options(0)).unwrap_err()),
        "--seq: must be at least 1"
    );
    for (name, content) in [("a.txt", "abc"), ("a.jsonl", "{\"text\": \"abc\"}")] {
        let error = one_line(&load(name, content.as_bytes(), &bytes, &masked(8)).unwrap_err());
        assert!(error.starts_with("--mask-prompt: "), "{error}");
        assert!(error.ends_with(&format!(
            "{name} holds text; only conversations and completions have prompts"
        )));
    }
    let missing = Path::new("no/such/file.txt");
    let error = one_line(&Dataset::load(missing, &bytes, &some).unwrap_err());
    assert!(error.starts_with("no/such/file.txt: No such file"), "{error}");
}

#[test]
fn tokens_are_kept_and_a_damaged_cache_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let (file, cache) = (dir.path().join("a.jsonl"), dir.path().join("cache"));
    let speaks = text(CHAT);
    let options = Options { cache: Some(cache.clone()), ..masked(200) };
    fs::write(&file, chats(&[&conversation()])).unwrap();
    let load = |text: &Text, options: &Options| Dataset::load(&file, text, options).unwrap();
    let entries = || -> Vec<PathBuf> {
        fs::read_dir(&cache).unwrap().map(|entry| entry.unwrap().path()).collect()
    };
    let dataset = load(&speaks, &options);
    let [kept] = &entries()[..] else { panic!("one entry") };
    let bytes = fs::read(kept).unwrap();
    assert_eq!(load(&speaks, &options), dataset);
    assert_eq!(entries().len(), 1);

    for damaged in [&bytes[..bytes.len() - 1], b"", b"something else"] {
        fs::write(kept, damaged).unwrap();
        assert_eq!(load(&speaks, &options), dataset);
        assert_eq!(fs::read(kept).unwrap(), bytes);
    }

    // Whatever the rows depend on has an entry of its own.
    load(&speaks, &Options { seq: 201, ..options.clone() });
    load(&speaks, &Options { mask_prompt: false, ..options.clone() });
    load(&text(&CHAT.replace("start", "begin")), &options);
    load(&text(FORGETFUL), &Options { mask_prompt: false, ..options.clone() });
    assert_eq!(entries().len(), 5);
    fs::write(&file, chats(&[&conversation()[..3]])).unwrap();
    assert_ne!(load(&speaks, &options), dataset);
    assert_eq!(entries().len(), 6);

    // A cache that cannot be.
    let nowhere = Options { cache: Some(file.join("cache")), ..options };
    assert_eq!(load(&speaks, &nowhere).rows(), 1);
}

#[test]
fn the_trained_checkpoints_template_masks_its_prompts() {
    let path = env::var("FLOPAUDIT_WEIGHTS").unwrap_or_else(|_| "weights/model.gguf".into());
    if !Path::new(&path).exists() {
        let skip = env::var("FLOPAUDIT_NO_WEIGHTS").is_ok_and(|v| v == "1");
        assert!(skip, "no {path}: run scripts/fetch-weights.sh");
        eprintln!("SKIPPED: no {path}, and FLOPAUDIT_NO_WEIGHTS=1");
        return;
    }
    let text = open(Path::new(&path)).unwrap().text;
    // A newline that the tokenizer joins with the template's before it.
    let mut messages = conversation();
    messages[4] = message("assistant", "\nfn main() {}\n\n");
    let dataset = load("a.jsonl", chats(&[&messages]).as_bytes(), &text, &masked(150)).unwrap();
    let whole = text.encode(&text.render(&Chat::new(&messages[..]), false).unwrap()).unwrap();
    let batch = all(&dataset);
    assert_eq!(batch.targets[..whole.len() - 1], whole[1..]);
    let said = learned(&text, &batch);
    assert_eq!(said, " Grüße,\n🦀<|im_end|>\n\nfn main() {}\n\n<|im_end|>");
}
