//! Q8_0 in tiles: per 32 columns, 16 f16 scales, then 8 steps of 16 rows by 4 columns, stored with 128 added.

use super::int8::Int8;
use super::{ActivationBlock, BLOCK, TILE_ROWS, by_tokens};
use crate::isa::Isa;

/// Bytes as ggml stores a block: an f16 scale, then the elements.
pub(super) const STORED: usize = 2 + BLOCK;
/// Bytes of a block of 16 rows.
pub(super) const PACKED: usize = TILE_ROWS * STORED;
const SCALES: usize = 2 * TILE_ROWS;

/// Puts a stored row into lane `lane` of a tile.
pub(super) fn pack(row: &[u8], lane: usize, tile: &mut [u8]) {
    for (stored, packed) in row.as_chunks::<STORED>().0.iter().zip(tile.as_chunks_mut::<PACKED>().0) {
        let (scale, quants) = stored.split_at(2);
        packed[2 * lane..2 * lane + 2].copy_from_slice(scale);
        let steps = packed[SCALES..].as_chunks_mut::<{ 4 * TILE_ROWS }>().0;
        for (step, q) in steps.iter_mut().zip(quants.as_chunks::<4>().0) {
            step[4 * lane..4 * lane + 4].copy_from_slice(&q.map(|q| q ^ 0x80));
        }
    }
}

/// See [`super::TileFormat::matmul`].
#[inline(always)]
pub(crate) fn matmul<I: Isa>(tile: &[u8], x: &[&[ActivationBlock]], out: &mut [[f32; TILE_ROWS]]) {
    let (blocks, rest) = tile.as_chunks::<PACKED>();
    assert!(rest.is_empty() && x.iter().all(|x| x.len() == blocks.len()));
    by_tokens!(I, rows, blocks, x, out);
}

#[inline(always)]
fn rows<I: Isa, const T: usize>(
    blocks: &[[u8; PACKED]],         // [n_col / 32]
    x: &[&[ActivationBlock]; T],     // [T, n_col / 32]
    out: &mut [[f32; TILE_ROWS]; T], // [T, 16]
) {
    let x = x.map(|x| &x[..blocks.len()]);
    let mut acc = [I::Int8::floats(&[0.0; TILE_ROWS]); T];
    for (b, block) in blocks.iter().enumerate() {
        if T == 1 {
            I::Int8::prefetch(block);
        }
        let (scales, steps) = block.split_first_chunk::<SCALES>().unwrap_or_else(|| unreachable!());
        let (steps, _) = steps.as_chunks::<{ 4 * TILE_ROWS }>();
        let mut dots = [I::Int8::start(0); T];
        for t in 0..T {
            dots[t] = I::Int8::start(x[t][b].sum);
        }
        for (step, w) in steps.iter().enumerate() {
            let w = I::Int8::bytes(w);
            for t in 0..T {
                dots[t] = I::Int8::dot_i8(dots[t], w, x[t][b].q[step]);
            }
        }
        let scales = I::Int8::halves(scales);
        for t in 0..T {
            let scale = I::Int8::mul(scales, I::Int8::splat(x[t][b].scale));
            acc[t] = I::Int8::madd(I::Int8::to_floats(dots[t]), scale, acc[t]);
        }
    }
    for t in 0..T {
        out[t] = I::Int8::store(acc[t]);
    }
}
