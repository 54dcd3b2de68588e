//! Decoding on the GPU one step ahead: while the host looks at a token, the step that follows it runs already, begun by the token where
//! it was chosen. If the caller goes on otherwise, that step is dropped: what it cached lies beyond the context, and is written again
//! before anything reads it.

use std::sync::Arc;

use param_cuda::decode::{Decoder, MAX_SEQUENCE, MAX_TOP_K, Mode, NO_LOGITS, NOT_FINITE, Pick, Sampling};
use param_cuda::{Caches, DeviceModel, Event, Stream};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use crate::error::{Error, Result};
use crate::forward::Span;
use crate::placement::GpuDecode;
use crate::sampler::{Sampler, SamplerOptions};

/// A sequence whose next token is wanted; all of its tokens but the last are in the cache.
pub(crate) struct Request<'a> {
    pub sequence: usize,
    pub context: &'a [u32],
    pub sampler: &'a mut Sampler,
}

/// What a step that was queued knows of one of its sequences.
struct Expected {
    sequence: usize,
    /// Tokens of the context that it continues, the last of which it runs.
    n_context: usize,
    /// Which of the steps that chose a token for the decoder's sequence it is.
    step: usize,
    options: SamplerOptions,
    /// The sampler's random numbers before its choice, and after it.
    rng: ChaCha8Rng,
    rng_after: ChaCha8Rng,
}

/// A step that runs, or has run.
struct Flight {
    expected: Vec<Expected>, // in the decoder's order
    /// Last tokens of the contexts, once the host knows them.
    last: Vec<u32>,
    done: Event,
}

/// The decoder with what is queued on it.
pub(crate) struct Decoding {
    decoder: Decoder,
    mode: Option<Mode>,
    n_ctx: usize,
    ahead: Option<Flight>,
}

impl Decoding {
    /// `None` for a model of a shape that the kernels do not take.
    pub fn new(model: &Arc<DeviceModel>, caches: &Arc<Caches>, how: GpuDecode) -> Result<Option<Decoding>> {
        let mode = match how {
            GpuDecode::Auto => None,
            GpuDecode::Graph => Some(Mode::Graph),
            GpuDecode::Persistent => Some(Mode::Persistent),
        };
        let n_ctx = caches.table().n_ctx.min(model.model().n_ctx) as usize;
        match Decoder::new(model, caches) {
            Ok(decoder) => Ok(Some(Decoding { decoder, mode, n_ctx, ahead: None })),
            Err(param_cuda::Error::Limit { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether so many sequences can be decoded together.
    pub fn fits(&self, n_sequence: usize) -> bool {
        n_sequence <= MAX_SEQUENCE
    }

    /// Whether the GPU can choose as the sampler would.
    pub fn can_sample(sampler: &Sampler) -> bool {
        let SamplerOptions { temperature, top_k, .. } = *sampler.options();
        temperature == 0.0 || (1..=MAX_TOP_K).contains(&top_k)
    }

    fn mode(&self) -> Mode {
        self.mode.unwrap_or(Mode::Persistent)
    }

    /// The caller goes on otherwise.
    pub fn forget(&mut self) {
        self.ahead = None;
    }

    /// Runs one token of each span up to its logits.
    pub fn run(&mut self, stream: &Stream, spans: &[Span], tokens: &[u32]) -> Result<()> {
        self.forget();
        for (i, (span, &token)) in spans.iter().zip(tokens).enumerate() {
            self.decoder.set(i, span.sequence, token, span.n_past)?;
        }
        Ok(self.decoder.step(stream, spans.len(), 1, self.mode(), Pick::Logits)?)
    }

    /// Logits of sequence `row` of the step just run.
    pub fn read_logits(&self, row: usize, out: &mut [f32]) -> Result<()> {
        Ok(self.decoder.logits().read(row * out.len(), out)?)
    }

    /// Fails where one of the steps that have run did.
    pub fn check(&self) -> Result<()> {
        let flags = (0..MAX_SEQUENCE).fold(0, |all, i| all | self.decoder.flags(i));
        match flags {
            _ if flags & NOT_FINITE != 0 => Err(Error::GpuNotFinite),
            _ if flags & NO_LOGITS != 0 => Err(Error::NoLogits),
            _ => Ok(()),
        }
    }

    /// Runs the last token of every context and chooses the next.
    pub fn sample(&mut self, stream: &Stream, requests: &mut [Request<'_>]) -> Result<Vec<u32>> {
        let flight = match self.ahead.take().filter(|flight| flight.is_for(requests)) {
            Some(flight) => flight,
            None => {
                for (i, request) in requests.iter().enumerate() {
                    let Some((&token, past)) = request.context.split_last() else { return Err(Error::EmptyContext) };
                    self.decoder.set(i, request.sequence, token, past.len())?;
                    self.decoder.set_sampling(i, &sampling(request.sampler, request.context))?;
                }
                let rngs = requests.iter().map(|request| request.sampler.rng().clone()).collect();
                self.queue(stream, requests, 0, rngs)?
            }
        };
        let has_room = requests.iter().all(|request| request.context.len() + 1 < self.n_ctx);
        // Penalties depend on the token that is not known yet.
        let next = if has_room && !requests.iter().any(|request| request.sampler.has_penalties()) {
            let rngs = flight.expected.iter().map(|expected| expected.rng_after.clone()).collect();
            Some(self.queue(stream, requests, 1, rngs)?)
        } else {
            None
        };
        flight.done.synchronize()?;
        self.check()?;
        let chosen: Vec<u32> =
            flight.expected.iter().enumerate().map(|(i, expected)| self.decoder.chosen(i, expected.step)).collect();
        for (request, expected) in requests.iter_mut().zip(flight.expected) {
            request.sampler.set_rng(expected.rng_after);
        }
        self.ahead = next.map(|next| Flight { last: chosen.clone(), ..next });
        Ok(chosen)
    }

    /// Queues a step for contexts that by then are `n_more` tokens longer.
    fn queue(
        &mut self,
        stream: &Stream,
        requests: &[Request<'_>],
        n_more: usize,
        rngs: Vec<ChaCha8Rng>,
    ) -> Result<Flight> {
        let is_greedy =
            |request: &Request<'_>| request.sampler.options().temperature == 0.0 && !request.sampler.has_penalties();
        let pick = if requests.iter().all(is_greedy) { Pick::Greedy } else { Pick::Sample };
        let mut expected = Vec::with_capacity(requests.len());
        for (i, (request, rng)) in requests.iter().zip(rngs).enumerate() {
            let mut rng_after = rng.clone();
            let step = self.decoder.n_chosen(i);
            if request.sampler.options().temperature != 0.0 {
                self.decoder.set_uniform(i, rng_after.random());
            }
            expected.push(Expected {
                sequence: request.sequence,
                n_context: request.context.len() + n_more,
                step,
                options: request.sampler.options().clone(),
                rng,
                rng_after,
            });
        }
        self.decoder.step(stream, requests.len(), 1, self.mode(), pick)?;
        let last = requests.iter().filter_map(|request| request.context.last().copied()).collect();
        Ok(Flight { expected, last, done: Event::record(stream)? })
    }
}

impl Flight {
    /// Whether it continues these contexts as their samplers would.
    fn is_for(&self, requests: &[Request<'_>]) -> bool {
        self.expected.len() == requests.len()
            && self.expected.iter().zip(&self.last).zip(requests).all(|((expected, last), request)| {
                expected.sequence == request.sequence
                    && expected.n_context == request.context.len()
                    && request.context.last() == Some(last)
                    && expected.options == *request.sampler.options()
                    && expected.rng == *request.sampler.rng()
            })
    }
}

/// A sampler's rules as the GPU applies them.
fn sampling(sampler: &Sampler, context: &[u32]) -> Sampling {
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
