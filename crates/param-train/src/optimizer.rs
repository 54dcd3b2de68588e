//! AdamW and gradient clipping over all parameters (reference/MODEL §7: the update of Loshchilov and Hutter 2019).

use param_kernels::{AdamWStep, Kernels, Team};
use param_model::{Role, TensorSpec};
use serde::{Deserialize, Serialize};

/// Elements per task: fixed, so that sums do not depend on the number of threads.
const PART: usize = 1 << 14;

/// AdamW's settings other than the learning rate.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdamW {
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Decoupled weight decay, per step and unit of learning rate.
    pub weight_decay: f32,
    /// What decays.
    pub decay: Decay,
}

/// Which tensors weight decay pulls towards zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decay {
    /// Matrices and embeddings; norms and biases stay free.
    Matrices,
    /// Every parameter, as in the reference.
    All,
}

impl Decay {
    fn applies_to(self, spec: &TensorSpec) -> bool {
        self == Decay::All || !matches!(spec.role, Role::Norm | Role::Bias)
    }
}

/// First and second moments, in the tensor table's order.
pub struct Moments {
    /// Running mean of the gradients.
    pub first: Vec<Vec<f32>>,
    /// Running mean of their squares.
    pub second: Vec<Vec<f32>>,
}

impl AdamW {
    /// One step; `t` counts from 1. Gradients are multiplied by `grad_scale` as they are read (clipping), and become zero.
    pub fn step(
        &self,
        team: &mut Team,
        table: &[TensorSpec],
        params: &mut [Vec<f32>],
        grads: &mut [Vec<f32>],
        moments: &mut Moments,
        lr: f32,
        t: u64,
        grad_scale: f32,
    ) {
        let kernels = Kernels::get();
        let Self { beta1, beta2, eps, .. } = *self;
        let bias_correction = |beta: f32| 1.0 - f64::from(beta).powf(t as f64);
        let step = AdamWStep {
            grad_scale,
            gain1: 1.0 - beta1,
            beta2,
            step_size: (f64::from(lr) / bias_correction(beta1)) as f32,
            root: (1.0 / bias_correction(beta2).sqrt()) as f32,
            eps,
            keep: 1.0,
        };
        let Moments { first, second } = moments;
        // One parallel step over the parts of all tensors: small ones are many.
        let mut parts = Vec::new();
        for (((spec, p), g), (m, v)) in table.iter().zip(params).zip(grads).zip(first.iter_mut().zip(second)) {
            let keep = if self.decay.applies_to(spec) { 1.0 - lr * self.weight_decay } else { 1.0 };
            let of_tensor = p.chunks_mut(PART).zip(g.chunks_mut(PART)).zip(m.chunks_mut(PART).zip(v.chunks_mut(PART)));
            parts.extend(of_tensor.map(|((p, g), (m, v))| (p, g, m, v, AdamWStep { keep, ..step })));
        }
        team.for_each_chunk(&mut parts, 1, |_, part| {
            let [(p, g, m, v, step)] = part else { return };
            kernels.adamw(p, g, m, v, step);
        });
    }
}

/// Euclidean norm of all gradients together.
pub fn global_norm(team: &mut Team, grads: &[Vec<f32>]) -> f64 {
    let kernels = Kernels::get();
    let parts = grads.iter().flat_map(|g| g.chunks(PART)).collect::<Vec<_>>();
    let mut squares = vec![0.0; parts.len()];
    team.for_each_chunk(&mut squares, 1, |i, square| square[0] = kernels.sum_of_squares(parts[i]));
    squares.iter().sum::<f64>().sqrt()
}

/// Factor that brings gradients of that norm within `max_norm`, as PyTorch's `clip_grad_norm_` computes it.
pub fn clip_factor(norm: f64, max_norm: f32) -> f32 {
    (f64::from(max_norm) / (norm + 1e-6)).min(1.0) as f32
}
