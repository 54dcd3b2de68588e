//! Linear layers `y = x W^T + b`, forward and backward.

use param_kernels::{Mat, Write, matmul};
use rayon::prelude::*;

/// `y = x W^T + b`.
pub fn forward(
    y: &mut [f32],        // [n_row, n_out]
    x: &[f32],            // [n_row, n_in]
    weight: &[f32],       // [n_out, n_in]
    bias: Option<&[f32]>, // [n_out]
    (n_in, n_out): (usize, usize),
) {
    let n_row = x.len() / n_in;
    let write = match bias {
        Some(bias) => {
            set_rows(y, bias);
            Write::Add
        }
        None => Write::Replace,
    };
    let (x, weight) = (Mat::new(x, n_row, n_in), Mat::new(weight, n_out, n_in));
    matmul(y, n_out, write, 1.0, x, weight.t(), rayon::current_num_threads());
}

/// Gradients of [`forward`] given `dy`: adds to `dweight` and `dbias`; `dx` is replaced or added to.
pub fn backward(
    dy: &[f32],                       // [n_row, n_out]
    x: &[f32],                        // [n_row, n_in]
    weight: &[f32],                   // [n_out, n_in]
    (dx, write): (&mut [f32], Write), // [n_row, n_in]
    dweight: &mut [f32],              // [n_out, n_in]
    dbias: Option<&mut [f32]>,        // [n_out]
    (n_in, n_out): (usize, usize),
) {
    let n_row = x.len() / n_in;
    let n_thread = rayon::current_num_threads();
    let dy_mat = Mat::new(dy, n_row, n_out);
    matmul(dx, n_in, write, 1.0, dy_mat, Mat::new(weight, n_out, n_in), n_thread);
    matmul(dweight, n_in, Write::Add, 1.0, dy_mat.t(), Mat::new(x, n_row, n_in), n_thread);
    if let Some(dbias) = dbias {
        add_column_sums(dy, dbias);
    }
}

/// Sets every row of `y` [n_row, n_col] to `row` [n_col].
pub fn set_rows(y: &mut [f32], row: &[f32]) {
    y.par_chunks_mut(row.len()).with_min_len(16).for_each(|y| y.copy_from_slice(row));
}

/// `sums[j] += sum_i x[i, j]` for x [n_row, n_col], in row order whatever the number of threads.
pub fn add_column_sums(x: &[f32], sums: &mut [f32]) {
    // Wide enough for whole cache lines, narrow enough to give every thread its columns.
    const COLUMNS: usize = 64;
    let n_col = sums.len();
    sums.par_chunks_mut(COLUMNS).enumerate().for_each(|(i, sums)| {
        for row in x.chunks_exact(n_col) {
            for (sum, &x) in sums.iter_mut().zip(&row[i * COLUMNS..]) {
                *sum += x;
            }
        }
    });
}
