//! Memory of activations, kept from step to step: a fresh page costs more than the arithmetic done on it.

use std::collections::HashMap;

/// Buffers that were given back, by length.
#[derive(Default)]
pub struct Buffers {
    free: HashMap<usize, Vec<Vec<f32>>>,
}

impl Buffers {
    /// A buffer of `n` elements with whatever values its last user left.
    pub fn take(&mut self, n: usize) -> Vec<f32> {
        self.free.get_mut(&n).and_then(Vec::pop).unwrap_or_else(|| vec![0.0; n])
    }

    /// A buffer of `n` zeros.
    pub fn take_zeroed(&mut self, n: usize) -> Vec<f32> {
        match self.free.get_mut(&n).and_then(Vec::pop) {
            Some(mut buffer) => {
                buffer.fill(0.0);
                buffer
            }
            None => vec![0.0; n],
        }
    }

    /// Gives a buffer back.
    pub fn give(&mut self, buffer: Vec<f32>) {
        self.free.entry(buffer.len()).or_default().push(buffer);
    }
}
