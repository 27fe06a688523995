//! The KV cache: keys and values of the tokens so far, and how many they are.

use candle_core::Device;

use super::{Kernel, Nodes, Ops, Tensor, mask::reached};
use crate::{
    error::Result,
    ledger::{Dtype, Op},
    meter::At,
};

/// Keys and values of every layer, preallocated for `capacity` tokens of each of B sequences, of
/// which the first ones count: as many as are held, of each sequence its own number.
#[derive(Debug)]
pub struct KvCache {
    /// Keys and values of each layer, (B, K, capacity, d).
    layers: Vec<(Tensor, Tensor)>,
    batch: usize,
    capacity: usize,
    /// Tokens held of each sequence.
    held: Vec<usize>,
    /// What the device counts, where it counts by itself.
    on_device: Option<Counted>,
}

/// How many tokens are held, as a device counts them.
#[derive(Debug)]
pub(super) struct Counted {
    /// Of the longest sequence, one u32.
    pub held: candle_core::Tensor,
    /// How many fewer each sequence holds, (1, B) in u32; none where all hold as many.
    pub behind: Option<candle_core::Tensor>,
}

impl KvCache {
    /// An empty cache of `layers` layers for keys (B, K, capacity, d) of shape `shape`.
    ///
    /// # Errors
    /// The device's, out of memory among them.
    pub fn new(
        layers: usize,
        shape: (usize, usize, usize, usize),
        dtype: Dtype,
        device: &Device,
    ) -> Result<Self> {
        let zeros = || Tensor::zeros(shape, dtype, device);
        let layers = (0..layers).map(|_| Ok((zeros()?, zeros()?))).collect::<Result<_>>()?;
        Ok(Self {
            layers,
            batch: shape.0,
            capacity: shape.2,
            held: vec![0; shape.0],
            on_device: None,
        })
    }

    /// Tokens held of the longest sequence.
    pub fn held(&self) -> usize {
        self.held.iter().copied().max().unwrap_or(0)
    }

    /// Tokens held of each sequence.
    pub fn held_of_each(&self) -> &[usize] {
        &self.held
    }

    /// How many fewer tokens than the longest each sequence holds; none where all hold as many.
    pub(super) fn behind(&self) -> Option<Vec<usize>> {
        let most = self.held();
        let behind: Vec<usize> = self.held.iter().map(|held| most - held).collect();
        behind.iter().any(|behind| *behind > 0).then_some(behind)
    }

    /// Sequences.
    pub(crate) fn batch(&self) -> usize {
        self.batch
    }

    /// Tokens that each sequence has room for.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Tells that `held` tokens are held: 0 forgets all; more than were fed leaves zeros there,
    /// which is all that a count of operations needs.
    ///
    /// # Errors
    /// More than the capacity, or a device that counts by itself.
    pub fn set_held(&mut self, held: usize) -> Result<()> {
        anyhow::ensure!(held <= self.capacity, "{held} tokens in a cache of {}", self.capacity);
        anyhow::ensure!(self.on_device.is_none(), "the device counts what this cache holds");
        self.held.fill(held);
        Ok(())
    }

    /// Counts `tokens` more of every sequence, which every layer holds by now.
    ///
    /// # Errors
    /// More than there is room for.
    pub(crate) fn advance(&mut self, tokens: usize) -> Result<()> {
        self.check_room(self.batch, tokens)?;
        self.held.iter_mut().for_each(|held| *held += tokens);
        Ok(())
    }

    /// The same of so many more of each sequence.
    ///
    /// # Errors
    /// As [`KvCache::check_room_for_each`].
    pub(crate) fn advance_each(&mut self, tokens: &[usize]) -> Result<()> {
        self.check_room_for_each(tokens)?;
        self.held.iter_mut().zip(tokens).for_each(|(held, tokens)| *held += tokens);
        Ok(())
    }

    /// Checks that (batch, seq) more tokens fit.
    pub(crate) fn check_room(&self, batch: usize, seq: usize) -> Result<()> {
        anyhow::ensure!(batch == self.batch, "a batch of {batch} in a cache of {}", self.batch);
        let (held, capacity) = (self.held(), self.capacity);
        anyhow::ensure!(held + seq <= capacity, "{held} + {seq} tokens in a cache of {capacity}");
        Ok(())
    }

    /// Checks that so many more tokens of each sequence fit.
    ///
    /// # Errors
    /// Another number of sequences, or no room.
    pub(crate) fn check_room_for_each(&self, tokens: &[usize]) -> Result<()> {
        self.check_room(tokens.len(), 0)?;
        let capacity = self.capacity;
        for (held, tokens) in self.held.iter().zip(tokens) {
            let fits = held + tokens <= capacity;
            anyhow::ensure!(fits, "{held} + {tokens} tokens in a cache of {capacity}");
        }
        Ok(())
    }

    /// Has the device count from here on: what it holds is written to a tensor that its kernels
    /// read and count up.
    pub(super) fn count_on_device(&mut self) -> Result<()> {
        let Some((keys, _)) = self.layers.first() else { anyhow::bail!("a cache without layers") };
        let numbers = |counts: Vec<usize>| -> Result<candle_core::Tensor> {
            let counts: Vec<u32> =
                counts.into_iter().map(u32::try_from).collect::<Result<_, _>>()?;
            let shape = (1, counts.len());
            Ok(candle_core::Tensor::from_vec(counts, shape, keys.device())?)
        };
        let behind = self.behind().map(numbers).transpose()?;
        self.on_device = Some(Counted { held: numbers(vec![self.held()])?, behind });
        Ok(())
    }

    /// Has the host count again, as it did beside the device.
    pub(crate) fn count_on_host(&mut self) {
        self.on_device = None;
    }

    /// What the device counts, where it does.
    pub(super) fn on_device(&self) -> Option<&Counted> {
        self.on_device.as_ref()
    }

    /// Refuses a device that counted otherwise than the host.
    pub(crate) fn check_device(&self) -> Result<()> {
        let Some(Counted { held, .. }) = &self.on_device else { return Ok(()) };
        let counted = held.flatten_all()?.to_vec1::<u32>()?;
        let expected = self.held() as u32;
        let agrees = counted == [expected];
        anyhow::ensure!(agrees, "the device holds {counted:?} tokens, the host counted {expected}");
        Ok(())
    }

    /// Tokens held of one sequence, or of each, where all hold as many.
    pub(super) fn held_of(&self, sequence: Option<usize>) -> usize {
        sequence.and_then(|sequence| self.held.get(sequence).copied()).unwrap_or(self.held())
    }

    /// The keys and values of a layer, (B, K, capacity, d), held or not.
    pub(super) fn layer(&self, layer: usize) -> Result<(&Tensor, &Tensor)> {
        let found = self.layers.get(layer);
        let (keys, values) = found.ok_or_else(|| anyhow::anyhow!("no layer {layer} is kept"))?;
        Ok((keys, values))
    }

    /// Stores the keys and values (B, K, T, d) of a layer's new tokens, and returns those that the
    /// new tokens reach, themselves among them, as views: (B, K, held + T, d), or in a window the
    /// latest of these. Where there is a `sequence`, they are those of this one alone, and B is 1.
    pub(super) fn extend(
        &self,
        at: At,
        (layer, sequence): (usize, Option<usize>),
        k: &Tensor,
        v: &Tensor,
        window: Option<usize>,
    ) -> Result<(Tensor, Tensor)> {
        let (keys, values) = self.layer(layer)?;
        let held = self.held_of(sequence);
        let seq = k.dims()[2];
        let past = reached(held, window);
        let reach = |cache: &Tensor, new: &Tensor| {
            let cache = match sequence {
                Some(sequence) => cache.narrow(0, sequence, 1)?,
                None => cache.clone(),
            };
            at.launch(&Write { cache: &cache, new, held })?;
            cache.narrow(2, held - past, past + seq)
        };
        Ok((reach(keys, k)?, reach(values, v)?))
    }
}

/// Rows of keys, or of values, copied behind those that are held.
struct Write<'a> {
    cache: &'a Tensor, // (B, K, capacity, d)
    new: &'a Tensor,   // (B, K, T, d)
    held: usize,
}

impl Kernel for Write<'_> {
    type Output = ();

    fn device(&self) -> &Device {
        self.cache.device()
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        let (batch, heads, seq, d) = self.new.data.dims4()?;
        let (rows, width) = ((batch * seq) as u64, (heads * d) as u64);
        ops.add(Op::CacheWrite { rows, width }, self.new.dtype()?);
        Ok(())
    }

    fn run(&self, _: &Nodes) -> candle_core::Result<()> {
        self.cache.data.slice_set(&self.new.data, 2, self.held)
    }
}
