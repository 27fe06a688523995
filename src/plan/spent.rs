//! What finished runs really spent, from the JSON that they left.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    prices::{Cost, Prices, Primitives},
    report::SCHEMA_VERSION,
};

/// A finished run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Spent {
    /// The report that it left.
    pub file: PathBuf,
    /// The command that ran.
    pub command: String,
    /// FLOPs under the plan's prices.
    pub flops: u128,
    /// The run's own price list, where it is another than the plan's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub repriced_from: Option<String>,
    /// Whether its countings were compared, and agreed.
    pub audited: bool,
}

/// The part of a run's report that says what it spent. Typed, not a JSON value: sums pass 64 bits.
#[derive(Debug, Deserialize)]
struct RunFile {
    schema_version: u32,
    command: String,
    prices: Prices,
    total_flops: u128,
    primitives: Primitives,
    matmul_macs: Option<u128>,
    matmul_outputs: Option<u128>,
    balanced: Option<bool>,
    executed_flops: Option<u128>,
}

impl Spent {
    /// Reads the reports of finished runs and prices them under `prices`.
    ///
    /// # Errors
    /// A file that is no report of a run, that was given twice, whose audit did not balance, or
    /// whose figures contradict each other.
    pub fn read_all(files: &[PathBuf], prices: &Prices) -> Result<Vec<Self>> {
        let mut seen: Vec<PathBuf> = vec![];
        let mut spent = vec![];
        for file in files {
            let one = Self::read(file, prices)?;
            let canonical = file.canonicalize().unwrap_or_else(|_| file.clone());
            if seen.contains(&canonical) {
                return Err(bad(file, "is given twice, and would be subtracted twice"));
            }
            seen.push(canonical);
            spent.push(one);
        }
        Ok(spent)
    }

    fn read(file: &Path, prices: &Prices) -> Result<Self> {
        let text = std::fs::read_to_string(file).map_err(|e| bad(file, &e.to_string()))?;
        let run: RunFile = serde_json::from_str(&text)
            .map_err(|e| bad(file, &format!("is not the JSON report of a run: {e}")))?;
        if run.schema_version != SCHEMA_VERSION {
            let why = format!(
                "has schema version {}; this program reads {SCHEMA_VERSION}",
                run.schema_version
            );
            return Err(bad(file, &why));
        }
        if run.command == "count" || run.command == "plan" {
            return Err(bad(file, &format!("is a {}: nothing ran", run.command)));
        }
        if run.balanced == Some(false) {
            return Err(bad(file, "its audit does not balance, so what it spent is not known"));
        }
        let flops = run.flops(prices).map_err(|why| bad(file, &why))?;
        let repriced = run.prices != *prices;
        Ok(Self {
            file: file.into(),
            command: run.command,
            flops,
            repriced_from: repriced.then_some(run.prices.name),
            audited: run.balanced == Some(true),
        })
    }
}

impl RunFile {
    /// FLOPs under `prices`; what the file states under its own prices must be what its
    /// primitives cost.
    fn flops(&self, prices: &Prices) -> Result<u128, String> {
        let Some(cost) = self.cost(prices)? else { return Ok(self.total_flops) };
        let stated = self.executed_flops.unwrap_or(self.total_flops);
        let own = self.prices.flops(&cost).map_err(|e| e.to_string())?;
        if own != self.total_flops || stated != own {
            return Err(format!(
                "states {stated} FLOPs, but its primitives cost {own}: it was changed"
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
        cost.map(Some).ok_or_else(|| {
            "has more `matmul_macs` than its primitives can hold: it was changed".into()
        })
    }
}

fn bad(file: &Path, why: &str) -> anyhow::Error {
    Error::File { file: file.into(), why: why.into() }.into()
}
