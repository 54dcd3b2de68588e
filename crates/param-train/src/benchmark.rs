//! How fast a model trains here: some steps on random tokens, nothing kept.

use std::time::Instant;

use param_model::Config;
use rand::RngExt;

use crate::cpu::{Section, Spent, operations_per_token};
use crate::data::Batch;
use crate::device::Device;
use crate::error::Error;
use crate::init::initialise;
use crate::learner::Learner;
use crate::random::stream;
use crate::settings::Settings;

/// Steps before the clock starts: the first takes its memory from the system.
const WARMUP: u64 = 2;
/// Stream of the seed that draws tokens.
const STREAM: u64 = 1 << 61;

/// What was measured.
pub struct Benchmark {
    /// Tokens per second of each step, in order.
    pub tokens_per_s: Vec<f64>,
    /// Operations of matrix products that training on a token takes.
    pub operations_per_token: f64,
    /// Operations per second that the machine reached with operands in registers, before and after.
    pub peak: f64,
    /// Loss of the last step.
    pub loss: f64,
    /// Time and operations of each part of the timed steps, [`Section::ALL`].
    pub spent: Vec<Spent>,
}

/// Measures `steps` optimizer steps of a new model under `settings`, and their parts even where that costs something if `profile`.
///
/// # Errors
/// Settings that do not fit the model, or a loss that is not finite.
pub fn benchmark(
    config: &Config,
    settings: &Settings,
    device: &Device,
    steps: u64,
    profile: bool,
) -> Result<Benchmark, Error> {
    settings.check(config)?;
    let mut learner = Learner::new(config, settings, device, initialise(config, settings.seed))?;
    if profile {
        learner.model.start_profile();
    }
    let mut rng = stream(settings.seed, STREAM);
    let mut batch = || {
        let n = settings.batch_size * settings.context;
        let ids = (0..=n).map(|_| rng.random_range(0..config.n_vocab as u32)).collect::<Vec<_>>();
        let target = ids[1..].iter().map(|&id| id as i32).collect();
        Batch { n_row: settings.batch_size, input: ids[..n].to_vec(), target, mask: None, first: None, n_bytes: 0 }
    };
    let mut peaks = vec![learner.model.peak(settings)];
    let operations_per_token = operations_per_token(config, settings.context);
    let mut result =
        Benchmark { tokens_per_s: Vec::new(), operations_per_token, peak: 0.0, loss: 0.0, spent: Vec::new() };
    for step in 0..WARMUP + steps {
        let batches = (0..settings.n_batch(step)).map(|_| batch()).collect::<Vec<_>>();
        if step == WARMUP {
            learner.model.profile().reset();
        }
        let start = Instant::now();
        let record = learner.step(settings, step, &batches)?;
        if step >= WARMUP {
            result.tokens_per_s.push(record.n_target as f64 / start.elapsed().as_secs_f64());
        }
        result.loss = record.loss;
    }
    result.spent = Section::ALL.iter().map(|&section| learner.model.profile().spent(section)).collect();
    peaks.push(learner.model.peak(settings));
    result.peak = peaks.iter().sum::<f64>() / peaks.len() as f64;
    Ok(result)
}
