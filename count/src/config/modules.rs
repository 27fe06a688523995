//! Which projections an adapter's settings are about.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::Projection;
use crate::error::Error;

/// A projection of every layer, `q_proj`, or of one, `layers.3.self_attn.q_proj`: the two spellings
/// under which PEFT finds a module by the end of its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Modules {
    /// The one layer; none: every layer.
    pub layer: Option<usize>,
    /// The projection.
    pub projection: Projection,
}

impl Modules {
    /// Whether it is this one.
    pub fn hold(self, layer: usize, projection: Projection) -> bool {
        self.projection == projection && self.layer.is_none_or(|one| one == layer)
    }
}

impl From<Projection> for Modules {
    /// Of every layer.
    fn from(projection: Projection) -> Self {
        Self { layer: None, projection }
    }
}

impl fmt::Display for Modules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { layer, projection } = self;
        match layer {
            None => f.write_str(projection.name()),
            Some(layer) => write!(f, "layers.{layer}.{}.{projection}", projection.parent()),
        }
    }
}

impl FromStr for Modules {
    type Err = Error;

    /// Reads the end of a module's name: `q_proj`, `self_attn.q_proj`, `3.self_attn.q_proj`,
    /// `layers.3.self_attn.q_proj` or `model.layers.3.self_attn.q_proj`.
    fn from_str(text: &str) -> Result<Self, Error> {
        let fail = || {
            let known = Projection::ALL.map(Projection::name).join(", ");
            let one = "or one layer's, as layers.0.self_attn.q_proj";
            Error::flag("--lora-targets", format!("no projection `{text}`; known: {known}, {one}"))
        };
        let mut parts = text.rsplit('.');
        let name = parts.next().unwrap_or_default();
        let projection = Projection::ALL.into_iter().find(|p| p.name() == name).ok_or_else(fail)?;
        if parts.next().is_some_and(|parent| parent != projection.parent()) {
            return Err(fail());
        }
        let layer = parts.next().map(|n| n.parse().map_err(|_| fail())).transpose()?;
        let above = parts.next().is_none_or(|list| list == "layers")
            && parts.next().is_none_or(|model| model == "model")
            && parts.next().is_none();
        if above { Ok(Self { layer, projection }) } else { Err(fail()) }
    }
}

impl Serialize for Modules {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Modules {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        parsed(deserializer)
    }
}

/// Numbers of layers, as `0-3,7`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layers(pub Vec<usize>);

impl fmt::Display for Layers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let runs = self.0.chunk_by(|a, b| a + 1 == *b).map(|run| match run {
            [first, .., last] => format!("{first}-{last}"),
            one => one.iter().map(usize::to_string).collect(),
        });
        f.write_str(&runs.collect::<Vec<_>>().join(","))
    }
}

impl FromStr for Layers {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let part = |part: &str| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
            // No model has so many; a longer list would only fill memory.
            (first <= last && last < 1 << 20).then(|| (first..=last).collect::<Vec<usize>>())
        };
        let parts: Option<Vec<_>> = text.split(',').map(part).collect();
        let why = || format!("`{text}` is no list of layers; write 0-3,7");
        let parts = parts.ok_or_else(|| Error::flag("--lora-layers", why()))?;
        Ok(Self(parts.concat()))
    }
}

/// What a user names as targets: some modules, or `all-linear`, every projection of every layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TargetModules {
    /// All seven projections, as PEFT's `all-linear`: the head is none of them.
    AllLinear,
    /// These.
    Of(Modules),
}

impl TargetModules {
    /// Its spelling of every projection.
    pub const ALL_LINEAR: &str = "all-linear";

    /// The modules that `list` names together.
    pub fn modules(list: &[Self]) -> Vec<Modules> {
        let each = list.iter().map(|target| match target {
            Self::AllLinear => Projection::ALL.map(Modules::from).to_vec(),
            Self::Of(modules) => vec![*modules],
        });
        each.flatten().collect()
    }
}

impl FromStr for TargetModules {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match text.eq_ignore_ascii_case(Self::ALL_LINEAR) {
            true => Ok(Self::AllLinear),
            false => text.parse().map(Self::Of),
        }
    }
}

impl<'de> Deserialize<'de> for TargetModules {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        parsed(deserializer)
    }
}

/// A string that is parsed; of an error, what is wrong, for the file tells where.
fn parsed<'de, T: FromStr<Err = Error>, D: Deserializer<'de>>(from: D) -> Result<T, D::Error> {
    let text = String::deserialize(from)?;
    text.parse().map_err(|error| match error {
        Error::Flag { why, .. } => de::Error::custom(why),
        other => de::Error::custom(other),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_read_by_the_end_of_their_names() {
        let of = |text: &str| text.parse::<Modules>();
        let all = Modules::from(Projection::QProj);
        let one = Modules { layer: Some(3), ..all };
        for (text, expected) in [
            ("q_proj", all),
            ("self_attn.q_proj", all),
            ("3.self_attn.q_proj", one),
            ("layers.3.self_attn.q_proj", one),
            ("model.layers.3.self_attn.q_proj", one),
        ] {
            assert_eq!(of(text).unwrap(), expected, "{text}");
        }
        assert_eq!(one.to_string(), "layers.3.self_attn.q_proj");
        for text in [
            "",
            "q",
            "mlp.q_proj",
            "layers.3.q_proj",
            "x.self_attn.q_proj",
            "blocks.3.self_attn.q_proj",
            "a.layers.3.self_attn.q_proj",
            "lm_head",
        ] {
            assert!(of(text).unwrap_err().to_string().contains(&format!("`{text}`")), "{text}");
        }
        assert!(one.hold(3, Projection::QProj) && !one.hold(2, Projection::QProj));
    }

    #[test]
    fn layers_are_runs() {
        let layers: Layers = "0-3, 7".parse().unwrap();
        assert_eq!(
            (layers.0.as_slice(), layers.to_string()),
            (&[0, 1, 2, 3, 7][..], "0-3,7".into())
        );
        for text in ["", "a", "3-1", "1-", "-1", "0-99999999999"] {
            assert!(text.parse::<Layers>().unwrap_err().to_string().contains("--lora-layers"));
        }
    }

    #[test]
    fn all_linear_is_all_seven() {
        let list = ["all-linear".parse().unwrap()];
        assert_eq!(TargetModules::modules(&list), Projection::ALL.map(Modules::from));
    }
}
