//! AdamW and gradient clipping over all parameters (reference/MODEL §7: the update of Loshchilov and Hutter 2019).

use param_model::{Role, TensorSpec};
use rayon::prelude::*;
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
    /// One step; `t` counts from 1. Gradients are multiplied by `grad_scale` as they are read (clipping).
    pub fn step(
        &self,
        table: &[TensorSpec],
        params: &mut [Vec<f32>],
        grads: &[Vec<f32>],
        moments: &mut Moments,
        lr: f32,
        t: u64,
        grad_scale: f32,
    ) {
        let Self { beta1, beta2, eps, .. } = *self;
        let bias_correction = |beta: f32| 1.0 - f64::from(beta).powf(t as f64);
        let step_size = (f64::from(lr) / bias_correction(beta1)) as f32;
        let root_correction = bias_correction(beta2).sqrt() as f32;
        let tensors = table.iter().zip(params).zip(grads).zip(moments.first.iter_mut().zip(&mut moments.second));
        for (((spec, p), g), (m, v)) in tensors {
            let keep = if self.decay.applies_to(spec) { 1.0 - lr * self.weight_decay } else { 1.0 };
            let parts = p.par_chunks_mut(PART).zip(g.par_chunks(PART));
            let parts = parts.zip(m.par_chunks_mut(PART).zip(v.par_chunks_mut(PART)));
            parts.for_each(|((p, g), (m, v))| {
                for (((p, &g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
                    let g = g * grad_scale;
                    *m += (1.0 - beta1) * (g - *m);
                    *v = beta2 * *v + (1.0 - beta2) * g * g;
                    *p = *p * keep - step_size * *m / (v.sqrt() / root_correction + eps);
                }
            });
        }
    }
}

/// Euclidean norm of all gradients together.
pub fn global_norm(grads: &[Vec<f32>]) -> f64 {
    let squares = |part: &[f32]| part.iter().map(|&g| f64::from(g) * f64::from(g)).sum::<f64>();
    let of_tensor = |g: &Vec<f32>| g.par_chunks(PART).map(squares).collect::<Vec<f64>>().iter().sum::<f64>();
    grads.iter().map(of_tensor).sum::<f64>().sqrt()
}

/// Factor that brings gradients of that norm within `max_norm`, as PyTorch's `clip_grad_norm_` computes it.
pub fn clip_factor(norm: f64, max_norm: f32) -> f32 {
    (f64::from(max_norm) / (norm + 1e-6)).min(1.0) as f32
}
