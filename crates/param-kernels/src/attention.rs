//! Causal attention of one head: scores, online softmax and weighted sum of values, fused page by page of the cache. A page holds
//! the keys and values of 64 positions; keys lie in groups of 16 positions, so that one register holds the scores of 16 keys.

use crate::isa::{Isa, LANES, Lanes, madd_lanes, sum_map};
use crate::math::exp;
use crate::prefetch::prefetch;
use crate::softmax::max;
use half::f16;

/// Positions in a page: the keys per step of the online softmax.
pub const KV_PAGE: usize = 64;
/// Components of a key or value that share a scale, in a quantized cache.
pub const KV_BLOCK: usize = 32;
/// Queries that share a widened page: best given as many at once.
pub const QUERY_TILE: usize = 32;

const GROUPS: usize = KV_PAGE / LANES;
/// Queries that share each load of a key or value, each with four registers of sums.
const QUERIES: usize = 4;

/// Elements of a page of one head: keys [4, head_dim, 16], then values [64, head_dim].
pub const fn kv_page_len(head_dim: usize) -> usize {
    2 * KV_PAGE * head_dim
}

/// Where component `d` of the key at position `i` of a page lies.
pub const fn key_index(i: usize, d: usize, head_dim: usize) -> usize {
    (i / LANES * head_dim + d) * LANES + i % LANES
}

/// Where the value at position `i` of a page begins.
pub const fn value_index(i: usize, head_dim: usize) -> usize {
    (KV_PAGE + i) * head_dim
}

/// Scales of a page of a quantized cache: of the keys [4, head_dim / 32, 16], then the same of the values.
pub const fn kv_scales_len(head_dim: usize) -> usize {
    2 * KV_PAGE * head_dim.div_ceil(KV_BLOCK)
}

/// Where the scale of block `block` of the key at position `i` lies; that of the value is [`KV_PAGE`] blocks further.
pub const fn key_scale_index(i: usize, block: usize, head_dim: usize) -> usize {
    (i / LANES * head_dim.div_ceil(KV_BLOCK) + block) * LANES + i % LANES
}

/// Scratch that attention needs: a page in f32.
pub const fn attention_scratch_len(head_dim: usize) -> usize {
    kv_page_len(head_dim)
}

/// The pages of one head in a cache.
#[derive(Clone, Copy, Debug)]
pub struct Pages<'a, T> {
    /// From the head's first page on.
    pub data: &'a [T],
    /// Elements from one page of the head to its next.
    pub stride: usize,
}

impl<'a, T> Pages<'a, T> {
    #[inline(always)]
    fn get(&self, page: usize, len: usize) -> &'a [T] {
        &self.data[page * self.stride..][..len]
    }
}

/// Keys and values of a page, in whatever type they are cached.
trait Page: Copy {
    /// Component `d` of the 16 keys of a group.
    fn keys<I: Isa>(&self, group: usize, d: usize) -> Lanes;
    /// `W` times 16 components, from `column` on, of the value at position `i`.
    fn values<I: Isa, const W: usize>(&self, i: usize, column: usize) -> [Lanes; W];
    /// One component of it.
    fn value<I: Isa>(&self, i: usize, column: usize) -> f32;
}

/// A type that a cache may hold as it is.
trait Float: Copy {
    fn widen<I: Isa>(x: &[Self; LANES]) -> Lanes;
}

impl Float for f32 {
    #[inline(always)]
    fn widen<I: Isa>(x: &[f32; LANES]) -> Lanes {
        *x
    }
}

impl Float for f16 {
    #[inline(always)]
    fn widen<I: Isa>(x: &[f16; LANES]) -> Lanes {
        I::widen(x)
    }
}

#[derive(Clone, Copy)]
struct Floats<'a, T> {
    k: &'a [[T; LANES]], // [4 * head_dim]
    v: &'a [T],          // [64, head_dim]
    head_dim: usize,
}

impl<'a, T> Floats<'a, T> {
    #[inline(always)]
    fn new(page: &'a [T], head_dim: usize) -> Self {
        let (k, v) = page.split_at(KV_PAGE * head_dim);
        Floats { k: k.as_chunks().0, v, head_dim }
    }
}

impl<T: Float> Page for Floats<'_, T> {
    #[inline(always)]
    fn keys<I: Isa>(&self, group: usize, d: usize) -> Lanes {
        T::widen::<I>(&self.k[group * self.head_dim + d])
    }

    #[inline(always)]
    fn values<I: Isa, const W: usize>(&self, i: usize, column: usize) -> [Lanes; W] {
        let start = i * self.head_dim + column;
        let (parts, _) = self.v[start..start + W * LANES].as_chunks();
        let mut y = [[0.0; LANES]; W];
        for w in 0..W {
            y[w] = T::widen::<I>(&parts[w]);
        }
        y
    }

    #[inline(always)]
    fn value<I: Isa>(&self, i: usize, column: usize) -> f32 {
        T::widen::<I>(&[self.v[i * self.head_dim + column]; LANES])[0]
    }
}

#[derive(Clone, Copy)]
struct Quantized<'a> {
    page: Floats<'a, i8>,
    k_scales: &'a [[f16; LANES]], // [4, head_dim / 32]
    v_scales: &'a [[f16; LANES]], // [4, head_dim / 32]
}

impl<'a> Quantized<'a> {
    #[inline(always)]
    fn new(page: &'a [i8], scales: &'a [f16], head_dim: usize) -> Self {
        let (k_scales, v_scales) = scales.split_at(scales.len() / 2);
        let (k_scales, v_scales) = (k_scales.as_chunks().0, v_scales.as_chunks().0);
        Quantized { page: Floats::new(page, head_dim), k_scales, v_scales }
    }

    #[inline(always)]
    fn value_scale<I: Isa>(&self, i: usize, column: usize) -> f32 {
        let block = i / LANES * self.page.head_dim.div_ceil(KV_BLOCK) + column / KV_BLOCK;
        I::widen(&self.v_scales[block])[i % LANES]
    }
}

/// Bytes times a scale each.
#[inline(always)]
fn scaled(x: &[i8; LANES], scales: Lanes) -> Lanes {
    let mut y = [0.0; LANES];
    for lane in 0..LANES {
        y[lane] = f32::from(x[lane]) * scales[lane];
    }
    y
}

impl Page for Quantized<'_> {
    #[inline(always)]
    fn keys<I: Isa>(&self, group: usize, d: usize) -> Lanes {
        let scales = I::widen(&self.k_scales[group * self.page.head_dim.div_ceil(KV_BLOCK) + d / KV_BLOCK]);
        scaled(&self.page.k[group * self.page.head_dim + d], scales)
    }

    #[inline(always)]
    fn values<I: Isa, const W: usize>(&self, i: usize, column: usize) -> [Lanes; W] {
        let start = i * self.page.head_dim + column;
        let (parts, _) = self.page.v[start..start + W * LANES].as_chunks();
        let mut y = [[0.0; LANES]; W];
        for w in 0..W {
            y[w] = scaled(&parts[w], [self.value_scale::<I>(i, column + w * LANES); LANES]);
        }
        y
    }

    #[inline(always)]
    fn value<I: Isa>(&self, i: usize, column: usize) -> f32 {
        f32::from(self.page.v[i * self.page.head_dim + column]) * self.value_scale::<I>(i, column)
    }
}

#[inline(always)]
pub(crate) fn attention_f32<I: Isa>(
    q: &[f32],
    kv: Pages<'_, f32>,
    n_past: usize,
    head_dim: usize,
    scratch: &mut [f32],
    out: &mut [f32],
) {
    attention_floats::<I, _>(q, kv, n_past, head_dim, scratch, out);
}

#[inline(always)]
pub(crate) fn attention_f16<I: Isa>(
    q: &[f32],
    kv: Pages<'_, f16>,
    n_past: usize,
    head_dim: usize,
    scratch: &mut [f32],
    out: &mut [f32],
) {
    attention_floats::<I, _>(q, kv, n_past, head_dim, scratch, out);
}

#[inline(always)]
fn attention_floats<I: Isa, T: Float>(
    q: &[f32],
    kv: Pages<'_, T>,
    n_past: usize,
    head_dim: usize,
    scratch: &mut [f32],
    out: &mut [f32],
) {
    let page = |i| Floats::new(kv.get(i, kv_page_len(head_dim)), head_dim);
    let ask = |i| prefetch(kv.get(i, kv_page_len(head_dim)));
    attention::<I, _>(q, page, ask, n_past, head_dim, scratch, out);
}

#[inline(always)]
pub(crate) fn attention_q8<I: Isa>(
    q: &[f32],
    kv: Pages<'_, i8>,
    scales: Pages<'_, f16>,
    n_past: usize,
    head_dim: usize,
    scratch: &mut [f32],
    out: &mut [f32],
) {
    let (len, scales_len) = (kv_page_len(head_dim), kv_scales_len(head_dim));
    let page = |i| Quantized::new(kv.get(i, len), scales.get(i, scales_len), head_dim);
    let ask = |i| prefetch(kv.get(i, len));
    attention::<I, _>(q, page, ask, n_past, head_dim, scratch, out);
}

#[inline(always)]
fn attention<I: Isa, P: Page>(
    q: &[f32], // [n_query, head_dim]
    page: impl Fn(usize) -> P,
    ask: impl Fn(usize),
    n_past: usize,
    head_dim: usize,
    scratch: &mut [f32], // at least a page
    out: &mut [f32],     // [n_query, head_dim]
) {
    assert!(head_dim > 0 && q.len() == out.len() && q.len().is_multiple_of(head_dim));
    assert!(scratch.len() >= attention_scratch_len(head_dim));
    let n_query = q.len() / head_dim;
    if n_query < QUERIES {
        for i in 0..n_query {
            let at = i * head_dim..(i + 1) * head_dim;
            let (q, out) = (&q[at.clone()], &mut out[at]);
            let last = (n_past + i) / KV_PAGE;
            let mut state = [State::new()];
            out.fill(0.0);
            for index in 0..=last {
                if index < last {
                    ask(index + 1);
                }
                attend::<I, P, 1>(q, page(index), index * KV_PAGE, n_past + i, head_dim, &mut state, out);
            }
            finish(&state, head_dim, out);
        }
        return;
    }
    for start in (0..n_query).step_by(QUERY_TILE) {
        let end = n_query.min(start + QUERY_TILE);
        let at = start * head_dim..end * head_dim;
        attend_tile::<I, P>(&q[at.clone()], &page, n_past + start, head_dim, scratch, &mut out[at]);
    }
}

/// Up to [`QUERY_TILE`] queries at positions `n_past..` over the same keys and values, widened once a page.
#[inline(always)]
fn attend_tile<I: Isa, P: Page>(
    q: &[f32], // [n_query, head_dim]
    page: &impl Fn(usize) -> P,
    n_past: usize,
    head_dim: usize,
    scratch: &mut [f32], // at least a page
    out: &mut [f32],     // [n_query, head_dim]
) {
    let n_query = q.len() / head_dim;
    let n_kv = n_past + n_query;
    let mut state = [const { State::new() }; QUERY_TILE];
    out.fill(0.0);
    for index in 0..n_kv.div_ceil(KV_PAGE) {
        let first = index * KV_PAGE;
        let page = page(index);
        let (k, v) = scratch[..kv_page_len(head_dim)].split_at_mut(KV_PAGE * head_dim);
        for (group, keys) in k.as_chunks_mut::<LANES>().0.chunks_exact_mut(head_dim).enumerate() {
            for (d, key) in keys.iter_mut().enumerate() {
                *key = page.keys::<I>(group, d);
            }
        }
        for (i, value) in v.chunks_exact_mut(head_dim).take(n_kv - first).enumerate() {
            let (whole, rest) = value.as_chunks_mut::<LANES>();
            let n_whole = whole.len();
            for (part, value) in whole.iter_mut().enumerate() {
                [*value] = page.values::<I, 1>(i, part * LANES);
            }
            for (j, value) in rest.iter_mut().enumerate() {
                *value = page.value::<I>(i, n_whole * LANES + j);
            }
        }
        let page = Floats::new(&scratch[..kv_page_len(head_dim)], head_dim);
        let mut i = 0;
        while i + QUERIES <= n_query {
            let at = i * head_dim..(i + QUERIES) * head_dim;
            if let Some(state) = state[i..].first_chunk_mut() {
                attend::<I, _, QUERIES>(&q[at.clone()], page, first, n_past + i, head_dim, state, &mut out[at]);
            }
            i += QUERIES;
        }
        for i in i..n_query {
            let at = i * head_dim..(i + 1) * head_dim;
            let state = std::array::from_mut(&mut state[i]);
            attend::<I, _, 1>(&q[at.clone()], page, first, n_past + i, head_dim, state, &mut out[at]);
        }
    }
    finish(&state[..n_query], head_dim, out);
}

/// What the online softmax of a query knows of the keys so far.
#[derive(Clone, Copy)]
struct State {
    max: f32,
    sum: f32,
}

impl State {
    const fn new() -> State {
        State { max: f32::NEG_INFINITY, sum: 0.0 }
    }
}

/// Divides the weighted sums by the sums of the weights.
#[inline(always)]
fn finish(state: &[State], head_dim: usize, out: &mut [f32]) {
    for (state, out) in state.iter().zip(out.chunks_exact_mut(head_dim)) {
        let inverse = 1.0 / state.sum;
        for o in out {
            *o *= inverse;
        }
    }
}

/// `Q` queries at positions `n_past..` over the page that begins at position `first`.
#[inline(always)]
fn attend<I: Isa, P: Page, const Q: usize>(
    q: &[f32], // [Q, head_dim]
    page: P,
    first: usize,
    n_past: usize,
    head_dim: usize,
    state: &mut [State; Q],
    out: &mut [f32], // [Q, head_dim]
) {
    // A page that begins after the last query's position has nothing to show.
    let Some(n_key) = (n_past + Q).checked_sub(first).map(|n| n.min(KV_PAGE)).filter(|&n| n > 0) else { return };
    let mut p = [[0.0f32; KV_PAGE]; Q];
    scores::<I, P, Q>(q, page, head_dim, &mut p);
    for i in 0..Q {
        let visible = (n_past + i + 1).saturating_sub(first);
        if visible < KV_PAGE {
            for (key, p) in p[i].iter_mut().enumerate() {
                *p = if key < visible { *p } else { f32::NEG_INFINITY };
            }
        }
        let new_max = state[i].max.max(max::<I>(&p[i]));
        // A row whose scores are NaN or all -inf: subtracting 0 instead keeps -inf at weight 0 and lets NaN through.
        let base = if new_max == f32::NEG_INFINITY { 0.0 } else { new_max };
        for p in &mut p[i] {
            *p = exp::<I>(*p - base);
        }
        let row = &p[i];
        let correction = exp::<I>(state[i].max - base);
        state[i].sum = I::madd(state[i].sum, correction, sum_map(KV_PAGE, |key| row[key]));
        if correction != 1.0 {
            for o in &mut out[i * head_dim..(i + 1) * head_dim] {
                *o *= correction;
            }
        }
        state[i].max = new_max;
    }
    let mut column = 0;
    while column + GROUPS * LANES <= head_dim {
        weighted_sum::<I, P, Q, GROUPS>(&p, page, n_key, head_dim, column, out);
        column += GROUPS * LANES;
    }
    while column + LANES <= head_dim {
        weighted_sum::<I, P, Q, 1>(&p, page, n_key, head_dim, column, out);
        column += LANES;
    }
    for column in column..head_dim {
        for key in 0..n_key {
            let value = page.value::<I>(key, column);
            for i in 0..Q {
                out[i * head_dim + column] = I::madd(p[i][key], value, out[i * head_dim + column]);
            }
        }
    }
}

/// Scores of `Q` queries against the keys of a page: sixteen sums of four registers in flight for four queries.
#[inline(always)]
fn scores<I: Isa, P: Page, const Q: usize>(
    q: &[f32], // [Q, head_dim]
    page: P,
    head_dim: usize,
    p: &mut [[f32; KV_PAGE]; Q],
) {
    let mut acc = [[[0.0f32; LANES]; GROUPS]; Q];
    let mut queries: [&[f32]; Q] = [&[]; Q];
    for i in 0..Q {
        queries[i] = &q[i * head_dim..(i + 1) * head_dim];
    }
    for d in 0..head_dim {
        let mut keys = [[0.0; LANES]; GROUPS];
        for w in 0..GROUPS {
            keys[w] = page.keys::<I>(w, d);
        }
        for i in 0..Q {
            let query = [queries[i][d]; LANES];
            for w in 0..GROUPS {
                madd_lanes::<I>(&mut acc[i][w], &query, &keys[w]);
            }
        }
    }
    for i in 0..Q {
        p[i].copy_from_slice(acc[i].as_flattened());
    }
}

/// Adds to `W` registers of each output row, from `column` on, the values weighted by `p`.
#[inline(always)]
fn weighted_sum<I: Isa, P: Page, const Q: usize, const W: usize>(
    p: &[[f32; KV_PAGE]; Q],
    page: P,
    n_key: usize,
    head_dim: usize,
    column: usize,
    out: &mut [f32], // [Q, head_dim]
) {
    let mut acc = [[[0.0f32; LANES]; W]; Q];
    for i in 0..Q {
        for w in 0..W {
            let start = i * head_dim + column + w * LANES;
            acc[i][w].copy_from_slice(&out[start..start + LANES]);
        }
    }
    for key in 0..n_key {
        let values = page.values::<I, W>(key, column);
        for i in 0..Q {
            let weight = [p[i][key]; LANES];
            for w in 0..W {
                madd_lanes::<I>(&mut acc[i][w], &weight, &values[w]);
            }
        }
    }
    for i in 0..Q {
        for w in 0..W {
            let start = i * head_dim + column + w * LANES;
            out[start..start + LANES].copy_from_slice(&acc[i][w]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Kernels;
    use proptest::prelude::*;

    /// Naive twin: one query, plain row-major keys and values, everything in f64.
    fn reference(q: &[f32], k: &[f32], v: &[f32], n_key: usize) -> Vec<f64> {
        let head_dim = q.len();
        let score = |j: usize| -> f64 { crate::dot::dot_reference(q, &k[j * head_dim..(j + 1) * head_dim]) };
        let top = (0..n_key).map(score).fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = (0..n_key).map(|j| (score(j) - top).exp()).collect();
        let sum: f64 = weights.iter().sum();
        (0..head_dim).map(|d| (0..n_key).map(|j| weights[j] / sum * f64::from(v[j * head_dim + d])).sum()).collect()
    }

    fn case() -> impl Strategy<Value = (usize, usize, usize, Vec<f32>)> {
        (0usize..200, 1usize..40, 1usize..90).prop_flat_map(|(n_past, n_query, head_dim)| {
            let n = (2 * (n_past + n_query) + n_query) * head_dim;
            (Just(n_past), Just(n_query), Just(head_dim), prop::collection::vec(-1.0f32..1.0, n))
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Error bound: 2e-5 absolute on values in -1..1, for every cache type against the values the cache really holds.
        #[test]
        fn every_isa_attends_to_the_visible_keys_only((n_past, n_query, head_dim, data) in case()) {
            let n_kv = n_past + n_query;
            let (q, kv) = data.split_at(n_query * head_dim);
            // Exact in all three types: whole numbers of 1/127, and one scale.
            let rounded: Vec<f32> = kv.iter().map(|&x| (x * 127.0).round() / 128.0).collect();
            let (k, v) = rounded.split_at(n_kv * head_dim);
            let n_page = n_kv.div_ceil(KV_PAGE);
            // Pages of two heads in turn, of which the second is this one; whatever lies past the last position must not matter.
            let stride = 2 * kv_page_len(head_dim);
            let mut kv32 = vec![f32::NAN; n_page * stride];
            for j in 0..n_kv {
                let page = &mut kv32[j / KV_PAGE * stride + stride / 2..][..stride / 2];
                for d in 0..head_dim {
                    page[key_index(j % KV_PAGE, d, head_dim)] = k[j * head_dim + d];
                }
                page[value_index(j % KV_PAGE, head_dim)..][..head_dim].copy_from_slice(&v[j * head_dim..(j + 1) * head_dim]);
            }
            let kv16: Vec<f16> = kv32.iter().map(|&x| f16::from_f32(x)).collect();
            let kv8: Vec<i8> = kv32.iter().map(|&x| (x * 128.0) as i8).collect();
            let scales = vec![f16::from_f32(1.0 / 128.0); n_page * 2 * kv_scales_len(head_dim)];
            let scales = Pages { data: &scales[kv_scales_len(head_dim)..], stride: 2 * kv_scales_len(head_dim) };
            let mut scratch = vec![f32::NAN; attention_scratch_len(head_dim)];
            for kernels in Kernels::supported() {
                let mut outs = [vec![0.0; q.len()], vec![0.0; q.len()], vec![0.0; q.len()]];
                let pages = Pages { data: &kv32[stride / 2..], stride };
                kernels.attention_f32(q, pages, n_past, head_dim, &mut scratch, &mut outs[0]);
                let pages = Pages { data: &kv16[stride / 2..], stride };
                kernels.attention_f16(q, pages, n_past, head_dim, &mut scratch, &mut outs[1]);
                let pages = Pages { data: &kv8[stride / 2..], stride };
                kernels.attention_q8(q, pages, scales, n_past, head_dim, &mut scratch, &mut outs[2]);
                for i in 0..n_query {
                    let at = i * head_dim..(i + 1) * head_dim;
                    let want = reference(&q[at.clone()], k, v, n_past + i + 1);
                    for (out, ty) in outs.iter().zip(["f32", "f16", "q8_0"]) {
                        for (got, want) in out[at.clone()].iter().zip(&want) {
                            prop_assert!((f64::from(*got) - want).abs() <= 2e-5, "{} {ty}: {got} for {want}", kernels.isa());
                        }
                    }
                    // Alone or in company, a query's result is the same to the bit.
                    let mut alone = vec![0.0; head_dim];
                    let pages = Pages { data: &kv16[stride / 2..], stride };
                    kernels.attention_f16(&q[at.clone()], pages, n_past + i, head_dim, &mut scratch, &mut alone);
                    prop_assert_eq!(&alone[..], &outs[1][at]);
                }
            }
        }
    }
}
