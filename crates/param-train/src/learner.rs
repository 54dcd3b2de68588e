//! A model with what training it needs: gradients, the optimizer's moments, and the step that ties them together.

use param_kernels::arithmetic_peak;
use param_model::Config;

use crate::cpu::{GradientScale, Losses, Mode, Model, NoiseSource, Routing, Section, Sequences};
use crate::data::Batch;
use crate::error::Error;
use crate::init::initialise;
use crate::metrics::StepRecord;
use crate::optimizer::{Moments, clip_factor, global_norm};
use crate::random::Key;
use crate::settings::{Dtype, Settings};

/// What learns.
pub struct Learner {
    /// Its structure.
    pub model: Model,
    /// In the tensor table's order, as everything below.
    pub params: Vec<Vec<f32>>,
    /// The optimizer's.
    pub moments: Moments,
    /// Zero between steps.
    grads: Vec<Vec<f32>>,
}

impl Learner {
    /// A freshly initialised model.
    pub fn new(config: &Config, settings: &Settings, n_thread: usize) -> Self {
        let model = Model::new(config, settings.compute(n_thread));
        let params = initialise(config, settings.seed);
        let moments = Moments { first: model.zeros(), second: model.zeros() };
        let grads = model.zeros();
        Self { model, params, moments, grads }
    }

    /// A model as it was when its parameters and moments were saved.
    pub fn restored(
        config: &Config,
        settings: &Settings,
        n_thread: usize,
        params: Vec<Vec<f32>>,
        moments: Moments,
    ) -> Self {
        let model = Model::new(config, settings.compute(n_thread));
        let grads = model.zeros();
        Self { model, params, moments, grads }
    }

    /// Operations a second that matrix products in `dtype` could reach on its threads: measured, in some hundredths of a second.
    pub fn peak(&mut self, dtype: Dtype) -> f64 {
        arithmetic_peak(self.model.table_and_team().1, dtype.arithmetic())
    }

    /// The optimizer step after `step` others, on some batches. The record's times, rates and sums over the run are left to the
    /// caller; `n_target` counts this step's targets.
    ///
    /// # Errors
    /// A loss or gradient that is not finite; parameters are as before.
    pub fn step(&mut self, settings: &Settings, step: u64, batches: &[Batch]) -> Result<StepRecord, Error> {
        let Self { model, params, moments, grads } = self;
        let first = step * batches.len() as u64;
        let n_target = batches.iter().map(Batch::n_target).sum::<usize>();
        let scale = GradientScale { n_target, n_batch: batches.len() };
        let mut losses = Vec::with_capacity(batches.len());
        for (pass, batch) in (first..).zip(batches) {
            let key = Key { seed: settings.seed, pass };
            let noisy = model.config().use_noisy_top_k;
            let mode = Mode {
                dropout: Some(key),
                capacity: settings.dropping.capacity(model.config(), true),
                noise: if noisy { NoiseSource::Drawn(key) } else { NoiseSource::Off },
            };
            losses.push(model.loss_and_gradients(params, grads, sequences(batch), &batch.target, mode, scale));
        }
        model.profile().enter(Section::Optimizer);
        let grad_norm = global_norm(model.table_and_team().1, grads);
        let total = total_loss(&losses, model.config());
        if !(total.loss.is_finite() && grad_norm.is_finite()) {
            grads.iter_mut().for_each(|g| g.fill(0.0));
            return Err(Error::NotFinite { step: step + 1, loss: total.loss });
        }
        let lr = settings.schedule.at(step);
        let clip = clip_factor(grad_norm, settings.clip);
        let (table, team) = model.table_and_team();
        settings.adamw.step(team, table, params, grads, moments, lr, step + 1, clip);
        model.profile().enter(Section::Other);
        Ok(StepRecord { step: step + 1, grad_norm, lr, n_target: n_target as u64, ..total })
    }
}

/// A batch as the model reads it.
pub fn sequences(batch: &Batch) -> Sequences<'_> {
    Sequences { ids: &batch.input, n_col: batch.input.len() / batch.n_row, mask: batch.mask.as_deref() }
}

/// The loss fields of a step's record over its batches: cross-entropy by target, router losses by batch.
fn total_loss(losses: &[Losses], config: &Config) -> StepRecord {
    let mean = |of: fn(&Losses) -> f64| losses.iter().map(of).sum::<f64>() / losses.len() as f64;
    let n_target = losses.iter().map(|l| l.cross_entropy.n_target).sum::<usize>();
    let ce = losses.iter().map(|l| l.cross_entropy.sum).sum::<f64>() / n_target as f64;
    let router_part = losses.iter().map(|l| l.total(config) - l.ce()).sum::<f64>() / losses.len() as f64;
    let routings = || losses.iter().flat_map(|l| &l.routings);
    let load = |block: usize| {
        let of_block = losses.iter().map(|l| &l.routings[block]).collect::<Vec<_>>();
        let choices = of_block.iter().map(|r| r.chosen.len()).sum::<usize>() as f64;
        (0..config.n_expert).map(|e| of_block.iter().map(|r| r.load[e]).sum::<usize>() as f64 / choices).collect()
    };
    StepRecord {
        step: 0,
        loss: ce + router_part,
        ce,
        aux: mean(Losses::aux),
        z: mean(Losses::z),
        grad_norm: 0.0,
        lr: 0.0,
        tokens_per_s: 0.0,
        mfu: 0.0,
        memory: None,
        seconds: 0.0,
        n_target: 0,
        epoch: 0.0,
        n_dropped: routings().map(Routing::n_dropped).sum(),
        expert_load: (0..losses[0].routings.len()).map(load).collect(),
    }
}
