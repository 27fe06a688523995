//! How a GGUF says what its rotary frequencies are: keys, and a tensor of factors.

use super::{FREQUENCY_FACTORS, Metadata};
use crate::{
    config::{Rope, RopeScaling},
    error::{Error, Result},
};

/// The rotary positions of the layers that see the whole context; keys begin with `prefix`.
///
/// `factors` divide the frequencies of a head `width` wide; `context` is the model's, in tokens.
pub(super) fn read(
    metadata: &Metadata,
    prefix: &str,
    width: usize,
    context: usize,
    factors: Option<&[f32]>,
) -> Result<Rope> {
    let key = |rest: &str| format!("{prefix}rope.{rest}");
    let float = |rest: &str| metadata.float(&key(rest));
    let theta = float("freq_base")?.unwrap_or(10_000.0);
    // llama.cpp's defaults: a factor without a type is linear, and it once had another key.
    let kind = metadata.text(&key("scaling.type"))?.unwrap_or("linear");
    let [factor, older] = [float("scaling.factor")?, float("scale_linear")?];
    if let (Some(a), Some(b)) = (factor, older)
        && a != b
    {
        let why = format!("is {b}, and `{}` is {a}", key("scaling.factor"));
        return Err(metadata.bad(&key("scale_linear"), why));
    }
    let factor = factor.or(older).filter(|factor| *factor != 0.0);
    let original = metadata.integer(&key("scaling.original_context_length"))?;
    let attention = float("scaling.attn_factor")?.unwrap_or(1.0);
    let yarn = Yarn {
        beta_fast: float("scaling.yarn_beta_fast")?.unwrap_or(32.0),
        beta_slow: float("scaling.yarn_beta_slow")?.unwrap_or(1.0),
        log_multiplier: float("scaling.yarn_log_multiplier")?.unwrap_or(0.0),
        original: original.unwrap_or(context),
    };
    metadata.refuse_unless(&key("scaling.yarn_ext_factor"), 1.0)?;
    let scaling = match (kind, factor) {
        ("none", _) | ("linear", None | Some(1.0)) => RopeScaling::Default,
        ("linear", Some(factor)) => RopeScaling::Linear { factor },
        ("yarn", Some(factor)) => yarn.scaling(factor, attention),
        ("yarn", None) => return Err(metadata.missing(&key("scaling.factor"))),
        (other, _) => {
            let why = format!("asks for `{other}` RoPE scaling, which is not supported");
            return Err(metadata.bad(&key("scaling.type"), why));
        }
    };
    let idle: &[&str] = match scaling {
        RopeScaling::Yarn { .. } => &[],
        RopeScaling::Default | RopeScaling::Linear { .. } | RopeScaling::Llama3 { .. } => &[
            "scaling.original_context_length",
            "scaling.yarn_beta_fast",
            "scaling.yarn_beta_slow",
            "scaling.yarn_log_multiplier",
        ],
    };
    idle.iter().for_each(|rest| metadata.ignore(&key(rest)));
    if kind == "none" {
        ["scaling.factor", "scale_linear"].iter().for_each(|rest| metadata.ignore(&key(rest)));
    }
    match scaling {
        // The programs that read this key differ on what it means, so it must mean nothing.
        RopeScaling::Yarn { attention_factor, .. } => {
            let key = key("scaling.yarn_attn_factor");
            if metadata.float(&key)?.is_some_and(|f| (f - attention_factor).abs() > 1e-6) {
                let why = format!("is not {attention_factor}, as YaRN has it");
                return Err(metadata.bad(&key, why));
            }
        }
        _ => metadata.refuse_unless(&key("scaling.attn_factor"), 1.0)?,
    }
    let scaling = match (scaling, factors) {
        (scaling, None) => Ok(scaling),
        (RopeScaling::Default, Some(factors)) => llama3(factors, theta, width)
            .ok_or("holds factors that are not Llama 3's; no others are supported"),
        (_, Some(_)) => Err("scales frequencies that other keys scale too"),
    };
    let scaling =
        scaling.map_err(|why| Error::tensor(metadata.origin(), FREQUENCY_FACTORS, why))?;
    Ok(Rope { theta, scaling: scaling.simplified() })
}

/// What the file says of YaRN beside its factor.
struct Yarn {
    beta_fast: f64,
    beta_slow: f64,
    log_multiplier: f64,
    original: usize,
}

impl Yarn {
    /// `attention` multiplies the factor of cosines and sines that YaRN has of its own: 1 + 0.1 ln
    /// of `factor`, over the same with the logarithm multiplied.
    fn scaling(self, factor: f64, attention: f64) -> RopeScaling {
        let magnitude = |by: f64| if factor > 1.0 { 0.1 * by * factor.ln() + 1.0 } else { 1.0 };
        RopeScaling::Yarn {
            factor,
            beta_fast: self.beta_fast,
            beta_slow: self.beta_slow,
            original_max_position_embeddings: self.original,
            attention_factor: attention * magnitude(1.0) / magnitude(self.log_multiplier),
            truncate: true,
        }
    }
}

/// Llama 3's scaling from the factors by which it divides the frequencies of base `theta`, if
/// there is one that gives them.
///
/// The long wavelengths' factor stands at the end. The original context follows from any factor
/// between 1 and that, with the bounds on wavelengths that all published models have.
fn llama3(factors: &[f32], theta: f64, width: usize) -> Option<RopeScaling> {
    const LOW: f64 = 1.0;
    const HIGH: f64 = 4.0;
    const TOLERANCE: f64 = 1e-4;
    if factors.len() != width / 2 {
        return None;
    }
    let factor = f64::from(*factors.last()?);
    if factors.iter().all(|f| *f == 1.0) {
        return Some(RopeScaling::Default);
    }
    let turns = |pair: usize| theta.powf(2.0 * pair as f64 / width as f64);
    let wavelengths: Vec<f64> =
        (0..factors.len()).map(|pair| 2.0 * std::f64::consts::PI * turns(pair)).collect();
    let pairs = || wavelengths.iter().copied().zip(factors.iter().copied().map(f64::from));

    let between = pairs().find(|(_, f)| *f > 1.0 + TOLERANCE && *f < factor * (1.0 - TOLERANCE));
    let original = match between {
        Some((wavelength, f)) => {
            let smooth = (1.0 / f - 1.0 / factor) / (1.0 - 1.0 / factor);
            (wavelength * (LOW + smooth * (HIGH - LOW))).round()
        }
        // Any context between the wavelengths gives these factors.
        None => pairs().find(|(_, f)| *f == factor)?.0.floor(),
    };
    let expected = |wavelength: f64| {
        let smooth = ((original / wavelength - LOW) / (HIGH - LOW)).clamp(0.0, 1.0);
        1.0 / ((1.0 - smooth) / factor + smooth)
    };
    let same = |(wavelength, f): (f64, f64)| (expected(wavelength) - f).abs() <= TOLERANCE * f;
    (factor > 1.0 && original >= 1.0 && pairs().all(same)).then_some(RopeScaling::Llama3 {
        factor,
        low_freq_factor: LOW,
        high_freq_factor: HIGH,
        original_max_position_embeddings: original as usize,
    })
}

#[cfg(test)]
mod tests {
    use std::{collections::HashMap, path::Path};

    use candle_core::quantized::gguf_file::Value;

    use super::*;

    /// Factors in f32, step by step as converters compute them.
    fn factors(theta: f32, width: usize, factor: f32, original: f32) -> Vec<f32> {
        (0..width / 2)
            .map(|i| {
                let frequency = 1.0 / theta.powf(2.0 * i as f32 / width as f32);
                let wavelength = 2.0 * std::f32::consts::PI / frequency;
                let smooth = (original / wavelength - 1.0) / 3.0;
                match wavelength {
                    w if w < original / 4.0 => 1.0,
                    w if w > original => factor,
                    _ => 1.0 / ((1.0 - smooth) / factor + smooth),
                }
            })
            .collect()
    }

    #[test]
    fn llama3_is_recognised_by_its_factors() {
        for (theta, width, factor, original) in [
            (500_000.0, 128, 8.0, 8192),
            (500_000.0, 64, 32.0, 8192),
            (500_000.0, 128, 16.0, 131_072),
            (1000.0, 8, 4.0, 64),
        ] {
            let factors = factors(theta, width, factor, original as f32);
            let expected = RopeScaling::Llama3 {
                factor: factor.into(),
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_max_position_embeddings: original,
            };
            assert_eq!(llama3(&factors, theta.into(), width), Some(expected));
        }
        assert_eq!(llama3(&[1.0; 4], 1e4, 8), Some(RopeScaling::Default));
    }

    #[test]
    fn other_factors_are_none_of_its() {
        let good = factors(500_000.0, 64, 32.0, 8192.0);
        for change in [0, 14, 16, 31] {
            let mut factors = good.clone();
            factors[change] *= 1.001;
            assert_eq!(llama3(&factors, 500_000.0, 64), None, "{change}");
        }
        assert_eq!(llama3(&good, 10_000.0, 64), None);
        assert_eq!(llama3(&good[..31], 500_000.0, 64), None);
        assert_eq!(llama3(&[], 500_000.0, 0), None);
        assert_eq!(llama3(&[f32::NAN, 0.0], 1e4, 4), None);
    }

    fn rope(pairs: &[(&str, Value)], factors: Option<&[f32]>) -> Result<RopeScaling, String> {
        let values: HashMap<String, Value> =
            pairs.iter().map(|(key, value)| (format!("x.rope.{key}"), value.clone())).collect();
        let metadata = Metadata::new(Path::new("m.gguf"), &values);
        let rope = read(&metadata, "x.", 8, 512, factors).map_err(|e| e.to_string())?;
        metadata.refuse_unread("x.", &[]).map_err(|e| e.to_string())?;
        Ok(rope.scaling)
    }

    fn text(s: &str) -> Value {
        Value::String(s.into())
    }

    #[test]
    fn scaling_is_what_the_keys_say() {
        let number = Value::F32;
        let linear = Ok(RopeScaling::Linear { factor: 4.0 });
        assert_eq!(rope(&[], None), Ok(RopeScaling::Default));
        assert_eq!(rope(&[("scaling.type", text("linear"))], None), Ok(RopeScaling::Default));
        assert_eq!(rope(&[("scaling.factor", number(4.0))], None), linear);
        assert_eq!(rope(&[("scale_linear", number(4.0))], None), linear);
        let none = [("scaling.type", text("none")), ("scaling.factor", number(4.0))];
        assert_eq!(rope(&none, None), Ok(RopeScaling::Default));

        let yarn = [("scaling.type", text("yarn")), ("scaling.factor", number(4.0))];
        let with = |more: &[(&'static str, Value)]| rope(&[&yarn[..], more].concat(), None);
        let expected = |attention_factor, original| RopeScaling::Yarn {
            factor: 4.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            original_max_position_embeddings: original,
            attention_factor,
            truncate: true,
        };
        let own = 0.1 * 4f64.ln() + 1.0;
        assert_eq!(with(&[]), Ok(expected(own, 512)));
        let original = ("scaling.original_context_length", Value::U32(64));
        assert_eq!(with(&[original]), Ok(expected(own, 64)));
        let multiplier = ("scaling.yarn_log_multiplier", number(1.0));
        assert_eq!(with(&[multiplier]), Ok(expected(1.0, 512)));
        assert_eq!(with(&[("scaling.attn_factor", number(2.0))]), Ok(expected(2.0 * own, 512)));
        assert_eq!(with(&[("scaling.yarn_attn_factor", Value::F64(own))]), Ok(expected(own, 512)));
    }

    #[test]
    fn other_scaling_is_refused_by_name() {
        let yarn = ("scaling.type", text("yarn"));
        let factor = ("scaling.factor", Value::F32(4.0));
        type Case<'a> = (&'a [(&'a str, Value)], Option<&'a [f32]>, &'a str);
        let cases: [Case; 7] = [
            (&[("scaling.type", text("longrope"))], None, "`longrope` RoPE scaling"),
            (std::slice::from_ref(&yarn), None, "`x.rope.scaling.factor` is missing"),
            (&[("scaling.attn_factor", Value::F32(1.5))], None, "attn_factor` is 1.5"),
            (&[("scaling.yarn_ext_factor", Value::F32(0.5))], None, "ext_factor` is 0.5"),
            (
                &[yarn.clone(), factor.clone(), ("scaling.yarn_attn_factor", Value::F32(1.0))],
                None,
                "`x.rope.scaling.yarn_attn_factor` is not 1.138",
            ),
            (&[factor], Some(&[1.0; 4]), "`rope_freqs.weight` scales frequencies that other"),
            (&[], Some(&[1.0, 2.0, 3.0, 4.0]), "`rope_freqs.weight` holds factors that are not"),
        ];
        for (pairs, factors, why) in cases {
            let error = rope(pairs, factors).unwrap_err();
            assert!(error.contains(why), "`{why}` is not in: {error}");
        }
    }
}
