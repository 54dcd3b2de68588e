//! Keys and values of the tokens seen so far. Keys are interleaved as `param-kernels` reads them.

use half::f16;
use half::slice::HalfFloatSliceExt;
use param_kernels::{CACHE_BLOCK, Kernels, Team, cache_scales_len, key_cache_len, key_index};

use crate::error::{Result, zeroed};

/// How keys and values are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheType {
    /// Half the memory and bandwidth; rounds keys and values to 11 bits.
    F16,
    /// Exact.
    F32,
    /// About a quarter of the memory: int8, with an f16 scale for every 32 components of a head.
    Q8_0,
}

/// The cache of one sequence, for all blocks.
pub(crate) struct KvCache {
    store: Store,
    n_head: usize,
    head_dim: usize,
    n_ctx: usize,
}

enum Store {
    F16(Vec<f16>), // [n_layer, n_head, keys then values]
    F32(Vec<f32>),
    Q8_0(Vec<i8>, Vec<f16>), // the second: scales, [n_layer, n_head, of keys then of values]
}

/// Key components that are narrowed together: those of a key lie far apart.
const NARROWED: usize = 16;

impl KvCache {
    pub fn new(ty: CacheType, n_layer: usize, n_head: usize, n_ctx: usize, head_dim: usize) -> Result<KvCache> {
        const WHAT: &str = "the kv cache";
        let mut cache = KvCache { store: Store::F32(Vec::new()), n_head, head_dim, n_ctx };
        let n = (n_layer * n_head).saturating_mul(cache.head_len());
        cache.store = match ty {
            CacheType::F16 => Store::F16(zeroed(WHAT, n)?),
            CacheType::F32 => Store::F32(zeroed(WHAT, n)?),
            CacheType::Q8_0 => Store::Q8_0(zeroed(WHAT, n)?, zeroed(WHAT, n_layer * n_head * cache.scales_len())?),
        };
        Ok(cache)
    }

    /// Elements of a head: its keys, then its values.
    fn head_len(&self) -> usize {
        key_cache_len(self.n_ctx, self.head_dim) + self.n_ctx * self.head_dim
    }

    /// Scales of a quantized head: of its keys, then of its values.
    fn scales_len(&self) -> usize {
        2 * cache_scales_len(self.n_ctx, self.head_dim)
    }

    /// Stores the keys and values [n_token, n_head * head_dim] of consecutive tokens from `position` on, each head by one thread.
    pub fn store(&mut self, team: &mut Team, block: usize, position: usize, k: &[f32], v: &[f32]) {
        let (head_dim, n_ctx, n_embd) = (self.head_dim, self.n_ctx, self.n_head * self.head_dim);
        let (head_len, scales_len) = (self.head_len(), self.scales_len());
        let heads = block * self.n_head..(block + 1) * self.n_head;
        let elements = heads.start * head_len..heads.end * head_len;
        let head = Head { head_dim, n_ctx, position, n_embd };
        let mut none: [(); 0] = [];
        match &mut self.store {
            Store::F16(data) => team.for_each_chunk(&mut data[elements], head_len, |i, data| {
                head.store(data, i, k, v, |x, out| out.convert_from_f32_slice(x));
            }),
            Store::F32(data) => team.for_each_chunk(&mut data[elements], head_len, |i, data| {
                head.store(data, i, k, v, |x, out| out.copy_from_slice(x));
            }),
            Store::Q8_0(data, scales) => {
                let scales = &mut scales[heads.start * scales_len..heads.end * scales_len];
                let chunks = ((&mut data[elements], head_len), (scales, scales_len), (&mut none[..], 0));
                team.for_each_chunks(chunks.0, chunks.1, chunks.2, |i, data, scales, _| {
                    head.store_q8(data, scales, i, k, v);
                });
            }
        }
    }

    /// Attention of one head over what is stored: `q` and `out` are [n_query, head_dim], from position `n_past` on.
    pub fn attend(
        &self,
        kernels: &Kernels,
        block: usize,
        head: usize,
        n_past: usize,
        q: &[f32],
        scratch: &mut [f32],
        out: &mut [f32],
    ) {
        let (head_dim, index) = (self.head_dim, block * self.n_head + head);
        let at = index * self.head_len()..(index + 1) * self.head_len();
        let n_key = key_cache_len(self.n_ctx, head_dim);
        match &self.store {
            Store::F16(data) => {
                let (k, v) = data[at].split_at(n_key);
                kernels.attention_f16(q, k, v, n_past, head_dim, scratch, out);
            }
            Store::F32(data) => {
                let (k, v) = data[at].split_at(n_key);
                kernels.attention_f32(q, k, v, n_past, head_dim, scratch, out);
            }
            Store::Q8_0(data, scales) => {
                let (k, v) = data[at].split_at(n_key);
                let scales = &scales[index * self.scales_len()..(index + 1) * self.scales_len()];
                let (k_scales, v_scales) = scales.split_at(self.scales_len() / 2);
                kernels.attention_q8(q, (k, k_scales), (v, v_scales), n_past, head_dim, scratch, out);
            }
        }
    }
}

/// Where new keys and values of a head go.
#[derive(Clone, Copy)]
struct Head {
    head_dim: usize,
    n_ctx: usize,
    position: usize,
    n_embd: usize,
}

impl Head {
    /// `narrow` converts part of a row; `head` is which one of those in `k` and `v`.
    fn store<T: Copy + Default>(
        self,
        data: &mut [T], // keys, then values
        head: usize,
        k: &[f32], // [n_token, n_embd]
        v: &[f32], // [n_token, n_embd]
        narrow: impl Fn(&[f32], &mut [T]),
    ) {
        let head_dim = self.head_dim;
        let (keys, values) = data.split_at_mut(key_cache_len(self.n_ctx, head_dim));
        let of_head = head * head_dim..(head + 1) * head_dim;
        let values = values[self.position * head_dim..].chunks_exact_mut(head_dim);
        let rows = k.chunks_exact(self.n_embd).zip(v.chunks_exact(self.n_embd));
        for ((i, (k, v)), value) in rows.enumerate().zip(values) {
            narrow(&v[of_head.clone()], value);
            for (part, x) in k[of_head.clone()].chunks(NARROWED).enumerate() {
                let mut narrowed = [T::default(); NARROWED];
                narrow(x, &mut narrowed[..x.len()]);
                for (j, key) in narrowed[..x.len()].iter().enumerate() {
                    keys[key_index(self.position + i, part * NARROWED + j, head_dim)] = *key;
                }
            }
        }
    }

    /// The same in int8, with the scales of blocks of 32 components.
    fn store_q8(self, data: &mut [i8], scales: &mut [f16], head: usize, k: &[f32], v: &[f32]) {
        let head_dim = self.head_dim;
        let n_block = head_dim.div_ceil(CACHE_BLOCK);
        let (keys, values) = data.split_at_mut(key_cache_len(self.n_ctx, head_dim));
        let (key_scales, value_scales) = scales.split_at_mut(cache_scales_len(self.n_ctx, head_dim));
        let of_head = head * head_dim..(head + 1) * head_dim;
        let rows = k.chunks_exact(self.n_embd).zip(v.chunks_exact(self.n_embd));
        for (position, (k, v)) in (self.position..).zip(rows) {
            for block in 0..n_block {
                let part = block * CACHE_BLOCK..head_dim.min((block + 1) * CACHE_BLOCK);
                let at = key_index(position, block, n_block);
                let mut narrowed = [0; CACHE_BLOCK];
                key_scales[at] = quantize(&k[of_head.clone()][part.clone()], &mut narrowed);
                for (d, &key) in part.clone().zip(&narrowed) {
                    keys[key_index(position, d, head_dim)] = key;
                }
                value_scales[at] = quantize(&v[of_head.clone()][part.clone()], &mut narrowed);
                values[position * head_dim..][part.clone()].copy_from_slice(&narrowed[..part.len()]);
            }
        }
    }
}

/// Rounds up to 32 values to steps of the scale returned: 1/127 of the largest, as f16.
fn quantize(x: &[f32], out: &mut [i8; CACHE_BLOCK]) -> f16 {
    let max = x.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let scale = f16::from_f32(max / 127.0);
    // A scale too small for f16 is zero, and so is what it would scale.
    let inverse = if scale == f16::ZERO { 0.0 } else { 1.0 / scale.to_f32() };
    for (out, x) in out.iter_mut().zip(x) {
        *out = (x * inverse).round() as i8;
    }
    scale
}
