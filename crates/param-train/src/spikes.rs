//! Loss spikes: steps whose loss or gradient norm stands out from those before, which are skipped or clipped.

use serde::{Deserialize, Serialize};

/// What is done about spikes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rule {
    /// Standard deviations above the running mean from which on a loss or gradient norm is a spike.
    pub z: f32,
    /// What happens then.
    pub action: Action,
}

/// What is done about one spike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// The step changes nothing.
    Skip,
    /// The gradients are scaled down to the running mean of their norm.
    Clip,
}

/// A spike, and what was done about it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spike {
    /// Standard deviations of the loss above its mean.
    pub loss_z: f64,
    /// The same of the gradient norm.
    pub norm_z: f64,
    /// What was done.
    pub action: Action,
}

/// Steps of which the running mean and variance are made before anything counts as a spike, and their memory afterwards.
const MEMORY: u64 = 50;
/// Spikes one after another that are believed: past them, what looked like a spike is how training goes now.
const MOST_IN_A_ROW: u64 = 10;

/// Running statistics of the steps so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Watch {
    loss: Running,
    norm: Running,
    in_a_row: u64,
}

/// Mean and variance, of all values at first, then ever more of the last ones.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Running {
    n: u64,
    mean: f64,
    variance: f64,
}

impl Running {
    fn z(&self, x: f64) -> f64 {
        let deviation = self.variance.sqrt();
        if self.n < MEMORY || deviation == 0.0 { 0.0 } else { (x - self.mean) / deviation }
    }

    fn add(&mut self, x: f64) {
        self.n += 1;
        let share = 1.0 / self.n.min(MEMORY) as f64;
        let apart = x - self.mean;
        self.mean += share * apart;
        self.variance = (1.0 - share) * (self.variance + share * apart * apart);
    }
}

impl Watch {
    /// Takes note of a step; if it is a spike, says so, with the gradient norm that there was on average.
    pub fn observe(&mut self, rule: Rule, loss: f64, norm: f64) -> Option<(Spike, f64)> {
        let spike = Spike { loss_z: self.loss.z(loss), norm_z: self.norm.z(norm), action: rule.action };
        if spike.loss_z.max(spike.norm_z) > f64::from(rule.z) {
            self.in_a_row += 1;
            if self.in_a_row <= MOST_IN_A_ROW {
                return Some((spike, self.norm.mean));
            }
            *self = Self::default();
        }
        self.in_a_row = 0;
        self.loss.add(loss);
        self.norm.add(norm);
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULE: Rule = Rule { z: 5.0, action: Action::Skip };

    /// A watch after `n` steps around a loss of 3 and a norm of 1.
    fn watch(n: u64) -> Watch {
        let mut watch = Watch::default();
        for i in 0..n {
            let wave = if i % 2 == 0 { 0.1 } else { -0.1 };
            assert_eq!(watch.observe(RULE, 3.0 + wave, 1.0 + wave), None);
        }
        watch
    }

    #[test]
    fn what_stands_out_is_a_spike_and_leaves_the_statistics_alone() {
        let mut seen = watch(200);
        assert_eq!(seen.observe(RULE, 3.3, 1.3), None);
        let before = seen;
        for (loss, norm) in [(4.0, 1.0), (3.0, 2.0)] {
            let (spike, mean) = seen.observe(RULE, loss, norm).unwrap();
            assert!(spike.loss_z.max(spike.norm_z) > 5.0 && (mean - 1.0).abs() < 0.05, "{spike:?} {mean}");
        }
        assert_eq!((seen.loss, seen.norm), (before.loss, before.norm));
    }

    #[test]
    fn nothing_is_a_spike_before_there_are_statistics() {
        assert_eq!(watch(20).observe(RULE, 100.0, 100.0), None);
    }

    #[test]
    fn a_new_level_is_believed_after_some_steps() {
        let mut watch = watch(200);
        let skipped = (0..100).filter(|_| watch.observe(RULE, 6.0, 1.0).is_some()).count();
        assert_eq!(skipped as u64, MOST_IN_A_ROW);
    }
}
