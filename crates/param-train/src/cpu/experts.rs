//! The experts: products grouped over what each got, whose rows are read where they lie, and a weighted sum back; with their
//! backward.

use param_kernels::{Kernels, Matrix, Product};
use param_model::Activation;

use super::activation;
use super::dropout::Dropout;
use super::linear::add_column_sums;
use super::machine::{Machine, ROWS};
use super::router::{DROPPED, Routing};
use super::values::Values;

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
    /// [n_kept, n_ff], before the nonlinearity.
    pub pre: Values,
    /// [n_kept, n_embd], after dropout.
    pub y: Values,
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

/// One expert's part of a tensor of all of them.
fn of_expert<'a>(weight: &'a [f32], expert: usize, n_in: usize, n_out: usize) -> Matrix<'a> {
    Matrix::f32(&weight[expert * n_in * n_out..][..n_in * n_out], n_in, n_out)
}

/// `out[n] += sum over kept choices of weight * expert(x[n])`, dropped once more by `residual`.
pub fn forward(
    machine: &mut Machine,
    out: Option<&mut [f32]>, // [n_token, n_embd]
    x: &Values,              // [n_token, n_embd]
    weights: &Weights<&[f32]>,
    routing: &Routing,
    shape: Shape,
    (dropout, residual): (Option<&Dropout>, Option<&Dropout>),
) -> Saved {
    let Shape { n_embd, n_ff, .. } = shape;
    let (kernels, precision) = (Kernels::get(), machine.precision);
    let n_kept = routing.kept.len();
    let [mut pre, mut hidden] = [(); 2].map(|()| Values::take(&mut machine.buffers, precision, n_kept, n_ff));
    let mut y = Values::take(&mut machine.buffers, precision, n_kept, n_embd);
    let starts = &routing.starts;
    let up = |expert: usize| {
        let x = x.matrix().gathered(&routing.token_of_kept[routing.of_expert(expert)]);
        Product::new(precision, x.factor(), of_expert(weights.up, expert, n_embd, n_ff).factor())
    };
    let outs = [&mut pre.words[..], &mut hidden.words[..]];
    let bias = weights.up_bias;
    machine.multiply(outs, (n_ff, precision.per_word()), starts, up, |[pre, hidden], row, cols, sums| {
        if let Some(bias) = bias {
            let first = routing.expert_of(row) * n_ff;
            kernels.axpy(1.0, &bias[first + cols.start..first + cols.end], sums);
        }
        precision.store(kernels, sums, pre);
        activation::in_place(shape.activation, sums);
        precision.store(kernels, sums, hidden);
    });
    let down = |expert: usize| {
        let hidden = hidden.matrix().rows(routing.of_expert(expert));
        Product::new(precision, hidden.factor(), of_expert(weights.down, expert, n_ff, n_embd).factor())
    };
    let bias = weights.down_bias;
    machine.multiply([&mut y.words], (n_embd, precision.per_word()), starts, down, |[y], row, cols, sums| {
        if let Some(bias) = bias {
            let first = routing.expert_of(row) * n_embd;
            kernels.axpy(1.0, &bias[first + cols.start..first + cols.end], sums);
        }
        if let Some(dropout) = dropout {
            dropout.apply(row * n_embd + cols.start, sums);
        }
        precision.store(kernels, sums, y);
    });
    hidden.give(&mut machine.buffers);
    let Some(out) = out else { return Saved { pre, y } };
    machine.team.for_each_chunk(out, ROWS * n_embd, |i, out| {
        let [mut sum, mut row] = [(); 2].map(|()| vec![0.0; n_embd]);
        for (token, out) in (i * ROWS..).zip(out.chunks_exact_mut(n_embd)) {
            sum.fill(0.0);
            for choice in token * routing.k..(token + 1) * routing.k {
                if routing.position[choice] != DROPPED {
                    y.load(routing.position[choice] as usize, 0..n_embd, &mut row);
                    kernels.axpy(routing.weights[choice], &row, &mut sum);
                }
            }
            if let Some(dropout) = residual {
                dropout.apply(token * n_embd, &mut sum);
            }
            kernels.axpy(1.0, &sum, out);
        }
    });
    Saved { pre, y }
}

/// Gradient of the routing weights [n_token, k], given that of the experts' output.
pub fn backward_routing(
    machine: &mut Machine,
    dout: &[f32],
    saved: &Saved,
    routing: &Routing,
    n_embd: usize,
) -> Vec<f32> {
    let kernels = Kernels::get();
    let mut drouting = vec![0.0; routing.chosen.len()];
    machine.team.for_each_chunk(&mut drouting, ROWS * routing.k, |i, drouting| {
        let mut y = vec![0.0; n_embd];
        for (choice, d) in (i * ROWS * routing.k..).zip(drouting) {
            if routing.position[choice] != DROPPED {
                saved.y.load(routing.position[choice] as usize, 0..n_embd, &mut y);
                *d = kernels.dot(&dout[choice / routing.k * n_embd..][..n_embd], &y);
            }
        }
    });
    drouting
}

/// Gradients of [`forward`] given `dout`, that of the sum before the residual: adds to `dx` and `dweights`.
pub fn backward(
    machine: &mut Machine,
    dout: &[f32],   // [n_token, n_embd]
    x: &Values,     // [n_token, n_embd]
    dx: &mut [f32], // [n_token, n_embd]
    weights: &Weights<&[f32]>,
    dweights: Weights<&mut [f32]>,
    saved: Saved,
    routing: &Routing,
    shape: Shape,
    dropout: Option<&Dropout>,
) {
    let Shape { n_embd, n_ff, .. } = shape;
    let (kernels, precision) = (Kernels::get(), machine.precision);
    let n_kept = routing.kept.len();
    let starts = &routing.starts;
    let Saved { pre, y: mut dy } = saved;
    let n_expert = routing.load.len();

    // What was the output becomes its gradient, of each kept choice.
    let n_word = dy.n_word();
    machine.team.for_each_chunk(&mut dy.words, ROWS * n_word, |i, words| {
        let mut row = vec![0.0; n_embd];
        for (kept, words) in (i * ROWS..).zip(words.chunks_exact_mut(n_word)) {
            let choice = routing.kept[kept] as usize;
            row.fill(0.0);
            kernels.axpy(routing.weights[choice], &dout[choice / routing.k * n_embd..][..n_embd], &mut row);
            if let Some(dropout) = dropout {
                dropout.apply(kept * n_embd, &mut row);
            }
            precision.store(kernels, &row, words);
        }
    });

    let [mut dpre, mut hidden] = [(); 2].map(|()| Values::take(&mut machine.buffers, precision, n_kept, n_ff));
    let to_hidden = |expert: usize| {
        let dy = dy.matrix().rows(routing.of_expert(expert));
        Product::new(precision, dy.factor(), of_expert(weights.down, expert, n_ff, n_embd).t())
    };
    let outs = [&mut dpre.words[..], &mut hidden.words[..]];
    machine.multiply(outs, (n_ff, precision.per_word()), starts, to_hidden, |[dpre, hidden], row, cols, sums| {
        activation::backward(shape.activation, &pre, row, cols, sums, (dpre, hidden));
    });
    let down_gradient = |expert: usize| {
        let rows = routing.of_expert(expert);
        Product::new(precision, hidden.matrix().rows(rows.clone()).t(), dy.matrix().rows(rows).factor())
    };
    let rows = |n: usize| (0..=n_expert).map(|expert| expert * n).collect::<Vec<_>>();
    machine.multiply_add(dweights.down, n_embd, &rows(n_ff), down_gradient);
    hidden.give(&mut machine.buffers);
    let up_gradient = |expert: usize| {
        let x = x.matrix().gathered(&routing.token_of_kept[routing.of_expert(expert)]);
        Product::new(precision, x.t(), dpre.matrix().rows(routing.of_expert(expert)).factor())
    };
    machine.multiply_add(dweights.up, n_ff, &rows(n_embd), up_gradient);
    for (bias, dy, n) in [(dweights.up_bias, &dpre, n_ff), (dweights.down_bias, &dy, n_embd)] {
        for (expert, bias) in bias.into_iter().flat_map(|bias| bias.chunks_exact_mut(n)).enumerate() {
            add_column_sums(machine, dy.matrix().rows(routing.of_expert(expert)), bias);
        }
    }

    let mut dinput = machine.buffers.take(n_kept * n_embd); // [n_kept, n_embd]
    let to_input = |expert: usize| {
        let dpre = dpre.matrix().rows(routing.of_expert(expert));
        Product::new(precision, dpre.factor(), of_expert(weights.up, expert, n_embd, n_ff).t())
    };
    machine.multiply([&mut dinput[..]], (n_embd, 1), starts, to_input, |[dinput], _, _, sums| {
        dinput.copy_from_slice(sums);
    });
    machine.team.for_each_chunk(dx, ROWS * n_embd, |i, dx| {
        for (token, dx) in (i * ROWS..).zip(dx.chunks_exact_mut(n_embd)) {
            for choice in token * routing.k..(token + 1) * routing.k {
                if routing.position[choice] != DROPPED {
                    kernels.axpy(1.0, &dinput[routing.position[choice] as usize * n_embd..][..n_embd], dx);
                }
            }
        }
    });
    machine.buffers.give(dinput);
    for values in [dpre, pre, dy] {
        values.give(&mut machine.buffers);
    }
}
