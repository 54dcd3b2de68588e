//! AdamW (reference/MODEL §7: the update of Loshchilov and Hutter 2019).

use param_kernels::AdamWStep;
use serde::{Deserialize, Serialize};

/// AdamW's settings other than the learning rate.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdamW {
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Decoupled weight decay, per step and unit of learning rate; Muon's as well.
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

impl AdamW {
    /// Step `t`, from 1, at learning rate `lr`, of a tensor that keeps `keep` of itself.
    pub(super) fn at(&self, lr: f32, t: u64, grad_scale: f32, keep: f32) -> AdamWStep {
        let bias_correction = |beta: f32| 1.0 - f64::from(beta).powf(t as f64);
        AdamWStep {
            grad_scale,
            gain1: 1.0 - self.beta1,
            beta2: self.beta2,
            step_size: (f64::from(lr) / bias_correction(self.beta1)) as f32,
            root: (1.0 / bias_correction(self.beta2).sqrt()) as f32,
            eps: self.eps,
            keep,
        }
    }
}
