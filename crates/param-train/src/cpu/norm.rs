//! LayerNorm over all rows, forward and backward: the row kernels on all threads.

use param_kernels::Kernels;
use rayon::prelude::*;

/// Rows per task: fixed, so that sums over rows do not depend on the number of threads.
const ROWS: usize = 64;

/// What the backward pass needs of a forward pass.
pub struct Saved {
    mean: Vec<f32>, // [n_row]
    rstd: Vec<f32>, // [n_row]
}

/// `y = (x - mean) / sqrt(var + eps) * scale + shift` per row.
pub fn forward(
    y: &mut [f32], // [n_row, n_col]
    x: &[f32],     // [n_row, n_col]
    scale: &[f32], // [n_col]
    shift: &[f32], // [n_col]
    eps: f32,
) -> Saved {
    let n_col = scale.len();
    let n_row = x.len() / n_col;
    let (mut mean, mut rstd) = (vec![0.0; n_row], vec![0.0; n_row]);
    let kernels = Kernels::get();
    let parts = y.par_chunks_mut(ROWS * n_col).zip(x.par_chunks(ROWS * n_col));
    let statistics = mean.par_chunks_mut(ROWS).zip(rstd.par_chunks_mut(ROWS));
    parts.zip(statistics).for_each(|((y, x), (mean, rstd))| {
        kernels.layer_norm(x, scale, shift, eps, y, mean, rstd);
    });
    Saved { mean, rstd }
}

/// Adds to `dx`, `dscale` and `dshift` the gradients of [`forward`] given `dy`.
pub fn backward(
    dy: &[f32],    // [n_row, n_col]
    x: &[f32],     // [n_row, n_col]
    scale: &[f32], // [n_col]
    saved: &Saved,
    dx: &mut [f32],     // [n_row, n_col]
    dscale: &mut [f32], // [n_col]
    dshift: &mut [f32], // [n_col]
) {
    let n_col = scale.len();
    let kernels = Kernels::get();
    let parts = dx.par_chunks_mut(ROWS * n_col).zip(x.par_chunks(ROWS * n_col)).zip(dy.par_chunks(ROWS * n_col));
    let statistics = saved.mean.par_chunks(ROWS).zip(saved.rstd.par_chunks(ROWS));
    let partial = parts
        .zip(statistics)
        .map(|(((dx, x), dy), (mean, rstd))| {
            let (mut dscale, mut dshift) = (vec![0.0; n_col], vec![0.0; n_col]);
            kernels.layer_norm_backward(x, scale, mean, rstd, dy, dx, &mut dscale, &mut dshift);
            (dscale, dshift)
        })
        .collect::<Vec<_>>();
    for (part_scale, part_shift) in &partial {
        kernels.axpy(1.0, part_scale, dscale);
        kernels.axpy(1.0, part_shift, dshift);
    }
}
