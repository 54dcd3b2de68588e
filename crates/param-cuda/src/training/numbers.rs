//! What changes from step to step and what a step comes to, as kernels see it.

use bytemuck::{Pod, Zeroable};

/// `Numbers` in train.cuh, field by field.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Numbers {
    /// Of ChaCha, from the run's seed.
    pub key: [u32; 8],
    /// Number of this forward pass, low word first.
    pub pass: [u32; 2],
    /// Of a target's cross-entropy in the loss: one over the targets of all batches of the step.
    pub target_share: f32,
    /// Of this batch's router losses in the loss: one over the batches of the step.
    pub batch_share: f32,
    /// AdamW's learning rate.
    pub lr: f32,
    /// Muon's.
    pub muon_lr: f32,
    /// `1 / (1 - beta1^t)` at step `t`, from 1.
    pub bias1: f32,
    /// `1 / sqrt(1 - beta2^t)`.
    pub root2: f32,
    /// Largest gradient norm.
    pub clip: f32,
    /// What gradients are multiplied by at most; 0 leaves the step out.
    pub most_scale: f32,
}

/// `Outcome` in train.cuh, field by field.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Outcome {
    /// Of all gradients.
    pub square_norm: f64,
    /// What gradients are multiplied by; 0 leaves the step out.
    pub grad_scale: f32,
    pub(crate) unused: u32,
}
