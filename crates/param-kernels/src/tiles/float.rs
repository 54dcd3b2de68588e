//! f32, f16 and bf16 in tiles: column by column of 16 rows, of bf16 two columns at a time, multiplied by f32 or bf16 and summed in
//! f32.

use super::activation::to_bf16;
use super::registers::Registers;
use super::{LINE, STEP, Sharing, TILE_ROWS, TURN, blocked, store, twice};
use crate::isa::Isa;
use half::f16;

/// How the columns that one activation meets are stored. No closures here: one that is not inlined would not have the
/// instruction set's features.
trait Column {
    /// What it is multiplied by.
    type Activation: Copy;
    const BYTES: usize;
    /// `acc + w x` per row.
    fn madd<G: Registers>(acc: G::Floats, w: &[u8], x: Self::Activation) -> G::Floats;
}

struct F32;
struct F16;
/// Two columns and two activations.
struct Bf16;

impl Column for F32 {
    type Activation = f32;
    const BYTES: usize = 4 * TILE_ROWS;

    #[inline(always)]
    fn madd<G: Registers>(acc: G::Floats, w: &[u8], x: f32) -> G::Floats {
        let Some(w) = w.first_chunk() else { return acc };
        G::madd(G::floats(w), G::splat(x), acc)
    }
}

impl Column for F16 {
    type Activation = f32;
    const BYTES: usize = 2 * TILE_ROWS;

    #[inline(always)]
    fn madd<G: Registers>(acc: G::Floats, w: &[u8], x: f32) -> G::Floats {
        let Some(w) = w.first_chunk() else { return acc };
        G::madd(G::halves(w), G::splat(x), acc)
    }
}

impl Column for Bf16 {
    type Activation = u32;
    const BYTES: usize = STEP;

    #[inline(always)]
    fn madd<G: Registers>(acc: G::Floats, w: &[u8], x: u32) -> G::Floats {
        let Some(w) = w.first_chunk() else { return acc };
        G::dot_brains(acc, w, x)
    }
}

/// Puts a stored row of elements of `N` bytes into lane `lane` of a tile.
pub(super) fn pack<const N: usize>(row: &[u8], lane: usize, tile: &mut [u8]) {
    for (element, column) in row.as_chunks::<N>().0.iter().zip(tile.chunks_exact_mut(N * TILE_ROWS)) {
        column[lane * N..(lane + 1) * N].copy_from_slice(element);
    }
}

/// Puts a stored row of bf16 into lane `lane` of a tile.
pub(super) fn pack_bf16(row: &[u8], lane: usize, tile: &mut [u8]) {
    for (pair, step) in row.chunks(4).zip(tile.as_chunks_mut::<STEP>().0) {
        step[4 * lane..4 * lane + pair.len()].copy_from_slice(pair);
    }
}

/// The same from a row of f16, rounded.
pub(super) fn pack_f16_as_bf16(row: &[u8], lane: usize, tile: &mut [u8]) {
    for (pair, step) in row.chunks(4).zip(tile.as_chunks_mut::<STEP>().0) {
        for (i, &half) in pair.as_chunks::<2>().0.iter().enumerate() {
            let rounded = to_bf16(f16::from_le_bytes(half).to_f32()) as u16;
            step[4 * lane + 2 * i..4 * lane + 2 * i + 2].copy_from_slice(&rounded.to_le_bytes());
        }
    }
}

/// See [`super::TileFormat::matmul`].
#[inline(always)]
pub(crate) fn matmul_f32<I: Isa>(tiles: &[u8], n_tile: usize, x: &[&[f32]], out: &mut [f32]) {
    blocked!(I, rows[F32], Sharing::USUAL, tiles, n_tile, x, out);
}

/// See [`super::TileFormat::matmul`].
#[inline(always)]
pub(crate) fn matmul_f16<I: Isa>(tiles: &[u8], n_tile: usize, x: &[&[f32]], out: &mut [f32]) {
    blocked!(I, rows[F16], Sharing::USUAL, tiles, n_tile, x, out);
}

/// See [`super::TileFormat::matmul`].
#[inline(always)]
pub(crate) fn matmul_bf16<I: Isa>(tiles: &[u8], n_tile: usize, x: &[&[u32]], out: &mut [f32]) {
    blocked!(I, rows[Bf16], Sharing::USUAL, tiles, n_tile, x, out);
}

/// Columns whose products are summed apart: one fused multiply-add waits four cycles for the one before it.
const CHAINS: usize = 2;

/// Activations of T rows.
trait Rows<A: Copy, const T: usize>: Copy {
    /// Columns, of bf16 pairs of them.
    fn len(&self) -> usize;
    /// That of row `t` in column `i`.
    fn get(&self, t: usize, i: usize) -> A;
}

/// Row by row, of one length.
#[derive(Clone, Copy)]
struct Separate<'a, A, const T: usize>([&'a [A]; T]);

impl<'a, A: Copy, const T: usize> Separate<'a, A, T> {
    #[inline(always)]
    fn new(x: &[&'a [A]; T]) -> Self {
        let n = x[0].len();
        let mut rows = *x;
        for t in 0..T {
            rows[t] = &x[t][..n];
        }
        Separate(rows)
    }
}

impl<A: Copy, const T: usize> Rows<A, T> for Separate<'_, A, T> {
    #[inline(always)]
    fn len(&self) -> usize {
        self.0[0].len()
    }

    #[inline(always)]
    fn get(&self, t: usize, i: usize) -> A {
        self.0[t][i]
    }
}

/// Column by column, from lane `first` on.
#[derive(Clone, Copy)]
struct Interleaved<'a, A> {
    columns: &'a [[A; TILE_ROWS]],
    first: usize,
}

impl<A: Copy, const T: usize> Rows<A, T> for Interleaved<'_, A> {
    #[inline(always)]
    fn len(&self) -> usize {
        self.columns.len()
    }

    #[inline(always)]
    fn get(&self, t: usize, i: usize) -> A {
        self.columns[i][(self.first + t) % TILE_ROWS]
    }
}

#[inline(always)]
fn rows<C: Column, I: Isa, const R: usize, const T: usize, const FIRST: bool>(
    tiles: [&[u8]; R],
    x: &[&[C::Activation]; T], // [T, n_col], of bf16 [T, n_col / 2]
    out: &mut [f32],           // [T, R * 16], tokens `width` apart
    width: usize,
) {
    multiply_rows::<C, I, _, R, T, FIRST>(tiles, Separate::new(x), out, width);
}

/// See [`crate::Kernels::matmul_interleaved_f32`].
#[inline(always)]
pub(crate) fn matmul_interleaved_f32<I: Isa>(tiles: &[u8], n_tile: usize, x: &[[f32; TILE_ROWS]], out: &mut [f32]) {
    interleaved::<F32, I>(tiles, n_tile, x, out);
}

/// See [`crate::Kernels::matmul_interleaved_bf16`].
#[inline(always)]
pub(crate) fn matmul_interleaved_bf16<I: Isa>(tiles: &[u8], n_tile: usize, x: &[[u32; TILE_ROWS]], out: &mut [f32]) {
    interleaved::<Bf16, I>(tiles, n_tile, x, out);
}

#[inline(always)]
fn interleaved<C: Column, I: Isa>(tiles: &[u8], n_tile: usize, x: &[[C::Activation; TILE_ROWS]], out: &mut [f32]) {
    const ROWS: usize = 4;
    let width = n_tile * TILE_ROWS;
    assert!(out.len() == TILE_ROWS * width && tiles.len() == width * x.len() * C::BYTES / TILE_ROWS);
    let tile_bytes = x.len() * C::BYTES;
    let mut first = 0;
    while first < n_tile {
        let two = I::Tile::WIDE && first + 2 <= n_tile;
        let tile = |i: usize| &tiles[(first + i) * tile_bytes..(first + i + 1) * tile_bytes];
        for lane in (0..TILE_ROWS).step_by(ROWS) {
            let x = Interleaved { columns: x, first: lane };
            let out = &mut out[lane * width + first * TILE_ROWS..];
            if two {
                multiply_rows::<C, I, _, 2, ROWS, false>([tile(0), tile(1)], x, out, width);
            } else {
                multiply_rows::<C, I, _, 1, ROWS, false>([tile(0)], x, out, width);
            }
        }
        first += if two { 2 } else { 1 };
    }
}

#[inline(always)]
fn multiply_rows<C: Column, I: Isa, X: Rows<C::Activation, T>, const R: usize, const T: usize, const FIRST: bool>(
    tiles: [&[u8]; R],
    x: X,
    out: &mut [f32], // [T, R * 16], rows `width` apart
    width: usize,
) {
    let n = x.len();
    let mut columns = tiles;
    for r in 0..R {
        columns[r] = &tiles[r][..n * C::BYTES];
    }
    let mut acc = [[[I::Tile::splat(0.0); R]; T]; CHAINS];
    let n_pair = n / CHAINS;
    if twice::<I, T>() {
        for pair in 0..n_pair {
            if FIRST {
                columns.iter().for_each(|columns| prefetch::<C, I>(columns, pair * CHAINS));
            }
            for chain in 0..CHAINS {
                multiply::<C, I, X, R, T>(&mut acc[chain], &columns, x, pair * CHAINS + chain);
            }
        }
    } else {
        for turn in 0..n_pair.div_ceil(TURN) * CHAINS {
            let (chain, first) = (turn % CHAINS, turn / CHAINS * TURN);
            let mut sums = acc[chain];
            for pair in first..(first + TURN).min(n_pair) {
                if FIRST && chain == 0 {
                    columns.iter().for_each(|columns| prefetch::<C, I>(columns, pair * CHAINS));
                }
                multiply::<C, I, X, R, T>(&mut sums, &columns, x, pair * CHAINS + chain);
            }
            acc[chain] = sums;
        }
    }
    if !n.is_multiple_of(CHAINS) {
        multiply::<C, I, X, R, T>(&mut acc[0], &columns, x, n - 1);
    }
    let mut sums = acc[0];
    for t in 0..T {
        for r in 0..R {
            sums[t][r] = I::Tile::madd(acc[1][t][r], I::Tile::splat(1.0), acc[0][t][r]);
        }
    }
    store::<I::Tile, R, T>(sums, out, width);
}

/// Asks for what lies behind columns `i` and `i + 1`.
#[inline(always)]
fn prefetch<C: Column, I: Isa>(columns: &[u8], i: usize) {
    columns[i * C::BYTES..(i + CHAINS) * C::BYTES].as_chunks::<LINE>().0.iter().for_each(I::Tile::prefetch);
}

/// Adds the products of column `i`.
#[inline(always)]
fn multiply<C: Column, I: Isa, X: Rows<C::Activation, T>, const R: usize, const T: usize>(
    acc: &mut [[<I::Tile as Registers>::Floats; R]; T],
    columns: &[&[u8]; R],
    x: X,
    i: usize,
) {
    let at = i * C::BYTES..(i + 1) * C::BYTES;
    for r in 0..R {
        let w = &columns[r][at.clone()];
        for t in 0..T {
            acc[t][r] = C::madd::<I::Tile>(acc[t][r], w, x.get(t, i));
        }
    }
}
