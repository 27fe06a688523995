//! A finished run, read back from its JSON.

use std::{fmt, path::Path};

use serde::{
    Deserialize, Serialize,
    de::{
        MapAccess, SeqAccess, Visitor,
        value::{MapAccessDeserializer, SeqAccessDeserializer},
    },
};

use crate::{
    SCHEMA_VERSION,
    analytic::Structure,
    error::{Error, Result},
    prices::{Cost, Prices, Primitives},
    workload::Workload,
};

/// What a finished run says of itself: the part of a report that counting needs.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct FinishedRun {
    schema_version: u32,
    /// The subcommand.
    pub command: String,
    /// Where config and weights came from.
    pub model: String,
    /// What ran, in turn.
    #[serde(deserialize_with = "one_or_many")]
    pub workload: Vec<Workload>,
    /// Which operations its total counts.
    pub structure: Structure,
    /// Under which prices.
    pub prices: Prices,
    /// Its total.
    pub total_flops: u128,
    /// What the total is made of.
    pub primitives: Primitives,
    matmul_macs: Option<u128>,
    matmul_outputs: Option<u128>,
    /// Whether its countings agreed, where they were compared.
    pub balanced: Option<bool>,
}

impl FinishedRun {
    /// Reads what `--json FILE` of `generate`, `audit` or `count` wrote.
    ///
    /// # Errors
    /// A file that is none, of another schema, or with sizes that mean nothing.
    pub fn read(file: &Path) -> Result<Self> {
        let bad = |e: std::io::Error| Error::File { file: file.into(), why: e.to_string() };
        Self::parse(file, &crate::input::read_text(file).map_err(bad)?)
    }

    /// The same of a text that was read from `file`.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn parse(file: &Path, text: &str) -> Result<Self> {
        let bad = |why: String| Error::File { file: file.into(), why };
        let none = |why: String| bad(format!("is no finished run: {why}"));
        let mut json = serde_json::Deserializer::from_str(text);
        // With the key at fault.
        let run: Self =
            serde_path_to_error::deserialize(&mut json).map_err(|e| none(e.to_string()))?;
        json.end().map_err(|e| none(e.to_string()))?;
        if run.schema_version != SCHEMA_VERSION {
            let found = run.schema_version;
            return Err(bad(format!("has schema {found}; this reads {SCHEMA_VERSION}")).into());
        }
        if run.workload.is_empty() {
            return Err(bad("holds no workload".into()).into());
        }
        for workload in &run.workload {
            workload.model.validate(&file.display().to_string())?;
            workload.validate().map_err(|e| bad(e.to_string()))?;
        }
        Ok(run)
    }
}

impl FinishedRun {
    /// FLOPs under `prices`. What the run states under its own must be what its primitives cost.
    ///
    /// # Errors
    /// What is wrong with it, as the rest of a sentence.
    pub fn flops(&self, prices: &Prices) -> Result<u128, String> {
        let Some(cost) = self.cost(prices)? else { return Ok(self.total_flops) };
        let own = self.prices.flops(&cost).map_err(|e| e.to_string())?;
        if own != self.total_flops {
            let stated = self.total_flops;
            return Err(format!(
                "states {stated} FLOPs, its primitives cost {own}: it was changed"
            ));
        }
        prices.flops(&cost).map_err(|e| e.to_string())
    }

    /// What the run was made of; none where the report does not tell matmuls apart, and need not.
    fn cost(&self, prices: &Prices) -> Result<Option<Cost>, String> {
        let cost = match (self.matmul_macs, self.matmul_outputs) {
            (Some(macs), Some(outputs)) => Cost::of(self.primitives, macs, outputs),
            _ if self.prices == *prices && prices.mac.is_some() => return Ok(None),
            _ if self.prices.mac.is_some() || prices.mac.is_some() => {
                return Err("lacks `matmul_macs`, so it cannot be priced anew; run it again".into());
            }
            _ => Some(Cost { other: self.primitives, ..Cost::default() }),
        };
        let why = "has more `matmul_macs` than its primitives can hold: it was changed";
        cost.map(Some).ok_or_else(|| why.into())
    }
}

/// Writes a workload, or a list of several.
///
/// # Errors
/// What the writer reports.
pub fn write_one_or_many<S: serde::Serializer>(
    workloads: &[Workload],
    s: S,
) -> Result<S::Ok, S::Error> {
    match workloads {
        [one] => one.serialize(s),
        many => many.serialize(s),
    }
}

/// One workload, or a list of them. A visitor, for an untagged enum would not tell which key is at
/// fault.
///
/// # Errors
/// Neither.
pub fn one_or_many<'de, D: serde::Deserializer<'de>>(d: D) -> Result<Vec<Workload>, D::Error> {
    struct OneOrMany;
    impl<'de> Visitor<'de> for OneOrMany {
        type Value = Vec<Workload>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a workload, or a list of them")
        }

        fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Vec<Workload>, A::Error> {
            Ok(vec![Workload::deserialize(MapAccessDeserializer::new(map))?])
        }

        fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Vec<Workload>, A::Error> {
            Vec::deserialize(SeqAccessDeserializer::new(list))
        }
    }
    d.deserialize_any(OneOrMany)
}
