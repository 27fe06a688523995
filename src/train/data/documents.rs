//! What a file of training data holds.

use serde::Deserialize;
use serde_json::{Value as Json, error::Category};

use crate::text::Message;

/// One text, or documents of one kind, each with the number of its line, from 1.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Documents<'a> {
    Plain(&'a str),
    Texts(Vec<(usize, String)>),
    Conversations(Vec<(usize, Vec<Message>)>),
}

impl<'a> Documents<'a> {
    /// Takes `bytes` as lines of JSON or as plain text; the error says what is wrong with them.
    pub(super) fn parse(bytes: &'a [u8], jsonl: bool) -> Result<Self, String> {
        let text = str::from_utf8(bytes).map_err(|e| {
            let (at, line) = (e.valid_up_to(), line_of(bytes, e.valid_up_to()));
            format!("line {line}: is not UTF-8 (byte {at} of the file)")
        })?;
        if text.trim_start_matches('\u{feff}').trim().is_empty() {
            return Err("is empty: there is nothing to train on".into());
        }
        if jsonl { Self::lines(text) } else { Ok(Self::Plain(text)) }
    }

    fn lines(text: &str) -> Result<Self, String> {
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let (mut texts, mut conversations) = (vec![], vec![]);
        for (line, json) in (1..).zip(text.lines()).filter(|(_, json)| !json.trim().is_empty()) {
            match document(json).map_err(|why| format!("line {line}: {why}"))? {
                Document::Text(text) => texts.push((line, text)),
                Document::Conversation(messages) => conversations.push((line, messages)),
            }
            if !texts.is_empty() && !conversations.is_empty() {
                let why = "is of another kind than those before; a file holds `text` or `messages`";
                return Err(format!("line {line}: {why}"));
            }
        }
        Ok(if texts.is_empty() { Self::Conversations(conversations) } else { Self::Texts(texts) })
    }
}

enum Document {
    Text(String),
    Conversation(Vec<Message>),
}

/// One line's document; the error says what is wrong with it.
fn document(line: &str) -> Result<Document, String> {
    #[derive(Deserialize)]
    struct Conversation {
        messages: Vec<Message>,
    }
    let json: Json = serde_json::from_str(line).map_err(|e| not_json(&e))?;
    let key = |name| json.get(name).filter(|value| !value.is_null());
    match (key("text"), key("messages")) {
        (Some(Json::String(text)), None) => Ok(Document::Text(text.clone())),
        (Some(_), None) => Err("`text` is not a string".into()),
        (Some(_), Some(_)) => Err("has both `text` and `messages`".into()),
        (None, None) => Err("has neither `text` nor `messages`".into()),
        (None, Some(_)) => {
            let Conversation { messages } =
                serde_path_to_error::deserialize(json).map_err(|e| e.to_string())?;
            match messages.is_empty() {
                true => Err("`messages` is empty".into()),
                false => Ok(Document::Conversation(messages)),
            }
        }
    }
}

/// The parser's message without its line, which is always the first: it sees no other.
fn not_json(error: &serde_json::Error) -> String {
    let (message, column) = (error.to_string(), error.column());
    let suffix = format!(" at line {} column {column}", error.line());
    let message = message.strip_suffix(&suffix).unwrap_or(&message);
    match error.classify() {
        Category::Eof => format!("not valid JSON: {message}: the line ends in the middle"),
        _ => format!("not valid JSON: {message} (column {column})"),
    }
}

/// The number, from 1, of the line that byte `at` is in.
fn line_of(bytes: &[u8], at: usize) -> usize {
    1 + bytes[..at].iter().filter(|&&byte| byte == b'\n').count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(bytes: &[u8]) -> String {
        let error = Documents::parse(bytes, true).unwrap_err();
        assert!(!error.contains('\n'), "{error}");
        error
    }

    #[test]
    fn lines_are_documents_of_one_kind() {
        let texts = Documents::parse(
            "\u{feff}{\"text\": \"a\"}\r\n \n{\"text\":\"b\",\"id\":1}".as_bytes(),
            true,
        );
        assert_eq!(texts, Ok(Documents::Texts(vec![(1, "a".into()), (3, "b".into())])));
        let chat = br#"{"text": null, "messages": [{"content": "Hi", "role": "any"}]}"#;
        let messages = vec![Message::new("any", "Hi")];
        let chats = Documents::parse(chat, true);
        assert_eq!(chats, Ok(Documents::Conversations(vec![(1, messages)])));
        let plain = Documents::parse(b"{\"text\": \"a\"}", false);
        assert_eq!(plain, Ok(Documents::Plain("{\"text\": \"a\"}")));
    }

    #[test]
    fn what_is_no_document_is_told_with_its_line() {
        for (line, why) in [
            (r#"{"text" 1}"#, "not valid JSON: expected `:` (column 9)"),
            (
                r#"{"text": "a"#,
                "not valid JSON: EOF while parsing a string: the line ends in the middle",
            ),
            ("3", "has neither `text` nor `messages`"),
            (r#"{"txt": "a"}"#, "has neither `text` nor `messages`"),
            (r#"{"text": ["a"]}"#, "`text` is not a string"),
            (r#"{"text": "a", "messages": []}"#, "has both `text` and `messages`"),
            (r#"{"messages": []}"#, "`messages` is empty"),
            (
                r#"{"messages": [{"role": "user", "content": "a"}, {"role": "user"}]}"#,
                "messages[1]: missing field `content`",
            ),
            (
                r#"{"messages": [{"role": "user", "content": null}]}"#,
                "messages[0].content: invalid type: null, expected a string",
            ),
            (
                r#"{"messages": [{"role": "user", "content": "a", "weight": 0}]}"#,
                "messages[0].weight: unknown field `weight`, expected `role` or `content`",
            ),
        ] {
            let file = format!("{{\"text\": \"a\"}}\n\n{line}\n");
            assert_eq!(error(file.as_bytes()), format!("line 3: {why}"));
        }
        let mixed =
            b"{\"text\": \"a\"}\n{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}";
        assert_eq!(
            error(mixed),
            "line 2: is of another kind than those before; a file holds `text` or `messages`"
        );
        assert_eq!(error(b"a\nb\xff"), "line 2: is not UTF-8 (byte 3 of the file)");
        for blank in ["", " \n\t\r\n", "\u{feff}\n"] {
            assert_eq!(error(blank.as_bytes()), "is empty: there is nothing to train on");
        }
    }
}
