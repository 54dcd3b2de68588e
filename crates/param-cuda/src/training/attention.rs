//! Causal multi-head attention forward and backward, without scores in memory: probabilities are made again in the backward pass from
//! two numbers a query.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use super::dropout::Dropped;
use super::view::{Element, Rows, View};
use crate::error::Result;
use crate::gpu::Gpu;
use crate::kernel::{Arg, Grid, Kernel, Module};
use crate::stream::Stream;

const THREADS: u32 = 128;
/// Queries or keys of a block: `TILE` in train_attention_bf16.cu, `ROWS` and `COLS` in train_attention_f32.cu, whose pitches are `PAD`
/// longer than rows.
const TILE: usize = 64;
const COLS_F32: usize = 32;
const PAD_F32: usize = 4;

/// `AttentionArgs` in train_attention.cuh, field by field.
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
#[repr(C)]
struct AttentionArgs {
    qkv: u64,
    out: u64,
    dout: u64,
    dqkv: u64,
    most: u64,
    log_sum: u64,
    delta: u64,
    mask: u64,
    first: u64,
    bits: u64,
    n_word: u64,
    qkv_stride: u32,
    out_stride: u32,
    dout_stride: u32,
    dqkv_stride: u32,
    n_row: u32,
    n_col: u32,
    n_head: u32,
    head_dim: u32,
    scale: f32,
    drop_scale: f32,
}

/// What both passes are given.
#[derive(Clone, Copy, Debug)]
pub struct AttentionInputs<'a> {
    /// Sequences.
    pub n_row: usize,
    /// Positions of each.
    pub n_col: usize,
    /// Heads.
    pub n_head: usize,
    /// Queries, keys and values beside each other, heads contiguous in each: `[n_row * n_col, 3 * n_head * head_dim]`.
    pub qkv: Rows<'a>,
    /// 0 where a position is padded, whose key's scores then get -1e9 added: `[n_row, n_col]`; all are real where `None`.
    pub mask: Option<View<'a, u8>>,
    /// The first key that each query sees, at most its own position: `[n_row, n_col]`; 0 where `None`.
    pub first: Option<View<'a, u32>>,
    /// Of the probabilities, `[n_row * n_head, n_col, n_col]` by head (`sequence * n_head + head`), query and key.
    pub dropout: Option<Dropped<'a>>,
}

impl AttentionInputs<'_> {
    fn n_token(&self) -> usize {
        self.n_row * self.n_col
    }

    /// Numbers of what the forward pass leaves for the backward pass: two a query of each head.
    pub fn softmax_len(&self) -> usize {
        2 * self.delta_len()
    }

    /// Numbers of the backward pass's scratch memory.
    pub fn delta_len(&self) -> usize {
        self.n_token() * self.n_head
    }
}

/// The kernels for heads of one width.
#[derive(Debug)]
pub struct Attention {
    element: Element,
    head_dim: usize,
    /// Columns of tiles, which `head_dim` is padded to.
    width: usize,
    forward: Kernel,
    delta: Kernel,
    queries: Kernel,
    keys: Kernel,
}

impl Attention {
    /// Whether there are kernels for heads of that width: to 128 in multiples of 16 bytes.
    pub fn takes(element: Element, head_dim: usize) -> bool {
        (1..=128).contains(&head_dim) && head_dim.is_multiple_of(element.per_copy())
    }

    /// Loads them.
    ///
    /// # Errors
    /// [`crate::Error::Call`], [`crate::Error::Kernel`]: also where the GPU's blocks have too little shared memory.
    ///
    /// # Panics
    /// For heads that it does not [take](Attention::takes).
    pub fn new(gpu: &Arc<Gpu>, element: Element, head_dim: usize) -> Result<Self> {
        assert!(Self::takes(element, head_dim), "heads of {head_dim} {element:?}");
        macro_rules! names {
            ($element:literal, $width:literal) => {
                [
                    concat!("attention_", $element, "_forward_", $width),
                    concat!("attention_", $element, "_delta_", $width),
                    concat!("attention_", $element, "_queries_", $width),
                    concat!("attention_", $element, "_keys_", $width),
                ]
            };
        }
        let (ptx, width, [forward, delta, queries, keys]) = match (element, head_dim) {
            (Element::F32, ..=32) => (PTX_F32, 32, names!("f32", 32)),
            (Element::F32, ..=64) => (PTX_F32, 64, names!("f32", 64)),
            (Element::F32, _) => (PTX_F32, 128, names!("f32", 128)),
            (Element::Bf16, ..=16) => (PTX_BF16, 16, names!("bf16", 16)),
            (Element::Bf16, ..=32) => (PTX_BF16, 32, names!("bf16", 32)),
            (Element::Bf16, ..=64) => (PTX_BF16, 64, names!("bf16", 64)),
            (Element::Bf16, _) => (PTX_BF16, 128, names!("bf16", 128)),
        };
        let module = Module::load(gpu, ptx)?;
        let attention = Self {
            element,
            head_dim,
            width,
            forward: module.kernel(forward)?,
            delta: module.kernel(delta)?,
            queries: module.kernel(queries)?,
            keys: module.kernel(keys)?,
        };
        attention.forward.allow_shared(attention.forward_shared())?;
        attention.queries.allow_shared(attention.backward_shared())?;
        attention.keys.allow_shared(attention.backward_shared())?;
        Ok(attention)
    }

    /// Bytes of a block's shared memory.
    fn forward_shared(&self) -> u32 {
        match self.element {
            // Queries, two tiles of keys, two of values.
            Element::Bf16 => 5 * self.tile_bytes(),
            // Queries, keys, values, probabilities.
            Element::F32 => self.rows_bytes(TILE + 2 * COLS_F32),
        }
    }

    fn backward_shared(&self) -> u32 {
        match self.element {
            // Two tiles that stay, and two times two that pass.
            Element::Bf16 => 6 * self.tile_bytes(),
            Element::F32 => self.rows_bytes(2 * TILE + 2 * COLS_F32),
        }
    }

    fn tile_bytes(&self) -> u32 {
        (TILE * self.width * 2) as u32
    }

    /// `n` rows in f32, and a factor between them.
    fn rows_bytes(&self, n: usize) -> u32 {
        ((n * (self.width + PAD_F32) + TILE * (COLS_F32 + PAD_F32)) * 4) as u32
    }

    /// Attention's output in `out` `[n_row * n_col, n_head * head_dim]`, and in `softmax`
    /// ([as many numbers](AttentionInputs::softmax_len)) what the backward pass makes the probabilities of.
    ///
    /// # Errors
    /// [`crate::Error::Kernel`].
    ///
    /// # Panics
    /// If a matrix has another shape or type, or a view too few elements.
    pub fn forward(&self, stream: &Stream, inputs: &AttentionInputs, out: Rows, softmax: View<f32>) -> Result<()> {
        let args = self.args(inputs, out, softmax);
        let blocks = blocks_of_tiles(inputs);
        if blocks == 0 {
            return Ok(());
        }
        let grid = Grid { blocks: [blocks, 1, 1], threads: THREADS, shared: self.forward_shared() };
        // SAFETY: the kernel's argument; every matrix and view was checked to have what the kernel reads and writes, none of which
        // depends on their contents.
        unsafe { self.forward.launch(stream, grid, &[Arg::value(args)]) }
    }

    /// Gradients of [`Attention::forward`], which left `out` and `softmax`, given `dout` (shaped as `out`): replaces `dqkv` (shaped as
    /// `inputs.qkv`). `delta` is [scratch memory](AttentionInputs::delta_len).
    ///
    /// # Errors
    /// [`crate::Error::Kernel`].
    ///
    /// # Panics
    /// As [`Attention::forward`].
    pub fn backward(
        &self,
        stream: &Stream,
        inputs: &AttentionInputs,
        out: Rows,
        dout: Rows,
        softmax: View<f32>,
        delta: View<f32>,
        dqkv: Rows,
    ) -> Result<()> {
        let mut args = self.args(inputs, out, softmax);
        self.check(inputs, "dout", dout, 1);
        self.check(inputs, "dqkv", dqkv, 3);
        assert!(delta.len() >= inputs.delta_len(), "delta: {} of {}", delta.len(), inputs.delta_len());
        (args.dout, args.dout_stride) = (dout.address(), dout.stride() as u32);
        (args.dqkv, args.dqkv_stride) = (dqkv.address(), dqkv.stride() as u32);
        args.delta = delta.address();
        let blocks = blocks_of_tiles(inputs);
        if blocks == 0 {
            return Ok(());
        }
        // As many threads a head as its padded width takes to read at 16 bytes each.
        let lanes = self.width / self.element.per_copy();
        let heads = u32::try_from((inputs.delta_len() * lanes).div_ceil(THREADS as usize)).expect("a grid");
        let grid = Grid { blocks: [heads, 1, 1], threads: THREADS, shared: 0 };
        // SAFETY: as for the forward pass.
        unsafe { self.delta.launch(stream, grid, &[Arg::value(args)]) }?;
        let grid = Grid { blocks: [blocks, 1, 1], threads: THREADS, shared: self.backward_shared() };
        // SAFETY: as above.
        unsafe { self.keys.launch(stream, grid, &[Arg::value(args)]) }?;
        // SAFETY: as above.
        unsafe { self.queries.launch(stream, grid, &[Arg::value(args)]) }
    }

    fn check(&self, inputs: &AttentionInputs, what: &str, rows: Rows, parts: usize) {
        let expected = [inputs.n_token(), parts * inputs.n_head * self.head_dim];
        assert_eq!([rows.n_row(), rows.n_col()], expected, "{what}");
        assert_eq!(rows.element(), self.element, "{what}");
        assert!(u32::try_from(rows.stride()).is_ok(), "{what}: rows of {}", rows.stride());
    }

    /// What both passes share, checked.
    fn args(&self, inputs: &AttentionInputs, out: Rows, softmax: View<f32>) -> AttentionArgs {
        let n_token = inputs.n_token();
        self.check(inputs, "qkv", inputs.qkv, 3);
        self.check(inputs, "out", out, 1);
        assert!(softmax.len() >= inputs.softmax_len(), "softmax: {} of {}", softmax.len(), inputs.softmax_len());
        if let Some(mask) = inputs.mask {
            assert!(mask.len() >= n_token, "mask: {} of {n_token}", mask.len());
        }
        if let Some(first) = inputs.first {
            assert!(first.len() >= n_token, "first: {} of {n_token}", first.len());
        }
        if let Some(dropout) = inputs.dropout {
            let n_word = Dropped::n_word(inputs.delta_len() as u64 * inputs.n_col as u64);
            assert!(dropout.bits.len() >= n_word, "dropout: {} words of {n_word}", dropout.bits.len());
        }
        AttentionArgs {
            qkv: inputs.qkv.address(),
            out: out.address(),
            most: softmax.address(),
            log_sum: softmax.part(inputs.delta_len()..inputs.softmax_len()).address(),
            mask: inputs.mask.map_or(0, View::address),
            first: inputs.first.map_or(0, View::address),
            bits: inputs.dropout.map_or(0, |dropout| dropout.bits.address()),
            n_word: inputs.dropout.map_or(0, |dropout| dropout.bits.len() as u64),
            qkv_stride: inputs.qkv.stride() as u32,
            out_stride: out.stride() as u32,
            n_row: inputs.n_row as u32,
            n_col: inputs.n_col as u32,
            n_head: inputs.n_head as u32,
            head_dim: self.head_dim as u32,
            scale: 1.0 / (self.head_dim as f32).sqrt(),
            drop_scale: inputs.dropout.map_or(1.0, |dropout| dropout.scale),
            ..AttentionArgs::default()
        }
    }
}

const PTX_F32: &str = include_str!("../../ptx/train_attention_f32.ptx");
const PTX_BF16: &str = include_str!("../../ptx/train_attention_bf16.ptx");

/// A block for each tile of each head.
fn blocks_of_tiles(inputs: &AttentionInputs) -> u32 {
    let blocks = inputs.n_row * inputs.n_head * inputs.n_col.div_ceil(TILE);
    // Numbers of queries, with a tile's more, stay below 2^32 too.
    assert!(blocks <= i32::MAX as usize && inputs.n_col <= i32::MAX as usize, "{blocks} tiles of {}", inputs.n_col);
    blocks as u32
}

#[cfg(test)]
mod tests;
