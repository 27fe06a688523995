//! A template's source as minijinja takes it, where Jinja2 has more.
//!
//! | in the source | becomes |
//! |---|---|
//! | `{% generation %}…{% endgeneration %}` | `{% with %}{% filter generation__ %}…{% endfilter %}{% endwith %}`: a scope of its own, captured |
//! | `a % b` | `modulo__(a, b)`: strings are formatted by it |
//! | `a < b` | `compare__("<", a, b)`: values of different kinds have no order |
//! | `for x in y` | `for x in iterable__(y)`: none is no empty list |
//! | `"<\/a>"` | `"<\\/a>"`: what stands for a character is read as Python reads it |
//!
//! Text, comments and raw blocks stay as they are, and no line moves. What minijinja would
//! take otherwise than Jinja2, in silence, is refused.

use std::ops::Range;

use super::escapes;

/// The filter that marks what a generation block gives.
pub(super) const GENERATION: &str = "generation__";
/// The function behind `%`.
pub(super) const MODULO: &str = "modulo__";
/// The function behind `<`, `<=`, `>` and `>=`.
pub(super) const COMPARE: &str = "compare__";
/// The function that loops go through.
pub(super) const ITERABLE: &str = "iterable__";

/// Names that Jinja2 finds on a dict before it looks for a key.
const DICT_METHODS: [&str; 11] = [
    "clear",
    "copy",
    "fromkeys",
    "get",
    "items",
    "keys",
    "pop",
    "popitem",
    "setdefault",
    "update",
    "values",
];

/// Names that are operators or begin a statement, and no values.
const WORDS: [&str; 8] = ["and", "or", "not", "in", "is", "if", "else", "elif"];

/// The source for minijinja; the error says what it would take otherwise, and in which line.
pub(super) fn rewrite(source: &str) -> Result<String, String> {
    let mut out = String::with_capacity(source.len() + 64);
    let mut at = 0;
    while let Some(open) = source[at..].find('{').map(|found| at + found) {
        let end = match source.as_bytes().get(open + 1) {
            Some(b'#') => source[open..].find("#}").map_or(source.len(), |end| open + end + 2),
            Some(b'{' | b'%') => {
                let (tokens, end) = tokens(source, open + 2);
                if let Some(end) = raw_end(source, &tokens, end) {
                    end
                } else {
                    let code = Code { source, tokens };
                    code.check()?;
                    out += &source[at..open];
                    out += &code.edited(open..end)?;
                    at = end;
                    continue;
                }
            }
            _ => open + 1,
        };
        out += &source[at..end];
        at = end;
    }
    Ok(out + &source[at..])
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Name,
    Literal,
    Operator,
}

/// A token of code and where it lies in the source.
#[derive(Debug, Clone)]
struct Token {
    kind: Kind,
    at: Range<usize>,
    /// How many brackets are open around it; those of brackets are outside them.
    depth: usize,
}

/// The tokens from `at` to the end of the tag, and where the tag ends.
fn tokens(source: &str, mut at: usize) -> (Vec<Token>, usize) {
    let (mut tokens, mut depth) = (vec![], 0_usize);
    // Whitespace control is no part of the code.
    at += usize::from(source[at..].starts_with(['-', '+']));
    while let Some(c) = source[at..].chars().next() {
        let rest = &source[at..];
        let closed = rest.strip_prefix(['-', '+']).unwrap_or(rest);
        if depth == 0 && (closed.starts_with("}}") || closed.starts_with("%}")) {
            return (tokens, source.len() - closed.len() + 2);
        }
        let (kind, length) = match c {
            c if c.is_whitespace() => {
                at += c.len_utf8();
                continue;
            }
            '"' | '\'' => (Kind::Literal, string_length(rest, c)),
            c if c.is_alphabetic() || c == '_' => {
                let end = rest.find(|c: char| !(c.is_alphanumeric() || c == '_'));
                (Kind::Name, end.unwrap_or(rest.len()))
            }
            '0'..='9' => {
                let end = rest.find(|c: char| !(c.is_ascii_alphanumeric() || "._".contains(c)));
                (Kind::Literal, end.unwrap_or(rest.len()))
            }
            c => {
                let two =
                    ["**", "//", "==", "!=", "<=", ">="].iter().any(|op| rest.starts_with(op));
                (Kind::Operator, if two { 2 } else { c.len_utf8() })
            }
        };
        if ")]}".contains(c) {
            depth = depth.saturating_sub(1);
        }
        tokens.push(Token { kind, at: at..at + length, depth });
        if "([{".contains(c) {
            depth += 1;
        }
        at += length;
    }
    (tokens, source.len())
}

/// How many bytes a string takes, its quotes included.
fn string_length(text: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            c if c == quote => return at + 1,
            _ => (),
        }
    }
    text.len()
}

/// Where a raw block that begins with these tokens ends.
fn raw_end(source: &str, opening: &[Token], mut at: usize) -> Option<usize> {
    if !is_tag(source, opening, "raw") {
        return None;
    }
    while let Some(open) = source[at..].find("{%").map(|found| at + found) {
        let (inside, end) = tokens(source, open + 2);
        if is_tag(source, &inside, "endraw") {
            return Some(end);
        }
        at = open + 2;
    }
    Some(source.len())
}

/// Whether a tag is this one word.
fn is_tag(source: &str, tokens: &[Token], name: &str) -> bool {
    matches!(tokens, [word] if &source[word.at.clone()] == name)
}

/// What stands between the braces of one tag.
struct Code<'a> {
    source: &'a str,
    tokens: Vec<Token>,
}

impl Code<'_> {
    fn text(&self, index: usize) -> &str {
        self.tokens.get(index).map_or("", |token| &self.source[token.at.clone()])
    }

    fn is_name(&self, index: usize, name: &str) -> bool {
        self.tokens[index].kind == Kind::Name && self.text(index) == name
    }

    /// Refuses `x.items` without a call: to Jinja2 that is the method, to minijinja the key.
    fn check(&self) -> Result<(), String> {
        for (index, token) in self.tokens.iter().enumerate().skip(1) {
            let name = self.text(index);
            let attribute = token.kind == Kind::Name && self.text(index - 1) == ".";
            if attribute && DICT_METHODS.contains(&name) && self.text(index + 1) != "(" {
                return Err(format!(
                    "`.{name}` without a call is a dict's method to Jinja2, not its key: write \
                     `['{name}']` (its line {})",
                    self.line(token)
                ));
            }
        }
        Ok(())
    }

    /// The line that a token begins in.
    fn line(&self, token: &Token) -> usize {
        1 + self.source[..token.at.start].matches('\n').count()
    }

    /// The tag at `whole` with its edits; the error is a string that cannot be read.
    fn edited(&self, whole: Range<usize>) -> Result<String, String> {
        let mut edits: Vec<(Range<usize>, String)> = vec![];
        for (name, becomes) in [
            ("generation", format!("with %}}{{% filter {GENERATION}")),
            ("endgeneration", "endfilter %}{% endwith".to_string()),
        ] {
            if self.source[whole.clone()].starts_with("{%")
                && is_tag(self.source, &self.tokens, name)
            {
                edits.push((self.tokens[0].at.clone(), becomes));
            }
        }
        let calls = self.modulos().into_iter().chain(self.iterated());
        let compared = self.compared();
        let calls = calls.chain(compared.iter().map(|(_, range)| (range.clone(), COMPARE)));
        let mut calls: Vec<(Range<usize>, &str)> = calls.collect();
        // Of calls that begin together, the longest is the outermost.
        calls.sort_by_key(|(range, _)| (range.start, std::cmp::Reverse(range.end)));
        for (range, name) in calls {
            let (start, end) =
                (self.tokens[range.start].at.start, self.tokens[range.end - 1].at.end);
            let op = compared.iter().find(|(_, all)| name == COMPARE && *all == range);
            let op = op.map_or(String::new(), |(op, _)| format!("\"{}\",", self.text(*op)));
            edits.push((start..start, format!("{name}({op}")));
            edits.push((end..end, ")".into()));
        }
        let percent = |index: &usize| self.is_modulo(*index);
        let percents = (0..self.tokens.len()).filter(percent);
        let commas = percents.chain(compared.iter().map(|(op, _)| *op));
        edits.extend(commas.map(|index| (self.tokens[index].at.clone(), ",".into())));
        for token in self.tokens.iter().filter(|token| token.kind == Kind::Literal) {
            let written = &self.source[token.at.clone()];
            let translated = match written.starts_with(['"', '\'']) {
                true => escapes::translated(written),
                false => continue,
            };
            let translated =
                translated.map_err(|why| format!("{why} (its line {})", self.line(token)))?;
            if translated != written {
                edits.push((token.at.clone(), translated));
            }
        }
        edits.sort_by_key(|(range, _)| range.start);

        let (mut out, mut at) = (String::new(), whole.start);
        for (range, text) in edits {
            out += &self.source[at..range.start];
            out += &text;
            at = range.end;
        }
        Ok(out + &self.source[at..whole.end])
    }

    fn is_modulo(&self, index: usize) -> bool {
        self.tokens[index].kind == Kind::Operator && self.text(index) == "%" && index > 0
    }

    /// The operands of each `%`, from the first token of the left to after the last of the right.
    fn modulos(&self) -> Vec<(Range<usize>, &'static str)> {
        let percents = (0..self.tokens.len()).filter(|index| self.is_modulo(*index));
        percents.map(|index| (self.left(index)..self.right(index), MODULO)).collect()
    }

    /// Where the left operand of the `%` at `index` begins: factors bind as it does, from the left.
    fn left(&self, index: usize) -> usize {
        let depth = self.tokens[index].depth;
        let mut start = index;
        while start > 0 {
            let before = start - 1;
            let token = &self.tokens[before];
            if token.depth == depth && !self.continues(before) {
                break;
            }
            if token.depth < depth {
                break;
            }
            start = before;
        }
        start
    }

    /// Whether a token at an operand's own depth can be inside a product.
    fn continues(&self, index: usize) -> bool {
        let text = self.text(index);
        match self.tokens[index].kind {
            Kind::Literal => true,
            Kind::Name => !WORDS.contains(&text),
            Kind::Operator => match text {
                "+" | "-" => index == 0 || !self.ends_operand(index - 1),
                "," | ":" | "=" | "==" | "!=" | "<" | ">" | "<=" | ">=" | "~" => false,
                _ => true,
            },
        }
    }

    /// Whether a value may end with a token, so that a sign after it is no sign.
    fn ends_operand(&self, index: usize) -> bool {
        match self.tokens[index].kind {
            Kind::Literal => true,
            Kind::Name => !WORDS.contains(&self.text(index)),
            Kind::Operator => [")", "]", "}"].contains(&self.text(index)),
        }
    }

    /// Past the right operand of the `%` at `index`: signs, one value, and what is applied to it.
    fn right(&self, index: usize) -> usize {
        let mut end = index + 1;
        while ["-", "+"].contains(&self.text(end)) {
            end += 1;
        }
        end = self.past_brackets(end);
        loop {
            end = match self.text(end) {
                "." | "|" => end + 2,
                "(" | "[" => self.past_brackets(end),
                "**" => self.right(end),
                _ => return end.min(self.tokens.len()),
            };
        }
    }

    /// Past the token at `index`, or past the bracket that closes it.
    fn past_brackets(&self, index: usize) -> usize {
        if !["(", "[", "{"].contains(&self.text(index)) {
            return index + 1;
        }
        let depth = self.tokens[index].depth;
        let closes = |at: &usize| self.tokens[*at].depth == depth;
        (index + 1..self.tokens.len()).find(closes).map_or(self.tokens.len(), |at| at + 1)
    }

    /// Each `<` and its like, with its operands from the first token to after the last. Chains of
    /// them, which Python takes pair by pair, stay as they are.
    fn compared(&self) -> Vec<(usize, Range<usize>)> {
        let depth = |index: usize| self.tokens[index].depth;
        let chains = |index: usize| {
            ["<", "<=", ">", ">=", "==", "!=", "in"].contains(&self.text(index))
                || (self.text(index) == "not" && self.text(index + 1) == "in")
        };
        let mut found = vec![];
        for op in 1..self.tokens.len() {
            let is_order = ["<", "<=", ">", ">="].contains(&self.text(op));
            if self.tokens[op].kind != Kind::Operator || !is_order {
                continue;
            }
            let ends = |index: &usize| {
                depth(*index) < depth(op)
                    || (depth(*index) == depth(op) && self.ends_comparison(*index))
            };
            let start = (0..op).rev().find(ends).map_or(0, |before| before + 1);
            let end = (op + 1..self.tokens.len()).find(ends).unwrap_or(self.tokens.len());
            let chained = (start > 0 && chains(start - 1)) || chains(end);
            if start < op && op + 1 < end && !chained {
                found.push((op, start..end));
            }
        }
        found
    }

    /// Whether a token at a comparison's own depth is no part of its operands.
    fn ends_comparison(&self, index: usize) -> bool {
        let text = self.text(index);
        match self.tokens[index].kind {
            Kind::Literal => false,
            Kind::Name => WORDS.contains(&text) && text != "is",
            Kind::Operator => [",", ":", "=", "==", "!=", "<", ">", "<=", ">="].contains(&text),
        }
    }

    /// What a `for` statement goes over.
    fn iterated(&self) -> Option<(Range<usize>, &'static str)> {
        if self.tokens.is_empty() || !self.is_name(0, "for") {
            return None;
        }
        let outside = |index: &usize| self.tokens[*index].depth == 0;
        let all = 0..self.tokens.len();
        let start = 1 + all.clone().filter(outside).find(|index| self.is_name(*index, "in"))?;
        let ends = |index: &usize| self.is_name(*index, "if") || self.is_name(*index, "recursive");
        let end = (start..all.end).filter(outside).find(ends).unwrap_or(all.end);
        // A tuple without parentheses stays as it is.
        let tuple = (start..end).filter(outside).any(|index| self.text(index) == ",");
        (start < end && !tuple).then_some((start..end, ITERABLE))
    }
}
