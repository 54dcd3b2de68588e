//! Q8_0 and Q4_0 in tiles: the f16 scales of 16 rows per 32 columns, then the elements per 32 columns in steps of 16 rows by 4
//! columns: bytes with 128 added, or nibbles with 8 added, the first 16 columns in the low ones.

use super::registers::{Registers, Step};
use super::{ActivationBlock, BLOCK, LINE, STEP, Sharing, TILE_ROWS, blocked, header, store};
use crate::isa::Isa;

/// Bytes of the scales of a block of 16 rows.
const SCALES: usize = 2 * TILE_ROWS;

/// How the elements of a block are stored.
pub(super) trait Elements {
    /// Bytes of a row's 32 elements.
    const BYTES: usize;
    /// What turns stored bytes into those of a tile.
    const FLIP: u8;

    fn start<G: Registers>(minus_sum: i32) -> G::Ints;
    /// Adds the products of a block: R tiles by T tokens.
    fn add<G: Registers, const R: usize, const T: usize, const FIRST: bool>(
        dots: &mut [[G::Ints; R]; T],
        steps: [&[Step]; R],
        x: [&ActivationBlock; T],
    );
}

pub(super) struct Bytes;

impl Elements for Bytes {
    const BYTES: usize = BLOCK;
    const FLIP: u8 = 0x80;

    #[inline(always)]
    fn start<G: Registers>(minus_sum: i32) -> G::Ints {
        G::start_offset(minus_sum)
    }

    #[inline(always)]
    fn add<G: Registers, const R: usize, const T: usize, const FIRST: bool>(
        dots: &mut [[G::Ints; R]; T],
        steps: [&[Step]; R],
        x: [&ActivationBlock; T],
    ) {
        for step in 0..BLOCK / 4 {
            if FIRST {
                steps.iter().for_each(|steps| G::prefetch(&steps[step]));
            }
            let mut w = [G::bytes(&steps[0][step]); R];
            for r in 1..R {
                w[r] = G::bytes(&steps[r][step]);
            }
            for t in 0..T {
                let x = G::quad(&x[t].q[step]);
                for r in 0..R {
                    dots[t][r] = G::dot_offset(dots[t][r], w[r], x);
                }
            }
        }
    }
}

pub(super) struct Nibbles;

impl Elements for Nibbles {
    const BYTES: usize = BLOCK / 2;
    const FLIP: u8 = 0;

    #[inline(always)]
    fn start<G: Registers>(minus_sum: i32) -> G::Ints {
        G::start::<3>(minus_sum)
    }

    #[inline(always)]
    fn add<G: Registers, const R: usize, const T: usize, const FIRST: bool>(
        dots: &mut [[G::Ints; R]; T],
        steps: [&[Step]; R],
        x: [&ActivationBlock; T],
    ) {
        for step in 0..BLOCK / 8 {
            if FIRST {
                steps.iter().for_each(|steps| G::prefetch(&steps[step]));
            }
            let mut w = [G::nibbles(G::bytes(&steps[0][step])); R];
            for r in 1..R {
                w[r] = G::nibbles(G::bytes(&steps[r][step]));
            }
            for half in 0..2 {
                for t in 0..T {
                    let x = G::quad(&x[t].q[half * BLOCK / 8 + step]);
                    for r in 0..R {
                        dots[t][r] = G::dot(dots[t][r], w[r][half], x);
                    }
                }
            }
        }
    }
}

/// Bytes of a tile of rows of `n` blocks.
pub(super) fn tile_bytes<E: Elements>(n: usize) -> usize {
    header(n * SCALES) + n * E::BYTES * TILE_ROWS
}

/// Bytes as GGUF stores a block: an f16 scale, then the elements.
pub(super) const fn stored<E: Elements>() -> usize {
    2 + E::BYTES
}

/// Puts a stored row into lane `lane` of a tile.
pub(super) fn pack<E: Elements>(row: &[u8], lane: usize, tile: &mut [u8]) {
    let n = row.len() / stored::<E>();
    let (scales, quants) = tile.split_at_mut(header(n * SCALES));
    let packed = scales.as_chunks_mut::<SCALES>().0.iter_mut().zip(quants.chunks_exact_mut(E::BYTES * TILE_ROWS));
    for (stored, (scales, quants)) in row.chunks_exact(stored::<E>()).zip(packed) {
        scales[2 * lane..2 * lane + 2].copy_from_slice(&stored[..2]);
        for (step, q) in quants.as_chunks_mut::<STEP>().0.iter_mut().zip(stored[2..].as_chunks::<4>().0) {
            step[4 * lane..4 * lane + 4].copy_from_slice(&q.map(|q| q ^ E::FLIP));
        }
    }
}

/// See [`super::TileFormat::matmul`].
#[inline(always)]
pub(crate) fn matmul_q8_0<I: Isa>(tiles: &[u8], n_tile: usize, x: &[&[ActivationBlock]], out: &mut [f32]) {
    blocked!(I, rows[Bytes], Sharing::USUAL, tiles, n_tile, x, out);
}

/// See [`super::TileFormat::matmul`].
#[inline(always)]
pub(crate) fn matmul_q4_0<I: Isa>(tiles: &[u8], n_tile: usize, x: &[&[ActivationBlock]], out: &mut [f32]) {
    blocked!(I, rows[Nibbles], Sharing::USUAL, tiles, n_tile, x, out);
}

#[inline(always)]
fn rows<E: Elements, I: Isa, const R: usize, const T: usize, const FIRST: bool>(
    tiles: [&[u8]; R],
    x: &[&[ActivationBlock]; T], // [T, n_col / 32]
    out: &mut [f32],             // [T, R * 16], tokens `width` apart
    width: usize,
) {
    let n = x[0].len();
    let steps_per_block = E::BYTES / 4;
    let mut scales: [&[[u8; SCALES]]; R] = [&[]; R];
    let mut quants: [&[Step]; R] = [&[]; R];
    for r in 0..R {
        let (head, rest) = tiles[r].split_at(header(n * SCALES));
        (scales[r], quants[r]) = (&head.as_chunks().0[..n], &rest.as_chunks().0[..n * steps_per_block]);
        if FIRST {
            // What the quants of this tile, looking ahead, will not have asked for.
            head.as_chunks::<LINE>().0.iter().for_each(I::Tile::prefetch);
        }
    }
    let mut acc = [[I::Tile::splat(0.0); R]; T];
    for b in 0..n {
        let mut steps: [&[Step]; R] = [&[]; R];
        for r in 0..R {
            steps[r] = &quants[r][b * steps_per_block..(b + 1) * steps_per_block];
        }
        let mut blocks = [&x[0][b]; T];
        let mut dots = [[E::start::<I::Tile>(x[0][b].minus_sum); R]; T];
        for t in 1..T {
            blocks[t] = &x[t][b];
            dots[t] = [E::start::<I::Tile>(x[t][b].minus_sum); R];
        }
        E::add::<I::Tile, R, T, FIRST>(&mut dots, steps, blocks);
        for r in 0..R {
            let scale = I::Tile::halves(&scales[r][b]);
            for t in 0..T {
                let scale = I::Tile::mul(scale, I::Tile::splat(blocks[t].scale));
                acc[t][r] = I::Tile::madd(I::Tile::to_floats(dots[t][r]), scale, acc[t][r]);
            }
        }
    }
    store::<I::Tile, R, T>(acc, out, width);
}
