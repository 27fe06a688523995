//! Content that is a list of parts, given to a template that knows only strings.

use minijinja::{Value, value::ValueKind};

use super::Chat;
use crate::error::Result;

/// The index of the first message whose content is a list that the template leaves out, or a part of
/// which it leaves out, though it would show a string there.
///
/// A template that leaves such a message out altogether, whatever it says, loses nothing by the list.
pub(super) fn lost(chat: &Chat, render: impl Fn(&Chat) -> Result<String>) -> Option<usize> {
    let shows = |chat: &Chat, parts: usize| {
        render(chat).is_ok_and(|text| (0..parts).all(|at| text.contains(&probe(at))))
    };
    let loses = |&at: &usize| {
        let content = chat.messages[at].content();
        if content.kind() != ValueKind::Seq {
            return false;
        }
        let parts: Vec<Value> = content.try_iter().into_iter().flatten().collect();
        let probes: Value = (0..parts.len())
            .map(|at| Value::from_pairs([("type", "text".to_string()), ("text", probe(at))]))
            .collect();
        shows(&chat.saying(at, probe(0)), 1) && !shows(&chat.saying(at, probes), parts.len())
    };
    (0..chat.messages.len()).find(loses)
}

/// What stands for the part of this index: no text has it.
fn probe(at: usize) -> String {
    format!("\u{fdd2}{at}\u{fdd3}")
}
