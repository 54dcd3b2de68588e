//! Causal attention of one head: scores, online softmax and weighted sum of values, fused in blocks of keys. Keys are stored in
//! groups of 16 positions, so that one register holds the scores of 16 keys.

use crate::isa::{Isa, LANES, Lanes, madd_lanes, sum_map};
use crate::math::exp;
use crate::softmax::max;
use half::f16;

/// Positions interleaved in the key cache.
pub const KEY_GROUP: usize = LANES;
/// Components of a key or value that share a scale, in a quantized cache.
pub const CACHE_BLOCK: usize = 32;

/// Elements a key cache of one head needs for `n_ctx` positions (the last group is whole).
pub const fn key_cache_len(n_ctx: usize, head_dim: usize) -> usize {
    n_ctx.next_multiple_of(KEY_GROUP) * head_dim
}

/// Where component `d` of the key at `position` lies in the cache of one head: [n_ctx / 16, head_dim, 16].
pub const fn key_index(position: usize, d: usize, head_dim: usize) -> usize {
    (position / KEY_GROUP * head_dim + d) * KEY_GROUP + position % KEY_GROUP
}

/// Scales that a quantized cache of one head needs for its keys, and again for its values: [n_ctx / 16, head_dim / 32, 16], laid
/// out by [`key_index`] with the block as the component.
pub const fn cache_scales_len(n_ctx: usize, head_dim: usize) -> usize {
    key_cache_len(n_ctx, head_dim.div_ceil(CACHE_BLOCK))
}

/// Scratch that attention needs: two blocks of keys and values in f32.
pub const fn attention_scratch_len(head_dim: usize) -> usize {
    2 * BLOCK * head_dim
}

/// Keys per step of the online softmax.
const BLOCK: usize = 64;
const GROUPS: usize = BLOCK / KEY_GROUP;
/// Queries that share a widened block of keys and values: best given as many at once.
pub const QUERY_TILE: usize = 32;
/// Queries that share each load of a key or value, each with four registers of sums.
const QUERIES: usize = 4;

/// Keys and values of one head, in whatever type they are cached.
trait Source {
    /// Component `d` of the 16 keys of a group.
    fn keys<I: Isa>(&self, group: usize, d: usize) -> Lanes;
    /// 16 components, from `column` on, of the value at `position`.
    fn values<I: Isa>(&self, position: usize, column: usize) -> Lanes;
    /// One component of it.
    fn value<I: Isa>(&self, position: usize, column: usize) -> f32;
    /// Groups of keys there are.
    fn n_group(&self) -> usize;
}

/// A type that a cache may hold as it is.
pub(crate) trait Float: Copy {
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

struct Floats<'a, T> {
    k: &'a [[T; KEY_GROUP]], // [n_group * head_dim]
    v: &'a [T],              // [n_ctx, head_dim]
    head_dim: usize,
}

impl<'a, T> Floats<'a, T> {
    #[inline(always)]
    fn new(k: &'a [T], v: &'a [T], head_dim: usize) -> Self {
        Floats { k: k.as_chunks().0, v, head_dim }
    }
}

impl<T: Float> Source for Floats<'_, T> {
    #[inline(always)]
    fn keys<I: Isa>(&self, group: usize, d: usize) -> Lanes {
        T::widen::<I>(&self.k[group * self.head_dim + d])
    }

    #[inline(always)]
    fn values<I: Isa>(&self, position: usize, column: usize) -> Lanes {
        let start = position * self.head_dim + column;
        self.v[start..start + LANES].first_chunk().map_or([0.0; LANES], T::widen::<I>)
    }

    #[inline(always)]
    fn value<I: Isa>(&self, position: usize, column: usize) -> f32 {
        T::widen::<I>(&[self.v[position * self.head_dim + column]; LANES])[0]
    }

    #[inline(always)]
    fn n_group(&self) -> usize {
        self.k.len() / self.head_dim
    }
}

struct Quantized<'a> {
    k: &'a [[i8; KEY_GROUP]],         // [n_group * head_dim]
    v: &'a [i8],                      // [n_ctx, head_dim]
    k_scales: &'a [[f16; KEY_GROUP]], // [n_group * head_dim / 32]
    v_scales: &'a [[f16; KEY_GROUP]], // [n_group * head_dim / 32]
    head_dim: usize,
}

#[inline(always)]
fn widen_bytes(x: &[i8; LANES]) -> Lanes {
    let mut y = [0.0; LANES];
    for i in 0..LANES {
        y[i] = f32::from(x[i]);
    }
    y
}

impl Quantized<'_> {
    #[inline(always)]
    fn value_scale<I: Isa>(&self, position: usize, column: usize) -> f32 {
        let block = position / KEY_GROUP * self.head_dim.div_ceil(CACHE_BLOCK) + column / CACHE_BLOCK;
        I::widen(&self.v_scales[block])[position % KEY_GROUP]
    }
}

impl Source for Quantized<'_> {
    #[inline(always)]
    fn keys<I: Isa>(&self, group: usize, d: usize) -> Lanes {
        let scales = I::widen(&self.k_scales[group * self.head_dim.div_ceil(CACHE_BLOCK) + d / CACHE_BLOCK]);
        let mut x = widen_bytes(&self.k[group * self.head_dim + d]);
        for lane in 0..LANES {
            x[lane] *= scales[lane];
        }
        x
    }

    #[inline(always)]
    fn values<I: Isa>(&self, position: usize, column: usize) -> Lanes {
        let start = position * self.head_dim + column;
        let mut x = self.v[start..start + LANES].first_chunk().map_or([0.0; LANES], widen_bytes);
        let scale = self.value_scale::<I>(position, column);
        for lane in 0..LANES {
            x[lane] *= scale;
        }
        x
    }

    #[inline(always)]
    fn value<I: Isa>(&self, position: usize, column: usize) -> f32 {
        f32::from(self.v[position * self.head_dim + column]) * self.value_scale::<I>(position, column)
    }

    #[inline(always)]
    fn n_group(&self) -> usize {
        self.k.len() / self.head_dim
    }
}

#[inline(always)]
pub(crate) fn attention_f32<I: Isa>(
    q: &[f32],
    k: &[f32],
    v: &[f32],
    n_past: usize,
    head_dim: usize,
    scratch: &mut [f32],
    out: &mut [f32],
) {
    attention::<I, _>(q, &Floats::new(k, v, head_dim), n_past, head_dim, scratch, out);
}

#[inline(always)]
pub(crate) fn attention_f16<I: Isa>(
    q: &[f32],
    k: &[f16],
    v: &[f16],
    n_past: usize,
    head_dim: usize,
    scratch: &mut [f32],
    out: &mut [f32],
) {
    attention::<I, _>(q, &Floats::new(k, v, head_dim), n_past, head_dim, scratch, out);
}

#[inline(always)]
pub(crate) fn attention_q8<I: Isa>(
    q: &[f32],
    k: (&[i8], &[f16]),
    v: (&[i8], &[f16]),
    n_past: usize,
    head_dim: usize,
    scratch: &mut [f32],
    out: &mut [f32],
) {
    let (k, k_scales, v_scales) = (k.0.as_chunks().0, k.1.as_chunks().0, v.1.as_chunks().0);
    let source = Quantized { k, v: v.0, k_scales, v_scales, head_dim };
    attention::<I, _>(q, &source, n_past, head_dim, scratch, out);
}

#[inline(always)]
fn attention<I: Isa, S: Source>(
    q: &[f32], // [n_query, head_dim]
    source: &S,
    n_past: usize,
    head_dim: usize,
    scratch: &mut [f32], // at least [2, BLOCK, head_dim]
    out: &mut [f32],     // [n_query, head_dim]
) {
    assert!(head_dim > 0 && q.len() == out.len() && q.len().is_multiple_of(head_dim));
    assert!(scratch.len() >= attention_scratch_len(head_dim));
    let n_query = q.len() / head_dim;
    assert!(source.n_group() >= (n_past + n_query).div_ceil(KEY_GROUP));
    if n_query < QUERIES {
        for i in 0..n_query {
            let at = i * head_dim..(i + 1) * head_dim;
            let mut state = [State::new()];
            out[at.clone()].fill(0.0);
            for first in (0..=n_past + i).step_by(BLOCK) {
                let (q, out) = (&q[at.clone()], &mut out[at.clone()]);
                attend::<I, S, 1>(q, source, first, first, n_past + i, head_dim, &mut state, out);
            }
            finish(&state, head_dim, &mut out[at]);
        }
        return;
    }
    for start in (0..n_query).step_by(QUERY_TILE) {
        let end = n_query.min(start + QUERY_TILE);
        let at = start * head_dim..end * head_dim;
        attend_tile::<I, S>(&q[at.clone()], source, n_past + start, head_dim, scratch, &mut out[at]);
    }
}

/// Up to [`QUERY_TILE`] queries at positions `n_past..` over the same keys and values, widened once a block.
#[inline(always)]
fn attend_tile<I: Isa, S: Source>(
    q: &[f32], // [n_query, head_dim]
    source: &S,
    n_past: usize,
    head_dim: usize,
    scratch: &mut [f32], // at least [2, BLOCK, head_dim]
    out: &mut [f32],     // [n_query, head_dim]
) {
    let n_query = q.len() / head_dim;
    let (k, v) = scratch.split_at_mut(BLOCK * head_dim);
    let mut state = [const { State::new() }; QUERY_TILE];
    out.fill(0.0);
    let n_kv = n_past + n_query;
    for first in (0..n_kv).step_by(BLOCK) {
        for (i, key) in k.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
            // Groups past the last are masked, so any will do.
            let group = (first / KEY_GROUP + i / head_dim).min(source.n_group() - 1);
            *key = source.keys::<I>(group, i % head_dim);
        }
        for (i, value) in v[..BLOCK.min(n_kv - first) * head_dim].chunks_exact_mut(head_dim).enumerate() {
            let (whole, rest) = value.as_chunks_mut::<LANES>();
            let n_whole = whole.len();
            for (part, value) in whole.iter_mut().enumerate() {
                *value = source.values::<I>(first + i, part * LANES);
            }
            for (j, value) in rest.iter_mut().enumerate() {
                *value = source.value::<I>(first + i, n_whole * LANES + j);
            }
        }
        let block = Floats::new(&*k, &*v, head_dim);
        let mut i = 0;
        while i + QUERIES <= n_query {
            let at = i * head_dim..(i + QUERIES) * head_dim;
            if let Some(state) = state[i..].first_chunk_mut() {
                let (q, out) = (&q[at.clone()], &mut out[at]);
                attend::<I, _, QUERIES>(q, &block, 0, first, n_past + i, head_dim, state, out);
            }
            i += QUERIES;
        }
        for i in i..n_query {
            let at = i * head_dim..(i + 1) * head_dim;
            let state = std::array::from_mut(&mut state[i]);
            attend::<I, _, 1>(&q[at.clone()], &block, 0, first, n_past + i, head_dim, state, &mut out[at]);
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

/// `Q` queries at positions `n_past..` over the block of keys that begins at position `first`, which is `at` in `source`.
#[inline(always)]
fn attend<I: Isa, S: Source, const Q: usize>(
    q: &[f32], // [Q, head_dim]
    source: &S,
    at: usize,
    first: usize,
    n_past: usize,
    head_dim: usize,
    state: &mut [State; Q],
    out: &mut [f32], // [Q, head_dim]
) {
    // A block that begins after the last query's position has nothing to show.
    let Some(n_key) = (n_past + Q).checked_sub(first).map(|n| n.min(BLOCK)).filter(|&n| n > 0) else { return };
    let mut p = [[0.0f32; BLOCK]; Q];
    scores::<I, S, Q>(q, source, at / KEY_GROUP, head_dim, &mut p);
    for i in 0..Q {
        let visible = (n_past + i + 1).saturating_sub(first);
        if visible < BLOCK {
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
        state[i].sum = I::madd(state[i].sum, correction, sum_map(BLOCK, |key| row[key]));
        if correction != 1.0 {
            for o in &mut out[i * head_dim..(i + 1) * head_dim] {
                *o *= correction;
            }
        }
        state[i].max = new_max;
    }
    let mut column = 0;
    while column + GROUPS * LANES <= head_dim {
        weighted_sum::<I, S, Q, GROUPS>(&p, source, at, n_key, head_dim, column, out);
        column += GROUPS * LANES;
    }
    while column + LANES <= head_dim {
        weighted_sum::<I, S, Q, 1>(&p, source, at, n_key, head_dim, column, out);
        column += LANES;
    }
    for column in column..head_dim {
        for key in 0..n_key {
            let value = source.value::<I>(at + key, column);
            for i in 0..Q {
                out[i * head_dim + column] = I::madd(p[i][key], value, out[i * head_dim + column]);
            }
        }
    }
}

/// Scores of `Q` queries against the block of keys whose first group is `first_group`: sixteen sums of four registers in flight
/// for four queries.
#[inline(always)]
fn scores<I: Isa, S: Source, const Q: usize>(
    q: &[f32], // [Q, head_dim]
    source: &S,
    first_group: usize,
    head_dim: usize,
    p: &mut [[f32; BLOCK]; Q],
) {
    let mut acc = [[[0.0f32; LANES]; GROUPS]; Q];
    // A block may reach past the end of the cache; those groups are masked by the caller, so any keys will do.
    let last_group = source.n_group() - 1;
    let mut groups = [0; GROUPS];
    for w in 0..GROUPS {
        groups[w] = (first_group + w).min(last_group);
    }
    let mut queries: [&[f32]; Q] = [&[]; Q];
    for i in 0..Q {
        queries[i] = &q[i * head_dim..(i + 1) * head_dim];
    }
    for d in 0..head_dim {
        for w in 0..GROUPS {
            let keys = source.keys::<I>(groups[w], d);
            for i in 0..Q {
                madd_lanes::<I>(&mut acc[i][w], &[queries[i][d]; LANES], &keys);
            }
        }
    }
    for i in 0..Q {
        p[i].copy_from_slice(acc[i].as_flattened());
    }
}

/// Adds to `W` registers of each output row, from `column` on, the values weighted by `p`.
#[inline(always)]
fn weighted_sum<I: Isa, S: Source, const Q: usize, const W: usize>(
    p: &[[f32; BLOCK]; Q],
    source: &S,
    at: usize,
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
        for w in 0..W {
            let value = source.values::<I>(at + key, column + w * LANES);
            for i in 0..Q {
                madd_lanes::<I>(&mut acc[i][w], &[p[i][key]; LANES], &value);
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
        (0usize..200, 1usize..10, 1usize..90).prop_flat_map(|(n_past, n_query, head_dim)| {
            let n = (2 * (n_past + n_query) + n_query) * head_dim;
            (Just(n_past), Just(n_query), Just(head_dim), prop::collection::vec(-1.0f32..1.0, n))
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Error bound: 2e-5 absolute on values in -1..1, for both cache types against the values the cache really holds.
        #[test]
        fn every_isa_attends_to_the_visible_keys_only((n_past, n_query, head_dim, data) in case()) {
            let n_kv = n_past + n_query;
            let (q, kv) = data.split_at(n_query * head_dim);
            let rounded: Vec<f32> = kv.iter().map(|&x| f16::from_f32(x).to_f32()).collect();
            let (k, v) = rounded.split_at(n_kv * head_dim);
            // Whatever lies past the last position must not matter.
            let mut k32 = vec![f32::NAN; key_cache_len(n_kv, head_dim)];
            for j in 0..n_kv {
                for d in 0..head_dim {
                    k32[key_index(j, d, head_dim)] = k[j * head_dim + d];
                }
            }
            let k16: Vec<f16> = k32.iter().map(|&x| f16::from_f32(x)).collect();
            let v16: Vec<f16> = v.iter().map(|&x| f16::from_f32(x)).collect();
            let mut scratch = vec![f32::NAN; attention_scratch_len(head_dim)];
            for kernels in Kernels::supported() {
                let mut out32 = vec![0.0; q.len()];
                kernels.attention_f32(q, &k32, v, n_past, head_dim, &mut scratch, &mut out32);
                let mut out16 = vec![0.0; q.len()];
                kernels.attention_f16(q, &k16, &v16, n_past, head_dim, &mut scratch, &mut out16);
                for i in 0..n_query {
                    let at = i * head_dim..(i + 1) * head_dim;
                    let want = reference(&q[at.clone()], k, v, n_past + i + 1);
                    for ((a, b), want) in out32[at.clone()].iter().zip(&out16[at]).zip(want) {
                        prop_assert!((f64::from(*a) - want).abs() <= 2e-5, "{} f32: {a} for {want}", kernels.isa());
                        prop_assert!((f64::from(*b) - want).abs() <= 2e-5, "{} f16: {b} for {want}", kernels.isa());
                    }
                }
            }
        }
    }
}
