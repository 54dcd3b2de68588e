//! The experts: tokens gathered by expert, grouped matmuls over what each got, weighted sum back; with their backward.

use param_kernels::{Kernels, Mat, Write, matmul};
use param_model::Activation;
use rayon::prelude::*;

use super::buffers::Buffers;
use super::dropout::Dropout;
use super::router::{DROPPED, Routing};
use super::{activation, linear};

/// The experts' parameters or, as `&mut`, their gradients.
pub struct Weights<W> {
    /// [n_expert, n_embd, n_ff], input-major.
    pub up: W,
    /// [n_expert, n_ff].
    pub up_bias: Option<W>,
    /// [n_expert, n_ff, n_embd], input-major.
    pub down: W,
    /// [n_expert, n_embd].
    pub down_bias: Option<W>,
}

/// What the backward pass needs. Rows are the kept choices, sorted by expert.
pub struct Saved {
    x: Vec<f32>,      // [n_kept, n_embd]
    pre: Vec<f32>,    // [n_kept, n_ff]
    hidden: Vec<f32>, // [n_kept, n_ff]
    y: Vec<f32>,      // [n_kept, n_embd], after dropout
}

impl Saved {
    /// Gives the memory back.
    pub fn recycle(self, buffers: &mut Buffers) {
        [self.x, self.pre, self.hidden, self.y].into_iter().for_each(|b| buffers.give(b));
    }
}

/// Sizes of the experts of one block.
#[derive(Clone, Copy)]
pub struct Shape {
    /// Width of the residual stream.
    pub n_embd: usize,
    /// Hidden width.
    pub n_ff: usize,
    /// Nonlinearity.
    pub activation: Activation,
}

/// `out[n] = sum over kept choices of weight * expert(x[n])`, zero for a token dropped everywhere.
pub fn forward(
    out: &mut [f32], // [n_token, n_embd]
    x: &[f32],       // [n_token, n_embd]
    weights: &Weights<&[f32]>,
    routing: &Routing,
    shape: Shape,
    dropout: Option<&Dropout>,
    buffers: &mut Buffers,
) -> Saved {
    let Shape { n_embd, n_ff, activation } = shape;
    let n_kept = routing.kept.len();
    let mut saved = Saved {
        x: buffers.take(n_kept * n_embd),
        pre: buffers.take(n_kept * n_ff),
        hidden: buffers.take(n_kept * n_ff),
        y: buffers.take(n_kept * n_embd),
    };
    gather(&mut saved.x, x, routing, n_embd);
    grouped(&mut saved.pre, &saved.x, weights.up, weights.up_bias, routing, (n_embd, n_ff));
    activation::forward(activation, &saved.pre, &mut saved.hidden);
    grouped(&mut saved.y, &saved.hidden, weights.down, weights.down_bias, routing, (n_ff, n_embd));
    if let Some(dropout) = dropout {
        dropout.apply_all(&mut saved.y);
    }
    let kernels = Kernels::get();
    out.par_chunks_mut(n_embd).with_min_len(16).enumerate().for_each(|(token, out)| {
        out.fill(0.0);
        for choice in token * routing.k..(token + 1) * routing.k {
            if routing.position[choice] != DROPPED {
                let y = &saved.y[routing.position[choice] as usize * n_embd..][..n_embd];
                kernels.axpy(routing.weights[choice], y, out);
            }
        }
    });
    saved
}

/// Gradients of [`forward`] given `dout`: adds to `dx` and `dweights`, returns that of the routing weights [n_token, k].
pub fn backward(
    dout: &[f32],   // [n_token, n_embd]
    dx: &mut [f32], // [n_token, n_embd]
    weights: &Weights<&[f32]>,
    mut dweights: Weights<&mut [f32]>,
    saved: &Saved,
    routing: &Routing,
    shape: Shape,
    dropout: Option<&Dropout>,
    buffers: &mut Buffers,
) -> Vec<f32> {
    let Shape { n_embd, n_ff, activation } = shape;
    let kernels = Kernels::get();
    let n_kept = routing.kept.len();

    let mut drouting = vec![0.0; routing.chosen.len()]; // [n_token, k]
    drouting.par_iter_mut().with_min_len(64).enumerate().for_each(|(choice, d)| {
        if routing.position[choice] != DROPPED {
            let y = &saved.y[routing.position[choice] as usize * n_embd..][..n_embd];
            *d = kernels.dot(&dout[choice / routing.k * n_embd..][..n_embd], y);
        }
    });

    let mut dy = buffers.take(n_kept * n_embd); // [n_kept, n_embd]
    gather(&mut dy, dout, routing, n_embd);
    dy.par_chunks_mut(n_embd).with_min_len(16).zip(&routing.kept).for_each(|(dy, &choice)| {
        let weight = routing.weights[choice as usize];
        dy.iter_mut().for_each(|d| *d *= weight);
    });
    if let Some(dropout) = dropout {
        dropout.apply_all(&mut dy);
    }

    let mut dhidden = buffers.take(n_kept * n_ff); // [n_kept, n_ff]
    let (down, ddown) = (weights.down, (dweights.down, dweights.down_bias.as_deref_mut()));
    grouped_backward(&dy, &saved.hidden, down, &mut dhidden, ddown, routing, (n_ff, n_embd));
    activation::backward(activation, &saved.pre, &mut dhidden);
    let dinput = &mut dy; // [n_kept, n_embd]: the output's gradient has been used up
    let (up, dup) = (weights.up, (dweights.up, dweights.up_bias.as_deref_mut()));
    grouped_backward(&dhidden, &saved.x, up, dinput, dup, routing, (n_embd, n_ff));

    dx.par_chunks_mut(n_embd).with_min_len(16).enumerate().for_each(|(token, dx)| {
        for choice in token * routing.k..(token + 1) * routing.k {
            if routing.position[choice] != DROPPED {
                kernels.axpy(1.0, &dinput[routing.position[choice] as usize * n_embd..][..n_embd], dx);
            }
        }
    });
    buffers.give(dy);
    buffers.give(dhidden);
    drouting
}

/// Copies each kept choice's token row from `x` [n_token, n_col] into `rows` [n_kept, n_col].
fn gather(rows: &mut [f32], x: &[f32], routing: &Routing, n_col: usize) {
    rows.par_chunks_mut(n_col).with_min_len(16).zip(&routing.kept).for_each(|(row, &choice)| {
        row.copy_from_slice(&x[choice as usize / routing.k * n_col..][..n_col]);
    });
}

/// `y[rows of e] = x[rows of e] W[e] + b[e]` for every expert.
fn grouped(
    y: &mut [f32],        // [n_kept, n_out]
    x: &[f32],            // [n_kept, n_in]
    weight: &[f32],       // [n_expert, n_in, n_out]
    bias: Option<&[f32]>, // [n_expert, n_out]
    routing: &Routing,
    (n_in, n_out): (usize, usize),
) {
    for (expert, weight) in weight.chunks_exact(n_in * n_out).enumerate() {
        let rows = routing.of_expert(expert);
        let y = &mut y[rows.start * n_out..rows.end * n_out];
        let write = match bias {
            Some(bias) => {
                linear::set_rows(y, &bias[expert * n_out..][..n_out]);
                Write::Add
            }
            None => Write::Replace,
        };
        let x = Mat::new(&x[rows.start * n_in..rows.end * n_in], rows.len(), n_in);
        matmul(y, n_out, write, 1.0, x, Mat::new(weight, n_in, n_out), rayon::current_num_threads());
    }
}

/// Gradients of [`grouped`] given `dy`: replaces `dx`, adds to those of weight and bias.
fn grouped_backward(
    dy: &[f32],     // [n_kept, n_out]
    x: &[f32],      // [n_kept, n_in]
    weight: &[f32], // [n_expert, n_in, n_out]
    dx: &mut [f32], // [n_kept, n_in]
    (dweight, mut dbias): (&mut [f32], Option<&mut [f32]>),
    routing: &Routing,
    (n_in, n_out): (usize, usize),
) {
    let n_thread = rayon::current_num_threads();
    let experts = weight.chunks_exact(n_in * n_out).zip(dweight.chunks_exact_mut(n_in * n_out));
    for (expert, (weight, dweight)) in experts.enumerate() {
        let rows = routing.of_expert(expert);
        let dy = &dy[rows.start * n_out..rows.end * n_out];
        let dy_mat = Mat::new(dy, rows.len(), n_out);
        let x = Mat::new(&x[rows.start * n_in..rows.end * n_in], rows.len(), n_in);
        let dx = &mut dx[rows.start * n_in..rows.end * n_in];
        matmul(dx, n_in, Write::Replace, 1.0, dy_mat, Mat::new(weight, n_in, n_out).t(), n_thread);
        matmul(dweight, n_out, Write::Add, 1.0, x.t(), dy_mat, n_thread);
        if let Some(dbias) = &mut dbias {
            linear::add_column_sums(dy, &mut dbias[expert * n_out..][..n_out]);
        }
    }
}
