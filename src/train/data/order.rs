//! In which order a run visits the rows.

use rand::{SeedableRng, rngs::StdRng, seq::SliceRandom};

/// Every row once an epoch, each epoch in an order of its own; it depends on nothing but the seed
/// and the number of rows, so that a run resumes from a position alone.
#[derive(Debug, Clone)]
pub struct Order {
    rows: usize,
    seed: u64,
    /// The epoch that was asked for last, and its order.
    shuffled: Option<(u64, Vec<usize>)>,
}

impl Order {
    /// The order of `rows` rows, at least 1.
    pub fn new(rows: usize, seed: u64) -> Self {
        Self { rows: rows.max(1), seed, shuffled: None }
    }

    /// The index of the row at `position`, counted from the start of the run over all epochs.
    /// Takes O(1) within an epoch, O(rows) on entering one.
    pub fn index(&mut self, position: u64) -> usize {
        let rows = self.rows as u64;
        let (epoch, at) = (position / rows, (position % rows) as usize);
        match &self.shuffled {
            Some((shuffled, indices)) if *shuffled == epoch => indices[at],
            _ => {
                let indices = self.shuffle(epoch);
                let index = indices[at];
                self.shuffled = Some((epoch, indices));
                index
            }
        }
    }

    fn shuffle(&self, epoch: u64) -> Vec<usize> {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&self.seed.to_le_bytes());
        key[8..16].copy_from_slice(&epoch.to_le_bytes());
        let mut indices: Vec<usize> = (0..self.rows).collect();
        indices.shuffle(&mut StdRng::from_seed(key));
        indices
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn an_epoch_visits_every_row_once(rows in 1usize..300, seed in any::<u64>(), epoch in 0u64..1 << 40) {
            let mut order = Order::new(rows, seed);
            let start = epoch * rows as u64;
            let mut seen: Vec<usize> = (start..start + rows as u64).map(|p| order.index(p)).collect();
            // Where a run begins changes nothing.
            let middle = start + rows as u64 / 2;
            prop_assert_eq!(Order::new(rows, seed).index(middle), seen[rows / 2]);
            seen.sort();
            prop_assert_eq!(seen, (0..rows).collect::<Vec<_>>());
        }
    }

    #[test]
    fn seeds_and_epochs_differ() {
        let epoch = |seed, epoch: u64| {
            let mut order = Order::new(100, seed);
            (epoch * 100..(epoch + 1) * 100).map(|p| order.index(p)).collect::<Vec<_>>()
        };
        assert_eq!(epoch(1, 0), epoch(1, 0));
        assert_ne!(epoch(1, 0), epoch(2, 0));
        assert_ne!(epoch(1, 0), epoch(1, 1));
        assert_ne!(epoch(1, 1), epoch(2, 0));
    }
}
