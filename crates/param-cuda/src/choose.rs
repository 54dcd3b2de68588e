//! Chooses the next token of each of many rows of logits, so that only the tokens come back.

use std::collections::HashMap;
use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use crate::error::{Result, within};
use crate::forward::Forward;
use crate::gpu::Gpu;
use crate::kernel::{Arg, Grid, Kernel, Module};
use crate::memory::{Buffer, Pinned};
use crate::sampling::{Rules, Sampling};
use crate::stream::{Graph, Stream};

const PTX: &str = include_str!("../ptx/choose.ptx");
const THREADS: u32 = 384;
const LIKELIEST_THREADS: u32 = 256;
/// Blocks that share a row when the most likely is wanted, at most.
const LIKELIEST_PARTS: usize = 32;
const NO_TOKEN: u32 = u32::MAX;

#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
#[repr(C)]
struct Choose {
    logits: u64,
    keys: u64,
    sampling: u64,
    uniforms: u64,
    tokens: u64,
    best: u64,
    arrived: u64,
    n_vocab: u32,
    unused: u32,
}

/// Chooses for up to a number of rows at a time.
#[derive(Debug)]
pub struct Chooser {
    gpu: Arc<Gpu>,
    likeliest: Kernel,
    by_rules: Kernel,
    n_vocab: usize,
    n_row_max: usize,
    rules: Rules,
    // The host writes the one and reads the other beside kernels.
    uniforms: Pinned<f64>,
    tokens: Pinned<u32>,
    best: Buffer<u64>,    // [n_row_max, LIKELIEST_PARTS]
    arrived: Buffer<u32>, // [n_row_max]
    /// [n_row_max, n_vocab], once a row is drawn by rules.
    keys: Option<Buffer<u64>>,
    /// By pass, rows, and whether each takes its most likely token.
    recorded: HashMap<(u64, usize, bool), Graph>,
}

impl Chooser {
    /// For rows of `n_vocab` logits.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`], [`crate::Error::Kernel`], [`crate::Error::Call`].
    pub fn new(gpu: &Arc<Gpu>, n_row_max: usize, n_vocab: usize) -> Result<Chooser> {
        const WHAT: &str = "tokens to choose";
        let module = Module::load(gpu, PTX)?;
        Ok(Chooser {
            likeliest: module.kernel("choose_likeliest")?,
            by_rules: module.kernel("choose_by_rules")?,
            n_vocab,
            n_row_max,
            rules: Rules::new(gpu, n_row_max)?,
            uniforms: gpu.pinned(WHAT, n_row_max)?,
            tokens: gpu.pinned(WHAT, n_row_max)?,
            best: gpu.alloc(WHAT, n_row_max * LIKELIEST_PARTS)?,
            arrived: gpu.alloc(WHAT, n_row_max)?,
            keys: None,
            recorded: HashMap::new(),
            gpu: Arc::clone(gpu),
        })
    }

    /// How row `row` is drawn, by the random number `uniform` in [0, 1). Waits for the GPU if anything but the number is new.
    ///
    /// # Errors
    /// [`crate::Error::Limit`], [`crate::Error::OutOfMemory`], [`crate::Error::Call`].
    pub fn set(&mut self, row: usize, sampling: &Sampling, uniform: f64) -> Result<()> {
        if self.keys.is_none() {
            self.keys = Some(self.gpu.alloc("candidates", self.n_row_max * self.n_vocab)?);
        }
        self.uniforms.set(row, uniform);
        self.rules.set(row, sampling)
    }

    /// Queues the choice for the first `n_row` rows of `logits`: of the most likely token each, or as [`Chooser::set`] said of every one.
    ///
    /// # Errors
    /// [`crate::Error::Limit`], [`crate::Error::Kernel`].
    ///
    /// # Panics
    /// If there are not so many logits, or no rules.
    pub fn choose(&mut self, stream: &Stream, logits: &Buffer<f32>, n_row: usize, likeliest: bool) -> Result<()> {
        within("rows to choose for", n_row, self.n_row_max)?;
        assert!(logits.len() >= n_row * self.n_vocab && (likeliest || self.keys.is_some()));
        let args = Choose {
            logits: logits.address(),
            keys: self.keys.as_ref().map_or(0, Buffer::address),
            sampling: self.rules.address(),
            uniforms: self.uniforms.address(),
            tokens: self.tokens.address(),
            best: self.best.address(),
            arrived: self.arrived.address(),
            n_vocab: self.n_vocab as u32,
            unused: 0,
        };
        let (kernel, parts, threads) = if likeliest {
            let parts = (8 * self.gpu.n_multiprocessor() / n_row.max(1)).clamp(1, LIKELIEST_PARTS);
            (&self.likeliest, parts as u32, LIKELIEST_THREADS)
        } else {
            (&self.by_rules, 1, THREADS)
        };
        let grid = Grid { blocks: [n_row as u32, parts, 1], threads, shared: 0 };
        // SAFETY: the kernel's argument; the buffers in it have room for as many rows, and freeing them waits for the GPU.
        unsafe { kernel.launch(stream, grid, &[Arg::value(args)]) }
    }

    /// Queues a pass over the rows that `forward` was told and the choice for the first `n_row` of its logits, as [`Chooser::choose`]: all of
    /// it recorded the first time. Each row is to be of another sequence, as [`Forward::set_rows`] says of recorded passes.
    ///
    /// # Errors
    /// [`crate::Error::Limit`], [`crate::Error::Kernel`], [`crate::Error::Call`].
    ///
    /// # Panics
    /// As [`Chooser::choose`].
    pub fn run(&mut self, stream: &Stream, forward: &mut Forward, n_row: usize, likeliest: bool) -> Result<()> {
        let key = (forward.id(), n_row, likeliest);
        if !self.recorded.contains_key(&key) {
            let graph = stream.capture(|stream| {
                forward.run(stream)?;
                self.choose(stream, forward.logits(), n_row, likeliest)
            })?;
            self.recorded.insert(key, graph);
        }
        // SAFETY: it was recorded from this pass, as its id says, and from `self`; the buffers of neither are ever replaced.
        unsafe { self.recorded[&key].launch(stream) }
    }

    /// What was chosen for a row, once an event after it has passed; `None` where no token had a chance.
    pub fn chosen(&self, row: usize) -> Option<u32> {
        Some(self.tokens.get(row)).filter(|&token| token != NO_TOKEN)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use param_cuda_emulation::Schedule;

    /// By the plain rule: the largest, of equals the first, where NaN and -inf have no chance and infinity is the largest number.
    fn likeliest(logits: &[f32]) -> Option<u32> {
        let mut best: Option<(f32, u32)> = None;
        for (i, logit) in logits.iter().enumerate() {
            let logit = logit.min(f32::MAX);
            if !logits[i].is_nan() && logit > best.map_or(f32::NEG_INFINITY, |best| best.0) {
                best = Some((logit, i as u32));
            }
        }
        best.map(|best| best.1)
    }

    #[test]
    fn the_likeliest_of_each_row_is_chosen() {
        param_cuda_emulation::preload();
        let gpu = crate::open().unwrap();
        let stream = Stream::new(&gpu).unwrap();
        let n_vocab = 3001;
        let mut rows: Vec<Vec<f32>> = (0..5u32)
            .map(|row| (0..n_vocab as u32).map(|i| ((i * 7919 + row * 31) % 997) as f32 / 100.0 - 5.0).collect())
            .collect();
        (rows[1][17], rows[1][2999], rows[1][400]) = (f32::MAX, f32::INFINITY, f32::NAN);
        rows[2].fill(f32::NAN);
        rows[3].fill(-2.0);
        rows[4].fill(f32::NEG_INFINITY);
        let logits = gpu.upload("", &rows.concat()).unwrap();
        for schedule in Schedule::ALL {
            param_cuda_emulation::schedule(Some(schedule));
            let mut chooser = Chooser::new(&gpu, 5, n_vocab).unwrap();
            for _ in 0..2 {
                chooser.choose(&stream, &logits, 5, true).unwrap();
                stream.synchronize().unwrap();
                for (i, row) in rows.iter().enumerate() {
                    assert_eq!(chooser.chosen(i), likeliest(row), "row {i}, {schedule:?}");
                }
            }
        }
        param_cuda_emulation::schedule(None);
    }
}
