//! Decoding on the GPU one step ahead: while the host looks at a token, the step that follows it runs already, begun by the token where
//! it was chosen. If the caller goes on otherwise, that step is dropped: what it cached lies beyond the context, and is written again
//! before anything reads it.

use std::sync::Arc;

use param_cuda::decode::{Decoder, NO_LOGITS, NOT_FINITE, Pick};
use param_cuda::sampling::Sampling;
use param_cuda::{Caches, DeviceModel, Event, Stream};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use crate::error::{Error, Result};
use crate::forward::Span;
use crate::sampler::{Sampler, SamplerOptions};

/// A sequence whose next token is wanted; all of its tokens but the last are in the cache.
pub(crate) struct Request<'a> {
    pub sequence: usize,
    pub context: &'a [u32],
    pub sampler: &'a mut Sampler,
}

/// A step that runs, or has run.
struct Flight {
    sequence: usize,
    /// Tokens of the context that it continues, the last of which it runs.
    n_context: usize,
    /// That last one; nothing while only the GPU knows it.
    last: Option<u32>,
    /// Which of the decoder's choices it is.
    step: usize,
    options: SamplerOptions,
    /// The sampler's random numbers before its choice, and after it.
    rng: ChaCha8Rng,
    rng_after: ChaCha8Rng,
    done: Event,
}

/// The decoder with what is queued on it.
pub(crate) struct Decoding {
    decoder: Decoder,
    n_ctx: usize,
    ahead: Option<Flight>,
}

impl Decoding {
    /// `None` for a model of a shape that the kernel does not take.
    pub fn new(model: &Arc<DeviceModel>, caches: &Arc<Caches>) -> Result<Option<Decoding>> {
        let n_ctx = caches.table().n_ctx.min(model.model().n_ctx) as usize;
        match Decoder::new(model, caches) {
            Ok(decoder) => Ok(Some(Decoding { decoder, n_ctx, ahead: None })),
            Err(param_cuda::Error::Limit { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// The caller goes on otherwise.
    pub fn forget(&mut self) {
        self.ahead = None;
    }

    /// Runs one token up to its logits.
    pub fn run(&mut self, stream: &Stream, span: Span, token: u32) -> Result<()> {
        self.forget();
        self.decoder.set(span.sequence, token, span.n_past)?;
        Ok(self.decoder.step(stream, Pick::Logits)?)
    }

    /// Logits of the step just run.
    pub fn read_logits(&self, out: &mut [f32]) -> Result<()> {
        self.decoder.logits().read(0, out)?;
        self.check()
    }

    /// Fails where one of the steps that have run did.
    fn check(&self) -> Result<()> {
        match self.decoder.flags() {
            flags if flags & NOT_FINITE != 0 => Err(Error::GpuNotFinite),
            flags if flags & NO_LOGITS != 0 => Err(Error::NoLogits),
            _ => Ok(()),
        }
    }

    /// Runs the last token of the context and chooses the next.
    pub fn sample(&mut self, stream: &Stream, request: &mut Request<'_>) -> Result<u32> {
        let flight = match self.ahead.take().filter(|flight| flight.is_for(request)) {
            Some(flight) => flight,
            None => {
                let Some((&token, past)) = request.context.split_last() else { return Err(Error::EmptyContext) };
                self.decoder.set(request.sequence, token, past.len())?;
                if !is_greedy(request) {
                    self.decoder.set_sampling(&sampling(request.sampler, request.context))?;
                }
                let rng = request.sampler.rng().clone();
                Flight { last: Some(token), ..self.queue(stream, request, 0, rng)? }
            }
        };
        // Penalties depend on the token that is not known yet.
        let next = if request.context.len() + 1 < self.n_ctx && !request.sampler.has_penalties() {
            Some(self.queue(stream, request, 1, flight.rng_after.clone())?)
        } else {
            None
        };
        flight.done.synchronize()?;
        self.check()?;
        let chosen = self.decoder.chosen(flight.step);
        request.sampler.set_rng(flight.rng_after);
        self.ahead = next.map(|next| Flight { last: Some(chosen), ..next });
        Ok(chosen)
    }

    /// Queues a step for a context that by then is `n_more` tokens longer.
    fn queue(&mut self, stream: &Stream, request: &Request<'_>, n_more: usize, rng: ChaCha8Rng) -> Result<Flight> {
        let mut rng_after = rng.clone();
        let step = self.decoder.n_chosen();
        if request.sampler.options().temperature != 0.0 {
            self.decoder.set_uniform(rng_after.random());
        }
        self.decoder.step(stream, if is_greedy(request) { Pick::Greedy } else { Pick::Sample })?;
        Ok(Flight {
            sequence: request.sequence,
            n_context: request.context.len() + n_more,
            last: None,
            step,
            options: request.sampler.options().clone(),
            rng,
            rng_after,
            done: Event::record(stream)?,
        })
    }
}

impl Flight {
    /// Whether it continues this context as its sampler would.
    fn is_for(&self, request: &Request<'_>) -> bool {
        self.sequence == request.sequence
            && self.n_context == request.context.len()
            && self.last.as_ref() == request.context.last()
            && self.options == *request.sampler.options()
            && self.rng == *request.sampler.rng()
    }
}

/// Whether the most likely token is wanted.
pub(super) fn is_greedy(request: &Request<'_>) -> bool {
    request.sampler.options().temperature == 0.0 && !request.sampler.has_penalties()
}

/// A sampler's rules as the GPU applies them.
pub(super) fn sampling(sampler: &Sampler, context: &[u32]) -> Sampling {
    let options = sampler.options();
    Sampling {
        temperature: options.temperature,
        top_k: options.top_k.max(1),
        top_p: options.top_p,
        min_p: options.min_p,
        repeat_penalty: options.repeat_penalty,
        presence_penalty: options.presence_penalty,
        frequency_penalty: options.frequency_penalty,
        penalties: if sampler.has_penalties() { sampler.window_counts(context) } else { Vec::new() },
    }
}
