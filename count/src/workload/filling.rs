//! How passes come to be filled, one after another.

use super::{Layout, Lengths, Rows, Task, bucketed, packed};

/// The passes so far.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filling {
    /// Whether sequences follow each other in a row without padding.
    pub packed: bool,
    /// Of padded passes their widths, of packed ones their tokens: how many passes have so many.
    passes: Lengths,
    /// Tokens that sequences feed.
    sequences: Lengths,
}

impl Filling {
    /// None so far.
    pub fn new(layout: Layout) -> Self {
        let packed = match layout {
            Layout::Padded | Layout::Bucketed => false,
            Layout::Packed => true,
        };
        Self { packed, ..Self::default() }
    }

    /// Adds `times` passes of sequences that feed so many tokens each.
    pub fn add(&mut self, lengths: &[u64], times: u64) {
        let whole = match self.packed {
            true => lengths.iter().sum(),
            false => lengths.iter().copied().max().unwrap_or(0),
        };
        self.passes.add(whole, times);
        lengths.iter().for_each(|length| self.sequences.add(*length, times));
    }

    /// How the passes so far are filled, rows being of at most `seq` tokens.
    pub fn rows(&self, seq: u64) -> Rows {
        let (passes, sequences) = (self.passes.clone(), self.sequences.clone());
        match self.packed {
            true => Rows::Packed { passes, documents: sequences },
            false if sequences.range() == Some((seq, seq)) => Rows::Whole,
            false => Rows::Padded { widths: passes, lengths: sequences },
        }
    }
}

/// Sequences in groups that stay together: rows of one sequence, rows of several that are packed, or
/// batches of sequences that are about as long.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Groups {
    /// Indices of the sequences of each.
    pub groups: Vec<Vec<usize>>,
    /// So many groups make a pass.
    pub per_pass: usize,
}

impl Groups {
    /// Sequences that feed `lengths` tokens, in passes of `batch` rows of at most `seq` tokens. Of
    /// buckets that the batch does not divide, the last begins before the one ahead of it has ended,
    /// if passes must all be of one size.
    ///
    /// # Errors
    /// The index of a sequence longer than a row.
    pub fn new(
        lengths: &[u64],
        layout: Layout,
        (batch, seq): (usize, u64),
        of_one_size: bool,
    ) -> Result<Self, usize> {
        if let Some(long) = lengths.iter().position(|length| *length > seq) {
            return Err(long);
        }
        let batch = batch.max(1);
        Ok(match layout {
            Layout::Padded => {
                let groups = (0..lengths.len()).map(|index| vec![index]).collect();
                Self { groups, per_pass: batch }
            }
            Layout::Packed => Self { groups: packed(lengths, seq)?, per_pass: batch },
            Layout::Bucketed => {
                let order = bucketed(lengths);
                let mut groups: Vec<Vec<usize>> = order.chunks(batch).map(<[_]>::to_vec).collect();
                if let Some(last) =
                    groups.last_mut().filter(|last| of_one_size && last.len() < batch)
                {
                    let filled = order.iter().rev().cycle().take(batch).copied();
                    *last = filled.collect();
                    last.reverse();
                }
                Self { groups, per_pass: 1 }
            }
        })
    }

    /// Tokens that the sequences of these groups feed.
    pub fn lengths(&self, groups: impl IntoIterator<Item = usize>, of: &[u64]) -> Vec<u64> {
        groups.into_iter().flat_map(|group| &self.groups[group]).map(|&index| of[index]).collect()
    }
}

/// The tasks that score sequences which feed `lengths` tokens, each once: passes of `batch` rows of
/// at most `seq` tokens, and one of the rows that are left. In the order of `groups`.
pub fn evaluations(
    groups: &Groups,
    layout: Layout,
    lengths: &[u64],
    batch: u64,
    seq: u64,
) -> Vec<Task> {
    let all: Vec<usize> = (0..groups.groups.len()).collect();
    let (mut whole, mut rest) = (Filling::new(layout), Filling::new(layout));
    let (mut passes, mut left) = (0, 0);
    for pass in all.chunks(groups.per_pass) {
        let lengths = groups.lengths(pass.iter().copied(), lengths);
        if whole.packed || lengths.len() as u64 == batch {
            whole.add(&lengths, 1);
            passes += 1;
        } else {
            rest.add(&lengths, 1);
            left = lengths.len() as u64;
        }
    }
    let task = |batch, passes, filling: &Filling| {
        let rows = filling.rows(seq);
        (passes > 0).then_some(Task::Evaluate { batch, seq, passes, rows })
    };
    let whole = task(batch, passes, &whole);
    whole.into_iter().chain(task(left, u64::from(left > 0), &rest)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passes_are_as_wide_as_their_longest_sequence() {
        let lengths = [5, 2, 7, 3, 4];
        let of = |layout| {
            let groups = Groups::new(&lengths, layout, (2, 8), false).unwrap();
            evaluations(&groups, layout, &lengths, 2, 8)
        };
        let padded = |batch, widths: &[u64], lengths: &[u64]| Task::Evaluate {
            batch,
            seq: 8,
            passes: widths.len() as u64,
            rows: Rows::Padded {
                widths: widths.iter().copied().collect(),
                lengths: lengths.iter().copied().collect(),
            },
        };
        assert_eq!(of(Layout::Padded), [padded(2, &[5, 7], &[5, 2, 7, 3]), padded(1, &[4], &[4])]);
        assert_eq!(
            of(Layout::Bucketed),
            [padded(2, &[3, 5], &[2, 3, 4, 5]), padded(1, &[7], &[7])]
        );
        // Best fit: 7; 5 and 3; 4 and 2.
        let [Task::Evaluate { passes: 2, rows: packed, .. }] = &of(Layout::Packed)[..] else {
            panic!("{:?}", of(Layout::Packed));
        };
        let Rows::Packed { passes, documents } = packed else { panic!("{packed:?}") };
        assert_eq!(documents.tokens(), 21);
        assert_eq!((passes.tokens(), passes.count()), (21, 2));
        assert_eq!(*documents, lengths.into_iter().collect::<Lengths>());
        assert_eq!(Groups::new(&lengths, Layout::Padded, (2, 6), false), Err(2));
    }

    #[test]
    fn whole_rows_are_no_ragged_ones() {
        let mut filling = Filling::new(Layout::Padded);
        filling.add(&[8, 8], 3);
        assert_eq!(filling.rows(8), Rows::Whole);
        assert_ne!(filling.rows(9), Rows::Whole);
    }

    #[test]
    fn a_last_bucket_is_filled_up_where_all_must_be_of_one_size() {
        let groups = |batch| {
            Groups::new(&[5, 2, 7, 3, 4], Layout::Bucketed, (batch, 8), true).unwrap().groups
        };
        assert_eq!(groups(2), [vec![1, 3], vec![4, 0], vec![0, 2]]);
        assert_eq!(groups(7).iter().map(Vec::len).collect::<Vec<_>>(), [7]);
    }
}
