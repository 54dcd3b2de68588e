//! Registers of NEON with int8 dot products (FEAT_DotProd), on little-endian aarch64. Two instructions are assembly: the standard
//! library has the one in unstable Rust only, the other in newer versions than ours.

use super::registers::{Registers, Step};
use super::{LINE, TILE_ROWS};
use crate::prefetch;
use std::arch::aarch64::*;
use std::arch::asm;

/// Bytes ahead: as on x86, for want of a measurement.
const AHEAD: usize = 7168;

/// Four registers of 4 rows.
pub(crate) struct NeonRegisters;

#[inline(always)]
fn each<T>(f: impl Fn(usize) -> T) -> [T; 4] {
    [f(0), f(1), f(2), f(3)]
}

/// `vdotq_s32`: adds to each lane the products of four bytes.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn sdot(acc: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
    let sum;
    // SAFETY: touches nothing but its operands; the function enables the feature.
    unsafe {
        asm!(
            "sdot {acc:v}.4s, {w:v}.16b, {x:v}.16b",
            acc = inlateout(vreg) acc => sum,
            w = in(vreg) w,
            x = in(vreg) x,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}

/// `vcvt_f32_f16` of both halves.
#[inline(always)]
fn widen(x: uint16x8_t) -> [float32x4_t; 2] {
    let (low, high);
    // SAFETY: touches nothing but its operands; NEON is part of the target.
    unsafe {
        asm!("fcvtl {y:v}.4s, {x:v}.4h", y = lateout(vreg) low, x = in(vreg) x, options(pure, nomem, nostack, preserves_flags));
        asm!("fcvtl2 {y:v}.4s, {x:v}.8h", y = lateout(vreg) high, x = in(vreg) x, options(pure, nomem, nostack, preserves_flags));
    }
    [low, high]
}

/// 16 numbers of 16 bits, wider.
#[inline(always)]
fn quarters(low: uint16x8_t, high: uint16x8_t) -> [uint32x4_t; 4] {
    // SAFETY: NEON is part of the target.
    unsafe { [vmovl_u16(vget_low_u16(low)), vmovl_high_u16(low), vmovl_u16(vget_low_u16(high)), vmovl_high_u16(high)] }
}

impl Registers for NeonRegisters {
    type Bytes = [uint8x16_t; 4];
    type Quad = int8x16_t;
    type Ints = [int32x4_t; 4];
    type Floats = [float32x4_t; 4];
    const WIDE: bool = false;

    #[inline(always)]
    fn bytes(x: &Step) -> Self::Bytes {
        let x = x.as_ptr();
        // SAFETY: reads four quarters of 64 bytes; NEON is enabled wherever NeonRegisters is named.
        each(|i| unsafe { vld1q_u8(x.add(16 * i)) })
    }

    #[inline(always)]
    fn nibbles(x: Self::Bytes) -> [Self::Bytes; 2] {
        // SAFETY: NEON is enabled wherever NeonRegisters is named.
        unsafe { [each(|i| vandq_u8(x[i], vdupq_n_u8(15))), each(|i| vshrq_n_u8::<4>(x[i]))] }
    }

    #[inline(always)]
    fn six_bits<const PART: usize>(low: Self::Bytes, high: Self::Bytes) -> Self::Bytes {
        // SAFETY: as above.
        each(|i| unsafe {
            let high = match PART {
                0 => vshlq_n_u8::<4>(high[i]),
                1 => vshlq_n_u8::<2>(high[i]),
                2 => high[i],
                _ => vshrq_n_u8::<2>(high[i]),
            };
            vbslq_u8(vdupq_n_u8(0x30), high, low[i])
        })
    }

    #[inline(always)]
    fn quad(x: &[i8; 4]) -> Self::Quad {
        // SAFETY: as above.
        unsafe { vreinterpretq_s8_s32(vdupq_n_s32(i32::from_le_bytes(x.map(|x| x as u8)))) }
    }

    #[inline(always)]
    fn start<const SHIFT: u32>(x: i32) -> Self::Ints {
        // SAFETY: as above.
        unsafe { [vdupq_n_s32(x << SHIFT); 4] }
    }

    #[inline(always)]
    fn dot(acc: Self::Ints, w: Self::Bytes, x: Self::Quad) -> Self::Ints {
        // SAFETY: as above, and so are dot products.
        each(|i| unsafe { sdot(acc[i], vreinterpretq_s8_u8(w[i]), x) })
    }

    #[inline(always)]
    fn start_offset(_: i32) -> Self::Ints {
        Self::start::<0>(0)
    }

    #[inline(always)]
    fn dot_offset(acc: Self::Ints, w: Self::Bytes, x: Self::Quad) -> Self::Ints {
        // With its highest bit flipped a byte is, as a signed number, 128 less.
        // SAFETY: as above.
        Self::dot(acc, each(|i| unsafe { veorq_u8(w[i], vdupq_n_u8(0x80)) }), x)
    }

    #[inline(always)]
    fn to_floats(x: Self::Ints) -> Self::Floats {
        // SAFETY: as above.
        each(|i| unsafe { vcvtq_f32_s32(x[i]) })
    }

    #[inline(always)]
    fn splat(x: f32) -> Self::Floats {
        // SAFETY: as above.
        unsafe { [vdupq_n_f32(x); 4] }
    }

    #[inline(always)]
    fn unsigned(x: &[u8; TILE_ROWS]) -> Self::Floats {
        // SAFETY: reads the 16 bytes; NEON is enabled wherever NeonRegisters is named.
        unsafe {
            let x = vld1q_u8(x.as_ptr());
            let wide = quarters(vmovl_u8(vget_low_u8(x)), vmovl_high_u8(x));
            each(|i| vcvtq_f32_u32(wide[i]))
        }
    }

    #[inline(always)]
    fn signed(x: &[u8; TILE_ROWS]) -> Self::Floats {
        // SAFETY: reads the 16 bytes; NEON is enabled wherever NeonRegisters is named.
        unsafe {
            let x = vld1q_s8(x.as_ptr().cast());
            let (low, high) = (vmovl_s8(vget_low_s8(x)), vmovl_high_s8(x));
            let wide = [
                vmovl_s16(vget_low_s16(low)),
                vmovl_high_s16(low),
                vmovl_s16(vget_low_s16(high)),
                vmovl_high_s16(high),
            ];
            each(|i| vcvtq_f32_s32(wide[i]))
        }
    }

    #[inline(always)]
    fn halves(x: &[u8; 2 * TILE_ROWS]) -> Self::Floats {
        let x = x.as_ptr();
        // SAFETY: reads both halves of 32 bytes; NEON is enabled wherever NeonRegisters is named.
        let [low, high] = unsafe { [vreinterpretq_u16_u8(vld1q_u8(x)), vreinterpretq_u16_u8(vld1q_u8(x.add(16)))] };
        let ([a, b], [c, d]) = (widen(low), widen(high));
        [a, b, c, d]
    }

    #[inline(always)]
    fn brains(x: &[u8; 2 * TILE_ROWS]) -> Self::Floats {
        let x = x.as_ptr();
        // SAFETY: reads both halves of 32 bytes; NEON is enabled wherever NeonRegisters is named.
        unsafe {
            let wide = quarters(vreinterpretq_u16_u8(vld1q_u8(x)), vreinterpretq_u16_u8(vld1q_u8(x.add(16))));
            each(|i| vreinterpretq_f32_u32(vshlq_n_u32::<16>(wide[i])))
        }
    }

    #[inline(always)]
    fn floats(x: &Step) -> Self::Floats {
        let x = Self::bytes(x);
        // SAFETY: NEON is enabled wherever NeonRegisters is named.
        each(|i| unsafe { vreinterpretq_f32_u8(x[i]) })
    }

    #[inline(always)]
    fn mul(a: Self::Floats, b: Self::Floats) -> Self::Floats {
        // SAFETY: as above.
        each(|i| unsafe { vmulq_f32(a[i], b[i]) })
    }

    #[inline(always)]
    fn madd(a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats {
        // SAFETY: as above.
        each(|i| unsafe { vfmaq_f32(c[i], a[i], b[i]) })
    }

    #[inline(always)]
    fn store(x: Self::Floats, out: &mut [f32; TILE_ROWS]) {
        let out = out.as_mut_ptr();
        for i in 0..4 {
            // SAFETY: writes four quarters of 16 f32; NEON is enabled wherever NeonRegisters is named.
            unsafe { vst1q_f32(out.add(4 * i), x[i]) };
        }
    }

    #[inline(always)]
    fn dot_brains(acc: Self::Floats, w: &Step, x: u32) -> Self::Floats {
        let w = Self::bytes(w);
        // SAFETY: NEON is enabled wherever NeonRegisters is named.
        let [first, second] = unsafe {
            let pair = |i: usize| vreinterpretq_u32_u8(w[i]);
            [
                each(|i| vreinterpretq_f32_u32(vshlq_n_u32::<16>(pair(i)))),
                each(|i| vreinterpretq_f32_u32(vandq_u32(pair(i), vdupq_n_u32(0xffff_0000)))),
            ]
        };
        let acc = Self::madd(second, Self::splat(f32::from_bits(x & 0xffff_0000)), acc);
        Self::madd(first, Self::splat(f32::from_bits(x << 16)), acc)
    }

    #[inline(always)]
    fn sums(q: &[[i8; 4]; 8]) -> [i32; 2] {
        let q = q.as_flattened().as_ptr();
        // SAFETY: reads both halves of 32 bytes; NEON is enabled wherever NeonRegisters is named.
        unsafe { [vld1q_s8(q), vld1q_s8(q.add(16))].map(|half| i32::from(vaddlvq_s8(half))) }
    }

    #[inline(always)]
    fn prefetch<const N: usize>(at: &[u8; N]) {
        let start = at.as_ptr().wrapping_add(AHEAD);
        (0..N).step_by(LINE).for_each(|at| prefetch::line(start.wrapping_add(at)));
    }
}
