//! Facts: which op ran, where, with which dimensions, how often.
//!
//! A [`Key`] names an op; a [`Ledger`] is a multiset of keys. Both the predicted and the executed
//! side of an audit are ledgers. What an op costs is an opinion and lives in [`crate::prices`].

mod op;
mod scope;

use std::{collections::BTreeMap, fmt, time::Duration};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

pub use op::Op;
pub use scope::{Lora, Module, Phase, Scope};

/// Element type that an op computed in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// IEEE single.
    F32,
    /// IEEE half.
    F16,
    /// bfloat16.
    #[cfg_attr(feature = "clap", value(name = "bf16"))]
    BF16,
    /// 8 bits, e4m3. Of a model: bfloat16, but for the products of the layers' projections.
    Fp8,
}

impl Dtype {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::F32, Self::F16, Self::BF16, Self::Fp8];

    /// The one of this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|dtype| dtype.name() == name)
    }

    /// Lower-case name, as flags and JSON spell it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::Fp8 => "fp8",
        }
    }

    /// What a model of this type computes in but for the products of its layers' projections: bf16
    /// where those are in 8 bits, else the same.
    pub const fn base(self) -> Self {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => self,
            Self::Fp8 => Self::BF16,
        }
    }

    /// Whether a model of this type multiplies its layers' projections in 8 bits.
    pub const fn is_8_bit(self) -> bool {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => false,
            Self::Fp8 => true,
        }
    }

    /// Bytes of one element.
    pub const fn bytes(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Fp8 => 1,
        }
    }
}

/// Element type that an optimizer keeps its moments in, whatever it computes in.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize,
)]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
#[serde(rename_all = "lowercase")]
pub enum MomentDtype {
    /// As they are computed.
    #[default]
    F32,
    /// Rounded to bfloat16, up or down at random.
    #[cfg_attr(feature = "clap", value(name = "bf16"))]
    BF16,
}

impl MomentDtype {
    /// Both of them.
    pub const ALL: [Self; 2] = [Self::F32, Self::BF16];

    /// The one of this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|dtype| dtype.name() == name)
    }

    /// Lower-case name, as flags and JSON spell it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::BF16 => "bf16",
        }
    }

    /// Bytes of one element.
    pub const fn bytes(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::BF16 => 2,
        }
    }

    /// Whether it is the type where nobody says one, which JSON leaves out.
    pub fn is_f32(&self) -> bool {
        *self == Self::F32
    }
}

/// What makes two calls the same fact.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Key {
    /// What the run was doing.
    pub phase: Phase,
    /// Where in the model.
    pub scope: Scope,
    /// Which op, with its dimensions.
    pub op: Op,
    /// In which element type.
    pub dtype: Dtype,
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {} {}", self.phase.name(), self.scope, self.op, self.dtype.name())
    }
}

/// How often a key ran and, where it was asked for, how long in all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Entry {
    /// Calls.
    pub calls: u64,
    /// Time of all calls; zero where ops were not timed.
    pub time: Duration,
}

/// The multiset {(phase, scope, op, dtype)} → calls.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Ledger(BTreeMap<Key, Entry>);

impl Serialize for Ledger {
    /// As a list of [key, calls]; times are not kept.
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_seq(self.iter().map(|(key, entry)| (key, entry.calls)))
    }
}

impl<'de> Deserialize<'de> for Ledger {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let mut ledger = Self::default();
        for (key, calls) in Vec::<(Key, u64)>::deserialize(d)? {
            ledger.add(key, calls, Duration::ZERO);
        }
        Ok(ledger)
    }
}

impl Ledger {
    /// Counts `calls` more calls of `key`.
    pub fn add(&mut self, key: Key, calls: u64, time: Duration) {
        let entry = self.0.entry(key).or_default();
        entry.calls += calls;
        entry.time += time;
    }

    /// Adds everything that `other` holds.
    pub fn extend(&mut self, other: Self) {
        for (key, entry) in other.0 {
            self.add(key, entry.calls, entry.time);
        }
    }

    /// Keys in order, with their entries.
    pub fn iter(&self) -> impl Iterator<Item = (&Key, &Entry)> {
        self.0.iter()
    }

    /// Calls of `key`; 0 if it never ran.
    pub fn calls(&self, key: &Key) -> u64 {
        self.0.get(key).map_or(0, |e| e.calls)
    }

    /// Distinct keys.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether nothing ran.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
