//! Token plus learned position embedding, forward and backward.

use param_kernels::Kernels;
use rayon::prelude::*;

/// `x[b, t] = token[id] + position[t]`.
pub fn forward(
    x: &mut [f32], // [n_row, n_col, n_embd]
    ids: &[u32],   // [n_row, n_col]
    n_col: usize,
    token: &[f32],    // [n_vocab, n_embd]
    position: &[f32], // [n_ctx, n_embd]
    n_embd: usize,
) {
    x.par_chunks_mut(n_embd).with_min_len(16).zip(ids).enumerate().for_each(|(i, (x, &id))| {
        let token = &token[id as usize * n_embd..][..n_embd];
        let position = &position[i % n_col * n_embd..][..n_embd];
        for ((x, t), p) in x.iter_mut().zip(token).zip(position) {
            *x = t + p;
        }
    });
}

/// Adds to `dtoken` and `dposition` the gradients of [`forward`] given `dx`. In the order of the ids, so the sums do
/// not depend on threads; a gather over rows, its cost is far below one matmul.
pub fn backward(
    dx: &[f32],  // [n_row, n_col, n_embd]
    ids: &[u32], // [n_row, n_col]
    n_col: usize,
    dtoken: &mut [f32],    // [n_vocab, n_embd]
    dposition: &mut [f32], // [n_ctx, n_embd]
    n_embd: usize,
) {
    let kernels = Kernels::get();
    for (i, (dx, &id)) in dx.chunks_exact(n_embd).zip(ids).enumerate() {
        kernels.axpy(1.0, dx, &mut dtoken[id as usize * n_embd..][..n_embd]);
        kernels.axpy(1.0, dx, &mut dposition[i % n_col * n_embd..][..n_embd]);
    }
}
