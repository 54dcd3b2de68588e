//! Runs a batch on a GPU: prompts as many rows at once, single tokens by the kernels made for them, with the CPU's help where blocks or
//! experts were left to it.

use std::sync::Arc;

use param_cuda::sampling::MAX_TOP_K;
use param_cuda::{Caches, Forward, Row, Stream};

use super::GpuModel;
use super::ahead::{Decoding, Request};
use super::together::Together;
use crate::engine::{CpuEngine, Sizes};
use crate::error::{Error, Result, resize};
use crate::forward::Span;
use crate::kv_cache::CacheType;
use crate::model::Model;
use crate::placement::{GpuDecode, Placement};
use crate::sampler::{Sampler, SamplerOptions};

/// Rows of logits computed at once: as many sequences as are decoded together without cutting a step in two.
const N_LOGITS: usize = 256;

/// A forward pass on a GPU and its caches.
pub(crate) struct GpuEngine {
    stream: Stream,
    forward: Forward,
    /// Where the GPU holds the whole model: for one sequence, and for several, or one of a model that is not for that kernel.
    decoding: Option<Decoding>,
    together: Option<Together>,
    /// What the CPU does of it.
    cpu: Option<CpuEngine>,
    placement: Placement,
    n_embd: usize,
    n_vocab: usize,
    n_logits_max: usize,
    /// The CPU's side of the residual stream where rows have padding.
    padded: Vec<f32>,
    logits: Vec<f32>, // [n_row, n_vocab]
    /// Whether the last batch's logits lie with the decoder already.
    is_decoded: bool,
}

impl GpuEngine {
    pub fn new(model: &Model, gpu: &GpuModel, sizes: Sizes, cache_type: Option<CacheType>) -> Result<GpuEngine> {
        let config = model.config();
        let available = gpu.cache_type();
        if let Some(requested) = cache_type.filter(|&requested| requested != available) {
            return Err(Error::GpuCacheType { requested, available });
        }
        let caches = Arc::new(Caches::new(&gpu.device, sizes.n_sequence.max(1), sizes.n_ctx)?);
        let n_logits_max = sizes.n_batch.clamp(1, N_LOGITS);
        let is_whole = gpu.placement.is_whole(config);
        let stream = Stream::new(gpu.gpu())?;
        Ok(GpuEngine {
            forward: Forward::new(&gpu.device, &caches, sizes.n_batch, n_logits_max)?,
            decoding: match gpu.decode {
                GpuDecode::Graph => None,
                _ if is_whole => Decoding::new(&gpu.device, &caches)?,
                _ => None,
            },
            together: if is_whole { Some(Together::new(&stream, n_logits_max, config.n_vocab)?) } else { None },
            stream,
            cpu: if is_whole { None } else { Some(CpuEngine::new(model, sizes, available)?) },
            placement: gpu.placement,
            n_embd: config.n_embd,
            n_vocab: config.n_vocab,
            n_logits_max,
            padded: Vec::new(),
            logits: Vec::new(),
            is_decoded: false,
        })
    }

    /// Threads of the CPU that help.
    pub fn n_thread(&self) -> usize {
        self.cpu.as_ref().map_or(1, |cpu| cpu.forward.n_thread())
    }

    /// Runs `tokens`, cut into `spans`, through the blocks.
    pub fn run(&mut self, model: &Model, spans: &[Span], tokens: &[u32]) -> Result<()> {
        self.is_decoded = false;
        if let Some(decoding) = &mut self.decoding {
            if let (&[span], &[token]) = (spans, tokens) {
                decoding.run(&self.stream, span, token)?;
                self.is_decoded = true;
                return Ok(());
            }
            decoding.forget();
        }
        let rows = rows(spans, tokens);
        self.forward.set_rows(&rows, &[])?;
        let first_block = self.placement.first_block;
        match &mut self.cpu {
            Some(cpu) if first_block > 0 => {
                cpu.forward.begin(model, spans, tokens)?;
                cpu.forward.blocks(model, &mut cpu.caches, spans, tokens.len(), 0..first_block, None)?;
                self.send(tokens.len())?;
            }
            _ => self.forward.embed(&self.stream)?,
        }
        let config = model.config();
        for i in first_block..config.n_layer {
            if self.placement.has_ffn(config, i) {
                self.forward.blocks(&self.stream, i..i + 1)?;
                continue;
            }
            self.forward.attention_part(&self.stream, i)?;
            self.receive(tokens.len())?;
            if let Some(cpu) = &mut self.cpu {
                cpu.forward.ffn(model, i, tokens.len())?;
            }
            self.send(tokens.len())?;
        }
        Ok(())
    }

    /// Logits of rows `rows` of the batch just run, written from row `at` of the logits buffer on.
    pub fn head(&mut self, rows: &[usize], at: usize) -> Result<()> {
        resize("the logits", &mut self.logits, (at + rows.len()).saturating_mul(self.n_vocab))?;
        let mut left = &mut self.logits[at * self.n_vocab..];
        if let (true, Some(decoding)) = (self.is_decoded, &self.decoding) {
            return decoding.read_logits(left);
        }
        for rows in rows.chunks(self.n_logits_max) {
            let wanted: Vec<u32> = rows.iter().map(|&row| row as u32).collect();
            self.forward.set_logits(&wanted)?;
            self.forward.head(&self.stream)?;
            let (out, rest) = left.split_at_mut(rows.len() * self.n_vocab);
            self.forward.logits().read(0, out)?;
            left = rest;
        }
        self.check()
    }

    /// What [`GpuEngine::head`] wrote: [n_row, n_vocab].
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }

    /// Whether it can choose tokens as these samplers would.
    pub fn can_sample(&self, samplers: &[Sampler]) -> bool {
        self.together.as_ref().is_some_and(|together| together.fits(samplers.len())) && samplers.iter().all(can_sample)
    }

    /// Runs the last token of each context and chooses the next.
    pub fn run_and_sample(&mut self, requests: &mut [Request<'_>]) -> Result<Vec<u32>> {
        match (&mut self.decoding, &mut self.together) {
            (Some(decoding), _) if requests.len() == 1 => Ok(vec![decoding.sample(&self.stream, &mut requests[0])?]),
            (decoding, Some(together)) => {
                if let Some(decoding) = decoding {
                    decoding.forget();
                }
                let tokens = together.sample(&self.stream, &mut self.forward, requests)?;
                self.check()?;
                Ok(tokens)
            }
            (_, None) => unreachable!("whoever asks knows that it can"),
        }
    }

    /// Fails if a hidden state was not finite since the last look.
    fn check(&mut self) -> Result<()> {
        let mut flag = [0];
        self.forward.not_finite().read(0, &mut flag)?;
        if flag == [0] {
            return Ok(());
        }
        self.forward.not_finite().write(0, &[0])?;
        Err(Error::GpuNotFinite)
    }

    /// The CPU's residual stream of the first `n` rows to the GPU.
    fn send(&mut self, n: usize) -> Result<()> {
        let (n_embd, stride) = (self.n_embd, self.forward.stride());
        let Some(cpu) = &mut self.cpu else { return Ok(()) };
        let x = &cpu.forward.residual()[..n * n_embd];
        if stride == n_embd {
            return Ok(self.forward.x().write(0, x)?);
        }
        resize("the residual stream", &mut self.padded, n * stride)?;
        for (x, padded) in x.chunks_exact(n_embd).zip(self.padded.chunks_exact_mut(stride)) {
            padded[..n_embd].copy_from_slice(x);
            padded[n_embd..].fill(0.0);
        }
        Ok(self.forward.x().write(0, &self.padded[..n * stride])?)
    }

    /// The GPU's residual stream of the first `n` rows to the CPU.
    fn receive(&mut self, n: usize) -> Result<()> {
        let (n_embd, stride) = (self.n_embd, self.forward.stride());
        let Some(cpu) = &mut self.cpu else { return Ok(()) };
        let x = &mut cpu.forward.residual()[..n * n_embd];
        if stride == n_embd {
            return Ok(self.forward.x().read(0, x)?);
        }
        resize("the residual stream", &mut self.padded, n * stride)?;
        self.forward.x().read(0, &mut self.padded[..n * stride])?;
        for (x, padded) in x.chunks_exact_mut(n_embd).zip(self.padded.chunks_exact(stride)) {
            x.copy_from_slice(&padded[..n_embd]);
        }
        Ok(())
    }
}

/// Whether the GPU can choose as the sampler would.
fn can_sample(sampler: &Sampler) -> bool {
    let SamplerOptions { temperature, top_k, .. } = *sampler.options();
    temperature == 0.0 || (1..=MAX_TOP_K).contains(&top_k)
}

/// Rows of tokens, span by span.
fn rows(spans: &[Span], tokens: &[u32]) -> Vec<Row> {
    let ends = spans.iter().skip(1).map(|span| span.first_row).chain([tokens.len()]);
    let mut rows = Vec::with_capacity(tokens.len());
    for (span, end) in spans.iter().zip(ends) {
        let positions = span.n_past as u32..;
        let tokens = tokens[span.first_row..end].iter().zip(positions);
        rows.extend(tokens.map(|(&token, position)| Row { token, position, sequence: span.sequence as u32 }));
    }
    rows
}
