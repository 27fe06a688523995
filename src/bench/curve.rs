//! Time per decoding step as launch + bytes / bandwidth + FLOPs / rate.
//!
//! Least squares of relative errors, no term below zero. There are three terms, so every choice of
//! terms is solved and the best admissible one taken: exact, where iterations of an active set
//! would come to the same. At one batch size bytes and FLOPs both grow with the context alone and
//! cannot be told apart beside a constant; then fewer terms remain. Several batch sizes, which
//! share the weights' bytes and not their FLOPs, tell them apart.

use super::{Ceiling, Curve, CurvePoint, Point};
use crate::report;

/// Fewest points of a curve.
const FEWEST: usize = 3;

/// What one point says: seconds, and what each of the three terms multiplies.
type Row = (f64, [f64; 3]);

/// One curve for each dtype and adapter rank among `points`, which are decoding steps, that has
/// points enough.
pub fn curves(points: &[Point]) -> Vec<Curve> {
    let mut groups: Vec<(String, Vec<&Point>)> = vec![];
    for point in points {
        let name = name(point);
        match groups.iter_mut().find(|(known, _)| *known == name) {
            Some((_, group)) => group.push(point),
            None => groups.push((name, vec![point])),
        }
    }
    groups.into_iter().filter_map(|(name, group)| curve(name, &group)).collect()
}

fn name(point: &Point) -> String {
    let dtype = point.workload.dtype.name();
    match point.workload.lora.rank {
        0 => dtype.into(),
        rank => format!("{dtype}, LoRA rank {rank}"),
    }
}

fn curve(name: String, points: &[&Point]) -> Option<Curve> {
    let row = |point: &&Point| {
        let bytes = point.bytes.at_rest() as f64;
        (point.seconds.median, [1.0, bytes, point.flops as f64])
    };
    let rows: Vec<Row> = points.iter().map(row).collect();
    let (terms, residual) = fit(&rows)?;
    let rate = |seconds_each: f64| (seconds_each > 0.0).then(|| 1.0 / seconds_each);
    let fitted = rows.iter().map(|(_, x)| dot(x, &terms));
    let points = points.iter().zip(fitted).map(|(point, fitted_s)| CurvePoint {
        batch: point.batch,
        context: point.context,
        measured_s: point.seconds.median,
        fitted_s,
    });
    Some(Curve {
        name,
        launch_s: terms[0],
        bytes_per_s: rate(terms[1]),
        flops_per_s: rate(terms[2]),
        residual,
        points: points.collect(),
    })
}

/// The three terms, none below zero, and the root of the mean squared relative error; none with
/// fewer than three points. Fewer terms win where more do not fit better.
fn fit(rows: &[Row]) -> Option<([f64; 3], f64)> {
    if rows.len() < FEWEST {
        return None;
    }
    // In units of the largest of each kind, so that the sums are of one size.
    let scales = [0, 1, 2].map(|i| rows.iter().map(|(_, x)| x[i]).fold(0.0, f64::max).max(1e-300));
    let relative: Vec<[f64; 3]> =
        rows.iter().map(|(t, x)| [0, 1, 2].map(|i| x[i] / scales[i] / t)).collect();
    // By number of terms; as many points as terms would always fit.
    let mut choices: Vec<Vec<usize>> =
        vec![vec![0], vec![1], vec![2], vec![0, 1], vec![0, 2], vec![1, 2], vec![0, 1, 2]];
    choices.retain(|terms| terms.len() < rows.len());
    let mut best: Option<([f64; 3], f64)> = None;
    for terms in choices {
        let Some(found) = solve(&relative, &terms) else { continue };
        let error = relative.iter().map(|x| (dot(x, &found) - 1.0).powi(2)).sum::<f64>();
        let residual = (error / rows.len() as f64).sqrt();
        if best.is_none_or(|(_, least)| residual < least - 1e-9) {
            best = Some((found, residual));
        }
    }
    best.map(|(terms, residual)| ([0, 1, 2].map(|i| terms[i] / scales[i]), residual))
}

/// Least squares of Σ x·a = 1 over the chosen terms, by the normal equations; none where they are
/// not independent, or one is below zero.
fn solve(rows: &[[f64; 3]], chosen: &[usize]) -> Option<[f64; 3]> {
    let n = chosen.len();
    // The last column is the right side.
    let mut system = vec![vec![0.0; n + 1]; n];
    for row in rows {
        for (i, &a) in chosen.iter().enumerate() {
            for (j, &b) in chosen.iter().enumerate() {
                system[i][j] += row[a] * row[b];
            }
            system[i][n] += row[a];
        }
    }
    let size = (0..n).map(|i| system[i][i]).fold(0.0, f64::max);
    for i in 0..n {
        let pivot = (i..n).max_by(|&a, &b| system[a][i].abs().total_cmp(&system[b][i].abs()))?;
        system.swap(i, pivot);
        if system[i][i].abs() <= 1e-10 * size {
            return None;
        }
        let (above, below) = system.split_at_mut(i + 1);
        for row in below {
            let factor = row[i] / above[i][i];
            for (x, pivot) in row.iter_mut().zip(&above[i]).skip(i) {
                *x -= factor * pivot;
            }
        }
    }
    let mut found = [0.0; 3];
    for i in (0..n).rev() {
        let known: f64 = (i + 1..n).map(|j| system[i][j] * found[chosen[j]]).sum();
        found[chosen[i]] = (system[i][n] - known) / system[i][i];
    }
    found.iter().all(|term| *term >= 0.0).then_some(found)
}

fn dot(a: &[f64; 3], b: &[f64; 3]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

impl Curve {
    /// Whether a fitted rate is above what `ceiling` states: the terms are a sum, and what runs
    /// beside something else takes less than its own time.
    pub fn is_above(&self, ceiling: &Ceiling) -> bool {
        let most = ceiling.matmul.iter().map(|rate| rate.flops_per_s).fold(0.0, f64::max);
        self.flops_per_s.is_some_and(|rate| rate > most)
            || self.bytes_per_s.is_some_and(|rate| rate > ceiling.stream.bytes_per_s)
    }

    /// The fit as a sentence: `12.1 µs + bytes / 20.00 GB/s + FLOPs / 90.00 GFLOP/s`.
    pub fn formula(&self) -> String {
        let launch = (self.launch_s > 0.0).then(|| report::seconds(self.launch_s));
        let bytes = self.bytes_per_s.map(|rate| format!("bytes / {}/s", report::bytes(rate)));
        let flops = self.flops_per_s.map(|rate| format!("FLOPs / {}", report::rate(rate)));
        [launch, bytes, flops].into_iter().flatten().collect::<Vec<_>>().join(" + ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows whose time is exactly `terms`.
    fn rows(terms: [f64; 3], x: &[(f64, f64)]) -> Vec<Row> {
        x.iter().map(|&(b, f)| (dot(&terms, &[1.0, b, f]), [1.0, b, f])).collect()
    }

    fn near(found: [f64; 3], wanted: [f64; 3]) {
        for (found, wanted) in found.into_iter().zip(wanted) {
            assert!((found - wanted).abs() <= 1e-6 * wanted.abs(), "{found} {wanted}");
        }
    }

    #[test]
    fn what_three_terms_made_is_found_again() {
        // 1 ms, 10 GB/s, 100 GFLOP/s; bytes and FLOPs that do not grow together.
        let x = [(1e9, 1e9), (1.1e9, 8e9), (2e9, 2e9), (1.2e9, 9e9), (1e9, 4e9)];
        let terms = [1e-3, 1e-10, 1e-11];
        let (found, residual) = fit(&rows(terms, &x)).unwrap();
        near(found, terms);
        assert!(residual < 1e-9);
    }

    proptest::proptest! {
        #[test]
        fn every_fit_is_admissible_and_exact_where_it_can_be(
            terms in (0.0..1e-2f64, 1e-12..1e-9f64, 1e-13..1e-10f64),
            x in proptest::collection::vec((1e6..1e10f64, 1e6..1e12f64), 4..12),
        ) {
            let (found, residual) = fit(&rows(terms.into(), &x)).unwrap();
            proptest::prop_assert!(found.iter().all(|term| *term >= 0.0));
            proptest::prop_assert!(residual < 1e-6, "{residual}");
        }
    }

    #[test]
    fn collinear_bytes_and_flops_leave_fewer_terms_and_the_same_fit() {
        let at = |context: f64| (1e9 + 1e5 * context, 1e9 + 2e5 * context);
        let x: Vec<_> = [0.0, 512.0, 1024.0, 4096.0].map(at).into();
        let (found, residual) = fit(&rows([0.0, 1e-10, 0.0], &x)).unwrap();
        near(found, [0.0, 1e-10, 0.0]);
        assert!(residual < 1e-9);
    }

    #[test]
    fn no_term_is_below_zero() {
        // Faster than its bytes alone allow at the start: a straight line would cross below zero.
        let falling: Vec<Row> =
            [(1.0, 1e9), (2.1, 2e9), (3.2, 3e9)].map(|(t, b)| (t, [1.0, b, 0.0])).into();
        let (found, residual) = fit(&falling).unwrap();
        assert!(found.iter().all(|term| *term >= 0.0), "{found:?}");
        assert_eq!((found[0], found[2]), (0.0, 0.0));
        // By hand: Σ t-relative bytes over their squares, bytes/t = 1, 2/2.1, 3/3.2 e9.
        let x = [1.0, 2.0 / 2.1, 3.0 / 3.2];
        let slope = x.iter().sum::<f64>() / x.iter().map(|x| x * x).sum::<f64>() / 1e9;
        near(found, [0.0, slope, 0.0]);
        assert!(residual > 0.01 && residual < 0.1, "{residual}");
        assert!(fit(&falling[..2]).is_none());
    }
}
