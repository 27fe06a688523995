//! The forms that records of training data have: which columns mean what.
//!
//! A column that would change what is learnt is honoured, or refused by name; any other is ignored,
//! and listed. One that is null is none.

use std::collections::BTreeSet;

use minijinja::{Value, value::ValueKind};

use super::{
    columns::{self, Refused, refuse},
    turns::{self, Turn},
};
use crate::text::Chat;

/// One record.
#[derive(Debug, PartialEq)]
pub(super) enum Document {
    Text(String),
    Pair(Pair),
    Conversation(Conversation),
}

/// A text that ends in what is to be learnt.
#[derive(Debug, PartialEq)]
pub(super) struct Pair {
    pub(super) prompt: String,
    pub(super) completion: String,
}

/// A conversation, and what of it counts where its prompts do not.
#[derive(Debug, PartialEq)]
pub(super) struct Conversation {
    pub(super) chat: Chat,
    pub(super) answers: Answers,
    /// The column that holds its messages, for a report.
    pub(super) column: &'static str,
}

/// What of a conversation is no prompt.
#[derive(Debug, PartialEq)]
pub(super) enum Answers {
    /// What the assistant says.
    Assistant,
    /// Of what the assistant says, the messages that are marked so: whether each counts, and whether
    /// any message, whoever says it, is marked not to count.
    Marked { counts: Vec<bool>, excludes: bool },
    /// Everything from the message of this index on.
    From(usize),
}

/// Whether a record has all columns of a form, and how a report calls it.
struct Form {
    columns: &'static [&'static str],
    name: &'static str,
    /// Columns that may not stand beside these.
    refused: Refused,
    /// Another form's only column, which repeats the whole of this one.
    echo: Option<&'static str>,
    read: fn(&mut Record) -> Result<Document, String>,
}

/// The forms; a record is of exactly one.
const FORMS: [Form; 5] = [
    Form { columns: &["text"], name: "`text`", refused: columns::TEXT, echo: None, read: text },
    Form {
        columns: &["messages"],
        name: "`messages`",
        refused: columns::MESSAGES,
        echo: None,
        read: messages,
    },
    Form {
        columns: &["conversations"],
        name: "`conversations`",
        refused: columns::CONVERSATIONS,
        echo: None,
        read: conversations,
    },
    Form {
        columns: &["prompt", "completion"],
        name: "`prompt` and `completion`",
        // Which these are depends on whether both are strings.
        refused: &[],
        echo: None,
        read: prompt_and_completion,
    },
    Form {
        columns: &["instruction", "output"],
        name: "`instruction`, `input` and `output`, in the prompt of Stanford Alpaca",
        refused: columns::ALPACA,
        echo: Some("text"),
        read: alpaca,
    },
];

/// Arguments of transformers' `apply_chat_template` itself, which are no variables of a template.
const RESERVED: [&str; 17] = [
    "conversation",
    "messages",
    "tools",
    "documents",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "sanitize_control_tokens",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
    "processor_kwargs",
];

/// A record whose columns are taken one by one.
struct Record<'a> {
    columns: Vec<(String, Value)>,
    ignored: &'a mut BTreeSet<String>,
}

/// The document that a record is, and what its form is called; columns that change nothing are
/// added to `ignored`. The error says what is wrong with it.
pub(super) fn document(
    record: &Value,
    ignored: &mut BTreeSet<String>,
) -> Result<(&'static str, Document), String> {
    if record.kind() != ValueKind::Map {
        return Err(format!("is no object but a {}", record.kind()));
    }
    let mut columns = vec![];
    for key in record.try_iter().map_err(|e| e.to_string())? {
        let value = record.get_item(&key).map_err(|e| e.to_string())?;
        if !value.is_none() {
            columns.push((key.to_string(), value));
        }
    }
    let mut record = Record { columns, ignored };
    // What no form can have says more of a record than the form that it lacks.
    refuse(&record.columns, columns::ALWAYS)?;
    let form = record.form()?;
    refuse(&record.columns, form.refused)?;
    let document = (form.read)(&mut record)?;
    record.ignored.extend(record.columns.into_iter().map(|(name, _)| name));
    Ok((form.name, document))
}

impl Record<'_> {
    fn has(&self, name: &str) -> bool {
        self.columns.iter().any(|(column, _)| column == name)
    }

    fn take(&mut self, name: &str) -> Option<Value> {
        let at = self.columns.iter().position(|(column, _)| column == name)?;
        Some(self.columns.remove(at).1)
    }

    fn take_text(&mut self, name: &str) -> Result<Option<String>, String> {
        let text = |value: Value| value.as_str().map(str::to_string);
        self.take(name)
            .map(|value| text(value).ok_or_else(|| format!("`{name}` is not a string")))
            .transpose()
    }

    /// The one form that the record has all columns of.
    fn form(&self) -> Result<&'static Form, String> {
        let whole = |form: &&Form| form.columns.iter().all(|column| self.has(column));
        let whole: Vec<&Form> = FORMS.iter().filter(whole).collect();
        let repeats = |form: &&&Form| {
            whole.iter().any(|other| other.echo.is_some_and(|echo| form.columns == [echo]))
        };
        let mut forms = whole.iter().filter(|form| !repeats(form));
        match (forms.next(), forms.next()) {
            (Some(form), None) => Ok(form),
            (Some(one), Some(other)) => Err(format!(
                "has both `{}` and `{}`: which of them is to be learnt?",
                one.columns[0], other.columns[0]
            )),
            (None, _) => {
                let begun = |form: &&Form| form.columns.iter().any(|column| self.has(column));
                Err(match FORMS.iter().find(begun) {
                    Some(form) => format!("has only some of {}", form.columns.join(" and ")),
                    None => "has neither `text` nor `messages`, `conversations`, `prompt` and \
                             `completion` or `instruction` and `output`"
                        .into(),
                })
            }
        }
    }

    /// What a template is given beside the messages.
    fn chat(&mut self) -> Result<Chat, String> {
        let tools = self.take_json("tools")?;
        if let Some(tools) = &tools {
            let list: Vec<Value> = match tools.kind() {
                ValueKind::Seq => tools.try_iter().map_err(|e| e.to_string())?.collect(),
                kind => return Err(format!("`tools` is no list but a {kind}")),
            };
            if let Some(at) = list.iter().position(|tool| tool.kind() != ValueKind::Map) {
                return Err(format!("`tools`[{at}] is no object, a function's JSON schema"));
            }
        }
        let documents = self.take_json("documents")?;
        if documents.as_ref().is_some_and(|documents| documents.kind() != ValueKind::Seq) {
            return Err("`documents` is no list".into());
        }
        let mut arguments = vec![];
        if let Some(given) = self.take_json("chat_template_kwargs")? {
            if given.kind() != ValueKind::Map {
                return Err("`chat_template_kwargs` is no object".into());
            }
            for key in given.try_iter().map_err(|e| e.to_string())? {
                let name = key.to_string();
                if RESERVED.contains(&name.as_str()) {
                    return Err(format!(
                        "`chat_template_kwargs`: `{name}` is no variable of a template"
                    ));
                }
                arguments.push((name, given.get_item(&key).map_err(|e| e.to_string())?));
            }
        }
        Ok(Chat { tools, documents, arguments, ..Chat::default() })
    }

    /// A column that may be JSON written in a string, as tables have it.
    fn take_json(&mut self, name: &str) -> Result<Option<Value>, String> {
        let Some(value) = self.take(name) else { return Ok(None) };
        let parsed = match value.as_str() {
            None => return Ok(Some(value)),
            Some(text) if text.trim().is_empty() => return Ok(None),
            Some(text) => serde_json::from_str::<Value>(text),
        };
        let parsed = parsed.map_err(|e| format!("`{name}` is a string, but no JSON: {e}"))?;
        Ok(Some(parsed).filter(|value| !value.is_none()))
    }

    /// The turns of a list that is the column `name`.
    fn turns(&mut self, name: &str) -> Result<Vec<Turn>, String> {
        let list = self.take(name).unwrap_or_default();
        turns::read(&list, name)
    }
}

fn text(record: &mut Record) -> Result<Document, String> {
    Ok(Document::Text(record.take_text("text")?.unwrap_or_default()))
}

fn messages(record: &mut Record) -> Result<Document, String> {
    let turns = record.turns("messages")?;
    conversation(record.chat()?, turns, "messages")
}

/// ShareGPT's, with its system message in a column of its own.
fn conversations(record: &mut Record) -> Result<Document, String> {
    let mut turns = record.turns("conversations")?;
    if let Some(system) = record.take_text("system")?.filter(|system| !system.is_empty()) {
        if turns.iter().any(|turn| turn.message.role() == "system") {
            return Err("has two system messages: in `system` and in `conversations`".into());
        }
        turns.insert(0, Turn::system(&system));
    }
    conversation(record.chat()?, turns, "conversations")
}

fn conversation(chat: Chat, turns: Vec<Turn>, column: &'static str) -> Result<Document, String> {
    let answers = match turns.iter().any(|turn| turn.counts.is_some()) {
        false => Answers::Assistant,
        true => Answers::Marked {
            counts: turns
                .iter()
                .map(|turn| turn.message.role() == "assistant" && turn.counts != Some(false))
                .collect(),
            excludes: turns.iter().any(|turn| turn.counts == Some(false)),
        },
    };
    let messages = turns.into_iter().map(|turn| turn.message).collect();
    Ok(Document::Conversation(Conversation { chat: Chat { messages, ..chat }, answers, column }))
}

/// TRL's: both strings, or both lists of messages.
fn prompt_and_completion(record: &mut Record) -> Result<Document, String> {
    let is_text = |record: &Record, name: &str| {
        record.columns.iter().any(|(column, value)| column == name && value.as_str().is_some())
    };
    match (is_text(record, "prompt"), is_text(record, "completion")) {
        (true, true) => {
            refuse(&record.columns, columns::PAIR)?;
            let prompt = record.take_text("prompt")?.unwrap_or_default();
            let completion = record.take_text("completion")?.unwrap_or_default();
            Ok(Document::Pair(Pair { prompt, completion }))
        }
        (false, false) => {
            refuse(&record.columns, columns::MESSAGE_PAIR)?;
            let prompt = record.turns("prompt")?;
            let completion = record.turns("completion")?;
            if prompt.last().is_some_and(|turn| turn.message.role() == "assistant") {
                return Err(
                    "`prompt` ends in an assistant's message, and answers are not continued".into(),
                );
            }
            if prompt.iter().chain(&completion).any(|turn| turn.counts.is_some()) {
                return Err(
                    "`prompt` and `completion` say what counts: no message can be marked".into()
                );
            }
            let answers = Answers::From(prompt.len());
            let messages = prompt.into_iter().chain(completion).map(|turn| turn.message).collect();
            let chat = Chat { messages, ..record.chat()? };
            let column = "prompt and completion";
            Ok(Document::Conversation(Conversation { chat, answers, column }))
        }
        _ => {
            Err("`prompt` and `completion` are not both strings, nor both lists of messages".into())
        }
    }
}

/// Stanford Alpaca's, in the prompt that it was made for.
fn alpaca(record: &mut Record) -> Result<Document, String> {
    let mut part = |name| Ok::<_, String>(record.take_text(name)?.unwrap_or_default());
    let (instruction, input, completion) = (part("instruction")?, part("input")?, part("output")?);
    let task = "Below is an instruction that describes a task";
    let respond = "Write a response that appropriately completes the request.";
    let prompt = match input.is_empty() {
        true => format!("{task}. {respond}\n\n### Instruction:\n{instruction}\n\n### Response:\n"),
        false => format!(
            "{task}, paired with an input that provides further context. {respond}\n\n\
             ### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
        ),
    };
    // Stanford's own file repeats the whole of each record in this column: it is left, and listed.
    let mut others = record.columns.iter().filter(|(name, _)| name == "text");
    let whole = format!("{prompt}{completion}");
    if others.any(|(_, text)| text.as_str() != Some(&*whole)) {
        return Err("has both `text` and `instruction`, and its `text` is not what these make in \
                    the prompt of Stanford Alpaca: take one of them away"
            .into());
    }
    Ok(Document::Pair(Pair { prompt, completion }))
}
