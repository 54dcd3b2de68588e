//! What the products of tiles ask of an instruction set: registers of 16 rows. The scalar twin is the reference.

use super::TILE_ROWS;
use crate::isa::{Baseline, Isa, LANES};
use half::f16;

/// 16 rows by 4 columns of bytes.
pub(crate) type Step = [u8; 4 * TILE_ROWS];

/// As with [`Isa`], the implementing types are only named inside functions that enable the features they stand for, which is what
/// their `// SAFETY:` comments rest on.
pub(crate) trait Registers {
    /// 16 rows by 4 columns of bytes.
    type Bytes: Copy;
    /// Four activations, the same for every row.
    type Quad: Copy;
    /// 16 rows of i32.
    type Ints: Copy;
    /// 16 rows of f32.
    type Floats: Copy;
    /// Whether the sums of two tiles by four tokens stay in registers.
    const WIDE: bool;

    fn bytes(x: &Step) -> Self::Bytes;
    /// Low and high four bits of every byte.
    fn nibbles(x: Self::Bytes) -> [Self::Bytes; 2];
    /// `low` with two bits of `high`, from bit `2 * PART` on, above its four.
    fn six_bits<const PART: usize>(low: Self::Bytes, high: Self::Bytes) -> Self::Bytes;
    fn quad(x: &[i8; 4]) -> Self::Quad;

    /// `x 2^SHIFT`: with `x` the negated sum of some activations, what a sum of products starts from whose weights are too
    /// large by `2^SHIFT`.
    fn start<const SHIFT: u32>(x: i32) -> Self::Ints;
    /// `acc + w · x` per row, of weights below 128.
    fn dot(acc: Self::Ints, w: Self::Bytes, x: Self::Quad) -> Self::Ints;
    /// What a sum of [`Registers::dot_offset`] starts from, given the negated sum of its activations.
    fn start_offset(minus_sum: i32) -> Self::Ints;
    /// `acc + (w - 128) · x` per row, where the 128 may be left to [`Registers::start_offset`].
    fn dot_offset(acc: Self::Ints, w: Self::Bytes, x: Self::Quad) -> Self::Ints;

    fn to_floats(x: Self::Ints) -> Self::Floats;
    fn splat(x: f32) -> Self::Floats;
    fn unsigned(x: &[u8; TILE_ROWS]) -> Self::Floats;
    fn signed(x: &[u8; TILE_ROWS]) -> Self::Floats;
    /// From little-endian f16.
    fn halves(x: &[u8; 2 * TILE_ROWS]) -> Self::Floats;
    /// From little-endian bf16.
    fn brains(x: &[u8; 2 * TILE_ROWS]) -> Self::Floats;
    /// From little-endian f32.
    fn floats(x: &Step) -> Self::Floats;
    fn mul(a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// `a * b + c`.
    fn madd(a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats;
    fn store(x: Self::Floats, out: &mut [f32; TILE_ROWS]);

    /// `acc + w · x` per row of bf16: `w` holds two columns of each row, `x` the two activations, the first in the low half.
    #[inline(always)]
    fn dot_brains(acc: Self::Floats, w: &Step, x: u32) -> Self::Floats {
        let (mut first, mut second) = ([0; 2 * TILE_ROWS], [0; 2 * TILE_ROWS]);
        for lane in 0..TILE_ROWS {
            first[2 * lane..2 * lane + 2].copy_from_slice(&w[4 * lane..4 * lane + 2]);
            second[2 * lane..2 * lane + 2].copy_from_slice(&w[4 * lane + 2..4 * lane + 4]);
        }
        let (x_first, x_second) = (f32::from_bits(x << 16), f32::from_bits(x & 0xffff_0000));
        let acc = Self::madd(Self::brains(&second), Self::splat(x_second), acc);
        Self::madd(Self::brains(&first), Self::splat(x_first), acc)
    }

    /// Sums of the two halves of a block of activations.
    #[inline(always)]
    fn sums(q: &[[i8; 4]; 8]) -> [i32; 2] {
        let (low, high) = q.as_flattened().split_at(16);
        [low, high].map(|half| half.iter().map(|&q| i32::from(q)).sum())
    }

    /// Asks for the `N` bytes that lie as far behind `at` as memory is slow: the processor's own prefetching stops at every page.
    fn prefetch<const N: usize>(at: &[u8; N]);
}

/// The reference.
pub(crate) struct Scalar;

#[inline(always)]
fn lanes<T: Copy + Default>(f: impl Fn(usize) -> T) -> [T; TILE_ROWS] {
    let mut y = [T::default(); TILE_ROWS];
    for (lane, y) in y.iter_mut().enumerate() {
        *y = f(lane);
    }
    y
}

#[inline(always)]
fn each(f: impl Fn(usize) -> u8) -> Step {
    let mut y = [0; 4 * TILE_ROWS];
    for (i, y) in y.iter_mut().enumerate() {
        *y = f(i);
    }
    y
}

#[inline(always)]
fn dot(acc: [i32; TILE_ROWS], w: &Step, offset: i32, x: [i8; 4]) -> [i32; TILE_ROWS] {
    let product = |lane: usize, i: usize| (i32::from(w[4 * lane + i]) - offset) * i32::from(x[i]);
    lanes(|lane| acc[lane] + ((product(lane, 0) + product(lane, 1)) + (product(lane, 2) + product(lane, 3))))
}

impl Registers for Scalar {
    type Bytes = Step;
    type Quad = [i8; 4];
    type Ints = [i32; TILE_ROWS];
    type Floats = [f32; TILE_ROWS];
    const WIDE: bool = false;

    #[inline(always)]
    fn bytes(x: &Step) -> Self::Bytes {
        *x
    }

    #[inline(always)]
    fn nibbles(x: Self::Bytes) -> [Self::Bytes; 2] {
        [each(|i| x[i] & 15), each(|i| x[i] >> 4)]
    }

    #[inline(always)]
    fn six_bits<const PART: usize>(low: Self::Bytes, high: Self::Bytes) -> Self::Bytes {
        each(|i| low[i] | (high[i] >> (2 * PART) & 3) << 4)
    }

    #[inline(always)]
    fn quad(x: &[i8; 4]) -> Self::Quad {
        *x
    }

    #[inline(always)]
    fn start<const SHIFT: u32>(x: i32) -> Self::Ints {
        [x << SHIFT; TILE_ROWS]
    }

    #[inline(always)]
    fn dot(acc: Self::Ints, w: Self::Bytes, x: Self::Quad) -> Self::Ints {
        dot(acc, &w, 0, x)
    }

    #[inline(always)]
    fn start_offset(_: i32) -> Self::Ints {
        [0; TILE_ROWS]
    }

    #[inline(always)]
    fn dot_offset(acc: Self::Ints, w: Self::Bytes, x: Self::Quad) -> Self::Ints {
        dot(acc, &w, 128, x)
    }

    #[inline(always)]
    fn to_floats(x: Self::Ints) -> Self::Floats {
        lanes(|lane| x[lane] as f32)
    }

    #[inline(always)]
    fn splat(x: f32) -> Self::Floats {
        [x; TILE_ROWS]
    }

    #[inline(always)]
    fn unsigned(x: &[u8; TILE_ROWS]) -> Self::Floats {
        lanes(|lane| f32::from(x[lane]))
    }

    #[inline(always)]
    fn signed(x: &[u8; TILE_ROWS]) -> Self::Floats {
        lanes(|lane| f32::from(x[lane] as i8))
    }

    #[inline(always)]
    fn halves(x: &[u8; 2 * TILE_ROWS]) -> Self::Floats {
        let mut halves = [f16::ZERO; LANES];
        for (half, &bytes) in halves.iter_mut().zip(x.as_chunks().0) {
            *half = f16::from_le_bytes(bytes);
        }
        Baseline::widen(&halves)
    }

    #[inline(always)]
    fn brains(x: &[u8; 2 * TILE_ROWS]) -> Self::Floats {
        lanes(|lane| f32::from_bits(u32::from(u16::from_le_bytes([x[2 * lane], x[2 * lane + 1]])) << 16))
    }

    #[inline(always)]
    fn floats(x: &Step) -> Self::Floats {
        lanes(|lane| f32::from_le_bytes([x[4 * lane], x[4 * lane + 1], x[4 * lane + 2], x[4 * lane + 3]]))
    }

    #[inline(always)]
    fn mul(a: Self::Floats, b: Self::Floats) -> Self::Floats {
        lanes(|lane| a[lane] * b[lane])
    }

    #[inline(always)]
    fn madd(a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats {
        lanes(|lane| Baseline::madd(a[lane], b[lane], c[lane]))
    }

    #[inline(always)]
    fn store(x: Self::Floats, out: &mut [f32; TILE_ROWS]) {
        *out = x;
    }

    #[inline(always)]
    fn prefetch<const N: usize>(_: &[u8; N]) {}
}
