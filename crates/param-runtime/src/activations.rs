//! Rows of activations: in f32, and in the form that the weights they meet are multiplied by, converted once for all of them.

use gguf::GgmlType;
use param_kernels::{ActivationBlock, Inputs, Kernels, Operand, Team};

use crate::error::{Error, FirstError, Result, resize};
use crate::weights::Matrix;

/// Rows for ggml start at multiples of this many bytes: more than any block's alignment, and two rows never share a cache line.
const ROW_ALIGN: usize = 64;
/// Rows handed to a thread at once where a row is little work.
pub(crate) const ROWS: usize = 8;

/// What rows of activations can be converted to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// What ggml's kernel for some type of weights reads.
    Ggml(GgmlType),
    /// What weights in tiles are multiplied by.
    Tile(Operand),
    /// Twice int8: each row, and what quantizing it left.
    Fine,
}

impl Form {
    /// Rows of int8 that stand for one row.
    fn n_term(self) -> usize {
        if self == Form::Fine { 2 } else { 1 }
    }
}

/// Some rows.
#[derive(Default)]
pub(crate) struct Activations {
    n_col: usize,
    pub floats: Vec<f32>,         // [n_row, n_col]
    blocks: Vec<ActivationBlock>, // [n_row, n_term, n_col / 32]
    pairs: Vec<u32>,              // [n_row, n_col / 2]
    words: Vec<u32>,              // [n_row, stride / 4]: whole words, so that every block is aligned
    row_bytes: usize,
    stride: usize,
    form: Option<Form>,
}

/// A form's rows while they are written: the buffer, and elements per row.
pub(crate) enum Rows<'a> {
    Int8(&'a mut [ActivationBlock], usize),
    Bf16(&'a mut [u32], usize),
    F32(&'a mut [f32]),
}

fn grown<T: Clone + Default>(buffer: &mut Vec<T>, n: usize) -> Result<&mut [T]> {
    if buffer.len() < n {
        resize("activations", buffer, n)?;
    }
    Ok(&mut buffer[..n])
}

impl Activations {
    /// `n_row` rows of `n_col` f32, to be written.
    pub fn floats_mut(&mut self, n_row: usize, n_col: usize) -> Result<&mut [f32]> {
        self.n_col = n_col;
        self.form = None;
        grown(&mut self.floats, n_row * n_col)
    }

    /// Row `row` in f32.
    pub fn float_row(&self, row: usize) -> &[f32] {
        &self.floats[row * self.n_col..(row + 1) * self.n_col]
    }

    /// `n_row` rows of `n_col` to be written in the form that `weights` are multiplied by, or in f32 where they must be converted
    /// afterwards.
    pub fn rows_mut(&mut self, weights: &Matrix, n_row: usize, n_col: usize) -> Result<Rows<'_>> {
        let form = weights.form();
        self.n_col = n_col;
        self.form = Some(form);
        Ok(match form {
            Form::Tile(Operand::Int8) => {
                let n_block = n_col / ActivationBlock::N_ELEMENT;
                Rows::Int8(grown(&mut self.blocks, n_row * n_block)?, n_block)
            }
            Form::Tile(Operand::Bf16) => {
                Rows::Bf16(grown(&mut self.pairs, n_row * n_col.div_ceil(2))?, n_col.div_ceil(2))
            }
            Form::Tile(Operand::F32) => Rows::F32(grown(&mut self.floats, n_row * n_col)?),
            Form::Ggml(_) | Form::Fine => {
                self.form = None;
                Rows::F32(grown(&mut self.floats, n_row * n_col)?)
            }
        })
    }

    /// Converts the first `n_row` rows for `weights`, unless they are already. `what` names them in an error.
    ///
    /// # Errors
    /// Values that ggml's types cannot hold: only a damaged model computes such.
    pub fn convert(&mut self, team: &mut Team, weights: &Matrix, n_row: usize, what: &str) -> Result<()> {
        if self.form == Some(weights.form()) {
            return Ok(());
        }
        let n_col = self.n_col;
        self.fill(team, weights, n_row, n_col, (&mut [] as &mut [()], 0), what, |_, _, _| {})
    }

    /// Lets `fill(first row, chunk of a, rows)` write `n_row` rows in f32, and converts them for `weights` while they are at hand.
    /// `a` has `a_len` elements for each row.
    ///
    /// # Errors
    /// As [`Activations::convert`].
    pub fn fill<A: Send>(
        &mut self,
        team: &mut Team,
        weights: &Matrix,
        n_row: usize,
        n_col: usize,
        (a, a_len): (&mut [A], usize),
        what: &str,
        fill: impl Fn(usize, &mut [A], &mut [f32]) + Sync,
    ) -> Result<()> {
        let form = weights.form();
        self.n_col = n_col;
        self.form = Some(form);
        let kernels = Kernels::get();
        let floats = (grown(&mut self.floats, n_row * n_col)?, ROWS * n_col);
        let a = (a, ROWS * a_len);
        match form {
            Form::Tile(Operand::F32) => {
                team.for_each_chunks(floats, a, (&mut [] as &mut [()], 0), |i, x, a, _| fill(i * ROWS, a, x));
            }
            Form::Tile(Operand::Bf16) => {
                let n_pair = n_col.div_ceil(2);
                let pairs = (grown(&mut self.pairs, n_row * n_pair)?, ROWS * n_pair);
                team.for_each_chunks(floats, a, pairs, |i, x, a, pairs| {
                    fill(i * ROWS, a, x);
                    for (x, pairs) in x.chunks_exact(n_col).zip(pairs.chunks_exact_mut(n_pair)) {
                        kernels.pair_row(x, pairs);
                    }
                });
            }
            Form::Tile(Operand::Int8) | Form::Fine => {
                let n_block = n_col / ActivationBlock::N_ELEMENT;
                let per_row = form.n_term() * n_block;
                let blocks = (grown(&mut self.blocks, n_row * per_row)?, ROWS * per_row);
                team.for_each_chunks(floats, a, blocks, |i, x, a, blocks| {
                    fill(i * ROWS, a, x);
                    for (x, blocks) in x.chunks_exact(n_col).zip(blocks.chunks_exact_mut(per_row)) {
                        let (first, rest) = blocks.split_at_mut(n_block);
                        kernels.quantize_row(x, first);
                        if form == Form::Fine {
                            kernels.quantize_rest(x, first, rest);
                        }
                    }
                });
            }
            Form::Ggml(_) => {
                let failed = |cause| Error::Compute { what: what.to_owned(), cause };
                let kernel = &weights.kernel;
                self.row_bytes = kernel.activation_bytes(n_col).map_err(failed)?;
                self.stride = self.row_bytes.next_multiple_of(ROW_ALIGN);
                let (row_bytes, n_word) = (self.row_bytes, self.stride / 4);
                let words = (grown(&mut self.words, n_row * n_word)?, ROWS * n_word);
                let failure = FirstError::default();
                team.for_each_chunks(floats, a, words, |i, x, a, words| {
                    fill(i * ROWS, a, x);
                    for (x, words) in x.chunks_exact(n_col).zip(words.chunks_exact_mut(n_word)) {
                        let bytes = &mut bytemuck::cast_slice_mut(words)[..row_bytes];
                        failure.keep(kernel.quantize_row(x, bytes).map_err(failed));
                    }
                });
                failure.into_result()?;
            }
        }
        Ok(())
    }

    /// Row `row` as converted for ggml.
    pub fn bytes(&self, row: usize) -> &[u8] {
        let start = row * self.stride;
        &bytemuck::cast_slice(&self.words)[start..start + self.row_bytes]
    }

    /// Calls `f` with some rows as the format of tiles takes them. Of fine rows there are twice as many: each, then what it left.
    pub fn with_rows<const N: usize>(&self, operand: Operand, rows: &[usize], f: impl FnOnce(Inputs<'_>)) {
        let n_term = self.form.map_or(1, Form::n_term);
        let n = rows.len() * n_term;
        assert!(n <= N, "{n} rows of at most {N}");
        match operand {
            Operand::Int8 => {
                let n_block = self.n_col / ActivationBlock::N_ELEMENT;
                let mut x: [&[ActivationBlock]; N] = [&[]; N];
                for (x, i) in x.iter_mut().zip(0..n) {
                    let row = rows[i / n_term] * n_term + i % n_term;
                    *x = &self.blocks[row * n_block..(row + 1) * n_block];
                }
                f(Inputs::Int8(&x[..n]));
            }
            Operand::Bf16 => {
                let n_pair = self.n_col.div_ceil(2);
                let mut x: [&[u32]; N] = [&[]; N];
                for (x, &row) in x.iter_mut().zip(rows) {
                    *x = &self.pairs[row * n_pair..(row + 1) * n_pair];
                }
                f(Inputs::Bf16(&x[..n]));
            }
            Operand::F32 => {
                let mut x: [&[f32]; N] = [&[]; N];
                for (x, &row) in x.iter_mut().zip(rows) {
                    *x = self.float_row(row);
                }
                f(Inputs::F32(&x[..n]));
            }
        }
    }
}
