//! Keys and values of the tokens seen so far, in pages as `param-kernels` reads them: for every block and 64 positions, one page of
//! each head. So a decoded token reads each block's cache in one sweep, and memory is touched as the context grows.

use half::f16;
use half::slice::HalfFloatSliceExt;
use param_kernels::{
    KV_BLOCK, KV_PAGE, Kernels, Pages, Team, key_index, key_scale_index, kv_page_len, kv_scales_len, prefetch,
    value_index,
};

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
    n_page: usize,
}

enum Store {
    F16(Vec<f16>), // [n_layer, n_page, n_head, kv_page_len]
    F32(Vec<f32>),
    Q8_0(Vec<i8>, Vec<f16>), // the second: [n_layer, n_page, n_head, kv_scales_len]
}

/// Key components that are narrowed together: those of a key lie far apart.
const NARROWED: usize = 16;

impl KvCache {
    pub fn new(ty: CacheType, n_layer: usize, n_head: usize, n_ctx: usize, head_dim: usize) -> Result<KvCache> {
        const WHAT: &str = "the kv cache";
        let n_page = n_ctx.div_ceil(KV_PAGE);
        let n = (n_layer * n_page).saturating_mul(n_head);
        let n_element = n.saturating_mul(kv_page_len(head_dim));
        let store = match ty {
            CacheType::F16 => Store::F16(zeroed(WHAT, n_element)?),
            CacheType::F32 => Store::F32(zeroed(WHAT, n_element)?),
            CacheType::Q8_0 => {
                Store::Q8_0(zeroed(WHAT, n_element)?, zeroed(WHAT, n.saturating_mul(kv_scales_len(head_dim)))?)
            }
        };
        Ok(KvCache { store, n_head, head_dim, n_page })
    }

    /// Which of all pages is that of a head.
    fn page(&self, block: usize, page: usize, head: usize) -> usize {
        (block * self.n_page + page) * self.n_head + head
    }

    /// Stores the keys and values [n_token, n_head * head_dim] of consecutive tokens from `position` on, each page of a head by one
    /// thread.
    pub fn store(&mut self, team: &mut Team, block: usize, position: usize, k: &[f32], v: &[f32]) {
        let (n_head, head_dim) = (self.n_head, self.head_dim);
        let n_token = k.len() / (n_head * head_dim);
        let first_page = position / KV_PAGE;
        let last_page = (position + n_token).div_ceil(KV_PAGE);
        let pages = self.page(block, first_page, 0)..self.page(block, last_page, 0);
        let (len, scales_len) = (kv_page_len(head_dim), kv_scales_len(head_dim));
        let part = |i: usize| {
            let start = (first_page + i / n_head) * KV_PAGE;
            let tokens = start.max(position) - position..(start + KV_PAGE).min(position + n_token) - position;
            Part { head_dim, n_embd: n_head * head_dim, head: i % n_head, first: start.max(position) - start, tokens }
        };
        let mut none: [(); 0] = [];
        match &mut self.store {
            Store::F16(data) => each(team, n_token, &mut data[pages.start * len..pages.end * len], len, |i, page| {
                part(i).store(page, k, v, |x, out| out.convert_from_f32_slice(x));
            }),
            Store::F32(data) => each(team, n_token, &mut data[pages.start * len..pages.end * len], len, |i, page| {
                part(i).store(page, k, v, |x, out| out.copy_from_slice(x));
            }),
            Store::Q8_0(data, scales) => {
                let data = (&mut data[pages.start * len..pages.end * len], len);
                let scales = (&mut scales[pages.start * scales_len..pages.end * scales_len], scales_len);
                team.for_each_chunks(data, scales, (&mut none[..], 0), |i, page, scales, _| {
                    part(i).store_q8(page, scales, k, v);
                });
            }
        }
    }

    /// Asks for a head's first page, or for nothing where there is no such head.
    pub fn prefetch(&self, block: usize, head: usize) {
        if head < self.n_head {
            let at = self.page(block, 0, head) * kv_page_len(self.head_dim);
            match &self.store {
                Store::F16(data) => prefetch(&data[at..at + kv_page_len(self.head_dim)]),
                Store::F32(data) => prefetch(&data[at..at + kv_page_len(self.head_dim)]),
                Store::Q8_0(data, _) => prefetch(&data[at..at + kv_page_len(self.head_dim)]),
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
        let head_dim = self.head_dim;
        let (first, end) = (self.page(block, 0, head), self.page(block + 1, 0, 0));
        let (len, scales_len) = (kv_page_len(head_dim), kv_scales_len(head_dim));
        let stride = self.n_head * len;
        match &self.store {
            Store::F16(data) => {
                let kv = Pages { data: &data[first * len..end * len], stride };
                kernels.attention_f16(q, kv, n_past, head_dim, scratch, out);
            }
            Store::F32(data) => {
                let kv = Pages { data: &data[first * len..end * len], stride };
                kernels.attention_f32(q, kv, n_past, head_dim, scratch, out);
            }
            Store::Q8_0(data, scales) => {
                let kv = Pages { data: &data[first * len..end * len], stride };
                let scales =
                    Pages { data: &scales[first * scales_len..end * scales_len], stride: self.n_head * scales_len };
                kernels.attention_q8(q, kv, scales, n_past, head_dim, scratch, out);
            }
        }
    }
}

/// Runs `f` for every page; those of a single token by the caller, who is done before another thread could begin.
fn each<T: Send>(team: &mut Team, n_token: usize, pages: &mut [T], len: usize, f: impl Fn(usize, &mut [T]) + Sync) {
    if n_token == 1 {
        pages.chunks_exact_mut(len).enumerate().for_each(|(i, page)| f(i, page));
    } else {
        team.for_each_chunk(pages, len, f);
    }
}

/// The tokens that go into one page of a head.
struct Part {
    head_dim: usize,
    n_embd: usize,
    head: usize,
    /// Where in the page the first of them goes.
    first: usize,
    tokens: std::ops::Range<usize>,
}

impl Part {
    /// The head's part of row `token` of keys or values [n_token, n_embd].
    fn row<'a>(&self, x: &'a [f32], token: usize) -> &'a [f32] {
        &x[token * self.n_embd + self.head * self.head_dim..][..self.head_dim]
    }

    /// `narrow` converts part of a row.
    fn store<T: Copy + Default>(&self, page: &mut [T], k: &[f32], v: &[f32], narrow: impl Fn(&[f32], &mut [T])) {
        let head_dim = self.head_dim;
        for (i, token) in (self.first..).zip(self.tokens.clone()) {
            narrow(self.row(v, token), &mut page[value_index(i, head_dim)..][..head_dim]);
            for (part, x) in self.row(k, token).chunks(NARROWED).enumerate() {
                let mut narrowed = [T::default(); NARROWED];
                narrow(x, &mut narrowed[..x.len()]);
                for (j, key) in narrowed[..x.len()].iter().enumerate() {
                    page[key_index(i, part * NARROWED + j, head_dim)] = *key;
                }
            }
        }
    }

    /// The same in int8, with the scales of blocks of 32 components.
    fn store_q8(&self, page: &mut [i8], scales: &mut [f16], k: &[f32], v: &[f32]) {
        let head_dim = self.head_dim;
        let (key_scales, value_scales) = scales.split_at_mut(kv_scales_len(head_dim) / 2);
        for (i, token) in (self.first..).zip(self.tokens.clone()) {
            let rows = self.row(k, token).chunks(KV_BLOCK).zip(self.row(v, token).chunks(KV_BLOCK));
            for (block, (k, v)) in rows.enumerate() {
                let mut narrowed = [0; KV_BLOCK];
                key_scales[key_scale_index(i, block, head_dim)] = quantize(k, &mut narrowed);
                for (j, key) in narrowed[..k.len()].iter().enumerate() {
                    page[key_index(i, block * KV_BLOCK + j, head_dim)] = *key;
                }
                value_scales[key_scale_index(i, block, head_dim)] = quantize(v, &mut narrowed);
                let at = value_index(i, head_dim) + block * KV_BLOCK;
                page[at..at + v.len()].copy_from_slice(&narrowed[..v.len()]);
            }
        }
    }
}

/// Rounds up to 32 values to steps of the scale returned: 1/127 of the largest, as f16.
fn quantize(x: &[f32], out: &mut [i8; KV_BLOCK]) -> f16 {
    let max = x.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let scale = f16::from_f32(max / 127.0);
    // A scale too small for f16 is zero, and so is what it would scale.
    let inverse = if scale == f16::ZERO { 0.0 } else { 1.0 / scale.to_f32() };
    for (out, x) in out.iter_mut().zip(x) {
        *out = (x * inverse).round() as i8;
    }
    scale
}
