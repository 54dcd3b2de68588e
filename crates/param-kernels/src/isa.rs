//! What the kernel bodies ask of an instruction set. Everything else the compiler vectorises by itself once a body is
//! inlined into a function that enables the features.

use crate::tiles::{Registers, Scalar};
use half::f16;

/// Width every body is written for: one AVX-512 register, two AVX2, four NEON or SSE2.
pub(crate) const LANES: usize = 16;

/// One f32 register's worth (or the same in narrower registers).
pub(crate) type Lanes = [f32; LANES];

/// An instruction set a kernel body is compiled for. The implementing types are only named inside functions that enable
/// the features they stand for, which is what their `// SAFETY:` comments rest on.
pub(crate) trait Isa {
    /// Whether a fused multiply-add is one instruction. Where it is not, `mul_add` would call the C library.
    const FMA: bool;

    /// How it multiplies weights in tiles.
    type Tile: Registers;

    /// Whether registers hold two sums of a tile for each of four tokens.
    const TWICE: bool = Self::Tile::WIDE;

    /// Exact conversion to f32.
    #[inline(always)]
    fn widen(x: &[f16; LANES]) -> Lanes {
        let mut y = [0.0; LANES];
        for (y, x) in y.iter_mut().zip(x) {
            *y = widen_one(x.to_bits());
        }
        y
    }

    /// The transpose of a block of words: four perfect shuffles of its rows.
    #[inline(always)]
    fn transpose(mut x: [[u32; LANES]; LANES]) -> [[u32; LANES]; LANES] {
        for _ in 0..LANES.ilog2() {
            let mut y = x;
            for i in 0..LANES / 2 {
                for lane in 0..LANES {
                    let from = if lane % 2 == 0 { x[i] } else { x[i + LANES / 2] };
                    y[2 * i][lane] = from[lane / 2];
                    y[2 * i + 1][lane] = from[LANES / 2 + lane / 2];
                }
            }
            x = y;
        }
        x
    }

    /// `a * b + c`, fused where that is fast.
    #[inline(always)]
    fn madd(a: f32, b: f32, c: f32) -> f32 {
        if Self::FMA { a.mul_add(b, c) } else { a * b + c }
    }
}

/// f16 bits to f32 without a branch, so that it vectorises: shift the fields into place, then a multiplication by 2^112
/// corrects the exponent and normalises subnormals in one step. Infinities and NaN take the all-ones exponent instead.
#[inline(always)]
fn widen_one(bits: u16) -> f32 {
    let sign = u32::from(bits & 0x8000) << 16;
    let magnitude = u32::from(bits & 0x7fff) << 13;
    let scale = f32::from_bits((127 + 112) << 23);
    let finite = (f32::from_bits(magnitude) * scale).to_bits();
    let value = if magnitude >= 0x7c00 << 13 { magnitude | 0x7f80_0000 } else { finite };
    f32::from_bits(sign | value)
}

/// What the target guarantees: SSE2 on x86-64, NEON (which has FMA) on aarch64.
pub(crate) struct Baseline;

impl Isa for Baseline {
    const FMA: bool = cfg!(target_arch = "aarch64");
    type Tile = Scalar;
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512, Vnni, VnniBf16};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Isa, LANES, Lanes};
    use crate::tiles::{Avx2Registers, Avx512Registers};
    use half::f16;
    use std::arch::x86_64::*;

    /// AVX2 with FMA and F16C.
    pub(crate) struct Avx2;

    impl Isa for Avx2 {
        const FMA: bool = true;
        type Tile = Avx2Registers;

        #[inline(always)]
        fn widen(x: &[f16; LANES]) -> Lanes {
            let mut y = [0.0; LANES];
            // SAFETY: both halves read 8 of the 16 f16 and write 8 of the 16 f32; F16C is enabled wherever Avx2 is named.
            unsafe {
                let x = x.as_ptr().cast::<__m128i>();
                let y = y.as_mut_ptr();
                _mm256_storeu_ps(y, _mm256_cvtph_ps(_mm_loadu_si128(x)));
                _mm256_storeu_ps(y.add(8), _mm256_cvtph_ps(_mm_loadu_si128(x.add(1))));
            }
            y
        }
    }

    /// AVX-512 F, BW, DQ and VL.
    pub(crate) struct Avx512;

    impl Isa for Avx512 {
        const FMA: bool = true;
        type Tile = Avx2Registers;
        const TWICE: bool = true;

        #[inline(always)]
        fn widen(x: &[f16; LANES]) -> Lanes {
            let mut y = [0.0; LANES];
            // SAFETY: reads 16 f16, writes 16 f32; AVX-512F is enabled wherever Avx512 is named.
            unsafe { _mm512_storeu_ps(y.as_mut_ptr(), _mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast()))) };
            y
        }

        /// In registers: interleaves words, then pairs, then transposes the quarters of registers.
        #[inline(always)]
        fn transpose(x: [[u32; LANES]; LANES]) -> [[u32; LANES]; LANES] {
            let mut y = [[0; LANES]; LANES];
            // SAFETY: reads and writes 16 rows of 16 words; AVX-512F is enabled wherever Avx512 is named.
            unsafe {
                let mut r = [_mm512_setzero_si512(); LANES];
                for i in 0..LANES {
                    r[i] = _mm512_loadu_si512(x[i].as_ptr().cast());
                }
                let mut t = r;
                for i in 0..LANES / 2 {
                    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
                    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
                }
                for i in 0..LANES / 4 {
                    let at = 4 * i;
                    r[at] = _mm512_unpacklo_epi64(t[at], t[at + 2]);
                    r[at + 1] = _mm512_unpackhi_epi64(t[at], t[at + 2]);
                    r[at + 2] = _mm512_unpacklo_epi64(t[at + 1], t[at + 3]);
                    r[at + 3] = _mm512_unpackhi_epi64(t[at + 1], t[at + 3]);
                }
                // Register 4 i + j holds, in quarter q, words j of rows 4 i to 4 i + 3 of the columns 4 q + j.
                for j in 0..4 {
                    let low = _mm512_shuffle_i32x4::<0x88>(r[j], r[4 + j]);
                    let high = _mm512_shuffle_i32x4::<0xdd>(r[j], r[4 + j]);
                    let low2 = _mm512_shuffle_i32x4::<0x88>(r[8 + j], r[12 + j]);
                    let high2 = _mm512_shuffle_i32x4::<0xdd>(r[8 + j], r[12 + j]);
                    let columns = [
                        _mm512_shuffle_i32x4::<0x88>(low, low2),
                        _mm512_shuffle_i32x4::<0x88>(high, high2),
                        _mm512_shuffle_i32x4::<0xdd>(low, low2),
                        _mm512_shuffle_i32x4::<0xdd>(high, high2),
                    ];
                    for q in 0..4 {
                        _mm512_storeu_si512(y[4 * q + j].as_mut_ptr().cast(), columns[q]);
                    }
                }
            }
            y
        }
    }

    /// AVX-512 F, BW, DQ, VL and VNNI; with `BF16` also BF16.
    pub(crate) struct Avx512Vnni<const BF16: bool>;
    pub(crate) type Vnni = Avx512Vnni<false>;
    pub(crate) type VnniBf16 = Avx512Vnni<true>;

    impl<const BF16: bool> Isa for Avx512Vnni<BF16> {
        const FMA: bool = true;
        type Tile = Avx512Registers<BF16>;

        #[inline(always)]
        fn widen(x: &[f16; LANES]) -> Lanes {
            Avx512::widen(x)
        }

        #[inline(always)]
        fn transpose(x: [[u32; LANES]; LANES]) -> [[u32; LANES]; LANES] {
            Avx512::transpose(x)
        }
    }
}

#[cfg(target_arch = "aarch64")]
pub(crate) use aarch64::Neon;

#[cfg(target_arch = "aarch64")]
mod aarch64 {
    use super::{Isa, LANES, Lanes};
    use crate::tiles::{NeonRegisters, Registers};
    use half::f16;

    /// NEON with int8 dot products.
    pub(crate) struct Neon;

    impl Isa for Neon {
        const FMA: bool = true;
        type Tile = NeonRegisters;

        #[inline(always)]
        fn widen(x: &[f16; LANES]) -> Lanes {
            let mut y = [0.0; LANES];
            // SAFETY: 16 f16 are 32 bytes, and bytes have no alignment.
            NeonRegisters::store(NeonRegisters::halves(unsafe { &*x.as_ptr().cast() }), &mut y);
            y
        }
    }
}

/// All lanes combined, half by half: in a fixed tree, so that a result does not depend on how the compiler splits the lanes, and in
/// four steps of whole registers.
#[inline(always)]
pub(crate) fn fold_lanes<T: Copy>(mut x: [T; LANES], f: impl Fn(T, T) -> T) -> T {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            x[i] = f(x[i], x[i + width]);
        }
        width /= 2;
    }
    x[0]
}

/// Their sum.
#[inline(always)]
pub(crate) fn sum_lanes(x: Lanes) -> f32 {
    fold_lanes(x, |a, b| a + b)
}

/// `acc += a * b`, lane by lane.
#[inline(always)]
pub(crate) fn madd_lanes<I: Isa>(acc: &mut Lanes, a: &Lanes, b: &Lanes) {
    for i in 0..LANES {
        acc[i] = I::madd(a[i], b[i], acc[i]);
    }
}

/// Sum of `f(i)` over `0..n`, with four registers of partial sums to hide the latency of the addition.
#[inline(always)]
pub(crate) fn sum_map(n: usize, f: impl Fn(usize) -> f32) -> f32 {
    const WIDE: usize = 4 * LANES;
    let mut acc = [0.0f32; WIDE];
    let whole = n / WIDE * WIDE;
    for start in (0..whole).step_by(WIDE) {
        for lane in 0..WIDE {
            acc[lane] += f(start + lane);
        }
    }
    let mut sum = [0.0f32; LANES];
    for lane in 0..LANES {
        sum[lane] = (acc[lane] + acc[lane + LANES]) + (acc[lane + 2 * LANES] + acc[lane + 3 * LANES]);
    }
    let mut total = sum_lanes(sum);
    for i in whole..n {
        total += f(i);
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widening_is_exact_for_every_f16() {
        for bits in 0..=u16::MAX {
            let want = f16::from_bits(bits).to_f32();
            let got = widen_one(bits);
            assert!(
                want.to_bits() == got.to_bits() || (want.is_nan() && got.is_nan()),
                "{bits:#06x}: {got} for {want}"
            );
        }
    }

    #[cfg(target_arch = "aarch64")]
    #[test]
    fn neon_widens_every_f16_exactly() {
        for first in (0..=u16::MAX).step_by(LANES) {
            let x = std::array::from_fn(|lane| f16::from_bits(first + lane as u16));
            for (x, got) in x.into_iter().zip(Neon::widen(&x)) {
                assert!(x.to_f32().to_bits() == got.to_bits() || (x.is_nan() && got.is_nan()), "{got} for {x}");
            }
        }
    }
}
