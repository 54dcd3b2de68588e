//! Dropout by addressed random numbers: the mask is never stored, the backward pass draws it again.

use super::machine::Machine;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::Rng;

use crate::random::{Key, Site};

/// Elements per draw: a multiple of ChaCha's block of 16 words, so that chunks start at block boundaries.
const CHUNK: usize = 1024;

/// Dropout at one site of one block in one pass: zeroes elements with probability `p`, scales the others by 1/(1-p).
pub struct Dropout {
    rng: ChaCha8Rng,
    threshold: u32,
    scale: f32,
}

impl Dropout {
    /// `None` where nothing is dropped: `p` is zero or the pass does not train.
    pub fn new(p: f32, key: Option<Key>, block: usize, site: Site) -> Option<Self> {
        let key = key.filter(|_| p > 0.0)?;
        let threshold = (f64::from(p) * (1u64 << 32) as f64) as u32;
        Some(Self { rng: key.stream(block, site), threshold, scale: 1.0 / (1.0 - p) })
    }

    /// Drops from `x`, whose first element is number `start` of the site. Its own transpose: gradients pass through it too.
    pub fn apply(&self, start: usize, x: &mut [f32]) {
        let mut rng = self.rng.clone();
        rng.set_word_pos(start as u128);
        let mut words = [0u32; CHUNK];
        for x in x.chunks_mut(CHUNK) {
            let words = &mut words[..x.len()];
            rng.fill_bytes(bytemuck::cast_slice_mut(words));
            for (x, &word) in x.iter_mut().zip(&*words) {
                *x = if word >= self.threshold { *x * self.scale } else { 0.0 };
            }
        }
    }

    /// Drops from all of a site, on all threads.
    pub fn apply_all(&self, machine: &mut Machine, x: &mut [f32]) {
        const PART: usize = 16 * CHUNK;
        machine.team.for_each_chunk(x, PART, |i, x| self.apply(i * PART, x));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drops_its_share_keeps_the_mean_and_can_be_addressed_anywhere() {
        let key = Key { seed: 3, pass: 5 };
        let dropout = Dropout::new(0.25, Some(key), 2, Site::FfnOut).unwrap();
        let mut x = vec![1.0; 100_000];
        dropout.apply_all(&mut Machine::new(crate::cpu::Compute::default()), &mut x);
        let kept = x.iter().filter(|&&v| v != 0.0).count() as f64 / x.len() as f64;
        assert!((kept - 0.75).abs() < 0.007, "{kept} kept: five standard errors off"); // sqrt(.25 .75 / 1e5) = .0014
        assert!(x.iter().all(|&v| v == 0.0 || v == 1.0 / 0.75));
        let mut part = vec![1.0; 333];
        dropout.apply(54_321, &mut part);
        assert_eq!(part, x[54_321..54_654]);
        let mut other = vec![1.0; 333];
        Dropout::new(0.25, Some(key), 3, Site::FfnOut).unwrap().apply(54_321, &mut other);
        assert_ne!(part, other);
    }

    #[test]
    fn nothing_is_dropped_outside_training_or_at_rate_zero() {
        assert!(Dropout::new(0.1, None, 0, Site::Expert).is_none());
        assert!(Dropout::new(0.0, Some(Key { seed: 0, pass: 0 }), 0, Site::Expert).is_none());
    }
}
