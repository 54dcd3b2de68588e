//! A feed-forward layer as two parallel steps: the chosen experts' up-projections with bias, activation and conversion for what
//! follows, then their down-projections with bias, weighted and summed. No expert has a tensor of its own in between; a dense
//! layer is one expert that every token takes.

use gguf::Gguf;
use param_kernels::{Kernels, Team, Tile, prefetch};
use param_model::Activation;

use crate::activations::{Activations, Rows};
use crate::error::{FirstError, Result};
use crate::matmul::{MAX_STRIP, strip};
use crate::routing::Routing;
use crate::scratch::Scratch;
use crate::weights::FeedForward;

/// `out = ffn(x)`: rows of `x` and `out` [n_token, n_embd] are tokens, routed by `routing`. `hidden` is what lies between, [rows of
/// the routing, n_ff].
pub(crate) fn feed_forward(
    team: &mut Team,
    scratch: &mut [Scratch],
    gguf: &Gguf,
    layer: &FeedForward,
    activation: Activation,
    routing: &Routing,
    x: &Activations,
    hidden: &mut Activations,
    out: &mut [f32],
) -> Result<()> {
    let n_ff = layer.up.weight.n_row;
    let n_row = routing.n_row();
    let step = Up { gguf, layer, activation, routing, x, failure: FirstError::default() };
    let width = strip(n_ff, team.n_thread());
    // Whole strips are whole blocks and pairs, because strips are multiples of 32.
    match hidden.rows_mut(&layer.down.weight, n_row, n_ff)? {
        Rows::Int8(blocks, n_block) => {
            let per_block = n_ff / n_block;
            let write = |x: &[f32], out: &mut [_]| {
                Kernels::get().quantize_row(x, out);
            };
            team.for_each_tile(scratch, blocks, n_block, &routing.row_starts, width / per_block, |scratch, tile| {
                step.run(scratch, tile, per_block, write);
            });
        }
        Rows::Bf16(pairs, n_pair) => {
            let write = |x: &[f32], out: &mut [_]| Kernels::get().pair_row(x, out);
            team.for_each_tile(scratch, pairs, n_pair, &routing.row_starts, width / 2, |scratch, tile| {
                step.run(scratch, tile, 2, write);
            });
        }
        Rows::F32(floats) => {
            let write = |x: &[f32], out: &mut [f32]| out.copy_from_slice(x);
            team.for_each_tile(scratch, floats, n_ff, &routing.row_starts, width, |scratch, tile| {
                step.run(scratch, tile, 1, write);
            });
        }
    }
    step.failure.into_result()?;
    hidden.convert(team, &layer.down.weight, n_row, &layer.down.weight.name)?;
    down(team, scratch, gguf, layer, routing, hidden, out)
}

/// The first step.
struct Up<'a> {
    gguf: &'a Gguf,
    layer: &'a FeedForward,
    activation: Activation,
    routing: &'a Routing,
    x: &'a Activations,
    failure: FirstError,
}

impl Up<'_> {
    /// A strip of the outputs of one expert for all of its rows; `write` puts `per_element` of them into an element of the tile.
    fn run<T>(
        &self,
        scratch: &mut Scratch,
        mut tile: Tile<'_, T>,
        per_element: usize,
        write: impl Fn(&[f32], &mut [T]),
    ) {
        let kernels = Kernels::get();
        let gelu = match self.activation {
            Activation::GeluErf => Kernels::bias_gelu_erf,
            Activation::GeluTanh => Kernels::bias_gelu_tanh,
        };
        let up = &self.layer.up;
        let expert = self.routing.active[tile.group()];
        let (all, cols) = (tile.rows(), tile.cols());
        let cols = cols.start * per_element..up.weight.n_row.min(cols.end * per_element);
        let bias = match up.bias_of(expert) {
            [] => &[0.0; MAX_STRIP][..cols.len()],
            bias => &bias[cols.clone()],
        };
        for first in all.clone().step_by(up.weight.max_rows()) {
            let rows = first..all.end.min(first + up.weight.max_rows());
            let tokens = &self.routing.token_of_row[rows.clone()];
            prefetch(bias);
            let products = &mut scratch.products;
            self.failure.keep(up.weight.multiply(self.gguf, expert, cols.clone(), self.x, tokens, products));
            let (dots, width) = products.rows_mut(rows.len());
            gelu(kernels, bias, width, dots);
            for (i, row) in rows.enumerate() {
                write(products.row_mut(i), tile.row_mut(row));
            }
        }
    }
}

/// The second step: each strip of the outputs by one thread, for every expert in turn, so that the sums need no lock and their order
/// never changes.
fn down(
    team: &mut Team,
    scratch: &mut [Scratch],
    gguf: &Gguf,
    layer: &FeedForward,
    routing: &Routing,
    hidden: &Activations,
    out: &mut [f32], // [n_token, n_embd]
) -> Result<()> {
    let (kernels, down) = (Kernels::get(), &layer.down);
    let n_embd = down.weight.n_row;
    let n_token = out.len() / n_embd;
    let failure = FirstError::default();
    let width = strip(n_embd, team.n_thread());
    team.for_each_tile(scratch, out, n_embd, &[0, n_token], width, |scratch, mut tile| {
        let cols = tile.cols();
        tile.rows().for_each(|token| tile.row_mut(token).fill(0.0));
        for (&expert, rows) in routing.active.iter().zip(routing.row_starts.windows(2)) {
            let bias = down.bias_of(expert);
            for first in (rows[0]..rows[1]).step_by(down.weight.max_rows()) {
                scratch.rows.clear();
                scratch.rows.extend(first..rows[1].min(first + down.weight.max_rows()));
                if !bias.is_empty() {
                    prefetch(&bias[cols.clone()]);
                }
                let products = &mut scratch.products;
                failure.keep(down.weight.multiply(gguf, expert, cols.clone(), hidden, &scratch.rows, products));
                for (i, &row) in scratch.rows.iter().enumerate() {
                    let (dots, out) = (products.row_mut(i), tile.row_mut(routing.token_of_row[row]));
                    if !bias.is_empty() {
                        kernels.axpy(1.0, &bias[cols.clone()], dots);
                    }
                    kernels.axpy(routing.weight_of_row[row], dots, out);
                }
            }
        }
    });
    failure.into_result()
}
