//! The protocol of `param-bench`, and its rows: a warm-up, then timed repetitions from an empty context on random tokens.

use std::path::Path;
use std::time::Instant;

use anyhow::Result;
use serde::Serialize;

use crate::Engine;

/// What is timed.
#[derive(Clone, Copy, Debug)]
pub struct Test {
    /// Tokens one at a time, rather than all at once.
    pub decode: bool,
    /// How many.
    pub n_token: usize,
}

/// One result, under the keys of `param-bench`.
#[derive(Debug, Serialize)]
pub struct Row {
    engine: &'static str,
    model: String,
    isa: String,
    threads: usize,
    test: String,
    n_prompt: usize,
    n_gen: usize,
    depth: usize,
    #[serde(rename = "tok/s")]
    median: f64,
    min: f64,
    max: f64,
    samples: Vec<f64>, // [n_repetition] tokens per second
}

impl Row {
    /// `samples` are tokens per second, at least one.
    pub fn new(engine: &'static str, path: &Path, isa: &str, threads: usize, test: Test, samples: &[f64]) -> Row {
        let round = |rate: f64| (rate * 100.0).round() / 100.0;
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        Row {
            engine,
            model: path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned(),
            isa: isa.to_owned(),
            threads,
            test: format!("{}{}", if test.decode { "tg" } else { "pp" }, test.n_token),
            n_prompt: if test.decode { 0 } else { test.n_token },
            n_gen: if test.decode { test.n_token } else { 0 },
            depth: 0,
            median: round((sorted[(sorted.len() - 1) / 2] + sorted[sorted.len() / 2]) / 2.0),
            min: round(sorted[0]),
            max: round(sorted[sorted.len() - 1]),
            samples: samples.iter().map(|&rate| round(rate)).collect(),
        }
    }
}

/// Tokens per second of each repetition.
pub(crate) fn measure(engine: &mut impl Engine, n_vocab: usize, test: Test, repetitions: usize) -> Result<Vec<f64>> {
    let mut seed = 0;
    let mut samples = Vec::new();
    // The first one warms up.
    for _ in 0..=repetitions {
        let tokens: Vec<u32> = (0..test.n_token).map(|_| random(&mut seed) % n_vocab as u32).collect();
        let step = if test.decode { 1 } else { test.n_token };
        let start = Instant::now();
        for (i, tokens) in tokens.chunks(step).enumerate() {
            engine.forward(tokens, i * step)?;
        }
        samples.push(test.n_token as f64 / start.elapsed().as_secs_f64());
    }
    samples.remove(0);
    Ok(samples)
}

/// The next of a sequence of random numbers (SplitMix64, upper half): tokens only have to be spread over the vocabulary.
fn random(state: &mut u64) -> u32 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 32) as u32
}
