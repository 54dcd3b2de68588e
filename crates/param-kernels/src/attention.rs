//! Causal attention of one head for a tile of queries: scores, online softmax and weighted sum of values, fused in blocks
//! of keys. Keys are stored in groups of 16 positions, so that one register holds the scores of 16 keys.

use crate::isa::{Isa, LANES, Lanes, madd_lanes, sum_map};
use crate::math::exp;
use crate::softmax::max;
use half::f16;

/// Positions interleaved in the key cache.
pub const KEY_GROUP: usize = LANES;

/// Elements a key cache of one head needs for `n_ctx` positions (the last group is whole).
pub const fn key_cache_len(n_ctx: usize, head_dim: usize) -> usize {
    n_ctx.next_multiple_of(KEY_GROUP) * head_dim
}

/// Where component `d` of the key at `position` lies in the cache of one head: [n_ctx / 16, head_dim, 16].
pub const fn key_index(position: usize, d: usize, head_dim: usize) -> usize {
    (position / KEY_GROUP * head_dim + d) * KEY_GROUP + position % KEY_GROUP
}

/// Keys per step of the online softmax.
const BLOCK: usize = 64;
const GROUPS: usize = BLOCK / KEY_GROUP;
/// Queries that share one pass over keys and values.
const TILE: usize = 4;

/// A type the cache is stored in.
pub(crate) trait Cached: Copy {
    fn widen<I: Isa>(x: &[Self; LANES]) -> Lanes;
    fn widen_one(self) -> f32;
}

impl Cached for f32 {
    #[inline(always)]
    fn widen<I: Isa>(x: &[f32; LANES]) -> Lanes {
        *x
    }

    #[inline(always)]
    fn widen_one(self) -> f32 {
        self
    }
}

impl Cached for f16 {
    #[inline(always)]
    fn widen<I: Isa>(x: &[f16; LANES]) -> Lanes {
        I::widen(x)
    }

    #[inline(always)]
    fn widen_one(self) -> f32 {
        self.to_f32()
    }
}

#[inline(always)]
pub(crate) fn attention_f32<I: Isa>(q: &[f32], k: &[f32], v: &[f32], n_past: usize, head_dim: usize, out: &mut [f32]) {
    attention::<I, f32>(q, k, v, n_past, head_dim, out);
}

#[inline(always)]
pub(crate) fn attention_f16<I: Isa>(q: &[f32], k: &[f16], v: &[f16], n_past: usize, head_dim: usize, out: &mut [f32]) {
    attention::<I, f16>(q, k, v, n_past, head_dim, out);
}

#[inline(always)]
fn attention<I: Isa, T: Cached>(
    q: &[f32],       // [n_query, head_dim]
    k: &[T],         // [n_ctx / 16, head_dim, 16]
    v: &[T],         // [n_ctx, head_dim]
    n_past: usize,   //
    head_dim: usize, //
    out: &mut [f32], // [n_query, head_dim]
) {
    assert!(head_dim > 0 && q.len() == out.len() && q.len().is_multiple_of(head_dim));
    let n_kv = n_past + q.len() / head_dim;
    assert!(k.len() >= key_cache_len(n_kv, head_dim) && v.len() >= n_kv * head_dim);
    let tile = TILE * head_dim;
    let n_tile = q.len() / tile;
    for i in 0..n_tile {
        let at = i * tile..(i + 1) * tile;
        attend::<I, T, TILE, 2>(&q[at.clone()], k, v, n_past + i * TILE, head_dim, &mut out[at]);
    }
    for i in n_tile * TILE..q.len() / head_dim {
        let at = i * head_dim..(i + 1) * head_dim;
        attend::<I, T, 1, 4>(&q[at.clone()], k, v, n_past + i, head_dim, &mut out[at]);
    }
}

/// `Q` queries at positions `n_past..`, with `W` registers of each in flight: `Q * W` independent chains of multiply-adds.
#[inline(always)]
fn attend<I: Isa, T: Cached, const Q: usize, const W: usize>(
    q: &[f32],       // [Q, head_dim]
    k: &[T],         // [n_ctx / 16, head_dim, 16]
    v: &[T],         // [n_ctx, head_dim]
    n_past: usize,   //
    head_dim: usize, //
    out: &mut [f32], // [Q, head_dim]
) {
    let n_kv = n_past + Q;
    out.fill(0.0);
    let mut running_max = [f32::NEG_INFINITY; Q];
    let mut running_sum = [0.0f32; Q];
    for first in (0..n_kv).step_by(BLOCK) {
        let n_key = BLOCK.min(n_kv - first);
        let mut p = [[0.0f32; BLOCK]; Q];
        for group in (0..GROUPS).step_by(W) {
            if group * KEY_GROUP < n_key {
                scores::<I, T, Q, W>(q, k, first / KEY_GROUP + group, head_dim, group, &mut p);
            }
        }
        for i in 0..Q {
            let visible = (n_past + i + 1).saturating_sub(first);
            for (key, p) in p[i].iter_mut().enumerate() {
                *p = if key < visible { *p } else { f32::NEG_INFINITY };
            }
            let new_max = running_max[i].max(max::<I>(&p[i]));
            // A row whose scores are NaN or all -inf: subtracting 0 instead keeps -inf at weight 0 and lets NaN through.
            let base = if new_max == f32::NEG_INFINITY { 0.0 } else { new_max };
            for p in &mut p[i] {
                *p = exp::<I>(*p - base);
            }
            let row = &p[i];
            let correction = exp::<I>(running_max[i] - base);
            running_sum[i] = I::madd(running_sum[i], correction, sum_map(BLOCK, |key| row[key]));
            if correction != 1.0 {
                for o in &mut out[i * head_dim..(i + 1) * head_dim] {
                    *o *= correction;
                }
            }
            running_max[i] = new_max;
        }
        let values = &v[first * head_dim..(first + n_key) * head_dim];
        let mut column = 0;
        while column + W * LANES <= head_dim {
            weighted_sum::<I, T, Q, W>(&p, values, head_dim, column, out);
            column += W * LANES;
        }
        while column + LANES <= head_dim {
            weighted_sum::<I, T, Q, 1>(&p, values, head_dim, column, out);
            column += LANES;
        }
        for column in column..head_dim {
            for i in 0..Q {
                let mut acc = out[i * head_dim + column];
                for key in 0..n_key {
                    acc = I::madd(p[i][key], values[key * head_dim + column].widen_one(), acc);
                }
                out[i * head_dim + column] = acc;
            }
        }
    }
    for i in 0..Q {
        let inverse = 1.0 / running_sum[i];
        for o in &mut out[i * head_dim..(i + 1) * head_dim] {
            *o *= inverse;
        }
    }
}

/// Scores of `Q` queries against `W` groups of keys, from group `first_group` of the cache to group `group` of `p`.
#[inline(always)]
fn scores<I: Isa, T: Cached, const Q: usize, const W: usize>(
    q: &[f32],
    k: &[T],
    first_group: usize,
    head_dim: usize,
    group: usize,
    p: &mut [[f32; BLOCK]; Q],
) {
    let mut acc = [[[0.0f32; LANES]; W]; Q];
    let (k, _) = k.as_chunks::<KEY_GROUP>();
    // A block may reach past the end of the cache; those groups are masked by the caller, so any keys will do.
    let last_group = k.len() / head_dim - 1;
    let k: [&[[T; KEY_GROUP]]; W] = std::array::from_fn(|w| {
        let start = (first_group + w).min(last_group) * head_dim;
        &k[start..start + head_dim]
    });
    for d in 0..head_dim {
        for w in 0..W {
            let keys = T::widen::<I>(&k[w][d]);
            for i in 0..Q {
                madd_lanes::<I>(&mut acc[i][w], &[q[i * head_dim + d]; LANES], &keys);
            }
        }
    }
    for i in 0..Q {
        for w in 0..W {
            let start = (group + w) * KEY_GROUP;
            p[i][start..start + KEY_GROUP].copy_from_slice(&acc[i][w]);
        }
    }
}

/// Adds to `W` registers of each output row, from `column` on, the values weighted by `p`.
#[inline(always)]
fn weighted_sum<I: Isa, T: Cached, const Q: usize, const W: usize>(
    p: &[[f32; BLOCK]; Q],
    values: &[T], // [n_key, head_dim]
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
    for (key, row) in values.chunks_exact(head_dim).enumerate() {
        let (row, _) = row[column..column + W * LANES].as_chunks::<LANES>();
        for w in 0..W {
            let value = T::widen::<I>(&row[w]);
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
            for kernels in Kernels::supported() {
                let mut out32 = vec![0.0; q.len()];
                kernels.attention_f32(q, &k32, v, n_past, head_dim, &mut out32);
                let mut out16 = vec![0.0; q.len()];
                kernels.attention_f16(q, &k16, &v16, n_past, head_dim, &mut out16);
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
