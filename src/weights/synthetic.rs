//! Random weights of the true shapes: the same FLOPs as the real ones, meaningless text.
//!
//! Each value is a hash of (seed, tensor name, index) alone, so neither the order of loading nor
//! the number of threads changes it. The distribution is a sum of four uniforms, close to a
//! normal one of standard deviation 0.02, the families' initialiser; a norm multiplies by 1.

use std::{collections::HashMap, path::Path};

use candle_core::{Device, Tensor};
use rayon::prelude::*;

use super::{Checkpoint, Source, Weights, tensor_shapes};
use crate::{
    config::ModelConfig,
    error::{Error, Result},
    text::Text,
};

/// Standard deviation of every weight and bias.
const STD: f64 = 0.02;
/// Elements that one thread fills at a time.
const CHUNK: usize = 1 << 16;

#[derive(Debug)]
pub(super) struct Synthetic {
    seed: u64,
    /// Of every norm: 1, or the 0 that a norm adds 1 to.
    gain: f32,
    shapes: HashMap<String, Vec<usize>>,
}

/// Opens `synthetic[:preset][:seed]`; a path to a config.json may stand for the preset.
pub(super) fn open(spec: &str) -> Result<Checkpoint> {
    let (preset, seed) = parse(spec)?;
    let (config, ignored) = if preset.ends_with(".json") || preset.contains('/') {
        ModelConfig::read(Path::new(preset))?
    } else {
        let config = ModelConfig::preset(preset).map_err(|error| match error.downcast() {
            Ok(Error::Flag { why, .. }) => Error::flag("--model", why).into(),
            Ok(other) => other.into(),
            Err(other) => other,
        })?;
        (config, vec![])
    };
    let mut checkpoint = Checkpoint { ignored, ..synthetic(config, seed)? };
    checkpoint.name = format!("synthetic:{preset}:{seed}");
    checkpoint.origin = format!("{} (random weights)", checkpoint.name);
    Ok(checkpoint)
}

/// (preset, seed) of a spec; `qwen2.5-0.5b` and 0 where it is silent.
fn parse(spec: &str) -> Result<(&str, u64)> {
    const DEFAULT: &str = "qwen2.5-0.5b";
    let rest = spec.strip_prefix("synthetic").unwrap_or(spec);
    let rest = rest.strip_prefix(':').unwrap_or(rest);
    if rest.is_empty() {
        return Ok((DEFAULT, 0));
    }
    if let Ok(seed) = rest.parse() {
        return Ok((DEFAULT, seed));
    }
    let Some((preset, seed)) = rest.rsplit_once(':') else { return Ok((rest, 0)) };
    let seed = seed.parse().map_err(|_| {
        let why = format!("`{spec}`: the seed `{seed}` is not an integer from 0 to 2^64-1");
        Error::flag("--model", why)
    })?;
    Ok((preset, seed))
}

/// A checkpoint of random weights for any config, reproducible by `seed`, with a byte-level
/// stand-in for the tokenizer.
///
/// # Errors
/// A config that [`ModelConfig::validate`] refuses.
pub fn synthetic(config: ModelConfig, seed: u64) -> Result<Checkpoint> {
    config.validate("synthetic")?;
    let shapes = tensor_shapes(&config).into_iter().collect();
    let gain = if config.unit_offset_norms { 0.0 } else { 1.0 };
    Ok(Checkpoint {
        weights: Weights { source: Source::Synthetic(Synthetic { seed, gain, shapes }) },
        text: Text::bytes(config.vocab_size),
        name: format!("synthetic, seed {seed}"),
        origin: format!("synthetic, seed {seed} (random weights)"),
        synthetic: true,
        ignored: vec![],
        config,
    })
}

impl Synthetic {
    pub(super) fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.shapes.get(name).cloned()
    }

    /// The f32 tensor `name` of `shape` on the CPU.
    pub(super) fn load(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let n = shape.iter().product();
        let mut values: Vec<f32> = Vec::new();
        values.try_reserve_exact(n).map_err(|_| {
            Error::tensor("synthetic", name, format!("of shape {shape:?} does not fit the memory"))
        })?;
        if name.ends_with("norm.weight") {
            values.resize(n, self.gain);
        } else {
            let key = key(self.seed, name);
            values.resize(n, 0.0);
            values.par_chunks_mut(CHUNK).enumerate().for_each(|(chunk, out)| {
                let start = (chunk * CHUNK) as u64;
                out.iter_mut().zip(start..).for_each(|(x, i)| *x = value(key, i));
            });
        }
        Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
    }
}

/// Mixes the seed and the bytes of the name (FNV-1a) into one stream's key.
fn key(seed: u64, name: &str) -> u64 {
    let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    });
    mix(hash ^ mix(seed))
}

/// The finaliser of SplitMix64: a bijection that scatters neighbouring inputs.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Element `i` of a stream: the hash's four 16-bit parts, summed, centred and scaled to [`STD`].
fn value(key: u64, i: u64) -> f32 {
    // A sum of four uniforms on 0..2^16 has mean 2·(2^16 − 1) and variance (2^32 − 1) / 3.
    const MEAN: i32 = 2 * 65_535;
    const SCALE: f32 = (STD / 37_837.227) as f32;
    let bits = mix(key.wrapping_add(i.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
    let sum = (bits & 0xffff) + (bits >> 16 & 0xffff) + (bits >> 32 & 0xffff) + (bits >> 48);
    (sum as i32 - MEAN) as f32 * SCALE
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;

    #[test]
    fn specs_give_preset_and_seed() {
        assert_eq!(parse("synthetic").unwrap(), ("qwen2.5-0.5b", 0));
        assert_eq!(parse("synthetic:7").unwrap(), ("qwen2.5-0.5b", 7));
        assert_eq!(parse("synthetic:tiny").unwrap(), ("tiny", 0));
        assert_eq!(parse("synthetic:tiny:42").unwrap(), ("tiny", 42));
        assert_eq!(parse("synthetic:a/config.json:1").unwrap(), ("a/config.json", 1));
        let error = parse("synthetic:tiny:-1").unwrap_err().to_string();
        assert!(error.starts_with("--model:") && error.contains("`-1`"), "{error}");
        let error = open("synthetic:huge").unwrap_err().to_string();
        assert!(error.starts_with("--model: no preset `huge`; known: tiny"), "{error}");
    }

    #[test]
    fn values_are_centred_with_the_stated_deviation_and_differ_by_seed_and_name() {
        let n = 1 << 20;
        let sample = |key| -> Vec<f64> { (0..n).map(|i| f64::from(value(key, i))).collect() };
        let a = sample(key(0, "a"));
        let mean = a.iter().sum::<f64>() / n as f64;
        let std = (a.iter().map(|x| x * x).sum::<f64>() / n as f64 - mean * mean).sqrt();
        assert!(mean.abs() < 1e-4 && (std - STD).abs() < 1e-4, "mean {mean}, std {std}");
        assert_ne!(a, sample(key(1, "a")));
        assert_ne!(a, sample(key(0, "b")));
    }

    #[test]
    fn tensors_are_reproducible_and_norms_multiply_by_one() {
        let values = |config, seed, name: &str, shape: &[usize]| {
            let weights = synthetic(config, seed).unwrap().weights;
            let tensor = weights.tensor(name, shape, DType::F32, &Device::Cpu).unwrap();
            tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        let tiny = ModelConfig::preset("tiny").unwrap();
        let load = |seed, name: &str, shape: &[usize]| values(tiny.clone(), seed, name, shape);
        let embedding = "model.embed_tokens.weight";
        assert_eq!(load(3, embedding, &[320, 32]), load(3, embedding, &[320, 32]));
        assert_ne!(load(3, embedding, &[320, 32]), load(4, embedding, &[320, 32]));
        let norm = "model.norm.weight";
        assert_eq!(load(3, norm, &[32]), vec![1.0; 32]);
        let offset = ModelConfig { unit_offset_norms: true, ..tiny.clone() };
        assert_eq!(values(offset, 3, norm, &[32]), vec![0.0; 32]);
        let bias = load(3, "model.layers.0.self_attn.q_proj.bias", &[32]);
        assert!(bias.iter().any(|x| *x != 0.0));
    }

    #[test]
    fn absurd_sizes_are_an_error_and_no_abort() {
        let mut config = ModelConfig::preset("tiny").unwrap();
        (config.vocab_size, config.hidden_size) = (1 << 24, 1 << 24);
        let weights = synthetic(config, 0).unwrap().weights;
        let error = weights
            .tensor("model.embed_tokens.weight", &[1 << 24, 1 << 24], DType::F32, &Device::Cpu)
            .unwrap_err()
            .to_string();
        assert!(error.contains("does not fit the memory"), "{error}");
    }
}
