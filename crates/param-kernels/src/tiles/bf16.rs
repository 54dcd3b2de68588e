//! bf16 in tiles: steps of two columns of 16 rows, multiplied by bf16 and summed in f32.

use super::activation::to_bf16;
use super::registers::{Registers, Step};
use super::{STEP, TURN, blocked, store, twice};
use crate::isa::Isa;
use half::f16;

/// Puts a stored row of bf16 into lane `lane` of a tile.
pub(super) fn pack(row: &[u8], lane: usize, tile: &mut [u8]) {
    for (pair, step) in row.chunks(4).zip(tile.as_chunks_mut::<STEP>().0) {
        step[4 * lane..4 * lane + pair.len()].copy_from_slice(pair);
    }
}

/// The same from a row of f16, rounded.
pub(super) fn pack_f16(row: &[u8], lane: usize, tile: &mut [u8]) {
    for (pair, step) in row.chunks(4).zip(tile.as_chunks_mut::<STEP>().0) {
        for (i, &half) in pair.as_chunks::<2>().0.iter().enumerate() {
            let rounded = to_bf16(f16::from_le_bytes(half).to_f32()) as u16;
            step[4 * lane + 2 * i..4 * lane + 2 * i + 2].copy_from_slice(&rounded.to_le_bytes());
        }
    }
}

/// See [`super::TileFormat::matmul`].
#[inline(always)]
pub(crate) fn matmul<I: Isa>(tiles: &[u8], n_tile: usize, x: &[&[u32]], out: &mut [f32]) {
    blocked!(I, rows [], tiles, n_tile, x, out);
}

/// Steps whose products are summed apart: a dot product waits for the one before it.
const CHAINS: usize = 2;

#[inline(always)]
fn rows<I: Isa, const R: usize, const T: usize, const FIRST: bool>(
    tiles: [&[u8]; R],
    x: &[&[u32]; T], // [T, n_col / 2]
    out: &mut [f32], // [T, R * 16], tokens `width` apart
    width: usize,
) {
    let n = x[0].len();
    let mut steps: [&[Step]; R] = [&[]; R];
    for r in 0..R {
        steps[r] = &tiles[r].as_chunks().0[..n];
    }
    let mut acc = [[[I::Tile::splat(0.0); R]; T]; CHAINS];
    let n_pair = n / CHAINS;
    if twice::<I, T>() {
        for pair in 0..n_pair {
            for chain in 0..CHAINS {
                multiply::<I, R, T, FIRST>(&mut acc[chain], &steps, x, pair * CHAINS + chain);
            }
        }
    } else {
        let mut rows = *x;
        for t in 0..T {
            rows[t] = &x[t][..n];
        }
        for turn in 0..n_pair.div_ceil(TURN) * CHAINS {
            let (chain, first) = (turn % CHAINS, turn / CHAINS * TURN);
            let mut sums = acc[chain];
            for pair in first..(first + TURN).min(n_pair) {
                multiply::<I, R, T, FIRST>(&mut sums, &steps, &rows, pair * CHAINS + chain);
            }
            acc[chain] = sums;
        }
    }
    if !n.is_multiple_of(CHAINS) {
        multiply::<I, R, T, FIRST>(&mut acc[0], &steps, x, n - 1);
    }
    let mut sums = acc[0];
    for t in 0..T {
        for r in 0..R {
            sums[t][r] = I::Tile::madd(acc[1][t][r], I::Tile::splat(1.0), acc[0][t][r]);
        }
    }
    store::<I::Tile, R, T>(sums, out, width);
}

/// Adds the products of step `i`.
#[inline(always)]
fn multiply<I: Isa, const R: usize, const T: usize, const FIRST: bool>(
    acc: &mut [[<I::Tile as Registers>::Floats; R]; T],
    steps: &[&[Step]; R],
    x: &[&[u32]; T],
    i: usize,
) {
    if FIRST {
        steps.iter().for_each(|steps| I::Tile::prefetch(&steps[i]));
    }
    for r in 0..R {
        for t in 0..T {
            acc[t][r] = I::Tile::dot_brains(acc[t][r], &steps[r][i], x[t][i]);
        }
    }
}
