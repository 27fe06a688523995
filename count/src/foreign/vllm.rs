//! vLLM's `/metrics`, of a server started with `--enable-mfu-metrics`.
//!
//! Source: `PerfMetricsProm` in vllm/v1/metrics/perf.py of vLLM 0.33.0. The counter is a double, one
//! an engine, of FLOPs per GPU: an engine's GPUs share its model's heads, widths and layers.

use super::{Fact, Stated, Told};
use crate::{
    analytic::Structure,
    prices::Prices,
    workload::{Task, Workload},
};

const FLOPS: &str = "vllm:estimated_flops_per_gpu_total";
const PROMPT: &str = "vllm:prompt_tokens_total";
const GENERATED: &str = "vllm:generation_tokens_total";

/// The three counters.
#[derive(Debug)]
pub(super) struct Metrics {
    /// Of each engine.
    flops: Vec<f64>,
    prompt: Option<u64>,
    generated: Option<u64>,
}

pub(super) fn is_one(text: &str) -> bool {
    text.lines().any(|line| line.starts_with("vllm:"))
}

impl Metrics {
    pub(super) fn read(text: &str) -> Result<Self, String> {
        let flops = values(text, FLOPS)?;
        if flops.is_empty() {
            return Err(format!("lacks `{FLOPS}`: start vLLM with --enable-mfu-metrics"));
        }
        let tokens = |name: &str| -> Result<Option<u64>, String> {
            let sum = values(text, name)?;
            Ok((!sum.is_empty()).then(|| sum.iter().sum::<f64>() as u64))
        };
        let read = Self { flops, prompt: tokens(PROMPT)?, generated: tokens(GENERATED)? };
        read.stated(1)?;
        Ok(read)
    }

    /// All engines, one GPU each.
    fn stated(&self, additions: u128) -> Result<Stated, String> {
        let all = self
            .flops
            .iter()
            .try_fold(Stated::exact(0), |sum, flops| sum.plus(Stated::float(*flops, additions)?));
        all.ok_or_else(|| format!("`{FLOPS}` is no count"))
    }

    pub(super) fn told(&self, workload: &Workload, gpus: Option<u64>) -> Result<Told, String> {
        let gpus = gpus.ok_or(super::PER_GPU)?;
        let engines = self.flops.len() as u64;
        if gpus == 0 || gpus % engines != 0 {
            return Err(format!(
                "has {engines} engines, which --gpus {gpus} does not divide among"
            ));
        }
        let (passes, prompt, generated) = match workload.task {
            Task::Forward { batch, seq, .. } => (1, u128::from(batch) * u128::from(seq), None),
            Task::Evaluate { passes, .. } => (passes.into(), workload.task.tokens().fed, None),
            Task::Generate { batch, prompt_tokens, ref prompts, new_tokens, ref then, .. } => {
                if !then.is_empty() {
                    return Err(
                        "tells turns of a conversation apart, as requests of their own".into()
                    );
                }
                let of_all = |tokens: u64| u128::from(batch) * u128::from(tokens);
                let prompts = match prompts {
                    Some(prompts) => prompts.lengths().tokens(),
                    None => of_all(prompt_tokens),
                };
                (new_tokens.into(), prompts, Some(of_all(new_tokens)))
            }
            Task::Verify { .. } | Task::Train { .. } => {
                return Err(super::only("generate, forward or eval"));
            }
        };
        let of_engine = u128::from(gpus / engines);
        let stated = self.stated(passes)?.times(of_engine);
        let mut facts = vec![];
        facts.extend(self.prompt.map(|tokens| Fact::new("prompt tokens", tokens, prompt)));
        let chosen = self.generated.zip(generated);
        facts.extend(chosen.map(|(file, stated)| Fact::new("generated tokens", file, stated)));
        Ok(Told {
            structures: &[Structure::Vllm],
            prices: Prices::matmul(),
            stated: Some(stated.ok_or("does not fit 126 bits on so many GPUs")?),
            seconds: None,
            facts,
            notes: vec![format!(
                "FLOPs per GPU × {of_engine} GPUs of each engine, {engines} in all"
            )],
        })
    }
}

/// Every sample of a metric: `name{labels} value`.
fn values(text: &str, name: &str) -> Result<Vec<f64>, String> {
    let samples = text.lines().enumerate().filter_map(|(index, line)| {
        let rest = line.strip_prefix(name)?;
        let value = match rest.strip_prefix('{') {
            Some(labelled) => labelled.rsplit_once('}').map(|(_, value)| value),
            None => rest.strip_prefix(' '),
        };
        let number = value.and_then(|v| v.split_whitespace().next()?.parse::<f64>().ok());
        let count = number.filter(|n| n.is_finite() && *n >= 0.0);
        Some(count.ok_or_else(|| format!("line {}: `{name}` has no count", index + 1)))
    });
    samples.collect()
}
