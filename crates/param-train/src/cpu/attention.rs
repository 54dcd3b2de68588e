//! Causal multi-head attention, forward and backward, in tiles of queries that meet only the keys that one of them sees: the
//! probabilities are made again in the backward pass, never kept.

use std::ops::Range;

use param_kernels::{Kernels, Matrix, Precision, Product, Tile, Workspace};

use super::dropout::Dropout;
use super::machine::{Machine, Scratch};
use super::values::Values;

/// Queries per tile.
const TILE: usize = 64;
/// Added to the scores of padded keys, as in the reference.
const PADDED: f32 = -1e9;

/// Sizes of one attention.
#[derive(Clone, Copy)]
pub struct Shape {
    /// Sequences.
    pub n_row: usize,
    /// Positions of each.
    pub n_col: usize,
    /// Heads.
    pub n_head: usize,
    /// Width of a head.
    pub head_dim: usize,
}

impl Shape {
    fn tiles(self) -> impl Iterator<Item = Range<usize>> {
        (0..self.n_col).step_by(TILE).map(move |first| first..self.n_col.min(first + TILE))
    }

    /// Where each sequence begins.
    fn starts(self) -> Vec<usize> {
        (0..=self.n_row).map(|row| row * self.n_col).collect()
    }
}

/// What the two passes share.
pub struct Inputs<'a> {
    /// Sizes.
    pub shape: Shape,
    /// Queries, keys and values, [n_row, n_col, n_embd] each, heads contiguous within a position.
    pub qkv: &'a [Values; 3],
    /// Which positions are real, [n_row, n_col]; all where `None`.
    pub mask: Option<&'a [bool]>,
    /// The first key that each query sees, [n_row, n_col]; 0 where `None`.
    pub first: Option<&'a [u32]>,
    /// Dropout of the probabilities.
    pub dropout: Option<&'a Dropout>,
}

/// One head of one sequence.
struct Head<'a> {
    kernels: &'static Kernels,
    precision: Precision,
    shape: Shape,
    q: Matrix<'a>,            // [n_col, head_dim]
    k: Matrix<'a>,            // [n_col, head_dim]
    v: Matrix<'a>,            // [n_col, head_dim]
    mask: Option<&'a [bool]>, // [n_col]
    first: Option<&'a [u32]>, // [n_col]
    dropout: Option<&'a Dropout>,
    /// Number of the head among those of all sequences.
    number: usize,
}

impl<'a> Inputs<'a> {
    /// Operations of one product over all heads: each query with the keys it sees.
    fn n_operation(&self) -> f64 {
        let Shape { n_row, n_col, n_head, head_dim } = self.shape;
        let n_hidden = self.first.map_or(0.0, |first| first.iter().map(|&first| f64::from(first)).sum());
        let n_seen = (n_row * n_col * (n_col + 1)) as f64 / 2.0 - n_hidden;
        2.0 * (n_head * head_dim) as f64 * n_seen
    }

    fn head(&self, row: usize, head: usize, precision: Precision) -> Head<'a> {
        let shape = self.shape;
        let [q, k, v] = [0, 1, 2].map(|i| part(&self.qkv[i], shape, row, head));
        let mask = self.mask.map(|mask| &mask[row * shape.n_col..][..shape.n_col]);
        let first = self.first.map(|first| &first[row * shape.n_col..][..shape.n_col]);
        let number = row * shape.n_head + head;
        Head { kernels: Kernels::get(), precision, shape, q, k, v, mask, first, dropout: self.dropout, number }
    }
}

/// A head's columns in a sequence's rows.
fn part(x: &Values, shape: Shape, row: usize, head: usize) -> Matrix<'_> {
    let cols = head * shape.head_dim..(head + 1) * shape.head_dim;
    x.matrix().rows(row * shape.n_col..(row + 1) * shape.n_col).cols(cols)
}

impl Head<'_> {
    /// The keys that any of a tile of queries sees.
    fn keys(&self, tile: &Range<usize>) -> Range<usize> {
        let first = self.first.and_then(|first| first[tile.clone()].iter().min());
        first.map_or(0, |&first| first as usize)..tile.end
    }

    /// Gives `each(query within the tile, probabilities)` those of a tile of queries over the [`Head::keys`] that it sees.
    fn probabilities(&self, tile: Range<usize>, workspace: &mut Workspace, mut each: impl FnMut(usize, &mut [f32])) {
        let scale = 1.0 / (self.shape.head_dim as f32).sqrt();
        let keys = self.keys(&tile);
        let product = Product::new(self.precision, self.q.rows(tile.clone()).factor(), self.k.rows(keys.clone()).t());
        product.compute(self.kernels, 0..tile.len(), 0..keys.len(), workspace, |i, scores| {
            let query = tile.start + i;
            let first = self.first.map_or(0, |first| first[query] as usize);
            let (before, rest) = scores.split_at_mut(first - keys.start);
            let (seen, after) = rest.split_at_mut(query + 1 - first);
            before.fill(0.0);
            after.fill(0.0);
            seen.iter_mut().for_each(|score| *score *= scale);
            if let Some(mask) = self.mask {
                for (score, &real) in seen.iter_mut().zip(&mask[first..]) {
                    *score += if real { 0.0 } else { PADDED };
                }
            }
            self.kernels.softmax(seen);
            each(i, scores);
        });
    }

    /// Drops probabilities of query `query` over the keys from `first` on, or their gradients.
    fn drop(&self, query: usize, first: usize, row: &mut [f32]) {
        if let Some(dropout) = self.dropout {
            let n_col = self.shape.n_col;
            dropout.apply((self.number * n_col + query) * n_col + first, row);
        }
    }
}

/// Attention's output in `out` [n_row, n_col, n_embd].
pub fn forward(machine: &mut Machine, inputs: &Inputs, out: &mut Values) {
    machine.profile.add_operations(2.0 * inputs.n_operation());
    let (shape, precision) = (inputs.shape, machine.precision);
    let n_word = out.n_word();
    each_head(machine, shape, [&mut out.words], n_word, |scratch, row, head, mut tile| {
        let head = inputs.head(row, head, precision);
        let n_p = TILE.min(shape.n_col) * precision.words(shape.n_col); // [n_query, n_key]
        let (workspace, _, [p, _]) = scratch.buffers([0; 3], [n_p, 0]);
        for queries in shape.tiles() {
            let keys = head.keys(&queries);
            let n_word = precision.words(keys.len());
            head.probabilities(queries.clone(), workspace, |i, row| {
                head.drop(queries.start + i, keys.start, row);
                precision.store(head.kernels, row, &mut p[i * n_word..(i + 1) * n_word]);
            });
            let p = Matrix::new(precision, &p[..queries.len() * n_word], queries.len(), keys.len());
            let product = Product::new(precision, p.factor(), head.v.rows(keys).factor());
            product.compute(head.kernels, 0..queries.len(), 0..shape.head_dim, workspace, |i, sums| {
                precision.store(head.kernels, sums, tile.rows_mut(row * shape.n_col + queries.start + i)[0]);
            });
        }
    });
}

/// Runs `f(scratch, sequence, head, its part of the outputs)` for every head of every sequence.
fn each_head<const N: usize>(
    machine: &mut Machine,
    shape: Shape,
    outs: [&mut [u32]; N], // [n_row, n_col, n_embd]
    n_word: usize,
    f: impl Fn(&mut Scratch, usize, usize, Tile<'_, u32, N>) + Sync,
) {
    let width = n_word / shape.n_head;
    machine.team.for_each_tiles(&mut machine.scratch, outs, n_word, &shape.starts(), width, |scratch, tile| {
        let (row, head) = (tile.group(), tile.cols().start / width);
        f(scratch, row, head, tile);
    });
}

/// Gradients of [`forward`] given `dout`: replaces those of queries, keys and values.
pub fn backward(machine: &mut Machine, inputs: &Inputs, out: &Values, dout: &Values, dqkv: &mut [Values; 3]) {
    machine.profile.add_operations(5.0 * inputs.n_operation());
    let (shape, precision) = (inputs.shape, machine.precision);
    let Shape { n_col, head_dim, .. } = shape;
    let n_word = out.n_word();
    let outs = dqkv.each_mut().map(|values| &mut values.words[..]);
    each_head(machine, shape, outs, n_word, |scratch, row, head, mut tile| {
        let columns = head * head_dim..(head + 1) * head_dim;
        let dout_head = part(dout, shape, row, head);
        let head = inputs.head(row, head, precision);
        let kernels = head.kernels;
        let scale = 1.0 / (head_dim as f32).sqrt();
        let n_query = TILE.min(n_col);
        let (n_p, n_word, n_head) = (n_query * n_col, n_query * precision.words(n_col), n_col * head_dim);
        // Probabilities, gradients of keys and values; what is dropped of the first, and their gradients.
        let (workspace, [p, dk, dv], [weights, ds]) = scratch.buffers([n_p, n_head, n_head], [n_word; 2]);
        dk.fill(0.0);
        dv.fill(0.0);
        let [mut o, mut d] = [(); 2].map(|()| vec![0.0; head_dim]);
        for queries in shape.tiles() {
            let keys = head.keys(&queries);
            let (n_query, n_key) = (queries.len(), keys.len());
            let n_word = precision.words(n_key);
            let words = |i: usize| i * n_word..(i + 1) * n_word;
            head.probabilities(queries.clone(), workspace, |i, row| {
                p[i * n_key..(i + 1) * n_key].copy_from_slice(row);
                head.drop(queries.start + i, keys.start, row);
                precision.store(kernels, row, &mut weights[words(i)]);
            });
            let dout_tile = dout_head.rows(queries.clone());
            let product = Product::new(precision, dout_tile.factor(), head.v.rows(keys.clone()).t());
            product.compute(kernels, 0..n_query, 0..n_key, workspace, |i, dp| {
                head.drop(queries.start + i, keys.start, dp);
                // The softmax's own term, sum_j p_j dp_j, equals the product of output and its gradient (Dao 2022).
                let token = row * n_col + queries.start + i;
                out.load(token, columns.clone(), &mut o);
                dout.load(token, columns.clone(), &mut d);
                let mean = kernels.dot(&o, &d);
                for (dp, &p) in dp.iter_mut().zip(&p[i * n_key..(i + 1) * n_key]) {
                    *dp = p * (*dp - mean) * scale;
                }
                precision.store(kernels, dp, &mut ds[words(i)]);
            });
            let [weights, ds] =
                [&*weights, &*ds].map(|words| Matrix::new(precision, &words[..n_query * n_word], n_query, n_key));
            let to_values = Product::new(precision, weights.t(), dout_tile.factor());
            to_values.compute(kernels, 0..n_key, 0..head_dim, workspace, |key, sums| {
                kernels.axpy(1.0, sums, &mut dv[(keys.start + key) * head_dim..][..head_dim]);
            });
            let to_keys = Product::new(precision, ds.t(), head.q.rows(queries.clone()).factor());
            to_keys.compute(kernels, 0..n_key, 0..head_dim, workspace, |key, sums| {
                kernels.axpy(1.0, sums, &mut dk[(keys.start + key) * head_dim..][..head_dim]);
            });
            let to_queries = Product::new(precision, ds.factor(), head.k.rows(keys).factor());
            to_queries.compute(kernels, 0..n_query, 0..head_dim, workspace, |i, sums| {
                precision.store(kernels, sums, tile.rows_mut(row * n_col + queries.start + i)[0]);
            });
        }
        for (i, (dk, dv)) in dk.chunks_exact(head_dim).zip(dv.chunks_exact(head_dim)).enumerate() {
            let [_, k, v] = tile.rows_mut(row * n_col + i);
            precision.store(kernels, dk, k);
            precision.store(kernels, dv, v);
        }
    });
}
