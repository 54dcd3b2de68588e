//! Products with quantized weights: matrices repacked into tiles of 16 interleaved rows, so that scales apply lane by lane and
//! no horizontal sum is left, times rows of activations quantized to int8 in blocks of 32.

mod activation;
mod int8;
mod q4_k;
mod q8_0;
#[cfg(test)]
mod tests;

use crate::Kernels;

pub use activation::ActivationBlock;
pub(crate) use activation::quantize_row;
#[cfg(target_arch = "x86_64")]
pub(crate) use int8::{Avx2Int8, Vnni};
pub(crate) use int8::{Int8, Scalar};
pub(crate) use q4_k::matmul as matmul_q4_k;
pub(crate) use q8_0::matmul as matmul_q8_0;

/// Rows interleaved in a tile. Rows beyond the matrix's last are zeros.
pub const TILE_ROWS: usize = crate::isa::LANES;

/// Elements that share one scale, of weights and of activations.
const BLOCK: usize = 32;

/// Activation rows that share one pass over a tile: as many as leave their sums in registers.
pub const MAX_TOKENS: usize = 8;

/// A format of weights that has tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TileFormat {
    /// 32 int8 with an f16 scale.
    Q8_0,
    /// 256 four-bit integers in 8 blocks, each with a six-bit scale and minimum relative to two f16.
    Q4K,
}

impl TileFormat {
    /// Bytes of a block as stored, and of 16 rows of it in a tile.
    const fn sizes(self) -> (usize, usize) {
        match self {
            TileFormat::Q8_0 => (q8_0::STORED, q8_0::PACKED),
            TileFormat::Q4K => (q4_k::STORED, q4_k::PACKED),
        }
    }

    /// Bytes of a tile of rows that are `row_bytes` long as stored.
    ///
    /// # Panics
    /// If that is not whole blocks.
    pub fn tile_bytes(self, row_bytes: usize) -> usize {
        let (stored, packed) = self.sizes();
        assert!(row_bytes > 0 && row_bytes.is_multiple_of(stored), "rows of {row_bytes} bytes in blocks of {stored}");
        row_bytes / stored * packed
    }

    /// Interleaves up to [`TILE_ROWS`] rows as ggml stores them, `rows` [n_row, row_bytes], into `tile`
    /// ([`TileFormat::tile_bytes`]), which must be zeros.
    ///
    /// # Panics
    /// If the lengths disagree.
    pub fn pack(self, rows: &[u8], row_bytes: usize, tile: &mut [u8]) {
        assert_eq!(tile.len(), self.tile_bytes(row_bytes));
        assert!(rows.len().is_multiple_of(row_bytes) && rows.len() <= TILE_ROWS * row_bytes);
        for (lane, row) in rows.chunks_exact(row_bytes).enumerate() {
            match self {
                TileFormat::Q8_0 => q8_0::pack(row, lane, tile),
                TileFormat::Q4K => q4_k::pack(row, lane, tile),
            }
        }
    }

    /// `out[t] = W x[t]` for the up to [`MAX_TOKENS`] rows of `x`, each [n_col / 32]; `tile` is 16 rows of W,
    /// `out` [n_token, 16]. A row's result does not depend on the rows it comes with.
    ///
    /// # Panics
    /// If the lengths disagree.
    pub fn matmul(self, kernels: &Kernels, tile: &[u8], x: &[&[ActivationBlock]], out: &mut [[f32; TILE_ROWS]]) {
        match self {
            TileFormat::Q8_0 => kernels.matmul_q8_0(tile, x, out),
            TileFormat::Q4K => kernels.matmul_q4_k(tile, x, out),
        }
    }
}

/// Runs a body for `x.len()` tokens as bodies for 8, 4, 2 and 1, whose sums all stay in registers.
macro_rules! by_tokens {
    ($isa:ident, $body:ident, $tile:expr, $x:expr, $out:expr) => {{
        let (x, out) = ($x, $out);
        assert_eq!(x.len(), out.len());
        $crate::quant::by_tokens!(@step $isa, $body, $tile, x, out, 8);
        $crate::quant::by_tokens!(@step $isa, $body, $tile, x, out, 4);
        $crate::quant::by_tokens!(@step $isa, $body, $tile, x, out, 2);
        $crate::quant::by_tokens!(@step $isa, $body, $tile, x, out, 1);
        debug_assert!(x.is_empty() && out.is_empty());
    }};
    (@step $isa:ident, $body:ident, $tile:expr, $x:ident, $out:ident, $n:literal) => {
        let (chunks, $x) = $x.as_chunks::<$n>();
        let (out_chunks, $out) = $out.as_chunks_mut::<$n>();
        for (x, out) in chunks.iter().zip(out_chunks) {
            $body::<$isa, $n>($tile, x, out);
        }
    };
}
use by_tokens;
