//! A model that learns, wherever it is computed, and the step that ties its parts together.

use param_model::{Config, tensors};

use crate::backend::{BatchLosses, Learn};
use crate::cpu::{CpuLearner, CpuModel, router_loss_weights};
use crate::cuda::CudaLearner;
use crate::data::Batch;
use crate::device::Device;
use crate::error::Error;
use crate::metrics::StepRecord;
use crate::optimizer::{Group, Moments};
use crate::settings::Settings;
use crate::spikes::{Action, Watch};

/// What learns.
pub struct Learner {
    /// The model, its gradients and moments.
    pub model: Box<dyn Learn>,
    /// What it knows of the losses so far.
    pub watch: Watch,
}

impl Learner {
    /// A model that has learned nothing under these settings, from these parameters.
    ///
    /// # Errors
    /// Patterns of `settings` that match nothing; what a GPU fails with.
    pub fn new(config: &Config, settings: &Settings, device: &Device, params: Vec<Vec<f32>>) -> Result<Self, Error> {
        let table = tensors(config);
        let groups = Group::all(&table, settings)?;
        let moments = Moments::zeros(&table, &groups);
        Self::on(device, config, settings, params, groups, moments, Watch::default())
    }

    /// A model as it was when its parameters, moments and statistics were saved.
    ///
    /// # Errors
    /// As for [`Learner::new`], or another optimizer than that of the moments.
    pub fn restored(
        config: &Config,
        settings: &Settings,
        device: &Device,
        params: Vec<Vec<f32>>,
        moments: Moments,
        watch: Watch,
    ) -> Result<Self, Error> {
        let groups = Group::all(&tensors(config), settings)?;
        if moments.second.iter().zip(&groups).any(|(second, group)| second.is_empty() != group.is_muons) {
            let problem = "a run keeps the optimizer it began with: its state is of no use to another".to_owned();
            return Err(Error::Setting { flag: "optimizer", problem });
        }
        Self::on(device, config, settings, params, groups, moments, watch)
    }

    fn on(
        device: &Device,
        config: &Config,
        settings: &Settings,
        params: Vec<Vec<f32>>,
        groups: Vec<Group>,
        moments: Moments,
        watch: Watch,
    ) -> Result<Self, Error> {
        device.check(config, settings)?;
        let model: Box<dyn Learn> = match device {
            Device::Cpu { n_thread } => {
                Box::new(CpuLearner::new(CpuModel::new(config, settings, *n_thread, params), groups, moments))
            }
            Device::Cuda { gpu } => Box::new(CudaLearner::new(gpu, config, settings, &params, groups, &moments)?),
        };
        Ok(Self { model, watch })
    }

    /// The optimizer step after `step` others, on some batches. The record's times, rates and sums over the run are left to the
    /// caller; `n_target` counts this step's targets.
    ///
    /// # Errors
    /// A loss or gradient that is not finite: parameters are as before; what a GPU fails with.
    pub fn step(&mut self, settings: &Settings, step: u64, batches: &[Batch]) -> Result<StepRecord, Error> {
        let Self { model, watch } = self;
        model.accumulate(settings, settings.first_batch(step), batches)?;
        let is_updated = model.judges_alone() && settings.spikes.is_none();
        if is_updated {
            model.update(settings, step, 1.0)?;
        }
        let (losses, grad_norm) = model.outcome()?;
        let total = total_loss(&losses, model.config());
        let is_finite = total.loss.is_finite() && grad_norm.is_finite();
        let mut spike = None;
        if !is_updated {
            spike = settings.spikes.filter(|_| is_finite).and_then(|rule| watch.observe(rule, total.loss, grad_norm));
            let most_scale = match spike {
                _ if !is_finite => 0.0,
                None => 1.0,
                Some((spike, mean_norm)) => match spike.action {
                    Action::Skip => 0.0,
                    Action::Clip => (mean_norm / grad_norm) as f32,
                },
            };
            model.update(settings, step, most_scale)?;
        }
        if !is_finite {
            return Err(Error::NotFinite { step: step + 1, loss: total.loss });
        }
        let lr = settings.schedule.at(step);
        let n_target = batches.iter().map(Batch::n_target).sum::<usize>() as u64;
        Ok(StepRecord { step: step + 1, grad_norm, lr, n_target, spike: spike.map(|(spike, _)| spike), ..total })
    }
}

/// The loss fields of a step's record over its batches: cross-entropy by target, router losses by batch.
fn total_loss(losses: &[BatchLosses], config: &Config) -> StepRecord {
    let n_batch = losses.len() as f64;
    let n_target = losses.iter().map(|l| l.cross_entropy.n_target).sum::<usize>();
    let ce = losses.iter().map(|l| l.cross_entropy.sum).sum::<f64>() / n_target as f64;
    let routers = || losses.iter().flat_map(|l| &l.routers);
    // Summed over blocks.
    let aux = routers().map(|r| r.aux).sum::<f64>() / n_batch;
    let z = routers().map(|r| r.z).sum::<f64>() / n_batch;
    let (aux_weight, z_weight) = router_loss_weights(config);
    let blocks = 0..losses[0].routers.len();
    let share = |block: usize| {
        let of_expert = |expert: usize| losses.iter().map(|l| l.routers[block].load[expert]).sum::<usize>();
        let load = (0..config.n_expert).map(of_expert).collect::<Vec<_>>();
        let choices = load.iter().sum::<usize>() as f64;
        load.iter().map(|&n| n as f64 / choices).collect()
    };
    let entropy = |block: usize| losses.iter().map(|l| l.routers[block].entropy).sum::<f64>() / n_batch;
    StepRecord {
        loss: ce + f64::from(aux_weight) * aux + f64::from(z_weight) * z,
        ce,
        aux,
        z,
        n_dropped: routers().map(|r| r.n_dropped).sum(),
        expert_load: blocks.clone().map(share).collect(),
        router_entropy: blocks.map(entropy).collect(),
        ..StepRecord::default()
    }
}
