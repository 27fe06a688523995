//! Bytes of weights and cache that ops read and write, from the ledger's dimensions.

use crate::{
    config::Projection,
    ledger::{Key, Ledger, Module, Op, Phase},
};

/// Bytes touched, each tensor once a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct Traffic {
    /// Parameters read: matrices, biases, gains, embedding rows.
    pub weights: u128,
    /// Keys and values read by attention, and written by it.
    pub kv_cache: u128,
}

impl Key {
    /// Bytes of parameters and cache that one call touches.
    ///
    /// A product with a weight reads its k·n elements; attention's products read the keys or the
    /// values held, b·k·n elements; what the projections of k and v give, bias added, is written
    /// to the cache.
    pub fn traffic(&self) -> Traffic {
        let weights = |n: u128| Traffic { weights: n, kv_cache: 0 };
        let elements = match (self.scope.module, self.op) {
            (Module::SelfAttn, Op::Matmul { b, k, n, .. }) => {
                Traffic { weights: 0, kv_cache: u128::from(b) * u128::from(k) * u128::from(n) }
            }
            (Module::Proj(_) | Module::Lora(..) | Module::LmHead, Op::Matmul { k, n, .. }) => {
                weights(u128::from(k) * u128::from(n))
            }
            (Module::Proj(Projection::KProj | Projection::VProj), Op::Bias { rows, width }) => {
                Traffic { weights: width.into(), kv_cache: u128::from(rows) * u128::from(width) }
            }
            (_, Op::Bias { width, .. } | Op::RmsNorm { width, .. }) => weights(width.into()),
            (_, Op::Embed { rows, width }) => weights(u128::from(rows) * u128::from(width)),
            _ => Traffic::default(),
        };
        let bytes = u128::from(self.dtype.bytes());
        Traffic { weights: elements.weights * bytes, kv_cache: elements.kv_cache * bytes }
    }
}

impl Ledger {
    /// Bytes of parameters and cache touched in `phase`.
    pub fn traffic(&self, phase: Phase) -> Traffic {
        self.iter().filter(|(key, _)| key.phase == phase).fold(
            Traffic::default(),
            |sum, (key, entry)| {
                let (one, calls) = (key.traffic(), u128::from(entry.calls));
                Traffic {
                    weights: sum.weights + calls * one.weights,
                    kv_cache: sum.kv_cache + calls * one.kv_cache,
                }
            },
        )
    }
}
