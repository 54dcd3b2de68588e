//! Registers of a tile's 16 rows, and the int8 dot products of each instruction set. The scalar twin is the reference.

use super::TILE_ROWS;
use crate::isa::{Baseline, Isa, LANES};
use half::f16;

/// What the products of tiles ask of an instruction set. As with [`Isa`], the implementing types are only named inside functions
/// that enable the features they stand for, which is what their `// SAFETY:` comments rest on.
pub(crate) trait Int8 {
    /// 16 rows by 4 columns of bytes.
    type Bytes: Copy;
    /// 16 rows of i32.
    type Ints: Copy;
    /// 16 rows of f32.
    type Floats: Copy;

    fn bytes(x: &[u8; 4 * TILE_ROWS]) -> Self::Bytes;
    fn low_nibbles(x: Self::Bytes) -> Self::Bytes;
    fn high_nibbles(x: Self::Bytes) -> Self::Bytes;

    /// What a sum of [`Int8::dot_i8`] over activations of this sum starts from; for [`Int8::dot_u4`] give 0.
    fn start(sum: i32) -> Self::Ints;
    /// `acc + w · x` per row, of weights below 16.
    fn dot_u4(acc: Self::Ints, w: Self::Bytes, x: [i8; 4]) -> Self::Ints;
    /// `acc + (w - 128) · x` per row, where 128 may be left to [`Int8::start`].
    fn dot_i8(acc: Self::Ints, w: Self::Bytes, x: [i8; 4]) -> Self::Ints;

    fn to_floats(x: Self::Ints) -> Self::Floats;
    fn floats(x: &[f32; TILE_ROWS]) -> Self::Floats;
    fn splat(x: f32) -> Self::Floats;
    fn widen(x: &[u8; TILE_ROWS]) -> Self::Floats;
    /// From little-endian f16.
    fn halves(x: &[u8; 2 * TILE_ROWS]) -> Self::Floats;
    fn mul(a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// `a * b + c`.
    fn madd(a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats;
    fn store(x: Self::Floats) -> [f32; TILE_ROWS];

    /// Asks for what lies as far behind the block as memory is slow: the processor's own prefetching stops at every page.
    fn prefetch<const N: usize>(block: &[u8; N]);
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
fn dot(acc: [i32; TILE_ROWS], w: &[u8; 4 * TILE_ROWS], offset: i32, x: [i8; 4]) -> [i32; TILE_ROWS] {
    let product = |lane: usize, i: usize| (i32::from(w[4 * lane + i]) - offset) * i32::from(x[i]);
    lanes(|lane| acc[lane] + ((product(lane, 0) + product(lane, 1)) + (product(lane, 2) + product(lane, 3))))
}

impl Int8 for Scalar {
    type Bytes = [u8; 4 * TILE_ROWS];
    type Ints = [i32; TILE_ROWS];
    type Floats = [f32; TILE_ROWS];

    #[inline(always)]
    fn bytes(x: &[u8; 4 * TILE_ROWS]) -> Self::Bytes {
        *x
    }

    #[inline(always)]
    fn low_nibbles(x: Self::Bytes) -> Self::Bytes {
        x.map(|x| x & 15)
    }

    #[inline(always)]
    fn high_nibbles(x: Self::Bytes) -> Self::Bytes {
        x.map(|x| x >> 4)
    }

    #[inline(always)]
    fn start(_: i32) -> Self::Ints {
        [0; TILE_ROWS]
    }

    #[inline(always)]
    fn dot_u4(acc: Self::Ints, w: Self::Bytes, x: [i8; 4]) -> Self::Ints {
        dot(acc, &w, 0, x)
    }

    #[inline(always)]
    fn dot_i8(acc: Self::Ints, w: Self::Bytes, x: [i8; 4]) -> Self::Ints {
        dot(acc, &w, 128, x)
    }

    #[inline(always)]
    fn to_floats(x: Self::Ints) -> Self::Floats {
        lanes(|lane| x[lane] as f32)
    }

    #[inline(always)]
    fn floats(x: &[f32; TILE_ROWS]) -> Self::Floats {
        *x
    }

    #[inline(always)]
    fn splat(x: f32) -> Self::Floats {
        [x; TILE_ROWS]
    }

    #[inline(always)]
    fn widen(x: &[u8; TILE_ROWS]) -> Self::Floats {
        lanes(|lane| f32::from(x[lane]))
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
    fn mul(a: Self::Floats, b: Self::Floats) -> Self::Floats {
        lanes(|lane| a[lane] * b[lane])
    }

    #[inline(always)]
    fn madd(a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats {
        lanes(|lane| Baseline::madd(a[lane], b[lane], c[lane]))
    }

    #[inline(always)]
    fn store(x: Self::Floats) -> [f32; TILE_ROWS] {
        x
    }

    #[inline(always)]
    fn prefetch<const N: usize>(_: &[u8; N]) {}
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2Int8, Vnni};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Int8, TILE_ROWS};
    use std::arch::x86_64::*;

    const LINE: usize = 64;
    /// Bytes ahead: a page, about 100 ns at the pace of one core.
    const AHEAD: usize = 4096;

    #[inline(always)]
    fn prefetch<const N: usize>(block: &[u8; N]) {
        let start = block.as_ptr().wrapping_add(AHEAD);
        for line in (0..N).step_by(LINE) {
            // SAFETY: a prefetch never faults, whatever the address; SSE is part of x86-64.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(start.wrapping_add(line).cast()) };
        }
    }

    #[inline(always)]
    fn four(x: [i8; 4]) -> i32 {
        i32::from_le_bytes(x.map(|x| x as u8))
    }

    /// Two registers of 8 rows: AVX2 with FMA and F16C.
    pub(crate) struct Avx2Int8;

    impl Int8 for Avx2Int8 {
        type Bytes = [__m256i; 2];
        type Ints = [__m256i; 2];
        type Floats = [__m256; 2];

        #[inline(always)]
        fn bytes(x: &[u8; 4 * TILE_ROWS]) -> Self::Bytes {
            let x = x.as_ptr().cast::<__m256i>();
            // SAFETY: reads both halves of 64 bytes; AVX2 is enabled wherever Avx2Int8 is named.
            unsafe { [_mm256_loadu_si256(x), _mm256_loadu_si256(x.add(1))] }
        }

        #[inline(always)]
        fn low_nibbles(x: Self::Bytes) -> Self::Bytes {
            // SAFETY: AVX2 is enabled wherever Avx2Int8 is named.
            x.map(|x| unsafe { _mm256_and_si256(x, _mm256_set1_epi8(15)) })
        }

        #[inline(always)]
        fn high_nibbles(x: Self::Bytes) -> Self::Bytes {
            // SAFETY: as above.
            x.map(|x| unsafe { _mm256_and_si256(_mm256_srli_epi16::<4>(x), _mm256_set1_epi8(15)) })
        }

        #[inline(always)]
        fn start(_: i32) -> Self::Ints {
            // SAFETY: as above.
            unsafe { [_mm256_setzero_si256(); 2] }
        }

        #[inline(always)]
        fn dot_u4(acc: Self::Ints, w: Self::Bytes, x: [i8; 4]) -> Self::Ints {
            // SAFETY: as above. Pairs of products reach 2 * 15 * 127, which fits 16 bits.
            unsafe {
                let (x, one) = (_mm256_set1_epi32(four(x)), _mm256_set1_epi16(1));
                let dot = |acc, w| _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), one));
                [dot(acc[0], w[0]), dot(acc[1], w[1])]
            }
        }

        #[inline(always)]
        fn dot_i8(acc: Self::Ints, w: Self::Bytes, x: [i8; 4]) -> Self::Ints {
            // SAFETY: as above. Of the operands of the product one is unsigned: the weight's sign moves to the activation.
            // Pairs of products reach 2 * 128 * 127, which fits 16 bits.
            unsafe {
                let (x, one) = (_mm256_set1_epi32(four(x)), _mm256_set1_epi16(1));
                let dot = |acc, w| {
                    let w = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
                    let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
                    _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, one))
                };
                [dot(acc[0], w[0]), dot(acc[1], w[1])]
            }
        }

        #[inline(always)]
        fn to_floats(x: Self::Ints) -> Self::Floats {
            // SAFETY: as above.
            x.map(|x| unsafe { _mm256_cvtepi32_ps(x) })
        }

        #[inline(always)]
        fn floats(x: &[f32; TILE_ROWS]) -> Self::Floats {
            let x = x.as_ptr();
            // SAFETY: reads both halves of 16 f32; AVX is enabled wherever Avx2Int8 is named.
            unsafe { [_mm256_loadu_ps(x), _mm256_loadu_ps(x.add(8))] }
        }

        #[inline(always)]
        fn splat(x: f32) -> Self::Floats {
            // SAFETY: as above.
            unsafe { [_mm256_set1_ps(x); 2] }
        }

        #[inline(always)]
        fn widen(x: &[u8; TILE_ROWS]) -> Self::Floats {
            // SAFETY: reads the 16 bytes; AVX2 is enabled wherever Avx2Int8 is named.
            unsafe {
                let x = _mm_loadu_si128(x.as_ptr().cast());
                let widen = |x| _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(x));
                [widen(x), widen(_mm_srli_si128::<8>(x))]
            }
        }

        #[inline(always)]
        fn halves(x: &[u8; 2 * TILE_ROWS]) -> Self::Floats {
            let x = x.as_ptr().cast::<__m128i>();
            // SAFETY: reads both halves of 32 bytes; F16C is enabled wherever Avx2Int8 is named.
            unsafe { [_mm256_cvtph_ps(_mm_loadu_si128(x)), _mm256_cvtph_ps(_mm_loadu_si128(x.add(1)))] }
        }

        #[inline(always)]
        fn mul(a: Self::Floats, b: Self::Floats) -> Self::Floats {
            // SAFETY: AVX is enabled wherever Avx2Int8 is named.
            unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
        }

        #[inline(always)]
        fn madd(a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats {
            // SAFETY: FMA is enabled wherever Avx2Int8 is named.
            unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
        }

        #[inline(always)]
        fn store(x: Self::Floats) -> [f32; TILE_ROWS] {
            let mut y = [0.0; TILE_ROWS];
            // SAFETY: writes both halves of 16 f32.
            unsafe {
                _mm256_storeu_ps(y.as_mut_ptr(), x[0]);
                _mm256_storeu_ps(y.as_mut_ptr().add(8), x[1]);
            }
            y
        }

        #[inline(always)]
        fn prefetch<const N: usize>(block: &[u8; N]) {
            prefetch(block);
        }
    }

    /// One register: AVX-512 F, BW and VNNI.
    pub(crate) struct Vnni;

    impl Int8 for Vnni {
        type Bytes = __m512i;
        type Ints = __m512i;
        type Floats = __m512;

        #[inline(always)]
        fn bytes(x: &[u8; 4 * TILE_ROWS]) -> Self::Bytes {
            // SAFETY: reads the 64 bytes; AVX-512 is enabled wherever Vnni is named.
            unsafe { _mm512_loadu_si512(x.as_ptr().cast()) }
        }

        #[inline(always)]
        fn low_nibbles(x: Self::Bytes) -> Self::Bytes {
            // SAFETY: AVX-512 is enabled wherever Vnni is named.
            unsafe { _mm512_and_si512(x, _mm512_set1_epi8(15)) }
        }

        #[inline(always)]
        fn high_nibbles(x: Self::Bytes) -> Self::Bytes {
            // SAFETY: as above.
            unsafe { _mm512_and_si512(_mm512_srli_epi16::<4>(x), _mm512_set1_epi8(15)) }
        }

        #[inline(always)]
        fn start(sum: i32) -> Self::Ints {
            // SAFETY: as above.
            unsafe { _mm512_set1_epi32(-128 * sum) }
        }

        #[inline(always)]
        fn dot_u4(acc: Self::Ints, w: Self::Bytes, x: [i8; 4]) -> Self::Ints {
            // SAFETY: as above.
            unsafe { _mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(four(x))) }
        }

        #[inline(always)]
        fn dot_i8(acc: Self::Ints, w: Self::Bytes, x: [i8; 4]) -> Self::Ints {
            // The instruction takes unsigned weights as they are; `start` has taken 128 times the activations off.
            Self::dot_u4(acc, w, x)
        }

        #[inline(always)]
        fn to_floats(x: Self::Ints) -> Self::Floats {
            // SAFETY: as above.
            unsafe { _mm512_cvtepi32_ps(x) }
        }

        #[inline(always)]
        fn floats(x: &[f32; TILE_ROWS]) -> Self::Floats {
            // SAFETY: reads the 16 f32; AVX-512 is enabled wherever Vnni is named.
            unsafe { _mm512_loadu_ps(x.as_ptr()) }
        }

        #[inline(always)]
        fn splat(x: f32) -> Self::Floats {
            // SAFETY: as above.
            unsafe { _mm512_set1_ps(x) }
        }

        #[inline(always)]
        fn widen(x: &[u8; TILE_ROWS]) -> Self::Floats {
            // SAFETY: reads the 16 bytes; AVX-512 is enabled wherever Vnni is named.
            unsafe { _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(x.as_ptr().cast()))) }
        }

        #[inline(always)]
        fn halves(x: &[u8; 2 * TILE_ROWS]) -> Self::Floats {
            // SAFETY: reads the 32 bytes; AVX-512 is enabled wherever Vnni is named.
            unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast())) }
        }

        #[inline(always)]
        fn mul(a: Self::Floats, b: Self::Floats) -> Self::Floats {
            // SAFETY: AVX-512 is enabled wherever Vnni is named.
            unsafe { _mm512_mul_ps(a, b) }
        }

        #[inline(always)]
        fn madd(a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats {
            // SAFETY: as above.
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }

        #[inline(always)]
        fn store(x: Self::Floats) -> [f32; TILE_ROWS] {
            let mut y = [0.0; TILE_ROWS];
            // SAFETY: writes the 16 f32.
            unsafe { _mm512_storeu_ps(y.as_mut_ptr(), x) };
            y
        }

        #[inline(always)]
        fn prefetch<const N: usize>(block: &[u8; N]) {
            prefetch(block);
        }
    }
}
