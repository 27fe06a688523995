//! Rows of a dataset as the passes over it.

use super::{Batch, Dataset, Order};
use crate::{
    error::{Error, Result},
    workload::{Filling, Groups, Layout, Rows},
};

/// The passes over a dataset: which rows each feeds, and how they lie in it.
///
/// Rows are in groups that stay together; an order permutes the groups.
#[derive(Debug)]
pub struct Passes<'a> {
    data: &'a Dataset,
    layout: Layout,
    groups: Groups,
    /// Tokens that each row feeds.
    lengths: Vec<u64>,
}

impl<'a> Passes<'a> {
    /// Passes of `batch` rows. Those of a training must be `of_one_size`.
    ///
    /// # Errors
    /// A row that is longer than the dataset's rows may be.
    pub fn new(data: &'a Dataset, layout: Layout, batch: usize, of_one_size: bool) -> Result<Self> {
        let lengths = data.lengths();
        let shape = (batch, data.seq() as u64);
        let groups = Groups::new(&lengths, layout, shape, of_one_size).map_err(|row| {
            let why = format!("row {} is longer than a row may be", row + 1);
            Error::flag("--seq", why)
        })?;
        Ok(Self { data, layout, groups, lengths })
    }

    /// The rows that they feed.
    pub fn data(&self) -> &'a Dataset {
        self.data
    }

    /// How rows lie in a pass.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// The groups.
    pub fn groups(&self) -> &Groups {
        &self.groups
    }

    /// Number of groups.
    pub fn len(&self) -> usize {
        self.groups.groups.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Tokens that each row of the dataset feeds.
    pub fn lengths(&self) -> &[u64] {
        &self.lengths
    }

    /// Tokens that each row of the pass over these groups feeds.
    pub fn lengths_of(&self, groups: impl IntoIterator<Item = usize>) -> Vec<u64> {
        self.groups.lengths(groups, &self.lengths)
    }

    /// The pass over these groups, each from 0 to below [`len`](Self::len), in this order.
    pub fn batch(&self, groups: impl IntoIterator<Item = usize>) -> Batch {
        let of_group = |group: usize| self.groups.groups[group].iter().copied();
        let rows: Vec<usize> = groups.into_iter().flat_map(of_group).collect();
        match self.layout {
            Layout::Padded | Layout::Bucketed => self.data.batch(&rows),
            Layout::Packed => self.data.packed(&rows),
        }
    }

    /// The groups that each of the `accumulate` micro-steps of a step feeds.
    pub fn step(&self, order: &mut Order, accumulate: usize, step: u64) -> Vec<Vec<usize>> {
        let (accumulate, per_pass) = (accumulate as u64, self.groups.per_pass as u64);
        let micro_steps = step * accumulate..(step + 1) * accumulate;
        let groups = |pass: u64| {
            let positions = pass * per_pass..(pass + 1) * per_pass;
            positions.map(|position| order.index(position)).collect()
        };
        micro_steps.map(groups).collect()
    }

    /// Lengths of the rows that each of them feeds.
    pub fn feeds(&self, order: &mut Order, accumulate: usize, step: u64) -> Vec<Vec<u64>> {
        let groups = self.step(order, accumulate, step);
        groups.into_iter().map(|groups| self.lengths_of(groups)).collect()
    }

    /// Whether each row is whole, and so each pass, in whatever order.
    pub fn are_whole(&self) -> bool {
        let seq = self.data.seq() as u64;
        self.layout != Layout::Packed && self.lengths.iter().all(|length| *length == seq)
    }

    /// How the passes of the first steps are filled; takes time in their number, unless all rows are
    /// whole.
    pub fn rows(&self, order: &mut Order, accumulate: usize, steps: u64) -> Rows {
        let (mut fed, seq) = (Filling::new(self.layout), self.data.seq() as u64);
        if self.are_whole() {
            return Rows::Whole;
        }
        for step in 0..steps {
            let feeds = self.feeds(order, accumulate, step);
            feeds.iter().for_each(|lengths| fed.add(lengths, 1));
        }
        fed.rows(seq)
    }
}
