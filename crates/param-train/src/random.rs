//! Randomness without state: every draw is addressed by seed, pass and site, so a resumed run, another thread count or
//! a backward pass sees the very numbers again.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

/// Where in a forward pass a random number is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Site {
    /// Dropout of the embedding.
    Embedding = 0,
    /// Dropout of the attention probabilities.
    Attention,
    /// Dropout of the attention's output.
    AttentionOut,
    /// Dropout of the experts' outputs.
    Expert,
    /// Dropout of the feed-forward output.
    FfnOut,
    /// Noise of the router.
    Router,
}

/// One forward pass's share of the random numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    /// The run's seed.
    pub seed: u64,
    /// Number of forward passes that trained before this one; below 2^44.
    pub pass: u64,
}

impl Key {
    /// The numbers of one site in one block.
    pub fn stream(self, block: usize, site: Site) -> ChaCha8Rng {
        stream(self.seed, (self.pass << 20) | ((block as u64) << 4) | site as u64)
    }
}

/// The words of ChaCha's key that `seed` stands for.
pub fn key_words(seed: u64) -> [u32; 8] {
    let bytes = ChaCha8Rng::seed_from_u64(seed).get_seed();
    std::array::from_fn(|i| u32::from_le_bytes([bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]]))
}

/// Stream number `index` of the numbers that `seed` stands for.
pub fn stream(seed: u64, index: u64) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(index);
    rng
}
