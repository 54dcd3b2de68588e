//! Rows of a weight matrix times one row of activations, in whatever type the weights are stored.

use std::ffi::c_void;

use gguf::GgmlType;
use half::f16;

use crate::quantize::{alignment, expect_aligned, expect_length, row_bytes, to_halves};
use crate::{Error, Result, init};

/// Activations below it become zero: their inverse, which ggml scales by, would be infinite.
const MIN_ACTIVATION: f32 = 1e-30;
/// Elements in the blocks that ggml takes in pairs.
const PAIRED: usize = 32;
/// Bytes of two of the largest such blocks.
const PAIR_BYTES: usize = 72;

/// The dot product with weights of one type: fetch it once, use it from any thread.
///
/// Activations are first converted to the type that the weights' kernel reads ([`DotKernel::quantize_row`]), once for
/// all the rows that meet them.
#[derive(Clone, Copy, Debug)]
pub struct DotKernel {
    weights: Format,
    activations: Format,
    kernel: Kernel,
}

#[derive(Clone, Copy, Debug)]
struct Format {
    ty: GgmlType,
    /// Elements per block.
    block_size: usize,
    /// Bytes per block.
    type_size: usize,
    align: usize,
}

type VecDot = unsafe extern "C" fn(i32, *mut f32, usize, *const c_void, usize, *const c_void, usize, i32);
type FromFloat = unsafe extern "C" fn(*const f32, *mut c_void, i64);

#[derive(Clone, Copy, Debug)]
enum Kernel {
    /// ggml's dot product, and its conversion of activations where that is not plain floats.
    Ggml {
        vec_dot: VecDot,
        from_float: Option<FromFloat>,
    },
    Bf16,
}

impl Format {
    fn new(ty: GgmlType) -> Format {
        let (block_size, type_size) = (ty.block_size() as usize, ty.type_size() as usize);
        Format { ty, block_size, type_size, align: alignment(ty) }
    }
}

impl DotKernel {
    /// The kernel for weights of a type.
    ///
    /// # Errors
    /// Types that ggml does not multiply: integers, F64, the activation types Q8_1 and Q8_K, and types newer than it.
    pub fn new(weights: GgmlType) -> Result<DotKernel> {
        if weights == GgmlType::BF16 {
            let (weights, activations) = (Format::new(weights), Format::new(GgmlType::F32));
            return Ok(DotKernel { weights, activations, kernel: Kernel::Bf16 });
        }
        let unsupported = Error::Unsupported { ty: weights, operation: "multiplied" };
        let traits = init::traits(weights)?;
        let Some((vec_dot, ty)) = traits.and_then(|t| Some((t.vec_dot?, GgmlType::from_id(t.vec_dot_type)?))) else {
            return Err(unsupported);
        };
        let from_float = match ty {
            GgmlType::F32 | GgmlType::F16 => None,
            _ => Some(init::traits(ty)?.and_then(|t| t.from_float).ok_or(unsupported)?),
        };
        let kernel = Kernel::Ggml { vec_dot, from_float };
        Ok(DotKernel { weights: Format::new(weights), activations: Format::new(ty), kernel })
    }

    /// The type of the weights.
    pub fn weight_type(&self) -> GgmlType {
        self.weights.ty
    }

    /// The type that activations are converted to.
    pub fn activation_type(&self) -> GgmlType {
        self.activations.ty
    }

    /// Bytes of a row of `n` activations once converted.
    ///
    /// # Errors
    /// A length that is not whole blocks of both types.
    pub fn activation_bytes(&self, n: usize) -> Result<usize> {
        row_bytes(self.weights.ty, n)?;
        row_bytes(self.activations.ty, n)
    }

    /// Converts one row of activations ([n]) into `dst` ([`DotKernel::activation_bytes`] of n).
    ///
    /// # Errors
    /// Lengths that disagree, a `dst` that is not aligned to 4 bytes, an activation that is not finite, or activations
    /// beyond the f16 scales of the type that the kernel reads (for Q8_1 also their sum over a block).
    pub fn quantize_row(&self, row: &[f32], dst: &mut [u8]) -> Result<()> {
        expect_length("bytes of an activation row", self.activation_bytes(row.len())?, dst.len())?;
        let ty = self.activations.ty;
        let mut has_tiny = false;
        for (index, &value) in row.iter().enumerate() {
            if !value.is_finite() {
                return Err(Error::NotFinite { index, value, ty });
            }
            has_tiny |= value != 0.0 && value.abs() < MIN_ACTIVATION;
        }
        let Kernel::Ggml { from_float: Some(from_float), .. } = self.kernel else {
            if ty == GgmlType::F16 {
                return to_halves(ty, row, dst, |value| f16::from_f32(value).to_bits(), 0x7c00);
            }
            row.iter().zip(dst.as_chunks_mut().0).for_each(|(value, out)| *out = value.to_le_bytes());
            return Ok(());
        };
        expect_aligned("an activation row", dst.as_ptr(), self.activations.align)?;
        let flushed: Vec<f32>; // [n]
        let row = if has_tiny {
            flushed = row.iter().map(|&value| if value.abs() < MIN_ACTIVATION { 0.0 } else { value }).collect();
            &flushed
        } else {
            row
        };
        // SAFETY: `dst` holds the whole blocks of `row`'s elements, aligned for them; the numbers are finite.
        unsafe { from_float(row.as_ptr(), dst.as_mut_ptr().cast(), row.len() as i64) };
        self.check_scales(row, dst)
    }

    /// That no f16 scale of converted activations is infinite: products with zeros would be NaN.
    fn check_scales(&self, row: &[f32], converted: &[u8]) -> Result<()> {
        let Format { ty, block_size, type_size, .. } = self.activations;
        let scale_bytes = match ty {
            GgmlType::Q8_0 => 2,
            GgmlType::Q8_1 => 4, // the scale, and the sum of the block
            _ => return Ok(()),
        };
        for (block, bytes) in converted.chunks_exact(type_size).enumerate() {
            let scales = bytes[..scale_bytes].as_chunks().0;
            if scales.iter().any(|&scale| !f16::from_le_bytes(scale).is_finite()) {
                let index = block * block_size;
                return Err(Error::TooLarge { index, value: row[index], ty });
            }
        }
        Ok(())
    }

    /// `out[i] = w[i] · x` for every row of `w`: `w` is [n_row, n] stored as the weight type, `x` one row of [n] from
    /// [`DotKernel::quantize_row`], `out` [n_row]. Checked once per call, so give it many rows.
    ///
    /// # Errors
    /// Lengths that disagree, an empty row, or rows that are not aligned to their blocks' scales (4 bytes always do).
    pub fn dot_rows(&self, w: &[u8], x: &[u8], out: &mut [f32]) -> Result<()> {
        let (weights, activations) = (&self.weights, &self.activations);
        let n = x.len() / activations.type_size * activations.block_size;
        expect_length("bytes of an activation row", self.activation_bytes(n)?, x.len())?;
        let row_bytes = n / weights.block_size * weights.type_size;
        expect_length("bytes of weight rows", out.len() * row_bytes, w.len())?;
        let rows = w.chunks_exact(row_bytes).zip(out);
        let vec_dot = match self.kernel {
            Kernel::Bf16 => {
                rows.for_each(|(row, out)| *out = dot_bf16(row, x));
                return Ok(());
            }
            Kernel::Ggml { vec_dot, .. } => vec_dot,
        };
        expect_aligned("weight rows", w.as_ptr(), weights.align)?;
        expect_aligned("an activation row", x.as_ptr(), activations.align)?;
        let dot = |n: usize, w: *const u8, x: *const u8| {
            let mut sum = 0f32;
            // SAFETY: callers pass n elements in whole blocks of either type, aligned for them; every byte is valid in
            // a block. n fits 31 bits, and an odd number of paired blocks never gets here.
            unsafe { vec_dot(n as i32, &mut sum, 0, w.cast(), 0, x.cast(), 0, 1) };
            sum
        };
        if activations.block_size != PAIRED || n.is_multiple_of(2 * PAIRED) {
            rows.for_each(|(row, out)| *out = dot(n, row.as_ptr(), x.as_ptr()));
            return Ok(());
        }
        // ggml's SIMD paths take blocks of 32 in pairs, and of an odd number read one past the end: the last block is
        // therefore multiplied apart, beside one of zeros.
        let last = (n - PAIRED) / PAIRED;
        let (x, x_last) = x.split_at(last * activations.type_size);
        let x_last = Pair::with_zeros(x_last);
        for (row, out) in rows {
            let (row, row_last) = row.split_at(last * weights.type_size);
            let head = if last == 0 { 0.0 } else { dot(n - PAIRED, row.as_ptr(), x.as_ptr()) };
            *out = head + dot(2 * PAIRED, Pair::with_zeros(row_last).0.as_ptr(), x_last.0.as_ptr());
        }
        Ok(())
    }
}

/// Two blocks, of which the second is zero: a scale of zero, so that it adds nothing.
#[repr(align(4))]
struct Pair([u8; PAIR_BYTES]);

impl Pair {
    fn with_zeros(block: &[u8]) -> Pair {
        let mut pair = Pair([0; PAIR_BYTES]);
        pair.0[..block.len()].copy_from_slice(block);
        pair
    }
}

/// `w` is [n] bf16, `x` [n] f32, both as bytes. Independent sums let the compiler vectorise without reordering any.
fn dot_bf16(w: &[u8], x: &[u8]) -> f32 {
    const N_SUM: usize = 16;
    let product = |w: [u8; 2], x: [u8; 4]| {
        // A bf16 is the upper half of an f32.
        f32::from_bits(u32::from(u16::from_le_bytes(w)) << 16) * f32::from_le_bytes(x)
    };
    let (w, w_rest) = w.as_chunks::<2>().0.as_chunks::<N_SUM>();
    let (x, x_rest) = x.as_chunks::<4>().0.as_chunks::<N_SUM>();
    let mut sums = [0f32; N_SUM];
    for (w, x) in w.iter().zip(x) {
        for i in 0..N_SUM {
            sums[i] += product(w[i], x[i]);
        }
    }
    let rest = w_rest.iter().zip(x_rest).map(|(&w, &x)| product(w, x)).sum::<f32>();
    sums.iter().sum::<f32>() + rest
}
