//! The router: noisy logits, top-k, softmax over the chosen, the capacity rule, and the two losses; with its backward.

use param_kernels::{Kernels, top_k};

use super::machine::{Machine, ROWS};

/// Sorted position of a choice that was dropped.
pub const DROPPED: u32 = u32::MAX;

/// How many tokens an expert takes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Capacity {
    /// Every token that chose it (dropless).
    Unlimited,
    /// The reference's rule: `floor(k * factor * n_token / n_expert)`, made even, at least `min`; the rest is dropped.
    Factor {
        /// Capacity over the mean load.
        factor: f64,
        /// Least capacity, in tokens.
        min: usize,
    },
}

impl Capacity {
    /// Tokens an expert takes of a batch of `n_token`.
    pub(crate) fn tokens(self, n_token: usize, n_expert: usize, k: usize) -> usize {
        match self {
            Capacity::Unlimited => n_token,
            Capacity::Factor { factor, min } => {
                let capacity = (k as f64 * factor * n_token as f64 / n_expert as f64).floor() as usize;
                (capacity + capacity % 2).max(min)
            }
        }
    }
}

/// What the router made of one batch.
#[derive(Clone, Debug, Default)]
pub struct Routing {
    /// Experts chosen per token.
    pub k: usize,
    /// Logits, noise included, [n_token, n_expert].
    pub logits: Vec<f32>,
    /// Chosen experts, best first, [n_token, k].
    pub chosen: Vec<u32>,
    /// Their softmax weights, [n_token, k].
    pub weights: Vec<f32>,
    /// The kept choices (`token * k + slot`) sorted by expert, then token: [n_kept].
    pub kept: Vec<u32>,
    /// Where each expert's begin in `kept`, and its end: [n_expert + 1].
    pub starts: Vec<usize>,
    /// The token of each of `kept`: [n_kept].
    pub token_of_kept: Vec<u32>,
    /// Position in `kept` of each choice, or [`DROPPED`]: [n_token, k].
    pub position: Vec<u32>,
    /// Tokens that chose each expert, before dropping: [n_expert].
    pub load: Vec<usize>,
    /// Load-balancing loss `E * sum_e P_e f_e`, unweighted.
    pub aux: f64,
    /// Mean squared log-sum-exp of the logits, unweighted.
    pub z: f64,
    /// Mean entropy of the softmax over all experts, nats.
    pub entropy: f64,
}

/// What scores experts: a matrix [n_expert, n_embd], and that of the noise.
#[derive(Clone, Copy)]
pub struct Scorer<'a> {
    pub weight: &'a [f32],
    pub noise: Option<&'a [f32]>,
}

impl Scorer<'_> {
    /// Scores of an expert: its logit and, if there is noise, what scales it.
    pub fn n_score(self) -> usize {
        1 + usize::from(self.noise.is_some())
    }

    /// Scores of rows `x` [n_row, n_embd], in f32 whatever the precision of other products: [n_row, n_score, n_expert].
    pub fn score(self, x: &[f32], n_embd: usize, scores: &mut [f32]) {
        let kernels = Kernels::get();
        let weights =
            || self.weight.chunks_exact(n_embd).chain(self.noise.into_iter().flat_map(|w| w.chunks_exact(n_embd)));
        let n = self.weight.len() / n_embd * self.n_score();
        for (x, scores) in x.chunks_exact(n_embd).zip(scores.chunks_exact_mut(n)) {
            for (score, weight) in scores.iter_mut().zip(weights()) {
                *score = kernels.dot(x, weight);
            }
        }
    }
}

/// Learned noise in the logits: `softplus(x Wnoise^T) * normal`.
pub struct Noise {
    weight_out: Vec<f32>, // x Wnoise^T, [n_token, n_expert]
    normal: Vec<f32>,     // [n_token, n_expert]
}

/// Splits what [`Scorer::score`] computed into logits and, with draws of N(0, 1) [n_token, n_expert], noise.
pub fn split(scores: Vec<f32>, normal: Option<Vec<f32>>, n_expert: usize) -> (Vec<f32>, Option<Noise>) {
    let Some(normal) = normal else { return (scores, None) };
    let rows = || scores.chunks_exact(2 * n_expert);
    let logits = rows().flat_map(|row| &row[..n_expert]).copied().collect();
    let weight_out = rows().flat_map(|row| &row[n_expert..]).copied().collect();
    (logits, Some(Noise { weight_out, normal }))
}

impl Noise {
    fn add_to(&self, logits: &mut [f32]) {
        for ((logit, &pre), &normal) in logits.iter_mut().zip(&self.weight_out).zip(&self.normal) {
            *logit += softplus(pre) * normal;
        }
    }

    /// Gradient of `x Wnoise^T` given that of the logits; softplus' is the logistic function.
    pub fn backward(&self, dlogits: &[f32]) -> Vec<f32> {
        let parts = dlogits.iter().zip(&self.normal).zip(&self.weight_out);
        parts.map(|((d, normal), pre)| d * normal / (1.0 + (-pre).exp())).collect()
    }
}

/// `ln(1 + e^x)` without overflow.
fn softplus(x: f32) -> f32 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

/// What a token's logits say of how decided the router is.
#[derive(Clone, Copy, Default)]
struct Spread {
    squared_log_sum: f64,
    entropy: f64,
}

/// Routes tokens by their `logits` [n_token, n_expert], to which the selection bias [n_expert] is added for the choice alone.
pub fn forward(
    machine: &mut Machine,
    mut logits: Vec<f32>,
    noise: Option<&Noise>,
    selection_bias: Option<&[f32]>,
    (k, n_expert): (usize, usize),
    capacity: Capacity,
) -> Routing {
    if let Some(noise) = noise {
        noise.add_to(&mut logits);
    }
    let kernels = Kernels::get();
    let n_token = logits.len() / n_expert;
    let mut chosen = vec![0; n_token * k];
    let mut weights = vec![0.0; n_token * k];
    let mut spread = vec![Spread::default(); n_token];
    let outs = ((&mut chosen[..], ROWS * k), (&mut weights[..], ROWS * k), (&mut spread[..], ROWS));
    machine.team.for_each_chunks(outs.0, outs.1, outs.2, |i, chosen, weights, spread| {
        let mut row = vec![0.0; n_expert];
        let logits = logits[i * ROWS * n_expert..].chunks_exact(n_expert);
        let tokens = chosen.chunks_exact_mut(k).zip(weights.chunks_exact_mut(k)).zip(spread);
        for (((chosen, weights), spread), logits) in tokens.zip(logits) {
            row.copy_from_slice(logits);
            if let Some(bias) = selection_bias {
                kernels.axpy(1.0, bias, &mut row);
            }
            top_k(&row, chosen);
            for (weight, &expert) in weights.iter_mut().zip(&*chosen) {
                *weight = logits[expert as usize];
            }
            kernels.softmax(weights);
            let log_sum = f64::from(kernels.log_sum_exp(logits));
            row.copy_from_slice(logits);
            kernels.softmax(&mut row);
            // - sum p ln p, where ln p = logit - log sum; rounding can take it below zero where one expert has all.
            let entropy = (log_sum - f64::from(kernels.dot(&row, logits))).max(0.0);
            *spread = Spread { squared_log_sum: log_sum.powi(2), entropy };
        }
    });

    let mut load = vec![0; n_expert];
    let mut mass = vec![0.0f64; n_expert];
    for (&expert, &weight) in chosen.iter().zip(&weights) {
        load[expert as usize] += 1;
        mass[expert as usize] += f64::from(weight);
    }
    let n = n_token as f64;
    let aux = n_expert as f64 * mass.iter().zip(&load).map(|(m, &l)| m / n * (l as f64 / n)).sum::<f64>();
    let z = spread.iter().map(|s| s.squared_log_sum).sum::<f64>() / n;
    let entropy = spread.iter().map(|s| s.entropy).sum::<f64>() / n;

    let mut routing = Routing {
        k,
        logits,
        chosen,
        weights,
        load,
        aux,
        z,
        entropy,
        position: vec![DROPPED; n_token * k],
        ..Routing::default()
    };
    routing.fill_queues(capacity.tokens(n_token, n_expert, k));
    routing
}

impl Routing {
    /// Number of tokens.
    pub fn n_token(&self) -> usize {
        self.chosen.len() / self.k
    }

    /// Choices that an expert had no room for.
    pub fn n_dropped(&self) -> usize {
        self.chosen.len() - self.kept.len()
    }

    /// Kept choices of an expert, as a range of `kept`.
    pub fn of_expert(&self, expert: usize) -> std::ops::Range<usize> {
        self.starts[expert]..self.starts[expert + 1]
    }

    /// The expert that takes `kept[row]`.
    pub fn expert_of(&self, row: usize) -> usize {
        self.starts.partition_point(|&start| start <= row) - 1
    }

    /// Decides what each expert takes (every token's first choice in order, then the second choices, and so on, up to
    /// `capacity`), and sorts it by expert.
    fn fill_queues(&mut self, capacity: usize) {
        let (n_token, k, n_expert) = (self.n_token(), self.k, self.load.len());
        let mut taken = vec![0; n_expert];
        let mut keep = vec![false; n_token * k];
        for slot in 0..k {
            for token in 0..n_token {
                let choice = token * k + slot;
                let taken = &mut taken[self.chosen[choice] as usize];
                keep[choice] = *taken < capacity;
                *taken += usize::from(keep[choice]);
            }
        }
        let mut start = 0;
        self.starts = Vec::with_capacity(n_expert + 1);
        for taken in &taken {
            self.starts.push(start);
            start += taken;
        }
        self.starts.push(start);
        self.kept = vec![0; start];
        self.token_of_kept = vec![0; start];
        let mut next = self.starts.clone();
        for choice in (0..n_token * k).filter(|&choice| keep[choice]) {
            let next = &mut next[self.chosen[choice] as usize];
            self.kept[*next] = choice as u32;
            self.token_of_kept[*next] = (choice / k) as u32;
            self.position[choice] = *next as u32;
            *next += 1;
        }
    }

    /// Gradient of the logits [n_token, n_expert], given `dweights` [n_token, k] (zero where dropped) and the factors of
    /// the two losses in the total. The load f_e counts as a constant, as in the reference.
    pub fn backward(&self, machine: &mut Machine, dweights: &[f32], (aux_weight, z_weight): (f32, f32)) -> Vec<f32> {
        let kernels = Kernels::get();
        let n_expert = self.load.len();
        let n = self.n_token() as f64;
        // d aux / d weight of a choice of expert e = E f_e / n_token.
        let daux = self.load.iter().map(|&l| (f64::from(aux_weight) * n_expert as f64 * l as f64 / (n * n)) as f32);
        let daux = daux.collect::<Vec<_>>(); // [n_expert]
        let z_scale = 2.0 * z_weight / n as f32;
        let mut dlogits = self.logits.clone(); // [n_token, n_expert]
        machine.team.for_each_chunk(&mut dlogits, ROWS * n_expert, |i, dlogits| {
            for (token, dlogits) in (i * ROWS..).zip(dlogits.chunks_exact_mut(n_expert)) {
                let log_sum = kernels.log_sum_exp(dlogits);
                kernels.softmax(dlogits);
                dlogits.iter_mut().for_each(|p| *p *= z_scale * log_sum);
                let choices = token * self.k..(token + 1) * self.k;
                let (weights, chosen) = (&self.weights[choices.clone()], &self.chosen[choices.clone()]);
                let total = |slot: usize| dweights[choices.start + slot] + daux[chosen[slot] as usize];
                let mean = (0..self.k).map(|slot| weights[slot] * total(slot)).sum::<f32>();
                for slot in 0..self.k {
                    dlogits[chosen[slot] as usize] += weights[slot] * (total(slot) - mean);
                }
            }
        });
        dlogits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capacity_follows_the_references_rounding() {
        let capacity = |factor, n| Capacity::Factor { factor, min: 4 }.tokens(n, 8, 3);
        assert_eq!((capacity(1.25, 8192), capacity(2.0, 8192)), (3840, 6144));
        assert!((1..=5).all(|n| capacity(1.25, n) == 4));
        assert_eq!(capacity(1.25, 15), 8); // floor(7.03) = 7 is odd
    }

    #[test]
    fn first_choices_fill_an_expert_before_any_second_choice() {
        // Tokens 0 and 1 choose expert 0 second, tokens 2 to 5 first; four fit.
        let (first, second) = ([2.0, 3.0, 0.0, 0.0], [3.0, 0.0, 2.0, 0.0]);
        let logits = [first, first, second, second, second, second].concat();
        let machine = &mut Machine::new(crate::cpu::Compute::default());
        let routing = forward(machine, logits, None, None, (2, 4), Capacity::Factor { factor: 0.1, min: 4 });
        assert_eq!(routing.chosen[..2], [1, 0]);
        assert_eq!(routing.kept[routing.of_expert(0)], [4, 6, 8, 10]);
        assert_eq!((routing.position[1], routing.position[3], routing.n_dropped()), (DROPPED, DROPPED, 2));
        assert_eq!(routing.load, [6, 2, 4, 0]);
        assert_eq!(routing.kept[routing.of_expert(1)], [0, 2]);
    }

    #[test]
    fn a_selection_bias_changes_the_choice_and_nothing_else() {
        let logits = [[2.0, 1.0, 0.0, -1.0], [0.0, 0.5, 3.0, 1.0]].concat();
        let machine = &mut Machine::new(crate::cpu::Compute::default());
        let mut route =
            |bias: Option<&[f32]>| forward(machine, logits.clone(), None, bias, (2, 4), Capacity::Unlimited);
        let (plain, biased) = (route(None), route(Some(&[0.0, 0.0, 1.5, 2.5])));
        assert_eq!((&plain.chosen[..], &biased.chosen[..]), (&[0, 1, 2, 3][..], &[0, 2, 2, 3][..]));
        assert_eq!((plain.z, plain.entropy, &plain.logits), (biased.z, biased.entropy, &biased.logits));
        let weight = 1.0 / (1.0 + (-2.0f32).exp());
        assert!((biased.weights[0] - weight).abs() < 1e-6, "{} is not of the raw logits", biased.weights[0]);
        assert!(route(Some(&[0.0; 4])).weights == plain.weights);
    }

    /// Bound: rounding of logits to f32.
    #[test]
    fn entropy_is_that_of_all_experts() {
        let machine = &mut Machine::new(crate::cpu::Compute::default());
        let mut entropy =
            |logits: &[f32]| forward(machine, logits.to_vec(), None, None, (2, 4), Capacity::Unlimited).entropy;
        assert!((entropy(&[3.0; 8]) - 4f64.ln()).abs() < 1e-6);
        assert!(entropy(&[0.0, 500.0, 0.0, 0.0]) < 1e-6);
        let p = [0.5f64, 0.25, 0.125, 0.125];
        let expected = -p.iter().map(|p| p * p.ln()).sum::<f64>();
        assert!((entropy(&p.map(|p| p.ln() as f32)) - expected).abs() < 1e-6);
    }

    #[test]
    fn softplus_is_exact_at_both_ends() {
        assert_eq!((softplus(200.0), softplus(-200.0)), (200.0, 0.0));
        assert!((softplus(0.0) - std::f32::consts::LN_2).abs() < 1e-7);
    }
}
