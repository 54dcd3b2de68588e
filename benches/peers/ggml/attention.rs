//! The cache, and attention over it in ggml's plain operations: the keys' product, a masked softmax, the values' product.

use anyhow::{Context as _, Result};
use gguf::GgmlType;
use param_model::Config;

use crate::ops::{Buffer, Context, Graph, Tensor};
use crate::version::{self, sys};

/// Where the tokens of a forward pass are in the context.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Span {
    pub n_past: i64,
    pub n_token: i64,
    /// Positions that attention looks at: `n_past + n_token` rounded up, the surplus masked.
    pub n_kv: i64,
}

/// Keys and values of all blocks, in f16.
pub struct Cache {
    pub k: Vec<Tensor>, // of each block [n_embd, n_ctx]
    pub v: Vec<Tensor>, // of each block [n_embd, n_ctx], or transposed where attention is plain
    pub n_head: i64,
    _buffer: Buffer,
    _context: Context,
}

impl Cache {
    pub fn new(config: &Config, n_ctx: usize, buffer_type: sys::ggml_backend_buffer_type_t) -> Result<Cache> {
        let context = Context::new(2 * config.n_layer);
        let stack = || {
            let ne = [config.n_embd as i64, n_ctx as i64];
            (0..config.n_layer).map(|_| context.tensor(GgmlType::F16, &ne)).collect::<Vec<_>>()
        };
        let (k, v) = (stack(), stack());
        let buffer = Buffer::for_tensors(&context, buffer_type).context("no memory for the cache")?;
        // Masked positions count for nothing only as long as they are numbers.
        buffer.clear();
        Ok(Cache { k, v, n_head: config.n_head as i64, _buffer: buffer, _context: context })
    }
}

/// What plain attention reads besides the cache.
pub struct PlainInputs {
    span: Span,
    mask: Tensor, // f32 [n_kv, n_token]
}

impl PlainInputs {
    /// Positions are taken in steps of this many, as llama.cpp does.
    pub const N_KV_STEP: i64 = 32;

    pub fn new(ctx: &Context, span: Span) -> PlainInputs {
        PlainInputs { span, mask: ctx.tensor(GgmlType::F32, &[span.n_kv, span.n_token]).input() }
    }

    pub fn fill(&self, span: Span) {
        self.mask.set(&causal_mask(span, 0.0, f32::NEG_INFINITY));
    }

    /// Stores keys and values at their place, which is fixed in the graph, and attends: [n_embd, n_token].
    pub fn attend(&self, ctx: &Context, graph: Graph, cache: &Cache, block: usize, qkv: [Tensor; 3]) -> Tensor {
        let [q, k, v] = qkv; // each f32 [n_embd, n_token]
        let Span { n_past, n_token, n_kv } = self.span;
        let (k_cache, v_cache, n_head) = (cache.k[block], cache.v[block], cache.n_head);
        let (n_embd, n_ctx, size) = (k_cache.ne(0), k_cache.ne(1), k_cache.nb(0));
        let head_dim = n_embd / n_head;
        // Values are stored transposed: their product sums over positions, which must be adjacent for that.
        let v_row = n_ctx as usize * size;
        let k_new = ctx.view_2d(k_cache, n_embd, n_token, k_cache.nb(1), n_past as usize * k_cache.nb(1));
        let v_new = ctx.view_2d(v_cache, n_token, n_embd, v_row, n_past as usize * size);
        graph.expand(ctx.cpy(k, k_new));
        graph.expand(ctx.cpy(ctx.transpose(v), v_new));

        let keys = ctx.view_3d(k_cache, head_dim, n_kv, n_head, k_cache.nb(1), head_dim as usize * size, 0);
        let values = ctx.view_3d(v_cache, n_kv, head_dim, n_head, v_row, head_dim as usize * v_row, 0);
        let scores = ctx.mul_mat(keys, ctx.split_heads(q, n_head)); // [n_kv, n_token, n_head]
        let scale = 1.0 / (head_dim as f32).sqrt();
        let probs = version::masked_soft_max(ctx, scores, self.mask, scale);
        let attended = ctx.mul_mat(values, probs); // [head_dim, n_token, n_head]
        ctx.cont_2d(ctx.permute(attended, 0, 2, 1, 3), n_embd, n_token)
    }
}

/// `open` where a token may look, `closed` where not: [n_kv, n_token].
pub fn causal_mask<T: Copy>(span: Span, open: T, closed: T) -> Vec<T> {
    let row = |i: i64| (0..span.n_kv).map(move |j| if j <= span.n_past + i { open } else { closed });
    (0..span.n_token).flat_map(row).collect()
}
