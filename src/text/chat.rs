//! The checkpoint's own chat template, rendered as the transformers library renders it.

use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::{Environment, ErrorKind, Value, context, syntax::SyntaxConfig, value::Kwargs};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Message {
    /// Who speaks; which roles there are is the template's to say.
    pub role: String,
    /// What they say.
    pub content: String,
}

impl Message {
    /// What `role` says.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// A Jinja template and the tokens that it may ask for.
#[derive(Debug, Hash)]
pub(super) struct Template {
    pub(super) source: String,
    pub(super) bos: Option<String>,
    pub(super) eos: Option<String>,
}

impl Template {
    pub(super) fn new(source: String, bos: Option<String>, eos: Option<String>) -> Self {
        Self { source, bos, eos }
    }

    /// The messages; with `generation_prompt`, ready for the assistant's answer.
    pub(super) fn render(&self, messages: &[Message], generation_prompt: bool) -> Result<String> {
        let message = |m: &Message| context! { role => &*m.role, content => &*m.content };
        let messages: Vec<Value> = messages.iter().map(message).collect();
        let context = context! {
            messages,
            add_generation_prompt => generation_prompt,
            bos_token => self.bos.as_deref(),
            eos_token => self.eos.as_deref(),
            tools => (),
            documents => (),
        };
        environment().render_str(&self.source, context).map_err(|e| {
            let why = e.detail().map_or_else(|| e.kind().to_string(), str::to_string);
            let why = why.lines().next().unwrap_or_default();
            let line = e.line().map_or_else(String::new, |line| format!(" (its line {line})"));
            Error::Prompt(format!("the checkpoint's chat template fails: {why}{line}")).into()
        })
    }
}

/// What transformers gives a template beyond plain Jinja.
fn environment() -> Environment<'static> {
    let mut env = Environment::new();
    if let Ok(syntax) = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build() {
        env.set_syntax(syntax);
    }
    env.set_unknown_method_callback(unknown_method_callback);
    env.add_function("raise_exception", |message: String| -> Result<(), minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
    });
    env.add_function("strftime_now", |format: String| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        strftime(&format, now.as_secs())
    });
    env.add_filter("tojson", tojson);
    env
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=…)`: minijinja's own filter, without
/// its escapes for HTML.
fn tojson(
    value: &Value,
    indent: Option<Value>,
    options: Kwargs,
) -> Result<String, minijinja::Error> {
    let json = minijinja::filters::tojson(value, indent, options)?.to_string();
    let mut out = String::with_capacity(json.len());
    let mut rest = json.as_str();
    while let Some(at) = rest.find('\\') {
        let (before, escape) = rest.split_at(at);
        out += before;
        // JSON of our own: a backslash is never the last character.
        let (length, text) = match escape.get(..6) {
            Some("\\u003c") => (6, "<"),
            Some("\\u003e") => (6, ">"),
            Some("\\u0026") => (6, "&"),
            Some("\\u0027") => (6, "'"),
            _ => (2, &escape[..2]),
        };
        out += text;
        rest = &escape[length..];
    }
    Ok(out + rest)
}

/// The parts of `strftime` that chat templates use, in UTC; `seconds` since 1970.
fn strftime(format: &str, seconds: u64) -> String {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] =
        ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    let (year, month, day) = date(seconds / 86_400);
    let (month_name, day_name) = (MONTHS[month - 1], DAYS[(seconds / 86_400 % 7) as usize]);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        match chars.next() {
            Some('Y') => out += &year.to_string(),
            Some('m') => out += &format!("{month:02}"),
            Some('d') => out += &format!("{day:02}"),
            Some('B') => out += month_name,
            Some('b') => out += &month_name[..3],
            Some('A') => out += day_name,
            Some('a') => out += &day_name[..3],
            Some('H') => out += &format!("{:02}", seconds / 3600 % 24),
            Some('M') => out += &format!("{:02}", seconds / 60 % 60),
            Some('S') => out += &format!("{:02}", seconds % 60),
            Some(other) => out.extend(['%', other].iter().skip(usize::from(other == '%'))),
            None => out.push('%'),
        }
    }
    out
}

/// (year, month, day) of a day counted from 1970-01-01, Gregorian.
fn date(mut days: u64) -> (u64, usize, u64) {
    let leap = |year: u64| {
        year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
    };
    let mut year = 1970;
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let february = 28 + u64::from(leap(year));
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    (year, month, days + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(source: &str) -> Result<String> {
        let messages = [Message::new("system", "Be brief."), Message::new("user", "Hi")];
        Template::new(source.into(), Some("<s>".into()), None).render(&messages, true)
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        assert_eq!(
            strftime("%d %b %Y, %A, %H:%M:%S %% %q", 0),
            "01 Jan 1970, Thursday, 00:00:00 % %q"
        );
        // 2024-02-29T23:59:58Z, a Thursday.
        assert_eq!(
            strftime("%Y-%m-%d %a %B %H:%M:%S", 1_709_251_198),
            "2024-02-29 Thu February 23:59:58"
        );
    }

    #[test]
    fn templates_see_what_transformers_gives_them() {
        let source = "{{ bos_token }}{% for m in messages %}\n  {% if m['role'].startswith('s') %}\n\
                      [{{ m.content.strip() | tojson }}]{% endif %}\n{% endfor %}\
                      {% if tools is none and add_generation_prompt %}>{% endif %}";
        assert_eq!(render(source).unwrap(), "<s>[\"Be brief.\"]\n\n>".replace("\n\n", ""));
        let year = render("{{ strftime_now('%Y') }}").unwrap();
        assert!(year.parse::<u32>().unwrap() >= 2024, "{year}");
        let json = render("{{ {'a': [1, '<é\\\\u003c>'], 'b': none} | tojson }}").unwrap();
        assert_eq!(json, r#"{"a": [1, "<é\\u003c>"], "b": null}"#);
    }

    #[test]
    fn a_template_that_refuses_or_is_malformed_is_one_line() {
        let error = render("a\n{{ raise_exception('no system role') }}").unwrap_err().to_string();
        assert_eq!(
            error,
            "prompt: the checkpoint's chat template fails: no system role (its line 2)"
        );
        let error = render("{% if %}").unwrap_err().to_string();
        assert!(!error.contains('\n') && error.contains("template fails"), "{error}");
    }
    #[test]
    fn what_the_families_templates_do_works() {
        let messages = [
            Message::new("system", "Be brief."),
            Message::new("user", " Hi "),
            Message::new("assistant", "<think>\nx\n</think>\n\nYes"),
        ];
        for (source, expected) in [
            // Qwen3: the last question, and the answer without its reasoning.
            (
                "{%- set ns = namespace(last=0) %}{%- for m in messages[::-1] %}\
                 {%- if m.role == 'user' and m.content is string %}\
                 {%- set ns.last = (messages|length - 1) - loop.index0 %}{% endif %}{% endfor %}\
                 {{ ns.last }}{{ messages[-1].content.split('</think>')[-1].lstrip('\\n') }}\
                 {%- if enable_thinking is defined and enable_thinking is false %}!{% endif %}",
                "1Yes",
            ),
            // Llama 3: what may be defined, and a conversation without its first message.
            (
                "{%- if not date_string is defined %}{%- set date_string = 'today' %}{% endif %}\
                 {%- set system = messages[0]['content']|trim %}{%- set messages = messages[1:] %}\
                 {{- bos_token + system + date_string }}{%- for m in messages %}\
                 {%- if not (m.role == 'ipython' or 'tool_calls' in m) %}\
                 {{- m['content'] | trim }}|{% endif %}{% endfor %}",
                "<s>Be brief.todayHi|<think>\nx\n</think>\n\nYes|",
            ),
            // Mistral: the questions alone.
            (
                "{%- set asked = messages | selectattr('role', 'equalto', 'user') | list %}\
                 {%- for m in messages %}{%- if m == asked[-1] %}[INST]{{ m.content }}{% endif %}\
                 {%- if m.tool_calls is defined and m.tool_calls is not none %}!{% endif %}\
                 {% endfor %}",
                "[INST] Hi ",
            ),
            // Gemma: content that may be a list.
            (
                "{%- for m in messages %}{%- if m['content'] is string -%}\
                 {{ ('model' if m['role'] == 'assistant' else m.role) + (':' if loop.first else '') }}\
                 {%- elif m['content'] is iterable -%}!{%- else -%}{{ raise_exception('x') }}\
                 {%- endif -%}{% endfor %}",
                "system:usermodel",
            ),
        ] {
            let template = Template::new(source.into(), Some("<s>".into()), None);
            assert_eq!(template.render(&messages, true).unwrap(), expected);
        }
    }
}
