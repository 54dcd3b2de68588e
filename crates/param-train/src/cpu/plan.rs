//! What a step will need, before anything is allocated: memory by kind, and operations.

use param_model::{Config, tensors};

use super::head;
use super::machine::Compute;
use crate::optimizer::Group;
use crate::settings::Recompute;

/// Bytes by what they hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Parameters.
    pub parameters: u64,
    /// Their gradients.
    pub gradients: u64,
    /// The optimizer's moments.
    pub moments: u64,
    /// What blocks keep for the backward pass.
    pub activations: u64,
    /// What comes and goes within a pass: a block's intermediate rows, the logits of a chunk.
    pub working: u64,
}

impl Memory {
    /// Needed to train `config` on batches of `n_row` rows of `n_col` tokens without dropped choices; within a tenth. `groups` are
    /// those of its tensors.
    pub fn plan(config: &Config, groups: &[Group], compute: Compute, (n_row, n_col): (usize, usize)) -> Self {
        let f32s = |n: usize| 4 * n as u64;
        let values = |n: usize| 4 * compute.precision.words(n) as u64;
        let (n_token, d, n_ff) = (n_row * n_col, config.n_embd, config.n_ff());
        let rows = n_token * d;
        let k = config.n_expert_used;
        // Input and what follows the attention in f32; queries, keys, values, and what was attended.
        let ffn = |is_moe: bool| {
            if is_moe { values(n_token * k * n_ff) + values(k * rows) } else { values(n_token * n_ff) }
        };
        let attention = f32s(rows) + 4 * values(rows);
        let blocks = |of: &dyn Fn(bool) -> u64| (0..config.n_layer).map(|i| of(config.is_moe(i))).sum::<u64>();
        let inputs = f32s(rows) * (config.n_layer as u64 + 1);
        let activations = inputs
            + match compute.recompute {
                Recompute::Nothing => blocks(&|is_moe| attention + ffn(is_moe)),
                Recompute::FeedForward => blocks(&|_| attention),
                Recompute::Blocks => 0,
            };
        // Each kind of block has buffers of its own sizes: hidden rows and their gradients, and those of the kept choices.
        let is = |is_moe: bool| u64::from((0..config.n_layer).any(|i| config.is_moe(i) == is_moe));
        let of_experts = 2 * values(n_token * k * n_ff) + f32s(k * rows);
        let wide = is(true) * of_experts + is(false) * 2 * values(n_token * n_ff);
        let ffns = is(true) * ffn(true) + is(false) * ffn(false);
        let again = match compute.recompute {
            Recompute::Nothing => 0,
            Recompute::FeedForward => ffns,
            Recompute::Blocks => attention + ffns,
        };
        let n_logit = head::rows_per_chunk(config.n_vocab).min(n_token) * config.n_vocab;
        let mut working = wide + again + 3 * f32s(rows) + 6 * values(rows) + f32s(n_logit) + values(n_logit);
        let table = tensors(config);
        let parameters = f32s(table.iter().map(|t| t.n_elements()).sum());
        let muons = || table.iter().zip(groups).filter(|(_, group)| group.is_muons).map(|(t, _)| t);
        let moments = 2 * parameters - f32s(muons().map(|t| t.n_elements()).sum());
        // An update and four squares of its shorter side, by thread.
        if muons().next().is_some() {
            working += compute.n_thread as u64 * f32s(d * n_ff + 4 * d * d);
        }
        Self { parameters, gradients: parameters, moments, activations, working }
    }

    /// All of it.
    pub fn total(self) -> u64 {
        let Self { parameters, gradients, moments, activations, working } = self;
        parameters + gradients + moments + activations + working
    }
}

/// Multiplications and additions that training on a token takes in matrix products, forward and backward, in rows of `n_col` tokens:
/// 6 for every weight it meets, and those of causal attention. What is computed again does not count.
pub fn operations_per_token(config: &Config, n_col: usize) -> f64 {
    let (d, n_ff) = (config.n_embd, config.n_ff());
    let ffn = |i: usize| {
        if config.is_moe(i) {
            let n_score = 1 + usize::from(config.use_noisy_top_k);
            2 * d * n_ff * config.n_expert_used + n_score * config.n_expert * d
        } else {
            2 * d * n_ff
        }
    };
    let weights = config.n_vocab * d + (0..config.n_layer).map(|i| 4 * d * d + ffn(i)).sum::<usize>();
    let attention = 12.0 * (config.n_layer * d) as f64 * (n_col + 1) as f64 / 2.0;
    6.0 * weights as f64 + attention
}
