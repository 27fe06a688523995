//! The learning rate of each step.

use serde::{Deserialize, Serialize};

/// How the learning rate goes on after its warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Shape {
    /// Stays.
    Constant,
    /// Falls to 0 in a straight line.
    Linear,
    /// Falls to 0 along half a cosine.
    Cosine,
}

/// Warm-up to a peak, then [`Shape`].
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Schedule {
    /// Highest learning rate.
    pub peak: f64,
    /// Steps of the warm-up: of w steps, the first takes peak / w and the last the peak.
    pub warmup: u64,
    /// What follows.
    pub shape: Shape,
    /// Steps in all.
    pub steps: u64,
}

impl Schedule {
    /// The learning rate of step `step`, counted from 0.
    pub fn rate(&self, step: u64) -> f64 {
        if step < self.warmup {
            return self.peak * (step + 1) as f64 / self.warmup as f64;
        }
        let after = self.steps.saturating_sub(self.warmup).max(1) as f64;
        let gone = ((step - self.warmup) as f64 / after).min(1.0);
        match self.shape {
            Shape::Constant => self.peak,
            Shape::Linear => self.peak * (1.0 - gone),
            Shape::Cosine => self.peak * 0.5 * (1.0 + (std::f64::consts::PI * gone).cos()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_rise_to_the_peak_and_fall_as_asked() {
        let rates = |shape| {
            let schedule = Schedule { peak: 8.0, warmup: 2, shape, steps: 6 };
            (0..6).map(|step| (schedule.rate(step) * 1e6).round() / 1e6).collect::<Vec<_>>()
        };
        assert_eq!(rates(Shape::Constant), [4.0, 8.0, 8.0, 8.0, 8.0, 8.0]);
        assert_eq!(rates(Shape::Linear), [4.0, 8.0, 8.0, 6.0, 4.0, 2.0]);
        assert_eq!(rates(Shape::Cosine), [4.0, 8.0, 8.0, 6.828427, 4.0, 1.171573]);
    }
}
