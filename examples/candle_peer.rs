//! Times candle-transformers' qwen2, for scripts/peers/compare_inference.py:
//! `cargo run --release --example candle_peer -- MODEL PROMPT_TOKENS REPETITIONS STEPS`
//! prints {"prefill_s": [...], "decode_s": [...]}, the steps all after the prompt.

#[path = "../benches/candle/mod.rs"]
mod candle;

use std::time::Instant;

use anyhow::Context;
use candle_core::{DType, Device, Tensor};

fn main() -> anyhow::Result<()> {
    let usage = "MODEL PROMPT_TOKENS REPETITIONS STEPS";
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [model, counts @ ..] = args.as_slice() else { anyhow::bail!(usage) };
    let counts = counts.iter().map(|n| n.parse::<usize>());
    let counts = counts.collect::<Result<Vec<_>, _>>().context(usage)?;
    let &[prompt, repetitions, steps] = counts.as_slice() else { anyhow::bail!(usage) };

    let checkpoint = flopaudit::weights::open(Some(model))?;
    let mut peer = candle::load(&checkpoint, DType::F32)?;
    let vocab = checkpoint.config.vocab_size;
    let ids: Vec<u32> = (0..prompt).map(|i| (i * 7919 % vocab) as u32).collect();
    let ids = Tensor::new(ids, &Device::Cpu)?.unsqueeze(0)?;
    let next = Tensor::new(&[[1u32]], &Device::Cpu)?;

    // The first of each warms up.
    let mut prefill = vec![];
    for _ in 0..=repetitions {
        peer.clear_kv_cache();
        let start = Instant::now();
        peer.forward(&ids, 0)?;
        prefill.push(start.elapsed().as_secs_f64());
    }
    let mut decode = vec![];
    for _ in 0..=steps {
        // The cache grows by concatenation: the clone's alone.
        let mut after_prompt = peer.clone();
        let start = Instant::now();
        after_prompt.forward(&next, prompt)?;
        decode.push(start.elapsed().as_secs_f64());
    }
    let times = serde_json::json!({ "prefill_s": prefill[1..], "decode_s": decode[1..] });
    println!("{times}");
    Ok(())
}
