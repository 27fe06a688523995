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

    /// Tokens held of the longest sequence.
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

impl Cache {
    /// As [`KvCache::count_on_host`].
    pub(crate) fn count_on_host(&mut self) {
        self.kv.count_on_host();
    }
}

/// What the tokens of a pass come after.
#[derive(Debug)]
pub enum Context<'a> {
    /// Nothing: they are whole sequences, of which nothing is kept.
    Whole(&'a Positions),
    /// Nothing, and of sequences of these lengths, one behind the other, none sees another.
    Packed(&'a Positions, &'a [usize]),
    /// What is held, which they join.
    Cached(&'a mut Cache),
    /// What is held of each sequence: so many tokens of each join it, one sequence's behind the
    /// other's.
    Each(&'a mut Cache, &'a [usize]),
    /// The same, while whoever feeds them counts them.
    Held(&'a Cache),
}

impl Context<'_> {
    pub(super) fn positions(&self) -> &Positions {
        match self {
            Self::Whole(positions) | Self::Packed(positions, _) => positions,
            Self::Cached(cache) | Self::Each(cache, _) => &cache.positions,
            Self::Held(cache) => &cache.positions,
        }
    }

    pub(super) fn kv(&self) -> Option<&KvCache> {
        match self {
            Self::Whole(_) | Self::Packed(..) => None,
            Self::Cached(cache) | Self::Each(cache, _) => Some(&cache.kv),
            Self::Held(cache) => Some(&cache.kv),
        }
    }

    /// Lengths of the sequences of this pass, where each has its own.
    pub(super) fn lengths(&self) -> Option<&[usize]> {
        match self {
            Self::Packed(_, lengths) | Self::Each(_, lengths) => Some(lengths),
            Self::Whole(_) | Self::Cached(_) | Self::Held(_) => None,
        }
    }

    /// Counts the tokens of this pass, of which each sequence has `seq`, or its own number.
    pub(super) fn advance(self, seq: usize) -> Result<()> {
        match self {
            Self::Cached(cache) => cache.kv.advance(seq),
            Self::Each(cache, lengths) => cache.kv.advance_each(lengths),
            Self::Whole(_) | Self::Packed(..) | Self::Held(_) => Ok(()),
        }
    }

    /// (tokens fed, tokens before them) of each sequence of a pass of (batch, seq): of one for all
    /// where they are alike. Checks that there is room.
    pub(super) fn spans(&self, batch: usize, seq: usize) -> Result<Vec<(usize, usize)>> {
        let most = self.positions().positions;
        let Some(lengths) = self.lengths() else {
            let Some(kv) = self.kv() else {
                anyhow::ensure!(seq <= most, "{seq} tokens of {most} positions");
                return Ok(vec![(seq, 0)]);
            };
            kv.check_room(batch, seq)?;
            return Ok(vec![(seq, kv.held())]);
        };
        let fed: usize = lengths.iter().sum();
        let fits = batch == 1 && fed == seq && !lengths.contains(&0);
        anyhow::ensure!(fits, "sequences of {fed} tokens in a pass of {batch} x {seq}");
        let Some(kv) = self.kv() else {
            let longest = lengths.iter().max().copied().unwrap_or(0);
            anyhow::ensure!(longest <= most, "{longest} tokens of {most} positions");
            return Ok(lengths.iter().map(|length| (*length, 0)).collect());
        };
        kv.check_room_for_each(lengths)?;
        Ok(lengths.iter().copied().zip(kv.held_of_each().iter().copied()).collect())
    }
}
