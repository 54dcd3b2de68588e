//! One new token each for up to four sequences: everything from the embedding to the choice of the token stays on the GPU, so that steps
//! can be queued ahead and the chosen tokens be read later.
//!
//! A step has five phases a block (queries, keys and values; attention; output projection; experts up; experts down), then the head and
//! the choice: 5 n_layer + 1 waits of the whole grid, about 1 µs each. Of param-0.5b in Q4_K (head in Q6_K) on an H100 at 3 TB/s, 132
//! multiprocessors, per block of the model: queries, keys and values 1.0 MB, 0.33 µs; attention at 512 positions 1.6 MB, 0.5 µs; output
//! 0.33 MB, 0.1 µs; MoE up and down 4.0 MB each, 1.3 µs; dense up and down 1.3 MB each, 0.45 µs; once per token the head, 81 MB, 27 µs.
//! Copies of a phase's first weights start before the wait that precedes it, except those of experts, which are not yet chosen.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use crate::caches::{CacheTable, Caches};
use crate::device_model::DeviceModel;
use crate::error::{Error, Result};
use crate::kernel::{Arg, Grid, Kernel, Module};
use crate::memory::{Buffer, Pinned};
use crate::model::{Block, Model};
use crate::stream::{Graph, Stream};

const PTX: &str = include_str!("../ptx/decode.ptx");

/// Sequences that a step can run.
pub const MAX_SEQUENCE: usize = 4;
/// Candidates that sampling can keep.
pub const MAX_TOP_K: usize = 256;
/// Tokens that penalties can name for a sequence.
pub const MAX_PENALTY: usize = 1024;
/// Steps that may be queued before the first one's token is read, and whose random numbers may be given ahead.
pub const HISTORY: usize = 1024;
const MAX_EXPERT: usize = 32;
const MAX_SPLIT: usize = 16;
const MAX_PART: usize = 4;
const THREADS: u32 = 512;
const RING_BYTES: usize = 16 * 2 * 3840;
const RED_BYTES: usize = 16896;
const SMALL_BYTES: usize = 10240;
const ROUTING_WORDS: usize = 1 + MAX_EXPERT * (1 + MAX_SEQUENCE);

/// A LayerNorm had an input that was not finite, or an activation was beyond f16.
pub const NOT_FINITE: u32 = 1;
/// The position was beyond the cache.
pub const NO_ROOM: u32 = 2;
/// No token had a chance.
pub const NO_LOGITS: u32 = 4;

/// How the kernels are started: the same phases in both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// A kernel for each phase, queued as one graph.
    Graph,
    /// One kernel for the whole step, whose blocks wait for each other.
    Persistent,
}

/// What follows the logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pick {
    /// Nothing: token and position stay as they are.
    Logits,
    /// The most likely token, of equals the lower; it runs next.
    Greedy,
    /// The token that [`Decoder::set_sampling`] leads to; it runs next.
    Sample,
}

/// How a sequence's tokens are drawn: llama.cpp's rules, as param-runtime's sampler applies them.
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

#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
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

#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
#[repr(C)]
struct Decode {
    model: Model,
    caches: CacheTable,
    tokens: u64,
    positions: u64,
    slots: u64,
    flags: u64,
    step: u64,
    history: u64,
    barrier: u64,
    x: u64,
    parts: u64,
    q: u64,
    attended: u64,
    attended_sums: u64,
    hidden: u64,
    hidden_sums: u64,
    routing: u64,
    logits: u64,
    best: u64,
    sampling: u64,
    uniforms: u64,
    n_sequence: u32,
    n_step: u32,
    pick: u32,
    top_k: u32,
}

#[derive(Debug)]
struct Kernels {
    qkv: Kernel,
    attention: Kernel,
    out: Kernel,
    up: Kernel,
    down: Kernel,
    head: Kernel,
    pick: Kernel,
    token: Kernel,
}

/// The buffers of a step, and what was recorded to run it.
#[derive(Debug)]
pub struct Decoder {
    model: Arc<DeviceModel>,
    _caches: Arc<Caches>,
    kernels: Kernels,
    n_block: u32,
    shared: u32,
    decode: Decode,
    graphs: Vec<(Decode, Graph)>,
    top_k: [usize; MAX_SEQUENCE],
    n_chosen: [usize; MAX_SEQUENCE],
    tokens: Buffer<u32>,
    positions: Buffer<u32>,
    slots: Buffer<u32>,
    // The host looks at these, and writes random numbers, while steps run.
    flags: Pinned<u32>,
    history: Pinned<u32>,
    logits: Buffer<f32>,
    sampling: Buffer<DeviceSampling>,
    penalties: Buffer<[u32; 2]>,
    uniforms: Pinned<f64>,
    // Only kernels look at these.
    _words: [Buffer<u32>; 3],
    _floats: [Buffer<f32>; 6],
    _hidden: Buffer<u8>,
    _best: Buffer<u64>,
}

fn within(what: &'static str, value: usize, most: usize) -> Result<()> {
    if value > most { Err(Error::Limit { what, value, most }) } else { Ok(()) }
}

impl Decoder {
    /// For sequences whose keys and values are in `caches`.
    ///
    /// # Errors
    /// [`Error::Limit`] for a model whose shape the kernels do not take, [`Error::OutOfMemory`], [`Error::Kernel`], [`Error::Call`].
    ///
    /// # Panics
    /// If a block of the model was left out.
    pub fn new(model: &Arc<DeviceModel>, caches: &Arc<Caches>) -> Result<Decoder> {
        const WHAT: &str = "the buffers of a step";
        let gpu = model.gpu();
        let dims = *model.model();
        assert!(model.blocks().iter().all(|block: &Block| block.down.data != 0 && block.q.data != 0));
        let [n_embd, n_head, n_vocab, n_ff, n_expert] =
            [dims.n_embd, dims.n_head, dims.n_vocab, dims.n_ff, dims.n_expert].map(|n| n as usize);
        within("experts", n_expert, MAX_EXPERT)?;
        within("a head's dimension", dims.head_dim as usize, 256)?;
        within("of a head's dimension beyond a multiple of 8", dims.head_dim as usize % 8, 0)?;
        let stride = n_embd.next_multiple_of(32);
        let shared = RING_BYTES + RED_BYTES + stride * 33 + SMALL_BYTES;
        within("bytes of shared memory", shared, gpu.max_shared())?;

        let module = Module::load(gpu, PTX)?;
        let kernel = |name| {
            let kernel = module.kernel(name)?;
            kernel.allow_shared(shared as u32)?;
            Ok::<_, Error>(kernel)
        };
        let kernels = Kernels {
            qkv: kernel("decode_qkv")?,
            attention: kernel("decode_attention")?,
            out: kernel("decode_out")?,
            up: kernel("decode_up")?,
            down: kernel("decode_down")?,
            head: kernel("decode_head")?,
            pick: kernel("decode_pick")?,
            token: kernel("decode_token")?,
        };
        let n_block = gpu.n_multiprocessor();
        // A block's share of the vocabulary is sorted where its weights were.
        within("tokens for each multiprocessor", (n_vocab.div_ceil(16)).div_ceil(n_block) * 16, RING_BYTES / 8)?;

        let words = |n| gpu.alloc::<u32>(WHAT, n);
        let floats = |n| gpu.alloc::<f32>(WHAT, n);
        let n_active = n_expert.max(1);
        let padded = n_ff.next_multiple_of(32);
        let (tokens, positions, slots) = (words(MAX_SEQUENCE)?, words(MAX_SEQUENCE)?, words(MAX_SEQUENCE)?);
        let flags = gpu.pinned::<u32>(WHAT, MAX_SEQUENCE)?;
        let history = gpu.pinned::<u32>(WHAT, HISTORY * MAX_SEQUENCE)?;
        let only_words = [words(MAX_SEQUENCE)?, words(2)?, words(ROUTING_WORDS)?];
        let only_floats = [
            floats(2 * MAX_SEQUENCE * stride)?,
            floats(MAX_PART * MAX_SEQUENCE * stride)?,
            floats(MAX_SEQUENCE * n_embd)?,
            floats(MAX_SPLIT * MAX_SEQUENCE * n_embd)?,
            floats(MAX_SPLIT * MAX_SEQUENCE * n_head * 2)?,
            floats(n_active * padded / 16 * MAX_SEQUENCE)?,
        ];
        let hidden = gpu.alloc::<u8>(WHAT, n_active * padded / 32 * 512)?;
        let best = gpu.alloc::<u64>(WHAT, MAX_SEQUENCE * n_block * MAX_TOP_K)?;
        let logits = floats(MAX_SEQUENCE * n_vocab)?;
        let sampling = gpu.alloc::<DeviceSampling>(WHAT, MAX_SEQUENCE)?;
        let penalties = gpu.alloc::<[u32; 2]>(WHAT, MAX_SEQUENCE * MAX_PENALTY)?;
        let uniforms = gpu.pinned::<f64>(WHAT, HISTORY * MAX_SEQUENCE)?;
        let decode = Decode {
            model: dims,
            caches: caches.table(),
            tokens: tokens.address(),
            positions: positions.address(),
            slots: slots.address(),
            flags: flags.address(),
            step: only_words[0].address(),
            history: history.address(),
            barrier: only_words[1].address(),
            x: only_floats[0].address(),
            parts: only_floats[1].address(),
            q: only_floats[2].address(),
            attended: only_floats[3].address(),
            attended_sums: only_floats[4].address(),
            hidden: hidden.address(),
            hidden_sums: only_floats[5].address(),
            routing: only_words[2].address(),
            logits: logits.address(),
            best: best.address(),
            sampling: sampling.address(),
            uniforms: uniforms.address(),
            ..Decode::default()
        };
        Ok(Decoder {
            model: Arc::clone(model),
            _caches: Arc::clone(caches),
            kernels,
            n_block: n_block as u32,
            shared: shared as u32,
            decode,
            graphs: Vec::new(),
            top_k: [1; MAX_SEQUENCE],
            n_chosen: [0; MAX_SEQUENCE],
            tokens,
            positions,
            slots,
            flags,
            history,
            logits,
            sampling,
            penalties,
            uniforms,
            _words: only_words,
            _floats: only_floats,
            _hidden: hidden,
            _best: best,
        })
    }

    /// Sequence `sequence` of the steps that follow is the one whose keys and values are number `slot` of the caches; `token` runs next,
    /// at `position`. Waits for the GPU.
    ///
    /// # Errors
    /// [`Error::Call`].
    ///
    /// # Panics
    /// For a sequence, slot, token or position there is none of.
    pub fn set(&mut self, sequence: usize, slot: usize, token: u32, position: usize) -> Result<()> {
        let Decode { model, caches, .. } = &self.decode;
        assert!(sequence < MAX_SEQUENCE && slot < caches.n_sequence as usize && token < model.n_vocab);
        assert!(position < caches.n_ctx as usize && position < model.n_ctx as usize);
        self.slots.write(sequence, &[slot as u32])?;
        self.tokens.write(sequence, &[token])?;
        self.positions.write(sequence, &[position as u32])?;
        self.flags.set(sequence, 0);
        Ok(())
    }

    /// How [`Pick::Sample`] draws for a sequence. Waits for the GPU.
    ///
    /// # Errors
    /// [`Error::Limit`] for a `top_k` that is 0 or more than [`MAX_TOP_K`], or more than [`MAX_PENALTY`] penalties; [`Error::Call`].
    pub fn set_sampling(&mut self, sequence: usize, sampling: &Sampling) -> Result<()> {
        within("candidates for sampling", sampling.top_k.wrapping_sub(1), MAX_TOP_K - 1)?;
        within("tokens with penalties", sampling.penalties.len(), MAX_PENALTY)?;
        let penalties: Vec<[u32; 2]> = sampling.penalties.iter().map(|&(token, count)| [token, count]).collect();
        let first = sequence * MAX_PENALTY;
        self.penalties.write(first, &penalties)?;
        self.top_k[sequence] = if sampling.temperature == 0.0 { 1 } else { sampling.top_k };
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
        self.sampling.write(sequence, &[device])
    }

    /// The random number in [0, 1) that the next step to be queued draws with, for a sequence. At most [`HISTORY`] steps whose tokens
    /// were not waited for may be queued.
    pub fn set_uniform(&mut self, sequence: usize, uniform: f64) {
        self.uniforms.set(self.n_chosen[sequence] % HISTORY * MAX_SEQUENCE + sequence, uniform);
    }

    /// Queues `n_step` tokens each for sequences 0 to `n_sequence`.
    ///
    /// # Errors
    /// [`Error::Kernel`], [`Error::Call`].
    ///
    /// # Panics
    /// If there are no or too many sequences.
    pub fn step(&mut self, stream: &Stream, n_sequence: usize, n_step: usize, mode: Mode, pick: Pick) -> Result<()> {
        assert!((1..=MAX_SEQUENCE).contains(&n_sequence));
        let top_k = match pick {
            Pick::Logits | Pick::Greedy => 1,
            Pick::Sample => self.top_k[..n_sequence].iter().copied().max().unwrap_or(1),
        };
        let decode =
            Decode { n_sequence: n_sequence as u32, n_step: 1, pick: pick as u32, top_k: top_k as u32, ..self.decode };
        match mode {
            Mode::Persistent => {
                let decode = Decode { n_step: n_step as u32, ..decode };
                // SAFETY: the kernel's arguments; the buffers in them live as long as `self`, and freeing them waits for the GPU.
                unsafe { self.kernels.token.launch_cooperative(stream, self.grid(), &[Arg::value(decode)])? };
            }
            Mode::Graph => {
                let known = |graphs: &[(Decode, Graph)]| {
                    graphs.iter().position(|(of, _)| bytemuck::bytes_of(of) == bytemuck::bytes_of(&decode))
                };
                let at = match known(&self.graphs) {
                    Some(at) => at,
                    None => {
                        let graph = stream.capture(|stream| self.queue(stream, decode))?;
                        self.graphs.push((decode, graph));
                        self.graphs.len() - 1
                    }
                };
                for _ in 0..n_step {
                    // SAFETY: as above.
                    unsafe { self.graphs[at].1.launch(stream)? };
                }
            }
        }
        if pick != Pick::Logits {
            self.n_chosen[..n_sequence].iter_mut().for_each(|n| *n += n_step);
        }
        Ok(())
    }

    fn grid(&self) -> Grid {
        Grid { blocks: [self.n_block, 1, 1], threads: THREADS, shared: self.shared }
    }

    /// The phases as kernels of their own.
    fn queue(&self, stream: &Stream, decode: Decode) -> Result<()> {
        let launch = |kernel: &Kernel, layer: u32| {
            // SAFETY: the kernels' arguments; the buffers in them live as long as `self`, and freeing them waits for the GPU.
            unsafe { kernel.launch(stream, self.grid(), &[Arg::value(decode), Arg::value(layer)]) }
        };
        let kernels = &self.kernels;
        for layer in 0..self.model.model().n_layer {
            for kernel in [&kernels.qkv, &kernels.attention, &kernels.out, &kernels.up, &kernels.down] {
                launch(kernel, layer)?;
            }
        }
        launch(&kernels.head, 0)?;
        if decode.pick != Pick::Logits as u32 {
            let grid = Grid { blocks: [decode.n_sequence, 1, 1], ..self.grid() };
            // SAFETY: as above.
            unsafe { kernels.pick.launch(stream, grid, &[Arg::value(decode), Arg::value(self.n_block)])? };
        }
        Ok(())
    }

    /// Tokens chosen for a sequence by all steps queued so far.
    pub fn n_chosen(&self, sequence: usize) -> usize {
        self.n_chosen[sequence]
    }

    /// The token that step `step` of a sequence chose, counted from 0, once an event after it has passed; forgotten after [`HISTORY`]
    /// more.
    pub fn chosen(&self, sequence: usize, step: usize) -> u32 {
        self.history.get(step % HISTORY * MAX_SEQUENCE + sequence)
    }

    /// What the newest step left: [n_sequence, n_vocab].
    pub fn logits(&self) -> &Buffer<f32> {
        &self.logits
    }

    /// [`NOT_FINITE`], [`NO_ROOM`] and [`NO_LOGITS`] of a sequence since [`Decoder::set`], by the steps that have passed.
    pub fn flags(&self, sequence: usize) -> u32 {
        self.flags.get(sequence)
    }
}
