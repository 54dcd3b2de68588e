//! Products with weights repacked into tiles of 16 interleaved rows, so that scales apply lane by lane and no horizontal sum is
//! left. Quantized weights meet activations quantized to int8 in blocks of 32; half-precision ones meet bf16, f32 f32.

mod activation;
mod float;
#[cfg(target_arch = "aarch64")]
mod neon;
mod q4_k;
mod q6_k;
mod registers;
mod scaled;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod x86;

use crate::Kernels;
use crate::isa::Isa;

pub use activation::ActivationBlock;
pub(crate) use activation::{pair_row, quantize_rest, quantize_row, to_bf16};
pub(crate) use float::{matmul_bf16, matmul_f16, matmul_f32, matmul_interleaved_bf16, matmul_interleaved_f32};
#[cfg(target_arch = "aarch64")]
pub(crate) use neon::NeonRegisters;
pub(crate) use q4_k::matmul as matmul_q4_k;
pub(crate) use q6_k::matmul as matmul_q6_k;
pub(crate) use registers::{Registers, Scalar};
pub(crate) use scaled::{matmul_q4_0, matmul_q8_0};
#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2Registers, Avx512Registers};

/// Rows interleaved in a tile. Rows beyond the matrix's last are zeros.
pub const TILE_ROWS: usize = crate::isa::LANES;

/// Elements that share one scale, of most weights and of activations.
const BLOCK: usize = 32;

/// Parts of a tile start at multiples of it, so that no load meets two cache lines.
const LINE: usize = 64;

/// Bytes of 16 rows by 4 columns of bytes.
const STEP: usize = 4 * TILE_ROWS;

/// A format of weights in tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TileFormat {
    /// 32 int8 with an f16 scale.
    Q8_0,
    /// 32 four-bit integers with an offset of 8 and an f16 scale.
    Q4_0,
    /// 256 four-bit integers in 8 blocks, each with a six-bit scale and minimum relative to two f16.
    Q4K,
    /// 256 six-bit integers with an offset of 32 in 16 blocks, each with an int8 scale relative to an f16.
    Q6K,
    /// f32, multiplied in f32.
    F32,
    /// f16, multiplied in f32.
    F16,
    /// bf16, multiplied by bf16 and summed in f32.
    Bf16,
    /// f16 as stored, rounded to [`TileFormat::Bf16`].
    F16AsBf16,
}

/// What activations a format is multiplied by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operand {
    /// Blocks of int8, from [`Kernels::quantize_row`].
    Int8,
    /// Pairs of bf16, from [`Kernels::pair_row`].
    Bf16,
    /// As they are.
    F32,
}

/// Rows of activations, in the form that a format is multiplied by.
#[derive(Clone, Copy, Debug)]
pub enum Inputs<'a> {
    /// [n_token][n_col / 32]
    Int8(&'a [&'a [ActivationBlock]]),
    /// [n_token][n_col / 2]; of an odd number of columns, the last pair's second is zero.
    Bf16(&'a [&'a [u32]]),
    /// [n_token][n_col]
    F32(&'a [&'a [f32]]),
}

impl TileFormat {
    /// The activations it is multiplied by.
    pub fn operand(self) -> Operand {
        match self {
            TileFormat::Q8_0 | TileFormat::Q4_0 | TileFormat::Q4K | TileFormat::Q6K => Operand::Int8,
            TileFormat::Bf16 | TileFormat::F16AsBf16 => Operand::Bf16,
            TileFormat::F32 | TileFormat::F16 => Operand::F32,
        }
    }

    /// Elements per block as stored, and its bytes.
    const fn block(self) -> (usize, usize) {
        match self {
            TileFormat::Q8_0 => (BLOCK, scaled::stored::<scaled::Bytes>()),
            TileFormat::Q4_0 => (BLOCK, scaled::stored::<scaled::Nibbles>()),
            TileFormat::Q4K => (q4_k::N_ELEMENT, q4_k::STORED),
            TileFormat::Q6K => (q6_k::N_ELEMENT, q6_k::STORED),
            TileFormat::F32 => (1, 4),
            TileFormat::F16 | TileFormat::Bf16 | TileFormat::F16AsBf16 => (1, 2),
        }
    }

    /// Bytes of a tile of rows of `n_col` elements, a multiple of 64.
    ///
    /// # Panics
    /// If that is not whole blocks.
    pub fn tile_bytes(self, n_col: usize) -> usize {
        let (n_element, _) = self.block();
        assert!(n_col > 0 && n_col.is_multiple_of(n_element), "rows of {n_col} elements in blocks of {n_element}");
        let n = n_col / n_element;
        match self {
            TileFormat::Q8_0 => scaled::tile_bytes::<scaled::Bytes>(n),
            TileFormat::Q4_0 => scaled::tile_bytes::<scaled::Nibbles>(n),
            TileFormat::Q4K => n * q4_k::PACKED,
            TileFormat::Q6K => header(n * q6_k::SCALES) + n * q6_k::PACKED,
            TileFormat::F32 => n * 4 * TILE_ROWS,
            TileFormat::F16 | TileFormat::Bf16 | TileFormat::F16AsBf16 => n.next_multiple_of(2) * 2 * TILE_ROWS,
        }
    }

    /// Interleaves up to [`TILE_ROWS`] rows as GGUF stores them, `rows` [n_row, row of `n_col` elements], into `tile`
    /// ([`TileFormat::tile_bytes`]), which must be zeros.
    ///
    /// # Panics
    /// If the lengths disagree.
    pub fn pack(self, rows: &[u8], n_col: usize, tile: &mut [u8]) {
        assert_eq!(tile.len(), self.tile_bytes(n_col));
        let (n_element, n_byte) = self.block();
        let row_bytes = n_col / n_element * n_byte;
        assert!(rows.len().is_multiple_of(row_bytes) && rows.len() <= TILE_ROWS * row_bytes);
        for (lane, row) in rows.chunks_exact(row_bytes).enumerate() {
            match self {
                TileFormat::Q8_0 => scaled::pack::<scaled::Bytes>(row, lane, tile),
                TileFormat::Q4_0 => scaled::pack::<scaled::Nibbles>(row, lane, tile),
                TileFormat::Q4K => q4_k::pack(row, lane, tile),
                TileFormat::Q6K => q6_k::pack(row, lane, tile),
                TileFormat::F32 => float::pack::<4>(row, lane, tile),
                TileFormat::F16 => float::pack::<2>(row, lane, tile),
                TileFormat::Bf16 => float::pack_bf16(row, lane, tile),
                TileFormat::F16AsBf16 => float::pack_f16_as_bf16(row, lane, tile),
            }
        }
    }

    /// `out[t] = W x[t]` for every row of `x`, where W are the `n_tile` adjoining `tiles`; `out` is [n_token, n_tile * 16].
    /// A row's result does not depend on the rows it comes with, nor on how W is cut into calls.
    ///
    /// # Panics
    /// If the lengths disagree, or `x` is not the format's [`TileFormat::operand`].
    pub fn matmul(self, kernels: &Kernels, tiles: &[u8], n_tile: usize, x: Inputs<'_>, out: &mut [f32]) {
        match (self, x) {
            (TileFormat::Q8_0, Inputs::Int8(x)) => kernels.matmul_q8_0(tiles, n_tile, x, out),
            (TileFormat::Q4_0, Inputs::Int8(x)) => kernels.matmul_q4_0(tiles, n_tile, x, out),
            (TileFormat::Q4K, Inputs::Int8(x)) => kernels.matmul_q4_k(tiles, n_tile, x, out),
            (TileFormat::Q6K, Inputs::Int8(x)) => kernels.matmul_q6_k(tiles, n_tile, x, out),
            (TileFormat::Bf16 | TileFormat::F16AsBf16, Inputs::Bf16(x)) => kernels.matmul_bf16(tiles, n_tile, x, out),
            (TileFormat::F32, Inputs::F32(x)) => kernels.matmul_f32(tiles, n_tile, x, out),
            (TileFormat::F16, Inputs::F32(x)) => kernels.matmul_f16(tiles, n_tile, x, out),
            (format, x) => panic!("{format:?} weights times {x:?}"),
        }
    }
}

/// Bytes before the quants of a tile that begins with `n` bytes of scales.
const fn header(n: usize) -> usize {
    n.next_multiple_of(LINE)
}

/// How tokens share tiles where registers hold the sums of eight products; elsewhere four tokens share one tile.
struct Sharing {
    /// Tokens up to which tiles are taken one by one, as memory delivers them; more of them share two tiles four by four.
    one_tile: usize,
    /// Whether eight tokens share one tile, rather than four.
    eight_tokens: bool,
}

impl Sharing {
    const USUAL: Sharing = Sharing { one_tile: 16, eight_tokens: true };
}

/// Runs a body over all tiles and tokens, so that neither weights nor activations are loaded for one product alone. The body's
/// last parameter says whether it comes first to its tiles, and asks for those that follow.
macro_rules! blocked {
    ($isa:ident, $body:ident [$($of:ident)?], $sharing:expr, $tiles:expr, $n_tile:expr, $x:expr, $out:expr) => {{
        let sharing: $crate::tiles::Sharing = $sharing;
        let (tiles, n_tile, x, out): (&[u8], usize, _, &mut [f32]) = ($tiles, $n_tile, $x, $out);
        let width = n_tile * $crate::tiles::TILE_ROWS;
        assert!(out.len() == x.len() * width && (n_tile == 0 || tiles.len().is_multiple_of(n_tile)));
        assert!(x.iter().all(|row| row.len() == x[0].len()), "rows of activations of different lengths");
        let tile_bytes = if n_tile > 0 { tiles.len() / n_tile } else { 0 };
        let mut first = 0;
        if <$isa::Tile as Registers>::WIDE && x.len() > sharing.one_tile {
            while first + 2 <= n_tile {
                let (a, b) = tiles[first * tile_bytes..(first + 2) * tile_bytes].split_at(tile_bytes);
                let rows = out.get_mut(first * $crate::tiles::TILE_ROWS..).unwrap_or_default();
                $crate::tiles::blocked!(@tokens $isa, $body [$($of)?], 2, [a, b], x, rows, width);
                first += 2;
            }
        }
        while first < n_tile {
            let tile = &tiles[first * tile_bytes..(first + 1) * tile_bytes];
            let mut rest = x;
            let mut rows = out.get_mut(first * $crate::tiles::TILE_ROWS..).unwrap_or_default();
            if <$isa::Tile as Registers>::WIDE && sharing.eight_tokens {
                while let Some((eight, others)) = rest.split_first_chunk::<8>() {
                    if rest.len() == x.len() {
                        $body::<$($of,)? $isa, 1, 8, true>([tile], eight, rows, width);
                    } else {
                        $body::<$($of,)? $isa, 1, 8, false>([tile], eight, rows, width);
                    }
                    rest = others;
                    rows = rows.get_mut(8 * width..).unwrap_or_default();
                }
            }
            $crate::tiles::blocked!(@tokens $isa, $body [$($of)?], 1, [tile], rest, rows, width);
            first += 1;
        }
    }};
    (@tokens $isa:ident, $body:ident [$($of:ident)?], $r:literal, $tiles:expr, $x:ident, $rows:expr, $width:ident) => {{
        let (fours, rest) = $x.as_chunks::<4>();
        let mut rows = $rows;
        for (i, x) in fours.iter().enumerate() {
            if i == 0 {
                $body::<$($of,)? $isa, $r, 4, true>($tiles, x, rows, $width);
            } else {
                $body::<$($of,)? $isa, $r, 4, false>($tiles, x, rows, $width);
            }
            rows = rows.get_mut(4 * $width..).unwrap_or_default();
        }
        match rest {
            &[a, b, c] => $body::<$($of,)? $isa, $r, 3, true>($tiles, &[a, b, c], rows, $width),
            &[a, b] => $body::<$($of,)? $isa, $r, 2, true>($tiles, &[a, b], rows, $width),
            &[a] => $body::<$($of,)? $isa, $r, 1, true>($tiles, &[a], rows, $width),
            _ => {}
        }
    }};
}
use blocked;

/// Whether registers hold the sums of a tile by T tokens twice. Where not, a body that has two of each takes them in turns.
const fn twice<I: Isa, const T: usize>() -> bool {
    I::TWICE || T <= 2
}

/// Products that one of two chains of sums takes before the other's turn, where registers hold one only.
const TURN: usize = 8;

/// Stores the sums of R tiles by T tokens, tokens `width` apart.
#[inline(always)]
fn store<G: Registers, const R: usize, const T: usize>(acc: [[G::Floats; R]; T], out: &mut [f32], width: usize) {
    for t in 0..T {
        let rows = &mut out[t * width..t * width + R * TILE_ROWS];
        for r in 0..R {
            if let Some(out) = rows[r * TILE_ROWS..].first_chunk_mut() {
                G::store(acc[t][r], out);
            }
        }
    }
}
