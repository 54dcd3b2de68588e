//! A model in training on the CPU.

use std::borrow::Cow;
use std::cmp::Ordering;

use param_kernels::arithmetic_peak;
use param_model::{Config, Part, TensorSpec};

use super::{
    Capacity, CrossEntropy, GradientScale, Losses, Mode, Model, NoiseSource, Profile, Routing, Section, Sequences,
};
use crate::backend::{BatchLosses, Evaluate, Learn, RouterLosses};
use crate::data::Batch;
use crate::error::Error;
use crate::optimizer::{self, Group, Moments, MuonScratch, clip_factor, global_norm};
use crate::random::Key;
use crate::settings::Settings;

/// A model with its parameters.
pub struct CpuModel {
    model: Model,
    params: Vec<Vec<f32>>, // in the tensor table's order, as everything below
}

impl CpuModel {
    /// The model of `config` as `settings` compute it.
    pub fn new(config: &Config, settings: &Settings, n_thread: usize, params: Vec<Vec<f32>>) -> Self {
        Self { model: Model::new(config, settings.compute(n_thread)), params }
    }
}

impl Evaluate for CpuModel {
    fn config(&self) -> &Config {
        self.model.config()
    }

    fn loss(&mut self, batch: &Batch, capacity: Capacity) -> Result<CrossEntropy, Error> {
        let mode = Mode { capacity, ..Mode::INFERENCE };
        Ok(self.model.loss(&self.params, sequences(batch), &batch.target, mode).cross_entropy)
    }

    fn logits(&mut self, ids: &[u32]) -> Result<Vec<f32>, Error> {
        let sequences = Sequences { ids, n_col: ids.len(), mask: None, first: None };
        Ok(self.model.logits(&self.params, sequences, &[ids.len() - 1], Mode::INFERENCE))
    }
}

/// A model with what training it needs.
pub struct CpuLearner {
    model: CpuModel,
    moments: Moments,
    groups: Vec<Group>,
    scratch: Vec<MuonScratch>, // [n_thread]
    /// Zero between steps.
    grads: Vec<Vec<f32>>,
    /// Of the step's batches, and the norm of the gradients.
    outcome: (Vec<Losses>, f64),
}

impl CpuLearner {
    /// A model in training; `groups` are those of its tensors.
    pub fn new(model: CpuModel, groups: Vec<Group>, moments: Moments) -> Self {
        let grads = model.model.zeros();
        Self { model, moments, groups, scratch: Vec::new(), grads, outcome: (Vec::new(), 0.0) }
    }
}

impl Evaluate for CpuLearner {
    fn config(&self) -> &Config {
        self.model.config()
    }

    fn loss(&mut self, batch: &Batch, capacity: Capacity) -> Result<CrossEntropy, Error> {
        self.model.loss(batch, capacity)
    }

    fn logits(&mut self, ids: &[u32]) -> Result<Vec<f32>, Error> {
        self.model.logits(ids)
    }
}

impl Learn for CpuLearner {
    fn table(&self) -> &[TensorSpec] {
        self.model.model.table()
    }

    fn accumulate(&mut self, settings: &Settings, first_pass: u64, batches: &[Batch]) -> Result<(), Error> {
        let Self { model: CpuModel { model, params }, groups, grads, outcome: (losses, norm), .. } = self;
        let n_target = batches.iter().map(Batch::n_target).sum::<usize>();
        let scale = GradientScale { n_target, n_batch: batches.len() };
        losses.clear();
        for (pass, batch) in (first_pass..).zip(batches) {
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
        for (g, _) in grads.iter_mut().zip(&*groups).filter(|(_, group)| group.is_frozen) {
            // What is not updated neither counts in the norm nor stays for the next step.
            g.fill(0.0);
        }
        *norm = global_norm(model.table_and_team().1, grads);
        Ok(())
    }

    fn judges_alone(&self) -> bool {
        false
    }

    fn outcome(&mut self) -> Result<(Vec<BatchLosses>, f64), Error> {
        let (losses, norm) = &self.outcome;
        Ok((losses.iter().map(BatchLosses::from).collect(), *norm))
    }

    fn update(&mut self, settings: &Settings, step: u64, most_scale: f32) -> Result<(), Error> {
        let Self { model: CpuModel { model, params }, moments, groups, scratch, grads, outcome: (losses, norm) } = self;
        if most_scale == 0.0 {
            grads.iter_mut().for_each(|g| g.fill(0.0));
            return Ok(());
        }
        let grad_scale = clip_factor(*norm, settings.clip).min(most_scale);
        let (lr, muon_lr) = (settings.schedule.at(step), settings.muon_lr(step));
        let at = optimizer::Step { number: step + 1, lr, muon_lr, grad_scale };
        let (table, team) = model.table_and_team();
        optimizer::step(team, scratch, (table, groups), params, grads, moments, settings, at);
        let biases = (0..table.len()).filter(|&i| table[i].part == Part::SelectionBias);
        for (block, at) in biases.enumerate().filter(|(_, at)| !groups[*at].is_frozen) {
            balance(&mut params[at], &load(losses, block), settings.bias_rate);
        }
        model.profile().enter(Section::Other);
        Ok(())
    }

    fn params(&self) -> Result<Cow<'_, [Vec<f32>]>, Error> {
        Ok(Cow::Borrowed(&self.model.params))
    }

    fn moments(&self) -> Result<Cow<'_, Moments>, Error> {
        Ok(Cow::Borrowed(&self.moments))
    }

    fn peak(&mut self, settings: &Settings) -> f64 {
        // Measured, in some hundredths of a second.
        arithmetic_peak(self.model.model.table_and_team().1, settings.dtype.arithmetic())
    }

    fn profile(&mut self) -> &mut Profile {
        self.model.model.profile()
    }
}

impl From<&Losses> for BatchLosses {
    fn from(losses: &Losses) -> Self {
        let router = |routing: &Routing| RouterLosses {
            load: routing.load.clone(),
            aux: routing.aux,
            z: routing.z,
            entropy: routing.entropy,
            n_dropped: routing.n_dropped(),
        };
        Self { cross_entropy: losses.cross_entropy, routers: losses.routings.iter().map(router).collect() }
    }
}

/// A batch as the model reads it.
fn sequences(batch: &Batch) -> Sequences<'_> {
    Sequences {
        ids: &batch.input,
        n_col: batch.input.len() / batch.n_row,
        mask: batch.mask.as_deref(),
        first: batch.first.as_deref(),
    }
}

/// Tokens of all batches that chose each expert of the MoE block number `block`, before dropping: [n_expert].
fn load(losses: &[Losses], block: usize) -> Vec<usize> {
    let mut sum = vec![0; losses[0].routings[block].load.len()];
    for routing in losses.iter().map(|l| &l.routings[block]) {
        sum.iter_mut().zip(&routing.load).for_each(|(sum, load)| *sum += load);
    }
    sum
}

/// Moves selection biases by `rate`: up where an expert's load is below the mean, down where it is above (Wang et al. 2024).
fn balance(biases: &mut [f32], loads: &[usize], rate: f32) {
    let total = loads.iter().sum::<usize>();
    for (bias, n) in biases.iter_mut().zip(loads) {
        // In whole numbers, so that an expert at the mean stays where it is.
        *bias += match (n * loads.len()).cmp(&total) {
            Ordering::Less => rate,
            Ordering::Equal => 0.0,
            Ordering::Greater => -rate,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn biases_move_against_the_load_and_rest_at_the_mean() {
        let mut biases = [0.5, 0.0, 0.0, -1.0];
        balance(&mut biases, &[4, 3, 2, 3], 0.25);
        assert_eq!(biases, [0.25, 0.0, 0.25, -1.0]);
    }
}
