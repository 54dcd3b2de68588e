//! Causal multi-head attention, forward and backward, in tiles of queries that see only the keys they may: the
//! probabilities are made again in the backward pass, never kept.

use param_kernels::{Kernels, Mat, Write, matmul};
use rayon::prelude::*;

use super::dropout::Dropout;

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
    fn n_embd(self) -> usize {
        self.n_head * self.head_dim
    }

    /// Elements of a per-head tensor, [n_row, n_head, n_col, head_dim].
    fn n_per_head(self) -> usize {
        self.n_col * self.head_dim
    }

    /// Where the rows of a head begin within a [n_row, n_col, n_embd] tensor.
    fn head_start(self, row_head: usize) -> usize {
        row_head / self.n_head * self.n_col * self.n_embd() + row_head % self.n_head * self.head_dim
    }

    /// One head's first `n` positions within a [n_row, n_col, n_embd] tensor, from position `first`.
    fn head<'a>(self, x: &'a [f32], row_head: usize, first: usize, n: usize) -> Mat<'a> {
        Mat::strided(&x[self.head_start(row_head) + first * self.n_embd()..], n, self.head_dim, self.n_embd())
    }

    fn tiles(self) -> impl Iterator<Item = (usize, usize)> {
        (0..self.n_col).step_by(TILE).map(move |first| (first, TILE.min(self.n_col - first)))
    }
}

/// What the two passes share.
pub struct Inputs<'a> {
    /// Sizes.
    pub shape: Shape,
    /// Queries, [n_row, n_col, n_embd], heads contiguous within a position.
    pub q: &'a [f32],
    /// Keys, likewise.
    pub k: &'a [f32],
    /// Values, likewise.
    pub v: &'a [f32],
    /// Which positions are real, [n_row, n_col]; all where `None`.
    pub mask: Option<&'a [bool]>,
    /// Dropout of the probabilities.
    pub dropout: Option<&'a Dropout>,
}

impl Inputs<'_> {
    /// Attention probabilities of a tile of queries over the `first + n` keys it may see, [n, first + n].
    fn probabilities(&self, row_head: usize, first: usize, n: usize, scores: &mut [f32]) {
        let kernels = Kernels::get();
        let shape = self.shape;
        let n_key = first + n;
        let scale = 1.0 / (shape.head_dim as f32).sqrt();
        let (q, k) = (shape.head(self.q, row_head, first, n), shape.head(self.k, row_head, 0, n_key));
        matmul(scores, n_key, Write::Replace, scale, q, k.t(), 1);
        let mask = self.mask.map(|m| &m[row_head / shape.n_head * shape.n_col..][..n_key]);
        for (i, scores) in scores.chunks_exact_mut(n_key).enumerate() {
            scores[first + i + 1..].fill(f32::NEG_INFINITY);
            if let Some(mask) = mask {
                for (score, &real) in scores.iter_mut().zip(mask) {
                    *score += if real { 0.0 } else { PADDED };
                }
            }
            kernels.softmax(scores);
        }
    }

    fn drop(&self, row_head: usize, first: usize, n_key: usize, probabilities: &mut [f32]) {
        let Some(dropout) = self.dropout else { return };
        let n_col = self.shape.n_col;
        for (i, row) in probabilities.chunks_exact_mut(n_key).enumerate() {
            dropout.apply((row_head * n_col + first + i) * n_col, row);
        }
    }
}

/// Attention's output in `out` [n_row, n_col, n_embd].
pub fn forward(inputs: &Inputs, out: &mut [f32]) {
    let shape = inputs.shape;
    let mut heads = vec![0.0; out.len()]; // [n_row, n_head, n_col, head_dim]
    heads.par_chunks_mut(shape.n_per_head()).enumerate().for_each_init(
        || vec![0.0; TILE * shape.n_col],
        |scores, (row_head, out)| {
            for (first, n) in shape.tiles() {
                let n_key = first + n;
                let scores = &mut scores[..n * n_key]; // [n, n_key]
                inputs.probabilities(row_head, first, n, scores);
                inputs.drop(row_head, first, n_key, scores);
                let out = &mut out[first * shape.head_dim..][..n * shape.head_dim];
                let (p, v) = (Mat::new(scores, n, n_key), shape.head(inputs.v, row_head, 0, n_key));
                matmul(out, shape.head_dim, Write::Replace, 1.0, p, v, 1);
            }
        },
    );
    merge_heads(shape, &heads, out);
}

/// Gradients of [`forward`] given `dout`: replaces `dq`, `dk` and `dv`.
pub fn backward(
    inputs: &Inputs,
    out: &[f32],    // [n_row, n_col, n_embd]
    dout: &[f32],   // [n_row, n_col, n_embd]
    dq: &mut [f32], // [n_row, n_col, n_embd]
    dk: &mut [f32], // [n_row, n_col, n_embd]
    dv: &mut [f32], // [n_row, n_col, n_embd]
) {
    let shape = inputs.shape;
    let kernels = Kernels::get();
    let scale = 1.0 / (shape.head_dim as f32).sqrt();
    let mut heads = [vec![0.0; out.len()], vec![0.0; out.len()], vec![0.0; out.len()]]; // [n_row, n_head, n_col, head_dim]
    let [q_heads, k_heads, v_heads] = &mut heads;
    let per_head = shape.n_per_head();
    let tasks =
        q_heads.par_chunks_mut(per_head).zip(k_heads.par_chunks_mut(per_head)).zip(v_heads.par_chunks_mut(per_head));
    tasks.enumerate().for_each_init(
        || [vec![0.0; TILE * shape.n_col], vec![0.0; TILE * shape.n_col], vec![0.0; TILE * shape.n_col]],
        |[p, dropped, ds], (row_head, ((dq, dk), dv))| {
            for (first, n) in shape.tiles() {
                let n_key = first + n;
                let (p, ds) = (&mut p[..n * n_key], &mut ds[..n * n_key]); // [n, n_key]
                inputs.probabilities(row_head, first, n, p);
                let dout_tile = shape.head(dout, row_head, first, n);
                matmul(ds, n_key, Write::Replace, 1.0, dout_tile, shape.head(inputs.v, row_head, 0, n_key).t(), 1);
                inputs.drop(row_head, first, n_key, ds);
                let weights = if inputs.dropout.is_some() {
                    let dropped = &mut dropped[..n * n_key];
                    dropped.copy_from_slice(p);
                    inputs.drop(row_head, first, n_key, dropped);
                    &*dropped
                } else {
                    &*p
                };
                let dv = &mut dv[..n_key * shape.head_dim];
                matmul(dv, shape.head_dim, Write::Add, 1.0, Mat::new(weights, n, n_key).t(), dout_tile, 1);
                // The softmax's own term, sum_j p_j dp_j, equals the product of output and its gradient (Dao 2022).
                for (i, (row, p)) in ds.chunks_exact_mut(n_key).zip(p.chunks_exact(n_key)).enumerate() {
                    let at = shape.head_start(row_head) + (first + i) * shape.n_embd();
                    let at = at..at + shape.head_dim;
                    let mean = kernels.dot(&out[at.clone()], &dout[at]);
                    for (ds, &p) in row.iter_mut().zip(p) {
                        *ds = p * (*ds - mean);
                    }
                }
                let ds = Mat::new(ds, n, n_key);
                let dq = &mut dq[first * shape.head_dim..][..n * shape.head_dim];
                let (q, k) = (shape.head(inputs.q, row_head, first, n), shape.head(inputs.k, row_head, 0, n_key));
                matmul(dq, shape.head_dim, Write::Replace, scale, ds, k, 1);
                matmul(&mut dk[..n_key * shape.head_dim], shape.head_dim, Write::Add, scale, ds.t(), q, 1);
            }
        },
    );
    for (heads, merged) in heads.iter().zip([dq, dk, dv]) {
        merge_heads(shape, heads, merged);
    }
}

/// [n_row, n_head, n_col, head_dim] to [n_row, n_col, n_head * head_dim].
fn merge_heads(shape: Shape, heads: &[f32], merged: &mut [f32]) {
    let Shape { n_col, n_head, head_dim, .. } = shape;
    merged.par_chunks_mut(shape.n_embd()).with_min_len(16).enumerate().for_each(|(i, merged)| {
        let (row, col) = (i / n_col, i % n_col);
        for (head, merged) in merged.chunks_exact_mut(head_dim).enumerate() {
            merged.copy_from_slice(&heads[((row * n_head + head) * n_col + col) * head_dim..][..head_dim]);
        }
    });
}
