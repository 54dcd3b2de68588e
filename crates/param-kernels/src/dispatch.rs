//! The table of kernels: every body compiled once per instruction set, and the choice made once per process.

use crate::attention::Pages;
use crate::isa::LANES;
use crate::matrix::{Matrix, Precision};
use crate::optimizer::AdamWStep;
use crate::packing::Packing;
use crate::tiles::ActivationBlock;
use half::f16;
use std::ops::Range;
use std::sync::OnceLock;

/// Declares the ops once; from that come the struct of function pointers, its safe methods, and one table per instruction set.
macro_rules! kernels {
    ($($(#[$doc:meta])* $op:ident = $module:ident::$body:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)?;)*) => {
        /// One implementation of every op, all for the same instruction set. Lengths that do not fit together panic: they are
        /// the caller's mistake, never the input's.
        pub struct Kernels {
            isa: &'static str,
            $($op: unsafe fn($($ty),*) $(-> $ret)?,)*
        }

        impl Kernels {
            $($(#[$doc])*
            #[inline]
            pub fn $op(&self, $($arg: $ty),*) $(-> $ret)? {
                // SAFETY: tables are handed out by `supported` and `get` only, after the CPU was asked for their features.
                unsafe { (self.$op)($($arg),*) }
            })*
        }

        mod baseline {
            use super::*;
            $(fn $op($($arg: $ty),*) $(-> $ret)? {
                crate::$module::$body::<crate::isa::Baseline>($($arg),*)
            })*
            pub(super) static TABLE: Kernels = Kernels { isa: "baseline", $($op,)* };
        }

        kernels!(@table "x86_64" avx2 "avx2" "avx2,fma,f16c" Avx2 $($op = $module::$body($($arg: $ty),*) $(-> $ret)?;)*);
        kernels!(@table "x86_64" avx512 "avx512" "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c" Avx512
            $($op = $module::$body($($arg: $ty),*) $(-> $ret)?;)*);
        kernels!(@table "x86_64" avx512vnni "avx512vnni" "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c" Vnni
            $($op = $module::$body($($arg: $ty),*) $(-> $ret)?;)*);
        kernels!(@table "x86_64" avx512bf16 "avx512bf16" "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c"
            VnniBf16 $($op = $module::$body($($arg: $ty),*) $(-> $ret)?;)*);
        kernels!(@table "aarch64" neon "neon" "neon,dotprod" Neon $($op = $module::$body($($arg: $ty),*) $(-> $ret)?;)*);
    };
    (@table $arch:literal $table:ident $name:literal $features:literal $isa:ident
        $($op:ident = $module:ident::$body:ident($($arg:ident: $ty:ty),*) $(-> $ret:ty)?;)*) => {
        #[cfg(target_arch = $arch)]
        mod $table {
            use super::*;
            $(#[target_feature(enable = $features)]
            fn $op($($arg: $ty),*) $(-> $ret)? {
                crate::$module::$body::<crate::isa::$isa>($($arg),*)
            })*
            pub(super) static TABLE: Kernels = Kernels { isa: $name, $($op,)* };
        }
    };
}

kernels! {
    /// `sum_i a[i] b[i]`.
    dot = dot::dot(a: &[f32], b: &[f32]) -> f32;

    /// `y += alpha x`.
    axpy = dot::axpy(alpha: f32, x: &[f32], y: &mut [f32]);

    /// `y = e^x`, within 2 ulp.
    exp = math::exp_slice(x: &[f32], y: &mut [f32]);

    /// `x = g(x + bias)` in the first columns of each row of `x` [n_row, width], as many as `bias` has, where
    /// `g(x) = x Phi(x)` is GELU as PyTorch computes it by default, within 1e-6.
    bias_gelu_erf = gelu::bias_gelu_erf(bias: &[f32], width: usize, x: &mut [f32]);

    /// The same of `g(x) = 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`, within 5e-7.
    bias_gelu_tanh = gelu::bias_gelu_tanh(bias: &[f32], width: usize, x: &mut [f32]);

    /// Multiplies `grad` by the derivative of [`Kernels::bias_gelu_erf`]'s function at `x`, and turns `x` into its value.
    gelu_erf_backward = gelu::gelu_erf_backward(x: &mut [f32], grad: &mut [f32]);

    /// The same of [`Kernels::bias_gelu_tanh`]'s.
    gelu_tanh_backward = gelu::gelu_tanh_backward(x: &mut [f32], grad: &mut [f32]);

    /// `y = (x - mean) / sqrt(variance + eps) * scale + shift` per row; x, y are `[n_row, n_col]`, scale and shift `[n_col]`. Leaves
    /// each row's mean and `rstd = 1 / sqrt(variance + eps)` in `mean` and `rstd` (`[n_row]`) for the backward pass.
    layer_norm = layer_norm::layer_norm(
        x: &[f32], scale: &[f32], shift: &[f32], eps: f32, y: &mut [f32], mean: &mut [f32], rstd: &mut [f32],
    );

    /// Adds to `dx` (`[n_row, n_col]`), `dscale` and `dshift` (`[n_col]`) the gradients of [`Kernels::layer_norm`], given the
    /// gradient `dy` [n_row, n_col] of its output.
    layer_norm_backward = layer_norm::layer_norm_backward(
        x: &[f32], scale: &[f32], mean: &[f32], rstd: &[f32], dy: &[f32], dx: &mut [f32], dscale: &mut [f32], dshift: &mut [f32],
    );

    /// Products of tiles of Q8_0: see [`crate::TileFormat::matmul`].
    matmul_q8_0 = tiles::matmul_q8_0(tiles: &[u8], n_tile: usize, x: &[&[ActivationBlock]], out: &mut [f32]);

    /// Products of tiles of Q4_0: see [`crate::TileFormat::matmul`].
    matmul_q4_0 = tiles::matmul_q4_0(tiles: &[u8], n_tile: usize, x: &[&[ActivationBlock]], out: &mut [f32]);

    /// Products of tiles of Q4_K: see [`crate::TileFormat::matmul`].
    matmul_q4_k = tiles::matmul_q4_k(tiles: &[u8], n_tile: usize, x: &[&[ActivationBlock]], out: &mut [f32]);

    /// Products of tiles of Q6_K: see [`crate::TileFormat::matmul`].
    matmul_q6_k = tiles::matmul_q6_k(tiles: &[u8], n_tile: usize, x: &[&[ActivationBlock]], out: &mut [f32]);

    /// Products of tiles of f32: see [`crate::TileFormat::matmul`].
    matmul_f32 = tiles::matmul_f32(tiles: &[u8], n_tile: usize, x: &[&[f32]], out: &mut [f32]);

    /// Products of tiles of f16: see [`crate::TileFormat::matmul`].
    matmul_f16 = tiles::matmul_f16(tiles: &[u8], n_tile: usize, x: &[&[f32]], out: &mut [f32]);

    /// Products of tiles of bf16: see [`crate::TileFormat::matmul`].
    matmul_bf16 = tiles::matmul_bf16(tiles: &[u8], n_tile: usize, x: &[&[u32]], out: &mut [f32]);

    /// Products of tiles of f32 with 16 rows interleaved as tiles are, `x` [n_col, 16]: `out` [16, n_tile * 16].
    matmul_interleaved_f32 = tiles::matmul_interleaved_f32(tiles: &[u8], n_tile: usize, x: &[[f32; LANES]], out: &mut [f32]);

    /// The same of bf16, `x` [n_col / 2, 16] of pairs.
    matmul_interleaved_bf16 = tiles::matmul_interleaved_bf16(tiles: &[u8], n_tile: usize, x: &[[u32; LANES]], out: &mut [f32]);

    /// Quantizes `x` [n] to the nearest of 255 steps in each of `out`'s blocks [n / 32]. False if a number is not finite.
    quantize_row = tiles::quantize_row(x: &[f32], out: &mut [ActivationBlock]) -> bool;

    /// Quantizes what [`Kernels::quantize_row`] left of `x` [n] in `first` [n / 32]: the sum of both products is as precise as
    /// with 15 bits.
    quantize_rest = tiles::quantize_rest(x: &[f32], first: &[ActivationBlock], out: &mut [ActivationBlock]);

    /// Rounds `x` [n] to the nearest bf16, two in each of `out` [n / 2, rounded up], the first in the low half.
    pair_row = tiles::pair_row(x: &[f32], out: &mut [u32]);

    /// Reads what [`Kernels::pair_row`] wrote.
    unpair_row = matrix::unpair_row(words: &[u32], x: &mut [f32]);

    /// `sums[j] += sum_i m[i, j]`, in row order.
    add_column_sums = matrix::add_column_sums(m: &Matrix<'_>, sums: &mut [f32]);

    /// Packs lanes of a matrix (its rows or columns) from lane `first_lane` on, words `words` of their depth, in tiles of 16 lanes for
    /// [`crate::Product`]: `out` [n_tile, tile as `packing` says]. What lies beyond the matrix is zero.
    pack = packing::pack(
        m: &Matrix<'_>, packing: Packing, to: Precision, first_lane: usize, words: Range<usize>, out: &mut [u32],
    );

    /// One step of AdamW over parameters, gradients and both moments, all [n]; the gradients become zero.
    adamw = optimizer::adamw(p: &mut [f32], g: &mut [f32], m: &mut [f32], v: &mut [f32], step: &AdamWStep);

    /// Sum of squares in f64, of `x` [n] in f32.
    sum_of_squares = optimizer::sum_of_squares(x: &[f32]) -> f64;

    /// Reads `x` once; the result only keeps the reads from being left out.
    probe_read = probe::read(x: &[u8]) -> u32;

    /// Multiplies and adds int8 with all operands in registers, `n` times a fixed number of them; returns how many operations.
    probe_int8 = probe::int8(n: usize) -> f64;

    /// The same of bf16.
    probe_bf16 = probe::bf16(n: usize) -> f64;

    /// The same of f32.
    probe_f32 = probe::f32(n: usize) -> f64;

    /// Softmax of one row in place. A row of nothing but `-inf` becomes NaN, as in PyTorch.
    softmax = softmax::softmax(x: &mut [f32]);

    /// Turns the logits `x` [n_vocab] into `scale` times the gradient of `-ln softmax(x)[target]`, which it returns.
    cross_entropy = softmax::cross_entropy(x: &mut [f32], target: usize, scale: f32) -> f32;

    /// `ln sum_i e^x[i]`, `-inf` of an empty row.
    log_sum_exp = softmax::log_sum_exp(x: &[f32]) -> f32;

    /// Causal attention of one head over an f32 cache: see [`Kernels::attention_f16`].
    attention_f32 = attention::attention_f32(
        q: &[f32], kv: Pages<'_, f32>, n_past: usize, head_dim: usize, scratch: &mut [f32], out: &mut [f32],
    );

    /// Causal attention of one head: query `i` of `q` [n_query, head_dim], already scaled by `1 / sqrt(head_dim)`, sits at
    /// position `n_past + i` and sees the keys at 0 to its own position, which lie in the pages `kv` ([`crate::key_index`],
    /// [`crate::value_index`]). `scratch` holds [`crate::attention_scratch_len`]. Scores, softmax and weighted sum are fused, page by
    /// page, with the running maximum of Milakov and Gimelshein (2018). Writes `out` [n_query, head_dim]; a query's result does
    /// not depend on those it comes with.
    attention_f16 = attention::attention_f16(
        q: &[f32], kv: Pages<'_, f16>, n_past: usize, head_dim: usize, scratch: &mut [f32], out: &mut [f32],
    );

    /// The same over a cache of int8, with pages of scales of blocks of 32 components ([`crate::key_scale_index`]).
    attention_q8 = attention::attention_q8(
        q: &[f32], kv: Pages<'_, i8>, scales: Pages<'_, f16>, n_past: usize, head_dim: usize, scratch: &mut [f32], out: &mut [f32],
    );
}

impl Kernels {
    /// The fastest table this CPU can run, chosen at the first call.
    pub fn get() -> &'static Kernels {
        static CHOICE: OnceLock<&'static Kernels> = OnceLock::new();
        CHOICE.get_or_init(|| Self::supported()[0])
    }

    /// Every table this CPU can run, fastest first; the last is the baseline every CPU of the target runs. Tests compare them all.
    pub fn supported() -> Vec<&'static Kernels> {
        let mut tables = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 =
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            let vnni = avx512 && avx2 && is_x86_feature_detected!("avx512vnni");
            if vnni && is_x86_feature_detected!("avx512bf16") {
                tables.push(&avx512bf16::TABLE);
            }
            if vnni {
                tables.push(&avx512vnni::TABLE);
            }
            if avx512 && avx2 {
                tables.push(&avx512::TABLE);
            }
            if avx2 {
                tables.push(&avx2::TABLE);
            }
        }
        #[cfg(target_arch = "aarch64")]
        if cfg!(target_endian = "little") && std::arch::is_aarch64_feature_detected!("dotprod") {
            tables.push(&neon::TABLE);
        }
        tables.push(&baseline::TABLE);
        tables
    }

    /// Whether it has int8 dot products, without which tiles of quantized weights gain nothing.
    pub fn has_int8(&self) -> bool {
        self.isa != baseline::TABLE.isa
    }

    /// Whether it multiplies bf16 faster than f32.
    pub fn has_bf16(&self) -> bool {
        self.isa == "avx512bf16"
    }

    /// Name of the instruction set, for reports: `avx512bf16` (with VNNI), `avx512vnni`, `avx512`, `avx2`, `neon` (with int8
    /// dot products) or `baseline`.
    pub fn isa(&self) -> &'static str {
        self.isa
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Who runs the tests for the sake of one table, as under an emulator, names it.
    #[test]
    fn the_expected_table_is_chosen() {
        if let Ok(isa) = std::env::var("PARAM_EXPECT_ISA") {
            assert_eq!(Kernels::get().isa(), isa);
        }
    }
}
