//! What runs a batch: the CPU, or a GPU with or without the CPU's help.

use crate::candidates::Best;
use crate::cuda::{GpuEngine, Request};
use crate::error::{Error, Result};
use crate::forward::{Forward, Span};
use crate::kv_cache::{CacheType, KvCache};
use crate::model::Model;
use crate::sampler::Sampler;
use crate::trace::Observer;

/// Sizes of a batch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub n_sequence: usize,
    /// Tokens that each sequence can hold.
    pub n_ctx: usize,
    /// Tokens that run at once.
    pub n_batch: usize,
    pub n_thread: usize,
}

/// Runs tokens of several sequences, and keeps their keys and values.
pub(crate) enum Engine {
    /// All of it on the CPU.
    Cpu(Box<CpuEngine>),
    /// As the model is placed.
    Gpu(Box<GpuEngine>),
}

/// A forward pass on the CPU and its caches.
pub(crate) struct CpuEngine {
    pub forward: Forward,
    pub caches: Vec<KvCache>, // [n_sequence]
}

impl CpuEngine {
    pub fn new(model: &Model, sizes: Sizes, cache_type: CacheType) -> Result<CpuEngine> {
        let config = model.config();
        let cache = || KvCache::new(cache_type, config.n_layer, config.n_head, sizes.n_ctx, config.head_dim());
        Ok(CpuEngine {
            forward: Forward::new(model, sizes.n_batch, sizes.n_thread)?,
            caches: (0..sizes.n_sequence).map(|_| cache()).collect::<Result<_>>()?,
        })
    }
}

impl Engine {
    pub fn new(model: &Model, sizes: Sizes, cache_type: Option<CacheType>) -> Result<Engine> {
        Ok(match &model.gpu {
            Some(gpu) => Engine::Gpu(Box::new(GpuEngine::new(model, gpu, sizes, cache_type)?)),
            None => {
                let cache_type = cache_type.unwrap_or_else(|| model.default_cache_type());
                Engine::Cpu(Box::new(CpuEngine::new(model, sizes, cache_type)?))
            }
        })
    }

    /// Threads of the CPU at work.
    pub fn n_thread(&self) -> usize {
        match self {
            Engine::Cpu(cpu) => cpu.forward.n_thread(),
            Engine::Gpu(gpu) => gpu.n_thread(),
        }
    }

    /// Runs `tokens`, cut into `spans` in order of their rows, and leaves the residual stream for [`Engine::head`].
    pub fn run(&mut self, model: &Model, spans: &[Span], tokens: &[u32], observer: Observer<'_, '_>) -> Result<()> {
        match self {
            Engine::Cpu(cpu) => cpu.forward.run(model, &mut cpu.caches, spans, tokens, observer),
            Engine::Gpu(_) if observer.is_some() => Err(Error::GpuTrace),
            Engine::Gpu(gpu) => gpu.run(model, spans, tokens),
        }
    }

    /// Logits of rows `rows` of the batch just run, written from row `at` of the logits buffer on, with the `n_best` largest of
    /// each where the CPU computes them.
    pub fn head(&mut self, model: &Model, rows: &[usize], at: usize, n_best: usize) -> Result<()> {
        match self {
            Engine::Cpu(cpu) => cpu.forward.head(model, rows, at, n_best),
            Engine::Gpu(gpu) => gpu.head(rows, at),
        }
    }

    /// What [`Engine::head`] wrote: [n_row, n_vocab].
    pub fn logits(&self) -> &[f32] {
        match self {
            Engine::Cpu(cpu) => cpu.forward.logits(),
            Engine::Gpu(gpu) => gpu.logits(),
        }
    }

    /// Whether it chooses tokens itself, as these samplers would, when it runs what precedes them.
    pub fn can_sample(&self, samplers: &[Sampler]) -> bool {
        match self {
            Engine::Cpu(_) => false,
            Engine::Gpu(gpu) => gpu.can_sample(samplers),
        }
    }

    /// Runs the last token of each context, of which all before are in the cache, and chooses the next.
    ///
    /// # Panics
    /// Where [`Engine::can_sample`] is false.
    pub fn run_and_sample(&mut self, requests: &mut [Request<'_>]) -> Result<Vec<u32>> {
        match self {
            Engine::Cpu(_) => unreachable!("the CPU leaves logits"),
            Engine::Gpu(gpu) => gpu.run_and_sample(requests),
        }
    }

    /// Chooses the token that follows a context whose last logits are row `row`.
    pub fn sample(&self, row: usize, n_vocab: usize, sampler: &mut Sampler, context: &[u32]) -> Result<u32> {
        let logits = &self.logits()[row * n_vocab..(row + 1) * n_vocab];
        match self {
            Engine::Cpu(cpu) => sampler.sample_best(logits, &cpu.forward.best()[row], context),
            Engine::Gpu(_) => sampler.sample_best(logits, &Best::default(), context),
        }
    }
}
