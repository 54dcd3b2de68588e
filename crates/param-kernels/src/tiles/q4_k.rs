//! Q4_K in tiles: per 256 columns, 16 f16 scales and 16 f16 minima, the 12 bytes of six-bit scales and minima of 16 rows byte by
//! byte, then 4 pairs of blocks in 8 steps of 16 rows by 4 columns, the first block of a pair in the low nibbles.

use super::registers::{Registers, Step};
use super::{ActivationBlock, BLOCK, STEP, Sharing, TILE_ROWS, blocked, store, twice};
use crate::isa::Isa;
use std::ops::Range;

pub(super) const N_ELEMENT: usize = 256;
/// Blocks that share the two f16.
const N_BLOCK: usize = N_ELEMENT / BLOCK;
const SIX_BIT: usize = 12;
/// Bytes as GGUF stores 256 elements: two f16, the six-bit scales and minima, the nibbles.
pub(super) const STORED: usize = 4 + SIX_BIT + N_ELEMENT / 2;
/// Bytes of 256 elements of 16 rows.
pub(super) const PACKED: usize = TILE_ROWS * STORED;
const HALVES: usize = 2 * TILE_ROWS;
/// Bytes before the nibbles.
const HEAD: usize = 2 * HALVES + SIX_BIT * TILE_ROWS;

/// Puts a stored row into lane `lane` of a tile.
pub(super) fn pack(row: &[u8], lane: usize, tile: &mut [u8]) {
    for (stored, packed) in row.as_chunks::<STORED>().0.iter().zip(tile.as_chunks_mut::<PACKED>().0) {
        packed[2 * lane..2 * lane + 2].copy_from_slice(&stored[..2]);
        packed[HALVES + 2 * lane..HALVES + 2 * lane + 2].copy_from_slice(&stored[2..4]);
        let (six_bit, nibbles) = stored[4..].split_at(SIX_BIT);
        let (packed_six_bit, steps) = packed[2 * HALVES..].split_at_mut(SIX_BIT * TILE_ROWS);
        for (i, &byte) in six_bit.iter().enumerate() {
            packed_six_bit[i * TILE_ROWS + lane] = byte;
        }
        for (step, q) in steps.as_chunks_mut::<STEP>().0.iter_mut().zip(nibbles.as_chunks::<4>().0) {
            step[4 * lane..4 * lane + 4].copy_from_slice(q);
        }
    }
}

/// Scales and minima of a block in 16 rows.
type Scales = [[u8; TILE_ROWS]; 2];

/// Those of the 8 blocks, from ggml's packing (`get_scale_min_k4`) of 16 rows, [12, 16].
#[inline(always)]
fn scales_and_minima(six_bit: &[[u8; TILE_ROWS]]) -> [Scales; N_BLOCK] {
    let mut all = [[[0; TILE_ROWS]; 2]; N_BLOCK];
    for j in 0..N_BLOCK / 2 {
        for lane in 0..TILE_ROWS {
            let (a, b, c) = (six_bit[j][lane], six_bit[j + 4][lane], six_bit[j + 8][lane]);
            (all[j][0][lane], all[j][1][lane]) = (a & 63, b & 63);
            (all[j + 4][0][lane], all[j + 4][1][lane]) = (c & 15 | a >> 6 << 4, c >> 4 | b >> 6 << 4);
        }
    }
    all
}

/// One tile always: what unpacking its scales costs is best shared by eight tokens, however many there are.
const SHARING: Sharing = Sharing { one_tile: usize::MAX, eight_tokens: true };

/// See [`super::TileFormat::matmul`].
#[inline(always)]
pub(crate) fn matmul<I: Isa>(tiles: &[u8], n_tile: usize, x: &[&[ActivationBlock]], out: &mut [f32]) {
    assert!(x.iter().all(|x| x.len().is_multiple_of(N_BLOCK)));
    blocked!(I, rows [], SHARING, tiles, n_tile, x, out);
}

#[inline(always)]
fn rows<I: Isa, const R: usize, const T: usize, const FIRST: bool>(
    tiles: [&[u8]; R],
    x: &[&[ActivationBlock]; T], // [T, n_col / 32]
    out: &mut [f32],             // [T, R * 16], tokens `width` apart
    width: usize,
) {
    let n = x[0].len() / N_BLOCK;
    let mut blocks: [&[[u8; PACKED]]; R] = [&[]; R];
    for r in 0..R {
        blocks[r] = &tiles[r].as_chunks().0[..n];
    }
    let mut rows: [&[[ActivationBlock; N_BLOCK]]; T] = [&[]; T];
    for t in 0..T {
        rows[t] = &x[t].as_chunks().0[..n];
    }
    let mut acc = [[I::Tile::splat(0.0); R]; T];
    for b in 0..n {
        let mut scales = [[[[0; TILE_ROWS]; 2]; N_BLOCK]; R];
        let mut halves = [[I::Tile::splat(0.0); 2]; R];
        let mut steps: [&[Step]; R] = [&[]; R];
        for r in 0..R {
            let (head, rest) = blocks[r][b].split_at(HEAD);
            let (f16s, six_bit) = head.split_at(2 * HALVES);
            let (f16s, _) = f16s.as_chunks::<HALVES>();
            halves[r] = [I::Tile::halves(&f16s[0]), I::Tile::halves(&f16s[1])];
            scales[r] = scales_and_minima(six_bit.as_chunks().0);
            steps[r] = rest.as_chunks().0;
            if FIRST {
                head.as_chunks::<STEP>().0.iter().for_each(I::Tile::prefetch);
            }
        }
        let mut x = [&rows[0][b]; T];
        for t in 1..T {
            x[t] = &rows[t][b];
        }
        if twice::<I, T>() {
            for pair in 0..N_BLOCK / 2 {
                multiply::<I, R, T, FIRST>(&mut acc, &halves, &scales, &steps, x, pair, 0..2);
            }
        } else {
            for j in 0..N_BLOCK {
                if j % 2 == 0 {
                    multiply::<I, R, T, FIRST>(&mut acc, &halves, &scales, &steps, x, j / 2, 0..1);
                } else {
                    multiply::<I, R, T, false>(&mut acc, &halves, &scales, &steps, x, j / 2, 1..2);
                }
            }
        }
    }
    store::<I::Tile, R, T>(acc, out, width);
}

/// Adds the products of the `blocks` of a pair.
#[inline(always)]
fn multiply<I: Isa, const R: usize, const T: usize, const FIRST: bool>(
    acc: &mut [[<I::Tile as Registers>::Floats; R]; T],
    halves: &[[<I::Tile as Registers>::Floats; 2]; R],
    scales: &[[Scales; N_BLOCK]; R],
    steps: &[&[Step]; R],
    x: [&[ActivationBlock; N_BLOCK]; T],
    pair: usize,
    blocks: Range<usize>,
) {
    let mut dots = [[[I::Tile::start::<0>(0); R]; T]; 2];
    for step in 0..BLOCK / 4 {
        let at = pair * (BLOCK / 4) + step;
        if FIRST {
            steps.iter().for_each(|steps| I::Tile::prefetch(&steps[at]));
        }
        let mut w = [I::Tile::nibbles(I::Tile::bytes(&steps[0][at])); R];
        for r in 1..R {
            w[r] = I::Tile::nibbles(I::Tile::bytes(&steps[r][at]));
        }
        for half in blocks.clone() {
            for t in 0..T {
                let x = I::Tile::quad(&x[t][2 * pair + half].q[step]);
                for r in 0..R {
                    dots[half][t][r] = I::Tile::dot(dots[half][t][r], w[r][half], x);
                }
            }
        }
    }
    for half in blocks {
        let j = 2 * pair + half;
        for r in 0..R {
            let scale = I::Tile::mul(halves[r][0], I::Tile::unsigned(&scales[r][j][0]));
            let minimum = I::Tile::mul(halves[r][1], I::Tile::unsigned(&scales[r][j][1]));
            for t in 0..T {
                let x = &x[t][j];
                let scale = I::Tile::mul(scale, I::Tile::splat(x.scale));
                acc[t][r] = I::Tile::madd(I::Tile::to_floats(dots[half][t][r]), scale, acc[t][r]);
                acc[t][r] = I::Tile::madd(minimum, I::Tile::splat(x.minus_scaled_sum), acc[t][r]);
            }
        }
    }
}
