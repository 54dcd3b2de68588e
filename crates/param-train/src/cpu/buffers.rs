//! Memory of activations, kept from step to step: a fresh page costs more than the arithmetic done on it.

use std::collections::BTreeMap;

/// Buffers that were given back, by capacity.
#[derive(Default)]
pub struct Buffers {
    free: BTreeMap<usize, Vec<Vec<u32>>>,
}

impl Buffers {
    /// `n` words with whatever values their last user left.
    pub fn take_words(&mut self, n: usize) -> Vec<u32> {
        // One that is a little larger serves too: how many choices are kept varies from step to step where some are dropped.
        let large_enough = self.free.range_mut(n..=n + n / 4).find_map(|(_, buffers)| buffers.pop());
        let mut buffer = large_enough.unwrap_or_else(|| vec![0; n]);
        buffer.resize(n, 0);
        buffer
    }

    /// `n` f32 with whatever values their last user left.
    pub fn take(&mut self, n: usize) -> Vec<f32> {
        bytemuck::cast_vec(self.take_words(n))
    }

    /// Bytes of what was given back.
    #[cfg(test)]
    pub fn n_byte(&self) -> u64 {
        self.free.iter().map(|(n, buffers)| 4 * (n * buffers.len()) as u64).sum()
    }

    /// Gives words back.
    pub fn give_words(&mut self, buffer: Vec<u32>) {
        self.free.entry(buffer.capacity()).or_default().push(buffer);
    }

    /// Gives f32 back.
    pub fn give(&mut self, buffer: Vec<f32>) {
        self.give_words(bytemuck::cast_vec(buffer));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn varying_lengths_share_memory() {
        let mut buffers = Buffers::default();
        for n in [1000, 900, 999, 801, 1000, 850] {
            let buffer = buffers.take(n);
            assert_eq!(buffer.len(), n);
            buffers.give(buffer);
        }
        assert_eq!(buffers.n_byte(), 4000);
        // Far too large a buffer is left for those who need it.
        let small = buffers.take(100);
        buffers.give(small);
        assert_eq!(buffers.n_byte(), 4400);
    }
}
