//! Rows of f32 to any storable type and back.

use std::ffi::c_void;

use ggml_sys_bleedingedge as sys;
use gguf::GgmlType;
use half::{bf16, f16};

use crate::{Error, Result, init};

/// Elements passed to ggml at once: well below 31 bits, as it counts blocks in `int`, and whole blocks of any type.
const CHUNK: usize = 1 << 20;
/// Largest magnitude quantized into blocks. Their scales and minima are f16, which ends at 65,504, and ggml fits them
/// by least squares, which can pass the values themselves.
const MAX_IN_BLOCK: f32 = 32_768.0;
/// Half of the smallest scale that f16 holds. Blocks of smaller numbers are stored as zeros in any case; zeroing them
/// first keeps ggml from dividing the zeros that their squares underflow to.
const MIN_IN_BLOCK: f32 = 1.0 / (1 << 25) as f32;

/// Whether [`quantize`] stores a type. ggml reads a few more (the grid formats IQ1, IQ2 and IQ3), but its quantizers
/// for them abort the process on inputs that no check foresees.
pub fn can_quantize(ty: GgmlType) -> bool {
    use GgmlType::*;
    matches!(
        ty,
        F32 | F16 | BF16 | Q4_0 | Q4_1 | Q5_0 | Q5_1 | Q8_0 | Q2_K | Q3_K | Q4_K | Q5_K | Q6_K | IQ4_NL | IQ4_XS
    )
}

/// Stores rows of `n_per_row` elements as `ty`: `src` is [n_row, n_per_row], `dst` as many bytes as
/// [`GgmlType::row_size`] says. `imatrix` ([n_per_row], all at least 0) weighs the error per column; the float types
/// and Q8_0 have no use for it. In blocks, numbers below 2^-25 become zero.
///
/// # Errors
/// Types that [`can_quantize`] denies, lengths that disagree, numbers that are not finite or too large (beyond the
/// type's own range, or 32,768 in blocks), a negative importance, a `dst` at an odd address.
pub fn quantize(ty: GgmlType, src: &[f32], n_per_row: usize, imatrix: Option<&[f32]>, dst: &mut [u8]) -> Result<()> {
    if !can_quantize(ty) {
        return Err(Error::Unsupported { ty, operation: "quantized to" });
    }
    let row_bytes = row_bytes(ty, n_per_row)?;
    let n_row = src.len() / n_per_row;
    expect_length("elements to quantize", n_row * n_per_row, src.len())?;
    expect_length("bytes of quantized rows", n_row * row_bytes, dst.len())?;
    let importance = imatrix.map(|weights| importance(weights, n_per_row)).transpose()?;
    match ty {
        GgmlType::F32 => {
            for (index, (&value, out)) in src.iter().zip(dst.as_chunks_mut().0).enumerate() {
                if !value.is_finite() {
                    return Err(Error::NotFinite { index, value, ty });
                }
                *out = value.to_le_bytes();
            }
            Ok(())
        }
        GgmlType::F16 => to_halves(ty, src, dst, |value| f16::from_f32(value).to_bits(), 0x7c00),
        GgmlType::BF16 => to_halves(ty, src, dst, |value| bf16::from_f32(value).to_bits(), 0x7f80),
        _ => {
            expect_aligned("quantized rows", dst.as_ptr(), 2)?;
            init::traits(ty)?;
            let rows = (CHUNK / n_per_row).max(1);
            let chunks = src.chunks(rows * n_per_row).zip(dst.chunks_mut(rows * row_bytes));
            for (chunk, (src, dst)) in chunks.enumerate() {
                quantize_chunk(ty, src, n_per_row, importance.as_deref(), dst, chunk * rows * n_per_row)?;
            }
            Ok(())
        }
    }
}

/// Checks a chunk of rows whose first element has number `first` among all, and has ggml quantize it.
fn quantize_chunk(
    ty: GgmlType,
    src: &[f32],
    n_per_row: usize,
    importance: Option<&[f32]>,
    dst: &mut [u8],
    first: usize,
) -> Result<()> {
    let mut has_tiny = false;
    for (i, &value) in src.iter().enumerate() {
        let in_range = value.abs() <= MAX_IN_BLOCK; // NaN is not
        if !in_range {
            let index = first + i;
            return Err(if value.is_finite() {
                Error::TooLarge { index, value, ty }
            } else {
                Error::NotFinite { index, value, ty }
            });
        }
        has_tiny |= value != 0.0 && value.abs() < MIN_IN_BLOCK;
    }
    let flushed: Vec<f32>; // [n_row, n_per_row] of the chunk
    let src = if has_tiny {
        flushed = src.iter().map(|&value| if value.abs() < MIN_IN_BLOCK { 0.0 } else { value }).collect();
        &flushed
    } else {
        src
    };
    let weights = importance.map_or(std::ptr::null(), <[f32]>::as_ptr);
    let n_row = (src.len() / n_per_row) as i64;
    // SAFETY: `quantize` has checked that the type has a quantizer, that rows are whole blocks, that `dst` holds
    // n_row of them at the alignment of a block, and that the weights, if any, are n_per_row; the sizes fit 31 bits.
    let written = unsafe {
        let dst = dst.as_mut_ptr().cast::<c_void>();
        sys::ggml_quantize_chunk(ty.id(), src.as_ptr(), dst, 0, n_row, n_per_row as i64, weights)
    };
    debug_assert_eq!(written, dst.len());
    Ok(())
}

/// Two bytes per element; `infinity` is the exponent mask of the type, which no finite number may round to.
pub(crate) fn to_halves(
    ty: GgmlType,
    src: &[f32],
    dst: &mut [u8],
    convert: impl Fn(f32) -> u16,
    infinity: u16,
) -> Result<()> {
    for (index, (&value, out)) in src.iter().zip(dst.as_chunks_mut().0).enumerate() {
        let bits = convert(value);
        if bits & infinity == infinity {
            return Err(if value.is_finite() {
                Error::TooLarge { index, value, ty }
            } else {
                Error::NotFinite { index, value, ty }
            });
        }
        *out = bits.to_le_bytes();
    }
    Ok(())
}

/// The column weights, scaled to at most 1 and kept off zero: only their ratios matter to ggml, and a group whose
/// weights all vanish would make it divide zero by zero.
fn importance(weights: &[f32], n_per_row: usize) -> Result<Vec<f32>> {
    expect_length("importance per column", n_per_row, weights.len())?;
    if let Some(index) = weights.iter().position(|weight| !(weight.is_finite() && *weight >= 0.0)) {
        return Err(Error::Importance { index, value: weights[index] });
    }
    let max = weights.iter().copied().fold(f32::MIN_POSITIVE, f32::max);
    Ok(weights.iter().map(|weight| (weight / max).max(1e-6)).collect())
}

/// Restores rows stored as `ty` to f32. `src` holds as many bytes as [`GgmlType::row_size`] says for `dst`; several
/// rows at once are one longer row.
///
/// # Errors
/// Types that ggml does not read, lengths that disagree, blocks at an odd address.
pub fn dequantize(ty: GgmlType, src: &[u8], dst: &mut [f32]) -> Result<()> {
    let expected = ty.row_size(dst.len() as u64).and_then(|n| usize::try_from(n).ok());
    let Some(expected) = expected else {
        return Err(Error::RowLength { ty, n_per_row: dst.len(), block_size: ty.block_size() as usize });
    };
    expect_length("bytes of quantized rows", expected, src.len())?;
    match ty {
        GgmlType::F32 => {
            dst.iter_mut().zip(src.as_chunks().0).for_each(|(out, &bytes)| *out = f32::from_le_bytes(bytes))
        }
        GgmlType::F16 => {
            dst.iter_mut().zip(src.as_chunks().0).for_each(|(out, &bytes)| *out = f16::from_le_bytes(bytes).to_f32())
        }
        GgmlType::BF16 => {
            dst.iter_mut().zip(src.as_chunks().0).for_each(|(out, &bytes)| *out = bf16::from_le_bytes(bytes).to_f32())
        }
        _ => {
            let to_float = init::traits(ty)?.and_then(|traits| traits.to_float);
            let to_float = to_float.ok_or(Error::Unsupported { ty, operation: "dequantized" })?;
            expect_aligned("quantized rows", src.as_ptr(), alignment(ty))?;
            let chunk_bytes = CHUNK / ty.block_size() as usize * ty.type_size() as usize;
            for (src, dst) in src.chunks(chunk_bytes).zip(dst.chunks_mut(CHUNK)) {
                // SAFETY: `src` is the whole blocks of `dst`'s elements, aligned for them; every byte is valid in a block.
                unsafe { to_float(src.as_ptr().cast(), dst.as_mut_ptr(), dst.len() as i64) };
            }
        }
    }
    Ok(())
}

/// Alignment of a block in ggml's C structs: that of its scales.
pub(crate) fn alignment(ty: GgmlType) -> usize {
    if matches!(ty, GgmlType::F32 | GgmlType::Q8_1 | GgmlType::Q8_K) { 4 } else { 2 }
}

pub(crate) fn expect_aligned(what: &'static str, at: *const u8, align: usize) -> Result<()> {
    if at.addr().is_multiple_of(align) { Ok(()) } else { Err(Error::Misaligned { what, align }) }
}

pub(crate) fn expect_length(what: &'static str, expected: usize, found: usize) -> Result<()> {
    if expected == found { Ok(()) } else { Err(Error::Length { what, expected, found }) }
}

/// Bytes of a row of `n_per_row` elements, which ggml counts in `int`.
pub(crate) fn row_bytes(ty: GgmlType, n_per_row: usize) -> Result<usize> {
    let fits = n_per_row > 0 && i32::try_from(n_per_row).is_ok();
    let bytes = ty.row_size(n_per_row as u64).filter(|_| fits).and_then(|n| usize::try_from(n).ok());
    bytes.ok_or(Error::RowLength { ty, n_per_row, block_size: ty.block_size() as usize })
}
