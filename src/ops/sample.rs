//! Choosing tokens from logits. Every step is an op of fixed size, so that a sampled generation
//! is as predictable as a greedy one: libraries stop running sums early, by the data.

use candle_core::{D, DType, Device};
use rand::{Rng, SeedableRng, rngs::StdRng};

use super::{Kernel, Nodes, Ops, Tensor, Unshared, choose, scale, softmax};
use crate::{
    error::Result,
    ledger::{Dtype, Op},
    meter::At,
    workload::Sampling,
};

/// How a token is chosen: constants of a run, as 1/√d is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rule {
    /// What was asked for.
    pub sampling: Sampling,
    /// Factors on logits of seen tokens: on positive ones, on others.
    pub penalties: (f32, f32),
    /// Logits are multiplied by it before the softmax.
    pub inverse_temperature: f32,
}

impl Rule {
    /// Whether it chooses the largest logit, if after a penalty, and draws nothing.
    pub fn is_greedy(&self) -> bool {
        self.sampling.temperature == 0.0
    }

    /// Whether seen tokens are penalized.
    pub fn penalizes(&self) -> bool {
        self.sampling.repeat_penalty != 1.0
    }

    /// How many of `width` tokens are drawn among, where not all of them are.
    pub fn fewer_than(&self, width: usize) -> Option<usize> {
        self.sampling.top_k.filter(|&k| k < width)
    }
}

/// Chooses one token a row, greedily or by chance.
#[derive(Debug)]
pub struct Sampler {
    rule: Rule,
    /// One a row, so that what a row draws does not depend on its neighbours.
    rngs: Vec<StdRng>,
}

impl Sampler {
    /// A sampler for as many rows as `seeds`; a row's draws depend on its seed alone.
    pub fn new(sampling: Sampling, seeds: &[u64]) -> Self {
        let penalty = sampling.repeat_penalty as f32;
        Self {
            rule: Rule {
                sampling,
                penalties: (1.0 / penalty, penalty),
                inverse_temperature: 1.0 / sampling.temperature as f32,
            },
            rngs: seeds.iter().map(|&seed| StdRng::seed_from_u64(seed)).collect(),
        }
    }

    pub(super) fn rule(&self) -> Rule {
        self.rule
    }

    /// A number in [0, 1) for each row: what its next draw goes by.
    pub(super) fn uniforms(&mut self) -> Vec<f32> {
        self.rngs.iter_mut().map(|rng| rng.random()).collect()
    }

    /// One token for each row of `logits` (…, V); `seen[row]` holds the row's tokens so far. On a
    /// GPU, one kernel chooses there.
    ///
    /// # Errors
    /// Logits that are not finite.
    pub fn next(&mut self, at: At, logits: &Tensor, seen: &[Vec<u32>]) -> Result<Vec<u32>> {
        let (rows, width) = logits.rows_width()?;
        anyhow::ensure!(seen.len() as u64 == rows, "{} contexts for {rows} rows", seen.len());
        if let Some(id) = seen.iter().flatten().find(|&&id| u64::from(id) >= width) {
            anyhow::bail!("token id {id} is outside the vocabulary of {width}");
        }
        if let Some(chosen) = choose::once(at, self, logits, seen)? {
            return Ok(chosen);
        }
        let mut logits = Tensor::of(logits.data.to_dtype(DType::F32)?);
        if self.rule.penalizes() {
            logits = penalize(at, &logits, seen, self.rule.penalties)?;
        }
        match self.rule.is_greedy() {
            true => argmax(at, &logits),
            false => self.draw(at, &logits),
        }
    }

    fn draw(&mut self, at: At, logits: &Tensor) -> Result<Vec<u32>> {
        let factor = vec![self.rule.inverse_temperature];
        let factor = Tensor::from_vec(factor, 1, Dtype::F32, logits.device())?;
        let weights = softmax(at, Unshared(scale(at, logits, &factor)?))?;
        let (_, width) = weights.rows_width()?;
        let weights = weights.to_vec()?;
        // One NaN or infinity in a row of logits makes all its weights NaN.
        let by_row = weights.chunks_exact(width as usize);
        for row in by_row.clone() {
            finite(row[0])?;
        }
        let fewer = self.rule.fewer_than(width as usize);
        let top_p = self.rule.sampling.top_p;
        let mut rows: Vec<Candidates> =
            by_row.map(|row| Candidates::of(row, fewer, top_p.is_some())).collect();
        let width = rows.first().map_or(0, |row| row.0.len() as u64);
        if let Some(p) = top_p {
            rows = at.launch(&Nucleus { rows: &rows, p: p as f32 })?;
        }
        let uniforms = self.uniforms();
        at.launch(&Draw { rows: &rows, width, uniforms: &uniforms })
    }
}

/// Keeps the fewest likeliest candidates of each row that hold `p` of its sum.
struct Nucleus<'a> {
    rows: &'a [Candidates],
    p: f32,
}

impl Kernel for Nucleus<'_> {
    type Output = Vec<Candidates>;

    fn device(&self) -> &Device {
        &Device::Cpu
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        let width = self.rows.first().map_or(0, |row| row.0.len() as u64);
        ops.add(Op::Nucleus { rows: self.rows.len() as u64, width }, Dtype::F32);
        Ok(())
    }

    fn run(&self, _: &Nodes) -> candle_core::Result<Vec<Candidates>> {
        let mut rows = self.rows.to_vec();
        rows.iter_mut().for_each(|row| row.keep(self.p));
        Ok(rows)
    }
}

/// One candidate of each row.
struct Draw<'a> {
    rows: &'a [Candidates],
    /// Candidates of a row before any nucleus: the draw is an op of this fixed size.
    width: u64,
    uniforms: &'a [f32], // (rows)
}

impl Kernel for Draw<'_> {
    type Output = Vec<u32>;

    fn device(&self) -> &Device {
        &Device::Cpu
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        let (rows, width) = (self.rows.len() as u64, self.width);
        ops.add(Op::Draw { rows, width }, Dtype::F32);
        Ok(())
    }

    fn run(&self, _: &Nodes) -> candle_core::Result<Vec<u32>> {
        Ok(self.rows.iter().zip(self.uniforms).map(|(row, &u)| row.draw(u)).collect())
    }
}

/// Tokens that a row's draw is among, with their probabilities in units of 2⁻³¹: sums of whole
/// numbers come out the same in any order, here and on a GPU.
#[derive(Clone)]
struct Candidates(Vec<(u32, u64)>);

impl Candidates {
    /// All tokens, as they lie; or the `fewer` likeliest of them; or all. The latter two with the
    /// likeliest first, and of equals the first.
    fn of(probabilities: &[f32], fewer: Option<usize>, by_likelihood: bool) -> Self {
        let mut all: Vec<_> = (0u32..).zip(probabilities.iter().copied()).collect();
        let likelier = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        if let Some(k) = fewer {
            all.select_nth_unstable_by(k - 1, likelier);
            all.truncate(k);
        }
        if fewer.is_some() || by_likelihood {
            all.sort_unstable_by(likelier);
        }
        let units = |p: f32| (f64::from(p) * f64::from(1u32 << 31)).round_ties_even() as u64;
        Self(all.into_iter().map(|(token, p)| (token, units(p))).collect())
    }

    /// The sum up to each, with it.
    fn sums(&self) -> impl Iterator<Item = u64> {
        self.0.iter().scan(0, |sum, (_, units)| {
            *sum += units;
            Some(*sum)
        })
    }

    /// Keeps the fewest first ones that hold `p` of the sum: one at least.
    fn keep(&mut self, p: f32) {
        let all = self.sums().last().unwrap_or(0);
        let enough = (f64::from(p) * all as f64).ceil() as u64;
        let fewer = self.sums().filter(|&sum| sum < enough).count();
        self.0.truncate(fewer + 1);
    }

    /// The first with which the sum passes `uniform` of all.
    fn draw(&self, uniform: f32) -> u32 {
        let all = self.sums().last().unwrap_or(0);
        let mark = (f64::from(uniform) * all as f64) as u64;
        let before = self.sums().filter(|&sum| sum <= mark).count();
        self.0[before].0
    }
}

/// Index of the largest element of each row.
fn argmax(at: At, logits: &Tensor) -> Result<Vec<u32>> {
    let (ids, tops) = at.launch(&Argmax { logits })?;
    tops.into_iter().try_for_each(finite)?;
    Ok(ids)
}

/// (index, value) of each row's largest element.
struct Argmax<'a> {
    logits: &'a Tensor, // (…, V)
}

impl Kernel for Argmax<'_> {
    type Output = (Vec<u32>, Vec<f32>);

    fn device(&self) -> &Device {
        self.logits.device()
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        let (rows, width) = self.logits.rows_width()?;
        ops.add(Op::Argmax { rows, width }, Dtype::F32);
        Ok(())
    }

    fn run(&self, _: &Nodes) -> candle_core::Result<Self::Output> {
        let flat = self.logits.data.reshape(((), self.logits.data.dim(D::Minus1)?))?;
        let ids = flat.argmax_keepdim(D::Minus1)?;
        let tops = flat.gather(&ids, 1)?.flatten_all()?.to_vec1()?;
        Ok((ids.flatten_all()?.to_vec1()?, tops))
    }
}

/// Refuses a number that says that its row's logits are not finite.
pub(super) fn finite(number: f32) -> Result<()> {
    anyhow::ensure!(number.is_finite(), "the logits are not finite ({number}); try --dtype f32");
    Ok(())
}

/// CTRL's repetition penalty (Keskar et al. 2019), dense: every logit is multiplied, by 1 where
/// its token was not seen, so that the op's size does not depend on the text.
fn penalize(at: At, logits: &Tensor, seen: &[Vec<u32>], factors: (f32, f32)) -> Result<Tensor> {
    let values = at.launch(&RepeatPenalty { logits, seen, factors })?;
    Tensor::from_vec(values, logits.data.shape().clone(), Dtype::F32, logits.device())
}

struct RepeatPenalty<'a> {
    logits: &'a Tensor, // (…, V)
    seen: &'a [Vec<u32>],
    /// On positive logits of seen tokens, on others.
    factors: (f32, f32),
}

impl Kernel for RepeatPenalty<'_> {
    type Output = Vec<f32>;

    fn device(&self) -> &Device {
        &Device::Cpu
    }

    fn report<'a>(&'a self, ops: &mut Ops<'a>) -> Result<()> {
        let (rows, width) = self.logits.rows_width()?;
        ops.add(Op::RepeatPenalty { rows, width }, Dtype::F32);
        Ok(())
    }

    fn run(&self, _: &Nodes) -> candle_core::Result<Vec<f32>> {
        let width = self.logits.data.dim(D::Minus1)?;
        let mut values: Vec<f32> = self.logits.data.flatten_all()?.to_vec1()?;
        for (row, seen) in values.chunks_exact_mut(width).zip(self.seen) {
            let mut is_seen = vec![false; row.len()];
            seen.iter().for_each(|&id| is_seen[id as usize] = true);
            for (logit, is_seen) in row.iter_mut().zip(is_seen) {
                let towards_less = if *logit > 0.0 { self.factors.0 } else { self.factors.1 };
                *logit *= if is_seen { towards_less } else { 1.0 };
            }
        }
        Ok(values)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn candidates_by_hand() {
        let row = [0.125, 0.5, 0.125, 0.25];
        let tokens = |c: &Candidates| c.0.iter().map(|&(token, _)| token).collect::<Vec<_>>();
        assert_eq!(tokens(&Candidates::of(&row, None, false)), [0, 1, 2, 3]);
        assert_eq!(tokens(&Candidates::of(&row, None, true)), [1, 3, 0, 2]);
        assert_eq!(tokens(&Candidates::of(&row, Some(3), false)), [1, 3, 0]);
        for (p, kept) in [(1e-9, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.8, 3), (1.0, 4)] {
            let mut all = Candidates::of(&row, None, true);
            all.keep(p);
            assert_eq!(all.0.len(), kept, "{p}");
        }
    }

    #[test]
    fn draws_by_hand() {
        let just_below = |x: f32| f32::from_bits(x.to_bits() - 1);
        let all = Candidates::of(&[0.125, 0.5, 0.0, 0.375], None, false);
        for (uniform, token) in
            [(0.0, 0), (just_below(0.125), 0), (0.125, 1), (just_below(0.625), 1), (0.625, 3)]
        {
            assert_eq!(all.draw(uniform), token, "{uniform}");
        }
        assert_eq!(all.draw(just_below(1.0)), 3);
        // Of two of equal weight, each has half.
        let two = Candidates::of(&[0.4, 0.2, 0.4], Some(2), false);
        assert_eq!([two.draw(0.49), two.draw(0.51)], [0, 2]);
    }
}
