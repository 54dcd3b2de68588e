//! Q4_K in tiles: per 256 columns, 16 f16 scales and 16 f16 minima, the 12 bytes of six-bit scales and minima of 16 rows byte by
//! byte, then 4 pairs of blocks in 8 steps of 16 rows by 4 columns, the first block of a pair in the low nibbles.

use super::int8::Int8;
use super::{ActivationBlock, BLOCK, TILE_ROWS, by_tokens};
use crate::isa::Isa;

const N_ELEMENT: usize = 256;
/// Blocks that share the two f16.
const N_BLOCK: usize = N_ELEMENT / BLOCK;
const SIX_BIT: usize = 12;
/// Bytes as ggml stores 256 elements: two f16, the six-bit scales and minima, the nibbles.
pub(super) const STORED: usize = 4 + SIX_BIT + N_ELEMENT / 2;
/// Bytes of 256 elements of 16 rows.
pub(super) const PACKED: usize = TILE_ROWS * STORED;
const HALVES: usize = 2 * TILE_ROWS;
const STEP: usize = 4 * TILE_ROWS;

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

/// Scales and minima of the 8 blocks, [8, 16], from ggml's packing (`get_scale_min_k4`) of 16 rows, [12, 16].
#[inline(always)]
fn scales_and_minima(six_bit: &[u8; SIX_BIT * TILE_ROWS]) -> [[[u8; TILE_ROWS]; N_BLOCK]; 2] {
    let (bytes, _) = six_bit.as_chunks::<TILE_ROWS>();
    let (mut scales, mut minima) = ([[0; TILE_ROWS]; N_BLOCK], [[0; TILE_ROWS]; N_BLOCK]);
    for j in 0..N_BLOCK / 2 {
        for lane in 0..TILE_ROWS {
            let (a, b, c) = (bytes[j][lane], bytes[j + 4][lane], bytes[j + 8][lane]);
            (scales[j][lane], minima[j][lane]) = (a & 63, b & 63);
            (scales[j + 4][lane], minima[j + 4][lane]) = (c & 15 | a >> 6 << 4, c >> 4 | b >> 6 << 4);
        }
    }
    [scales, minima]
}

/// See [`super::TileFormat::matmul`].
#[inline(always)]
pub(crate) fn matmul<I: Isa>(tile: &[u8], x: &[&[ActivationBlock]], out: &mut [[f32; TILE_ROWS]]) {
    let (blocks, rest) = tile.as_chunks::<PACKED>();
    assert!(rest.is_empty() && x.iter().all(|x| x.len() == blocks.len() * N_BLOCK));
    by_tokens!(I, rows, blocks, x, out);
}

#[inline(always)]
fn rows<I: Isa, const T: usize>(
    blocks: &[[u8; PACKED]],         // [n_col / 256]
    x: &[&[ActivationBlock]; T],     // [T, n_col / 32]
    out: &mut [[f32; TILE_ROWS]; T], // [T, 16]
) {
    let x = x.map(|x| &x.as_chunks::<N_BLOCK>().0[..blocks.len()]);
    let mut acc = [I::Int8::floats(&[0.0; TILE_ROWS]); T];
    for (b, block) in blocks.iter().enumerate() {
        if T == 1 {
            I::Int8::prefetch(block);
        }
        let (halves, rest) = block.split_at(2 * HALVES);
        let (six_bit, steps) = rest.split_first_chunk().unwrap_or_else(|| unreachable!());
        let (halves, _) = halves.as_chunks::<HALVES>();
        let (pairs, _) = steps.as_chunks::<STEP>().0.as_chunks::<{ BLOCK / 4 }>();
        let (d, d_min) = (I::Int8::halves(&halves[0]), I::Int8::halves(&halves[1]));
        let [scales, minima] = scales_and_minima(six_bit);
        for (pair, steps) in (0..N_BLOCK / 2).zip(pairs) {
            let (low, high) = (2 * pair, 2 * pair + 1);
            let mut dots = [[I::Int8::start(0); T]; 2];
            for (step, w) in steps.iter().enumerate() {
                let w = I::Int8::bytes(w);
                let (w_low, w_high) = (I::Int8::low_nibbles(w), I::Int8::high_nibbles(w));
                for t in 0..T {
                    dots[0][t] = I::Int8::dot_u4(dots[0][t], w_low, x[t][b][low].q[step]);
                    dots[1][t] = I::Int8::dot_u4(dots[1][t], w_high, x[t][b][high].q[step]);
                }
            }
            for (dots, j) in dots.iter().zip([low, high]) {
                let scale = I::Int8::mul(d, I::Int8::widen(&scales[j]));
                let minimum = I::Int8::mul(d_min, I::Int8::widen(&minima[j]));
                for t in 0..T {
                    let x = &x[t][b][j];
                    let scale = I::Int8::mul(scale, I::Int8::splat(x.scale));
                    acc[t] = I::Int8::madd(I::Int8::to_floats(dots[t]), scale, acc[t]);
                    acc[t] = I::Int8::madd(minimum, I::Int8::splat(-x.scaled_sum), acc[t]);
                }
            }
        }
    }
    for t in 0..T {
        out[t] = I::Int8::store(acc[t]);
    }
}
