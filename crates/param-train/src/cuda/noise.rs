//! The router's noise, drawn on the host so that it is the CPU's to the last bit, a pass ahead of its use.

use std::thread::{JoinHandle, spawn};

use param_model::Config;

use crate::cpu::NoiseSource;
use crate::random::Key;

/// Draws for one pass: those of all MoE blocks, [n_moe, n_token, n_expert].
#[derive(Default)]
pub struct Noise {
    ahead: Option<(Key, usize, JoinHandle<Vec<f32>>)>,
}

impl Noise {
    /// The draws of a pass over `n_token` tokens; none where routers have no noise.
    pub fn of(&mut self, config: &Config, key: Key, n_token: usize) -> Option<Vec<f32>> {
        if !config.use_noisy_top_k {
            return None;
        }
        let drawn = self
            .ahead
            .take()
            .filter(|(k, n, _)| (*k, *n) == (key, n_token))
            .and_then(|(.., thread)| thread.join().ok());
        Some(drawn.unwrap_or_else(|| draw(config, key, n_token)))
    }

    /// Begins to draw those of a pass that is likely to come next.
    pub fn draw_ahead(&mut self, config: &Config, key: Key, n_token: usize) {
        if config.use_noisy_top_k {
            let config = config.clone();
            self.ahead = Some((key, n_token, spawn(move || draw(&config, key, n_token))));
        }
    }
}

fn draw(config: &Config, key: Key, n_token: usize) -> Vec<f32> {
    let blocks = config.moe_blocks().filter_map(|block| NoiseSource::Drawn(key).normal(config, block, n_token));
    blocks.flatten().collect()
}
