//! Q6_K in tiles: the f16 scales of 16 rows per 256 columns; then per 256 columns the int8 scales of 16 blocks, each of 16 rows,
//! and two halves of 128 columns: 16 steps of 16 rows by 4 columns of low nibbles, 8 steps of the upper two bits.

use super::registers::{Registers, Step};
use super::{ActivationBlock, BLOCK, STEP, Sharing, TILE_ROWS, blocked, header, store};
use crate::isa::Isa;

pub(super) const N_ELEMENT: usize = 256;
/// Elements that share an int8 scale: half a block of activations.
const GROUP: usize = 16;
const N_GROUP: usize = N_ELEMENT / GROUP;
const N_LOW: usize = N_ELEMENT / 2;
const N_HIGH: usize = N_ELEMENT / 4;
/// Bytes as GGUF stores 256 elements: low nibbles, upper bits, int8 scales, the f16.
pub(super) const STORED: usize = N_LOW + N_HIGH + N_GROUP + 2;
/// Bytes of the f16 scales of 256 elements of 16 rows, and of the rest.
pub(super) const SCALES: usize = 2 * TILE_ROWS;
pub(super) const PACKED: usize = TILE_ROWS * (N_LOW + N_HIGH + N_GROUP);
/// Activation blocks in half of 256 columns.
const HALF: usize = N_ELEMENT / BLOCK / 2;

/// Puts a stored row into lane `lane` of a tile.
pub(super) fn pack(row: &[u8], lane: usize, tile: &mut [u8]) {
    let (blocks, _) = row.as_chunks::<STORED>();
    let (scales, rest) = tile.split_at_mut(header(blocks.len() * SCALES));
    let packed = scales.as_chunks_mut::<SCALES>().0.iter_mut().zip(rest.as_chunks_mut::<PACKED>().0);
    for (stored, (scale, packed)) in blocks.iter().zip(packed) {
        scale[2 * lane..2 * lane + 2].copy_from_slice(&stored[STORED - 2..]);
        let (groups, halves) = packed.split_at_mut(N_GROUP * TILE_ROWS);
        for (group, &scale) in stored[N_LOW + N_HIGH..STORED - 2].iter().enumerate() {
            groups[group * TILE_ROWS + lane] = scale;
        }
        let (low, high) = stored[..N_LOW + N_HIGH].split_at(N_LOW);
        let steps = halves.as_chunks_mut::<STEP>().0.chunks_exact_mut((N_LOW + N_HIGH) / 2 / 4);
        for ((steps, low), high) in steps.zip(low.chunks_exact(N_LOW / 2)).zip(high.chunks_exact(N_HIGH / 2)) {
            for (step, q) in steps.iter_mut().zip(low.as_chunks::<4>().0.iter().chain(high.as_chunks::<4>().0)) {
                step[4 * lane..4 * lane + 4].copy_from_slice(q);
            }
        }
    }
}

/// A product needs sums, weights and their parts at once: registers do not hold them for eight tokens.
const SHARING: Sharing = Sharing { eight_tokens: false, ..Sharing::USUAL };

/// See [`super::TileFormat::matmul`].
#[inline(always)]
pub(crate) fn matmul<I: Isa>(tiles: &[u8], n_tile: usize, x: &[&[ActivationBlock]], out: &mut [f32]) {
    assert!(x.iter().all(|x| x.len().is_multiple_of(2 * HALF)));
    blocked!(I, rows[], SHARING, tiles, n_tile, x, out);
}

#[inline(always)]
fn rows<I: Isa, const R: usize, const T: usize, const FIRST: bool>(
    tiles: [&[u8]; R],
    x: &[&[ActivationBlock]; T], // [T, n_col / 32]
    out: &mut [f32],             // [T, R * 16], tokens `width` apart
    width: usize,
) {
    let n = x[0].len() / (2 * HALF);
    let mut scales: [&[[u8; SCALES]]; R] = [&[]; R];
    let mut blocks: [&[[u8; PACKED]]; R] = [&[]; R];
    for r in 0..R {
        let (head, rest) = tiles[r].split_at(header(n * SCALES));
        (scales[r], blocks[r]) = (&head.as_chunks().0[..n], &rest.as_chunks().0[..n]);
        if FIRST {
            head.as_chunks::<STEP>().0.iter().for_each(I::Tile::prefetch);
        }
    }
    let mut acc = [[I::Tile::splat(0.0); R]; T];
    for b in 0..n {
        let mut groups: [&[[u8; TILE_ROWS]]; R] = [&[]; R];
        let mut steps: [&[Step]; R] = [&[]; R];
        for r in 0..R {
            let (head, rest) = blocks[r][b].split_at(N_GROUP * TILE_ROWS);
            (groups[r], steps[r]) = (head.as_chunks().0, rest.as_chunks().0);
            if FIRST {
                head.as_chunks::<STEP>().0.iter().for_each(I::Tile::prefetch);
            }
        }
        for half in 0..2 {
            let mut x_half: [&[ActivationBlock]; T] = [&[]; T];
            for t in 0..T {
                x_half[t] = &x[t][(2 * b + half) * HALF..(2 * b + half + 1) * HALF];
            }
            let first_step = half * (N_LOW + N_HIGH) / 8;
            for group in 0..2 {
                // Nibbles of the first 8 steps are the first and third block of 32 columns, those of the second the others.
                for nibbles in 0..2 {
                    let blocks = [nibbles, 2 + nibbles];
                    let mut dots = [[[I::Tile::start::<5>(0); R]; T]; 2];
                    for t in 0..T {
                        for i in 0..2 {
                            let x = &x_half[t][blocks[i]];
                            let minus_sum = if group == 0 { x.minus_low_sum } else { x.minus_sum - x.minus_low_sum };
                            dots[i][t] = [I::Tile::start::<5>(minus_sum); R];
                        }
                    }
                    for step in 0..GROUP / 4 {
                        let at = group * (GROUP / 4) + step;
                        let (low, high) = (first_step + 8 * nibbles + at, first_step + 16 + at);
                        if FIRST {
                            for steps in steps {
                                I::Tile::prefetch(&steps[low]);
                                I::Tile::prefetch(&steps[high]);
                            }
                        }
                        let mut w = [[I::Tile::bytes(&steps[0][low]); R]; 2];
                        for r in 0..R {
                            let low = I::Tile::nibbles(I::Tile::bytes(&steps[r][low]));
                            let high = I::Tile::bytes(&steps[r][high]);
                            (w[0][r], w[1][r]) = if nibbles == 0 {
                                (I::Tile::six_bits::<0>(low[0], high), I::Tile::six_bits::<2>(low[1], high))
                            } else {
                                (I::Tile::six_bits::<1>(low[0], high), I::Tile::six_bits::<3>(low[1], high))
                            };
                        }
                        for i in 0..2 {
                            for t in 0..T {
                                let x = I::Tile::quad(&x_half[t][blocks[i]].q[at]);
                                for r in 0..R {
                                    dots[i][t][r] = I::Tile::dot(dots[i][t][r], w[i][r], x);
                                }
                            }
                        }
                    }
                    for i in 0..2 {
                        for r in 0..R {
                            let scale = I::Tile::signed(&groups[r][half * 2 * HALF + blocks[i] * 2 + group]);
                            let scale = I::Tile::mul(I::Tile::halves(&scales[r][b]), scale);
                            for t in 0..T {
                                let scale = I::Tile::mul(scale, I::Tile::splat(x_half[t][blocks[i]].scale));
                                acc[t][r] = I::Tile::madd(I::Tile::to_floats(dots[i][t][r]), scale, acc[t][r]);
                            }
                        }
                    }
                }
            }
        }
    }
    store::<I::Tile, R, T>(acc, out, width);
}
