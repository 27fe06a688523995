//! What one sequence batch carries from pass to pass.

use candle_core::Device;

use crate::{
    config::ModelConfig,
    error::Result,
    ledger::{Dtype, Module},
    meter::Meter,
    ops::{RopeTable, Tensor},
};

/// Keys and values of the tokens so far, preallocated, and the rotary tables for as many.
#[derive(Debug)]
pub struct KvCache {
    /// Each layer's keys and values, (B, K, capacity, d); none where nothing is kept.
    layers: Vec<(Tensor, Tensor)>,
    rope: RopeTable,
    batch: usize,
    past: usize,
    capacity: usize,
}

impl KvCache {
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
        let (kv_heads, d) = (config.num_key_value_heads, config.head_dim());
        let zeros = || Tensor::zeros((batch, kv_heads, capacity, d), dtype, device);
        let layers = (0..config.num_hidden_layers)
            .map(|_| Ok((zeros()?, zeros()?)))
            .collect::<Result<_>>()?;
        let empty = Self::transient(meter, config, batch, capacity, dtype, device)?;
        Ok(Self { layers, ..empty })
    }

    /// Keeps nothing from pass to pass: for whole sequences of up to `capacity` tokens, whose keys
    /// and values nobody reads again.
    ///
    /// # Errors
    /// The device's.
    pub fn transient(
        meter: Meter,
        config: &ModelConfig,
        batch: usize,
        capacity: usize,
        dtype: Dtype,
        device: &Device,
    ) -> Result<Self> {
        let (at, d) = (meter.at(Module::RotaryEmb), config.head_dim());
        let rope = RopeTable::new(at, capacity, d, config.rope_theta, dtype, device)?;
        Ok(Self { layers: vec![], rope, batch, past: 0, capacity })
    }

    /// Tokens held.
    pub fn past(&self) -> usize {
        self.past
    }

    /// Tells that `past` tokens are held: 0 forgets all; more than were fed leaves zeros there,
    /// which is all that a count of operations needs.
    ///
    /// # Errors
    /// More than the capacity.
    pub fn set_past(&mut self, past: usize) -> Result<()> {
        anyhow::ensure!(past <= self.capacity, "{past} tokens in a cache of {}", self.capacity);
        self.past = past;
        Ok(())
    }

    /// Tokens that each sequence has room for.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// The keys and values of a layer, (B, K, capacity, d), held or not.
    pub(super) fn layer(&self, layer: usize) -> Result<(&Tensor, &Tensor)> {
        let layer = self.layers.get(layer).ok_or_else(|| anyhow::anyhow!("keeps nothing"))?;
        Ok((&layer.0, &layer.1))
    }

    /// The rotary tables.
    pub fn rope(&self) -> &RopeTable {
        &self.rope
    }

    /// Checks that (batch, seq) more tokens fit.
    pub(super) fn check_room(&self, batch: usize, seq: usize) -> Result<()> {
        anyhow::ensure!(batch == self.batch, "a batch of {batch} in a cache of {}", self.batch);
        let (past, capacity) = (self.past, self.capacity);
        anyhow::ensure!(past + seq <= capacity, "{past} + {seq} tokens in a cache of {capacity}");
        Ok(())
    }

    /// Stores the keys and values (B, K, T, d) of a layer's new tokens and returns all of them,
    /// (B, K, past + T, d), as views.
    pub(super) fn extend(&self, layer: usize, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let Some((keys, values)) = self.layers.get(layer) else {
            return Ok((k.clone(), v.clone()));
        };
        keys.write(k, 2, self.past)?;
        values.write(v, 2, self.past)?;
        let held = self.past + k.dims()[2];
        Ok((keys.narrow(2, 0, held)?, values.narrow(2, 0, held)?))
    }
}
