//! The forward pass on one version of ggml: weights, cache, and the graph of the moment.

use anyhow::{Result, ensure};
use gguf::Gguf;
use param_model::Config;

use crate::attention::{Cache, Span};
use crate::graph::{self, Forward};
use crate::ops::{Allocator, Context};
use crate::version::{self, Backend, Options};
use crate::weights::Weights;

/// Fields are dropped in this order: what is computed with before what it lies in.
pub struct Engine {
    forward: Option<Forward>,
    allocator: Allocator,
    /// Where the graph is described; `None` only while it is rebuilt.
    context: Option<Context>,
    cache: Cache,
    weights: Weights,
    backend: Backend,
    config: Config,
    plain_attention: bool,
}

impl peer::Engine for Engine {
    const NAME: &str = version::NAME;
    type Options = Options;

    fn open(gguf: &Gguf, config: &Config, n_ctx: usize, n_thread: usize, options: &Options) -> Result<Engine> {
        let backend = Backend::new(n_thread, options);
        let plain_attention = options.plain_attention();
        let weights = Weights::load(gguf, config, &backend)?;
        let n_ctx = n_ctx.next_multiple_of(version::n_kv_step(plain_attention) as usize);
        let cache = Cache::new(config, n_ctx, backend.host_buffer_type())?;
        Ok(Engine {
            forward: None,
            allocator: Allocator::new(backend.host_buffer_type()),
            context: Some(Context::new(graph::n_node(config))),
            cache,
            weights,
            backend,
            config: config.clone(),
            plain_attention,
        })
    }

    fn forward(&mut self, tokens: &[u32], n_past: usize) -> Result<&[f32]> {
        let (n_past, n_token) = (n_past as i64, tokens.len() as i64);
        let step = version::n_kv_step(self.plain_attention);
        let n_kv = ((n_past + n_token) as u64).next_multiple_of(step as u64) as i64;
        let span = Span { n_past, n_token, n_kv };
        let reusable = |forward: &Forward| version::can_reuse(forward.span, span, self.plain_attention);
        if !self.forward.as_ref().is_some_and(reusable) {
            self.rebuild(span)?;
        }
        let forward = self.forward.as_ref().expect("a graph was just built");
        let ids: Vec<i32> = tokens.iter().map(|&id| id as i32).collect(); // [n_token]
        let positions: Vec<i32> = (n_past..n_past + n_token).map(|i| i as i32).collect(); // [n_token]
        forward.tokens.set(&ids);
        forward.positions.set(&positions);
        forward.last.set(&[n_token as i32 - 1]);
        forward.attention.fill(span);
        ensure!(self.backend.compute(forward.graph), "ggml could not compute {n_token} tokens after {n_past}");
        Ok(forward.logits.as_f32())
    }

    fn isa() -> String {
        version::isa()
    }
}

impl Engine {
    fn rebuild(&mut self, span: Span) -> Result<()> {
        self.forward = None;
        let context = self.context.take().expect("there is a context between calls").reset();
        let forward = graph::build(&context, &self.config, &self.weights, &self.cache, span, self.plain_attention);
        ensure!(self.allocator.allocate(forward.graph), "no memory for a graph of {} tokens", span.n_token);
        self.context = Some(context);
        self.forward = Some(forward);
        Ok(())
    }
}
