//! One test: a warm-up, then timed repetitions.

use std::sync::Arc;
use std::time::Instant;

use anyhow::Result;
use param_runtime::{Batch, Model, Rows, Sampler, SamplerOptions, SessionOptions};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::machine::{Machine, Probe};

/// What is timed.
#[derive(Clone, Copy, Debug)]
pub struct Test {
    /// Tokens one at a time, rather than all at once.
    pub decode: bool,
    /// How many of each sequence.
    pub n_token: usize,
    /// Tokens in the context before.
    pub depth: usize,
    /// Sequences decoded together.
    pub n_sequence: usize,
}

impl Test {
    /// Its name in llama-bench's style: `pp512`, `tg128 @ d1024`, `tg128 x 8`.
    pub fn name(&self) -> String {
        let kind = if self.decode { "tg" } else { "pp" };
        let depth = if self.depth > 0 { format!(" @ d{}", self.depth) } else { String::new() };
        let sequences = if self.n_sequence > 1 { format!(" x {}", self.n_sequence) } else { String::new() };
        format!("{kind}{}{sequences}{depth}", self.n_token)
    }
}

/// What repeated runs of a test gave.
pub struct Samples {
    /// Tokens per second of all sequences together.
    pub rates: Vec<f64>,
    /// What reading memory gave before each run of a decode, in GB/s, where that was asked for.
    pub bus: Vec<f64>,
}

/// Runs a test `repetitions` times, after one run to warm up, each of them after a look at the memory bus if `machine` is there.
pub fn measure(
    model: &Arc<Model>,
    n_thread: usize,
    test: Test,
    repetitions: usize,
    mut machine: Option<&mut Machine>,
) -> Result<Samples> {
    let options = SessionOptions {
        n_ctx: Some(test.depth.saturating_add(test.n_token)),
        n_thread: Some(n_thread),
        ..SessionOptions::default()
    };
    let mut batch = Batch::new(model, test.n_sequence, &options)?;
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let n_vocab = model.config().n_vocab as u32;
    let mut random = |n: usize| (0..n).map(|_| rng.random_range(0..n_vocab)).collect::<Vec<_>>();
    for sequence in 0..test.n_sequence {
        batch.push(sequence, &random(test.depth))?;
    }
    batch.forward(Rows::None)?;
    let mut samples = Samples { rates: Vec::new(), bus: Vec::new() };
    for repetition in 0..=repetitions {
        let tokens: Vec<Vec<u32>> = (0..test.n_sequence).map(|_| random(test.n_token)).collect();
        (0..test.n_sequence).for_each(|sequence| batch.truncate(sequence, test.depth));
        if let (true, Some(machine)) = (test.decode, machine.as_deref_mut()) {
            samples.bus.push(machine.measure(Probe::Read));
        }
        let start = Instant::now();
        if test.decode && model.gpu_name().is_some() {
            generate(&mut batch, &tokens, test.n_token)?;
        } else {
            let step = if test.decode { 1 } else { test.n_token };
            for first in (0..test.n_token).step_by(step) {
                for (sequence, tokens) in tokens.iter().enumerate() {
                    batch.push(sequence, &tokens[first..first + step])?;
                }
                batch.forward(Rows::Last)?;
            }
        }
        let rate = (test.n_token * test.n_sequence) as f64 / start.elapsed().as_secs_f64();
        if repetition > 0 {
            samples.rates.push(rate);
        } else {
            samples.bus.clear();
        }
    }
    Ok(samples)
}

/// Runs `n_token` tokens of each sequence: the first of `tokens`, then what the model finds most likely.
fn generate(batch: &mut Batch, tokens: &[Vec<u32>], n_token: usize) -> Result<()> {
    let mut samplers = (0..batch.n_sequence())
        .map(|_| Sampler::new(&SamplerOptions::greedy()))
        .collect::<param_runtime::Result<Vec<_>>>()?;
    let mut next: Vec<u32> = tokens.iter().map(|tokens| tokens[0]).collect();
    for _ in 0..n_token {
        for (sequence, &token) in next.iter().enumerate() {
            batch.push(sequence, &[token])?;
        }
        next = batch.sample_all(&mut samplers)?;
    }
    Ok(())
}
