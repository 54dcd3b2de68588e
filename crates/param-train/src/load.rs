//! Watches the load of experts for those that die.

use param_model::Config;

use crate::metrics::{StarvedRecord, StepRecord};

/// An expert starves below this part of the balanced share: it then learns from one token where the others learn from twenty, and
/// what learns slower is chosen less.
const STARVED: f64 = 1.0 / 20.0;
/// Steps for which it must last: more than unlucky batches explain, and early enough to act on.
const STEPS: u64 = 50;

/// How long each expert has been starving.
pub struct LoadWatch {
    blocks: Vec<usize>,       // [n_moe], of the model
    experts: Vec<Vec<Spell>>, // [n_moe, n_expert]
}

/// Consecutive steps of hunger.
#[derive(Clone, Copy, Default)]
struct Spell {
    n_step: u64,
    /// Of the shares in them.
    sum: f64,
}

impl LoadWatch {
    /// Begins to count.
    pub fn new(config: &Config) -> Self {
        let blocks = config.moe_blocks().collect::<Vec<_>>();
        Self { experts: vec![vec![Spell::default(); config.n_expert]; blocks.len()], blocks }
    }

    /// Takes note of a step; returns the experts that have been starving for long enough now, each once until it recovers.
    pub fn see(&mut self, record: &StepRecord) -> Vec<StarvedRecord> {
        let mut starved = Vec::new();
        for ((&block, spells), shares) in self.blocks.iter().zip(&mut self.experts).zip(&record.expert_load) {
            let balanced = 1.0 / spells.len() as f64;
            for (expert, (spell, &share)) in spells.iter_mut().zip(shares).enumerate() {
                if share >= STARVED * balanced {
                    *spell = Spell::default();
                    continue;
                }
                *spell = Spell { n_step: spell.n_step + 1, sum: spell.sum + share };
                if spell.n_step == STEPS {
                    let share = spell.sum / STEPS as f64;
                    let step = record.step;
                    starved.push(StarvedRecord { step, block, starved_expert: expert, share, balanced, n_step: STEPS });
                }
            }
        }
        starved
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_expert_is_reported_once_until_it_recovers() {
        let config = Config { n_layer: 4, n_expert: 4, ..Config::preset("param-tiny").unwrap() };
        let mut watch = LoadWatch::new(&config);
        let mut step = 0;
        // Expert 3 of the second MoE block gets this share.
        let mut see = |share: f64, n: u64| {
            let mut reported = Vec::new();
            for _ in 0..n {
                step += 1;
                let load = vec![vec![0.25; 4], vec![0.5, 0.3, 0.2 - share, share]];
                reported.extend(watch.see(&StepRecord { step, expert_load: load, ..StepRecord::default() }));
            }
            reported
        };
        assert!(see(0.0, 49).is_empty() && see(0.0125, 1).is_empty(), "a twentieth of the balanced share is enough");
        let expected =
            StarvedRecord { step: 100, block: 2, starved_expert: 3, share: 0.01, balanced: 0.25, n_step: 50 };
        let reported = see(0.01, 300);
        assert!((reported[0].share - 0.01).abs() < 1e-12);
        assert_eq!(reported.len(), 1);
        assert_eq!(StarvedRecord { share: 0.01, ..reported[0].clone() }, expected);
        assert!(see(0.1, 1).is_empty());
        assert_eq!(see(0.0, 60).len(), 1);
    }
}
