//! Activations in int8: blocks of 32 with a scale, and the sums that weights with an offset or a minimum are multiplied by.

use super::BLOCK;
use crate::isa::{Isa, LANES};

/// Below it a block becomes zeros: the inverse of its scale would be infinite.
const MIN_MAGNITUDE: f32 = 1e-30;

/// 32 activations, each `scale * q`.
#[derive(Clone, Copy, Debug, Default)]
pub struct ActivationBlock {
    /// In -127..=127, four to a step of an int8 dot product.
    pub(super) q: [[i8; 4]; BLOCK / 4],
    pub(super) scale: f32,
    /// Sum of `q`.
    pub(super) sum: i32,
    /// `scale * sum`.
    pub(super) scaled_sum: f32,
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
        // As integers, magnitudes order like the numbers, and those of infinities and NaN are beyond all others.
        let mut bits = [0u32; LANES];
        for x in x.as_chunks::<LANES>().0 {
            for lane in 0..LANES {
                bits[lane] = bits[lane].max(x[lane].abs().to_bits());
            }
        }
        let max = f32::from_bits(bits.into_iter().fold(0, u32::max));
        finite &= max.is_finite();
        let inverse = if max < MIN_MAGNITUDE { 0.0 } else { 127.0 / max };
        // Adding 1.5 * 2^23 leaves the integer nearest to a small number in the low bits.
        const ROUND: f32 = 12_582_912.0;
        let integers = x.map(|x| (x * inverse + ROUND).to_bits().wrapping_sub(ROUND.to_bits()) as i32);
        let sum: i32 = integers.iter().sum();
        let q = integers.map(|integer| integer as i8);
        let scale = if max < MIN_MAGNITUDE { 0.0 } else { max / 127.0 };
        let (q, _) = q.as_chunks();
        out.q.copy_from_slice(q);
        (out.scale, out.sum, out.scaled_sum) = (scale, sum, scale * sum as f32);
    }
    finite
}
