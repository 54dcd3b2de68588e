//! Activations as the products of tiles read them: int8 in blocks of 32 with a scale and the sums that weights with an offset or
//! a minimum are multiplied by, or bf16 in pairs.

use super::BLOCK;
use super::registers::Registers;
use crate::isa::{Isa, LANES, fold_lanes};

/// Below it a block becomes zeros: the inverse of its scale would be infinite.
const MIN_MAGNITUDE: f32 = 1e-30;

/// 32 activations, each `scale * q`.
#[derive(Clone, Copy, Debug, Default)]
pub struct ActivationBlock {
    /// In -127..=127, four to a step of an int8 dot product.
    pub(super) q: [[i8; 4]; BLOCK / 4],
    pub(super) scale: f32,
    /// `-scale` times the sum of `q`.
    pub(super) minus_scaled_sum: f32,
    /// Minus the sum of `q`, of all and of the first half.
    pub(super) minus_sum: i32,
    pub(super) minus_low_sum: i32,
}

impl ActivationBlock {
    /// Elements of a block.
    pub const N_ELEMENT: usize = BLOCK;

    /// Element `i` as quantized.
    pub fn value(&self, i: usize) -> f32 {
        self.scale * f32::from(self.q[i / 4][i % 4])
    }
}

/// See [`crate::Kernels::quantize_row`].
#[inline(always)]
pub(crate) fn quantize_row<I: Isa>(x: &[f32], out: &mut [ActivationBlock]) -> bool {
    let (x, rest) = x.as_chunks::<BLOCK>();
    assert!(rest.is_empty() && x.len() == out.len());
    let mut finite = true;
    for (x, out) in x.iter().zip(out) {
        finite &= quantize::<I>(x, out);
    }
    finite
}

#[inline(always)]
fn quantize<I: Isa>(x: &[f32; BLOCK], out: &mut ActivationBlock) -> bool {
    // As integers, magnitudes order like the numbers, and those of infinities and NaN are beyond all others.
    let mut bits = [0u32; LANES];
    for lane in 0..LANES {
        bits[lane] = x[lane].abs().to_bits().max(x[lane + LANES].abs().to_bits());
    }
    let max = f32::from_bits(fold_lanes(bits, u32::max));
    let inverse = if max < MIN_MAGNITUDE { 0.0 } else { 127.0 / max };
    // Adding 1.5 * 2^23 leaves the integer nearest to a small number in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let mut integers = [[0i32; LANES]; 2];
    for half in 0..2 {
        for lane in 0..LANES {
            let rounded = I::madd(x[half * LANES + lane], inverse, ROUND);
            integers[half][lane] = rounded.to_bits().wrapping_sub(ROUND.to_bits()) as i32;
        }
    }
    for half in 0..2 {
        for lane in 0..LANES {
            out.q[half * LANES / 4 + lane / 4][lane % 4] = integers[half][lane] as i8;
        }
    }
    let [low, high] = I::Tile::sums(&out.q);
    let sum = low + high;
    out.scale = if max < MIN_MAGNITUDE { 0.0 } else { max / 127.0 };
    out.minus_scaled_sum = -(out.scale * sum as f32);
    (out.minus_sum, out.minus_low_sum) = (-sum, -low);
    max.is_finite()
}

/// See [`crate::Kernels::quantize_rest`].
#[inline(always)]
pub(crate) fn quantize_rest<I: Isa>(x: &[f32], first: &[ActivationBlock], out: &mut [ActivationBlock]) {
    let (x, rest) = x.as_chunks::<BLOCK>();
    assert!(rest.is_empty() && x.len() == out.len() && first.len() == out.len());
    for ((x, first), out) in x.iter().zip(first).zip(out) {
        let mut rest = [0.0; BLOCK];
        for i in 0..BLOCK {
            rest[i] = I::madd(-first.scale, f32::from(first.q[i / 4][i % 4]), x[i]);
        }
        quantize::<I>(&rest, out);
    }
}

/// See [`crate::Kernels::pair_row`].
#[inline(always)]
pub(crate) fn pair_row<I: Isa>(x: &[f32], out: &mut [u32]) {
    assert_eq!(x.len().div_ceil(2), out.len());
    let (pairs, last) = x.as_chunks::<2>();
    for (pair, out) in pairs.iter().zip(&mut *out) {
        *out = to_bf16(pair[0]) | to_bf16(pair[1]) << 16;
    }
    if let (&[x], Some(out)) = (last, out.last_mut()) {
        *out = to_bf16(x);
    }
}

/// Bits of the nearest bf16, of two equally near the even one; without a branch, for finite numbers. NaN may become infinite,
/// which the caller's check of the results catches as well.
#[inline(always)]
pub(crate) fn to_bf16(x: f32) -> u32 {
    let bits = x.to_bits();
    bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16
}
