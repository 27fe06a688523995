//! What of the conversations of a file their chat template does not read.

use std::collections::BTreeSet;

use rayon::prelude::*;

use super::formats::Conversation;
use crate::text::{Chat, Text};

/// What a template may read beside the roles and contents of messages.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    Tools,
    Documents,
    /// One of `chat_template_kwargs`.
    Argument(String),
    /// A key of the messages in this column.
    Key(&'static str, String),
}

/// The parts that change no conversation's text, by name.
///
/// A part is read if a single text would be another without it. What most lines have is mostly read
/// in the first of them; only for a part that is not are all rendered twice.
pub(super) fn unread(conversations: &[(usize, Conversation)], text: &Text) -> BTreeSet<String> {
    let parts: BTreeSet<Part> = conversations.iter().flat_map(|(_, one)| parts(one)).collect();
    let is_read = |part: &Part| {
        conversations.par_iter().any(|(_, one)| {
            part.left_out(one).is_some_and(|without| differ(text, &one.chat, &without))
        })
    };
    parts.iter().filter(|part| !is_read(part)).map(Part::name).collect()
}

/// Whether two conversations have different texts; one that has none is told of elsewhere.
fn differ(text: &Text, one: &Chat, other: &Chat) -> bool {
    match (text.render(one, false), text.render(other, false)) {
        (Ok(one), Ok(other)) => one != other,
        (Err(_), _) | (_, Err(_)) => true,
    }
}

/// The parts that a conversation has.
fn parts(conversation: &Conversation) -> impl Iterator<Item = Part> {
    let Conversation { chat, column, .. } = conversation;
    let tools = chat.tools.as_ref().map(|_| Part::Tools);
    let documents = chat.documents.as_ref().map(|_| Part::Documents);
    let arguments = chat.arguments.iter().map(|(name, _)| Part::Argument(name.clone()));
    let keys = chat.messages.iter().flat_map(|message| message.keys());
    let keys = keys.filter(|key| !["role", "content"].contains(&key.as_str()));
    let keys = keys.map(|key| Part::Key(column, key));
    tools.into_iter().chain(documents).chain(arguments).chain(keys)
}

impl Part {
    fn name(&self) -> String {
        match self {
            Self::Tools => "tools".into(),
            Self::Documents => "documents".into(),
            Self::Argument(name) => format!("chat_template_kwargs.{name}"),
            Self::Key(column, key) => format!("{column}[].{key}"),
        }
    }

    /// The conversation without this part; `None` if it has none.
    fn left_out(&self, conversation: &Conversation) -> Option<Chat> {
        let chat = &conversation.chat;
        let without = match self {
            Self::Tools => Chat { tools: None, ..chat.clone() },
            Self::Documents => Chat { documents: None, ..chat.clone() },
            Self::Argument(name) => {
                let others = chat.arguments.iter().filter(|(argument, _)| argument != name);
                Chat { arguments: others.cloned().collect(), ..chat.clone() }
            }
            Self::Key(_, key) => {
                let messages: Vec<_> =
                    chat.messages.iter().map(|message| message.without(key)).collect();
                chat.with(&messages)
            }
        };
        (without != *chat).then_some(without)
    }
}
