//! A matrix stack repacked at load into the tiles that the kernels of our own read.

use gguf::GgmlType;
use memmap2::MmapMut;
use param_kernels::{Kernels, TILE_ROWS, Team, TileFormat};

use crate::error::{Error, Result};

/// Tiles of a matrix stack.
#[derive(Debug)]
pub(crate) struct Tiles {
    pub format: TileFormat,
    /// Bytes of a tile of [`TILE_ROWS`] rows.
    tile_bytes: usize,
    /// Tiles of one matrix; the last may have rows of padding.
    per_matrix: usize,
    map: MmapMut, // [n_matrix, per_matrix, tile_bytes]
}

impl Tiles {
    /// The format of tiles for weights of a type, if there is one that this CPU gains by.
    pub fn format(ty: GgmlType) -> Option<TileFormat> {
        let kernels = Kernels::get();
        Some(match ty {
            GgmlType::F32 => TileFormat::F32,
            GgmlType::BF16 => TileFormat::Bf16,
            GgmlType::F16 if kernels.has_bf16() => TileFormat::F16AsBf16,
            GgmlType::F16 => TileFormat::F16,
            GgmlType::Q8_0 if kernels.has_int8() => TileFormat::Q8_0,
            GgmlType::Q4_0 if kernels.has_int8() => TileFormat::Q4_0,
            GgmlType::Q4_K if kernels.has_int8() => TileFormat::Q4K,
            GgmlType::Q6_K if kernels.has_int8() => TileFormat::Q6K,
            _ => return None,
        })
    }

    /// Repacks `data`, matrices of `n_row` rows of `n_col` elements, each thread its own stretch.
    pub fn pack(
        team: &mut Team,
        format: TileFormat,
        data: &[u8],
        n_row: usize,
        n_col: usize,
        row_bytes: usize,
    ) -> Result<Tiles> {
        let matrix_bytes = n_row * row_bytes;
        let (per_matrix, tile_bytes) = (n_row.div_ceil(TILE_ROWS), format.tile_bytes(n_col));
        let bytes = (data.len() / matrix_bytes).saturating_mul(per_matrix).saturating_mul(tile_bytes);
        let refused = |_| Error::OutOfMemory { what: "repacked weights", bytes };
        let mut map = MmapMut::map_anon(bytes).map_err(refused)?;
        // Decoding reads every page once per token, so address translation shows. Where the advice is refused, it only costs that.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        team.for_each_chunk(&mut map, tile_bytes, |tile, packed| {
            let (matrix, first) = (tile / per_matrix, tile % per_matrix * TILE_ROWS);
            let rows = first * row_bytes..n_row.min(first + TILE_ROWS) * row_bytes;
            format.pack(&data[matrix * matrix_bytes..][rows], n_col, packed);
        });
        Ok(Tiles { format, tile_bytes, per_matrix, map })
    }

    /// The `n_tile` tiles of matrix `matrix` from the one on whose first row is `row`, a multiple of [`TILE_ROWS`].
    pub fn strip(&self, matrix: usize, row: usize, n_tile: usize) -> &[u8] {
        debug_assert!(row.is_multiple_of(TILE_ROWS));
        let start = (matrix * self.per_matrix + row / TILE_ROWS) * self.tile_bytes;
        &self.map[start..start + n_tile * self.tile_bytes]
    }
}
