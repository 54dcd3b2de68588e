//! Products of a few rows of activations with a strip of a matrix's outputs: what every parallel step of a forward pass is made
//! of. Each output is computed by one thread in a fixed order, so the number of threads never changes a result.

use std::ops::Range;

use gguf::Gguf;
use param_kernels::{Inputs, Kernels, TILE_ROWS, Team, Tile, prefetch};

use crate::activations::{Activations, Form};
use crate::error::{Error, FirstError, Result};
use crate::scratch::Scratch;
use crate::weights::{Linear, Matrix};

/// Rows that pass over a strip of weights together: they leave it in the first-level cache, and their products fit beside it.
pub(crate) const MAX_ROWS: usize = 32;
/// Widest strip: the work between two claims of a thread, and the width that bias and activation are applied at.
pub(crate) const MAX_STRIP: usize = 64;
/// Strips that each thread should find, so that none waits long for the others.
const STRIPS_PER_THREAD: usize = 4;

/// Outputs a thread takes at once of `n_out`: whole tiles and whole blocks of activations, but for what is left at the end.
pub(crate) fn strip(n_out: usize, n_thread: usize) -> usize {
    let narrow = MAX_STRIP / 2;
    if n_out.is_multiple_of(MAX_STRIP) && n_out / MAX_STRIP >= STRIPS_PER_THREAD * n_thread {
        MAX_STRIP
    } else {
        narrow
    }
}

/// Products of up to [`MAX_ROWS`] rows with a strip.
pub(crate) struct Products {
    dots: Vec<f32>, // [MAX_ROWS, width]
    width: usize,
    n_col: usize,
}

impl Products {
    pub fn new() -> Products {
        Products { dots: vec![0.0; MAX_ROWS * MAX_STRIP], width: 0, n_col: 0 }
    }

    /// Those of the first `n` rows, and how far apart rows are.
    pub fn rows_mut(&mut self, n: usize) -> (&mut [f32], usize) {
        (&mut self.dots[..n * self.width], self.width)
    }

    /// Those of the `i`-th row.
    pub fn row_mut(&mut self, i: usize) -> &mut [f32] {
        &mut self.dots[i * self.width..i * self.width + self.n_col]
    }
}

impl Matrix {
    /// Rows that [`Matrix::multiply`] takes at once.
    pub fn max_rows(&self) -> usize {
        if self.form() == Form::Fine { MAX_ROWS / 2 } else { MAX_ROWS }
    }

    /// Outputs `cols` of matrix `matrix`, at most [`MAX_STRIP`] from a multiple of 16 on, for rows `rows` of `x`.
    pub fn multiply(
        &self,
        gguf: &Gguf,
        matrix: usize,
        cols: Range<usize>,
        x: &Activations,
        rows: &[usize],
        out: &mut Products,
    ) -> Result<()> {
        out.n_col = cols.len();
        let Some(tiles) = &self.tiles else {
            out.width = cols.len();
            let first = matrix * self.n_row;
            let weights = &self.data(gguf)?[(first + cols.start) * self.row_bytes..(first + cols.end) * self.row_bytes];
            for (i, &row) in rows.iter().enumerate() {
                let failed = |cause| Error::Compute { what: format!("tensor `{}`", self.name), cause };
                self.kernel.dot_rows(weights, x.bytes(row), out.row_mut(i)).map_err(failed)?;
            }
            return Ok(());
        };
        let n_tile = cols.len().div_ceil(TILE_ROWS);
        out.width = n_tile * TILE_ROWS;
        let fine = self.form() == Form::Fine;
        let tile_bytes = tiles.strip(matrix, cols.start, n_tile);
        let dots = &mut out.dots[..rows.len() * (1 + usize::from(fine)) * out.width];
        let multiply = |x: Inputs<'_>| tiles.format.matmul(Kernels::get(), tile_bytes, n_tile, x, dots);
        // Gathering many rows would show where there is but one.
        match rows.len() {
            1 => x.with_rows::<2>(tiles.format.operand(), rows, multiply),
            _ => x.with_rows::<MAX_ROWS>(tiles.format.operand(), rows, multiply),
        }
        if fine {
            for i in 0..rows.len() {
                for j in 0..out.width {
                    out.dots[i * out.width + j] =
                        out.dots[2 * i * out.width + j] + out.dots[(2 * i + 1) * out.width + j];
                }
            }
        }
        Ok(())
    }
}

/// `out[group's rows] = x W[group] + b[group]` for every group of `row_starts`: as many weights of one shape, for rows of `out`
/// [n_row, n_out] that are rows of `x` counted from the group's start.
pub(crate) fn project(
    team: &mut Team,
    scratch: &mut [Scratch],
    gguf: &Gguf,
    linears: &[&Linear],
    x: &Activations,
    row_starts: &[usize],
    out: &mut [f32],
) -> Result<()> {
    let n_out = linears[0].weight.n_row;
    let failure = FirstError::default();
    let width = strip(n_out, team.n_thread());
    team.for_each_tile(scratch, out, n_out, row_starts, width, |scratch, mut tile: Tile<'_, f32>| {
        let linear = linears[tile.group()];
        let (rows, cols) = (tile.rows(), tile.cols());
        let bias = linear.bias_of(0);
        for first in rows.clone().step_by(linear.weight.max_rows()) {
            let last = rows.end.min(first + linear.weight.max_rows());
            if !bias.is_empty() {
                prefetch(&bias[cols.clone()]);
            }
            scratch.rows.clear();
            scratch.rows.extend(first - rows.start..last - rows.start);
            let products = &mut scratch.products;
            failure.keep(linear.weight.multiply(gguf, 0, cols.clone(), x, &scratch.rows, products));
            for (i, row) in (first..last).enumerate() {
                let (out, dots) = (tile.row_mut(row), products.row_mut(i));
                out.copy_from_slice(dots);
                if !bias.is_empty() {
                    Kernels::get().axpy(1.0, &bias[cols.clone()], out);
                }
            }
        }
    });
    failure.into_result()
}
