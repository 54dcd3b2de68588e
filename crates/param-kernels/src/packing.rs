//! Matrices packed into tiles of 16 lanes, the form that the products' inner loops read.

use std::ops::Range;

use crate::isa::{Isa, LANES};
use crate::matrix::{Matrix, Precision};
use crate::prefetch::line;
use crate::tiles::to_bf16;

/// How 16 lanes of a matrix are packed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    /// Lanes are columns, a word's elements neighbours in a column: [n_word, 16].
    Cols,
    /// Lanes are rows, a word's elements neighbours in a row: [n_word, 16].
    Rows,
    /// The same row by row: [16, n_word].
    RowByRow,
}

#[inline(always)]
fn pair(low: u32, high: u32) -> u32 {
    to_bf16(f32::from_bits(low)) | to_bf16(f32::from_bits(high)) << 16
}

/// 16 words from word `w` on of row `i`, where there are as many.
#[inline(always)]
fn along(m: &Matrix<'_>, to: Precision, i: usize, w: usize) -> [u32; LANES] {
    if (m.precision, to) != (Precision::F32, Precision::Bf16) {
        return *m.part(i, w);
    }
    let x: &[u32; 2 * LANES] = m.part(i, 2 * w);
    let mut y = [0; LANES];
    for lane in 0..LANES {
        y[lane] = pair(x[2 * lane], x[2 * lane + 1]);
    }
    y
}

/// Word `w` down each of 16 columns from column `j` on, where there are as many.
#[inline(always)]
fn down(m: &Matrix<'_>, to: Precision, w: usize, j: usize) -> [u32; LANES] {
    let mut y = [0; LANES];
    match (m.precision, to) {
        (Precision::F32, Precision::F32) => y = *m.part(w, j),
        (Precision::F32, Precision::Bf16) => {
            let (a, b): (&[u32; LANES], &[u32; LANES]) = (m.part(2 * w, j), m.part(2 * w + 1, j));
            for lane in 0..LANES {
                y[lane] = pair(a[lane], b[lane]);
            }
        }
        (Precision::Bf16, _) => {
            const HALF: usize = LANES / 2;
            let (a, b): (&[u32; HALF], &[u32; HALF]) = (m.part(2 * w, j / 2), m.part(2 * w + 1, j / 2));
            for i in 0..HALF {
                y[2 * i] = a[i] & 0xffff | b[i] << 16;
                y[2 * i + 1] = a[i] >> 16 | b[i] & 0xffff_0000;
            }
        }
    }
    y
}

/// See [`Kernels::pack`].
#[inline(always)]
pub(crate) fn pack<I: Isa>(
    m: &Matrix<'_>,
    packing: Packing,
    to: Precision,
    first_lane: usize,
    words: Range<usize>,
    out: &mut [u32],
) {
    assert!(m.precision == Precision::F32 || to == Precision::Bf16, "bf16 is not widened");
    let n_word = words.len();
    let tile_len = LANES * n_word;
    let n_tile = out.len() / tile_len.max(1);
    let (n_lane, depth) = if packing == Packing::Cols { (m.n_col, m.n_row) } else { (m.n_row, m.n_col) };
    let whole_tiles = n_tile.min(n_lane.saturating_sub(first_lane) / LANES);
    let whole_words = depth / to.per_word();
    for first in words.clone().step_by(LANES) {
        let n = LANES.min(words.end - first);
        let at = first - words.start;
        let n_whole = if n == LANES && first + LANES <= whole_words { whole_tiles } else { 0 };
        if packing == Packing::Cols {
            // Row after row, as they lie in memory.
            for i in 0..if n_whole > 0 { LANES } else { 0 } {
                ask(m, to.per_word() * (first + i + LANES), to.per_word(), first_lane, n_whole * LANES);
                for tile in 0..n_whole {
                    let words = down(m, to, first + i, first_lane + tile * LANES);
                    if let Some(to) = out[tile * tile_len + (at + i) * LANES..].first_chunk_mut() {
                        *to = words;
                    }
                }
            }
        } else {
            for tile in 0..n_whole {
                let mut block = [[0; LANES]; LANES];
                for i in 0..LANES {
                    let row = first_lane + tile * LANES + i;
                    ask_further(m, to, row, first);
                    block[i] = along(m, to, row, first);
                }
                let (start, stride) = match packing {
                    Packing::RowByRow => (at, n_word),
                    _ => (at * LANES, LANES),
                };
                if packing == Packing::Rows {
                    block = I::transpose(block);
                }
                let out = &mut out[tile * tile_len..(tile + 1) * tile_len];
                for i in 0..LANES {
                    if let Some(to) = out[start + i * stride..].first_chunk_mut() {
                        *to = block[i];
                    }
                }
            }
        }
        for tile in n_whole..n_tile {
            let out = &mut out[tile * tile_len..(tile + 1) * tile_len];
            edge(m, packing, to, first_lane + tile * LANES, first..first + n, at, out);
        }
    }
}

/// Asks for `n` columns of a few rows: the processor does not foresee the jump from row to row.
#[inline(always)]
fn ask(m: &Matrix<'_>, first_row: usize, n_row: usize, first_col: usize, n: usize) {
    let per_line = 16 * m.precision.per_word();
    for row in first_row..(first_row + n_row).min(m.n_row) {
        let start = m.tail(row)[first_col / m.precision.per_word()..].as_ptr().cast::<u8>();
        for i in 0..n.div_ceil(per_line) {
            line(start.wrapping_add(64 * i));
        }
    }
}

/// Asks for what lies some blocks behind word `w` of row `i`: sixteen rows at once are more than the processor follows.
#[inline(always)]
fn ask_further(m: &Matrix<'_>, to: Precision, i: usize, w: usize) {
    const BLOCKS: usize = 4;
    let words_per_word = to.per_word() / m.precision.per_word();
    let start = m.tail(i).as_ptr().wrapping_add((w + BLOCKS * LANES) * words_per_word);
    for part in 0..words_per_word {
        line(start.wrapping_add(part * LANES).cast());
    }
}

/// A block of [`pack`] that reaches beyond the matrix or is not whole: words `words` of 16 lanes, at word `at` of a tile.
#[inline(never)]
fn edge(
    m: &Matrix<'_>,
    packing: Packing,
    to: Precision,
    first_lane: usize,
    words: Range<usize>,
    at: usize,
    tile: &mut [u32],
) {
    let n_word = tile.len() / LANES;
    for (word, depth) in words.enumerate() {
        for i in 0..LANES {
            let element = |d: usize| match packing {
                Packing::Cols => m.get(d, first_lane + i),
                Packing::Rows | Packing::RowByRow => m.get(first_lane + i, d),
            };
            let value = match to {
                Precision::F32 => element(depth),
                Precision::Bf16 => pair(element(2 * depth), element(2 * depth + 1)),
            };
            let place = match packing {
                Packing::RowByRow => i * n_word + at + word,
                Packing::Cols | Packing::Rows => (at + word) * LANES + i,
            };
            tile[place] = value;
        }
    }
}
