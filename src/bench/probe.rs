//! Measures a [`Ceiling`] through the ops that the model runs on.

use std::{
    cell::RefCell,
    time::{Duration, Instant},
};

use candle_core::Device;
use rand::{Rng, SeedableRng, rngs::StdRng};

use super::{Ceiling, Datasheet, DeviceInfo, MatmulRate, SCHEMA_VERSION, Stream, StreamRate, now};
use crate::{
    error::{Error, Result},
    ledger::{Dtype, Module, Phase},
    meter::{At, Meter},
    ops::{self, NarrowProduct, Tensor},
};

/// How to measure.
#[derive(Clone, Copy)]
pub struct Probe<'a> {
    /// The device.
    pub device: &'a Device,
    /// Repetitions of each size, of which the fastest counts.
    pub repetitions: usize,
    /// Bytes that it has free, where that is known.
    pub free: Option<u128>,
    /// Hears of each thing done, and may end the work with an error.
    pub tick: &'a dyn Fn(&str) -> Result<()>,
}

/// (m, k, n) of the products tried, the first a decoding step's of several sequences, the next
/// two of a prompt in a small model's MLP.
const SIZES: [(usize, usize, usize); 9] = [
    (8, 4096, 4096),
    (512, 896, 4864),
    (512, 4864, 896),
    (1024, 1024, 1024),
    (2048, 2048, 2048),
    (4096, 4096, 4096),
    (8192, 8192, 8192),
    (16384, 8192, 8192),
    (16384, 16384, 16384),
];

/// Columns of the matrices that are streamed: widths of models.
const WIDTHS: [usize; 3] = [896, 2048, 4864];

/// Rows of the streamed matrix are a multiple of this, as products in 8 bits ask for.
const ROWS: usize = 16;

/// Bytes of the streamed matrix, where memory allows.
const STREAM_BYTES: u128 = 1 << 30;

/// A repetition runs its kernel as often as fits in about this.
const REPETITION: Duration = Duration::from_millis(100);

/// Products that take longer are not tried in larger sizes.
const LONGEST: Duration = Duration::from_millis(1500);

impl Probe<'_> {
    /// Products, stream and dispatch of every one of `dtypes`; `info` says of what.
    ///
    /// # Errors
    /// A device that has no memory for it, or its own.
    pub fn measure(&self, info: DeviceInfo, dtypes: &[Dtype]) -> Result<Ceiling> {
        anyhow::ensure!(!dtypes.is_empty(), "no element type to measure");
        // Memory is shared with whatever else runs on the host: read it before the products and
        // after them, so that one slow moment does not make the ceiling.
        let mut rates = self.streams(dtypes)?;
        let matmul = dtypes.iter().map(|&dtype| self.matmul(dtype)).collect::<Result<_>>()?;
        rates = rates.into_iter().zip(self.streams(dtypes)?).map(faster).collect();
        let bytes_per_s = rates.iter().map(|(_, rate)| rate.bytes_per_s).fold(0.0, f64::max);
        let buffer_bytes = rates.iter().map(|(bytes, _)| *bytes).max().unwrap_or(0);
        let rates = rates.into_iter().map(|(_, rate)| rate).collect();
        Ok(Ceiling {
            schema_version: SCHEMA_VERSION,
            command: "ceiling".into(),
            date: now(),
            matmul,
            stream: Stream { bytes_per_s, buffer_bytes, rates },
            dispatch_s: self.dispatch(dtypes[0])?,
            datasheet: Datasheet::of(&info.name)?,
            device: info,
        })
    }

    /// Reads the streams of `dtypes` anew: their rates are as of now, the ceiling's own the best
    /// that was ever seen.
    ///
    /// # Errors
    /// As [`Probe::measure`].
    pub fn read_anew(&self, ceiling: &mut Ceiling, dtypes: &[Dtype]) -> Result<()> {
        let stream = &mut ceiling.stream;
        for (_, now) in self.streams(dtypes)? {
            stream.bytes_per_s = stream.bytes_per_s.max(now.bytes_per_s);
            stream.rates.retain(|rate| rate.dtype != now.dtype);
            stream.rates.push(now);
        }
        stream.rates.sort_by_key(|rate| rate.dtype);
        Ok(())
    }

    /// The fastest of [`SIZES`].
    fn matmul(&self, dtype: Dtype) -> Result<MatmulRate> {
        let mut best: Option<MatmulRate> = None;
        for (m, k, n) in SIZES {
            let needed = ((m * k + k * n + m * n) as u128) * u128::from(dtype.bytes());
            if self.free.is_some_and(|free| 4 * needed > free) {
                break;
            }
            (self.tick)(&format!("{} product {m} x {k} x {n}", dtype.name()))?;
            let samples = self.product([m, k, n], dtype)?;
            let fastest = fastest(&samples);
            let flops_per_s = (2 * m * k * n) as f64 / fastest;
            if best.as_ref().is_none_or(|best| flops_per_s > best.flops_per_s) {
                let [m, k, n] = [m, k, n].map(|n| n as u64);
                best = Some(MatmulRate { dtype, flops_per_s, m, k, n, samples });
            }
            if fastest > LONGEST.as_secs_f64() / 8.0 {
                break;
            }
        }
        best.ok_or_else(|| Error::Memory("nothing is left to multiply in".into()).into())
    }

    fn streams(&self, dtypes: &[Dtype]) -> Result<Vec<(u64, StreamRate)>> {
        dtypes.iter().map(|&dtype| self.stream(dtype)).collect()
    }

    /// One row times matrices of [`WIDTHS`] columns and of more bytes than caches hold: their
    /// bytes, and the fastest.
    fn stream(&self, dtype: Dtype) -> Result<(u64, StreamRate)> {
        // What 8 bits are made from is there beside them for a while.
        let share = if dtype.is_8_bit() { 16 } else { 4 };
        let bytes = self.free.map_or(STREAM_BYTES, |free| STREAM_BYTES.min(free / share));
        let mut best: Option<(u64, StreamRate)> = None;
        for k in WIDTHS {
            let n = (bytes / (k as u128 * u128::from(dtype.bytes()))) as usize / ROWS * ROWS;
            let bytes = (n * k) as u64 * dtype.bytes();
            (self.tick)(&format!("{} stream of {n} x {k}", dtype.name()))?;
            let samples = self.product([1, k, n], dtype)?;
            let bytes_per_s = bytes as f64 / fastest(&samples);
            if best.as_ref().is_none_or(|(_, best)| bytes_per_s > best.bytes_per_s) {
                best = Some((bytes, StreamRate { dtype, bytes_per_s, k: k as u64, samples }));
            }
        }
        best.ok_or_else(|| Error::Memory("nothing is left to read".into()).into())
    }

    /// Seconds of the product of (m, k) and (n, k), transposed; of 8 bits, without making them.
    fn product(&self, [m, k, n]: [usize; 3], dtype: Dtype) -> Result<Vec<f64>> {
        let (x, weight) = (self.random((m, k), dtype)?, self.random((n, k), dtype)?);
        if !dtype.is_8_bit() {
            return self.time(|at| ops::linear(at, &x, &weight).map(drop));
        }
        let product = NarrowProduct::new(&x, &weight)?;
        drop((x, weight));
        self.time(|at| product.run(at).map(drop))
    }

    /// One element times one factor, again and again.
    fn dispatch(&self, dtype: Dtype) -> Result<f64> {
        (self.tick)("dispatch")?;
        let one = self.random((1, 1), dtype)?;
        let factor = one.reshape(1)?;
        let samples = self.time(|at| ops::scale(at, &one, &factor).map(drop))?;
        Ok(fastest(&samples))
    }

    /// Seconds of one call in each repetition, the device having finished before each starts and
    /// ends; the first, which finds how many calls make a repetition, is not among them.
    fn time(&self, kernel: impl Fn(At) -> Result<()>) -> Result<Vec<f64>> {
        let nobody = RefCell::new(());
        let at = Meter::new(&nobody, Phase::Forward).at(Module::LmHead);
        let run = |calls: u32| -> Result<Duration> {
            self.device.synchronize()?;
            let start = Instant::now();
            for _ in 0..calls {
                kernel(at)?;
            }
            self.device.synchronize()?;
            Ok(start.elapsed())
        };
        let mut calls = 1;
        run(1)?;
        loop {
            let took = run(calls)?;
            if took >= REPETITION / 2 || calls >= 1 << 20 {
                let more = REPETITION.as_secs_f64() / took.as_secs_f64().max(1e-9);
                calls = (f64::from(calls) * more).ceil().clamp(1.0, f64::from(1 << 20)) as u32;
                break;
            }
            calls *= 4;
        }
        (0..self.repetitions)
            .map(|_| {
                (self.tick)("")?;
                Ok(run(calls)?.as_secs_f64() / f64::from(calls))
            })
            .collect()
    }

    /// Values that no hardware finds easy: the power that a product draws depends on them. A
    /// million are drawn; all memory is written. What is to be put into 8 bits is in the type of all else.
    fn random(&self, (rows, columns): (usize, usize), dtype: Dtype) -> Result<Tensor> {
        const DRAWN: usize = 1 << 20;
        let wanted = rows * columns;
        let mut rng = StdRng::seed_from_u64(0);
        let values = (0..wanted.min(DRAWN)).map(|_| rng.random_range(-1.0..1.0)).collect();
        let drawn = Tensor::from_vec(values, (wanted.min(DRAWN), 1), dtype.base(), self.device)?;
        let parts = vec![drawn.clone(); wanted.div_ceil(DRAWN)];
        Tensor::stacked(&parts, &drawn)?.narrow(0, 0, wanted)?.reshape((rows, columns))
    }
}

/// The faster of two streams of one element type.
fn faster((a, b): ((u64, StreamRate), (u64, StreamRate))) -> (u64, StreamRate) {
    if a.1.bytes_per_s > b.1.bytes_per_s { a } else { b }
}

fn fastest(samples: &[f64]) -> f64 {
    samples.iter().copied().fold(f64::INFINITY, f64::min)
}
