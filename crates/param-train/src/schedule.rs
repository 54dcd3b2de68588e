//! Learning rate by step: warmup, then one of the usual curves.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The curve after warmup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Curve {
    /// Half a cosine down to the final fraction.
    Cosine,
    /// A straight line down to the final fraction.
    Linear,
    /// No decay.
    Constant,
    /// Constant, then a straight line down over the last part (warmup-stable-decay).
    Wsd,
}

impl fmt::Display for Curve {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Curve::Cosine => "cosine",
            Curve::Linear => "linear",
            Curve::Constant => "constant",
            Curve::Wsd => "wsd",
        })
    }
}

/// A learning-rate schedule.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Schedule {
    /// Highest learning rate.
    pub peak: f32,
    /// Steps over which it rises from zero.
    pub warmup: u64,
    /// Steps in all.
    pub total: u64,
    /// What follows warmup.
    pub curve: Curve,
    /// Last learning rate as a fraction of the highest.
    pub final_fraction: f32,
    /// Share of all steps over which [`Curve::Wsd`] decays.
    pub decay_fraction: f32,
}

impl Schedule {
    /// Learning rate of step `step`, counted from 0.
    pub fn at(&self, step: u64) -> f32 {
        let peak = f64::from(self.peak);
        if step < self.warmup {
            return (peak * (step + 1) as f64 / self.warmup as f64) as f32;
        }
        // Share of the way from the end of warmup (0) to the last step (1).
        let along = |from: u64| {
            let span = self.total.saturating_sub(from).max(1) as f64;
            ((step.saturating_sub(from)) as f64 / span).min(1.0)
        };
        let last = f64::from(self.final_fraction);
        let line = |share: f64| 1.0 - (1.0 - last) * share;
        let fraction = match self.curve {
            Curve::Constant => 1.0,
            Curve::Linear => line(along(self.warmup)),
            Curve::Cosine => last + (1.0 - last) * 0.5 * (1.0 + (std::f64::consts::PI * along(self.warmup)).cos()),
            Curve::Wsd => {
                let decay = (self.total as f64 * f64::from(self.decay_fraction)).round() as u64;
                let from = self.total.saturating_sub(decay).max(self.warmup);
                if step < from { 1.0 } else { line(along(from)) }
            }
        };
        (peak * fraction) as f32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(curve: Curve) -> Schedule {
        Schedule { peak: 1.0, warmup: 10, total: 110, curve, final_fraction: 0.1, decay_fraction: 0.2 }
    }

    #[test]
    fn warmup_reaches_the_peak_and_curves_end_where_they_say() {
        for curve in [Curve::Cosine, Curve::Linear, Curve::Constant, Curve::Wsd] {
            let s = schedule(curve);
            assert_eq!((s.at(0), s.at(9), s.at(10)), (0.1, 1.0, 1.0), "{curve}");
            let end = if curve == Curve::Constant { 1.0 } else { 0.1 };
            assert!((s.at(110) - end).abs() < 1e-6 && s.at(110) == s.at(1000), "{curve} ends at {}", s.at(110));
        }
        assert!((schedule(Curve::Cosine).at(60) - 0.55).abs() < 1e-6);
        assert!((schedule(Curve::Linear).at(60) - 0.55).abs() < 1e-6);
        assert_eq!(schedule(Curve::Wsd).at(87), 1.0);
        assert!((schedule(Curve::Wsd).at(99) - 0.55).abs() < 1e-6);
    }

    #[test]
    fn no_warmup_starts_at_the_peak_and_a_run_of_one_step_is_finite() {
        let s = Schedule { warmup: 0, total: 1, ..schedule(Curve::Linear) };
        assert_eq!(s.at(0), 1.0);
        assert!(s.at(1).is_finite());
    }
}
