//! Keys and values of the tokens seen so far. Keys are interleaved as `param-kernels` reads them.

use half::f16;
use half::slice::HalfFloatSliceExt;
use param_kernels::{Kernels, Team, key_cache_len, key_index};

use crate::error::{Result, zeroed};

/// How keys and values are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheType {
    /// Half the memory and bandwidth; rounds keys and values to 11 bits.
    F16,
    /// Exact.
    F32,
}

/// The cache of one session, for all blocks.
pub(crate) struct KvCache {
    store: Store,
    n_head: usize,
    head_dim: usize,
    n_ctx: usize,
}

enum Store {
    F16(Halves<f16>),
    F32(Halves<f32>),
}

struct Halves<T> {
    keys: Vec<T>,   // [n_layer, n_head, key_cache_len(n_ctx, head_dim)]
    values: Vec<T>, // [n_layer, n_head, n_ctx, head_dim]
}

impl<T: Clone + Default> Halves<T> {
    fn new(n_heads: usize, n_ctx: usize, head_dim: usize) -> Result<Self> {
        const WHAT: &str = "the kv cache";
        Ok(Halves {
            keys: zeroed(WHAT, n_heads.saturating_mul(key_cache_len(n_ctx, head_dim)))?,
            values: zeroed(WHAT, n_heads.saturating_mul(n_ctx * head_dim))?,
        })
    }
}

impl KvCache {
    pub fn new(ty: CacheType, n_layer: usize, n_head: usize, n_ctx: usize, head_dim: usize) -> Result<KvCache> {
        let store = match ty {
            CacheType::F16 => Store::F16(Halves::new(n_layer * n_head, n_ctx, head_dim)?),
            CacheType::F32 => Store::F32(Halves::new(n_layer * n_head, n_ctx, head_dim)?),
        };
        Ok(KvCache { store, n_head, head_dim, n_ctx })
    }

    /// Stores the keys and values [n_token, n_head * head_dim] of consecutive tokens from `position` on.
    pub fn store(&mut self, team: &mut Team, block: usize, position: usize, k: &[f32], v: &[f32]) {
        let (n_head, head_dim, n_ctx) = (self.n_head, self.head_dim, self.n_ctx);
        let at = (block, position, n_head, head_dim, n_ctx);
        match &mut self.store {
            Store::F16(halves) => store(halves, team, at, k, v, |x, out| out.convert_from_f32_slice(x)),
            Store::F32(halves) => store(halves, team, at, k, v, |x, out| out.copy_from_slice(x)),
        }
    }

    /// Attention of one head over what is stored: `q` and `out` are [n_query, head_dim], from position `n_past` on.
    pub fn attend(&self, kernels: &Kernels, block: usize, head: usize, n_past: usize, q: &[f32], out: &mut [f32]) {
        let head_dim = self.head_dim;
        let at = |len: usize| (block * self.n_head + head) * len..(block * self.n_head + head + 1) * len;
        let (keys, values) = (at(key_cache_len(self.n_ctx, head_dim)), at(self.n_ctx * head_dim));
        match &self.store {
            Store::F16(h) => kernels.attention_f16(q, &h.keys[keys], &h.values[values], n_past, head_dim, out),
            Store::F32(h) => kernels.attention_f32(q, &h.keys[keys], &h.values[values], n_past, head_dim, out),
        }
    }
}

/// Keys and values are cut by head, so that each thread writes its own stretch. `narrow` converts one head's row.
fn store<T: Copy + Default + Send>(
    halves: &mut Halves<T>,
    team: &mut Team,
    (block, position, n_head, head_dim, n_ctx): (usize, usize, usize, usize, usize),
    k: &[f32], // [n_token, n_head * head_dim]
    v: &[f32], // [n_token, n_head * head_dim]
    narrow: impl Fn(&[f32], &mut [T]) + Sync,
) {
    let n_embd = n_head * head_dim;
    let head_of = |x: &[f32], head: usize| head * head_dim..x.len().min((head + 1) * head_dim);
    let key_len = key_cache_len(n_ctx, head_dim);
    let keys = &mut halves.keys[block * n_head * key_len..(block + 1) * n_head * key_len];
    team.for_each_chunk(keys, key_len, |head, keys| {
        for (i, row) in k.chunks_exact(n_embd).enumerate() {
            // Converted a register at a time: the components of a key are far apart.
            for (part, x) in row[head_of(row, head)].chunks(16).enumerate() {
                let mut narrowed = [T::default(); 16];
                narrow(x, &mut narrowed[..x.len()]);
                for (j, value) in narrowed[..x.len()].iter().enumerate() {
                    keys[key_index(position + i, part * 16 + j, head_dim)] = *value;
                }
            }
        }
    });
    let value_len = n_ctx * head_dim;
    let values = &mut halves.values[block * n_head * value_len..(block + 1) * n_head * value_len];
    team.for_each_chunk(values, value_len, |head, values| {
        let rows = values[position * head_dim..].chunks_exact_mut(head_dim);
        for (row, out) in v.chunks_exact(n_embd).zip(rows) {
            narrow(&row[head_of(row, head)], out);
        }
    });
}
