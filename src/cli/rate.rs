//! The flags that turn FLOPs into time, money and energy.

use std::path::PathBuf;

use clap::Args;

use crate::{
    hardware::Precision,
    rate::{Amount, RateSpec, Share},
};

/// How fast, and what an hour costs.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Time and cost")]
pub struct RateArgs {
    /// The GPU, by its name in `flopaudit gpus`: h100-sxm, a100-sxm-80gb …
    #[arg(long, value_name = "NAME")]
    gpu: Option<String>,
    /// How many of them work at once [default: 1]
    #[arg(long, value_name = "N")]
    gpus: Option<u64>,
    /// Share of the stated peak that the model's FLOPs reach, recomputed ones left out: 0.42 or 42%
    #[arg(long, value_name = "SHARE")]
    mfu: Option<Share>,
    /// Likewise, recomputed ones included
    #[arg(long, value_name = "SHARE")]
    hfu: Option<Share>,
    /// Element type of the peak [default: --dtype, else bf16]
    #[arg(long, value_enum, value_name = "TYPE")]
    peak: Option<Precision>,
    /// The time that this very workload took, from what `bench train` or `bench prefill` wrote with
    /// --json
    #[arg(long, value_name = "FILE")]
    from_bench: Option<PathBuf>,
    /// Dollars for an hour of one GPU
    #[arg(long, value_name = "DOLLARS")]
    price_per_gpu_hour: Option<Amount>,
    /// Watts that one GPU draws
    #[arg(long, value_name = "WATTS")]
    watts: Option<Amount>,
}

impl RateArgs {
    /// What they say.
    pub fn spec(&self) -> RateSpec {
        let Self { gpu, gpus, mfu, hfu, peak, from_bench, price_per_gpu_hour, watts } =
            self.clone();
        RateSpec { gpu, gpus, mfu, hfu, peak, from_bench, price_per_gpu_hour, watts }
    }

    /// Whether a GPU is named.
    pub fn names_gpu(&self) -> bool {
        self.gpu.is_some()
    }
}
