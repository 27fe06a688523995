//! What finished runs really spent, from the JSON that they left.

use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::{
    error::{Error, Result},
    prices::Prices,
    run::FinishedRun,
    workload::Workload,
};

/// A finished run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Spent {
    /// The report that it left.
    pub file: PathBuf,
    /// The command that ran.
    pub command: String,
    /// FLOPs under the plan's prices.
    pub flops: u128,
    /// The same in the unit of the plan's budget.
    #[serde(skip)]
    pub cost: u128,
    /// What ran.
    #[serde(skip)]
    pub workload: Vec<Workload>,
    /// The run's own price list, where it is another than the plan's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub repriced_from: Option<String>,
    /// Whether its countings were compared, and agreed.
    pub audited: bool,
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
        let run = FinishedRun::read(file)?;
        if run.command == "count" {
            return Err(bad(file, "is a count: nothing ran"));
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
            cost: flops,
            workload: run.workload,
            repriced_from: repriced.then_some(run.prices.name),
            audited: run.balanced == Some(true),
        })
    }
}

fn bad(file: &Path, why: &str) -> anyhow::Error {
    Error::File { file: file.into(), why: why.into() }.into()
}
