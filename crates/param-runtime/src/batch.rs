//! Several conversations run together: their tokens share each reading of the weights.

use std::ops::Range;
use std::sync::Arc;

use param_kernels::available_threads;

use crate::cuda::Request;
use crate::engine::{Engine, Sizes};
use crate::error::{Error, Result};
use crate::forward::Span;
use crate::model::Model;
use crate::sampler::Sampler;
use crate::session::{Rows, SessionOptions};
use crate::trace::{Observer, Trace};

/// One sequence of tokens.
struct Sequence {
    tokens: Vec<u32>,
    /// How many of `tokens` are in the cache.
    n_past: usize,
    /// The row of the logits buffer that follows the last token, while the buffer holds it.
    logits_row: Option<usize>,
}

/// Several independent contexts on one model, numbered from 0. Decoding them together reads the weights once for all of them, so
/// that eight sequences cost far less than eight times one. A token's logits are the same to the bit as in a [`crate::Session`]
/// of its own.
pub struct Batch {
    model: Arc<Model>,
    engine: Engine,
    sequences: Vec<Sequence>, // [n_sequence]
    n_ctx: usize,
    n_batch: usize,
    /// How many of the largest logits to pick: what the samplers so far have asked for.
    n_best: usize,
    /// Of the batch being run.
    spans: Vec<Span>,
    tokens: Vec<u32>,
    wanted: Vec<usize>,
}

impl Batch {
    /// `n_sequence` empty contexts. Memory for their caches and the buffers is taken now.
    ///
    /// # Errors
    /// [`Error::ContextLength`] beyond the model's positions, [`Error::OutOfMemory`].
    pub fn new(model: &Arc<Model>, n_sequence: usize, options: &SessionOptions) -> Result<Batch> {
        let config = model.config();
        let n_ctx = options.n_ctx.unwrap_or(config.n_ctx);
        if n_ctx == 0 || n_ctx > config.n_ctx {
            return Err(Error::ContextLength { requested: n_ctx, n_ctx: config.n_ctx });
        }
        let n_batch = options
            .n_batch
            .unwrap_or(if model.gpu.is_some() { 4096 } else { 512 })
            .clamp(1, n_ctx.saturating_mul(n_sequence.max(1)));
        // Threads without a CPU would take turns with those they should help.
        let n_thread = options.n_thread.unwrap_or(usize::MAX).min(available_threads());
        let sequence = || Sequence { tokens: Vec::with_capacity(n_ctx), n_past: 0, logits_row: None };
        let sizes = Sizes { n_sequence, n_ctx, n_batch, n_thread };
        Ok(Batch {
            engine: Engine::new(model, sizes, options.cache_type)?,
            sequences: (0..n_sequence).map(|_| sequence()).collect(),
            model: Arc::clone(model),
            n_ctx,
            n_batch,
            n_best: 0,
            spans: Vec::new(),
            tokens: Vec::new(),
            wanted: Vec::new(),
        })
    }

    /// The model they run on.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// How many sequences there are.
    pub fn n_sequence(&self) -> usize {
        self.sequences.len()
    }

    /// Tokens that each context can hold.
    pub fn n_ctx(&self) -> usize {
        self.n_ctx
    }

    /// Threads at work: those asked for, or fewer where the system refused some.
    pub fn n_thread(&self) -> usize {
        self.engine.n_thread()
    }

    /// A sequence's tokens, whether run already or not.
    ///
    /// # Panics
    /// As everywhere, if there is no such sequence.
    pub fn tokens(&self, sequence: usize) -> &[u32] {
        &self.sequences[sequence].tokens
    }

    /// Adds tokens to a sequence. They are run by the next [`Batch::forward`].
    ///
    /// # Errors
    /// [`Error::Token`] outside the vocabulary, [`Error::ContextFull`]; the sequence is then as it was.
    pub fn push(&mut self, sequence: usize, tokens: &[u32]) -> Result<()> {
        let n_vocab = self.model.config().n_vocab;
        if let Some(&token) = tokens.iter().find(|&&t| t as usize >= n_vocab) {
            return Err(Error::Token { token, n_vocab });
        }
        let sequence = &mut self.sequences[sequence];
        if tokens.len() > self.n_ctx - sequence.tokens.len() {
            return Err(Error::ContextFull { n_past: sequence.tokens.len(), n_new: tokens.len(), n_ctx: self.n_ctx });
        }
        sequence.tokens.extend_from_slice(tokens);
        if !tokens.is_empty() {
            sequence.logits_row = None;
        }
        Ok(())
    }

    /// Runs the tokens not yet run of all sequences, as many together as a batch holds. With [`Rows::Last`], every sequence that is
    /// not empty has its [`Batch::logits`] afterwards, its last token being run again if need be.
    ///
    /// Returns the logits computed, [n_row, n_vocab]: with [`Rows::All`] those of every token run, sequence by sequence; with
    /// [`Rows::Last`] in no particular order.
    ///
    /// # Errors
    /// [`Error::NotFinite`] and [`Error::Compute`] where a damaged model computes values that are not finite,
    /// [`Error::OutOfMemory`].
    pub fn forward(&mut self, rows: Rows) -> Result<&[f32]> {
        self.run(rows, None)
    }

    /// Like [`Batch::forward`], showing hidden states and routing of every batch to `observer`.
    ///
    /// # Errors
    /// As [`Batch::forward`].
    pub fn forward_traced(&mut self, rows: Rows, observer: &mut dyn FnMut(Trace<'_>)) -> Result<&[f32]> {
        self.run(rows, Some(observer))
    }

    fn run(&mut self, rows: Rows, mut observer: Observer<'_, '_>) -> Result<&[f32]> {
        let last_row_of = |sequence: &Sequence| sequence.tokens.len().checked_sub(1);
        if rows == Rows::Last && self.sequences.iter().all(|s| s.logits_row.is_some() || s.tokens.is_empty()) {
            return Ok(self.engine.logits());
        }
        for sequence in &mut self.sequences {
            sequence.logits_row = None;
            if let (Rows::Last, Some(last)) = (rows, last_row_of(sequence)) {
                sequence.n_past = sequence.n_past.min(last);
            }
        }
        let mut n_row = 0;
        while self.fill(|_, sequence| sequence.tokens.len()) {
            // Reborrowed by hand: `as_deref_mut` would tie the observer's own lifetime to the loop.
            let observer = observer.as_mut().map(|o| &mut **o as &mut dyn FnMut(Trace<'_>));
            self.engine.run(&self.model, &self.spans, &self.tokens, observer)?;
            self.wanted.clear();
            self.count_run(|wanted, sequence, run| match rows {
                Rows::All => wanted.extend(run),
                Rows::Last if sequence.n_past == sequence.tokens.len() => {
                    sequence.logits_row = Some(n_row + wanted.len());
                    wanted.push(run.end - 1);
                }
                Rows::Last | Rows::None => {}
            });
            if !self.wanted.is_empty() {
                let n_best = if rows == Rows::Last { self.n_best } else { 0 };
                if let Err(error) = self.engine.head(&self.model, &self.wanted, n_row, n_best) {
                    self.sequences.iter_mut().for_each(|sequence| sequence.logits_row = None);
                    return Err(error);
                }
            }
            n_row += self.wanted.len();
        }
        Ok(if n_row > 0 { self.engine.logits() } else { &[] })
    }

    /// Notes that the batch has run; shows `also` the wanted rows, and each sequence with its rows.
    fn count_run(&mut self, mut also: impl FnMut(&mut Vec<usize>, &mut Sequence, Range<usize>)) {
        for (i, span) in self.spans.iter().enumerate() {
            let end = self.spans.get(i + 1).map_or(self.tokens.len(), |next| next.first_row);
            let sequence = &mut self.sequences[span.sequence];
            sequence.n_past += end - span.first_row;
            also(&mut self.wanted, sequence, span.first_row..end);
        }
    }

    /// Gathers the next tokens to run, of each sequence up to where `end` says; false if there are none.
    fn fill(&mut self, end: impl Fn(usize, &Sequence) -> usize) -> bool {
        self.spans.clear();
        self.tokens.clear();
        for (i, sequence) in self.sequences.iter().enumerate() {
            let left = &sequence.tokens[sequence.n_past..end(i, sequence).max(sequence.n_past)];
            let left = &left[..left.len().min(self.n_batch - self.tokens.len())];
            if !left.is_empty() {
                self.spans.push(Span { sequence: i, n_past: sequence.n_past, first_row: self.tokens.len() });
                self.tokens.extend_from_slice(left);
            }
        }
        !self.tokens.is_empty()
    }

    /// The logits that follow a sequence's last token, [n_vocab]: from a [`Batch::forward`] with [`Rows::Last`] since it was pushed.
    pub fn logits(&self, sequence: usize) -> Option<&[f32]> {
        let n_vocab = self.model.config().n_vocab;
        let row = self.sequences[sequence].logits_row?;
        Some(&self.engine.logits()[row * n_vocab..(row + 1) * n_vocab])
    }

    /// Chooses the next token of a sequence, running what it needs. The token is not added. For several sequences,
    /// [`Batch::sample_all`] is faster.
    ///
    /// # Errors
    /// [`Error::EmptyContext`] if the sequence is empty, and as [`Batch::forward`] and [`Sampler::sample`].
    pub fn sample(&mut self, sequence: usize, sampler: &mut Sampler) -> Result<u32> {
        Ok(self.choose(sequence..sequence + 1, std::slice::from_mut(sampler))?[0])
    }

    /// Chooses the next token of every sequence, each by its sampler. The tokens are not added.
    ///
    /// # Errors
    /// As [`Batch::sample`], for any of them.
    ///
    /// # Panics
    /// If there are not as many samplers as sequences.
    pub fn sample_all(&mut self, samplers: &mut [Sampler]) -> Result<Vec<u32>> {
        assert_eq!(samplers.len(), self.sequences.len());
        self.choose(0..self.sequences.len(), samplers)
    }

    fn choose(&mut self, chosen: Range<usize>, samplers: &mut [Sampler]) -> Result<Vec<u32>> {
        if self.sequences[chosen.clone()].iter().any(|sequence| sequence.tokens.is_empty()) {
            return Err(Error::EmptyContext);
        }
        if self.engine.can_sample(samplers) {
            return self.choose_there(chosen, samplers);
        }
        self.n_best = samplers.iter().map(Sampler::n_best).fold(self.n_best, usize::max);
        if self.sequences[chosen.clone()].iter().any(|sequence| sequence.logits_row.is_none()) {
            self.forward(Rows::Last)?;
        }
        let n_vocab = self.model.config().n_vocab;
        let sampled = self.sequences[chosen].iter().zip(samplers).map(|(sequence, sampler)| {
            let row = sequence.logits_row.ok_or(Error::EmptyContext)?;
            self.engine.sample(row, n_vocab, sampler, &sequence.tokens)
        });
        sampled.collect()
    }

    /// The same where the engine chooses as it runs each context's last token.
    fn choose_there(&mut self, chosen: Range<usize>, samplers: &mut [Sampler]) -> Result<Vec<u32>> {
        for sequence in &mut self.sequences[chosen.clone()] {
            (sequence.n_past, sequence.logits_row) = (sequence.n_past.min(sequence.tokens.len() - 1), None);
        }
        while self.fill(|i, sequence| if chosen.contains(&i) { sequence.tokens.len() - 1 } else { 0 }) {
            self.engine.run(&self.model, &self.spans, &self.tokens, None)?;
            self.count_run(|_, _, _| {});
        }
        let mut requests: Vec<Request<'_>> = chosen
            .clone()
            .zip(samplers)
            .map(|(i, sampler)| Request { sequence: i, context: &self.sequences[i].tokens, sampler })
            .collect();
        let tokens = self.engine.run_and_sample(&mut requests)?;
        self.sequences[chosen].iter_mut().for_each(|sequence| sequence.n_past = sequence.tokens.len());
        Ok(tokens)
    }

    /// Forgets all but a sequence's first `n` tokens. Costs nothing: the cache of what remains stays valid.
    pub fn truncate(&mut self, sequence: usize, n: usize) {
        let sequence = &mut self.sequences[sequence];
        if n < sequence.tokens.len() {
            sequence.tokens.truncate(n);
            sequence.n_past = sequence.n_past.min(n);
            sequence.logits_row = None;
        }
    }

    /// Keeps a sequence's newest `n` tokens, whose positions then start at 0, so that all of them have to be run again.
    pub fn keep_newest(&mut self, sequence: usize, n: usize) {
        let sequence = &mut self.sequences[sequence];
        if n < sequence.tokens.len() {
            sequence.tokens.drain(..sequence.tokens.len() - n);
            sequence.n_past = 0;
            sequence.logits_row = None;
        }
    }
}
