//! Low-rank adapters: y += scaling · B(A x).

use candle_core::Device;
use rand::{Rng, SeedableRng, rngs::StdRng};

use crate::{
    config::{Ignored, LoraConfig, ModelConfig, Projection},
    error::Result,
    ledger::{Dtype, Lora, Module},
    meter::Meter,
    ops::{Factor, LowRank, Tensor, candle_dtype},
    weights::PeftAdapter,
};

/// Where adapter weights come from.
#[derive(Debug)]
pub enum AdapterSource {
    /// As PEFT initialises: A uniform in ±1/sqrt(in) (Kaiming, a = √5), B zero.
    Fresh {
        /// Ranks, alphas and places; rank 0 is no adapter.
        lora: LoraConfig,
        /// Seed of A.
        seed: u64,
    },
    /// A trained adapter in PEFT's format.
    Peft(PeftAdapter),
}

impl AdapterSource {
    /// Ranks, alphas and places.
    pub fn lora(&self) -> &LoraConfig {
        match self {
            Self::Fresh { lora, .. } => lora,
            Self::Peft(adapter) => &adapter.lora,
        }
    }

    /// What of a trained adapter's config changes nothing; none where there are no files.
    pub fn ignored(&self) -> Option<&[Ignored]> {
        match self {
            Self::Fresh { .. } => None,
            Self::Peft(adapter) => Some(&adapter.ignored),
        }
    }
}

/// One projection's adapter.
#[derive(Debug)]
pub struct Adapter {
    /// (r, in)
    a: Tensor,
    /// (out, r)
    b: Tensor,
    /// [`LoraConfig::scaling`], one element.
    scaling: Tensor,
    /// The same on the host, rounded likewise.
    factor: f32,
    projection: Projection,
}

impl Adapter {
    /// The adapter of `projection` in `layer`, if there is one.
    ///
    /// # Errors
    /// A tensor missing from the source.
    pub fn load(
        source: &AdapterSource,
        config: &ModelConfig,
        layer: usize,
        projection: Projection,
        dtype: Dtype,
        device: &Device,
    ) -> Result<Option<Self>> {
        let lora = source.lora();
        let Some(site) = lora.at(layer, projection) else { return Ok(None) };
        let (rank, factor) = (site.rank, lora.scaling(site));
        let (input, output) = projection.widths(config);
        let (a, b) = match source {
            AdapterSource::Fresh { seed, .. } => {
                let stream = (layer * Projection::ALL.len() + projection as usize) as u64;
                let mut rng = StdRng::seed_from_u64(seed ^ (stream << 32));
                let bound = 1.0 / (input as f32).sqrt();
                let a = (0..rank * input).map(|_| rng.random_range(-bound..bound)).collect();
                let a = Tensor::from_vec(a, (rank, input), dtype, device)?;
                (a, Tensor::zeros((output, rank), dtype, device)?)
            }
            AdapterSource::Peft(adapter) => {
                let dtype = candle_dtype(dtype);
                let a = adapter.a(layer, projection, dtype, device)?;
                (Tensor::of(a), Tensor::of(adapter.b(layer, projection, dtype, device)?))
            }
        };
        let scaled = |on| Tensor::from_vec(vec![factor as f32], 1, dtype, on);
        let (scaling, on_host) = (scaled(device)?, scaled(&Device::Cpu)?.to_vec()?);
        Ok(Some(Self { a, b, scaling, factor: on_host[0], projection }))
    }

    /// Has A of adapters that read one input lie one after another, so that a GPU can read all of
    /// them in one product. Not where they would begin at odd places, which kernels do not take.
    ///
    /// # Errors
    /// The device's.
    pub(super) fn adjoin<'a>(adapters: impl Iterator<Item = &'a mut Self>) -> Result<()> {
        let mut all: Vec<_> = adapters.collect();
        let parts: Vec<Tensor> = all.iter().map(|adapter| adapter.a.clone()).collect();
        let [first, _, ..] = parts.as_slice() else { return Ok(()) };
        if !first.dims()[1].is_multiple_of(8) {
            return Ok(());
        }
        let (together, mut start) = (Tensor::stacked(&parts, first)?, 0);
        for adapter in &mut all {
            let rank = adapter.a.dims()[0];
            adapter.a = together.narrow(0, start, rank)?;
            start += rank;
        }
        Ok(())
    }

    /// Whether gradients of it are computed.
    pub(super) fn is_trained(&self) -> bool {
        self.a.needs_gradient() || self.b.needs_gradient()
    }

    /// A and B.
    pub(super) fn factors(&mut self) -> [(Lora, &mut Tensor); 2] {
        [(Lora::A, &mut self.a), (Lora::B, &mut self.b)]
    }

    /// Its tensors, each accounted for at its own module.
    pub(super) fn at<'a>(&'a self, meter: Meter<'a>) -> LowRank<'a> {
        let at = |part| meter.at(Module::Lora(self.projection, part));
        LowRank {
            a: (at(Lora::A), &self.a),
            b: (at(Lora::B), &self.b),
            scaling: Factor { at: at(Lora::Scale), tensor: &self.scaling, value: self.factor },
            sum: at(Lora::Sum),
        }
    }
}
