//! Matrices as products read them: stored in f32 or bf16, their rows strided or gathered, as they are or transposed.

use std::ops::Range;

use crate::Kernels;
use crate::isa::Isa;

/// What the factors of a product are stored in; sums are f32 always.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// One element to a word of 32 bits.
    F32,
    /// Two elements to a word, the first in its low half.
    Bf16,
}

impl Precision {
    /// Elements to a word.
    pub const fn per_word(self) -> usize {
        match self {
            Precision::F32 => 1,
            Precision::Bf16 => 2,
        }
    }

    /// Words of a row of `n` elements; what is left of the last one is zero.
    pub const fn words(self, n: usize) -> usize {
        n.div_ceil(self.per_word())
    }

    /// Writes `x` [n] as words [words(n)].
    pub fn store(self, kernels: &Kernels, x: &[f32], words: &mut [u32]) {
        match self {
            Precision::F32 => words.copy_from_slice(bytemuck::cast_slice(x)),
            Precision::Bf16 => kernels.pair_row(x, words),
        }
    }

    /// Reads `x` [n] from words [words(n)].
    pub fn load(self, kernels: &Kernels, words: &[u32], x: &mut [f32]) {
        match self {
            Precision::F32 => x.copy_from_slice(bytemuck::cast_slice(words)),
            Precision::Bf16 => kernels.unpair_row(words, x),
        }
    }
}

/// A read-only matrix [n_row, n_col], each of its rows contiguous.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    pub(crate) words: &'a [u32],
    /// Words from one row to the next.
    pub(crate) stride: usize,
    pub(crate) n_row: usize,
    pub(crate) n_col: usize,
    pub(crate) precision: Precision,
    /// Where the rows are, if not one after another: [n_row].
    index: Option<&'a [u32]>,
}

impl<'a> Matrix<'a> {
    /// A matrix of f32 that fills `data`.
    pub fn f32(data: &'a [f32], n_row: usize, n_col: usize) -> Self {
        Self::new(Precision::F32, bytemuck::cast_slice(data), n_row, n_col)
    }

    /// A matrix that fills `words` [n_row, precision.words(n_col)].
    ///
    /// # Panics
    /// If it does not.
    pub fn new(precision: Precision, words: &'a [u32], n_row: usize, n_col: usize) -> Self {
        let stride = precision.words(n_col);
        assert_eq!(words.len(), n_row * stride, "a {n_row} x {n_col} matrix");
        Self { words, stride, n_row, n_col, precision, index: None }
    }

    /// Some of its rows.
    pub fn rows(self, rows: Range<usize>) -> Self {
        assert!(rows.start <= rows.end && rows.end <= self.n_row, "rows {rows:?} of {}", self.n_row);
        match self.index {
            Some(index) => Self { n_row: rows.len(), index: Some(&index[rows]), ..self },
            None => {
                Self { n_row: rows.len(), words: &self.words[self.words.len().min(rows.start * self.stride)..], ..self }
            }
        }
    }

    /// Some of its columns; in bf16 the first must be even.
    pub fn cols(self, cols: Range<usize>) -> Self {
        assert!(cols.start <= cols.end && cols.end <= self.n_col, "columns {cols:?} of {}", self.n_col);
        assert!(cols.start.is_multiple_of(self.precision.per_word()), "column {} lies within a word", cols.start);
        let first = self.words.len().min(cols.start / self.precision.per_word());
        Self { words: &self.words[first..], n_col: cols.len(), ..self }
    }

    /// Its rows at `index`, in that order.
    pub fn gathered(self, index: &'a [u32]) -> Self {
        assert!(self.index.is_none(), "rows are gathered once");
        assert!(index.iter().all(|&i| (i as usize) < self.n_row), "a row beyond {}", self.n_row);
        Self { n_row: index.len(), index: Some(index), ..self }
    }

    /// As a factor.
    pub fn factor(self) -> Factor<'a> {
        Factor { matrix: self, transposed: false }
    }

    /// Its transpose as a factor.
    pub fn t(self) -> Factor<'a> {
        Factor { matrix: self, transposed: true }
    }

    /// Row `i` from its start to the end of all words.
    #[inline(always)]
    pub(crate) fn tail(&self, i: usize) -> &'a [u32] {
        let row = match self.index {
            Some(index) => index[i] as usize,
            None => i,
        };
        &self.words[row * self.stride..]
    }

    /// `N` words of row `i` from word `first` on. Their number is a constant, so that they are moved by registers.
    #[inline(always)]
    pub(crate) fn part<const N: usize>(&self, i: usize, first: usize) -> &'a [u32; N] {
        match self.tail(i)[first..].first_chunk() {
            Some(part) => part,
            None => panic!("{N} words from word {first} of row {i} on"),
        }
    }

    /// Row `i`, words `words` of it.
    #[inline(always)]
    pub(crate) fn row(&self, i: usize, words: Range<usize>) -> &'a [u32] {
        &self.tail(i)[words]
    }

    /// Element (i, j) as bits of f32, zero beyond its edges.
    #[inline(always)]
    pub(crate) fn get(&self, i: usize, j: usize) -> u32 {
        if i >= self.n_row || j >= self.n_col {
            return 0;
        }
        match self.precision {
            Precision::F32 => self.tail(i)[j],
            Precision::Bf16 => self.tail(i)[j / 2] >> (16 * (j % 2)) << 16,
        }
    }
}

/// A matrix or its transpose.
#[derive(Clone, Copy, Debug)]
pub struct Factor<'a> {
    pub(crate) matrix: Matrix<'a>,
    pub(crate) transposed: bool,
}

impl Factor<'_> {
    pub(crate) fn shape(&self) -> (usize, usize) {
        let Matrix { n_row, n_col, .. } = self.matrix;
        if self.transposed { (n_col, n_row) } else { (n_row, n_col) }
    }
}

/// See [`Kernels::unpair_row`].
#[inline(always)]
pub(crate) fn unpair_row<I: Isa>(words: &[u32], x: &mut [f32]) {
    assert_eq!(words.len(), x.len().div_ceil(2));
    let (pairs, last) = x.as_chunks_mut::<2>();
    for (pair, word) in pairs.iter_mut().zip(words) {
        *pair = [f32::from_bits(word << 16), f32::from_bits(word & 0xffff_0000)];
    }
    if let ([x], Some(word)) = (last, words.last()) {
        *x = f32::from_bits(word << 16);
    }
}

/// See [`Kernels::add_column_sums`].
#[inline(always)]
pub(crate) fn add_column_sums<I: Isa>(m: &Matrix<'_>, sums: &mut [f32]) {
    assert_eq!(m.n_col, sums.len());
    let n_word = m.precision.words(m.n_col);
    for i in 0..m.n_row {
        let words = m.row(i, 0..n_word);
        match m.precision {
            Precision::F32 => {
                for j in 0..n_word {
                    sums[j] += f32::from_bits(words[j]);
                }
            }
            Precision::Bf16 => {
                let (pairs, last) = sums.as_chunks_mut::<2>();
                for (pair, word) in pairs.iter_mut().zip(words) {
                    pair[0] += f32::from_bits(word << 16);
                    pair[1] += f32::from_bits(word & 0xffff_0000);
                }
                if let ([last], Some(word)) = (last, words.last()) {
                    *last += f32::from_bits(word << 16);
                }
            }
        }
    }
}
