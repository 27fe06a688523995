//! One template: compiled once, rendered as transformers renders it.

use std::{
    collections::BTreeMap,
    hash::{Hash, Hasher},
    ops::Range,
};

use minijinja::{Environment, Error as JinjaError, ErrorKind, State, Value, syntax::SyntaxConfig};

use super::{
    Chat, clock,
    compare::compare,
    display,
    format::{self, FORMAT},
    methods, parts, python,
    rewrite::{COMPARE, GENERATION, ITERABLE, MODULO, rewrite},
};
use crate::error::{Error, Result};

/// What marks the two ends of a generated part while it is looked for: characters that no text has.
const MARKS: [char; 2] = ['\u{fdd0}', '\u{fdd1}'];
/// The name that the one template of an environment has.
const NAME: &str = "chat template";

/// What the tests of an order are called.
const ORDERS: [(&str, [&str; 3]); 4] = [
    ("<", ["<", "lt", "lessthan"]),
    ("<=", ["<=", "le", "le"]),
    (">", [">", "gt", "greaterthan"]),
    (">=", [">=", "ge", "ge"]),
];

/// A Jinja template, ready to be rendered.
#[derive(Debug)]
pub(super) struct Template {
    pub(super) source: String,
    /// Why there is nothing to render, if it is malformed: that is told when it is needed.
    compiled: Result<Compiled, String>,
}

#[derive(Debug)]
struct Compiled {
    plain: Environment<'static>,
    /// The same, with [`MARKS`] around what is generated; of a template that has such blocks.
    marked: Option<Environment<'static>>,
}

impl Hash for Template {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.source.hash(state);
    }
}

impl Template {
    pub(super) fn new(source: String) -> Self {
        let compiled = rewrite(&source).and_then(|rewritten| {
            let marked = rewritten.contains(GENERATION);
            let compile = |marks| {
                let mut env = environment(marks);
                env.add_template_owned(NAME, rewritten.clone()).map_err(|e| said(&e))?;
                Ok::<_, String>(env)
            };
            let marked = marked.then(|| compile(true)).transpose()?;
            Ok(Compiled { plain: compile(false)?, marked })
        });
        Self { source, compiled }
    }

    /// Whether what it gives depends on the day.
    pub(super) fn is_dated(&self) -> bool {
        self.source.contains("strftime_now")
    }

    /// The conversation's text; with `generation_prompt`, ready for the assistant's answer.
    /// `tokens` are the special tokens by their names.
    pub(super) fn render(
        &self,
        chat: &Chat,
        tokens: &BTreeMap<String, String>,
        generation_prompt: bool,
    ) -> Result<String> {
        let compiled = self.compiled.as_ref().map_err(|why| fails(why))?;
        let render =
            |chat: &Chat| rendered(&compiled.plain, context(chat, tokens, generation_prompt));
        let text = render(chat)?;
        if let Some(at) = chat.messages.iter().position(|message| message.is_shown_in(&text)) {
            return Err(fails(&format!(
                "it shows the parts of message {}'s content as a list: join them",
                at + 1
            )));
        }
        match parts::lost(chat, render) {
            Some(at) => Err(fails(&format!(
                "it takes only strings, and the content of message {} is a list of parts, which it \
                 would leave out: join them",
                at + 1
            ))),
            None => Ok(text),
        }
    }

    /// Where in the whole conversation's text, in bytes, what its generation blocks give lies; `None`
    /// for a template without any.
    pub(super) fn generated(
        &self,
        chat: &Chat,
        tokens: &BTreeMap<String, String>,
    ) -> Result<Option<Vec<Range<usize>>>> {
        let compiled = self.compiled.as_ref().map_err(|why| fails(why))?;
        let Some(marked) = &compiled.marked else { return Ok(None) };
        let text = self.render(chat, tokens, false)?;
        if text.contains(MARKS) {
            return Err(fails(
                "what is generated cannot be marked in a text with U+FDD0 or U+FDD1",
            ));
        }
        let (unmarked, generated) = unmark(&rendered(marked, context(chat, tokens, false))?);
        match unmarked == text {
            true => Ok(Some(generated)),
            false => Err(fails(
                "it works on what a generation block gives, which is then not to be found",
            )),
        }
    }
}

fn fails(why: &str) -> anyhow::Error {
    Error::Prompt(format!("the checkpoint's chat template fails: {why}")).into()
}

fn rendered(env: &Environment, context: Value) -> Result<String> {
    let template = env.get_template(NAME).map_err(|e| fails(&said(&e)))?;
    template.render(context).map_err(|e| fails(&said(&e)))
}

/// The variables of a template; later ones take the place of earlier ones.
fn context(chat: &Chat, tokens: &BTreeMap<String, String>, generation_prompt: bool) -> Value {
    let none = || Value::from(());
    let tokens = tokens.iter().map(|(name, token)| (name.clone(), Value::from(token.as_str())));
    let given = [
        ("messages", chat.messages.iter().map(super::Message::normal).collect::<Value>()),
        ("tools", chat.tools.clone().unwrap_or_else(none)),
        ("documents", chat.documents.clone().unwrap_or_else(none)),
        ("add_generation_prompt", Value::from(generation_prompt)),
    ];
    let given = given.into_iter().map(|(name, value)| (name.to_string(), value));
    Value::from_pairs(tokens.chain(chat.arguments.iter().cloned()).chain(given))
}

/// A marked text without its marks, and what lay between them.
fn unmark(marked: &str) -> (String, Vec<Range<usize>>) {
    let (mut text, mut generated, mut open) = (String::with_capacity(marked.len()), vec![], vec![]);
    for piece in marked.split_inclusive(MARKS) {
        text += piece.trim_end_matches(MARKS);
        if piece.ends_with(MARKS[0]) {
            open.push((generated.len(), text.len()));
            generated.push(0..0);
        } else if let Some((index, start)) = open.pop().filter(|_| piece.ends_with(MARKS[1])) {
            generated[index] = start..text.len();
        }
    }
    (text, generated)
}

/// What went wrong, in one line.
fn said(error: &JinjaError) -> String {
    let why = error.detail().map_or_else(|| error.kind().to_string(), str::to_string);
    let why = why.lines().next().unwrap_or_default();
    let line = error.line().map_or_else(String::new, |line| format!(" (its line {line})"));
    format!("{why}{line}")
}

/// What transformers gives a template, with or without marks around what is generated.
fn environment(marks: bool) -> Environment<'static> {
    let mut env = Environment::new();
    if let Ok(syntax) = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build() {
        env.set_syntax(syntax);
    }
    env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    env.set_unknown_method_callback(methods::method);
    env.set_formatter(|out, _, value| {
        out.write_str(&display::str(value)?).map_err(JinjaError::from)
    });

    env.add_function("raise_exception", |message: String| -> Result<(), JinjaError> {
        Err(JinjaError::new(ErrorKind::InvalidOperation, message))
    });
    env.add_function("strftime_now", |format: String| {
        let date = clock::strftime(&format, clock::now());
        date.map_err(|why| JinjaError::new(ErrorKind::InvalidOperation, why))
    });
    env.add_function("dict", python::dict);
    env.add_function("range", python::range);
    for name in ["cycler", "joiner", "lipsum"] {
        env.add_function(name, move || -> Result<(), JinjaError> {
            Err(JinjaError::new(ErrorKind::UnknownFunction, format!("`{name}` is not supported")))
        });
    }
    env.add_function(MODULO, format::modulo);
    env.add_function(COMPARE, |op: String, a: &Value, b: &Value| compare(&op, a, b));
    env.add_function(ITERABLE, python::iterable);

    env.add_filter("tojson", python::tojson);
    env.add_filter("default", python::default);
    env.add_filter("d", python::default);
    env.add_filter("dictsort", python::dictsort);
    env.add_filter("trim", python::trim);
    env.add_filter("string", |value: &Value| display::str(value));
    env.add_filter(FORMAT, minijinja::filters::format);
    env.add_filter("format", format::format);
    env.add_filter("indent", python::indent);
    env.add_filter("groupby", python::groupby);
    env.add_filter("batch", |state: &State, value: Value, count, fill: Option<Value>| {
        minijinja::filters::batch(state, value, python::few(count)?, fill)
    });
    env.add_filter("slice", |state: &State, value: Value, count, fill: Option<Value>| {
        minijinja::filters::slice(state, value, python::few(count)?, fill)
    });
    env.add_filter(GENERATION, move |text: String| match marks {
        true => format!("{}{text}{}", MARKS[0], MARKS[1]),
        false => text,
    });
    // These do something else in Jinja2.
    env.remove_filter("attr");
    env.remove_filter("pprint");

    for (op, names) in ORDERS {
        for name in names {
            env.add_test(name, move |a: &Value, b: &Value| compare(op, a, b));
        }
    }
    env.add_test("callable", python::is_callable);
    env.add_test("iterable", python::is_iterable);
    env.add_test("sequence", python::is_sequence);
    env
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_found_inside_each_other_and_side_by_side() {
        let [open, close] = MARKS;
        let marked = format!("é{open}a{open}b{close}{close}c{open}{close}");
        assert_eq!(unmark(&marked), ("éabc".into(), vec![2..4, 3..4, 5..5]));
    }
}
