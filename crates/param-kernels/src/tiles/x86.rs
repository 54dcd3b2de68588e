//! Registers of AVX2, of AVX-512 VNNI, and of the latter with bf16 dot products.

use super::registers::{Registers, Step};
use super::{LINE, TILE_ROWS};
use crate::prefetch::line;
use std::arch::x86_64::*;

/// Bytes ahead: about 100 ns at the pace of one core.
const AHEAD: usize = 7168;

#[inline(always)]
fn prefetch<const N: usize>(at: &[u8; N]) {
    let start = at.as_ptr().wrapping_add(AHEAD);
    (0..N).step_by(LINE).for_each(|at| line(start.wrapping_add(at)));
}

#[inline(always)]
fn four(x: &[i8; 4]) -> i32 {
    i32::from_le_bytes(x.map(|x| x as u8))
}

/// Two registers of 8 rows: AVX2 with FMA and F16C.
pub(crate) struct Avx2Registers;

impl Registers for Avx2Registers {
    type Bytes = [__m256i; 2];
    type Quad = __m256i;
    type Ints = [__m256i; 2];
    type Floats = [__m256; 2];
    const WIDE: bool = false;

    #[inline(always)]
    fn bytes(x: &Step) -> Self::Bytes {
        let x = x.as_ptr().cast::<__m256i>();
        // SAFETY: reads both halves of 64 bytes; AVX2 is enabled wherever Avx2Registers is named.
        unsafe { [_mm256_loadu_si256(x), _mm256_loadu_si256(x.add(1))] }
    }

    #[inline(always)]
    fn nibbles(x: Self::Bytes) -> [Self::Bytes; 2] {
        // SAFETY: AVX2 is enabled wherever Avx2Registers is named.
        unsafe {
            let mask = _mm256_set1_epi8(15);
            let low = |x| _mm256_and_si256(x, mask);
            [[low(x[0]), low(x[1])], [low(_mm256_srli_epi16::<4>(x[0])), low(_mm256_srli_epi16::<4>(x[1]))]]
        }
    }

    #[inline(always)]
    fn six_bits<const PART: usize>(low: Self::Bytes, high: Self::Bytes) -> Self::Bytes {
        // SAFETY: as above. Bits that a shift of 16-bit lanes brings in from the neighbour are masked off.
        unsafe {
            let mask = _mm256_set1_epi8(0x30);
            let six = |low, high| {
                let high = match PART {
                    0 => _mm256_slli_epi16::<4>(high),
                    1 => _mm256_slli_epi16::<2>(high),
                    2 => high,
                    _ => _mm256_srli_epi16::<2>(high),
                };
                _mm256_or_si256(low, _mm256_and_si256(high, mask))
            };
            [six(low[0], high[0]), six(low[1], high[1])]
        }
    }

    #[inline(always)]
    fn quad(x: &[i8; 4]) -> Self::Quad {
        // SAFETY: as above.
        unsafe { _mm256_set1_epi32(four(x)) }
    }

    #[inline(always)]
    fn start<const SHIFT: u32>(x: i32) -> Self::Ints {
        // SAFETY: as above.
        unsafe { [_mm256_set1_epi32(x << SHIFT); 2] }
    }

    #[inline(always)]
    fn dot(acc: Self::Ints, w: Self::Bytes, x: Self::Quad) -> Self::Ints {
        // SAFETY: as above. Pairs of products reach 2 * 127 * 127, which fits 16 bits.
        unsafe {
            let one = _mm256_set1_epi16(1);
            let dot = |acc, w| _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), one));
            [dot(acc[0], w[0]), dot(acc[1], w[1])]
        }
    }

    #[inline(always)]
    fn start_offset(_: i32) -> Self::Ints {
        // SAFETY: as above.
        unsafe { [_mm256_setzero_si256(); 2] }
    }

    #[inline(always)]
    fn dot_offset(acc: Self::Ints, w: Self::Bytes, x: Self::Quad) -> Self::Ints {
        // SAFETY: as above. Of the operands of the product one is unsigned: the weight's sign moves to the activation.
        // Pairs of products reach 2 * 128 * 127, which fits 16 bits.
        unsafe {
            let (one, offset) = (_mm256_set1_epi16(1), _mm256_set1_epi8(-128));
            let dot = |acc, w| {
                let w = _mm256_xor_si256(w, offset);
                let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
                _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, one))
            };
            [dot(acc[0], w[0]), dot(acc[1], w[1])]
        }
    }

    #[inline(always)]
    fn to_floats(x: Self::Ints) -> Self::Floats {
        // SAFETY: as above.
        unsafe { [_mm256_cvtepi32_ps(x[0]), _mm256_cvtepi32_ps(x[1])] }
    }

    #[inline(always)]
    fn splat(x: f32) -> Self::Floats {
        // SAFETY: as above.
        unsafe { [_mm256_set1_ps(x); 2] }
    }

    #[inline(always)]
    fn unsigned(x: &[u8; TILE_ROWS]) -> Self::Floats {
        // SAFETY: reads the 16 bytes; AVX2 is enabled wherever Avx2Registers is named.
        unsafe {
            let x = _mm_loadu_si128(x.as_ptr().cast());
            let widen = |x| _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(x));
            [widen(x), widen(_mm_srli_si128::<8>(x))]
        }
    }

    #[inline(always)]
    fn signed(x: &[u8; TILE_ROWS]) -> Self::Floats {
        // SAFETY: reads the 16 bytes; AVX2 is enabled wherever Avx2Registers is named.
        unsafe {
            let x = _mm_loadu_si128(x.as_ptr().cast());
            let widen = |x| _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x));
            [widen(x), widen(_mm_srli_si128::<8>(x))]
        }
    }

    #[inline(always)]
    fn halves(x: &[u8; 2 * TILE_ROWS]) -> Self::Floats {
        let x = x.as_ptr().cast::<__m128i>();
        // SAFETY: reads both halves of 32 bytes; F16C is enabled wherever Avx2Registers is named.
        unsafe { [_mm256_cvtph_ps(_mm_loadu_si128(x)), _mm256_cvtph_ps(_mm_loadu_si128(x.add(1)))] }
    }

    #[inline(always)]
    fn brains(x: &[u8; 2 * TILE_ROWS]) -> Self::Floats {
        let x = x.as_ptr().cast::<__m128i>();
        // SAFETY: reads both halves of 32 bytes; AVX2 is enabled wherever Avx2Registers is named.
        unsafe {
            let widen = |x| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(x)));
            [widen(_mm_loadu_si128(x)), widen(_mm_loadu_si128(x.add(1)))]
        }
    }

    #[inline(always)]
    fn floats(x: &Step) -> Self::Floats {
        let x = x.as_ptr().cast::<f32>();
        // SAFETY: reads both halves of 64 bytes; AVX is enabled wherever Avx2Registers is named.
        unsafe { [_mm256_loadu_ps(x), _mm256_loadu_ps(x.add(8))] }
    }

    #[inline(always)]
    fn mul(a: Self::Floats, b: Self::Floats) -> Self::Floats {
        // SAFETY: AVX is enabled wherever Avx2Registers is named.
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn madd(a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats {
        // SAFETY: FMA is enabled wherever Avx2Registers is named.
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }

    #[inline(always)]
    fn store(x: Self::Floats, out: &mut [f32; TILE_ROWS]) {
        // SAFETY: writes both halves of 16 f32; AVX is enabled wherever Avx2Registers is named.
        unsafe {
            _mm256_storeu_ps(out.as_mut_ptr(), x[0]);
            _mm256_storeu_ps(out.as_mut_ptr().add(8), x[1]);
        }
    }

    #[inline(always)]
    fn dot_brains(acc: Self::Floats, w: &Step, x: u32) -> Self::Floats {
        let [low, high] = Self::bytes(w);
        // A bf16 is the upper half of an f32.
        // SAFETY: AVX2 is enabled wherever Avx2Registers is named.
        let (first, second) = unsafe {
            let mask = _mm256_set1_epi32(0xffff_0000_u32 as i32);
            let first = [_mm256_slli_epi32::<16>(low), _mm256_slli_epi32::<16>(high)];
            let second = [_mm256_and_si256(low, mask), _mm256_and_si256(high, mask)];
            (
                [_mm256_castsi256_ps(first[0]), _mm256_castsi256_ps(first[1])],
                [_mm256_castsi256_ps(second[0]), _mm256_castsi256_ps(second[1])],
            )
        };
        let acc = Self::madd(second, Self::splat(f32::from_bits(x & 0xffff_0000)), acc);
        Self::madd(first, Self::splat(f32::from_bits(x << 16)), acc)
    }

    #[inline(always)]
    fn prefetch<const N: usize>(at: &[u8; N]) {
        prefetch(at);
    }
}

/// One register of 16 rows: AVX-512 F, BW and VNNI; with `BF16` also AVX-512 BF16.
pub(crate) struct Avx512Registers<const BF16: bool>;

impl<const BF16: bool> Registers for Avx512Registers<BF16> {
    type Bytes = __m512i;
    type Quad = __m512i;
    type Ints = __m512i;
    type Floats = __m512;
    const WIDE: bool = true;

    #[inline(always)]
    fn bytes(x: &Step) -> Self::Bytes {
        // SAFETY: reads the 64 bytes; AVX-512 is enabled wherever Avx512Registers is named.
        unsafe { _mm512_loadu_si512(x.as_ptr().cast()) }
    }

    #[inline(always)]
    fn nibbles(x: Self::Bytes) -> [Self::Bytes; 2] {
        // SAFETY: AVX-512 is enabled wherever Avx512Registers is named.
        unsafe {
            let mask = _mm512_set1_epi8(15);
            [_mm512_and_si512(x, mask), _mm512_and_si512(_mm512_srli_epi16::<4>(x), mask)]
        }
    }

    #[inline(always)]
    fn six_bits<const PART: usize>(low: Self::Bytes, high: Self::Bytes) -> Self::Bytes {
        // SAFETY: as above. Bits that a shift of 16-bit lanes brings in from the neighbour are masked off.
        unsafe {
            let high = match PART {
                0 => _mm512_slli_epi16::<4>(high),
                1 => _mm512_slli_epi16::<2>(high),
                2 => high,
                _ => _mm512_srli_epi16::<2>(high),
            };
            // low | (high & mask)
            _mm512_ternarylogic_epi32::<0xf8>(low, high, _mm512_set1_epi8(0x30))
        }
    }

    #[inline(always)]
    fn quad(x: &[i8; 4]) -> Self::Quad {
        // SAFETY: as above.
        unsafe { _mm512_set1_epi32(four(x)) }
    }

    #[inline(always)]
    fn start<const SHIFT: u32>(x: i32) -> Self::Ints {
        // SAFETY: as above. Shifted after the broadcast, which comes straight from memory.
        unsafe { _mm512_slli_epi32::<SHIFT>(_mm512_set1_epi32(x)) }
    }

    #[inline(always)]
    fn dot(acc: Self::Ints, w: Self::Bytes, x: Self::Quad) -> Self::Ints {
        // SAFETY: as above.
        unsafe { _mm512_dpbusd_epi32(acc, w, x) }
    }

    #[inline(always)]
    fn start_offset(minus_sum: i32) -> Self::Ints {
        Self::start::<7>(minus_sum)
    }

    #[inline(always)]
    fn dot_offset(acc: Self::Ints, w: Self::Bytes, x: Self::Quad) -> Self::Ints {
        // The instruction takes unsigned weights as they are; `start_offset` has taken 128 times the activations off.
        Self::dot(acc, w, x)
    }

    #[inline(always)]
    fn to_floats(x: Self::Ints) -> Self::Floats {
        // SAFETY: as above.
        unsafe { _mm512_cvtepi32_ps(x) }
    }

    #[inline(always)]
    fn splat(x: f32) -> Self::Floats {
        // SAFETY: as above.
        unsafe { _mm512_set1_ps(x) }
    }

    #[inline(always)]
    fn unsigned(x: &[u8; TILE_ROWS]) -> Self::Floats {
        // SAFETY: reads the 16 bytes; AVX-512 is enabled wherever Avx512Registers is named.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(x.as_ptr().cast()))) }
    }

    #[inline(always)]
    fn signed(x: &[u8; TILE_ROWS]) -> Self::Floats {
        // SAFETY: reads the 16 bytes; AVX-512 is enabled wherever Avx512Registers is named.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(x.as_ptr().cast()))) }
    }

    #[inline(always)]
    fn halves(x: &[u8; 2 * TILE_ROWS]) -> Self::Floats {
        // SAFETY: reads the 32 bytes; AVX-512 is enabled wherever Avx512Registers is named.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast())) }
    }

    #[inline(always)]
    fn brains(x: &[u8; 2 * TILE_ROWS]) -> Self::Floats {
        // SAFETY: reads the 32 bytes; AVX-512 is enabled wherever Avx512Registers is named.
        unsafe {
            let x = _mm512_cvtepu16_epi32(_mm256_loadu_si256(x.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(x))
        }
    }

    #[inline(always)]
    fn floats(x: &Step) -> Self::Floats {
        // SAFETY: reads the 64 bytes; AVX-512 is enabled wherever Avx512Registers is named.
        unsafe { _mm512_loadu_ps(x.as_ptr().cast()) }
    }

    #[inline(always)]
    fn mul(a: Self::Floats, b: Self::Floats) -> Self::Floats {
        // SAFETY: AVX-512 is enabled wherever Avx512Registers is named.
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    fn madd(a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats {
        // SAFETY: as above.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn store(x: Self::Floats, out: &mut [f32; TILE_ROWS]) {
        // SAFETY: writes the 16 f32; AVX-512 is enabled wherever Avx512Registers is named.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), x) };
    }

    #[inline(always)]
    fn dot_brains(acc: Self::Floats, w: &Step, x: u32) -> Self::Floats {
        // SAFETY: reads the 64 bytes; the halves of every register are bf16, and AVX-512 BF16 is enabled wherever BF16 is true.
        unsafe {
            let w = _mm512_loadu_si512(w.as_ptr().cast());
            if BF16 {
                let (w, x) = (std::mem::transmute::<__m512i, __m512bh>(w), _mm512_set1_epi32(x as i32));
                return _mm512_dpbf16_ps(acc, w, std::mem::transmute::<__m512i, __m512bh>(x));
            }
            let first = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(w));
            let second = _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32(0xffff_0000_u32 as i32)));
            let acc = Self::madd(second, Self::splat(f32::from_bits(x & 0xffff_0000)), acc);
            Self::madd(first, Self::splat(f32::from_bits(x << 16)), acc)
        }
    }

    #[inline(always)]
    fn sums(q: &[[i8; 4]; 8]) -> [i32; 2] {
        let q = q.as_ptr().cast::<__m128i>();
        // SAFETY: reads both halves of 32 bytes, as they were stored; AVX-512 VNNI and VL are enabled wherever Avx512Registers is
        // named.
        unsafe {
            let ones = _mm_set1_epi8(1);
            let fours = |q| _mm_dpbusd_epi32(_mm_setzero_si128(), ones, _mm_loadu_si128(q));
            let pairs = _mm_hadd_epi32(fours(q), fours(q.add(1)));
            let sums = _mm_hadd_epi32(pairs, pairs);
            [_mm_cvtsi128_si32(sums), _mm_extract_epi32::<1>(sums)]
        }
    }

    #[inline(always)]
    fn prefetch<const N: usize>(at: &[u8; N]) {
        prefetch(at);
    }
}
