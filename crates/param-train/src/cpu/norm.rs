//! LayerNorm over all rows, forward and backward: the row kernels on all threads.

use param_kernels::Kernels;

use super::machine::{Machine, ROWS};
use super::values::Values;

/// Scale and shift.
pub type Affine<'a> = (&'a [f32], &'a [f32]);

/// What the backward pass needs of a forward pass: for every [`ROWS`] rows their means, then their inverse deviations.
pub struct Saved {
    statistics: Vec<f32>, // [n_row * 2]
}

/// `y = (x - mean) / sqrt(var + eps) * scale + shift` per row.
pub fn forward(machine: &mut Machine, y: &mut Values, x: &[f32], affine: Affine, eps: f32) -> Saved {
    forward_with(machine, y, x, affine, eps, (&mut [], 0), |_, _| {})
}

/// [`forward`], where `also(rows of y in f32, rows of more)` sees what was computed, with the `n_more` elements of `more` that belong
/// to each row.
pub fn forward_with(
    machine: &mut Machine,
    y: &mut Values,
    x: &[f32], // [n_row, n_col]
    (scale, shift): Affine,
    eps: f32,
    (more, n_more): (&mut [f32], usize),
    also: impl Fn(&[f32], &mut [f32]) + Sync,
) -> Saved {
    let (kernels, precision) = (Kernels::get(), machine.precision);
    let n_col = scale.len();
    let mut statistics = vec![0.0; 2 * (x.len() / n_col)];
    let n_word = y.n_word();
    machine.team.for_each_chunks(
        (&mut y.words, ROWS * n_word),
        (&mut statistics, 2 * ROWS),
        (more, ROWS * n_more),
        |i, words, statistics, more| {
            let (mean, rstd) = statistics.split_at_mut(statistics.len() / 2);
            let x = &x[i * ROWS * n_col..][..mean.len() * n_col];
            let mut rows = vec![0.0; x.len()];
            kernels.layer_norm(x, scale, shift, eps, &mut rows, mean, rstd);
            also(&rows, more);
            for (row, words) in rows.chunks_exact(n_col).zip(words.chunks_exact_mut(n_word)) {
                precision.store(kernels, row, words);
            }
        },
    );
    Saved { statistics }
}

/// Adds to `dx`, `dscale` and `dshift` the gradients of [`forward`] given `dy`.
pub fn backward(
    machine: &mut Machine,
    dy: &[f32],    // [n_row, n_col]
    x: &[f32],     // [n_row, n_col]
    scale: &[f32], // [n_col]
    saved: &Saved,
    dx: &mut [f32],                             // [n_row, n_col]
    (dscale, dshift): (&mut [f32], &mut [f32]), // [n_col]
) {
    let n_col = scale.len();
    let kernels = Kernels::get();
    let n_part = x.len().div_ceil(ROWS * n_col);
    let mut partial = vec![0.0; n_part * 2 * n_col]; // scale, then shift of each part: sums do not depend on the threads
    let none: &mut [()] = &mut [];
    machine.team.for_each_chunks((dx, ROWS * n_col), (&mut partial, 2 * n_col), (none, 0), |i, dx, partial, _| {
        let at = i * ROWS * n_col..i * ROWS * n_col + dx.len();
        let statistics = &saved.statistics[2 * i * ROWS..][..2 * (dx.len() / n_col)];
        let (mean, rstd) = statistics.split_at(statistics.len() / 2);
        let (dscale, dshift) = partial.split_at_mut(n_col);
        kernels.layer_norm_backward(&x[at.clone()], scale, mean, rstd, &dy[at], dx, dscale, dshift);
    });
    for part in partial.chunks_exact(2 * n_col) {
        kernels.axpy(1.0, &part[..n_col], dscale);
        kernels.axpy(1.0, &part[n_col..], dshift);
    }
}
