//! One test: a warm-up, then timed repetitions.

use std::sync::Arc;
use std::time::Instant;

use anyhow::Result;
use param_runtime::{Model, Rows, Session, SessionOptions};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// What is timed.
#[derive(Clone, Copy, Debug)]
pub struct Test {
    /// Tokens one at a time, rather than all at once.
    pub decode: bool,
    /// How many.
    pub n_token: usize,
    /// Tokens in the context before.
    pub depth: usize,
}

impl Test {
    /// Its name in llama-bench's style: `pp512`, `tg128 @ d1024`.
    pub fn name(&self) -> String {
        let kind = if self.decode { "tg" } else { "pp" };
        let depth = if self.depth > 0 { format!(" @ d{}", self.depth) } else { String::new() };
        format!("{kind}{}{depth}", self.n_token)
    }
}

/// Tokens per second of each repetition.
pub fn measure(model: &Arc<Model>, n_thread: usize, test: Test, repetitions: usize) -> Result<Vec<f64>> {
    let options = SessionOptions {
        n_ctx: Some(test.depth.saturating_add(test.n_token)),
        n_thread: Some(n_thread),
        ..SessionOptions::default()
    };
    let mut session = Session::new(model, &options)?;
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let n_vocab = model.config().n_vocab as u32;
    let mut random = |n: usize| (0..n).map(|_| rng.random_range(0..n_vocab)).collect::<Vec<_>>();
    session.push(&random(test.depth))?;
    session.forward(Rows::None)?;
    let mut samples = Vec::new();
    // The first one warms up.
    for _ in 0..=repetitions {
        let tokens = random(test.n_token);
        session.truncate(test.depth);
        let start = Instant::now();
        let step = if test.decode { 1 } else { test.n_token };
        for tokens in tokens.chunks(step) {
            session.push(tokens)?;
            session.forward(Rows::Last)?;
        }
        samples.push(test.n_token as f64 / start.elapsed().as_secs_f64());
    }
    samples.remove(0);
    Ok(samples)
}
