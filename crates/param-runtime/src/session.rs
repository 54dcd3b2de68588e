//! One conversation with a model: its tokens, their cache, and the logits that follow them.

use std::sync::Arc;

use param_kernels::available_threads;

use crate::error::{Error, Result};
use crate::forward::Forward;
use crate::kv_cache::{CacheType, KvCache};
use crate::model::Model;
use crate::sampler::Sampler;
use crate::trace::{Observer, Trace};

/// How a session runs. The defaults suit a conversation on a machine of one's own.
#[derive(Clone, Debug, Default)]
pub struct SessionOptions {
    /// Tokens the context holds; `None`: as many as the model has positions.
    pub n_ctx: Option<usize>,
    /// Tokens run at once when there are many; `None`: 512. More is faster and takes more memory.
    pub n_batch: Option<usize>,
    /// Threads, the calling one included; `None`: one for each CPU this process may use. Never changes a result.
    pub n_thread: Option<usize>,
    /// How keys and values are cached; `None`: F32 for models stored entirely in F32, whose precision an f16 cache would
    /// limit, else F16.
    pub cache_type: Option<CacheType>,
}

/// For which of the tokens about to be run the logits are wanted: each row is a product with the whole head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    /// For none.
    None,
    /// For the last one: what follows the context.
    Last,
    /// For every one.
    All,
}

/// A context of tokens on a model. Tokens are added with [`Session::push`] and run by [`Session::forward`], which
/// [`Session::generate`] does by itself. Dropping the session ends its threads.
pub struct Session {
    model: Arc<Model>,
    forward: Forward,
    cache: KvCache,
    tokens: Vec<u32>,
    /// How many of `tokens` are in the cache.
    n_past: usize,
    /// Whether the forward pass holds the logits of exactly the last token.
    has_last_logits: bool,
    n_ctx: usize,
    n_batch: usize,
}

impl Session {
    /// An empty context. Memory for cache and buffers is taken now.
    ///
    /// # Errors
    /// [`Error::ContextLength`] beyond the model's positions, [`Error::OutOfMemory`].
    pub fn new(model: &Arc<Model>, options: &SessionOptions) -> Result<Session> {
        let config = model.config();
        let n_ctx = options.n_ctx.unwrap_or(config.n_ctx);
        if n_ctx == 0 || n_ctx > config.n_ctx {
            return Err(Error::ContextLength { requested: n_ctx, n_ctx: config.n_ctx });
        }
        let n_batch = options.n_batch.unwrap_or(512).clamp(1, n_ctx);
        let n_thread = options.n_thread.unwrap_or_else(available_threads);
        let cache_type = options.cache_type.unwrap_or(if model.is_f32() { CacheType::F32 } else { CacheType::F16 });
        Ok(Session {
            forward: Forward::new(model, n_batch, n_thread)?,
            cache: KvCache::new(cache_type, config.n_layer, config.n_head, n_ctx, config.head_dim())?,
            model: Arc::clone(model),
            tokens: Vec::with_capacity(n_ctx),
            n_past: 0,
            has_last_logits: false,
            n_ctx,
            n_batch,
        })
    }

    /// The model it runs.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// Tokens the context can hold.
    pub fn n_ctx(&self) -> usize {
        self.n_ctx
    }

    /// Threads at work: those asked for, or fewer where the system refused some.
    pub fn n_thread(&self) -> usize {
        self.forward.n_thread()
    }

    /// The context, whether run already or not.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Adds tokens to the context. They are run by the next [`Session::forward`].
    ///
    /// # Errors
    /// [`Error::Token`] outside the vocabulary, [`Error::ContextFull`]; the context is then as it was.
    pub fn push(&mut self, tokens: &[u32]) -> Result<()> {
        let n_vocab = self.model.config().n_vocab;
        if let Some(&token) = tokens.iter().find(|&&t| t as usize >= n_vocab) {
            return Err(Error::Token { token, n_vocab });
        }
        if tokens.len() > self.n_ctx - self.tokens.len() {
            return Err(Error::ContextFull { n_past: self.tokens.len(), n_new: tokens.len(), n_ctx: self.n_ctx });
        }
        self.tokens.extend_from_slice(tokens);
        self.has_last_logits &= tokens.is_empty();
        Ok(())
    }

    /// Runs the tokens not yet run, in batches, and returns the logits asked for, [n_row, n_vocab]. With [`Rows::Last`] there is
    /// always one row: the last token's, run again if need be.
    ///
    /// # Errors
    /// [`Error::EmptyContext`] where the last row of nothing is asked for, [`Error::Compute`] where a damaged model computes
    /// values that are not finite, [`Error::OutOfMemory`].
    pub fn forward(&mut self, rows: Rows) -> Result<&[f32]> {
        self.run(rows, None)
    }

    /// Like [`Session::forward`], showing hidden states and routing of every batch to `observer`.
    ///
    /// # Errors
    /// As [`Session::forward`].
    pub fn forward_traced(&mut self, rows: Rows, observer: &mut dyn FnMut(Trace<'_>)) -> Result<&[f32]> {
        self.run(rows, Some(observer))
    }

    fn run(&mut self, rows: Rows, mut observer: Observer<'_, '_>) -> Result<&[f32]> {
        if rows == Rows::Last {
            if self.tokens.is_empty() {
                return Err(Error::EmptyContext);
            }
            if self.has_last_logits {
                return Ok(self.forward.logits());
            }
            self.n_past = self.n_past.min(self.tokens.len() - 1);
        }
        self.has_last_logits = false;
        let mut n_row = 0;
        while self.n_past < self.tokens.len() {
            let end = self.tokens.len().min(self.n_past + self.n_batch);
            let batch = &self.tokens[self.n_past..end];
            // Reborrowed by hand: `as_deref_mut` would tie the observer's own lifetime to the loop.
            let observer = observer.as_mut().map(|o| &mut **o as &mut dyn FnMut(Trace<'_>));
            self.forward.run(&self.model, &mut self.cache, batch, self.n_past, observer)?;
            let wanted = match rows {
                Rows::All => batch.len(),
                Rows::Last if end == self.tokens.len() => 1,
                Rows::Last | Rows::None => 0,
            };
            if wanted > 0 {
                self.forward.head(&self.model, batch.len(), wanted, n_row)?;
            }
            n_row += wanted;
            self.n_past = end;
        }
        self.has_last_logits = rows == Rows::Last;
        Ok(if n_row > 0 { self.forward.logits() } else { &[] })
    }

    /// Chooses the next token from the logits of the last one, running what has not been run. The token is not added.
    ///
    /// # Errors
    /// As [`Session::forward`] and [`Sampler::sample`].
    pub fn sample(&mut self, sampler: &mut Sampler) -> Result<u32> {
        self.forward(Rows::Last)?;
        sampler.sample(self.forward.logits(), &self.tokens)
    }

    /// Forgets all but the first `n` tokens. Costs nothing: the cache of what remains stays valid.
    pub fn truncate(&mut self, n: usize) {
        if n < self.tokens.len() {
            self.tokens.truncate(n);
            self.n_past = self.n_past.min(n);
            self.has_last_logits = false;
        }
    }

    /// Forgets everything.
    pub fn reset(&mut self) {
        self.truncate(0);
    }

    /// Keeps the newest `n` tokens, whose positions then start at 0, so that all of them have to be run again.
    pub fn keep_newest(&mut self, n: usize) {
        if n < self.tokens.len() {
            self.tokens.drain(..self.tokens.len() - n);
            self.n_past = 0;
            self.has_last_logits = false;
        }
    }
}
