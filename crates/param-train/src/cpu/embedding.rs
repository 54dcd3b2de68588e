//! Token plus learned position embedding, forward and backward.

use param_kernels::Kernels;

use super::machine::{Machine, ROWS};

/// `x[b, t] = token[id] + position[t]`.
pub fn forward(
    machine: &mut Machine,
    x: &mut [f32], // [n_row, n_col, n_embd]
    ids: &[u32],   // [n_row, n_col]
    n_col: usize,
    token: &[f32],    // [n_vocab, n_embd]
    position: &[f32], // [n_ctx, n_embd]
    n_embd: usize,
) {
    machine.team.for_each_chunk(x, ROWS * n_embd, |i, x| {
        for (i, x) in (i * ROWS..).zip(x.chunks_exact_mut(n_embd)) {
            let token = &token[ids[i] as usize * n_embd..][..n_embd];
            let position = &position[i % n_col * n_embd..][..n_embd];
            for ((x, t), p) in x.iter_mut().zip(token).zip(position) {
                *x = t + p;
            }
        }
    });
}

/// Adds to `dtoken` and `dposition` the gradients of [`forward`] given `dx`: every thread some columns, in the order of the ids, so
/// the sums do not depend on threads.
pub fn backward(
    machine: &mut Machine,
    dx: &[f32],  // [n_row, n_col, n_embd]
    ids: &[u32], // [n_row, n_col]
    n_col: usize,
    dtoken: &mut [f32],    // [n_vocab, n_embd]
    dposition: &mut [f32], // [n_ctx, n_embd]
    n_embd: usize,
) {
    scatter(machine, dx, |i| ids[i] as usize, dtoken, n_embd);
    scatter(machine, dx, |i| i % n_col, dposition, n_embd);
}

/// Adds each row `i` of `dx` to row `row_of(i)` of `out`.
fn scatter(machine: &mut Machine, dx: &[f32], row_of: impl Fn(usize) -> usize + Sync, out: &mut [f32], n_embd: usize) {
    let kernels = Kernels::get();
    let starts = [0, out.len() / n_embd];
    machine.team.for_each_tile(&mut machine.scratch, out, n_embd, &starts, ROWS, |_, mut tile| {
        let cols = tile.cols();
        for (i, dx) in dx.chunks_exact(n_embd).enumerate() {
            kernels.axpy(1.0, &dx[cols.clone()], tile.row_mut(row_of(i)));
        }
    });
}
