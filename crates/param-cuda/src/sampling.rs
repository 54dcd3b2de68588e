//! How tokens are drawn on the GPU: llama.cpp's rules, as param-runtime's sampler applies them.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use crate::error::{Result, within};
use crate::gpu::Gpu;
use crate::memory::Buffer;

/// Candidates that sampling can keep.
pub const MAX_TOP_K: usize = 256;
/// Tokens that penalties can name for a sequence.
pub const MAX_PENALTY: usize = 1024;

/// The rules for a sequence.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub struct Sampling {
    /// 0 takes the most likely.
    pub temperature: f32,
    /// 1 to [`MAX_TOP_K`].
    pub top_k: usize,
    pub top_p: f32,
    pub min_p: f32,
    pub repeat_penalty: f32,
    pub presence_penalty: f32,
    pub frequency_penalty: f32,
    /// Tokens of the window and how often each occurs there.
    pub penalties: Vec<(u32, u32)>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
struct DeviceSampling {
    temperature: f32,
    top_k: u32,
    top_p: f32,
    log_min_p: f32,
    repeat: f32,
    presence: f32,
    frequency: f32,
    n_penalty: u32,
    penalties: u64,
}

/// The rules of several sequences in the GPU's memory.
#[derive(Debug)]
pub(crate) struct Rules {
    rules: Buffer<DeviceSampling>,
    penalties: Buffer<[u32; 2]>, // [n, MAX_PENALTY]
    /// What `rules` holds, so that what stays is not written again.
    written: Vec<DeviceSampling>,
}

impl Rules {
    pub(crate) fn new(gpu: &Arc<Gpu>, n: usize) -> Result<Rules> {
        const WHAT: &str = "the rules of sampling";
        Ok(Rules {
            rules: gpu.alloc(WHAT, n)?,
            penalties: gpu.alloc(WHAT, n * MAX_PENALTY)?,
            written: vec![DeviceSampling::default(); n],
        })
    }

    /// Of sequence 0.
    pub(crate) fn address(&self) -> u64 {
        self.rules.address()
    }

    /// Sets those of a sequence. Waits for the GPU unless they are as they were.
    pub(crate) fn set(&mut self, sequence: usize, sampling: &Sampling) -> Result<()> {
        within("candidates for sampling", sampling.top_k.wrapping_sub(1), MAX_TOP_K - 1)?;
        within("tokens with penalties", sampling.penalties.len(), MAX_PENALTY)?;
        let penalties: Vec<[u32; 2]> = sampling.penalties.iter().map(|&(token, count)| [token, count]).collect();
        let first = sequence * MAX_PENALTY;
        let device = DeviceSampling {
            temperature: sampling.temperature,
            top_k: sampling.top_k as u32,
            top_p: sampling.top_p,
            log_min_p: sampling.min_p.ln(),
            repeat: sampling.repeat_penalty,
            presence: sampling.presence_penalty,
            frequency: sampling.frequency_penalty,
            n_penalty: penalties.len() as u32,
            penalties: self.penalties.address() + (first * size_of::<[u32; 2]>()) as u64,
        };
        if !penalties.is_empty() {
            self.penalties.write(first, &penalties)?;
        }
        if self.written[sequence] != device {
            self.rules.write(sequence, &[device])?;
            self.written[sequence] = device;
        }
        Ok(())
    }
}
