//! Scores of blocked attention, in closed form: which it computes, and which of them it masks.
//!
//! Let T queries come after P keys, U = P + T, and A = [`ATTENTION_BLOCK`]. Queries are cut into
//! blocks of A rows from the first, keys from the first that is held. Query block i, of which the
//! first row stands at key P + A·i,
//!
//! - reads keys up to A·(i + 1) + A·⌈P/A⌉, the first cut past its last row, or up to U;
//! - sees all keys before A·i + A·⌊(P + 1)/A⌋ that a window lets it see;
//! - skips those before A·(i − ⌈(W − 1 − P)/A⌉), which a window W hides from all its rows;
//! - and of those before A·(i + 1 − ⌊(W − P)/A⌋) a window hides some from some rows.
//!
//! Each is linear in i where it is not 0, so that sums over i of A rows each are triangular numbers.
//! The last block, of 1 to A rows, is added by itself: it reads up to U.
//!
//! Over passes whose P or T grows by a step, those with the same remainder by A have a sum that is a
//! polynomial of the second degree in their number, but for where the window sets in. Newton's
//! formula gives it from three values.

use super::moments::Scores;
use crate::workload::ATTENTION_BLOCK;

/// A
const BLOCK: u128 = ATTENTION_BLOCK as u128;

/// T queries after P keys, each of which sees the latest W. Before its queries, a window keeps
/// W − 1 keys at most.
#[derive(Debug, Clone, Copy)]
pub(super) struct Span {
    pub queries: u128,
    pub past: u128,
    pub window: Option<u128>,
}

/// What is more from pass to pass.
#[derive(Debug, Clone, Copy)]
pub(super) enum Grows {
    /// So many more queries.
    Queries(u128),
    /// So many more keys before them.
    Past(u128),
}

impl Span {
    /// Blocks of queries but for the last, and the rows of that.
    fn whole_and_rest(self) -> (u128, u128) {
        let whole = self.queries.div_ceil(BLOCK) - 1;
        (whole, self.queries - whole * BLOCK)
    }

    /// Scores of one head.
    pub fn scores(self) -> Scores {
        let (whole, rows) = self.whole_and_rest();
        let (ends, closed) = (self.ends(), self.closed());
        let Some(window) = self.window else {
            let masks = whole + u128::from(rows > 1);
            return Scores { all: ends, masked: ends - closed.0, blocks: whole + 1, masks };
        };
        let (begins, opens) = (self.begins(window), self.opens(window, closed.1));
        let masked = ends - closed.0 + opens.0 - begins.0;
        // A row by itself sees its own key, and the window may hide others of a block that it sees.
        let masks = whole + u128::from(rows > 1 || opens.1 > begins.1);
        Scores { all: ends - begins.0, masked, blocks: whole + 1, masks }
    }

    /// Σ over rows of the keys before where their block ends.
    fn ends(self) -> u128 {
        let (Self { queries, past, .. }, (whole, rows)) = (self, self.whole_and_rest());
        let first = past.next_multiple_of(BLOCK);
        // With few rows after it, the last whole block would end past all keys.
        let beyond = if whole > 0 { (first - past).saturating_sub(rows) } else { 0 };
        let of_whole = whole * first + BLOCK * triangle(whole + 1) - beyond;
        BLOCK * of_whole + rows * (past + queries)
    }

    /// Σ over rows of the keys before the first block that the causal mask hides a part of; and those
    /// of the last row. A last row by itself sees all keys.
    fn closed(self) -> (u128, u128) {
        let (Self { queries, past, .. }, (whole, rows)) = (self, self.whole_and_rest());
        let blocks = (past + 1) / BLOCK;
        let last = match rows {
            1 => past + queries,
            _ => BLOCK * (whole + blocks),
        };
        (BLOCK * BLOCK * (whole * blocks + triangle(whole)) + rows * last, last)
    }

    /// Σ over rows of the keys before where their block begins; and those of the last row.
    fn begins(self, window: u128) -> (u128, u128) {
        let (whole, rows) = self.whole_and_rest();
        let later = (window - 1 - self.past).div_ceil(BLOCK);
        let last = BLOCK * whole.saturating_sub(later);
        (BLOCK * BLOCK * triangle(whole.saturating_sub(later)) + rows * last, last)
    }

    /// Σ over rows of the keys before the first block of which the window hides nothing, or at which
    /// the causal mask sets in; and those of the last row, where that is at `closed`.
    fn opens(self, window: u128, closed: u128) -> (u128, u128) {
        let (Self { queries, past, .. }, (whole, rows)) = (self, self.whole_and_rest());
        // Block i has i + 1 such blocks, less so many.
        let fewer = ((window - past) / BLOCK).max(1u128.saturating_sub((past + 1) / BLOCK));
        let last = (past + queries).saturating_sub(window).next_multiple_of(BLOCK).min(closed);
        (BLOCK * BLOCK * triangle((whole + 1).saturating_sub(fewer)) + rows * last, last)
    }

    /// Scores of one head over `passes` passes, of which this is the first.
    pub fn sum(self, grows: Grows, passes: u128) -> Scores {
        let (Grows::Queries(step) | Grows::Past(step)) = grows;
        if step == 0 {
            return self.scores().times(passes);
        }
        // From some pass on, a window keeps no more keys before the queries.
        let growing = match (grows, self.window) {
            (Grows::Past(step), Some(window)) => {
                passes.min((window - 1 - self.past).div_ceil(step))
            }
            (Grows::Past(_) | Grows::Queries(_), _) => passes,
        };
        let full = Self { past: self.window.map_or(self.past, |window| window - 1), ..self };
        let rest = match passes - growing {
            0 => Scores::default(),
            rest => full.scores().times(rest),
        };
        // Passes `period` apart have the same remainder by A.
        let period = BLOCK / gcd(BLOCK, step);
        let classes = (0..period.min(growing)).map(|first| {
            let of_class = self.after(grows, first * step);
            of_class.sum_of_class(grows, period * step, (growing - first).div_ceil(period))
        });
        classes.fold(rest, Scores::plus)
    }

    /// The same where the step is a multiple of A, and no window is full.
    fn sum_of_class(self, grows: Grows, step: u128, passes: u128) -> Scores {
        let at = |pass: u128| self.after(grows, pass * step).scores();
        let Some(window) = self.window else { return newton(at, 0, passes) };
        // A window hides nothing of W keys, and from W + A on its ends move with the queries.
        let keys = self.past + self.queries;
        let until = |most: u128| passes.min(most.saturating_sub(keys).div_ceil(step));
        let (shows_all, moves) = (until(window + 1), until(window + BLOCK));
        let parts = [(0, shows_all), (shows_all, moves), (moves, passes)];
        parts
            .map(|(from, to)| newton(at, from, to))
            .into_iter()
            .fold(Scores::default(), Scores::plus)
    }

    /// A later pass, with so many more queries or keys.
    fn after(self, grows: Grows, more: u128) -> Self {
        match grows {
            Grows::Queries(_) => Self { queries: self.queries + more, ..self },
            Grows::Past(_) => Self { past: self.past + more, ..self },
        }
    }
}

/// 0 + 1 + … + (n − 1)
fn triangle(n: u128) -> u128 {
    n * n.saturating_sub(1) / 2
}

fn gcd(a: u128, b: u128) -> u128 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Σ of polynomials of the second degree over i = `from` … `to` − 1: with n = `to` − `from`, of which
/// n·f₀ + n(n − 1)/2·Δ₁ + n(n − 1)(n − 2)/6·Δ₂.
fn newton(at: impl Fn(u128) -> Scores, from: u128, to: u128) -> Scores {
    let n = to.saturating_sub(from);
    let first: Vec<Scores> = (from..to.min(from + 3)).map(at).collect();
    let sum = |part: fn(&Scores) -> u128| {
        let value = |index: usize| first.get(index).map_or(0, |scores| part(scores) as i128);
        let pairs = (n * n.saturating_sub(1) / 2) as i128;
        let triples = pairs * n.saturating_sub(2) as i128 / 3;
        let mut sum = n as i128 * value(0);
        if n > 1 {
            sum += pairs * (value(1) - value(0));
        }
        if n > 2 {
            sum += triples * (value(2) - 2 * value(1) + value(0));
        }
        sum.unsigned_abs()
    };
    Scores {
        all: sum(|s| s.all),
        masked: sum(|s| s.masked),
        blocks: sum(|s| s.blocks),
        masks: sum(|s| s.masks),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Block by block and key by key, from what rows see.
    fn counted(Span { queries, past, window }: Span) -> Scores {
        let keys = past + queries;
        let sees = |row: u128, key: u128| {
            let at = past + row;
            key <= at && window.is_none_or(|window| key + window > at)
        };
        let mut sum = Scores::default();
        for rows in blocks(queries) {
            let mut hidden = 0;
            for columns in blocks(keys) {
                let seen = rows.clone().flat_map(|row| columns.clone().map(move |key| (row, key)));
                let seen = seen.filter(|(row, key)| sees(*row, *key)).count() as u128;
                let (rows, columns) = (rows.end - rows.start, columns.end - columns.start);
                sum.all += if seen > 0 { rows * columns } else { 0 };
                hidden += if seen > 0 && seen < rows * columns { rows * columns } else { 0 };
            }
            sum.masked += hidden;
            sum.blocks += 1;
            sum.masks += u128::from(hidden > 0);
        }
        sum
    }

    fn blocks(n: u128) -> impl Iterator<Item = std::ops::Range<u128>> {
        (0..n.div_ceil(BLOCK)).map(move |i| i * BLOCK..n.min((i + 1) * BLOCK))
    }

    #[test]
    fn blocks_by_hand() {
        // 130 rows: 64 that read 64 keys, 64 that read 128, 2 that read all; each masks its last block.
        let span = Span { queries: 130, past: 0, window: None };
        let (all, masked) = (64 * 64 + 64 * 128 + 2 * 130, 64 * 64 + 64 * 64 + 2 * 2);
        assert_eq!(span.scores(), Scores { all, masked, blocks: 3, masks: 3 });
        // A row by itself sees all.
        let span = Span { queries: 129, past: 0, window: None };
        let (all, masked) = (64 * 64 + 64 * 128 + 129, 64 * 64 + 64 * 64);
        assert_eq!(span.scores(), Scores { all, masked, blocks: 3, masks: 2 });
        // 64 rows after 10: keys 0 … 63 hide some from the first rows, 64 … 73 too.
        let span = Span { queries: 64, past: 10, window: None };
        assert_eq!(span.scores(), Scores { all: 64 * 74, masked: 64 * 74, blocks: 1, masks: 1 });
        // A window of 64: rows 128 … 191 see no key before 65, and none of 64 … 127 all.
        let span = Span { queries: 192, past: 0, window: Some(64) };
        let (all, masked) = (64 * 64 + 2 * 64 * 128, 64 * 64 + 2 * 64 * 128);
        assert_eq!(span.scores(), Scores { all, masked, blocks: 3, masks: 3 });
    }

    #[test]
    fn every_short_span_is_what_keys_sum_to() {
        for window in [None, Some(1), Some(2), Some(63), Some(64), Some(65), Some(100), Some(130)] {
            for past in [0, 1, 5, 62, 63, 64, 65, 99, 127, 128, 200] {
                for queries in (1..5).chain(60..70).chain(120..134).chain([190, 193, 257]) {
                    let past = window.map_or(past, |window| past.min(window - 1));
                    let span = Span { queries, past, window };
                    assert_eq!(span.scores(), counted(span), "{span:?}");
                }
            }
        }
    }

    proptest! {
        #[test]
        fn a_span_is_what_its_keys_sum_to(
            queries in 1u128..400, past in 0u128..400, window in proptest::option::of(1u128..500),
        ) {
            let past = window.map_or(past, |window| past.min(window - 1));
            let span = Span { queries, past, window };
            prop_assert_eq!(span.scores(), counted(span));
        }

        #[test]
        fn passes_are_the_sum_of_each(
            queries in 1u128..300, past in 0u128..300, window in proptest::option::of(1u128..3000),
            step in 0u128..200, passes in 0u128..300, of_queries in any::<bool>(),
        ) {
            let grows = if of_queries { Grows::Queries(step) } else { Grows::Past(step) };
            // Queries grow after nothing alone.
            let past = if of_queries { 0 } else { past };
            let kept = |past: u128| window.map_or(past, |window| past.min(window - 1));
            let at = |pass| {
                let span = Span { queries, past, window }.after(grows, pass * step);
                Span { past: kept(span.past), ..span }.scores()
            };
            let each = (0..passes).map(at).fold(Scores::default(), Scores::plus);
            let first = Span { queries, past: kept(past), window };
            prop_assert_eq!(first.sum(grows, passes), each);
        }
    }
}
