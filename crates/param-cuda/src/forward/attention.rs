//! Attention of rows over the caches of their sequences: tiles of queries for prompts, single rows for everything else.

use bytemuck::{Pod, Zeroable};

use crate::caches::CacheTable;
use crate::error::Result;
use crate::gpu::Gpu;
use crate::kernel::{Arg, Grid, Kernel, Module};
use crate::model::Model;
use crate::stream::Stream;
use std::sync::Arc;

/// Rows of one sequence at consecutive positions: `Span` in attention.cuh.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Span {
    pub row: u32,
    pub n_row: u32,
    pub slot: u32,
    pub position: u32,
}

/// Rows a tile of queries has at most.
pub(super) const QUERIES: u32 = 64;

/// `AttentionArgs` in attention.cuh, field by field.
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
#[repr(C)]
pub(super) struct AttentionArgs {
    pub q: u64,
    pub output: u64,
    pub slots: u64,
    pub positions: u64,
    pub spans: u64,
    pub caches: CacheTable,
    pub stride: u32,
    pub element: u32,
    pub layer: u32,
    pub n_head: u32,
    pub head_dim: u32,
    pub unused: u32,
}

/// The kernels of a model's head size and cache.
#[derive(Debug)]
pub(super) struct Attention {
    rows: Kernel,
    tiles: Option<(Kernel, u32)>,
}

impl Attention {
    pub(super) fn new(gpu: &Arc<Gpu>, model: &Model) -> Result<Attention> {
        const ROWS: [[&str; 4]; 2] = [
            ["attention_rows_f16_32", "attention_rows_f16_64", "attention_rows_f16_128", "attention_rows_f16_256"],
            ["attention_rows_f32_32", "attention_rows_f32_64", "attention_rows_f32_128", "attention_rows_f32_256"],
        ];
        assert!(model.head_dim.is_multiple_of(8) && (8..=256).contains(&model.head_dim), "head_dim {}", model.head_dim);
        let size = match model.head_dim {
            ..=32 => 0,
            33..=64 => 1,
            65..=128 => 2,
            _ => 3,
        };
        let is_f32 = model.cache_f32 != 0;
        let rows =
            Module::load(gpu, include_str!("../../ptx/attention_rows.ptx"))?.kernel(ROWS[usize::from(is_f32)][size])?;
        let name = match model.head_dim {
            _ if is_f32 => None,
            32 => Some("attention_tiles_32"),
            64 => Some("attention_tiles_64"),
            128 => Some("attention_tiles_128"),
            _ => None,
        };
        let tiles = match name {
            None => None,
            Some(name) => {
                let kernel = Module::load(gpu, include_str!("../../ptx/attention_tiles.ptx"))?.kernel(name)?;
                // Queries, two tiles of keys and two of values.
                let shared = 5 * QUERIES * model.head_dim * 2;
                kernel.allow_shared(shared)?;
                Some((kernel, shared))
            }
        };
        Ok(Attention { rows, tiles })
    }

    /// Queues the attention of `n_row` rows, which make `n_span` spans.
    ///
    /// # Safety
    /// As [`Kernel::launch`]: every address in `args` must be valid for what it is used for.
    pub(super) unsafe fn launch(&self, stream: &Stream, args: AttentionArgs, n_row: u32, n_span: u32) -> Result<()> {
        let (kernel, grid) = match &self.tiles {
            // Tiles of single queries would read what they do not need to.
            Some((kernel, shared)) if n_span < n_row => {
                (kernel, Grid { blocks: [n_span, args.n_head, 1], threads: 128, shared: *shared })
            }
            _ => (&self.rows, Grid { blocks: [n_row, args.n_head, 1], threads: 128, shared: 0 }),
        };
        // SAFETY: the argument is the kernel's; the rest is the caller's promise.
        unsafe { kernel.launch(stream, grid, &[Arg::value(args)]) }
    }
}
