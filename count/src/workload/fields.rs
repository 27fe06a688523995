//! The one vocabulary of workloads: what each kind has for dimensions, what they are called, what
//! they may be and what they are where nobody says. Flags, plans and sweeps are made from it.
//!
//! A key is written `prompt-tokens` in flags and sweeps, `prompt_tokens` in plans and in JSON.

use std::{fmt, num::IntErrorKind, str::FromStr};

use serde::{Deserialize, Serialize, Serializer};

use super::{Logits, Rows, Sampling, Task, Turn};
use crate::ledger::MomentDtype;

/// A kind of workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// One forward pass, after others if there is a past.
    Forward,
    /// New tokens after a prompt.
    Generate,
    /// Rounds of verification in speculative decoding.
    Verify,
    /// Steps of training.
    Train,
    /// Forward passes with a loss.
    #[serde(rename = "eval", alias = "evaluate")]
    Evaluate,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 5] =
        [Self::Forward, Self::Generate, Self::Verify, Self::Train, Self::Evaluate];

    /// As JSON and plans spell it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Forward => "forward",
            Self::Generate => "generate",
            Self::Verify => "verify",
            Self::Train => "train",
            Self::Evaluate => "eval",
        }
    }

    /// The task of this kind whose dimensions nobody says.
    pub const fn task(self) -> Task {
        const SEQ: u64 = 512;
        match self {
            Self::Forward => {
                Task::Forward { batch: 1, seq: SEQ, past: 0, logits: Logits::All, sequences: None }
            }
            Self::Generate => Task::Generate {
                batch: 1,
                past: 0,
                prompt_tokens: SEQ,
                prompts: None,
                new_tokens: 64,
                max_new_tokens: 64,
                then: Vec::new(),
                prefill_chunk: None,
                kv_cache: true,
                sampling: Sampling::GREEDY,
            },
            Self::Verify => {
                Task::Verify { batch: 1, past: SEQ, drafted: 4, accepted: 2, rounds: 1 }
            }
            Self::Train => Task::Train {
                batch: 1,
                seq: SEQ,
                accumulate: 1,
                steps: 1,
                full: false,
                recompute: false,
                clip: true,
                moments: MomentDtype::F32,
                rows: Rows::Whole,
            },
            Self::Evaluate => Task::Evaluate { batch: 1, seq: SEQ, passes: 1, rows: Rows::Whole },
        }
    }

    /// The dimensions of this kind.
    pub fn keys(self) -> impl Iterator<Item = Key> {
        Key::ALL.into_iter().filter(move |key| key.place(&mut self.task()).is_some())
    }
}

/// A dimension of workloads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Key {
    /// Sequences of a pass.
    Batch,
    /// Tokens of each sequence.
    Seq,
    /// Tokens in the cache.
    Past,
    /// Which positions get logits.
    Logits,
    /// Tokens of each prompt.
    PromptTokens,
    /// Tokens chosen for each sequence.
    NewTokens,
    /// Further turns.
    Then,
    /// Tokens of a prompt that one pass feeds.
    PrefillChunk,
    /// Whether keys and values are kept.
    KvCache,
    /// Of sampling.
    Temperature,
    /// Of sampling.
    TopK,
    /// Of sampling.
    TopP,
    /// Of sampling.
    RepeatPenalty,
    /// Tokens drafted for each round.
    Drafted,
    /// Drafted tokens that each round keeps.
    Accepted,
    /// Rounds of verification.
    Rounds,
    /// Optimizer steps.
    Steps,
    /// Micro-steps of an optimizer step.
    Accumulate,
    /// Whether every weight is trained.
    Full,
    /// Whether layers run forward again for their gradients.
    Recompute,
    /// Whether gradients are clipped.
    Clip,
    /// How the optimizer keeps its moments.
    Moments,
    /// Passes of an evaluation.
    Passes,
}

/// What may stand for a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// A whole number, at least 1.
    Count,
    /// A whole number, 0 or above.
    Natural,
    /// Yes or no, no where nobody says.
    Switch,
    /// Yes or no, yes where nobody says: the flag is `--no-KEY`.
    Off,
    /// A number.
    Real,
    /// `all`, `last` or `none`.
    Logits,
    /// `f32` or `bf16`.
    Moments,
    /// Turns `P+N`: P tokens of a prompt, N new ones.
    Turns,
}

/// A value of a key, wherever it was read.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Value {
    /// A whole number.
    Number(u64),
    /// Yes or no.
    Switch(bool),
    /// A number.
    Real(f64),
    /// A word.
    Text(String),
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(n) => n.fmt(f),
            Self::Switch(on) => on.fmt(f),
            Self::Real(n) => n.fmt(f),
            Self::Text(text) => f.pad(text),
        }
    }
}

/// Where a task keeps the value of a key.
enum Place<'a> {
    Count(&'a mut u64),
    Natural(&'a mut u64),
    MaybeCount(&'a mut Option<u64>),
    MaybeSize(&'a mut Option<usize>),
    Switch(&'a mut bool),
    Off(&'a mut bool),
    Real(&'a mut f64),
    MaybeReal(&'a mut Option<f64>),
    Logits(&'a mut Logits),
    Moments(&'a mut MomentDtype),
    Turns(&'a mut Vec<Turn>),
}

impl Place<'_> {
    const fn form(&self) -> Form {
        match self {
            Self::Count(_) | Self::MaybeCount(_) | Self::MaybeSize(_) => Form::Count,
            Self::Natural(_) => Form::Natural,
            Self::Switch(_) => Form::Switch,
            Self::Off(_) => Form::Off,
            Self::Real(_) | Self::MaybeReal(_) => Form::Real,
            Self::Logits(_) => Form::Logits,
            Self::Moments(_) => Form::Moments,
            Self::Turns(_) => Form::Turns,
        }
    }
}

impl Key {
    /// All of them, in the order of the help text.
    pub const ALL: [Self; 23] = [
        Self::PromptTokens,
        Self::NewTokens,
        Self::Seq,
        Self::Batch,
        Self::Past,
        Self::Logits,
        Self::Then,
        Self::PrefillChunk,
        Self::KvCache,
        Self::Drafted,
        Self::Accepted,
        Self::Rounds,
        Self::Accumulate,
        Self::Steps,
        Self::Full,
        Self::Recompute,
        Self::Clip,
        Self::Moments,
        Self::Passes,
        Self::Temperature,
        Self::TopK,
        Self::TopP,
        Self::RepeatPenalty,
    ];

    /// The name in flags and sweeps; plans and JSON have `_` for `-`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Batch => "batch",
            Self::Seq => "seq",
            Self::Past => "past",
            Self::Logits => "logits",
            Self::PromptTokens => "prompt-tokens",
            Self::NewTokens => "new-tokens",
            Self::Then => "then",
            Self::PrefillChunk => "prefill-chunk",
            Self::KvCache => "kv-cache",
            Self::Temperature => "temperature",
            Self::TopK => "top-k",
            Self::TopP => "top-p",
            Self::RepeatPenalty => "repeat-penalty",
            Self::Drafted => "drafted",
            Self::Accepted => "accepted",
            Self::Rounds => "rounds",
            Self::Steps => "steps",
            Self::Accumulate => "accumulate",
            Self::Full => "full",
            Self::Recompute => "recompute",
            Self::Clip => "clip",
            Self::Moments => "moments",
            Self::Passes => "passes",
        }
    }

    /// The key of this name, in either spelling.
    pub fn named(name: &str) -> Option<Self> {
        let name = name.replace('_', "-");
        Self::ALL.into_iter().find(|key| key.name() == name)
    }

    /// What it means, as `--help` says it. Of a [`Form::Off`], what it means to say no.
    pub const fn help(self) -> &'static str {
        match self {
            Self::Batch => "Sequences of a pass",
            Self::Seq => "Tokens of each sequence",
            Self::Past => "Tokens already in the KV cache",
            Self::Logits => "Positions that get logits",
            Self::PromptTokens => "Tokens of each prompt",
            Self::NewTokens => "Tokens chosen for each sequence",
            Self::Then => {
                "One more turn on top of what is cached: P tokens of a prompt, N new \
                           ones; repeat it for more"
            }
            Self::PrefillChunk => "Feed prompts in parts of at most N tokens",
            Self::KvCache => "Run over the whole context again for each token",
            Self::Temperature => "0 is greedy; above 0, draw from softmax(logits / temperature)",
            Self::TopK => "Draw among the K likeliest",
            Self::TopP => "Draw among the likeliest that together hold probability P",
            Self::RepeatPenalty => "Factor against tokens already in the context; 1 is off",
            Self::Drafted => "Tokens drafted for each round, which feeds one more",
            Self::Accepted => "Drafted tokens that each round keeps",
            Self::Rounds => "Rounds of verification",
            Self::Steps => "Optimizer steps",
            Self::Accumulate => "Micro-steps whose gradients are summed into one step",
            Self::Full => "Train every weight, not the adapters alone",
            Self::Recompute => {
                "Keep only each layer's input, and run it forward again for its gradients"
            }
            Self::Clip => "Do not scale gradients down to a norm",
            Self::Moments => "Keep AdamW's moments in f32 or bf16",
            Self::Passes => "Passes",
        }
    }

    /// What stands for its value in `--help`.
    pub const fn value_name(self) -> &'static str {
        match self {
            Self::Batch => "B",
            Self::Seq | Self::PromptTokens => "T",
            Self::Then => "P+N",
            Self::TopK => "K",
            Self::TopP => "P",
            Self::RepeatPenalty => "FACTOR",
            Self::Logits => "LOGITS",
            Self::Moments => "DTYPE",
            Self::Temperature => "TEMPERATURE",
            Self::Past
            | Self::NewTokens
            | Self::PrefillChunk
            | Self::KvCache
            | Self::Drafted
            | Self::Accepted
            | Self::Rounds
            | Self::Steps
            | Self::Accumulate
            | Self::Full
            | Self::Recompute
            | Self::Clip
            | Self::Passes => "N",
        }
    }

    /// Whether it is about how tokens are chosen.
    pub const fn is_sampling(self) -> bool {
        matches!(self, Self::Temperature | Self::TopK | Self::TopP | Self::RepeatPenalty)
    }

    /// What may stand for it; none where no kind has it.
    pub fn form(self) -> Form {
        let forms = Kind::ALL.into_iter().find_map(|kind| {
            let mut task = kind.task();
            self.place(&mut task).map(|place| place.form())
        });
        forms.unwrap_or(Form::Natural)
    }

    /// Whether `task` has it.
    pub fn is_of(self, task: &Task) -> bool {
        self.place(&mut task.clone()).is_some()
    }

    /// Its value in `task`; none where the task does not have it, or where nothing stands there.
    pub fn get(self, task: &Task) -> Option<Value> {
        match self.place(&mut task.clone())? {
            Place::Count(n) | Place::Natural(n) => Some(Value::Number(*n)),
            Place::MaybeCount(n) => n.map(Value::Number),
            Place::MaybeSize(n) => n.map(|n| Value::Number(n as u64)),
            Place::Switch(on) | Place::Off(on) => Some(Value::Switch(*on)),
            Place::Real(n) => Some(Value::Real(*n)),
            Place::MaybeReal(n) => n.map(Value::Real),
            Place::Logits(Logits::All) => Some(Value::Text("all".into())),
            Place::Logits(Logits::Last) => Some(Value::Text("last".into())),
            Place::Logits(Logits::None) => Some(Value::Text("none".into())),
            Place::Moments(dtype) => Some(Value::Text(dtype.name().into())),
            Place::Turns(_) => None,
        }
    }

    /// Gives `task`, which has this key, such a value.
    ///
    /// # Errors
    /// What is wrong with the value or the task, as the rest of a sentence that begins with the key.
    pub fn set(self, task: &mut Task, value: &Value) -> Result<(), String> {
        let name = task.name();
        let Some(place) = self.place(task) else {
            return Err(format!("is no dimension of {name}"));
        };
        let form = place.form();
        match (place, value) {
            (Place::Count(place), Value::Number(n)) if *n > 0 => *place = *n,
            (Place::Natural(place), Value::Number(n)) => *place = *n,
            (Place::MaybeCount(place), Value::Number(n)) if *n > 0 => *place = Some(*n),
            (Place::MaybeSize(place), Value::Number(n)) if *n > 0 => {
                *place = Some(usize::try_from(*n).unwrap_or(usize::MAX));
            }
            (Place::Switch(place) | Place::Off(place), Value::Switch(on)) => *place = *on,
            (Place::Real(place), Value::Real(n)) => *place = *n,
            (Place::Real(place), Value::Number(n)) => *place = *n as f64,
            (Place::MaybeReal(place), Value::Real(n)) => *place = Some(*n),
            (Place::MaybeReal(place), Value::Number(n)) => *place = Some(*n as f64),
            (Place::Logits(place), Value::Text(text)) => *place = logits(text)?,
            (Place::Moments(place), Value::Text(text)) => *place = moments(text)?,
            (Place::Turns(place), Value::Text(text)) => place.push(turn(text)?),
            (Place::Count(_) | Place::MaybeCount(_) | Place::MaybeSize(_), Value::Number(_)) => {
                return Err("is 0; it must be at least 1".into());
            }
            (_, value) => return Err(format!("is {}, not {}", quoted(value), form.says())),
        }
        // Nothing that is counted by itself ends early.
        if let Task::Generate { new_tokens, max_new_tokens, .. } = task {
            *max_new_tokens = *new_tokens;
        }
        Ok(())
    }

    /// The place of this key in a task that has it.
    fn place(self, task: &mut Task) -> Option<Place<'_>> {
        match task {
            Task::Forward { batch, seq, past, logits, sequences: _ } => match self {
                Self::Batch => Some(Place::Count(batch)),
                Self::Seq => Some(Place::Count(seq)),
                Self::Past => Some(Place::Natural(past)),
                Self::Logits => Some(Place::Logits(logits)),
                _ => None,
            },
            Task::Generate {
                batch,
                past,
                prompt_tokens,
                prompts: _,
                new_tokens,
                max_new_tokens: _,
                then,
                prefill_chunk,
                kv_cache,
                sampling,
            } => match self {
                Self::Batch => Some(Place::Count(batch)),
                Self::Past => Some(Place::Natural(past)),
                Self::PromptTokens => Some(Place::Count(prompt_tokens)),
                Self::NewTokens => Some(Place::Count(new_tokens)),
                Self::Then => Some(Place::Turns(then)),
                Self::PrefillChunk => Some(Place::MaybeCount(prefill_chunk)),
                Self::KvCache => Some(Place::Off(kv_cache)),
                Self::Temperature => Some(Place::Real(&mut sampling.temperature)),
                Self::TopK => Some(Place::MaybeSize(&mut sampling.top_k)),
                Self::TopP => Some(Place::MaybeReal(&mut sampling.top_p)),
                Self::RepeatPenalty => Some(Place::Real(&mut sampling.repeat_penalty)),
                _ => None,
            },
            Task::Verify { batch, past, drafted, accepted, rounds } => match self {
                Self::Batch => Some(Place::Count(batch)),
                Self::Past => Some(Place::Natural(past)),
                Self::Drafted => Some(Place::Count(drafted)),
                Self::Accepted => Some(Place::Natural(accepted)),
                Self::Rounds => Some(Place::Count(rounds)),
                _ => None,
            },
            Task::Train {
                batch,
                seq,
                accumulate,
                steps,
                full,
                recompute,
                clip,
                moments,
                rows: _,
            } => match self {
                Self::Batch => Some(Place::Count(batch)),
                Self::Seq => Some(Place::Count(seq)),
                Self::Accumulate => Some(Place::Count(accumulate)),
                Self::Steps => Some(Place::Count(steps)),
                Self::Full => Some(Place::Switch(full)),
                Self::Recompute => Some(Place::Switch(recompute)),
                Self::Clip => Some(Place::Off(clip)),
                Self::Moments => Some(Place::Moments(moments)),
                _ => None,
            },
            Task::Evaluate { batch, seq, passes, rows: _ } => match self {
                Self::Batch => Some(Place::Count(batch)),
                Self::Seq => Some(Place::Count(seq)),
                Self::Passes => Some(Place::Count(passes)),
                _ => None,
            },
        }
    }
}

impl Form {
    /// What it takes, after "not".
    const fn says(self) -> &'static str {
        match self {
            Self::Count | Self::Natural => "a whole number",
            Self::Switch | Self::Off => "true or false",
            Self::Real => "a number",
            Self::Logits => "`all`, `last` or `none`",
            Self::Moments => "`f32` or `bf16`",
            Self::Turns => "a turn such as \"50+200\"",
        }
    }

    /// Reads a value of this form.
    ///
    /// # Errors
    /// What is wrong, as the rest of a sentence that begins with the key.
    pub fn parse(self, text: &str) -> Result<Value, String> {
        let text = text.trim();
        let whole = |text: &str| {
            let bad = |e: std::num::ParseIntError| match e.kind() {
                IntErrorKind::PosOverflow => {
                    format!("has `{text}`, which is above {}, the most there can be", u64::MAX)
                }
                _ => format!("has `{text}`, which is no whole number, 0 or above"),
            };
            text.parse().map(Value::Number).map_err(bad)
        };
        match self {
            Self::Count | Self::Natural => whole(text),
            Self::Switch | Self::Off => {
                let bad = |_| format!("has `{text}`, which is neither true nor false");
                text.parse().map(Value::Switch).map_err(bad)
            }
            Self::Real => {
                let bad = |_| format!("has `{text}`, which is no number");
                text.parse().map(Value::Real).map_err(bad)
            }
            Self::Logits => logits(text).map(|_| Value::Text(text.into())),
            Self::Moments => moments(text).map(|_| Value::Text(text.into())),
            Self::Turns => turn(text).map(|_| Value::Text(text.into())),
        }
    }
}

fn quoted(value: &Value) -> String {
    match value {
        Value::Text(text) => format!("\"{text}\""),
        Value::Number(_) | Value::Switch(_) | Value::Real(_) => value.to_string(),
    }
}

fn logits(text: &str) -> Result<Logits, String> {
    match text {
        "all" => Ok(Logits::All),
        "last" => Ok(Logits::Last),
        "none" => Ok(Logits::None),
        _ => Err(format!("is `{text}`; known: all, last, none")),
    }
}

fn moments(text: &str) -> Result<MomentDtype, String> {
    MomentDtype::named(text).ok_or_else(|| format!("is `{text}`; known: f32, bf16"))
}

/// Reads `P+N`.
fn turn(text: &str) -> Result<Turn, String> {
    let both = text.split_once('+').and_then(|(prompt, new)| {
        let count = |text: &str| text.trim().parse().ok().filter(|n| *n > 0);
        Some(Turn { prompt_tokens: count(prompt)?, new_tokens: count(new)? })
    });
    both.ok_or_else(|| {
        format!("has `{text}`, which is no turn P+N of P prompt tokens and N new ones")
    })
}

impl FromStr for Turn {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        turn(text)
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl Serialize for Key {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_key_is_of_a_kind_and_found_by_both_spellings() {
        for key in Key::ALL {
            assert!(Kind::ALL.into_iter().any(|kind| kind.keys().any(|k| k == key)), "{key}");
            assert_eq!(Key::named(key.name()), Some(key));
            assert_eq!(Key::named(&key.name().replace('-', "_")), Some(key));
        }
    }

    /// JSON, plans and flags share their words: each key is a field of the task's JSON.
    #[test]
    fn keys_are_the_fields_of_the_json() {
        for kind in Kind::ALL {
            let mut task = kind.task();
            for key in kind.keys() {
                let value = match key.form() {
                    Form::Count | Form::Natural => Value::Number(3),
                    Form::Switch => Value::Switch(true),
                    Form::Off => Value::Switch(false),
                    Form::Real => Value::Real(0.5),
                    Form::Logits => Value::Text("last".into()),
                    Form::Moments => Value::Text("bf16".into()),
                    Form::Turns => Value::Text("5+7".into()),
                };
                key.set(&mut task, &value).unwrap();
                let json = serde_json::to_value(&task).unwrap();
                let field = key.name().replace('-', "_");
                let found = json.get(&field).or_else(|| json["sampling"].get(&field));
                let found = found.unwrap_or_else(|| panic!("{kind:?} has no `{field}`: {json}"));
                match (value, key.form()) {
                    (_, Form::Turns) => assert_eq!(found[0]["new_tokens"], 7),
                    (value, _) => assert_eq!(*found, serde_json::to_value(value).unwrap()),
                }
            }
            assert_eq!(task.name(), kind.name());
        }
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let mut task = Kind::Train.task();
        for (key, value, why) in [
            (Key::Steps, Value::Number(0), "is 0; it must be at least 1"),
            (Key::Steps, Value::Real(1.5), "is 1.5, not a whole number"),
            (Key::Full, Value::Number(1), "is 1, not true or false"),
            (Key::Moments, Value::Number(1), "is 1, not `f32` or `bf16`"),
            (Key::Moments, Value::Text("f16".into()), "is `f16`; known: f32, bf16"),
            (Key::Past, Value::Number(1), "is no dimension of train"),
        ] {
            assert_eq!(key.set(&mut task, &value), Err(why.into()), "{key}");
        }
        let mut task = Kind::Generate.task();
        let turn = |text: &str| Key::Then.set(&mut task.clone(), &Value::Text(text.into()));
        assert!(turn("5+0").unwrap_err().contains("`5+0`, which is no turn"));
        assert!(turn("5").is_err() && turn("5+7").is_ok());
        Key::NewTokens.set(&mut task, &Value::Number(9)).unwrap();
        assert!(matches!(task, Task::Generate { new_tokens: 9, max_new_tokens: 9, .. }));
    }
}
