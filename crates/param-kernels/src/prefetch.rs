//! Asking for memory before it is needed.

const LINE: usize = 64;

/// Asks for every cache line of `x`. Costs about as much as one load a line, and nothing else happens.
#[inline]
pub fn prefetch<T>(x: &[T]) {
    let start = x.as_ptr().cast::<u8>();
    for at in (0..size_of_val(x)).step_by(LINE) {
        line(start.wrapping_add(at));
    }
}

/// Asks for every cache line of `x` in the second-level cache, for use after other work.
#[inline]
pub fn prefetch_for_later<T>(x: &[T]) {
    let start = x.as_ptr().cast::<u8>();
    for at in (0..size_of_val(x)).step_by(LINE) {
        line_for_later(start.wrapping_add(at));
    }
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn line_for_later(at: *const u8) {
    use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
    // SAFETY: a prefetch never faults, whatever the address; SSE is part of x86-64.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) };
}

#[cfg(target_arch = "aarch64")]
#[inline(always)]
fn line_for_later(at: *const u8) {
    // SAFETY: a prefetch never faults, whatever the address, and changes nothing that a program can see.
    unsafe { std::arch::asm!("prfm pldl2keep, [{}]", in(reg) at, options(nostack, preserves_flags, readonly)) };
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
#[inline(always)]
fn line_for_later(_: *const u8) {}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) fn line(at: *const u8) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    // SAFETY: a prefetch never faults, whatever the address; SSE is part of x86-64.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) };
}

#[cfg(target_arch = "aarch64")]
#[inline(always)]
pub(crate) fn line(at: *const u8) {
    // SAFETY: a prefetch never faults, whatever the address, and changes nothing that a program can see.
    unsafe { std::arch::asm!("prfm pldl1keep, [{}]", in(reg) at, options(nostack, preserves_flags, readonly)) };
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
#[inline(always)]
pub(crate) fn line(_: *const u8) {}
