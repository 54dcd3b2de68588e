//! What computes a model: the CPU, which is the oracle, or a GPU.

use std::borrow::Cow;

use param_model::{Config, TensorSpec};

use crate::cpu::{Capacity, CrossEntropy, Profile};
use crate::data::Batch;
use crate::error::Error;
use crate::optimizer::Moments;
use crate::settings::Settings;

/// A model that can be evaluated: without dropout and router noise.
pub trait Evaluate {
    /// Its structure.
    fn config(&self) -> &Config;

    /// Cross-entropy of a batch.
    ///
    /// # Errors
    /// What a GPU fails with.
    fn loss(&mut self, batch: &Batch, capacity: Capacity) -> Result<CrossEntropy, Error>;

    /// Logits of what follows `ids`, at most as many as the model has positions: [n_vocab].
    ///
    /// # Errors
    /// What a GPU fails with.
    fn logits(&mut self, ids: &[u32]) -> Result<Vec<f32>, Error>;
}

/// A model in training: parameters, gradients, and the optimizer's moments.
pub trait Learn: Evaluate {
    /// Its tensors; parameters and moments are vectors in this order.
    fn table(&self) -> &[TensorSpec];

    /// Adds up the gradients of `batches`, all those of a step, the first of which is forward pass number `first_pass`. May return
    /// before they are computed.
    ///
    /// # Errors
    /// What a GPU fails with.
    fn accumulate(&mut self, settings: &Settings, first_pass: u64, batches: &[Batch]) -> Result<(), Error>;

    /// Whether [`Learn::update`] leaves a step out by itself where its loss or gradients are not finite, so that nobody has to wait for
    /// [`Learn::outcome`] before.
    fn judges_alone(&self) -> bool;

    /// The losses of each batch, and the norm of the gradients: waits for them.
    ///
    /// # Errors
    /// What a GPU fails with: also in what [`Learn::accumulate`] and [`Learn::update`] began.
    fn outcome(&mut self) -> Result<(Vec<BatchLosses>, f64), Error>;

    /// The optimizer's step after `step` others. Gradients are multiplied by `most_scale` at most, are clipped, and become zero; where
    /// `most_scale` is 0, nothing else changes. May return before it is computed.
    ///
    /// # Errors
    /// What a GPU fails with.
    fn update(&mut self, settings: &Settings, step: u64, most_scale: f32) -> Result<(), Error>;

    /// The parameters.
    ///
    /// # Errors
    /// What a GPU fails with.
    fn params(&self) -> Result<Cow<'_, [Vec<f32>]>, Error>;

    /// The moments.
    ///
    /// # Errors
    /// What a GPU fails with.
    fn moments(&self) -> Result<Cow<'_, Moments>, Error>;

    /// Operations a second that matrix products under `settings` could reach at best; 0 where that is not known.
    fn peak(&mut self, settings: &Settings) -> f64;

    /// Times the parts of steps from now on, where that is not done anyway because it costs something.
    fn start_profile(&mut self) {}

    /// Where the time went.
    fn profile(&mut self) -> &mut Profile;
}

/// The parts of a batch's loss.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BatchLosses {
    /// Cross-entropy of the next token.
    pub cross_entropy: CrossEntropy,
    /// Of each MoE block, in order.
    pub routers: Vec<RouterLosses>,
}

/// What a router made of a batch.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RouterLosses {
    /// Tokens that chose each expert, before dropping: [n_expert].
    pub load: Vec<usize>,
    /// Load-balancing loss, unweighted.
    pub aux: f64,
    /// Mean squared log-sum-exp of the logits, unweighted.
    pub z: f64,
    /// Mean entropy of the softmax over all experts, nats.
    pub entropy: f64,
    /// Choices that found their expert full.
    pub n_dropped: usize,
}
