//! Activations times the rows of a matrix stack, cut into tiles of outputs that each thread computes alone and in a fixed
//! order: the number of threads never changes a result.

use std::ops::Range;
use std::sync::Mutex;

use gguf::Gguf;
use param_kernels::{Kernels, MAX_TOKENS, TILE_ROWS, Team};

use crate::activations::{Activations, into_result, keep_first};
use crate::error::{Error, Result};
use crate::tiles::Tiles;
use crate::weights::Matrix;

/// A tile's weights stay in the first-level cache while all of its tokens pass over them.
const TILE_BYTES: usize = 28 * 1024;
/// Bounds of a tile's width: enough work to claim, few enough columns that small matrices still occupy every thread.
const TILE_COLS: Range<usize> = 8..64;
/// Widest tile of a single token: there is no reuse, so balance counts.
const TILE_COLS_DECODE: usize = 16;

/// What each thread needs for itself.
pub(crate) struct Scratch {
    /// Outputs of some tokens in a tile.
    dots: [[f32; TILE_COLS.end]; MAX_TOKENS],
    /// [QUERY_TILE, head_dim]: queries gathered and scaled, and what attention makes of them.
    pub queries: Vec<f32>,
    pub attended: Vec<f32>,
}

impl Scratch {
    pub fn new(n_query_element: usize) -> Scratch {
        Scratch {
            dots: [[0.0; TILE_COLS.end]; MAX_TOKENS],
            queries: vec![0.0; n_query_element],
            attended: vec![0.0; n_query_element],
        }
    }
}

/// Rows of a matmul's output, in groups that each meet one matrix of the stack.
pub(crate) struct Groups<'a> {
    /// The matrix of each group.
    pub matrices: &'a [usize],
    /// Where each group starts, and where the last ends: [n_group + 1].
    pub row_starts: &'a [usize],
}

impl Groups<'_> {
    /// Whether every group has one row.
    fn are_single(&self) -> bool {
        self.row_starts.last() == Some(&self.matrices.len())
    }
}

/// For every row of `out` [n_row, weights.n_row] and tile of columns: `dots = weights[matrix][cols] · x[source(row)]`, then
/// `finish(matrix, cols, dots, out)` puts them where `out` is the tile's part of the row.
pub(crate) fn matmul(
    team: &mut Team,
    scratch: &mut [Scratch],
    gguf: &Gguf,
    weights: &Matrix,
    x: &Activations,
    groups: &Groups<'_>,
    source: impl Fn(usize) -> usize + Sync,
    out: &mut [f32],
    finish: impl Fn(usize, Range<usize>, &mut [f32], &mut [f32]) + Sync,
) -> Result<()> {
    if let Some(tiles) = &weights.tiles {
        multiply_tiles(team, scratch, tiles, weights.n_row, x, groups, source, out, finish);
        return Ok(());
    }
    let data = weights.data(gguf)?; // [n_matrix, n_row, row_bytes]
    let (n_out, row_bytes) = (weights.n_row, weights.row_bytes);
    let widest = if groups.are_single() { TILE_COLS_DECODE } else { TILE_COLS.end };
    let tile_cols = (TILE_BYTES / row_bytes).clamp(TILE_COLS.start, widest);
    let failure = Mutex::new(None);
    team.for_each_tile(scratch, out, n_out, groups.row_starts, tile_cols, |scratch, mut tile| {
        let (matrix, cols) = (groups.matrices[tile.group()], tile.cols());
        let first = matrix * n_out;
        let rows = &data[(first + cols.start) * row_bytes..(first + cols.end) * row_bytes];
        let dots = &mut scratch.dots[0][..cols.len()];
        for row in tile.rows() {
            if let Err(error) = weights.kernel.dot_rows(rows, x.row(source(row)), dots) {
                return keep_first(&failure, error);
            }
            finish(matrix, cols.clone(), dots, tile.row_mut(row));
        }
    });
    into_result(failure).map_err(|cause| Error::Compute { what: format!("tensor `{}`", weights.name), cause })
}

/// [`matmul`] by weights in tiles: rows go through them several at a time.
fn multiply_tiles(
    team: &mut Team,
    scratch: &mut [Scratch],
    tiles: &Tiles,
    n_out: usize,
    x: &Activations,
    groups: &Groups<'_>,
    source: impl Fn(usize) -> usize + Sync,
    out: &mut [f32],
    finish: impl Fn(usize, Range<usize>, &mut [f32], &mut [f32]) + Sync,
) {
    let kernels = Kernels::get();
    let widest = if groups.are_single() { TILE_COLS_DECODE } else { TILE_COLS.end };
    let tile_cols = (TILE_BYTES / tiles.tile_bytes * TILE_ROWS).clamp(TILE_ROWS, widest);
    team.for_each_tile(scratch, out, n_out, groups.row_starts, tile_cols, |scratch, mut tile| {
        let (matrix, cols) = (groups.matrices[tile.group()], tile.cols());
        for first in tile.rows().step_by(MAX_TOKENS) {
            let n = MAX_TOKENS.min(tile.rows().end - first);
            let x: [_; MAX_TOKENS] = std::array::from_fn(|i| x.blocks(source(first + i.min(n - 1))));
            for start in cols.clone().step_by(TILE_ROWS) {
                let mut dots = [[0.0; TILE_ROWS]; MAX_TOKENS];
                tiles.format.matmul(kernels, tiles.tile(matrix, start), &x[..n], &mut dots[..n]);
                for (all, dots) in scratch.dots.iter_mut().zip(&dots[..n]) {
                    all[start - cols.start..][..TILE_ROWS].copy_from_slice(dots);
                }
            }
            for (i, dots) in scratch.dots[..n].iter_mut().enumerate() {
                finish(matrix, cols.clone(), &mut dots[..cols.len()], tile.row_mut(first + i));
            }
        }
    });
}
