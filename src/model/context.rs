//! What a pass reads beside its tokens: rotary positions, and what was kept of earlier tokens.

use candle_core::Device;

use crate::{
    config::ModelConfig,
    error::Result,
    ledger::{Dtype, Module},
    meter::Meter,
    ops::{KvCache, RopeTable},
};

/// Rotary tables for so many positions: all that a pass over whole sequences needs.
#[derive(Debug)]
pub struct Positions {
    /// As [`ModelConfig::ropes`] lists them.
    tables: Vec<RopeTable>,
    /// Which of them each layer reads.
    of_layer: Vec<usize>,
    positions: usize,
}

impl Positions {
    /// Tables for tokens 0 … `positions` − 1, metered.
    ///
    /// # Errors
    /// The device's.
    pub fn new(
        meter: Meter,
        config: &ModelConfig,
        positions: usize,
        dtype: Dtype,
        device: &Device,
    ) -> Result<Self> {
        let (at, d) = (meter.at(Module::RotaryEmb), config.head_dim());
        let table = |rope| RopeTable::new(at, positions, d, &rope, dtype, device);
        let tables = config.ropes().into_iter().map(table).collect::<Result<_>>()?;
        let of_layer = (0..config.num_hidden_layers).map(|layer| config.rope_of(layer)).collect();
        Ok(Self { tables, of_layer, positions })
    }

    /// The table that `layer` reads.
    pub(super) fn of(&self, layer: usize) -> Result<&RopeTable> {
        let table = self.of_layer.get(layer).and_then(|&table| self.tables.get(table));
        table.ok_or_else(|| anyhow::anyhow!("no positions for layer {layer}"))
    }
}

/// What a batch of sequences carries from pass to pass: keys and values, and positions for as many
/// tokens.
#[derive(Debug)]
pub struct Cache {
    pub(super) positions: Positions,
    pub(super) kv: KvCache,
}

impl Cache {
    /// Room for `capacity` tokens in each of `batch` sequences. The rotary tables are metered.
    ///
    /// # Errors
    /// The device's, out of memory among them.
    pub fn new(
        meter: Meter,
        config: &ModelConfig,
        batch: usize,
        capacity: usize,
        dtype: Dtype,
        device: &Device,
    ) -> Result<Self> {
        let shape = (batch, config.num_key_value_heads, capacity, config.head_dim());
        let kv = KvCache::new(config.num_hidden_layers, shape, dtype, device)?;
        let positions = Positions::new(meter, config, capacity, dtype, device)?;
        Ok(Self { positions, kv })
    }

    /// Tokens held of each sequence.
    pub fn held(&self) -> usize {
        self.kv.held()
    }

    /// As [`KvCache::set_held`].
    ///
    /// # Errors
    /// As there.
    pub fn set_held(&mut self, held: usize) -> Result<()> {
        self.kv.set_held(held)
    }
}

/// What the tokens of a pass come after.
#[derive(Debug)]
pub enum Context<'a> {
    /// Nothing: they are whole sequences, of which nothing is kept.
    Whole(&'a Positions),
    /// What is held, which they join.
    Cached(&'a mut Cache),
    /// The same, while whoever feeds them counts them.
    Held(&'a Cache),
}

impl Context<'_> {
    pub(super) fn positions(&self) -> &Positions {
        match self {
            Self::Whole(positions) => positions,
            Self::Cached(cache) => &cache.positions,
            Self::Held(cache) => &cache.positions,
        }
    }

    pub(super) fn kv(&self) -> Option<&KvCache> {
        match self {
            Self::Whole(_) => None,
            Self::Cached(cache) => Some(&cache.kv),
            Self::Held(cache) => Some(&cache.kv),
        }
    }

    /// Tokens before those of this pass; checks that there is room for (batch, seq) more.
    pub(super) fn past(&self, batch: usize, seq: usize) -> Result<usize> {
        if let Some(kv) = self.kv() {
            kv.check_room(batch, seq)?;
            return Ok(kv.held());
        }
        let most = self.positions().positions;
        anyhow::ensure!(seq <= most, "{seq} tokens of {most} positions");
        Ok(0)
    }
}
