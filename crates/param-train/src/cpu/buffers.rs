//! Memory of activations, kept from step to step: a fresh page costs more than the arithmetic done on it.

use std::collections::HashMap;

/// Buffers that were given back, by length.
#[derive(Default)]
pub struct Buffers {
    free: HashMap<usize, Vec<Vec<u32>>>,
}

impl Buffers {
    /// `n` words with whatever values their last user left.
    pub fn take_words(&mut self, n: usize) -> Vec<u32> {
        self.free.get_mut(&n).and_then(Vec::pop).unwrap_or_else(|| vec![0; n])
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
        self.free.entry(buffer.len()).or_default().push(buffer);
    }

    /// Gives f32 back.
    pub fn give(&mut self, buffer: Vec<f32>) {
        self.give_words(bytemuck::cast_vec(buffer));
    }
}
