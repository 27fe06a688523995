//! A finished run, read back from its JSON.

use std::path::Path;

use serde::Deserialize;

use super::SCHEMA_VERSION;
use crate::{
    analytic::Structure,
    error::{Error, Result},
    prices::Prices,
    workload::Workload,
};

/// What a finished run says of itself: the part of [`super::Report`] that counting needs.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct FinishedRun {
    schema_version: u32,
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
}

impl FinishedRun {
    /// Reads what `--json FILE` of `generate`, `audit` or `count` wrote.
    ///
    /// # Errors
    /// A file that is none, of another schema, or with sizes that mean nothing.
    pub fn read(file: &Path) -> Result<Self> {
        let bad = |why: String| Error::File { file: file.into(), why };
        let text = std::fs::read_to_string(file).map_err(|e| bad(e.to_string()))?;
        let run: Self =
            serde_json::from_str(&text).map_err(|e| bad(format!("is no finished run: {e}")))?;
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

fn one_or_many<'de, D: serde::Deserializer<'de>>(d: D) -> Result<Vec<Workload>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum OneOrMany {
        One(Box<Workload>),
        Many(Vec<Workload>),
    }
    Ok(match OneOrMany::deserialize(d)? {
        OneOrMany::One(workload) => vec![*workload],
        OneOrMany::Many(workloads) => workloads,
    })
}
