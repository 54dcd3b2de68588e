//! Activations: rows in the precision that products read.

use std::ops::Range;

use param_kernels::{Kernels, Matrix, Precision, prefetch};

use super::buffers::Buffers;

/// A matrix [n_row, n_col] of f32 or bf16.
pub struct Values {
    /// [n_row, precision.words(n_col)].
    pub words: Vec<u32>,
    pub n_col: usize,
    pub precision: Precision,
}

impl Values {
    /// A matrix with whatever values its memory's last user left.
    pub fn take(buffers: &mut Buffers, precision: Precision, n_row: usize, n_col: usize) -> Self {
        Self { words: buffers.take_words(n_row * precision.words(n_col)), n_col, precision }
    }

    /// Gives its memory back.
    pub fn give(self, buffers: &mut Buffers) {
        buffers.give_words(self.words);
    }

    /// Words of a row.
    pub fn n_word(&self) -> usize {
        self.precision.words(self.n_col)
    }

    pub fn n_row(&self) -> usize {
        self.words.len() / self.n_word()
    }

    pub fn matrix(&self) -> Matrix<'_> {
        Matrix::new(self.precision, &self.words, self.n_row(), self.n_col)
    }

    /// Asks for columns `cols` of row `row`, if there is one.
    pub fn ask(&self, row: usize, cols: Range<usize>) {
        let per_word = self.precision.per_word();
        let start = row * self.n_word();
        let words = self.words.get(start + cols.start / per_word..start + cols.end.div_ceil(per_word));
        prefetch(words.unwrap_or_default());
    }

    /// Columns `cols` of row `row` in f32, which must begin and end with a word unless they end with the row.
    pub fn load(&self, row: usize, cols: Range<usize>, x: &mut [f32]) {
        let per_word = self.precision.per_word();
        let start = row * self.n_word();
        let words = &self.words[start + cols.start / per_word..start + cols.end.div_ceil(per_word)];
        self.precision.load(Kernels::get(), words, x);
    }
}
