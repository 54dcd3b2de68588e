//! A model with what training it needs: gradients, the optimizer's moments, and the step that ties them together.

use std::cmp::Ordering;

use param_kernels::arithmetic_peak;
use param_model::{Config, Part};

use crate::cpu::{GradientScale, Losses, Mode, Model, NoiseSource, Routing, Section, Sequences};
use crate::data::Batch;
use crate::error::Error;
use crate::metrics::StepRecord;
use crate::optimizer::{self, Group, Moments, MuonScratch, clip_factor, global_norm};
use crate::random::Key;
use crate::settings::{Dtype, Settings};
use crate::spikes::{Action, Watch};

/// What learns.
pub struct Learner {
    /// Its structure.
    pub model: Model,
    /// In the tensor table's order, as everything below.
    pub params: Vec<Vec<f32>>,
    /// The optimizer's.
    pub moments: Moments,
    /// What it knows of the losses so far.
    pub watch: Watch,
    groups: Vec<Group>,
    scratch: Vec<MuonScratch>, // [n_thread]
    /// Zero between steps.
    grads: Vec<Vec<f32>>,
}

impl Learner {
    /// A model that has learned nothing under these settings, from these parameters.
    ///
    /// # Errors
    /// Patterns of `settings` that match nothing.
    pub fn new(config: &Config, settings: &Settings, n_thread: usize, params: Vec<Vec<f32>>) -> Result<Self, Error> {
        let model = Model::new(config, settings.compute(n_thread));
        let groups = Group::all(model.table(), settings)?;
        let moments = Moments::zeros(model.table(), &groups);
        Ok(Self::with(model, groups, params, moments, Watch::default()))
    }

    /// A model as it was when its parameters, moments and statistics were saved.
    ///
    /// # Errors
    /// As for [`Learner::new`], or another optimizer than that of the moments.
    pub fn restored(
        config: &Config,
        settings: &Settings,
        n_thread: usize,
        params: Vec<Vec<f32>>,
        moments: Moments,
        watch: Watch,
    ) -> Result<Self, Error> {
        let model = Model::new(config, settings.compute(n_thread));
        let groups = Group::all(model.table(), settings)?;
        if moments.second.iter().zip(&groups).any(|(second, group)| second.is_empty() != group.is_muons) {
            let problem = "a run keeps the optimizer it began with: its state is of no use to another".to_owned();
            return Err(Error::Setting { flag: "optimizer", problem });
        }
        Ok(Self::with(model, groups, params, moments, watch))
    }

    fn with(model: Model, groups: Vec<Group>, params: Vec<Vec<f32>>, moments: Moments, watch: Watch) -> Self {
        let grads = model.zeros();
        Self { model, params, moments, watch, groups, scratch: Vec::new(), grads }
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
        let Self { model, params, moments, watch, groups, scratch, grads } = self;
        let first = settings.first_batch(step);
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
        for (g, _) in grads.iter_mut().zip(&*groups).filter(|(_, group)| group.is_frozen) {
            // What is not updated neither counts in the norm nor stays for the next step.
            g.fill(0.0);
        }
        let grad_norm = global_norm(model.table_and_team().1, grads);
        let total = total_loss(&losses, model.config());
        if !(total.loss.is_finite() && grad_norm.is_finite()) {
            grads.iter_mut().for_each(|g| g.fill(0.0));
            return Err(Error::NotFinite { step: step + 1, loss: total.loss });
        }
        let lr = settings.schedule.at(step);
        let mut grad_scale = clip_factor(grad_norm, settings.clip);
        let spike = settings.spikes.and_then(|rule| watch.observe(rule, total.loss, grad_norm));
        if let Some((spike, mean_norm)) = spike {
            match spike.action {
                Action::Skip => grads.iter_mut().for_each(|g| g.fill(0.0)),
                Action::Clip => grad_scale = grad_scale.min((mean_norm / grad_norm) as f32),
            }
        }
        let spike = spike.map(|(spike, _)| spike);
        if spike.is_none_or(|spike| spike.action == Action::Clip) {
            let at = optimizer::Step { number: step + 1, lr, muon_lr: settings.muon_lr(step), grad_scale };
            let (table, team) = model.table_and_team();
            optimizer::step(team, scratch, (table, groups), params, grads, moments, settings, at);
            let biases = (0..table.len()).filter(|&i| table[i].part == Part::SelectionBias);
            for (block, at) in biases.enumerate().filter(|(_, at)| !groups[*at].is_frozen) {
                balance(&mut params[at], &load(&losses, block), settings.bias_rate);
            }
        }
        model.profile().enter(Section::Other);
        Ok(StepRecord { step: step + 1, grad_norm, lr, n_target: n_target as u64, spike, ..total })
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

/// A batch as the model reads it.
pub fn sequences(batch: &Batch) -> Sequences<'_> {
    Sequences {
        ids: &batch.input,
        n_col: batch.input.len() / batch.n_row,
        mask: batch.mask.as_deref(),
        first: batch.first.as_deref(),
    }
}

/// The loss fields of a step's record over its batches: cross-entropy by target, router losses by batch.
fn total_loss(losses: &[Losses], config: &Config) -> StepRecord {
    let mean = |of: fn(&Losses) -> f64| losses.iter().map(of).sum::<f64>() / losses.len() as f64;
    let n_target = losses.iter().map(|l| l.cross_entropy.n_target).sum::<usize>();
    let ce = losses.iter().map(|l| l.cross_entropy.sum).sum::<f64>() / n_target as f64;
    let router_part = losses.iter().map(|l| l.total(config) - l.ce()).sum::<f64>() / losses.len() as f64;
    let routings = || losses.iter().flat_map(|l| &l.routings);
    let blocks = 0..losses[0].routings.len();
    let share = |block: usize| {
        let load = load(losses, block);
        let choices = load.iter().sum::<usize>() as f64;
        load.iter().map(|&n| n as f64 / choices).collect()
    };
    let entropy = |block: usize| losses.iter().map(|l| l.routings[block].entropy).sum::<f64>() / losses.len() as f64;
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
        datasets: Vec::new(),
        spike: None,
        n_dropped: routings().map(Routing::n_dropped).sum(),
        expert_load: blocks.clone().map(share).collect(),
        router_entropy: blocks.map(entropy).collect(),
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
