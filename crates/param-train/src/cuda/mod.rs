//! A model on a GPU: the same step as the CPU's, from the same tensor table and the same random numbers.

mod noise;
mod places;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use param_cuda::training::{self, Arithmetic, MemoryPlan, ModelSizes, Numbers, Optimizer, Part, PartSpent, Plan};
use param_cuda::{Error as GpuError, Gpu};
use param_model::{Config, TensorSpec, tensors};

use crate::backend::{BatchLosses, Evaluate, Learn, RouterLosses};
use crate::cpu::{Capacity, CrossEntropy, Memory, Profile, Section, Spent};
use crate::data::Batch;
use crate::error::Error;
use crate::optimizer::{Group, Moments, polynomials};
use crate::random::Key;
use crate::settings::{Dtype, Matmul, Recompute, Settings};
use noise::Noise;
use places::Places;

/// A model with its parameters.
pub struct CudaModel {
    config: Config,
    learner: training::Learner,
}

impl CudaModel {
    /// The model of `config` as `settings` compute it.
    ///
    /// # Errors
    /// A size that the GPU path does not take, too little memory, or whatever the driver fails with.
    pub fn new(gpu: &Arc<Gpu>, config: &Config, settings: &Settings, params: &[Vec<f32>]) -> Result<Self, Error> {
        let table = tensors(config);
        let groups = Group::all(&table, settings)?;
        let places = Places::new(config, &table, &groups);
        let plan = Plan { trains: false, ..plan(config, settings) };
        let flat = places.joined(params, 0..places.model.n_param);
        let learner = training::Learner::new(gpu, places.model, plan, Optimizer::default(), &flat)?;
        Ok(Self { config: config.clone(), learner })
    }
}

impl Evaluate for CudaModel {
    fn config(&self) -> &Config {
        &self.config
    }

    fn loss(&mut self, batch: &Batch, capacity: Capacity) -> Result<CrossEntropy, Error> {
        loss(&mut self.learner, &self.config, batch, capacity)
    }

    fn logits(&mut self, ids: &[u32]) -> Result<Vec<f32>, Error> {
        Ok(self.learner.logits(ids)?)
    }
}

fn loss(
    learner: &mut training::Learner,
    config: &Config,
    batch: &Batch,
    capacity: Capacity,
) -> Result<CrossEntropy, Error> {
    let sum = learner.loss(&input(batch, config, capacity, None))?;
    Ok(CrossEntropy { sum, n_target: batch.n_target() })
}

/// A batch as the GPU takes it.
fn input<'a>(batch: &'a Batch, config: &Config, capacity: Capacity, normal: Option<&'a [f32]>) -> training::Batch<'a> {
    let capacity = match capacity {
        Capacity::Unlimited => None,
        Capacity::Factor { .. } => Some(capacity.tokens(batch.input.len(), config.n_expert, config.n_expert_used)),
    };
    training::Batch {
        n_row: batch.n_row,
        ids: &batch.input,
        targets: &batch.target,
        mask: batch.mask.as_deref(),
        first: batch.first.as_deref(),
        normal,
        capacity,
    }
}

/// Memory and arithmetic of a run.
fn plan(config: &Config, settings: &Settings) -> Plan {
    Plan {
        arithmetic: arithmetic(settings),
        cublaslt: settings.cublaslt,
        deterministic: settings.deterministic,
        matmul: matmul(settings),
        // Samples need one row of all positions.
        n_row: settings.batch_size.max(config.n_ctx.div_ceil(settings.context)),
        n_col: settings.context,
        trains: true,
        recompute: match settings.recompute {
            Recompute::Nothing => training::Recompute::Nothing,
            Recompute::FeedForward => training::Recompute::FeedForward,
            Recompute::Blocks => training::Recompute::Blocks,
        },
    }
}

/// Bytes that training `config` under `settings` needs on a GPU.
///
/// # Errors
/// Patterns of `settings` that match nothing.
pub fn memory(config: &Config, settings: &Settings) -> Result<Memory, Error> {
    let table = tensors(config);
    let groups = Group::all(&table, settings)?;
    let places = Places::new(config, &table, &groups);
    let optimizer = optimizer(&places, &table, &groups, settings);
    let MemoryPlan { parameters, gradients, moments, activations, working } =
        MemoryPlan::new(&places.model, &plan(config, settings), &optimizer);
    Ok(Memory { parameters, gradients, moments, activations, working })
}

/// The version of cuBLASLt that dense products under `settings` are left to, as the library has it (120304 is 12.3.4), if any.
pub fn cublaslt_version(settings: &Settings) -> Option<usize> {
    (settings.cublaslt && settings.dtype != Dtype::F32).then(training::cublaslt_version).flatten()
}

/// Operations a second that matrix products under `settings` could reach at best on `gpu`; 0 where that is not known.
pub fn peak(gpu: &Gpu, settings: &Settings) -> f64 {
    training::peak(gpu, arithmetic(settings)).unwrap_or(0.0)
}

fn arithmetic(settings: &Settings) -> Arithmetic {
    match settings.dtype {
        Dtype::F32 => Arithmetic::F32,
        Dtype::Tf32 => Arithmetic::Tf32,
        Dtype::Bf16 => Arithmetic::Bf16,
    }
}

fn matmul(settings: &Settings) -> training::Matmul {
    match settings.matmul {
        Matmul::Mma => training::Matmul::Mma,
        Matmul::Wgmma => training::Matmul::Wgmma,
    }
}

/// The largest batch whose training needs at most `free` bytes, in powers of two; `None` where one row is too much.
///
/// # Errors
/// As for [`memory`].
pub fn largest_batch(config: &Config, settings: &Settings, free: u64) -> Result<Option<usize>, Error> {
    let mut largest = None;
    for batch_size in (0..12).map(|i| 1 << i) {
        let memory = memory(config, &Settings { batch_size, ..settings.clone() })?;
        if memory.total() > free {
            break;
        }
        largest = Some(batch_size);
    }
    Ok(largest)
}

/// What moves the parameters at `places`.
fn optimizer(places: &Places, table: &[TensorSpec], groups: &[Group], settings: &Settings) -> Optimizer {
    Optimizer {
        stretches: places.stretches(table, groups, settings),
        stacks: places.stacks(table, groups, settings),
        frozen: places.frozen(groups),
        n_muon: places.n_muon,
        beta1: settings.adamw.beta1,
        beta2: settings.adamw.beta2,
        eps: settings.adamw.eps,
        momentum: settings.muon.map_or(0.0, |muon| muon.momentum),
        polynomials: polynomials().to_vec(),
        bias_rate: settings.bias_rate,
    }
}

/// A model in training.
pub struct CudaLearner {
    model: CudaModel,
    table: Vec<TensorSpec>,
    groups: Vec<Group>,
    places: Places,
    key: [u32; 8],
    noise: Noise,
    /// Targets of each batch of the step.
    n_targets: Vec<usize>,
    gpu: Arc<Gpu>,
    profile: Profile,
}

impl CudaLearner {
    /// A model in training; `groups` are those of its tensors.
    ///
    /// # Errors
    /// As for [`CudaModel::new`].
    pub fn new(
        gpu: &Arc<Gpu>,
        config: &Config,
        settings: &Settings,
        params: &[Vec<f32>],
        groups: Vec<Group>,
        moments: &Moments,
    ) -> Result<Self, Error> {
        let table = tensors(config);
        let places = Places::new(config, &table, &groups);
        let optimizer = optimizer(&places, &table, &groups, settings);
        let flat = places.joined(params, 0..places.model.n_param);
        let mut learner = training::Learner::new(gpu, places.model.clone(), plan(config, settings), optimizer, &flat)?;
        let (muon, adamw) = (of_muon(&places), of_adamw(&places));
        learner.write_moments(
            &places.joined(&moments.first, muon),
            &places.joined(&moments.first, adamw.clone()),
            &places.joined(&moments.second, adamw),
        )?;
        let model = CudaModel { config: config.clone(), learner };
        Ok(Self {
            model,
            table,
            groups,
            places,
            key: crate::random::key_words(settings.seed),
            noise: Noise::default(),
            n_targets: Vec::new(),
            gpu: Arc::clone(gpu),
            profile: Profile::default(),
        })
    }
}

impl CudaLearner {
    /// Losses of a batch and its gradients, in the tensor table's order, with `normal` draws of the routers' noise
    /// [n_moe, n_token, n_expert] and without dropout: for comparisons.
    ///
    /// # Errors
    /// What the GPU fails with.
    pub fn loss_and_gradients(
        &mut self,
        batch: &Batch,
        capacity: Capacity,
        normal: Option<&[f32]>,
    ) -> Result<(BatchLosses, Vec<Vec<f32>>), Error> {
        assert!(self.model.config.dropout == 0.0, "nothing is dropped in a comparison");
        let numbers = Numbers { target_share: 1.0 / batch.n_target() as f32, batch_share: 1.0, ..Numbers::default() };
        let learner = &mut self.model.learner;
        self.n_targets = vec![batch.n_target()];
        learner.zero_gradients()?;
        learner.begin()?;
        learner.accumulate(&input(batch, &self.model.config, capacity, normal), numbers)?;
        learner.measure()?;
        let (losses, _) = self.outcome()?;
        let losses = losses.into_iter().next().expect("of one batch");
        Ok((losses, self.gradients()?))
    }

    /// The gradients added up so far, in the tensor table's order.
    fn gradients(&self) -> Result<Vec<Vec<f32>>, Error> {
        let all = 0..self.places.model.n_param;
        Ok(self.places.split(&self.model.learner.gradients()?, all))
    }
}

/// The elements that Muon moves, and the others.
fn of_muon(places: &Places) -> Range<usize> {
    0..places.n_muon
}

fn of_adamw(places: &Places) -> Range<usize> {
    places.n_muon..places.model.n_param
}

impl Evaluate for CudaLearner {
    fn config(&self) -> &Config {
        &self.model.config
    }

    fn loss(&mut self, batch: &Batch, capacity: Capacity) -> Result<CrossEntropy, Error> {
        self.model.loss(batch, capacity)
    }

    fn logits(&mut self, ids: &[u32]) -> Result<Vec<f32>, Error> {
        self.model.logits(ids)
    }
}

impl Learn for CudaLearner {
    fn table(&self) -> &[TensorSpec] {
        &self.table
    }

    fn accumulate(&mut self, settings: &Settings, first_pass: u64, batches: &[Batch]) -> Result<(), Error> {
        let Self { model: CudaModel { config, learner }, key, noise, n_targets, profile, .. } = self;
        profile.enter(Section::Other);
        n_targets.clear();
        n_targets.extend(batches.iter().map(Batch::n_target));
        let n_target = n_targets.iter().sum::<usize>();
        let capacity = settings.dropping.capacity(config, true);
        learner.begin()?;
        for (pass, batch) in (first_pass..).zip(batches) {
            let normal = noise.of(config, Key { seed: settings.seed, pass }, batch.input.len());
            let numbers = Numbers {
                key: *key,
                pass: [pass as u32, (pass >> 32) as u32],
                target_share: 1.0 / n_target as f32,
                batch_share: 1.0 / batches.len() as f32,
                ..Numbers::default()
            };
            learner.accumulate(&input(batch, config, capacity, normal.as_deref()), numbers)?;
            // While the GPU is at work.
            noise.draw_ahead(config, Key { seed: settings.seed, pass: pass + 1 }, batch.input.len());
        }
        Ok(learner.measure()?)
    }

    fn judges_alone(&self) -> bool {
        true
    }

    fn outcome(&mut self) -> Result<(Vec<BatchLosses>, f64), Error> {
        let Self { model: CudaModel { config, learner }, n_targets, profile, .. } = self;
        let (reports, norm) = learner.reports()?;
        for PartSpent { part, seconds, operations } in learner.spent()? {
            profile.add(section(part), Spent { seconds, operations });
        }
        profile.skip();
        let losses = reports.into_iter().zip(n_targets).map(|(report, n_target)| {
            let n = report.n_token as f64;
            let router = |router: &training::RouterReport| {
                let shares = router.mass.iter().zip(&router.load);
                RouterLosses {
                    load: router.load.iter().map(|&n| n as usize).collect(),
                    aux: config.n_expert as f64 * shares.map(|(m, &l)| m / n * (f64::from(l) / n)).sum::<f64>(),
                    z: router.squared_log_sums / n,
                    entropy: router.entropies / n,
                    n_dropped: router.n_dropped as usize,
                }
            };
            let cross_entropy = CrossEntropy { sum: report.cross_entropy, n_target: *n_target };
            BatchLosses { cross_entropy, routers: report.routers.iter().map(router).collect() }
        });
        Ok((losses.collect(), norm))
    }

    fn update(&mut self, settings: &Settings, step: u64, most_scale: f32) -> Result<(), Error> {
        let correction = |beta: f32| 1.0 - f64::from(beta).powf((step + 1) as f64);
        let numbers = Numbers {
            lr: settings.schedule.at(step),
            muon_lr: settings.muon_lr(step),
            bias1: (1.0 / correction(settings.adamw.beta1)) as f32,
            root2: (1.0 / correction(settings.adamw.beta2).sqrt()) as f32,
            clip: settings.clip,
            most_scale,
            ..Numbers::default()
        };
        Ok(self.model.learner.update(numbers)?)
    }

    fn params(&self) -> Result<Cow<'_, [Vec<f32>]>, Error> {
        let all = 0..self.places.model.n_param;
        Ok(Cow::Owned(self.places.split(&self.model.learner.params()?, all)))
    }

    fn moments(&self) -> Result<Cow<'_, Moments>, Error> {
        let (sums, first, second) = self.model.learner.moments()?;
        let places = &self.places;
        let of_muons = places.split(&sums, of_muon(places));
        let [first, second] = [first, second].map(|flat| places.split(&flat, of_adamw(places)));
        let first = self.groups.iter().zip(of_muons.into_iter().zip(first));
        let first = first.map(|(group, (sum, first))| if group.is_muons { sum } else { first }).collect();
        Ok(Cow::Owned(Moments { first, second }))
    }

    fn peak(&mut self, settings: &Settings) -> f64 {
        peak(&self.gpu, settings)
    }

    fn start_profile(&mut self) {
        self.model.learner.start_profile();
    }

    fn profile(&mut self) -> &mut Profile {
        &mut self.profile
    }
}

fn section(part: Part) -> Section {
    match part {
        Part::Embedding => Section::Embedding,
        Part::Norm => Section::Norm,
        Part::Projections => Section::Projections,
        Part::Attention => Section::Attention,
        Part::Dense => Section::Dense,
        Part::Router => Section::Router,
        Part::Experts => Section::Experts,
        Part::Head => Section::Head,
        Part::Optimizer => Section::Optimizer,
        Part::Other => Section::Other,
    }
}

/// What the GPU path does not take, before anything is read or allocated.
///
/// # Errors
/// [`GpuError`], naming the size, or what `gpu` does not multiply.
pub fn check(gpu: &Gpu, config: &Config, settings: &Settings) -> Result<(), GpuError> {
    matmul(settings).check(gpu, arithmetic(settings))?;
    training::check(&ModelSizes {
        n_embd: config.n_embd,
        head_dim: config.head_dim(),
        n_expert: config.n_expert,
        n_used: config.n_expert_used,
        element: arithmetic(settings).element(),
    })
}
