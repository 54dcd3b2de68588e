//! Probes of what the machine can do, against which kernels are measured: reading memory, and each kind of multiply-add with
//! operands in registers.

use crate::isa::Isa;
use crate::tiles::Registers;
use crate::{Kernels, Team};
use std::hint::black_box;
use std::sync::Mutex;
use std::time::Instant;

/// A kind of multiply-add.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arithmetic {
    /// Bytes, summed in 32 bits.
    Int8,
    /// bf16, summed in f32.
    Bf16,
    /// f32.
    F32,
}

/// Multiplications and additions a second that all threads of `team` reach together with operands in registers, measured for some
/// hundredths of a second.
pub fn arithmetic_peak(team: &mut Team, kind: Arithmetic) -> f64 {
    /// Steps of a probe.
    const N: usize = 3_000_000;
    let kernels = Kernels::get();
    let done = Mutex::new(0.0);
    let start = Instant::now();
    team.for_each(team.n_thread(), |_, _| {
        let n = match kind {
            Arithmetic::Int8 => kernels.probe_int8(N),
            Arithmetic::Bf16 => kernels.probe_bf16(N),
            Arithmetic::F32 => kernels.probe_f32(N),
        };
        if let Ok(mut done) = done.lock() {
            *done += n;
        }
    });
    done.into_inner().unwrap_or_default() / start.elapsed().as_secs_f64()
}

/// Independent sums: enough to hide the latency of two multiply-adds a cycle.
const CHAINS: usize = 12;

/// As many of them as the registers hold.
const fn chains<I: Isa>() -> usize {
    if I::Tile::WIDE { CHAINS } else { CHAINS / 2 }
}

/// Bytes that a step of every probe multiplies: 16 rows by 4 columns of bytes, by 2 of bf16, or 16 f32.
const STEP: usize = 64;

/// See [`crate::Kernels::probe_read`].
#[inline(always)]
pub(crate) fn read<I: Isa>(x: &[u8]) -> u32 {
    let (steps, _) = x.as_chunks::<STEP>();
    let mut acc = [[0u32; STEP / 4]; 4];
    let (fours, _) = steps.as_chunks::<4>();
    for four in fours {
        for (acc, step) in acc.iter_mut().zip(four) {
            I::Tile::prefetch(step);
            let (words, _) = step.as_chunks::<4>();
            for lane in 0..STEP / 4 {
                acc[lane] ^= u32::from_ne_bytes(words[lane]);
            }
        }
    }
    acc.as_flattened().iter().fold(0, |a, b| a ^ b)
}

/// See [`crate::Kernels::probe_int8`].
#[inline(always)]
pub(crate) fn int8<I: Isa>(n: usize) -> f64 {
    let w = I::Tile::bytes(&black_box([3; STEP]));
    let mut acc = [I::Tile::start::<0>(0); CHAINS];
    for _ in 0..n {
        // New to the compiler each time: part of a product takes several instructions, which it would do once for all.
        let x = I::Tile::quad(&black_box([1, -1, 2, -2]));
        for acc in &mut acc[..chains::<I>()] {
            *acc = I::Tile::dot(*acc, w, x);
        }
    }
    black_box(acc.map(I::Tile::to_floats));
    (2 * STEP * chains::<I>() * n) as f64
}

/// See [`crate::Kernels::probe_bf16`].
#[inline(always)]
pub(crate) fn bf16<I: Isa>(n: usize) -> f64 {
    let (w, x) = (black_box([0; STEP]), black_box(0));
    let mut acc = [I::Tile::splat(0.0); CHAINS];
    for _ in 0..n {
        for acc in &mut acc[..chains::<I>()] {
            *acc = I::Tile::dot_brains(*acc, &w, x);
        }
    }
    black_box(acc);
    (STEP * chains::<I>() * n) as f64
}

/// See [`crate::Kernels::probe_f32`].
#[inline(always)]
pub(crate) fn f32<I: Isa>(n: usize) -> f64 {
    let (w, x) = (I::Tile::floats(&black_box([0; STEP])), I::Tile::splat(black_box(0.0)));
    let mut acc = [I::Tile::splat(0.0); CHAINS];
    for _ in 0..n {
        for acc in &mut acc[..chains::<I>()] {
            *acc = I::Tile::madd(w, x, *acc);
        }
    }
    black_box(acc);
    (STEP / 2 * chains::<I>() * n) as f64
}
