//! Which rows go to which expert: chosen per token, then sorted so that each expert's weights are read once for all its rows.

use param_kernels::{Kernels, Team, top_k};

use crate::error::{Result, zeroed};
use crate::weights::Router;

/// The routing of one batch, and the order of rows it gives: expert by expert, by token within each.
pub(crate) struct Routing {
    pub logits: Vec<f32>,  // [n_token, n_expert]
    pub experts: Vec<u32>, // [n_token, n_used], best first
    pub weights: Vec<f32>, // [n_token, n_used]
    /// A token's logits with the selection bias.
    biased: Vec<f32>, // [n_expert]
    /// Experts with at least one row, ascending.
    pub active: Vec<usize>,
    /// Where each active expert's rows start, and where the last one's end: [n_active + 1].
    pub row_starts: Vec<usize>,
    /// The token of each row: [n_token * n_used].
    pub token_of_row: Vec<usize>,
    /// Its weight: [n_token * n_used].
    pub weight_of_row: Vec<f32>,
    counts: Vec<usize>, // [n_expert]
}

impl Routing {
    /// Room for `n_batch` tokens.
    pub fn new(n_batch: usize, n_expert: usize, n_used: usize) -> Result<Routing> {
        const WHAT: &str = "routing";
        let n_choice = n_batch.saturating_mul(n_used);
        Ok(Routing {
            logits: zeroed(WHAT, n_batch.saturating_mul(n_expert))?,
            experts: zeroed(WHAT, n_choice)?,
            weights: zeroed(WHAT, n_choice)?,
            biased: zeroed(WHAT, n_expert)?,
            active: Vec::with_capacity(n_expert),
            row_starts: Vec::with_capacity(n_expert + 1),
            token_of_row: zeroed(WHAT, n_choice)?,
            weight_of_row: zeroed(WHAT, n_choice)?,
            counts: zeroed(WHAT, n_expert)?,
        })
    }

    /// Rows there are: tokens times experts that each takes.
    pub fn n_row(&self) -> usize {
        self.row_starts.last().copied().unwrap_or(0)
    }

    /// Sends every one of `n_token` tokens to expert 0 with weight 1: what a dense layer is.
    pub fn dense(&mut self, n_token: usize) {
        self.active.clear();
        self.active.push(0);
        self.row_starts.clear();
        self.row_starts.extend([0, n_token]);
        for row in 0..n_token {
            (self.token_of_row[row], self.weight_of_row[row]) = (row, 1.0);
        }
    }

    /// Chooses the `n_used` experts of largest logit (plus selection bias, if there is one) for each row of `x` [n_token, n_embd],
    /// weighted by a softmax over the chosen logits, all in f32. No noise and no capacity: inference is deterministic and drops nothing.
    pub fn route(
        &mut self,
        team: &mut Team,
        kernels: &Kernels,
        router: &Router,
        x: &[f32],
        n_embd: usize,
        n_used: usize,
    ) {
        let n_expert = router.weight.len() / n_embd;
        let n_token = x.len() / n_embd;
        // A chunk of a few tokens is more work than handing it over; a single token stays on the caller.
        const TOKENS: usize = 8;
        team.for_each_chunk(&mut self.logits[..n_token * n_expert], TOKENS * n_expert, |chunk, logits| {
            for (i, logits) in logits.chunks_exact_mut(n_expert).enumerate() {
                let token = chunk * TOKENS + i;
                let x = &x[token * n_embd..(token + 1) * n_embd];
                for (logit, row) in logits.iter_mut().zip(router.weight.chunks_exact(n_embd)) {
                    *logit = kernels.dot(row, x);
                }
            }
        });
        self.counts.fill(0);
        for token in 0..n_token {
            let logits = &self.logits[token * n_expert..(token + 1) * n_expert];
            let experts = &mut self.experts[token * n_used..(token + 1) * n_used];
            let weights = &mut self.weights[token * n_used..(token + 1) * n_used];
            if router.selection_bias.is_empty() {
                top_k(logits, experts);
            } else {
                self.biased.copy_from_slice(logits);
                kernels.axpy(1.0, &router.selection_bias, &mut self.biased);
                top_k(&self.biased, experts);
            }
            for (weight, &expert) in weights.iter_mut().zip(&*experts) {
                *weight = logits[expert as usize];
                self.counts[expert as usize] += 1;
            }
            kernels.softmax(weights);
        }
        self.group(n_token, n_used);
    }

    /// Counting sort of the choices by expert.
    fn group(&mut self, n_token: usize, n_used: usize) {
        self.active.clear();
        self.row_starts.clear();
        let mut start = 0;
        for (expert, count) in self.counts.iter_mut().enumerate() {
            if *count > 0 {
                self.active.push(expert);
                self.row_starts.push(start);
                // From here on the next free row of this expert.
                start += std::mem::replace(count, start);
            }
        }
        self.row_starts.push(start);
        for token in 0..n_token {
            for choice in token * n_used..(token + 1) * n_used {
                let row = &mut self.counts[self.experts[choice] as usize];
                self.token_of_row[*row] = token;
                self.weight_of_row[*row] = self.weights[choice];
                *row += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn rows_are_grouped_by_expert_and_every_choice_has_one(
            n_token in 1usize..40, n_expert in 2usize..9, n_used in 1usize..4, biased: bool,
            seed in prop::collection::vec(-1.0f32..1.0, 40 * 4 + 9 * 4 + 8),
        ) {
            let (n_embd, n_used) = (4, n_used.min(n_expert));
            let (x, weight) = (&seed[..n_token * n_embd], seed[160..160 + n_expert * n_embd].to_vec());
            let selection_bias = if biased { seed[196..196 + n_expert].to_vec() } else { Vec::new() };
            let router = &Router { weight, selection_bias: selection_bias.clone() };
            let mut routing = Routing::new(40, n_expert, n_used).unwrap();
            routing.route(&mut Team::new(2), Kernels::get(), router, x, n_embd, n_used);
            let mut seen = vec![false; n_token * n_used];
            for (group, &expert) in routing.active.iter().enumerate() {
                let rows = routing.row_starts[group]..routing.row_starts[group + 1];
                prop_assert!(!rows.is_empty() && routing.token_of_row[rows.clone()].is_sorted());
                for row in rows {
                    let token = routing.token_of_row[row];
                    let choices = token * n_used..(token + 1) * n_used;
                    let choice = choices.clone().find(|&c| routing.experts[c] as usize == expert).unwrap();
                    prop_assert_eq!(routing.weight_of_row[row], routing.weights[choice]);
                    prop_assert!(!std::mem::replace(&mut seen[choice], true));
                }
            }
            prop_assert!(seen.iter().all(|s| *s));
            for token in 0..n_token {
                let chosen = &routing.experts[token * n_used..(token + 1) * n_used];
                let weights = &routing.weights[token * n_used..(token + 1) * n_used];
                let logit = |e: u32| routing.logits[token * n_expert + e as usize];
                let sum: f32 = chosen.iter().map(|&e| logit(e).exp()).sum();
                for (&e, &w) in chosen.iter().zip(weights) {
                    prop_assert!((w - logit(e).exp() / sum).abs() < 1e-6);
                }
                let score = |e: u32| logit(e) + selection_bias.get(e as usize).unwrap_or(&0.0);
                let best_left = (0..n_expert as u32).filter(|e| !chosen.contains(e)).map(score).fold(f32::MIN, f32::max);
                prop_assert!(chosen.iter().all(|&e| score(e) >= best_left));
            }
        }
    }
}
