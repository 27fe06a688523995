//! The flags of a workload that need not run.

use clap::Args;

use super::args::{Described, DtypeArg, LoraArgs, ModelArgs};
use crate::{
    error::Result,
    workload::{Task, Workload},
};

/// Its dimensions, model and adapters.
#[derive(Debug, Args)]
pub struct WorkloadArgs<T: Args> {
    #[command(flatten)]
    pub task: T,
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub lora: LoraArgs,
    #[command(flatten)]
    dtype: DtypeArg,
    /// Accepted so that one line serves `count` and `audit`: counting runs nowhere, but the element
    /// type may be the device's
    #[arg(long, hide = true)]
    device: Option<String>,
    /// Likewise
    #[arg(long, hide = true)]
    threads: Option<u16>,
}

impl<T: Args> WorkloadArgs<T> {
    /// Where it would run.
    pub fn device(&self) -> &str {
        self.device.as_deref().unwrap_or("cpu")
    }

    /// The workload of `task`, and where its config came from.
    pub fn of(&self, task: Task) -> Result<(Workload, Described)> {
        let described = self.model.config_only()?;
        let model = described.config.clone();
        let lora = self.lora.config(&model)?;
        let dtype = self.dtype.on(self.device());
        Ok((Workload { model, lora, dtype, task }, described))
    }
}
