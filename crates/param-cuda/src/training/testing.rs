//! What tests of training's operations share.

use std::sync::Arc;

use half::bf16;

use super::view::{Element, Rows};
use crate::memory::Buffer;
use crate::{Gpu, open};

/// The emulated GPU.
pub fn gpu() -> Arc<Gpu> {
    param_cuda_emulation::preload();
    open().unwrap()
}

/// xorshift64*, and numbers around zero from it.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % n
    }

    /// Words of random bits.
    pub fn words(&mut self, n: usize) -> Vec<u32> {
        (0..n).map(|_| (self.below(1 << 16) << 16 | self.below(1 << 16)) as u32).collect()
    }

    /// Uniform in -scale..scale.
    pub fn floats(&mut self, n: usize, scale: f32) -> Vec<f32> {
        (0..n).map(|_| (self.below(1 << 20) as f32 / (1 << 19) as f32 - 1.0) * scale).collect()
    }
}

/// What `x` becomes when stored.
pub fn rounded(x: &[f32], element: Element) -> Vec<f32> {
    match element {
        Element::F32 => x.to_vec(),
        Element::Bf16 => x.iter().map(|x| bf16::from_f32(*x).to_f32()).collect(),
    }
}

/// A matrix of `n_col` columns in a buffer of its own; NaN where rows are padded.
pub struct Stored {
    pub bytes: Buffer<u8>,
    pub element: Element,
    pub n_row: usize,
    pub n_col: usize,
}

impl Stored {
    pub fn new(gpu: &Arc<Gpu>, x: &[f32], element: Element, n_col: usize) -> Stored {
        let stride = n_col.next_multiple_of(element.per_copy());
        let mut bytes = Vec::new();
        for row in x.chunks_exact(n_col) {
            for i in 0..stride {
                let x = row.get(i).copied().unwrap_or(f32::NAN);
                match element {
                    Element::F32 => bytes.extend(x.to_le_bytes()),
                    Element::Bf16 => bytes.extend(bf16::from_f32(x).to_le_bytes()),
                }
            }
        }
        Stored { bytes: gpu.upload("", &bytes).unwrap(), element, n_row: x.len() / n_col, n_col }
    }

    pub fn rows(&self) -> Rows<'_> {
        Rows::new(self.bytes.view(), self.element, self.n_row, self.n_col)
    }

    /// The elements without padding.
    pub fn to_vec(&self) -> Vec<f32> {
        let bytes = self.bytes.to_vec().unwrap();
        let all: Vec<f32> = match self.element {
            Element::F32 => bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            Element::Bf16 => bytes.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
        };
        all.chunks_exact(self.rows().stride()).flat_map(|row| &row[..self.n_col]).copied().collect()
    }
}
