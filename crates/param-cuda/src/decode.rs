//! One new token of one sequence: everything from the embedding to the choice of the token is one kernel, so that steps can be queued ahead
//! and the chosen tokens be read later.
//!
//! A step has five phases a block (queries, keys and values; attention; output projection; experts up; experts down), then the head and
//! the choice: 5 n_layer + 1 waits of the whole grid. What it must read of param-0.5b in the default mix is 248 MB, 83 us at 3 TB/s;
//! measured on an H100 it takes 503, as every phase is a chain of dependent instructions of 5.7 us, 1.1 of them the wait: latency decides,
//! not memory. Whatever makes that chain shorter makes it faster; more threads, wider loads or fewer bytes do not.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use crate::caches::{CacheTable, Caches};
use crate::device_model::DeviceModel;
use crate::error::{Result, within};
use crate::kernel::{Arg, Grid, Kernel, Module};
use crate::memory::{Buffer, Pinned};
use crate::model::{Block, Model};
use crate::sampling::{MAX_TOP_K, Rules, Sampling};
use crate::stream::Stream;

const PTX: &str = include_str!("../ptx/decode.ptx");

/// Steps that may be queued before the first one's token is read, and whose random numbers may be given ahead.
pub const HISTORY: usize = 1024;
const MAX_SPLIT: usize = 16;
const MAX_EXPERT: usize = 32;
const THREADS: u32 = 384;
const RED_BYTES: usize = 4 * 4096;
const SMALL_BYTES: usize = 12288;
const MAX_STAGE: usize = 64 << 10;

/// A LayerNorm had an input that was not finite.
pub const NOT_FINITE: u32 = 1;
/// The position was beyond the cache.
pub const NO_ROOM: u32 = 2;
/// No token had a chance.
pub const NO_LOGITS: u32 = 4;

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

#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
#[repr(C)]
struct State {
    token: u32,
    position: u32,
    slot: u32,
    step: u32,
}

#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
#[repr(C)]
struct Decode {
    model: Model,
    caches: CacheTable,
    state: u64,
    flags: u64,
    history: u64,
    barrier: u64,
    x: u64,
    q: u64,
    attended: u64,
    attended_sums: u64,
    hidden: u64,
    logits: u64,
    keys: u64,
    best: u64,
    sampling: u64,
    uniforms: u64,
    shares: u64,
    stage_bytes: u32,
    unused: u32,
    pick: u32,
    top_k: u32,
}

/// The buffers of a step.
#[derive(Debug)]
pub struct Decoder {
    kernel: Kernel,
    grid: Grid,
    decode: Decode,
    top_k: usize,
    n_chosen: usize,
    state: Buffer<State>,
    logits: Buffer<f32>,
    sampling: Rules,
    // The host looks at these, and writes random numbers, while steps run.
    flags: Pinned<u32>,
    history: Pinned<u32>,
    uniforms: Pinned<f64>,
    // What the addresses in `decode` point to besides.
    _model: Arc<DeviceModel>,
    _caches: Arc<Caches>,
    _floats: [Buffer<f32>; 5],
    _keys: [Buffer<u64>; 2],
    _words: [Buffer<u32>; 2],
}

impl Decoder {
    /// For sequences whose keys and values are in `caches`.
    ///
    /// # Errors
    /// [`crate::Error::Limit`] for a model whose shape the kernel does not take, [`crate::Error::OutOfMemory`],
    /// [`crate::Error::Kernel`], [`crate::Error::Call`].
    ///
    /// # Panics
    /// If a block of the model was left out.
    pub fn new(model: &Arc<DeviceModel>, caches: &Arc<Caches>) -> Result<Decoder> {
        const WHAT: &str = "the buffers of a step";
        let gpu = model.gpu();
        let dims = *model.model();
        assert!(model.blocks().iter().all(|block: &Block| block.down.data != 0 && block.q.data != 0));
        let [n_embd, n_head, n_vocab, n_ff, n_expert, n_used, head_dim] =
            [dims.n_embd, dims.n_head, dims.n_vocab, dims.n_ff, dims.n_expert, dims.n_used, dims.head_dim]
                .map(|n| n as usize);
        within("experts", n_expert, MAX_EXPERT)?;
        within("a head's dimension", head_dim, 256)?;
        within("of a head's dimension beyond a multiple of 8", head_dim % 8, 0)?;
        let hidden = n_used.max(1) * n_ff.next_multiple_of(32);
        let length = n_embd.next_multiple_of(32).max(hidden);
        // Activations in f32 and two times in bytes, the router, a norm, scales, sums.
        let shared =
            length * 6 + (n_expert + 2) * n_embd * 4 + length / 32 * 4 + length / 16 * 4 + RED_BYTES + SMALL_BYTES;
        within("bytes of shared memory", shared, gpu.max_shared())?;
        // What is left holds weights that are copied ahead.
        let stage_bytes = (gpu.max_shared() - shared).min(MAX_STAGE) / 16 * 16;
        let shared = shared + stage_bytes;

        let kernel = Module::load(gpu, PTX)?.kernel("decode_token")?;
        kernel.allow_shared(shared as u32)?;
        let n_block = gpu.n_multiprocessor();
        let floats = |n| gpu.alloc::<f32>(WHAT, n);
        let floats = [
            floats(n_embd)?,
            floats(n_embd)?,
            floats(MAX_SPLIT * n_embd)?,
            floats(MAX_SPLIT * n_head * 2)?,
            floats(hidden)?,
        ];
        let n_candidate = n_block * MAX_TOP_K;
        let keys = [gpu.alloc::<u64>(WHAT, n_vocab.max(n_candidate))?, gpu.alloc::<u64>(WHAT, n_candidate)?];
        let barrier = gpu.alloc::<u32>(WHAT, 2)?;
        // Rows of each kind of product, dealt out evenly: `Share` in decode.cuh.
        let rows = [n_embd, n_used.max(1) * n_ff, n_ff, n_vocab, 2 * n_embd, 3 * n_embd];
        let begin = |n: usize| (0..=n_block).map(move |rank| (n * rank / n_block) as u32);
        let shares = gpu.upload(WHAT, &rows.into_iter().flat_map(begin).collect::<Vec<_>>())?;
        let state = gpu.alloc::<State>(WHAT, 1)?;
        let logits = gpu.alloc::<f32>(WHAT, n_vocab)?;
        let sampling = Rules::new(gpu, 1)?;
        let flags = gpu.pinned::<u32>(WHAT, 1)?;
        let history = gpu.pinned::<u32>(WHAT, HISTORY)?;
        let uniforms = gpu.pinned::<f64>(WHAT, HISTORY)?;
        let [x, q, attended, attended_sums, hidden] = [0, 1, 2, 3, 4].map(|i: usize| floats[i].address());
        let decode = Decode {
            model: dims,
            caches: caches.table(),
            state: state.address(),
            flags: flags.address(),
            history: history.address(),
            barrier: barrier.address(),
            x,
            q,
            attended,
            attended_sums,
            hidden,
            logits: logits.address(),
            keys: keys[0].address(),
            best: keys[1].address(),
            sampling: sampling.address(),
            uniforms: uniforms.address(),
            shares: shares.address(),
            stage_bytes: stage_bytes as u32,
            unused: 0,
            pick: 0,
            top_k: 1,
        };
        Ok(Decoder {
            kernel,
            grid: Grid { blocks: [n_block as u32, 1, 1], threads: THREADS, shared: shared as u32 },
            decode,
            top_k: 1,
            n_chosen: 0,
            state,
            logits,
            sampling,
            flags,
            history,
            uniforms,
            _model: Arc::clone(model),
            _caches: Arc::clone(caches),
            _floats: floats,
            _keys: keys,
            _words: [barrier, shares],
        })
    }

    /// `token` runs next, at `position` of the sequence whose keys and values are number `slot` of the caches. Waits for the GPU.
    ///
    /// # Errors
    /// [`crate::Error::Call`].
    ///
    /// # Panics
    /// For a slot, token or position there is none of.
    pub fn set(&mut self, slot: usize, token: u32, position: usize) -> Result<()> {
        let Decode { model, caches, .. } = &self.decode;
        assert!(slot < caches.n_sequence as usize && token < model.n_vocab);
        assert!(position < caches.n_ctx as usize && position < model.n_ctx as usize);
        let step = self.n_chosen as u32;
        self.state.write(0, &[State { token, position: position as u32, slot: slot as u32, step }])?;
        self.flags.set(0, 0);
        Ok(())
    }

    /// How [`Pick::Sample`] draws. Waits for the GPU if anything is new.
    ///
    /// # Errors
    /// [`crate::Error::Limit`] for a `top_k` that is 0 or more than [`MAX_TOP_K`], or too many penalties; [`crate::Error::Call`].
    pub fn set_sampling(&mut self, sampling: &Sampling) -> Result<()> {
        self.sampling.set(0, sampling)?;
        self.top_k = if sampling.temperature == 0.0 { 1 } else { sampling.top_k };
        Ok(())
    }

    /// The random number in [0, 1) that the next step to be queued draws with. At most [`HISTORY`] steps whose tokens were not waited for
    /// may be queued.
    pub fn set_uniform(&mut self, uniform: f64) {
        self.uniforms.set(self.n_chosen % HISTORY, uniform);
    }

    /// Queues a token.
    ///
    /// # Errors
    /// [`crate::Error::Kernel`].
    pub fn step(&mut self, stream: &Stream, pick: Pick) -> Result<()> {
        let top_k = if pick == Pick::Sample { self.top_k as u32 } else { 1 };
        let decode = Decode { pick: pick as u32, top_k, ..self.decode };
        // SAFETY: the kernel's argument; the buffers in it live as long as `self`, and freeing them waits for the GPU.
        unsafe { self.kernel.launch_cooperative(stream, self.grid, &[Arg::value(decode)])? };
        self.n_chosen += usize::from(pick != Pick::Logits);
        Ok(())
    }

    /// Tokens chosen by all steps queued so far.
    pub fn n_chosen(&self) -> usize {
        self.n_chosen
    }

    /// The token that step `step` chose, counted from 0, once an event after it has passed; forgotten after [`HISTORY`] more.
    pub fn chosen(&self, step: usize) -> u32 {
        self.history.get(step % HISTORY)
    }

    /// What the newest step left: [n_vocab].
    pub fn logits(&self) -> &Buffer<f32> {
        &self.logits
    }

    /// [`NOT_FINITE`], [`NO_ROOM`] and [`NO_LOGITS`] since [`Decoder::set`], by the steps that have passed.
    pub fn flags(&self) -> u32 {
        self.flags.get(0)
    }
}
