//! What no model can be.

use super::{ModelConfig, Rope, RopeScaling};
use crate::error::{Error, Result};

impl ModelConfig {
    /// Refuses what no model can be; `origin` names the source in the error.
    ///
    /// # Errors
    /// The first key at fault.
    pub fn validate(&self, origin: &str) -> Result<()> {
        let fail = |key: &str, why: String| -> Result<()> {
            Err(Error::Config { origin: origin.into(), key: key.into(), why }.into())
        };
        // Far above any published model, and low enough that no count below can overflow.
        const LARGEST: usize = 1 << 24;
        const MOST_LAYERS: usize = 1 << 16;
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("max_position_embeddings", self.max_position_embeddings),
            ("head_dim", self.head_dim.unwrap_or(1)),
        ];
        for (key, value) in sizes {
            if value == 0 {
                return fail(key, "is 0".into());
            }
            if value > LARGEST {
                return fail(key, format!("is {value}, above the largest supported, {LARGEST}"));
            }
        }
        let (h, k) = (self.num_attention_heads, self.num_key_value_heads);
        if !h.is_multiple_of(k) {
            return fail("num_key_value_heads", format!("is {k}, which does not divide {h} heads"));
        }
        let q_width = h.saturating_mul(self.head_dim.unwrap_or(1));
        if q_width > LARGEST {
            return fail("head_dim", format!("makes attention {q_width} wide, above {LARGEST}"));
        }
        if self.num_hidden_layers > MOST_LAYERS {
            let why = format!("is {}, above {MOST_LAYERS}", self.num_hidden_layers);
            return fail("num_hidden_layers", why);
        }
        if self.head_dim.is_none() && !self.hidden_size.is_multiple_of(h) {
            let why = format!("is {h}, which does not divide hidden_size {}", self.hidden_size);
            return fail("num_attention_heads", why);
        }
        if !self.head_dim().is_multiple_of(2) {
            return fail("head_dim", format!("is {}; RoPE rotates pairs", self.head_dim()));
        }
        if !(self.rms_norm_eps.is_finite() && self.rms_norm_eps >= 0.0) {
            return fail(
                "rms_norm_eps",
                format!("is {}; it must not be negative", self.rms_norm_eps),
            );
        }
        if let Some(scalar) = self.query_pre_attn_scalar.filter(|s| !positive(*s)) {
            return fail("query_pre_attn_scalar", format!("is {scalar}; it must be positive"));
        }
        if let Some(window) = &self.window {
            if window.width == 0 {
                return fail("sliding_window", "is 0".into());
            }
            if window.width > LARGEST {
                let why = format!("is {}, above the largest supported, {LARGEST}", window.width);
                return fail("sliding_window", why);
            }
            let (answers, layers) = (window.layers.len(), self.num_hidden_layers);
            if answers != layers {
                return fail("layer_types", format!("names {answers} layers of {layers}"));
            }
        }
        self.ropes()
            .iter()
            .try_for_each(|rope| rope.fault().map_or(Ok(()), |(key, why)| fail(key, why)))
    }
}

fn positive(x: f64) -> bool {
    x.is_finite() && x > 0.0
}

impl Rope {
    /// The first key whose value makes no sense, and why.
    pub(super) fn fault(&self) -> Option<(&'static str, String)> {
        let (mut numbers, mut rising) = (vec![("rope_theta", self.theta)], None);
        match self.scaling {
            RopeScaling::Default => {}
            RopeScaling::Linear { factor } => numbers.push(("factor", factor)),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => {
                numbers.extend([
                    ("factor", factor),
                    ("low_freq_factor", low_freq_factor),
                    ("high_freq_factor", high_freq_factor),
                    ("original_max_position_embeddings", original_max_position_embeddings as f64),
                ]);
                let ends = [low_freq_factor, high_freq_factor];
                rising = Some(("low_freq_factor", "high_freq_factor", ends));
            }
            RopeScaling::Yarn {
                factor,
                beta_fast,
                beta_slow,
                original_max_position_embeddings,
                attention_factor,
                truncate: _,
            } => {
                numbers.extend([
                    ("factor", factor),
                    ("beta_fast", beta_fast),
                    ("beta_slow", beta_slow),
                    ("original_max_position_embeddings", original_max_position_embeddings as f64),
                    ("attention_factor", attention_factor),
                ]);
                rising = Some(("beta_slow", "beta_fast", [beta_slow, beta_fast]));
            }
        }
        if let Some((key, value)) = numbers.iter().find(|(_, value)| !positive(*value)) {
            return Some((key, format!("is {value}; it must be a positive number")));
        }
        // Angles that grow with the pair, or a context that shrinks, are of no model.
        let least = ["rope_theta", "factor"];
        if let Some((key, value)) = numbers.iter().find(|(key, v)| least.contains(key) && *v < 1.0)
        {
            return Some((key, format!("is {value}; it must be 1 at least")));
        }
        let (low, high, [a, b]) = rising.filter(|(_, _, [a, b])| a >= b)?;
        Some((low, format!("is {a}; it must be below `{high}`, {b}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(change: impl Fn(&mut ModelConfig)) -> String {
        let mut config = ModelConfig::preset("tiny").unwrap();
        change(&mut config);
        config.validate("config.json").unwrap_err().to_string()
    }

    #[test]
    fn impossible_values_are_named() {
        assert_eq!(
            refused(|c| c.num_attention_heads = 0),
            "config.json: `num_attention_heads` is 0"
        );
        assert!(refused(|c| c.num_key_value_heads = 3).contains("`num_key_value_heads` is 3"));
        assert!(refused(|c| c.num_attention_heads = 6).contains("does not divide"));
        assert!(refused(|c| c.vocab_size = 1 << 40).contains("`vocab_size` is 1099511627776"));
        assert!(refused(|c| c.head_dim = Some(7)).contains("`head_dim` is 7"));
        assert!(refused(|c| c.rope.theta = f64::NAN).contains("`rope_theta`"));
        let stretch = |scaling| refused(|c| c.rope.scaling = scaling);
        let shrunk = stretch(RopeScaling::Linear { factor: 0.5 });
        assert!(shrunk.contains("`factor` is 0.5; it must be 1 at least"), "{shrunk}");
        let swapped = stretch(RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 4.0,
            high_freq_factor: 1.0,
            original_max_position_embeddings: 64,
        });
        assert!(
            swapped.contains("`low_freq_factor` is 4; it must be below `high_freq"),
            "{swapped}"
        );
    }
}
