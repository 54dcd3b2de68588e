//! One conversation with a model: its tokens, their cache, and the logits that follow them.

use std::sync::Arc;

use crate::batch::Batch;
use crate::error::{Error, Result};
use crate::kv_cache::CacheType;
use crate::model::Model;
use crate::sampler::Sampler;
use crate::trace::Trace;

/// How a session runs. The defaults suit a conversation on a machine of one's own.
#[derive(Clone, Debug, Default)]
pub struct SessionOptions {
    /// Tokens the context holds; `None`: as many as the model has positions.
    pub n_ctx: Option<usize>,
    /// Tokens run at once when there are many; `None`: 512, on a GPU 4096. More is faster and takes more memory.
    pub n_batch: Option<usize>,
    /// Threads, the calling one included; `None`, or more than there are CPUs for this process: one for each. Never changes a
    /// result.
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

/// A context of tokens on a model: a [`Batch`] of one. Tokens are added with [`Session::push`] and run by [`Session::forward`],
/// which [`Session::generate`] does by itself. Dropping the session ends its threads.
pub struct Session(Batch);

impl Session {
    /// An empty context. Memory for cache and buffers is taken now.
    ///
    /// # Errors
    /// [`Error::ContextLength`] beyond the model's positions, [`Error::OutOfMemory`].
    pub fn new(model: &Arc<Model>, options: &SessionOptions) -> Result<Session> {
        Ok(Session(Batch::new(model, 1, options)?))
    }

    /// The model it runs.
    pub fn model(&self) -> &Arc<Model> {
        self.0.model()
    }

    /// Tokens the context can hold.
    pub fn n_ctx(&self) -> usize {
        self.0.n_ctx()
    }

    /// Threads at work: those asked for, or fewer where the system refused some.
    pub fn n_thread(&self) -> usize {
        self.0.n_thread()
    }

    /// The context, whether run already or not.
    pub fn tokens(&self) -> &[u32] {
        self.0.tokens(0)
    }

    /// Adds tokens to the context. They are run by the next [`Session::forward`].
    ///
    /// # Errors
    /// [`Error::Token`] outside the vocabulary, [`Error::ContextFull`]; the context is then as it was.
    pub fn push(&mut self, tokens: &[u32]) -> Result<()> {
        self.0.push(0, tokens)
    }

    /// Runs the tokens not yet run, in batches, and returns the logits asked for, [n_row, n_vocab]. With [`Rows::Last`] there is
    /// always one row: the last token's, run again if need be.
    ///
    /// # Errors
    /// [`Error::EmptyContext`] where the last row of nothing is asked for, [`Error::NotFinite`] and [`Error::Compute`] where a
    /// damaged model computes values that are not finite, [`Error::OutOfMemory`].
    pub fn forward(&mut self, rows: Rows) -> Result<&[f32]> {
        self.check(rows)?;
        self.0.forward(rows)
    }

    /// Like [`Session::forward`], showing hidden states and routing of every batch to `observer`.
    ///
    /// # Errors
    /// As [`Session::forward`].
    pub fn forward_traced(&mut self, rows: Rows, observer: &mut dyn FnMut(Trace<'_>)) -> Result<&[f32]> {
        self.check(rows)?;
        self.0.forward_traced(rows, observer)
    }

    fn check(&self, rows: Rows) -> Result<()> {
        if rows == Rows::Last && self.tokens().is_empty() { Err(Error::EmptyContext) } else { Ok(()) }
    }

    /// Chooses the next token from the logits of the last one, running what has not been run. The token is not added.
    ///
    /// # Errors
    /// As [`Session::forward`] and [`Sampler::sample`].
    pub fn sample(&mut self, sampler: &mut Sampler) -> Result<u32> {
        self.0.sample(0, sampler)
    }

    /// Forgets all but the first `n` tokens. Costs nothing: the cache of what remains stays valid.
    pub fn truncate(&mut self, n: usize) {
        self.0.truncate(0, n);
    }

    /// Forgets everything.
    pub fn reset(&mut self) {
        self.truncate(0);
    }

    /// Keeps the newest `n` tokens, whose positions then start at 0, so that all of them have to be run again.
    pub fn keep_newest(&mut self, n: usize) {
        self.0.keep_newest(0, n);
    }
}
