//! The flags of a workload that need not run.

use clap::Args;

use super::{
    args::{AttentionArg, Described, DtypeArg, LoraArgs, ModelArgs, note},
    lengths::LengthsArgs,
};
use crate::{
    error::Result,
    ledger::Dtype,
    workload::{Task, Workload},
};

/// Its dimensions, model and adapters.
#[derive(Debug, Args)]
pub struct WorkloadArgs<T: Args> {
    #[command(flatten)]
    pub task: T,
    #[command(flatten)]
    pub lengths: LengthsArgs,
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub lora: LoraArgs,
    #[command(flatten)]
    dtype: DtypeArg,
    #[command(flatten)]
    pub attention: AttentionArg,
    /// Accepted so that one line serves `count` and `audit`: counting runs nowhere, but the element
    /// type may be the device's
    #[arg(long, hide = true)]
    device: Option<String>,
    /// Likewise
    #[arg(long, hide = true)]
    threads: Option<u16>,
}

impl<T: Args> WorkloadArgs<T> {
    /// Where it would run: on `default`, where no device is named.
    pub fn device_or<'a>(&'a self, default: &'a str) -> &'a str {
        self.device.as_deref().unwrap_or(default)
    }

    /// The element type, that of `default` where neither it nor a device is named.
    pub fn dtype_or(&self, default: &str) -> Dtype {
        self.dtype.on(self.device_or(default))
    }

    /// The workloads that `task` comes to, and where their config came from; tells what a reader
    /// may not expect.
    pub fn of(&self, task: Task) -> Result<(Vec<Workload>, Described)> {
        let (workloads, described) = self.on("cpu", task)?;
        self.notes(&workloads).iter().for_each(|told| note(told));
        Ok((workloads, described))
    }

    /// What a reader of a count of `workloads` may not expect.
    pub fn notes(&self, workloads: &[Workload]) -> Vec<String> {
        let context = workloads.iter().map(Workload::context).max().unwrap_or(0);
        let most = workloads.first().map_or(0, |w| w.model.max_position_embeddings as u64);
        let beyond = (context > most).then(|| {
            format!("a context of {context} tokens is longer than the model was made for, {most}")
        });
        self.model.stand_in().into_iter().chain(beyond).collect()
    }

    /// The same with the element type of `default`, where neither it nor a device is named.
    pub fn on(&self, default: &str, task: Task) -> Result<(Vec<Workload>, Described)> {
        let (tasks, described) = self.lengths.tasks(task, &self.model)?;
        let described = described.map_or_else(|| self.model.config_only(), Ok)?;
        let model = &described.config;
        let lora = self.lora.config(model)?;
        let workload = |task| {
            let (model, lora, dtype) = (model.clone(), lora.clone(), self.dtype_or(default));
            Workload { model, lora, dtype, attention: self.attention.mode(), task }
        };
        Ok((tasks.into_iter().map(workload).collect(), described))
    }
}
